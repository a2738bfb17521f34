"""What mkdocs cannot do by itself: pages from files beside docs/, links out of docs/, formulas without a script."""

import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BORROWED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}  # files of the root -> pages
PAGES = {**BORROWED, "README.md": "index.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: dict) -> Files:
    """Add the pages whose text stands beside docs/."""
    for name, page in BORROWED.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """Return the page with links that stay inside the site, and with its formulas as MathML."""
    here = posixpath.dirname(page.file.src_uri)

    def inside(link: re.Match) -> str:
        picture, text, target, anchor = link.groups()
        if picture:
            return link[0]
        place = posixpath.normpath(posixpath.join("docs", here, target))
        if place.startswith("docs/"):
            return link[0]
        if place not in PAGES:
            return text  # a file of the repository that is no page
        return f"[{text}]({posixpath.relpath(PAGES[place], here or '.')}{anchor or ''})"

    if page.file.src_uri not in BORROWED.values():
        markdown = LINK.sub(inside, markdown)
    if page.meta.get("formulas"):
        markdown = re.sub(r"\$\$(.+?)\$\$", _displayed, markdown, flags=re.DOTALL)
        markdown = re.sub(r"\$(.+?)\$", lambda formula: convert(formula[1]), markdown)
    return markdown


def _displayed(formula: re.Match) -> str:
    """Return a formula on a line of its own, which scrolls by itself where the page is narrow."""
    line = " ".join(formula[1].split())
    return f'<div style="overflow-x: auto">{convert(line, display="block")}</div>'
