"""The API reference, docs/api.md, made from the docstrings.

python docs/make_api.py            # rewrites it
python docs/make_api.py --check    # exits 1 if it has drifted
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import smoothk
from smoothk.rank_plan import LayerPlan
from smoothk.report import Table

PAGE = Path(__file__).resolve().parent / "api.md"
HEAD = """\
# API

Every public name of `smoothk`, from its docstring. Made by `python docs/make_api.py`; a test fails when it has drifted.
[guide.md](guide.md) shows the same in use, [mathematics.md](mathematics.md) has the formulas.
"""
RETURNED = (LayerPlan, Table)  # parts of results, imported from where they are defined
SHOWN_ONCE = smoothk.LowRankConv2d  # its siblings have the same members
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
WIDTH = 120


class _Text:
    """An annotation as it is written in the source."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def public() -> dict[str, Any]:
    """The documented objects by name, in alphabetical order."""
    names = {name: getattr(smoothk, name) for name in smoothk.__all__}
    names |= {kind.__name__: kind for kind in RETURNED}
    return dict(sorted(names.items(), key=lambda item: item[0].lower()))


def page() -> str:
    """The whole page."""
    objects = public()
    rows = [f"| [`{name}`](#{anchor(name)}) | {link(_summary(item), objects)} |" for name, item in objects.items()]
    index = "\n".join(["| name | what it is |", "| --- | --- |", *rows])
    return "\n".join([HEAD, index, "", *(link(entry(name, item), objects) for name, item in objects.items())])


def anchor(heading: str) -> str:
    """What GitHub makes of a heading: lower case, blanks to hyphens, no punctuation but hyphens and underscores."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def entry(name: str, item: Any) -> str:
    """Heading, signature and docstring, and those of a class's own public methods and properties."""
    module = item.__module__ if item in RETURNED else "smoothk"
    parts = [f"## {name}", ""]
    if not (inspect.isclass(item) and issubclass(item, Exception)):
        parts += _fenced(_signature(f"{module}.{name}", item))
    parts += [markdown(inspect.getdoc(item) or ""), ""]
    members = _members(item) if inspect.isclass(item) else {}
    if members and item is not SHOWN_ONCE and members == _members(SHOWN_ONCE):
        return "\n".join([*parts, f"Methods and properties: those of `{SHOWN_ONCE.__name__}`.", ""])
    for member, value in members.items():
        parts += [f"### {name}.{member}", ""]
        if not isinstance(value, property):
            parts += _fenced(_signature(f"{name}.{member}", value))
        parts += [markdown(inspect.getdoc(value) or ""), ""]
    return "\n".join(parts)


def _fenced(text: str) -> list[str]:
    return ["```py", text, "```", ""]


def _members(kind: type) -> dict[str, Any]:
    """Methods and properties with a docstring of their own that smoothk's classes define, by name."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("smoothk."):
            for name, value in vars(base).items():
                is_method = inspect.isfunction(value) or isinstance(value, property | classmethod)
                if is_method and not name.startswith("_") and value.__doc__:
                    found[name] = value
    return dict(sorted(found.items()))


def _signature(name: str, item: Callable[..., Any]) -> str:
    """``name(...)`` with annotations as in the source; one parameter a line where it would be too long."""
    function = item.__func__ if isinstance(item, classmethod) else item
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    pieces: list[str] = []
    keyword_only = False
    for parameter in parameters:
        if parameter.kind == parameter.VAR_POSITIONAL:
            keyword_only = True
        elif parameter.kind == parameter.KEYWORD_ONLY and not keyword_only:
            pieces.append("*")
            keyword_only = True
        pieces.append(str(parameter.replace(annotation=_annotation(parameter.annotation))))
    returned = signature.return_annotation
    tail = "" if inspect.isclass(item) or returned is signature.empty else f" -> {_annotation(returned)}"
    line = f"{name}({', '.join(pieces)}){tail}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {piece},\n" for piece in pieces) + f"){tail}"


def _annotation(annotation: Any) -> Any:
    return _Text(annotation) if isinstance(annotation, str) and annotation else annotation


def _summary(item: Any) -> str:
    """The first sentence of the docstring."""
    first = (inspect.getdoc(item) or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[.:])\s", first)[0].rstrip(":").replace("|", "\\|")


def markdown(doc: str) -> str:
    """A docstring as markdown: sections become lists, what follows ``::`` a block of code."""
    lines: list[str] = []
    section, code = False, False
    for line in doc.splitlines():
        indented = line.startswith("    ")
        if code and line and not indented:
            while not lines[-1]:
                lines.pop()
            lines += ["```", ""]
            code = False
        if code:
            lines.append(line[4:])
        elif line.rstrip(":") in SECTIONS and line.endswith(":"):
            lines += [f"**{line[:-1]}**", ""]
            section = True
        elif section and indented:
            lines.append(_item(line[4:]))
        elif line.endswith("::"):
            lines += [line[:-1], "", "```py"]
            code = True
        else:
            section = section and not line
            lines.append(line)
    if code:
        lines.append("```")
    text = "\n".join(lines)
    return re.sub(r"```py\n\n+", "```py\n", re.sub(r"\n{3,}", "\n\n", text)).strip()


def _item(line: str) -> str:
    """One line of a section: ``name: text`` begins an item, what is indented further goes on with it."""
    found = re.match(r"([\w*]+(?:, [\w*]+)*): ?(.*)", line)
    if found:
        names = ", ".join(f"`{name}`" for name in found[1].split(", "))
        return f"- {names}: {found[2]}".rstrip()
    return f"  {line.strip()}" if line.startswith("    ") else line


def link(text: str, objects: dict[str, Any]) -> str:
    """``text`` with links where a public name stands between single backquotes; code blocks are left alone."""

    def target(found: re.Match[str]) -> str:
        name = found[2]
        known = name.split(".")[0] in objects and ("." not in name or hasattr(objects[name.split(".")[0]], found[3]))
        return f"[{found[0]}](#{anchor(name)})" if known else found[0]

    blocks = re.split(r"(```.*?```)", text, flags=re.DOTALL)
    pattern = r"(?<![`\[])`(smoothk\.)?(\w+(?:\.(\w+))?)`(?!`)"
    return "".join(part if part.startswith("```") else re.sub(pattern, target, part) for part in blocks)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page has drifted")
    args = parser.parse_args(argv)
    text = page()
    if args.check and (not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text):
        print("docs/api.md differs from the docstrings; run python docs/make_api.py", file=sys.stderr)
        return 1
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
