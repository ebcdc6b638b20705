"""Loading a library's model without its report and its bar: layers are left out on purpose, and it takes a second."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as library_logging


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Nothing is said inside; the library's verbosity and its bar are as before afterwards."""
    verbosity, bar = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity(logging.ERROR)
    library_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library_logging.set_verbosity(verbosity)
        if bar:
            library_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
