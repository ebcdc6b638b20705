"""Settings of `serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from project.errors import ConfigError
from project.run import label_rule

LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServeSettings:
    """Settings of `serve`; each is also a variable such as EXITREC_TOKEN.

    Args:
        run: Folder of a calibrated run, or one that `export` wrote. A reload takes `latest` beside it, if there is one.
        db: SQLAlchemy's address of the database of events: sqlite:///FILE, or postgresql://... for several servers.
        host: Address to listen at.
        port: Port to listen at.
        token: Bearer token that requests must carry.
        unprotected: Listen beyond this machine without a token.
        max_waiting_requests: Requests that may wait or run; more are answered 429.
        max_batch_requests: Requests that are scored together at most.
        max_body_mib: Largest body.
        max_candidates: Most candidates of a request, and events or items of a body.
        max_history_rows: Most rows of a history that a request brings.
        max_title_characters: Longest title, other text of an item, or query.
        max_item_columns: Most columns of an item, and keys of an event.
        max_new_characters: Most text of the new items of a request, all together. 16 times as much may wait to be
            embedded; further new items are answered 429.
        cache_mib: Memory for users' histories.
        gorse_positive: Gorse's positive_feedback_types, such as "star, like, read>=3": its feedback that means yes.
        gorse_read: Gorse's read_feedback_types: its feedback that means no where it does not mean yes.
        audit_share: Share of requests that also run to full depth, to see whether early exits still hold.
        other: Folder of another run, such as a refit: a second process. It needs `split` or `shadow_share`.
        split: Share of users whom `other` answers, always the same ones.
        shadow_share: Share of the requests answered by `run` that `other` scores as well; /metrics compares both.
    """

    run: Path
    db: str = "sqlite:///events.db"
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    unprotected: bool = False
    max_waiting_requests: int = 256
    max_batch_requests: int = 32
    max_body_mib: float = 4.0
    max_candidates: int = 1000
    max_history_rows: int = 1000
    max_title_characters: int = 2000
    max_item_columns: int = 64
    max_new_characters: int = 16384
    cache_mib: int = 256
    gorse_positive: str = "star, like"
    gorse_read: str = "read"
    audit_share: float = 0.01
    other: Path | None = None
    split: float = 0.0
    shadow_share: float = 0.0

    @property
    def max_waiting_characters(self) -> int:
        """Text of new items, of requests and of the store, that may wait to be embedded."""
        return 16 * self.max_new_characters

    def check(self) -> None:
        """Raise `ConfigError` where `run` is no run, or the server would be open to everybody by mistake."""
        for option, run in (("--run", self.run), ("--other", self.other or self.run)):
            exported = (run / "exit_policy.ckpt").exists()
            for name in (
                "config.yaml",
                "exit_policy.ckpt" if exported else "checkpoints/last.ckpt",
            ):
                if not (run / name).exists():
                    expected = "expected the folder of a run, or one that `export` of this version wrote."
                    raise ConfigError(f"{option} {run} lacks {name}; {expected}")
        self._check_other()
        if not (self.host in LOCAL or self.token or self.unprotected):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines and there is no token; set EXITREC_TOKEN (or "
                "--token), or --unprotected true if everybody may ask."
            )

    def _check_other(self) -> None:
        """Raise `ConfigError` where the other run and its shares do not go together, or with `run`."""
        shares = self.split, self.shadow_share
        possible = all(0 <= share <= 1 for share in shares)
        if not possible or any(shares) != (self.other is not None):
            raise ConfigError(
                f"--other is {self.other}, --split {shares[0]}, --shadow_share {shares[1]}; expected shares from 0 to "
                "1, one above 0 with --other RUN, and both 0 without it."
            )
        if self.other is None:
            return
        runs = self.run, self.other
        names = [run_name(run.resolve()) for run in runs]
        if names[0] == names[1]:
            raise ConfigError(
                f"--run and --other are both {names[0]}; expected two runs in folders of different names."
            )
        rules = [label_rule(run) for run in runs]
        if rules[0] != rules[1]:
            raise ConfigError(
                f"--run makes labels by {rules[0]!r}, --other by {rules[1]!r}, but events have one label for both; "
                "expected runs of the same data.protocol.label."
            )

    def newest(self, promote: bool = False) -> Path:
        """The run to switch to: `latest` beside the given one, or that one; the other, to promote it."""
        if promote:
            if self.other is None:
                raise ConfigError("promote is true, but this server has no --other.")
            return self.other.resolve()
        latest = self.run.parent / "latest"
        return (latest if latest.exists() else self.run).resolve()


def run_name(run: Path) -> str:
    """What responses and metrics call a run: its folder, and the one that it lies in."""
    return "/".join(run.parts[-2:])
