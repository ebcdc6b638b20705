"""Numbers as they stand in tables; names as text, whatever characters they hold."""

import pytest
from markdown_it import MarkdownIt
from markupsafe import Markup

from project.report.format import code, difference, environment, escape, interval, number, percent, times


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (number(0.74231), ".7423"),
        (number(-0.002, signed=True), "-.0020"),
        (number(0.011, signed=True), "+.0110"),
        (number(1.03124), "1.0312"),
        (number(10.0, 2), "10.00"),
        (number(None), "undefined"),
        (interval([0.7156, 0.7627]), "[.7156, .7627]"),
        (difference({"value": 0.011, "interval": [-0.002, 0.02]}), "+.0110 [-.0020, +.0200]"),
        (difference({"value": 0.011, "interval": None}), "+.0110"),
        (difference(None), "–"),
        (times(2.314), "x2.31"),
        (times({"value": 2.314, "interval": [2.2, 2.41]}), "x2.31 [x2.20, x2.41]"),
        (times(None), "undefined"),
        (percent(0.8538), "85.4 %"),
    ],
)
def test_numbers(made, said):
    """Below one they lose their zero; what is undefined says so; nothing here is escaped again."""
    assert made == said
    assert isinstance(made, Markup)


@pytest.mark.parametrize(
    "name",
    [
        "![x](http://evil) <script>alert(1)</script>",
        "a | b",
        "# head",
        "- item",
        "*bold* _em_ `code`",
        "&lt;b&gt; \\[x]",
        "<http://evil>",
        "gbdt_features",
    ],
)
def test_names_stay_text(name):
    """In a heading, a bullet and a table cell a name reads as it is: no tag, link, image or cell of its own."""
    page = MarkdownIt("commonmark", {"html": False}).enable("table")
    text = f"# {escape(name)}\n\n* {escape(name)}\n\n| a | b |\n| --- | --- |\n| {escape(name)} | c |\n"
    tokens = page.parse(text)
    inline = [token for token in tokens if token.type == "inline"]
    shown = ["".join(child.content for child in token.children) for token in inline]
    assert shown == [name, name, "a", "b", name, "c"]
    assert {child.type for token in inline for child in token.children} <= {"text", "text_special"}


def test_lines_and_control_characters():
    """A name cannot begin a line of its own, end a code span or colour a terminal."""
    assert escape("a\n# b\x1b[31m") == "a # b \\[31m"
    assert code("a`b\n|c") == "`a b \\|c`"


def test_templates_escape_by_themselves():
    """An expression is escaped, a format's result and a missing number are not."""
    template = environment().from_string("{{ name }} {{ value | number }} {{ nothing.auc | number }}")
    assert template.render(name="*a*", value=0.5, nothing={}) == "\\*a\\* .5000 –"
