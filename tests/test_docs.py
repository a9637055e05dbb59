"""The pages under docs/: their code runs, their links lead somewhere, and what they say of the code is so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from pages import DOCS, NOTEBOOK, PAGES, ROOT, anchors, blocks, commands, links, notebook_cells, source, text_of

import smoothk
from smoothk.cli import main

WITH_CODE = [page for page in DOCS if blocks(text_of(page), "python")]
STENCIL = re.compile(r"<!-- stencil: (.+?) -->\n((?:\|.*\n)+)")
PLACES = {"first": 0, "second": 1, "last but one": -2, "last": -1}


def name_of(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in blocks(text_of(page), "python"):
        exec(compile(block, page.name, "exec"), names)


def test_commands_and_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    found = [pair for page in DOCS for pair in commands(text_of(page))]
    assert found
    for command, options in found:
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert not [option for option in options if option not in text], command


@cache
def anchors_of(page: Path) -> set[str]:
    return anchors(text_of(page))


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(text_of(page)):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT) and there.exists(), target
        assert not anchor or anchor in anchors_of(there), target


def test_every_page_is_in_the_index() -> None:
    index = links(text_of(ROOT / "docs" / "README.md"))
    pages = {page.name for page in (ROOT / "docs").iterdir() if page.suffix in (".md", ".ipynb")}
    assert pages - {"README.md"} <= set(index)


def test_the_api_is_that_of_the_docstrings() -> None:
    check = [sys.executable, str(ROOT / "docs" / "make_api.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", smoothk.__all__)
def test_the_api_has_every_public_name(name: str) -> None:
    assert name.lower() in anchors_of(ROOT / "docs" / "api.md")


def test_named_files_hold_the_names_beside_them() -> None:
    rows = re.findall(r"^\| `([^`]+/[^`]+)` \| (.*) \|$", text_of(ROOT / "docs" / "extending.md"), re.MULTILINE)
    assert len(rows) > 30
    for file, change in rows:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r'`"?(\w+)"?`', change):
            assert re.search(rf"\b{name}\b", text), f"{file} has no {name}"


def test_paths_in_prose_exist() -> None:
    for page in (*DOCS, ROOT / "CONTRIBUTING.md"):
        for path in re.findall(r"`((?:smoothk|csrc|kernels|benchmarks|tests|docs)/[\w/.]+)`", text_of(page)):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def stencils() -> list[tuple[dict[str, int], dict[str, dict[int, float]]]]:
    """The settings of every table of coefficients in mathematics.md, and its rows: name to offset to coefficient."""
    found = []
    for comment, table in STENCIL.findall(text_of(ROOT / "docs" / "mathematics.md")):
        settings = {key: int(value) for key, value in (part.split("=") for part in comment.split())}
        head, _, *body = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        offsets = [int(cell.strip("`")) for cell in head[1:]]
        rows = {name: {o: float(c) for o, c in zip(offsets, cells, strict=True) if c} for name, *cells in body}
        found.append((settings, rows))
    return found


@pytest.mark.parametrize(("settings", "rows"), stencils(), ids=lambda value: "-".join(map(str, value)))
def test_stencils_are_the_gradient(settings: dict[str, int], rows: dict[str, dict[int, float]]) -> None:
    for n in range(settings["least"], settings.get("most", settings["least"] + 5) + 1):
        weight = torch.randn(n, 3, dtype=torch.float64, requires_grad=True)
        smoothk.difference_penalty(weight, settings["order"]).backward()
        expected = torch.zeros_like(weight)
        special = {PLACES[name] % n: name for name in rows if name in PLACES}
        for i in range(n):
            for offset, coefficient in rows[special.get(i, "every other")].items():
                expected[i] += 2 * coefficient * weight.detach()[i + offset]
        torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_there_are_stencils_for_both_orders() -> None:
    assert [settings["order"] for settings, _ in stencils()] == [1, 2, 2]


def test_the_notebook_was_executed_from_top_to_bottom() -> None:
    cells = notebook_cells(NOTEBOOK, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


def test_the_notebook_tells_nothing_of_a_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert set(json.loads(text)["metadata"]) <= {"kernelspec", "language_info"}
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(work|tmp|home|root|usr|opt)/|\.venv", without_pictures)


def test_the_code_of_the_notebook_runs(tmp_path: Path) -> None:
    script = "\n\n".join(source(cell) for cell in notebook_cells(NOTEBOOK, "code"))
    (tmp_path / "tour.py").write_text("import matplotlib\n\nmatplotlib.use('agg')\n" + script, encoding="utf-8")
    command = [sys.executable, "-W", "error", "tour.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
