"""Numbers and names as Markdown: .7423, [.7156, .7627], x2.31; names are data and bring no markup."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from jinja2 import Environment, PackageLoader, Undefined
from markupsafe import Markup

from project.results import Estimate

UNDEFINED = Markup("undefined")
ABSENT = Markup("–")
# Users -> how often their 95 % intervals hold the truth in the worst of four worlds
# (results/intervals.json). More users than these were not measured.
COVERED = {30: 0.80, 80: 0.83, 300: 0.89}
FEW_USERS = max(COVERED)
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def environment() -> Environment:
    """The templates' environment: number formats as filters, every other expression escaped."""
    found = Environment(
        loader=PackageLoader("project.report", ""),
        autoescape=True,  # macros give Markup, which is not escaped twice
        finalize=lambda value: value if isinstance(value, Markup) else escape(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )

    def present(made: Callable[..., Markup]) -> Callable[..., Markup]:
        """A format that shows a dash for what a file does not hold."""
        return lambda value, *more, **named: (
            ABSENT if isinstance(value, Undefined) else made(value, *more, **named)
        )

    formats = (
        bullet,
        code,
        count,
        difference,
        few_users,
        interval,
        number,
        paragraph,
        percent,
        ratio,
        times,
    )
    found.filters |= {made.__name__: present(made) for made in formats}
    return found


def escape(value: object) -> Markup:
    """Data as Markdown text: no emphasis, link, image, tag, table cell or line of its own."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    text = re.sub(r"[&<>]", lambda found: ENTITIES[found[0]], text)
    text = re.sub(r"[\\`*\[\]|]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    return Markup(re.sub(r"^(\s*)([#+=~-])", r"\1\\\2", text))


def code(value: object) -> Markup:
    """Data as a code span, where nothing but a backtick or a pipe could end it."""
    text = "".join(c if c.isprintable() and c not in "`" else " " for c in str(value))
    return Markup(f"`{text}`".replace("|", "\\|"))


def number(value: float | None, digits: int = 4, signed: bool = False) -> Markup:
    """.7423, 1.0312, -.0020, +.0110 where signed; "undefined" for None."""
    if value is None:
        return UNDEFINED
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return Markup(re.sub(r"^([+-]?)0\.", r"\1.", text))


def interval(bounds: Sequence[float] | None, signed: bool = False) -> Markup:
    """[.7156, .7627], or "undefined"."""
    if bounds is None:
        return UNDEFINED
    return Markup(f"[{', '.join(number(bound, signed=signed) for bound in bounds)}]")


def difference(found: Estimate | None) -> Markup:
    """+.0110 [-.0020, +.0200]; a dash where there is none."""
    if found is None:
        return ABSENT
    made = number(found["value"], signed=True)
    bounds = found["interval"]
    return made if bounds is None else Markup(f"{made} {interval(bounds, signed=True)}")


def times(value: float | None, bounds: Sequence[float] | None = None) -> Markup:
    """x2.31, with [x2.20, x2.41] where there are bounds; "undefined" where nothing was spent."""
    if value is None:
        return UNDEFINED
    shown = f" [{', '.join(map(times, bounds))}]" if bounds else ""
    return Markup(f"x{value:.2f}{shown}")


def ratio(
    value: float | None, above: str, below: str, bounds: Sequence[float] | None = None
) -> Markup:
    """`times` with a word: x1.34 fewer; what is below 1 is turned over: x1.23 more."""
    if not value or value >= 1:
        return Markup(f"{times(value, bounds)} {above}")
    turned = bounds and [1 / bound for bound in reversed(bounds)]
    return Markup(f"{times(1 / value, turned)} {below}")


def percent(value: float | None) -> Markup:
    """A share, 85.4 %."""
    return UNDEFINED if value is None else Markup(f"{100 * value:.1f} %")


def count(value: float) -> Markup:
    """9,453."""
    return Markup(f"{value:,.0f}")


def few_users(users: int | None) -> Markup:
    """The sentence under intervals of at most FEW_USERS, else nothing; None: a number that no file has."""
    if users is not None and users > FEW_USERS:
        return Markup("")
    found = f"at most {FEW_USERS}" if users is None else f"{users:,}"
    covered = ", ".join(f"{number(share, 2)} at {n}" for n, share in COVERED.items())
    where = f"where a few users differ much: {covered} (results/intervals.json)"
    return Markup(f" 95 % intervals of {found} users cover less {where}.")


def paragraph(text: str) -> Markup:
    """Sentences of several template lines as one paragraph."""
    return Markup(" ".join(text.split()))


def bullet(text: str) -> Markup:
    """Sentences of several template lines as one item of a list; nothing for nothing."""
    return Markup(f"- {made}\n" if (made := paragraph(text)) else "")


def tidy(text: str) -> str:
    """Markdown of a template without the blank lines that its blocks leave."""
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip() + "\n"
