"""Parts of the project's markdown pages and notebooks, for the tests that hold them to the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOK = ROOT / "docs" / "tour.ipynb"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def text_of(page: Path) -> str:
    """A page; of a notebook its markdown cells."""
    if page.suffix == ".ipynb":
        return "\n\n".join(source(cell) for cell in notebook_cells(page, "markdown"))
    return page.read_text(encoding="utf-8")


def notebook_cells(page: Path, kind: str) -> list[dict[str, Any]]:
    """The cells of one kind."""
    return [cell for cell in json.loads(page.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    """A cell's text, which the format allows to be a list of lines."""
    return "".join(cell["source"])


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of one language, each below as many empty lines as are before it: tracebacks name the page's."""
    found = [block for block in FENCE.finditer(text) if block[1] == language]
    return ["\n" * text.count("\n", 0, block.start(2)) + block[2] for block in found]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """``smoothk COMMAND`` in the blocks of shell code, with the options that go with it."""
    shell = "".join(blocks(text, "bash"))
    found = re.findall(r"^smoothk (\w+)((?:.*\\\n)*.*)$", shell, re.MULTILINE)
    return [(command, re.findall(r"--[a-z-]+", rest.partition("#")[0])) for command, rest in found]


def links(text: str) -> list[str]:
    """Targets of links and pictures that are not on the web."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings: lower case, blanks to hyphens, no punctuation but hyphens and underscores."""
    names: set[str] = set()
    for heading in re.findall(r"^#+ (.+?)\s*$", FENCE.sub("", text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = sum(known == name or re.fullmatch(rf"{re.escape(name)}-\d+", known) is not None for known in names)
        names.add(f"{name}-{number}" if number else name)
    return names
