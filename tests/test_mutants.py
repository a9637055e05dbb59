"""The planted faults of `mutants.py` still fit the code. `make mutants` looks whether the tests find them."""

from __future__ import annotations

import re
from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_there_are_many_everywhere() -> None:
    assert len({m.name for m in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 60
    files = {m.file.partition("/")[0] for m in mutants.MUTANTS}
    assert files == {"smoothk", "kernels", "csrc"}


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_every_planted_fault_fits_and_names_its_tests(mutant: mutants.Mutant, tmp_path: Path) -> None:
    (tmp_path / mutant.file).parent.mkdir(parents=True)
    (tmp_path / mutant.file).write_bytes((ROOT / mutant.file).read_bytes())
    before = mutant.plant(tmp_path)
    changed = (tmp_path / mutant.file).read_text()
    assert before == (ROOT / mutant.file).read_text() != changed
    if mutant.file.endswith(".py"):
        compile(changed, mutant.file, "exec")
    for name in mutant.tests.partition(" -k ")[0].split():
        file, _, function = name.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert not function or re.search(rf"^def {function}\(", text, re.MULTILINE), name


def test_a_text_that_is_gone_or_repeated_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("a = 1\nb = 1\n")
    for old in ("c = 1", "= 1"):
        with pytest.raises(ValueError, match="module.py has [02] times"):
            mutants.Mutant("name", "module.py", old, "", "").plant(tmp_path)
    assert (tmp_path / "module.py").read_text() == "a = 1\nb = 1\n"
