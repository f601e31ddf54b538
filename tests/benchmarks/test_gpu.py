"""The script for GPUs, without one: it goes on where it stopped, and says what is wrong."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu.run import is_wrong, table
from benchmarks.gpu.setting import Results, Setting


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calls: list[str] = []

    def fine(_: Setting) -> Results:
        calls.append("fine")
        return {"cases": {"a": {}}, "wrong": []}

    def broken(_: Setting) -> Results:
        calls.append("broken")
        raise ValueError("no such kernel")

    for _ in range(2):
        setting = Setting(tmp_path, 60, "sm_90")
        found = {"ops": setting.stage("ops", fine), "model": setting.stage("model", broken)}
    assert calls == ["fine", "broken", "broken"], "only what failed is made again"
    assert not is_wrong(found["ops"]) and is_wrong(found["model"])
    assert "ValueError" in (tmp_path / "model.log").read_text()
    late = Setting(tmp_path, 5, "sm_90").stage("8b", fine, least=10)
    lines = "\n".join(table({**found, "8b": late}))
    assert "ops: 1 cases, wrong: none" in lines
    assert "model: ValueError: no such kernel" in lines
    assert "8b: 5 s are left" in lines


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton compiles the kernels")
def test_kernels_are_checked_on_an_emulated_gpu(tmp_path: Path) -> None:
    from benchmarks.gpu.checks import check_ops

    setting = Setting(tmp_path, 60, "sm_80")
    found = check_ops(setting, frozenset({"pointwise"}))
    setting.close()
    assert set(found["cases"]) == {"pointwise f32", "pointwise bf16"}
    assert found["wrong"] == []
