"""Stages that build the extension and run the tests that need a GPU."""

from __future__ import annotations

import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from gpu_stages.stage import Stage, Step

WORKERS = "8" if importlib.util.find_spec("xdist") is not None else ""
MOST_FAILURES = 20  # whose messages are kept


_INFO = "import json, smoothk; print(smoothk.info()); json.dump(smoothk.info(), open(r'{out}/info.json', 'w'))"
_PIP = "{python} -m pip install --no-build-isolation --no-deps --no-index --editable {root}"
_MODE = {"SMOOTHK_BUILD": "{build}", "TORCH_CUDA_ARCH_LIST": "{architecture}"}


def read_info(folder: Path) -> dict[str, Any]:
    """What `smoothk.info` said in a new process."""
    path = folder / "info" / "info.json"
    return {"info": json.loads(path.read_text())} if path.exists() else {}


def _pytest(name: str, files: str, wanted: str, seconds: float, *, alone: bool = False) -> Step:
    """Tests of some files whose names are ``wanted``; ``alone``: not spread over several processes."""
    chosen = (*(f"{{tests}}/test_{file}.py" for file in files.split()), *(("-k", wanted) if wanted else ()))
    # Of other versions of the packages: their deprecations are no failures. pytest-benchmark warns under xdist.
    options = ("-o", "filterwarnings=default", "-p", "no:cacheprovider", "-p", "no:benchmark", "-q", "--tb=short")
    spread = ("-n", WORKERS) if WORKERS and not alone else ()
    command = ("{python}", "-m", "pytest", *chosen, *options, *spread, "--junitxml", "{out}/junit.xml")
    return Step(name, command, seconds)


def read_tests(folder: Path) -> dict[str, Any]:
    """Numbers of tests of every step, and what the first ones that failed said."""
    results = {}
    for path in sorted(folder.glob("*/junit.xml")):
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
        failures = [
            {"test": f"{case.get('classname')}::{case.get('name')}", "message": (bad.get("message") or "")[:300]}
            for case in cases
            for bad in [*case.findall("failure"), *case.findall("error")]
        ]
        skipped = sum(case.find("skipped") is not None for case in cases)
        results[path.parent.name] = {
            "passed": len(cases) - skipped - len({failure["test"] for failure in failures}),
            "skipped": skipped,
            "failed": len(failures),
            "failures": failures[:MOST_FAILURES],
        }
    return results


BUILD = Stage(
    "build",
    90,
    [Step("install", tuple(_PIP.split()), 400, environment=_MODE), Step("info", ("{python}", "-c", _INFO), 100)],
    read_info,
)
TESTS = Stage(
    "tests",
    200,
    [
        _pytest("low_rank_conv", "low_rank_conv_cuda_ops", "not emulated", 120, alone=True),
        _pytest("device", "device", "", 120, alone=True),
        _pytest("difference", "difference_triton difference", "triton", 240),
        _pytest("polar", "polar_triton", "", 150),
        _pytest("machine_code", "triton_aot low_rank_conv_cuda", "aot or machine_code or products", 150, alone=True),
    ],
    read_tests,
)
