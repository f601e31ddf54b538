"""The profile of a GPU's steps: the same results, and a time for each launch that ran."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from infc.ir.artifact import Artifact
from infc.runtime.executors.base import ProfiledExecutor, run_step
from infc.runtime.executors.gpu.executor import GpuExecutor

from .late_driver import LateDriver
from .launched_model import make_plan, write_launched_artifact
from .steps import Steps
from .test_executor import CONFIG


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_launched_artifact(tmp_path_factory.mktemp("gpu") / "model", make_plan())


def test_launches_are_timed_and_give_the_same(artifact: Artifact) -> None:
    plain = GpuExecutor.open_with(artifact, CONFIG, LateDriver())
    timed = GpuExecutor.open_with(artifact, replace(CONFIG, profile=True), LateDriver())
    assert isinstance(timed, ProfiledExecutor)
    assert plain.profile() == []
    steps = Steps()
    wanted = [
        *(steps.of([3, 2, 4], logits="some", draws=3), steps.decode(4)),
        *(steps.of([1, 1], logits="all", draws=2, adjusted=True), steps.decode(3)),
    ]
    for step in wanted:
        expected, found = run_step(plain, step), run_step(timed, step)
        assert np.array_equal(expected.tokens, found.tokens)
        assert np.array_equal(expected.logits, found.logits)
    before = timed.profile()
    assert len(before) == sum(len(form.launches) for form in make_plan().forms)
    ran = [entry for entry in before if entry.count]
    assert ran and all(entry.nanoseconds > 0 for entry in ran)
    assert {"embed", "head"} <= {entry.name.split()[-1] for entry in ran}
    for one in (plain, timed):
        one.close()
