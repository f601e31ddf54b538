"""The executor for GPUs: replay equals eager, padding changes nothing, and each fault is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.ir.artifact import Artifact
from infc.ir.errors import CapacityError, InfcError
from infc.ir.launches import Extent, Launch, Pointer
from infc.ir.manifest import Limits
from infc.runtime.engine import Engine
from infc.runtime.executors.base import (
    Executor,
    ExecutorConfig,
    Running,
    TakesLateMasks,
    run_step,
    work_ahead,
)
from infc.runtime.executors.gpu.executor import GpuExecutor
from infc.runtime.executors.gpu.weights import DeviceWeights
from infc.runtime.limits import RuntimePlan
from infc.runtime.sampling.adjustments import Mask
from infc.runtime.scheduling.admission import SchedulerLimits

from ..paged_model import PagedModel
from ..test_steps_in_flight import ask_all, finish, told
from .late_driver import LateDriver
from .launched_model import (
    CONTEXT,
    GROUPS,
    ROWS,
    SEQUENCES,
    TOKENS,
    VOCAB,
    WEIGHTS,
    WIDTH,
    make_plan,
    weight,
    write_launched_artifact,
)
from .steps import Steps, chunk

NUM_BLOCKS = (40, 40)
CONFIG = ExecutorConfig(num_blocks=NUM_BLOCKS)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_launched_artifact(tmp_path_factory.mktemp("gpu") / "model", make_plan())


def engine_over(executor: Executor) -> Engine:
    plan = RuntimePlan(
        limits=SchedulerLimits(
            max_context=CONTEXT, max_sequences=SEQUENCES, step_tokens=TOKENS, logit_rows=ROWS
        ),
        groups=GROUPS,
        num_blocks=NUM_BLOCKS,
        num_threads=1,
        pin=False,
        weights="loaded",
        prefix_reuse=True,
    )
    return Engine(executor, plan, vocab_size=VOCAB, hidden_width=WIDTH)


def answers(engine: Engine) -> dict[str, Any]:
    """What the engine makes of one request of each kind, all at once."""
    ask_all(engine)
    found = {name: told(answer) for name, answer in finish(engine).items()}
    engine.close()
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What a model gives that checks every block it reads."""
    return answers(engine_over(PagedModel(GROUPS, NUM_BLOCKS, VOCAB, WIDTH)))


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, answer in expected.items():
        assert repr(found[name]) == repr(answer), name


@pytest.mark.parametrize("capture", [False, True], ids=["eager", "graphs"])
def test_an_engine_gives_what_the_model_gives(
    artifact: Artifact, expected: dict[str, Any], capture: bool
) -> None:
    """Chunks, decode, penalties, masks, choices, log-probabilities, one step ahead of the host."""
    driver = LateDriver()
    executor = GpuExecutor.open_with(artifact, CONFIG, driver, capture=capture)
    give_masks, given = executor.give_masks, []

    def count(running: Running, masks: Mask) -> None:
        given.append(len(masks))
        give_masks(running, masks)

    executor.give_masks = count  # type: ignore[method-assign]
    assert isinstance(executor, TakesLateMasks)
    same(answers(engine_over(executor)), expected)
    assert driver.is_closed
    assert sum(given) > 10, "sequences with constraints are planned ahead like all others"
    assert ("replay" in driver.calls) == capture


def test_without_buckets_every_step_is_launched_as_it_is(
    tmp_path: Path, expected: dict[str, Any]
) -> None:
    artifact = write_launched_artifact(tmp_path / "model", make_plan(buckets=(), pieces=()))
    driver = LateDriver()
    same(answers(engine_over(GpuExecutor.open_with(artifact, CONFIG, driver))), expected)
    assert "replay" not in driver.calls


def test_steps_are_captured_once_for_each_bucket(artifact: Artifact) -> None:
    """A step of three sequences is that of four; another step of the kind only replays."""
    driver = LateDriver()
    executor = GpuExecutor.open_with(artifact, CONFIG, driver)
    steps = Steps()
    captured = []
    for count in (3, 3, 4, 2, 8):
        before = len(driver.calls)
        run_step(executor, steps.decode(count))
        told = driver.calls[before:]
        captured.append([call for call in told if call.startswith("captured")])
        assert told.count("replay") == 1
    assert [len(each) for each in captured] == [1, 0, 0, 1, 1]
    executor.close()


def test_pieces_are_captured_between_launches_that_stay_eager(artifact: Artifact) -> None:
    driver = LateDriver()
    executor = GpuExecutor.open_with(artifact, CONFIG, driver)
    for tokens in (5, 6, 5):  # all are padded to six, the most of their form
        run_step(executor, chunk(tokens))
    assert [call for call in driver.calls if call.startswith("captured")] == ["captured 3"]
    assert driver.calls.count("replay") == 3
    assert driver.calls.count("launch attend_tiles") == 6
    run_step(executor, Steps().of([2, 2, 2], draws=3))
    before = len(driver.calls)
    run_step(executor, Steps().of([2, 1, 1, 2], draws=4))  # as many rows and draws, once padded
    assert not any(call.startswith("captured") for call in driver.calls[before:])
    executor.close()


def test_steps_with_other_needs_share_the_pieces_that_are_equal(artifact: Artifact) -> None:
    """The last piece is another where hidden states are returned, those before it are not."""
    executor = GpuExecutor.open_with(artifact, CONFIG, LateDriver())
    plain, more = (
        executor._shapes.of(Steps().of([2, 2, 2], draws=3, hidden=hidden), {})[0]
        for hidden in (False, True)
    )
    assert plain.form is more.form
    one, other = plain.form.pieces(plain.active), more.form.pieces(more.active)
    assert len(one) == len(other) == 3
    assert all(a is b for a, b in zip(one[:-1], other[:-1], strict=True))
    assert one[-1] is not other[-1]
    executor.close()


def test_graphs_of_usual_steps_are_captured_while_nothing_runs(artifact: Artifact) -> None:
    driver = LateDriver()
    executor = GpuExecutor.open_with(artifact, CONFIG, driver)
    rounds = 1
    while work_ahead(executor, 0.0):
        rounds += 1
    assert rounds == len(make_plan().buckets) + 1
    before = len(driver.calls)
    run_step(executor, Steps().decode(3))
    assert not any(call.startswith("captured") for call in driver.calls[before:])
    executor.close()
    assert not work_ahead(executor)


@pytest.mark.parametrize("capture", [False, True], ids=["eager", "graphs"])
def test_late_masks_are_those_of_the_step_itself(artifact: Artifact, capture: bool) -> None:
    executor = GpuExecutor.open_with(artifact, CONFIG, LateDriver(), capture=capture)
    steps = Steps()
    for _ in range(3):
        step = steps.of([1] * 6, draws=6, adjusted=True)
        adjustments = step.adjustments
        assert adjustments is not None and len(adjustments.masks) == 2
        expected = run_step(executor, step).tokens.tolist()
        few = replace(adjustments, masks=adjustments.masks[:1])
        running = executor.launch(replace(step, adjustments=few))
        executor.give_masks(running, adjustments.masks[1:])
        assert running.result().tokens.tolist() == expected
    without = executor.launch(replace(step, adjustments=few))
    with pytest.raises(InfcError, match="masks of this step never came"):
        without.result()
    executor.close()


def test_weights_and_state_are_where_launches_look_for_them(artifact: Artifact) -> None:
    driver = LateDriver()
    executor = GpuExecutor.open_with(artifact, CONFIG, driver)
    memory = executor._memory
    for name, shape in WEIGHTS.items():
        address = memory.weights.address(name)
        assert address is not None and address % 64 == 0
        held = driver.memory.array(address, int(np.prod(shape)), np.float32)
        assert np.array_equal(held, weight(name).reshape(-1))
    for table in memory.tables.values():
        assert len(driver.memory.view(table.address, table.num_bytes)) == 4 * SEQUENCES * 16
    assert driver.memory.num_bytes <= memory.num_bytes + 256 * len(driver.names)
    assert executor.touched_bytes()["device"] == memory.num_bytes
    executor.close()
    assert executor.touched_bytes()["device"] == 0


def test_weights_come_in_chunks_through_buffers_that_are_used_again(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not copied before its buffer is filled anew shows, as nothing is copied early."""
    monkeypatch.setattr("infc.runtime.executors.gpu.weights.CHUNK_BYTES", 4096)
    program = artifact.manifest.main
    some = replace(program, weights=replace(program.weights, tensors=("c", "b")))
    driver = LateDriver()
    weights = DeviceWeights(artifact, some)
    weights.upload(driver)
    assert driver.calls.count("upload") > 20
    for name in ("b", "c"):
        address, entry = weights.address(name), weights.entries[name]
        assert address is not None and address % 256 == entry.begin % 256
        held = driver.memory.array(address, int(np.prod(WEIGHTS[name])), np.float32)
        assert np.array_equal(held, weight(name).reshape(-1))
    assert weights.address("a") is None
    assert driver.host_bytes == 0


def test_graphs_are_captured_anew_when_what_they_read_has_moved(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infc.runtime.executors.gpu.memory._GROWING_BYTES", 0)
    executors = [
        GpuExecutor.open_with(artifact, CONFIG, LateDriver(), capture=capture)
        for capture in (True, False)
    ]
    steps = Steps()
    made = [
        steps.of([1] * 4, draws=4, adjusted=True, num_biased=num_biased)
        for num_biased in (2, 2, 36, 36, 2)
    ]
    runs = [[executor.launch(step) for step in made] for executor in executors]
    for one, other in zip(*runs, strict=True):
        assert one.result().tokens.tolist() == other.result().tokens.tolist()
    for executor in executors:
        executor.close()


def test_memory_of_the_host_is_used_again_only_when_its_step_has_ended(
    artifact: Artifact,
) -> None:
    """Nobody asks for results, so nothing has run when the next step is written."""
    driver = LateDriver()
    executor = GpuExecutor.open_with(artifact, CONFIG, driver)
    steps, expected = Steps(), Steps()
    alone = GpuExecutor.open_with(artifact, CONFIG, LateDriver(), capture=False)
    running = [executor.launch(steps.decode(4)) for _ in range(12)]
    wanted = [run_step(alone, expected.decode(4)) for _ in range(12)]
    for each, one in zip(running, wanted, strict=True):
        assert each.result().tokens.tolist() == one.tokens.tolist()
    executor.close()
    alone.close()


@settings(max_examples=30)
@given(data=st.data())
def test_padding_changes_nothing(artifact: Artifact, data: st.DataObject) -> None:
    """Random steps of prompts and of single tokens, with random wishes."""
    executors = [
        GpuExecutor.open_with(artifact, CONFIG, LateDriver(), capture=capture)
        for capture in (True, False)
    ]
    steps = Steps()
    for _ in range(data.draw(st.integers(1, 6))):
        counts = data.draw(
            st.lists(st.integers(1, 5), min_size=1, max_size=SEQUENCES).filter(
                lambda counts: sum(counts) <= TOKENS
            )
            | st.integers(1, SEQUENCES).map(lambda count: [1] * count)
        )
        wishes: dict[str, Any] = {
            "logits": data.draw(st.sampled_from([None, "all", "some"])),
            "hidden": data.draw(st.booleans()),
            "draws": data.draw(st.integers(0, SEQUENCES)),
            "adjusted": data.draw(st.booleans()),
        }
        step = steps.of(counts, **wishes)
        one, other = (run_step(executor, step) for executor in executors)
        assert one.tokens.tolist() == other.tokens.tolist()
        assert np.array_equal(one.logits, other.logits)
        assert (one.hidden is None) == (other.hidden is None) == (not wishes["hidden"])
        if one.hidden is not None and other.hidden is not None:
            assert np.array_equal(one.hidden, other.hidden)
    for executor in executors:
        executor.close()


def test_a_program_may_take_and_give_other_arrays(tmp_path: Path) -> None:
    """Without any tokens, or beside them."""
    launch = Launch(
        "sum_rows", (Extent(1, "I"),), (Pointer("step", "input:rows"), Pointer("output", "sums"))
    )
    plan = make_plan()
    form = replace(plan.forms[-1], launches=(*plan.forms[-1].launches, launch))
    artifact = write_launched_artifact(
        tmp_path / "model",
        replace(plan, forms=(form,), buckets=(), pieces=()),
        inputs={"input_ids": "i32[T]", "positions": "i32[T]", "rows": "f32[I, 3]"},
        outputs={
            **{"logits": f"f32[R, {VOCAB}]", "hidden": f"f32[R, {WIDTH}]"},
            "sums": "f32[I]",
        },
        limits=Limits(CONTEXT, TOKENS, SEQUENCES, ROWS, {"I": 4}),
    )
    executor = GpuExecutor.open_with(artifact, CONFIG, LateDriver())
    rows = np.arange(9, dtype=np.float32).reshape(3, 3)
    none = Steps().of([1], draws=1)
    nothing = none.token_ids[:0]
    alone = replace(
        none,
        token_ids=nothing,
        positions=nothing,
        context_lengths=nothing,
        query_starts=np.zeros(1, np.int32),
        block_tables=tuple(table[:0] for table in none.block_tables),
        slots=tuple(slots[:0] for slots in none.slots),
        logits_index=nothing,
        draws=none.draws[:0],
        inputs={"rows": rows},
    )
    assert run_step(executor, alone).others["sums"].tolist() == [3, 12, 21]
    beside = run_step(executor, replace(none, inputs={"rows": rows[:2]}))
    assert beside.others["sums"].tolist() == [3, 12] and len(beside.tokens) == 1
    with pytest.raises(CapacityError, match="compiled for 4"):
        executor.launch(replace(none, inputs={"rows": np.zeros((5, 3), np.float32)}))
    executor.close()
