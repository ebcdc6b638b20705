"""What `serve` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from project.errors import ConfigError

LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServeSettings:
    """What `serve` can be told; each also as a variable such as EXITREC_TOKEN.

    Args:
        run: Folder of a calibrated run, or one that `export` wrote. A reload takes `latest` beside it, if there is one.
        db: SQLAlchemy's address of the database of events: sqlite:///FILE, or postgresql://... for several servers.
        host: Address to listen at.
        port: Port to listen at.
        token: Bearer token that requests must carry.
        unprotected: Listen beyond this machine without a token.
        queue: Requests that may wait or run; more are answered 429.
        batch: Requests that are scored together at most.
        body_mib: Largest body.
        candidates: Most candidates of a request, and events or items of a body.
        history: Most rows of a history that a request brings.
        title: Longest title or other text of an item, in characters.
        cache_mib: Memory for users' histories.
        gorse_positive: Gorse's positive_feedback_types, such as "star, like, read>=3": its feedback that means yes.
        gorse_read: Gorse's read_feedback_types: its feedback that means no where it does not mean yes.
        audit_share: Share of requests that also run to full depth, to see whether early exits still hold.
    """

    run: Path
    db: str = "sqlite:///events.db"
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    unprotected: bool = False
    queue: int = 256
    batch: int = 32
    body_mib: float = 4.0
    candidates: int = 1000
    history: int = 1000
    title: int = 2000
    cache_mib: int = 256
    gorse_positive: str = "star, like"
    gorse_read: str = "read"
    audit_share: float = 0.01

    def check(self) -> None:
        """Refuse what cannot work or would be open to everybody by mistake."""
        exported = (self.run / "exit_policy.json").exists()
        for name in ("config.yaml", "exit_policy.json" if exported else "checkpoints/last.ckpt"):
            if not (self.run / name).exists():
                expected = "expected the folder of a run, or one that `export` of this version wrote."
                raise ConfigError(f"--run {self.run} lacks {name}; {expected}")
        if not (self.host in LOCAL or self.token or self.unprotected):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines and there is no token; set EXITREC_TOKEN (or "
                "--token), or --unprotected true if everybody may ask."
            )

    def newest(self) -> Path:
        """The run to switch to: `latest` beside the given one, or that one."""
        latest = self.run.parent / "latest"
        return (latest if latest.exists() else self.run).resolve()
