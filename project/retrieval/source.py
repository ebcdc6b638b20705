"""What the evidence cache's key says of a retriever beside its class path: its arguments, and a source of one's own.

Unusual: classes of this package have no digest, `cache.FORMAT` stands for them. So a release finds the caches of the
one before, while a retriever that somebody is writing is asked again after every change.
"""

import hashlib
import inspect
import marshal
import sys
from pathlib import Path
from types import FunctionType

from project.errors import ConfigError

PACKAGE = __name__.split(".")[0]


def argument_names(retriever: object) -> list[str]:
    """Names of the constructor's arguments, each of which is an attribute.

    Raises:
        ConfigError: An argument is not kept, or the constructor of the base class was not called.
    """
    kind = type(retriever)
    names = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    for name in ("neighbours", "max_raters"):
        if not hasattr(retriever, name):
            raise ConfigError(
                f"data.retriever is {kind.__name__}, which has no attribute {name}: its __init__ does not call that of "
                "Retriever. Write super().__init__(neighbours, max_raters) as its first line."
            )
    lost = [name for name in names if not hasattr(retriever, name)]
    if lost:
        raise ConfigError(
            f"data.retriever is {kind.__name__}, which does not keep its argument {lost[0]}: arguments are part of the "
            f"evidence cache's key. Write self.{lost[0]} = {lost[0]} in its __init__."
        )
    return names


def own_source(kind: type) -> dict[str, str]:
    """The digest of the files that define a class and its bases outside this package; empty if there are none."""
    foreign = [base for base in kind.__mro__ if _root(base) not in {PACKAGE, *sys.stdlib_module_names}]
    if not foreign:
        return {}
    digest = hashlib.sha256()
    for source in dict.fromkeys(_source(base) for base in foreign):
        digest.update(source)
    return {"source": digest.hexdigest()[:16]}


def _root(kind: type) -> str:
    return kind.__module__.split(".")[0]


def _source(kind: type) -> bytes:
    """A class typed into a notebook has no file, only the lines of its methods, or what Python made of them."""
    try:
        return Path(inspect.getfile(kind)).read_bytes()
    except (OSError, TypeError):
        methods = [(name, f) for name, f in vars(kind).items() if inspect.isfunction(f)]
        return b"".join([kind.__qualname__.encode(), *(name.encode() + _lines(f) for name, f in methods)])


def _lines(function: FunctionType) -> bytes:
    try:
        return inspect.getsource(function).encode()
    except OSError:
        return marshal.dumps(function.__code__)
