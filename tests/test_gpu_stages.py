"""The GPU's command as far as it goes without one: stages that fail or hang, resuming, what tools print, targets."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


pytestmark = pytest.mark.usefixtures("benchmarks_on_path")
module = importlib.import_module


def script(text: str, name: str = "only", seconds: float = 60, **options: Any) -> Any:
    """A step that runs Python."""
    return module("gpu_stages.stage").Step(name, ("{python}", "-c", text, "{out}"), seconds, **options)


def run(stages: Sequence[Any], out: Path, *arguments: str) -> int:
    return module("gpu").main(["--device", "cpu", "--out", str(out), *arguments], stages)


def stage(name: str, *steps: Any, **options: Any) -> Any:
    return module("gpu_stages.stage").Stage(name, 1, steps, **options)


def record(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / f"{name}.json").read_text())


MARK = "import sys; open(sys.argv[1] + '/mark', 'a').write('x')"


# Running


def test_one_line_and_status_2_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.splitlines() == [f"gpu.py needs a CUDA GPU: torch {torch.__version__} sees none"]


def test_what_fails_hangs_or_crashes_does_not_stop_the_others(tmp_path: Path, capsys: Any) -> None:
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    stages = [
        stage("good", script(MARK)),
        stage("fails", script("print('this is why'); raise SystemExit(4)"), script(MARK, "second")),
        stage("hangs", script(hang, seconds=0.7)),
        stage("crashes", script("import os; os.abort()")),
        stage("missing", module("gpu_stages.stage").Step("only", ("no-such-program",), 60)),
        stage("unreadable", script(MARK), collect=lambda folder: {}["nothing"]),
        stage("left out", script(MARK), obstacle=lambda context: "needs what is not here"),
        stage("last", script(MARK)),
    ]
    start = time.monotonic()
    assert run(stages, tmp_path) == 1
    assert time.monotonic() - start < 120
    found = {each.name: record(tmp_path, each.name) for each in stages}
    assert {name: each["status"] for name, each in found.items()} == {
        **dict.fromkeys(("good", "last"), "finished"),
        **dict.fromkeys(("fails", "crashes", "missing", "unreadable"), "failed"),
        **{"hangs": "timeout", "left out": "skipped"},
    }
    assert [step.get("exit") for each in found.values() for step in each["steps"]] == [0, 4, 0, None, -6, 127, 0, 0]
    assert (tmp_path / "fails" / "second" / "mark").read_text() == "x"
    assert found["left out"]["reason"] == "needs what is not here" and "KeyError" in found["unreadable"]["reason"]
    printed = capsys.readouterr().out
    assert "this is why" in printed and "killed after 1 s" in printed and "no-such-program" in printed
    for each in found.values():
        assert str(tmp_path) not in json.dumps(each) and str(ROOT) not in json.dumps(each)
        assert set(each["machine"]) == {"date", "machine", "versions", "git"}
        assert set(each["machine"]["machine"]) >= {"gpu", "driver"} and "triton" in each["machine"]["versions"]


def test_a_run_goes_on_behind_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = tmp_path / "flag"
    fragile = f"{MARK}; import os; raise SystemExit(not os.path.exists({str(flag)!r}))"
    stages = [stage("one", script(MARK, "a"), script(fragile, "b"), script(MARK, "c"))]
    out = tmp_path / "out"
    marks = lambda: {step: (out / "one" / step / "mark").read_text() for step in "abc"}  # noqa: E731
    assert run(stages, out) == 1 and marks() == {"a": "x", "b": "x", "c": "x"}
    flag.touch()
    assert run(stages, out) == 0 and marks() == {"a": "x", "b": "xx", "c": "x"}
    assert [step["name"] for step in record(out, "one")["steps"]] == ["a", "b", "c"]
    assert run(stages, out) == 0 and marks() == {"a": "x", "b": "xx", "c": "x"}
    assert run(stages, out, "--force") == 0 and marks() == {"a": "x", "b": "x", "c": "x"}  # their files are gone
    monkeypatch.setattr(module("gpu"), "code_digest", lambda: "other")
    (out / "one" / "mine.txt").touch()
    assert run(stages, out) == 0 and marks() == {"a": "x", "b": "x", "c": "x"}
    assert (out / "one" / "mine.txt").exists() and record(out, "one")["key"]["code"] == "other"


def test_chosen_stages_and_quick_and_time(tmp_path: Path, capsys: Any) -> None:
    stages = [stage(name, script(MARK, "a"), script(MARK, "b", extra=True)) for name in ("one", "two", "three")]
    assert run(stages, tmp_path, "--stage", "three", "--stage", "one", "--quick") == 0
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["one.json", "summary.json", "three.json"]
    assert not (tmp_path / "one" / "b").exists()
    assert run(stages, tmp_path, "--stage", "one") == 0 and (tmp_path / "one" / "b" / "mark").exists()
    assert (tmp_path / "one" / "a" / "mark").read_text() == "x"
    assert run(stages, tmp_path, "--stage", "two", "--minutes", "0") == 1
    assert record(tmp_path, "two")["status"] == "cut off" and not (tmp_path / "two").exists()
    with pytest.raises(SystemExit):
        run(stages, tmp_path, "--stage", "four")
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize("status, runs", [(0, 1), (1, 1), (3, 2), (-6, 2)])
def test_baselines_are_measured_where_a_kernel_breaks(status: int, runs: int, tmp_path: Path) -> None:
    broken = "import os; code = {status} if len(sys.argv) == 2 else 0; os.abort() if code < 0 else sys.exit(code)"
    words = ("{python}", "-c", f"{MARK}; {broken.replace('{status}', str(status))}", "{out}")
    step = module("gpu_stages.stage").Step("only", words, 60, without_ours=("--without", "{out}/baselines"))
    assert run([stage("one", step)], tmp_path) == (status != 0)
    (step,) = record(tmp_path, "one")["steps"]
    assert (tmp_path / "one" / "only" / "mark").read_text() == "x" * runs and ("baselines_exit" in step) == (runs == 2)


def test_the_code_of_a_run_is_what_its_results_depend_on(tmp_path: Path) -> None:
    digest = module("gpu_stages.stage").code_digest
    (tmp_path / "csrc").mkdir()
    kernel, notes = tmp_path / "csrc" / "kernel.cu", tmp_path / "csrc" / "notes.md"
    kernel.write_text("a")
    first = digest(tmp_path)
    notes.write_text("b")
    assert digest(tmp_path) == first
    kernel.write_text("b")
    assert digest(tmp_path) != first


def test_what_has_more_to_do_is_called_again(tmp_path: Path) -> None:
    text = f"{MARK}; sys.exit(3 if len(open(sys.argv[1] + '/mark').read()) < 2 else 0)"
    stages = [stage("one", script(text, unfinished=3))]
    assert run(stages, tmp_path) == 1 and record(tmp_path, "one")["status"] == "cut off"
    assert run(stages, tmp_path) == 0 and record(tmp_path, "one")["status"] == "finished"


# The real stages


def test_every_command_is_bounded_and_valid(tmp_path: Path, capsys: Any) -> None:
    stages, bench = module("gpu_stages").STAGES, module("bench")
    names = "build ceilings tests difference nuclear low_rank_conv step sanitize profile cifar10".split()
    assert [each.name for each in stages] == names
    context = module("gpu_stages.stage").Context(tmp_path, "cuda", {}, "", data=str(tmp_path))
    for each in stages:
        steps = each.steps
        assert len({step.name for step in steps}) == len(steps) and all(0 < step.seconds <= 540 for step in steps)
        assert each.estimate <= 540
        for step in steps:
            words = context.filled(step.command, tmp_path)
            assert not any("{" in word for word in words if "json.dump" not in word)
            paths = [Path(word) for word in words if word.startswith(str(ROOT))]
            assert paths and all(path.exists() for path in paths) or step.name == "info"
            for arguments in (words, [*words, *context.filled(step.without_ours, tmp_path)]):
                if str(BENCHMARKS / "bench.py") in arguments:
                    parsed = bench.build_parser().parse_args(arguments[2:])
                    assert parsed.entries[0] in bench.ENTRIES and parsed.device == "cuda"
                if str(BENCHMARKS / "cifar10.py") in arguments:
                    parsed = module("cifar10").parse(arguments[2:])
                    assert parsed.preset == "full" and parsed.budget < step.seconds
    quick = [each for each in stages if each.name in names[:7]]
    assert sum(each.estimate for each in quick) <= 15.5 * 60
    assert module("gpu").main(["--dry-run", "--quick", "--out", "unused"]) == 0
    printed = capsys.readouterr().out
    assert "memcheck-low_rank_conv" in printed and "compiled" not in printed


def test_stages_run_on_the_cpu_as_far_as_they_go(tmp_path: Path) -> None:
    names = ("ceilings", "sanitize", "profile", "cifar10")
    stages = [each for each in module("gpu_stages").STAGES if each.name in names]
    assert run(stages, tmp_path) == 0
    found = {each.name: record(tmp_path, each.name) for each in stages}
    assert found["ceilings"]["results"]["copy_bytes_per_second"] > 0
    assert {found[name]["reason"] for name in ("sanitize", "profile", "cifar10")} == {"needs a CUDA device"}


def test_tf32_is_allowed_for_a_call_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    nuclear, switch = module("entries.nuclear"), torch.backends.cuda.matmul
    before, seen = switch.fp32_precision, []

    def penalty(method: str, backend: str, weights: Any) -> Any:
        return lambda: seen.append(switch.fp32_precision) or 1 / len(weights)

    monkeypatch.setattr(nuclear, "_penalty", penalty)
    assert nuclear._with_tf32([1, 2])() == 0.5 and switch.fp32_precision == before != "tf32"
    with pytest.raises(ZeroDivisionError):
        nuclear._with_tf32([])()
    assert seen == ["tf32"] * 2 and switch.fp32_precision == before


# What is read


MEMCHECK = """========= COMPUTE-SANITIZER
difference torch.float32 {1: 1.0} l2: error 4.1e-08, allowed 1e-05
"""
INVALID = """========= Invalid __global__ read of size 16 bytes
=========     at smoothk::cuda::low_rank_conv_kernel+0x1230
=========     by thread (0,0,0) in block (3,0,0)
========= Target application returned an error
"""


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        (f"{MEMCHECK}========= ERROR SUMMARY: 0 errors\n", (0, 0, None)),
        (f"{MEMCHECK}{INVALID}========= ERROR SUMMARY: 1 error\n", (1, 0, "Invalid __global__ read of size 16 bytes")),
        (f"{INVALID}========= ERROR SUMMARY: 12 errors\n", (12, 0, "Invalid __global__ read of size 16 bytes")),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", (0, 0, None)),
        (
            "========= Error: Race reported between Write access at f+0x8 and Read access\n"
            "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n",
            (2, 1, "Error: Race reported between Write access at f+0x8 and Read access"),
        ),
        ("========= Error: Device not supported. Please refer to the manual\n", (None, None, "Error: Device not")),
        ("", (None, None, None)),
    ],
)
def test_summaries_of_compute_sanitizer(printed: str, found: tuple[Any, ...]) -> None:
    result = module("gpu_stages.sanitizers").read_log(printed)
    assert (result["errors"], result["warnings"]) == found[:2]
    assert result["first"] is None if found[2] is None else result["first"].startswith(found[2])


RAW = """==PROF== Connected to process 71
"ID","Process ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum","dram__bytes.sum",\
"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","sm__throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__warps_active.avg.pct_of_peak_sustained_active","launch__registers_per_thread","launch__grid_size",\
"sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active"
"","","","","","ns","byte","%","%","%","register/thread","","%"
"0","71","difference_kernel","(128, 1, 1)","(2,741, 1, 1)","40,000","120,000,000","62.5","20.1","37","96","2,741","0"
"1","71","difference_kernel","(128, 1, 1)","(2,741, 1, 1)","42,000","126,000,000","n/a","20.1","37","96","2,741","0"
"2","71","low_rank_conv_kernel<2, 1>(LowRankConvLaunch)","(128, 1, 1)","(8, 1, 1)","9,000","","","","","","8","31.5"
==PROF== Disconnected from process 71
"""
DETAILS = """"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","update_kernel","x","gpu__time_duration.sum","ns","1,500"
"0","update_kernel","x","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active","%","(!) n/a"
"1","update_kernel","x","gpu__time_duration.sum","ns","2,500"
"""


def test_tables_of_ncu() -> None:
    profiles = module("gpu_stages.profiles")
    first, second, conv = profiles.read_csv(RAW)
    assert first["kernel"] == "difference_kernel" and first["us"] == pytest.approx(40) and first["registers"] == 96
    assert first["tb_per_second"] == pytest.approx(3.0) and first["dram_percent"] == 62.5 and first["blocks"] == 2741
    assert second["dram_percent"] is None and conv["tensor_percent"] == 31.5 and conv["dram_bytes"] is None
    assert [launch["us"] for launch in profiles.read_csv(DETAILS)] == pytest.approx([1.5, 2.5])
    assert profiles.read_csv("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n") == []
    table = profiles.profile_table({"difference": [first, second], "low_rank_conv": [conv]})
    assert [row[3] for row in table.rows] == [2, 1] and table.rows[0][4] == pytest.approx(41)
    assert "31.5" in str(table)


JUNIT = """<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="4">
<testcase classname="tests.test_a" name="one"/><testcase classname="tests.test_a" name="two"><skipped/></testcase>
<testcase classname="tests.test_a" name="three"><failure message="RuntimeError: CUDA error">trace</failure></testcase>
<testcase classname="tests.test_a" name="four"><error message="at setup"/></testcase></testsuite></testsuites>"""


def test_reports_of_pytest(tmp_path: Path) -> None:
    (tmp_path / "polar").mkdir()
    (tmp_path / "polar" / "junit.xml").write_text(JUNIT)
    found = module("gpu_stages.checks").read_tests(tmp_path)["polar"]
    assert (found["passed"], found["skipped"], found["failed"]) == (1, 1, 2)
    assert found["failures"][0] == {"test": "tests.test_a::three", "message": "RuntimeError: CUDA error"}


# Claims


def write(out: Path, name: str, steps: Sequence[Any], results: Any) -> None:
    entries = [{"name": n, "status": "finished" if code == 0 else "failed", "exit": code} for n, code in steps]
    machine = {"machine": {"gpu": "NVIDIA H200", "driver": "580.1"}, "versions": {"torch": "2.11.0", "triton": "3.6.0"}}
    content = {"schema": 1, "stage": name, "status": "finished", "steps": entries, "results": results, "files": []}
    content |= {"key": {"code": "x"}, "machine": {**machine, "date": "2026-01-01", "git": None}}
    (out / f"{name}.json").write_text(json.dumps(content))


def side(name: str, ratio: float = 1.0, **more: Any) -> dict[str, Any]:
    spread = {"median": ratio, "p10": ratio, "p90": ratio}
    errors = {"value": 1e-7, "gradient": 1e-7, "output": 2e-3, "value on spectra": 1e-4, "gradient on spectra": 1e-3}
    known = {"status": "timed", "reason": None, "errors": errors, "ratio": spread, "ms": spread, "samples": 20}
    return {"name": name, **known, "peak_extra_bytes": 0, **more}


def bench_file(out: Path, entry: str, step: str, cases: Sequence[Any], weights: str = "resnet18", **more: Any) -> None:
    folder = out / entry / step
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {
        "machine": {"gpu": "NVIDIA H200", "cpu": "", "threads": 8},
        "versions": {"smoothk": "0.1.0", "torch": "2.11.0"},
        "date": "2026-01-01",
    }
    result = {"set": {"name": weights, "title": weights, "parameters": 1}, "dtype": "float32", "provenance": provenance}
    (folder / f"{entry}-{weights}-cuda.json").write_text(json.dumps({**result, "cases": cases, **more}))


def case(name: str, *sides: Any, **options: Any) -> dict[str, Any]:
    return {"name": name, "baseline": sides[0]["name"], "options": options, "sides": list(sides)}


REPEATED = {"reruns": {"count": 1000, "identical": 1000}}
CALLS, TOOLS = ("difference", "polar", "low_rank_conv"), ("memcheck", "racecheck", "initcheck", "synccheck")


def write_results(out: Path, fraction: float = 0.72, identical: int = 1000) -> None:
    """Of a GPU on which all that is written succeeds but for the arguments."""
    clean = {"errors": 0, "warnings": 0, "first": None}
    passed = {"passed": 9, "failed": 0, "skipped": 1, "failures": []}
    write(out, "build", [("install", 0), ("info", 0)], {"info": {"backends": {"cuda": "available", "triton": "no"}}})
    write(out, "tests", [(name, 0) for name in CALLS], dict.fromkeys(CALLS, passed))
    steps = [(f"{tool}-{call}", 0) for tool in TOOLS for call in CALLS]
    write(out, "sanitize", steps, {tool: dict.fromkeys(CALLS, clean) for tool in TOOLS})
    gates = [("gate", 0), ("resnet18", 0), ("large", 0), ("reruns", 0)]
    for name in ("difference", "nuclear", "low_rank_conv"):
        write(out, name, gates, {})
    launched = case("first order, l2", side("fused"), side("default backend", 9.0), side("eager", 25.0))
    graph = case("first order, l2, CUDA graph", side("fused", copy_fraction=fraction))
    for step, weights in (("gate", "odd"), ("resnet18", "resnet18"), ("large", "resnet50")):
        bench_file(out, "difference", step, [launched, graph], weights)
    reruns = {"reruns": {"count": 1000, "identical": identical}}
    bench_file(out, "difference", "reruns", [case("first order, l2", side("fused", **reruns))])
    nuclear = case("nuclear norm", side("polar, triton"), side("auto", 5.0), side("svd", 300.0))
    for step in ("gate", "resnet18"):
        bench_file(out, "nuclear", step, [nuclear])
    bench_file(out, "nuclear", "reruns", [case("nuclear norm", side("polar, triton", **REPEATED))])
    sides = side("smoothk", 1.0), side("smoothk, fused", 0.5), side("pair, channels_last", 1.0), side("pair", 9.0)
    shape = {"layout": "channels_last", "pass": "forward", "graph": True, "kernel": 3, "batch": 128, "layer": "3×3"}
    layers = [case("a", *sides, side("dense, channels_last", 1.5), **shape, rank=rank) for rank in (16, 128)]
    for step in ("gate", "resnet18"):
        bench_file(out, "low_rank_conv", step, layers, "resnet18_cifar", dtype="bfloat16")
    bench_file(out, "low_rank_conv", "reruns", [case("a", side("smoothk, fused", **REPEATED), **shape, rank=16)])


def verdicts(out: Path) -> dict[str, tuple[Any, str]]:
    found = module("gpu_stages.claims").judged(out)
    return {f"{entry['stage']} {entry['claim']}": (entry["measured"], entry["verdict"]) for entry in found}


def test_claims_are_read_from_the_results_and_judged(tmp_path: Path, capsys: Any) -> None:
    claims = module("gpu_stages.claims")
    assert {verdict for _, verdict in verdicts(tmp_path).values()} == {"not measured"}
    assert all(row[2] == "no" for row in claims.verified(claims.judged(tmp_path)).rows)
    write_results(tmp_path)
    found = verdicts(tmp_path)
    assert found["difference ResNet-18: % of copy bandwidth"] == (pytest.approx(72), "pass")
    assert found["difference ResNet-50: % of copy bandwidth"] == (pytest.approx(72), "FAIL")
    assert found["difference ViT-B/16: % of copy bandwidth"] == (None, "not measured")
    assert found["difference ResNet-18: eager ÷ fused"] == (25, "pass")
    assert found["low_rank_conv rank 16: pair ÷ fused"] == (pytest.approx(2), "pass")
    assert found["low_rank_conv all layers: dense ÷ fused"] == (pytest.approx(3), "pass")
    assert found["low_rank_conv rank 32: pair ÷ fused"] == (None, "not measured")
    assert found["nuclear svd ÷ polar"] == (300, "pass") and found["build CUDA extension loads"] == (1, "pass")
    assert found["build Triton is there"] == ("no", "FAIL")
    assert [row[:3] for row in claims.verified(claims.judged(tmp_path)).rows] == [
        ["difference_penalty", "triton", "yes"],
        ["low_rank_conv", "cuda", "yes"],
        ["polar_factors", "triton", "yes"],
    ]
    assert module("gpu").main(["--summary", "--out", str(tmp_path)]) == 1  # Triton is missing
    printed = capsys.readouterr().out
    assert "measured with other code than this: build" in printed and "may leave UNVERIFIED" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["machine"]["machine"]["gpu"] == "NVIDIA H200" and len(summary["claims"]) == len(claims.CLAIMS)


def test_drops_of_cifar10_are_means_over_seeds_of_the_best_network(tmp_path: Path) -> None:
    def row(network: str, method: str, accuracy: float | None, seed: int = 0) -> dict[str, Any]:
        known = {"network": network, "method": method, "keep": 0.3, "dense_accuracy": 94.0, "seed": seed}
        return {**known, "accuracy": accuracy, "accuracy_recalibrated": 93.9}

    results = tmp_path / "cifar10" / "results"
    results.mkdir(parents=True)
    rows = [row("plain", "svd", 90.0), row("plain", "l1-filters", 94.0), row("plain", "svd-spatial", None)]
    (results / "plain-0.json").write_text(json.dumps({"rows": rows}))
    rows = [row("nuclear", "svd", 93.9), row("nuclear", "svd", 93.5, 1)]
    (results / "nuclear.json").write_text(json.dumps({"rows": rows}))
    found = verdicts(tmp_path)
    assert found["cifar10 70 % fewer parameters: points lost"] == (pytest.approx(0.3), "pass")
    assert found["cifar10 70 % fewer parameters: points lost, recalibrated"] == (pytest.approx(0.1), "pass")
    assert found["cifar10 90 % fewer parameters: points lost"] == (None, "not measured")


def test_what_is_wrong_keeps_a_kernel_unverified(tmp_path: Path) -> None:
    claims = module("gpu_stages.claims")
    write_results(tmp_path, identical=999)
    leaks = {tool: dict.fromkeys(CALLS, {"errors": 0, "warnings": 0}) for tool in TOOLS}
    leaks["racecheck"] = {**leaks["racecheck"], "polar": {"errors": None, "warnings": None}}
    write(tmp_path, "sanitize", [(f"{t}-{c}", int(t == "racecheck")) for t in TOOLS for c in CALLS], leaks)
    none = {"passed": 0, "failed": 0, "skipped": 8, "failures": []}
    write(tmp_path, "tests", [("low_rank_conv", 0), ("polar", -9)], {"low_rank_conv": none})
    red = side("polar, triton", status="red", reason="value error nan")
    bench_file(tmp_path, "nuclear", "gate", [case("nuclear norm", red)])
    found = verdicts(tmp_path)
    assert found["difference difference: reruns with the same bits"] == (999, "FAIL")
    assert found["sanitize polar: racecheck"] == ("failed: no summary, exit status 1", "FAIL")
    assert found["sanitize difference: racecheck"] == ("exit status 1", "FAIL")
    assert found["tests low_rank_conv: failing tests"] == ("all 8 skipped", "FAIL")
    assert found["tests polar: failing tests"] == ("failed: exit status -9", "FAIL")
    assert found["nuclear polar: wrong results"] == (1, "FAIL")
    assert found["nuclear error of the value"] == (pytest.approx(1e-7), "pass")
    rows = {row[0]: row for row in claims.verified(claims.judged(tmp_path)).rows}
    assert {row[2] for row in rows.values()} == {"no"} and "reruns with the same bits" in rows["difference_penalty"][3]


def test_a_stage_that_was_killed_leaves_its_kernel_unverified(tmp_path: Path) -> None:
    write_results(tmp_path)
    write(tmp_path, "difference", [("gate", 0), ("resnet18", -6), ("large", 0), ("reruns", 0)], {})
    assert verdicts(tmp_path)["difference difference: wrong results"] == ("resnet18 did not end", "FAIL")


def test_tables_of_a_gpu_are_those_of_its_files_and_nothing_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = module("tables")
    names = ("gpu-claims", "gpu-difference", "gpu-nuclear", "gpu-step", "gpu-low-rank-conv")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert [tables.TABLES[name]() for name in names] == [""] * len(names)
    (tmp_path / "h200").mkdir()
    write_results(tmp_path / "h200")
    assert module("gpu").main(["--summary", "--out", str(tmp_path / "h200")]) == 1
    claims, difference, nuclear, step, conv = (tables.TABLES[name]() for name in names)
    assert "| difference | ResNet-18: eager ÷ fused | >= 20 | 25 | pass |" in claims
    assert claims.endswith("NVIDIA H200, driver 580.1, torch 2.11.0, Triton 3.6.0, 2026-01-01.")
    assert "25.00" in difference and "300.00" in nuclear and step == "" and "| 3×3 | 16 | 128 | 3.00 | 2.00 |" in conv
