"""Weights & Biases as a logger that needs no account: without a key it writes its offline folder.

Unusual here: whether a key is known is looked up where W&B documents it (environment, netrc), because no function of
the library answers that in all its versions without asking for one.
"""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info

CLOUD = "https://api.wandb.ai"


class Tracking(WandbLogger):
    """Weights & Biases, online where a key is known, offline elsewhere; `wandb sync` uploads an offline run later.

    Args:
        project: Name of the project there.
        save_dir: Folder in which W&B makes its own folder `wandb`.
        offline: Whether to stay offline; default: where no key is known and WANDB_MODE does not say otherwise.
        **kwargs: As for Lightning's WandbLogger.
    """

    def __init__(
        self, project: str, save_dir: str = "runs", offline: bool | None = None, **kwargs: Any
    ) -> None:
        if offline is None:
            offline = "WANDB_MODE" not in os.environ and not key_is_known()
            if offline:
                rank_zero_info("W&B: no key is known, so this run is offline; `wandb sync` uploads it later")
        super().__init__(project=project, save_dir=save_dir, offline=offline, **kwargs)


def key_is_known() -> bool:
    """Whether W&B would find a key: in WANDB_API_KEY, in WANDB_IDENTITY_TOKEN_FILE, or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", CLOUD)).hostname or ""
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
