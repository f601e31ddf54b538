"""The script for GPUs, without one: it goes on where it stopped, and says what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu import tools
from benchmarks.gpu.run import stages
from benchmarks.gpu.setting import ROOT, Results, Setting
from benchmarks.gpu.table import is_wrong, table
from infc.ir.errors import DeviceError
from infc.ir.targets import resolve_target

from ..gpu_breadth import RARELY

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton compiles the kernels")


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calls: list[str] = []

    def fine(_: Setting) -> Results:
        calls.append("fine")
        return {"cases": {"a": {}}, "wrong": []}

    def broken(_: Setting) -> Results:
        calls.append("broken")
        raise ValueError("no such kernel")

    def missing(_: Setting) -> Results:
        calls.append("missing")
        return {"skipped": "no such tool"}

    for _ in range(2):
        setting = Setting(tmp_path, 60, "sm_90")
        found = {"ops": setting.stage("ops", fine), "model": setting.stage("model", broken)}
        found["tool"] = setting.stage("tool", missing)
    assert calls == ["fine", "broken", "missing", "broken", "missing"], "what is there is kept"
    assert not is_wrong(found["ops"]) and is_wrong(found["model"]) and not is_wrong(found["tool"])
    assert "ValueError" in (tmp_path / "model.log").read_text()
    late = Setting(tmp_path, 5, "sm_90").stage("8b", fine, least=10)
    lines = "\n".join(table({**found, "8b": late}))
    assert "ops: 1 cases, wrong: none" in lines
    assert "model: FAILED: ValueError: no such kernel" in lines
    assert "tool: left out: no such tool" in lines
    assert "8b: left out: 5 s are left, and it takes up to 10 s" in lines


def test_a_stage_has_its_own_seconds(tmp_path: Path) -> None:
    setting = Setting(tmp_path, 60, "sm_90")
    seen = setting.stage("a", lambda one: {"left": one.left}, least=10, most=12)
    assert 11 < seen["left"] <= 12
    assert setting.left > 50


def test_what_has_failed_is_not_made_again_in_a_new_process(tmp_path: Path) -> None:
    def lost(_: Setting) -> Results:
        raise DeviceError("the GPU failed")

    first = Setting(tmp_path, 60, "sm_90")
    first.stage("ops", lost)
    assert first.lost
    found = dict(stages(Setting(tmp_path, 60, "sm_90"), ["ops"], ["ops"]))
    assert found["ops"]["error"] == "DeviceError: the GPU failed"


@needs_triton
def test_all_stages_fit_into_the_minutes_of_a_run(tmp_path: Path) -> None:
    from benchmarks.gpu.plan import MINUTES, plan, rates

    ceilings = rates({"read": 1e12, "bf16": 1e14})
    planned = list(plan(Setting(tmp_path, 60, None), ceilings))
    assert sum(one.seconds for one in planned) + 10 <= 60 * MINUTES
    names = [one.name for one in planned]
    assert len(names) == len(set(names)) and names[:2] == ["ops", "model"]


def test_ratios_are_in_the_table() -> None:
    def timed(ms: float) -> Results:
        line = {"ms": ms, "roofline ms": 1.0, "share": 1 / ms, "tokens/s": 1e3 / ms}
        return {"decode": {"1 x 512": line}, "prefill": {"64": {**line, "of the matrix peak": 0.5}}}

    found = {"8b-none": timed(4.0), "8b-int4": timed(2.0), "8b-none-invariant": timed(5.0)}
    found["idle"] = {"idle": {"step µs": 100.0, "share": 0.02}, "seconds": 1.0}
    lines = "\n".join(table(found))
    assert "8b decode 1 x 512: int4 is 2.00 times as fast as bf16" in lines
    assert "8b decode 1 x 512: batch_invariant takes +25 %" in lines
    assert "8b-none prefill 64: 25 % of 1.0 ms, 50 % of the matrix peak" in lines
    assert "idle: 100.0 step µs, 0.02 share" in lines


NCU = """
  attend_splits (8, 8, 64)x(128, 1, 1), Context 1, Stream 13, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    DRAM Throughput                   %        71.20
    Duration                         us        80.54
  linear (448, 1, 1)x(128, 1, 1), Context 1, Stream 13, Device 0, CC 9.0
    Duration                         us        12.00
"""


def test_tools_are_left_out_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools, "_FOLDERS", (str(tmp_path / "cuda"),))
    found = tools.check_memory(Setting(tmp_path, 60, "sm_90"), {})
    assert found == {"skipped": "compute-sanitizer is not installed"}
    place = tmp_path / "cuda/2026.1/ncu"
    place.parent.mkdir(parents=True)
    place.touch()
    assert tools.find_tool("ncu") == str(place)


def test_the_worst_kernels_and_their_counters() -> None:
    def line(spent: float, bound: float) -> dict[str, float]:
        return {"µs": spent, "roofline µs": bound}

    lines = {"decode-16 linear": line(90, 85), "decode-16 norm": line(20, 0)}
    lines["decode-16 attend_splits"] = line(50, 40)
    assert tools.worst_kernels(lines) == ["norm", "attend_splits"]
    counters = dict(tools._counters(NCU))
    assert counters["attend_splits"] == {"Duration": "80.54 us", "DRAM Throughput": "71.20 %"}
    assert counters["linear"] == {"Duration": "12.00 us"}


@pytest.fixture
def emulated(tmp_path: Path) -> Iterator[Setting]:
    """A run on an emulated GPU."""
    setting = Setting(tmp_path, 600, "sm_90")
    yield setting
    setting.close()


@pytest.mark.slow
@needs_triton
def test_kernels_are_checked_on_an_emulated_gpu(emulated: Setting) -> None:
    from benchmarks.gpu.checks import check_ops

    found = check_ops(emulated, frozenset({"pointwise"}))
    assert set(found["cases"]) == {"pointwise f32", "pointwise bf16"}
    assert found["wrong"] == []


@needs_triton
def test_tables_begin_with_what_was_faster(
    emulated: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu.tuning import CLASSES, _result, _table_text
    from infc.codegen.triton import configurations

    one = next(one for one in CLASSES if one.name == "linear-few")
    sm_90, sm_80 = map(resolve_target, ("sm_90", "sm_80"))
    shipped = one.row(sm_90)
    rows = [shipped, {**shipped, **one.tries[0], "targets": ["sm_90"]}]
    before = configurations.linear_tile(sm_80, rows=16, bits=16)
    assert "row" not in _result(emulated, rows, {"0": 1.0, "1": 0.99})
    assert "row" not in _result(emulated, rows, {"0": 1.0, "1": "too much shared memory"})
    row = _result(emulated, rows, {"0": 1.0, "1": 0.8})["row"]
    (tmp_path / "linear.json").write_text(_table_text("linear", [row]))
    configurations.read_table.cache_clear()
    monkeypatch.setattr(configurations, "TABLES", tmp_path)
    try:
        tile = configurations.linear_tile(sm_90, rows=16, bits=16)
        assert [tile.rows, tile.columns, tile.depth] == one.tries[0]["tile"]
        assert configurations.linear_tile(sm_80, rows=16, bits=16) == before
    finally:
        configurations.read_table.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("linear-few", marks=RARELY)])
@needs_triton
def test_tiles_are_timed_on_an_emulated_gpu(name: str, emulated: Setting) -> None:
    from benchmarks.gpu.tuning import tune

    found = tune(emulated)["tuned"][name]
    *fine, refused = found["ms"].values()
    assert all(isinstance(ms, float) for ms in fine)
    assert "shared memory" in refused
    kept = json.loads((emulated.folder / f"tuned-{name}.json").read_text())
    assert kept["ms"] == found["ms"], "a run that is cut off goes on from there"


WITHOUT = """
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    MISSING = {"fastapi", "uvicorn", "pydantic", "xgrammar", "llguidance", "platformdirs",
               "starlette", "onnx", "onnxruntime", "pytest", "hypothesis"}

    class Fewer(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            if name.partition(".")[0] in MISSING:
                return None
            return super().find_spec(name, path, target)

    sys.meta_path[sys.meta_path.index(PathFinder)] = Fewer
    from benchmarks.gpu.run import Setting, stages, without_installation

    folder = Path(sys.argv[1])
    without_installation(folder / "cache")
    for name, found in stages(Setting(folder, 600, "sm_90"), ["idle"]):
        assert "error" not in found, found
    import benchmarks.gpu.child
    print("all of it")
"""


@pytest.mark.slow
@needs_triton
def test_a_run_needs_torch_transformers_and_triton_alone(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "all of it" in child.stdout, child.stderr


def test_a_child_imports_nothing_that_serving_does_not() -> None:
    code = (
        "import benchmarks.gpu.stepping, benchmarks.gpu.child, sys; print('torch' in sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.stdout.strip() == "False", child.stderr
