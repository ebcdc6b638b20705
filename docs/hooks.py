"""MkDocs hooks: README is the first page, results/ the measurements; public classes get reference pages.

The pages exist only while the site is built. Angle brackets in docstrings (`logit_<layer>`) are text, not HTML.
"""

from __future__ import annotations

import re
from pathlib import Path

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCUMENTS = {  # file -> page
    "README.md": "index.md",
    "results/README.md": "measured/index.md",
    "results/archive.md": "measured/archive.md",
}
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


class AngleBracketsAreText(Extension):
    """Leaves `<layer>` in a sentence readable instead of passing it on as an unknown HTML element."""

    def extendMarkdown(self, md: Markdown) -> None:  # Markdown's name
        """Take the inline pattern for HTML away."""
        md.inlinePatterns.deregister("html")


def modules() -> list[str]:
    """Dotted names of modules with public classes, and of packages that name some."""
    found = []
    for path in sorted((ROOT / "project").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if re.search(
            r"^(class [A-Z]|__all__|from project\..* import .*[A-Z])",
            path.read_text(encoding="utf-8"),
            re.M,
        ):
            found.append(".".join(parts))
    return found


def pages() -> dict[str, str]:
    """Reference page -> the module it is about."""
    return {f"reference/{name.replace('.', '/')}.md": name for name in modules()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the reference to the navigation, one section a package."""
    sections: dict[str, list[dict[str, str]]] = {}
    for page, name in pages().items():
        parts = name.split(".")
        package = (ROOT / Path(*parts)).is_dir()
        section = ".".join(parts if package else parts[:-1])
        sections.setdefault(section, []).append({"about" if package else parts[-1]: page})
    config.nav.append(
        {"Reference": [{section: sections[section]} for section in sorted(sections)]}
    )
    config.markdown_extensions.append(AngleBracketsAreText())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README and the documents of results/ with their pictures, and the reference."""
    for source, page in DOCUMENTS.items():
        document = ROOT / source
        text = document.read_text(encoding="utf-8")
        for other, address in DOCUMENTS.items():  # links between them
            text = text.replace(f"]({other})", f"]({address})")
        text = text.replace("](docs/", "](").replace(
            "](../docs/", "](../"
        )  # the site's root is docs/
        text = text.replace("[CONTRIBUTING](CONTRIBUTING.md)", "CONTRIBUTING.md")
        files.append(File.generated(config, page, content=text))
        for name in PICTURE.findall(text):
            if (
                document.parent / name
            ).is_file():  # a missing one is a broken link, which --strict reports
                picture = str(Path(page).parent / name)
                files.append(
                    File.generated(
                        config, picture, abs_src_path=str(document.parent / name)
                    )
                )
    for page, name in pages().items():
        files.append(File.generated(config, page, content=f"::: {name}\n"))
    return files
