"""Markdown as one HTML file that needs nothing else: pictures embedded, a small stylesheet, no links out."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping

from markdown_it import MarkdownIt

STYLE = """
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #222; background: #fff;
       max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .8rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .9rem;
     border-top: 1px solid #ddd; }
h1 + p { font-size: 1.1rem; padding: .8rem 1rem; background: #f1f5f9; border-left: 4px solid #0072b2; }
h1 + p strong { font-weight: 500; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; margin: 1rem 0;
        display: block; overflow-x: auto; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid #e6e6e6; white-space: nowrap; }
th { border-bottom: 1.5px solid #888; text-align: left; font-weight: 600; vertical-align: bottom;
     white-space: normal; } tbody tr:hover { background: #f7f9fb; }
tr.marked { font-weight: 600; }
img { max-width: min(100%, 48rem); height: auto; display: block; margin: 1.4rem 0 .2rem; }
em { color: #555; font-style: normal; font-size: .88rem; }
code { font: .86em ui-monospace, Menlo, Consolas, monospace; background: #f3f3f3;
       padding: .1em .3em; border-radius: 3px; }
pre { background: #f3f3f3; padding: .8rem 1rem; overflow-x: auto; } pre code { padding: 0; }
@media print { body { margin: 0; max-width: none; } h2 { break-after: avoid; } table, img { break-inside: avoid; } }
"""
MARKS = ("(chosen)", "(best floor)")


def render_html(text: str, title: str, images: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        text: Markdown with tables; HTML in it is escaped.
        title: Of the page.
        images: File name, as the Markdown names it -> PNG bytes.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(text)
    for index, token in enumerate(tokens):
        for child in token.children or []:
            if child.type == "image" and str(child.attrs["src"]) in images:
                encoded = base64.b64encode(images[str(child.attrs["src"])]).decode("ascii")
                child.attrSet("src", f"data:image/png;base64,{encoded}")
        if token.type == "tr_open" and any(mark in tokens[index + 2].content for mark in MARKS):
            token.attrSet("class", "marked")
    body = markdown.renderer.render(tokens, markdown.options, {})
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
