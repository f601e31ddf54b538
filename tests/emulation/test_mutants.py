"""Faults in kernels, launches and steps: each is noticed, by the emulation or in what comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import pytest

from infc.ir.artifact import Artifact
from infc.ir.errors import DeviceError
from infc.ir.launches import Integer, LaunchPlan, Real, read_launches
from infc.runtime.executors.gpu.driver import Bytes
from infc.runtime.executors.gpu.tables import DeviceTable
from infc.runtime.scheduling.step import Int32Array, StepOutput

from ..e2e.builds import Build, Builds
from ..e2e.neighbours import Events, play
from .engines import Case, ChangePlan, emulated
from .mutants import (
    MutantDriver,
    PtxMutant,
    argument,
    barrier,
    launches,
    more,
    moved,
    no_launch,
    number,
    other_real,
    pointer,
    smaller_grid,
)
from .scripted import errors, run_script, script_outputs
from .test_models import BOUNDS, RUN, SMALLER, tokens

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton compiles the kernels")

PTX = Case(Build("gemma2", dtype="bfloat16", changes=SMALLER), "sm_90")
PLAN = Case(Build("gemma2", changes=SMALLER), "sm_80")
"""Windows, soft caps, two groups of pages; copies and products that run beside other work."""


def wait(kernel: str, what: str, count: str, weaker: int) -> PtxMutant:
    """One that waits for fewer."""
    return PtxMutant(kernel, rf"({what}\s+){count};", rf"\g<1>{weaker};")


_COPIES, _PRODUCTS = r"cp\.async\.wait_group", r"wgmma\.wait_group\.sync\.aligned"
KERNELS = {
    **{f"splits-barrier-{place}": barrier("attend_splits", place) for place in range(4)},
    **{f"tiles-barrier-{place}": barrier("attend_tiles", place) for place in (0, 1, 2)},
    **{f"linear-barrier-{place}": barrier("linear", place) for place in (1, 2, 3, 4, 5)},
    "row-tops-barriers": barrier("row_tops"),
    "narrow-barriers": barrier("narrow_cuts"),
    "sample-barriers": barrier("sample_tokens"),
    "linear-waits-for-a-copy-less": wait("linear", _COPIES, "2", 3),
    "linear-of-few-rows-waits-for-a-copy-less": wait("linear", _COPIES, "4", 5),
    "splits-wait-for-a-copy-less": wait("attend_splits", _COPIES, "0", 1),
    "tiles-wait-for-a-copy-less": wait("attend_tiles", _COPIES, "0", 1),
    "tiles-wait-for-a-product-less": wait("attend_tiles", _PRODUCTS, "0", 1),
    "linear-waits-for-a-product-less": wait("linear", _PRODUCTS, "0", 1),
    **{
        f"{kernel}-does-not-wait-for-launches": PtxMutant(kernel, r"griddepcontrol\.wait;", "")
        for kernel in (
            *("pick_rows", "normed_linear", "rope_kv_write", "attend_splits", "linear"),
            *("rms_norm", "row_tops", "draw_tokens"),
        )
    },
    "copies-of-half-the-size": PtxMutant(
        "attend_splits", r"cp\.async\.cg(.*), 0x10,", r"cp.async.ca\1, 0x8,"
    ),
    "copies-of-fewer-bytes": PtxMutant(
        "linear", r"(cp\.async\.c[ag]\..*, 0x10, )%r\d+;", r"\g<1>8;", 0
    ),
    "lanes-of-another-distance": PtxMutant("rms_norm", r"(shfl\.sync\.bfly\.b32.*), 8,", r"\1, 4,"),
    "padding-is-stored": PtxMutant("rope_kv_write", r"@%p\d+ (st\.global)", r"\1"),
    "window-of-splits-a-position-more": PtxMutant(
        "attend_splits", r"(setp\.\w+\.s32.*, |add\.s32.*, -)8;", r"\g<1>9;"
    ),
    "window-of-splits-a-position-less": PtxMutant(
        "attend_splits", r"(setp\.\w+\.s32.*, |add\.s32.*, -)8;", r"\g<1>7;"
    ),
    "window-of-tiles-a-position-more": PtxMutant(
        "attend_tiles", r"(setp\.\w+\.s32.*), 8;", r"\1, 9;"
    ),
}


def swapped(plan: LaunchPlan) -> LaunchPlan:
    """Keys and values are stored after the attention that reads them."""
    forms = []
    for form in plan.forms:
        found = list(form.launches)
        for place in range(len(found) - 1):
            if found[place].kernel.startswith("rope_kv_write"):
                found[place : place + 2] = found[place + 1], found[place]
                break
        forms.append(replace(form, launches=tuple(found)))
    return replace(plan, forms=tuple(forms))


def less_shared_memory(plan: LaunchPlan) -> LaunchPlan:
    """Kernels are given less than they use."""
    kernels = {
        name: replace(one, shared_bytes=max(0, one.shared_bytes - 4096))
        for name, one in plan.kernels.items()
    }
    return replace(plan, kernels=kernels)


LAUNCHES: dict[str, ChangePlan] = {
    "no-block-copies": launches("copy_blocks", no_launch),
    "no-keys-are-written": launches("rope_kv_write", no_launch),
    "keys-after-attention": swapped,
    "less-shared-memory": less_shared_memory,
    "linear-with-a-column-less": launches("linear", smaller_grid(0)),
    "linear-with-a-tile-of-rows-less": launches("linear", smaller_grid(1)),
    "tiles-with-one-less": launches("attend_tiles", smaller_grid(0)),
    "splits-with-a-head-less": launches("attend_splits", smaller_grid(1)),
    "draws-with-one-less": launches("draw_tokens", smaller_grid(0)),
    "norm-with-a-row-less": launches("rms_norm", smaller_grid(0)),
    "linear-of-a-row-less": launches("linear", number(Integer, 0, more(-1))),
    "linear-of-wider-columns": launches("linear", number(Integer, 1, more(8))),
    "linear-with-a-longer-sum": launches("linear", number(Integer, 2, more(8))),
    "linear-with-another-stride": launches("linear", number(Integer, 3, more(4))),
    "a-row-of-weights-further": launches("linear", pointer("weight", moved(256))),
    "weights-not-aligned": launches("linear", pointer("weight", moved(2))),
    "a-block-further-in-the-cache": launches("attend_splits", pointer("state", moved(4096))),
    "another-row-of-the-table": launches("attend_splits", pointer("block_table:", moved(4 * 8))),
    "lengths-of-the-next-sequence": launches("attend_splits", pointer("context_lengths", moved(4))),
    "slots-of-the-next-token": launches("rope_kv_write", pointer("slots:", moved(4))),
    "positions-of-the-next-token": launches("rotary", pointer("positions", moved(4))),
    "a-place-in-the-arena-further": launches("rms_norm", argument(0, moved(64))),
    "another-soft-cap": launches("attend_splits", number(Real, 1, other_real(5.0))),
    "another-scale": launches("attend_tiles", number(Real, 0, other_real(0.0626))),
}


def expected(case: Case, builds: Builds) -> list[StepOutput]:
    """What the steps of the script give."""
    return run_script(builds.artifact(case.reference))


@pytest.fixture(scope="module")
def ptx_outputs(builds: Builds) -> list[StepOutput]:
    """What the steps give of the model whose kernels are changed."""
    return expected(PTX, builds)


@pytest.fixture(scope="module")
def plan_outputs(builds: Builds) -> list[StepOutput]:
    """What the steps give of the model whose launches are changed."""
    return expected(PLAN, builds)


def is_noticed(artifact: Artifact, outputs: list[StepOutput], bound: float) -> bool:
    """Whether the tests of models would fail, at the first step that shows it."""
    try:
        for found, wanted in zip(script_outputs(artifact), outputs, strict=True):
            # An error may be NaN.
            if not max(errors([found], [wanted])) < bound:
                return True
    except (DeviceError, AssertionError):
        return True
    return False


@pytest.mark.parametrize("name", KERNELS)
def test_faults_of_kernels_are_noticed(
    name: str, builds: Builds, ptx_outputs: list[StepOutput]
) -> None:
    artifact, mutant = PTX.artifact(builds), KERNELS[name]
    with emulated(PTX.capability, make=mutant.driver) as drivers:
        assert is_noticed(artifact, ptx_outputs, BOUNDS["bfloat16"])
    (driver,) = drivers
    assert isinstance(driver, MutantDriver)
    assert driver.num_changed > 0


@pytest.mark.parametrize("name", LAUNCHES)
def test_faults_of_launches_are_noticed(
    name: str, builds: Builds, plan_outputs: list[StepOutput]
) -> None:
    artifact, change = PLAN.artifact(builds), LAUNCHES[name]
    plan = read_launches(artifact.read_text(artifact.manifest.main.entry.file), where=name)
    assert change(plan) != plan
    with emulated(PLAN.capability, change=change):
        assert is_noticed(artifact, plan_outputs, BOUNDS["float32"])


def test_tables_that_are_not_updated_are_noticed(
    builds: Builds, plan_outputs: list[StepOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = DeviceTable.changes

    def once(table: DeviceTable, rows: Int32Array) -> Iterator[tuple[int, Bytes]]:
        return iter(()) if (table._mirror >= 0).any() else changes(table, rows)

    monkeypatch.setattr(DeviceTable, "changes", once)
    artifact = PLAN.artifact(builds)
    with emulated(PLAN.capability):
        assert is_noticed(artifact, plan_outputs, BOUNDS["float32"])


FEWER = replace(RUN, jobs=RUN.jobs[2:4], blocks=16)
CARRIED: dict[str, ChangePlan] = {
    "no-carried-tokens": launches("resolve_carried", no_launch),
    "tokens-of-the-next-draw": launches("resolve_carried", pointer("tokens_before", moved(4))),
    "one-token-less-is-carried": launches("resolve_carried", number(Integer, 0, more(-1))),
}


def written(artifact: Artifact) -> list[list[tuple[int, ...]]]:
    """The tokens of each choice."""
    return tokens([answer for _, answer in play(artifact, FEWER, Events(Counter()))])


@pytest.fixture(scope="module")
def answered(builds: Builds) -> list[list[tuple[int, ...]]]:
    """What few requests get."""
    return written(builds.artifact(PLAN.reference))


@pytest.mark.parametrize("name", CARRIED)
def test_faults_of_carried_tokens_are_noticed(
    name: str, builds: Builds, answered: list[list[tuple[int, ...]]]
) -> None:
    artifact = PLAN.artifact(builds)
    with emulated(PLAN.capability, change=CARRIED[name]):
        try:
            found = written(artifact)
        except DeviceError:
            return
    assert found != answered


def test_without_faults_nothing_is_noticed(
    builds: Builds,
    ptx_outputs: list[StepOutput],
    plan_outputs: list[StepOutput],
    answered: list[list[tuple[int, ...]]],
) -> None:
    with emulated(PTX.capability):
        assert not is_noticed(PTX.artifact(builds), ptx_outputs, BOUNDS["bfloat16"])
    with emulated(PLAN.capability):
        assert not is_noticed(PLAN.artifact(builds), plan_outputs, BOUNDS["float32"])
        assert written(PLAN.artifact(builds)) == answered
