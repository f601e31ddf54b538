"""The pipeline: its order, its text, a recipe's edits, and what runs along."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.errors import PassError, UsageError
from infc.ir.program import Program
from infc.ir.text import parse_program
from infc.passes.base import CONTRACTS, PIPELINE_PHASES, Pass, PassContext, PassResult
from infc.passes.catalogue import OUR_PASSES
from infc.passes.commands import opt
from infc.passes.fuse_rope import FuseRope
from infc.passes.lower_kv import LowerKv
from infc.passes.one_block_each import OneBlockEach
from infc.passes.pass_manager import run_pipeline
from infc.passes.pipeline import (
    STAGES,
    PassSpec,
    Pipeline,
    build_pipeline,
    default_pipeline,
    parse_pipeline,
    with_kv_options,
)
from infc.passes.registry import get_pass, register_pass

from ..plans import PLAN
from .test_verification import model


@dataclass(frozen=True)
class Nothing(Pass):
    """A pass with options of every kind."""

    count: int = 1
    share: float = 0.5
    deep: bool = False
    label: str | None = None

    name: ClassVar[str] = "nothing"
    phase: ClassVar[str] = "fuse"

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program)


register_pass(Nothing)


def test_the_default_order_is_sound() -> None:
    pipeline = default_pipeline(PLAN)
    pipeline.check()
    ranks = [PIPELINE_PHASES.index(one.phase) for one in pipeline]
    first = {
        one.name: rank for one, rank in zip(reversed(pipeline.passes), ranks[::-1], strict=True)
    }
    assert all(kind.contract in CONTRACTS for kind in OUR_PASSES)
    assert [first[name] for name in dict.fromkeys(pipeline.names())] == sorted(
        first[name] for name in dict.fromkeys(pipeline.names())
    )


def test_the_catalogue_has_each_pass_once_in_the_order_of_the_pipeline() -> None:
    plan = [*PLAN, *parse_pipeline("plan-graphs"), OneBlockEach()]
    assert list(dict.fromkeys(map(type, default_pipeline(plan)))) == list(OUR_PASSES)


def test_text_round_trip() -> None:
    for pipeline in (
        default_pipeline(PLAN),
        default_pipeline(PLAN).with_options("lower-kv", block_size=64),
    ):
        assert parse_pipeline(pipeline.spell()) == pipeline


@given(
    count=st.integers(-99, 99),
    share=st.floats(allow_nan=False, allow_infinity=False),
    deep=st.booleans(),
    label=st.none() | st.sampled_from(["a", "some-name", "x.y"]),
)
def test_options_round_trip(count: int, share: float, deep: bool, label: str | None) -> None:
    pipeline = Pipeline((Nothing(count, share, deep, label),))
    assert parse_pipeline(pipeline.spell()) == pipeline


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fuse-rop", "did you mean 'fuse-rope'?"),
        ("lower-kv{blok_size=16}", "did you mean 'block_size'?"),
        ("lower-kv{block_size=big}", "expected int"),
        ("lower-kv{block_size=true}", "expected int"),
        ("lower-kv{block_size}", "cannot read the option"),
        ("lower-kv{block_size=1,block_size=2}", "cannot read the option"),
        ("lower-kv{block_size=16", "cannot read"),
        ("lower-kv,,fuse-rope", "cannot read"),
        ("lower-kv,", "cannot read"),
        ("no.such.module:MyPass", "cannot import"),
        ("json:dumps", "is not a pass"),
        ("json:dump5", "did you mean 'dump'?"),
    ],
)
def test_bad_text_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pipeline(text)
    assert words in str(caught.value)


def test_an_order_is_checked_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="fuse-rope requires positions-folded") as caught:
        build_pipeline("squeeze-unit-batch,fuse-rope,fold-rotary-tables")
    assert "fold-rotary-tables ensures it, but comes later" in str(caught.value)
    with pytest.raises(UsageError, match="add squeeze-unit-batch before it"):
        build_pipeline({"squeeze-unit-batch": False, "fold-rotary-tables": False})


def test_edits_by_name() -> None:
    pipeline = default_pipeline()
    names = pipeline.names()
    last = len(names) - 1 - names[::-1].index("remove-no-op")
    assert pipeline.after("remove-no-op", Nothing()).names()[last + 1] == "nothing"
    first = names.index("remove-no-op")
    assert pipeline.before("remove-no-op", Nothing()).names()[first] == "nothing"
    assert "remove-no-op" not in pipeline.without("remove-no-op").names()
    placed = pipeline.placed(Nothing()).names()
    assert placed[placed.index("nothing") + 1] == "lower-kv"
    with pytest.raises(UsageError, match="did you mean 'fuse-rope'"):
        pipeline.without("fuse-rop")


@dataclass(frozen=True)
class Anywhere(Pass):
    """A pass whose phase a test chooses."""

    name: ClassVar[str] = "anywhere"
    phase: ClassVar[str] = "fuse"

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program)


@pytest.mark.parametrize("phase", PIPELINE_PHASES)
@pytest.mark.parametrize("moved", [False, True])
def test_an_added_pass_stands_at_the_end_of_its_phase(phase: str, moved: bool) -> None:
    """Also where passes of its phase stand again in a later one, or a later one's in front."""

    class Added(Anywhere):
        pass

    Added.phase = phase
    pipeline = default_pipeline(PLAN)
    if moved:
        pipeline = pipeline.before("squeeze-unit-batch", Anywhere())
    passes = list(pipeline.placed(Added()))
    at = next(i for i, one in enumerate(passes) if isinstance(one, Added))
    stages = {id(one): stage for stage, ours in {**STAGES, "plan": PLAN}.items() for one in ours}
    rank = PIPELINE_PHASES.index
    around = [(stages.get(id(one), ""), i) for i, one in enumerate(passes)]
    before = [stage for stage, i in around if stage and i < at]
    behind = [stage for stage, i in around if stage and i > at]
    assert all(rank(stage) <= rank(phase) for stage in before)
    if phase == "plan":
        assert behind == ["plan"], "nothing stands behind the memory plan"
    else:
        assert all(rank(stage) > rank(phase) for stage in behind)


def test_added_passes_keep_the_order_of_phases_and_of_arrival() -> None:
    class Shard(Anywhere):
        name = "shard-it"
        phase = "shard"

    class Early(Anywhere):
        name = "early"
        phase = "canonicalize"

    names = default_pipeline().placed(Shard()).placed(Early()).placed(Anywhere()).names()
    at = names.index("early")
    assert names[at : at + 3] == ["early", "shard-it", "adopt-formats"]
    assert names[names.index("anywhere") + 1] == "lower-kv"


def test_a_recipes_edits() -> None:
    pipeline = build_pipeline(
        {
            "merge-qkv": False,
            "lower-kv": {"block_size": 64},
            "fuse-rope": True,
            "nothing": {"after": "fuse-rope", "count": 3},
        }
    )
    names = pipeline.names()
    assert "merge-qkv" not in names
    assert names[names.index("fuse-rope") + 1] == "nothing"
    assert next(one for one in pipeline if isinstance(one, Nothing)).count == 3
    assert next(one for one in pipeline if isinstance(one, LowerKv)).block_size == 64
    assert build_pipeline(None) == default_pipeline()
    assert build_pipeline(["nothing"]).names().count("nothing") == 1
    kv = with_kv_options(pipeline, dtype="bf16", block_size=16)
    assert next(one for one in kv if isinstance(one, LowerKv)) == LowerKv("bf16", 16)
    for bad in ({"merge-qkv": 3}, {"nothing": {"after": "a", "before": "b"}}, [7]):
        with pytest.raises(UsageError):
            build_pipeline(bad)


def test_registering() -> None:
    @dataclass(frozen=True)
    class Other(Nothing):
        name: ClassVar[str] = "nothing"

    @dataclass(frozen=True)
    class Ours(Nothing):
        name: ClassVar[str] = "fuse-rope"

    # As in a notebook: the cell that defines a pass runs again, or another takes its name.
    assert register_pass(Nothing) is get_pass("nothing") is Nothing
    assert register_pass(Other) is get_pass("nothing") is Other
    with pytest.raises(UsageError, match="two passes are named nothing"):
        Pipeline((Nothing(), Other())).check()
    with pytest.raises(UsageError, match="fuse-rope is the name of a built-in"):
        register_pass(Ours)
    assert get_pass("fuse-rope") is FuseRope
    with pytest.raises(UsageError, match="not a pass"):
        register_pass(int)  # type: ignore[arg-type]
    assert register_pass(Nothing) is Nothing
    assert get_pass("nothing") is Nothing


def test_reports_dumps_and_times(tmp_path: Path) -> None:
    pipeline = default_pipeline().without("lower-kv")
    seen: list[str] = []
    program, report = run_pipeline(
        model(),
        pipeline,
        dump_ir_after=["merge-gate-up", "fuse-gated-act"],
        dump_directory=tmp_path,
        on_pass=seen.append,
    )
    assert seen == pipeline.names() == [one.name for one in report.passes]
    index = pipeline.names().index("fuse-gated-act")
    dumps = sorted(path.name for path in tmp_path.iterdir())
    assert dumps == [f"{index - 1:02d}-merge-gate-up.ir", f"{index:02d}-fuse-gated-act.ir"]
    dumped = parse_program((tmp_path / dumps[1]).read_text())
    assert sum(node.op == "gated_act" for node in dumped.nodes) == 4
    by_name = {one.name: one for one in report.passes}
    assert by_name["merge-gate-up"].matches == 4
    assert by_name["fuse-gated-act"].cost.bytes_read < by_name["merge-gate-up"].cost.bytes_read
    data = report.as_data()
    assert json.loads(json.dumps(data)) == data
    assert "seconds" not in json.dumps(data), "equal compiles must report equally"
    assert {name for name, _ in report.times} >= set(pipeline.names())
    assert program.phase == "fused"
    made = {label: one["name"] for one in data["passes"] for label in one["made"]}
    gates = [node.output.name for node in program.nodes if node.op == "gated_act"]
    assert {made[name] for name in gates} == {"fuse-gated-act"}
    assert made.keys() <= {value.name for node in program.nodes for value in node.outputs}
    embedding = next(node for node in program.nodes if node.op == "embedding")
    assert embedding.output.name not in made, "it is as it was captured"
    assert data["passes"][-1]["ops"] == dict(sorted(Counter(n.op for n in program.nodes).items()))
    with pytest.raises(UsageError, match="did you mean 'fuse-rope'"):
        run_pipeline(model(), pipeline, dump_ir_after="fuse-rop")


def test_without_verification_nothing_runs(tmp_path: Path) -> None:
    _, report = run_pipeline(model(), build_pipeline({"lower-kv": False}), verify=False)
    assert {one.verified for one in report.passes} <= {"unchanged", "not verified"}
    assert report.phases == []


def test_a_missing_layer_is_refused_by_lower_kv() -> None:
    text = """
    program "two" phase captured {
      symbol T: 1..64
      input %q: f32[T, 1, 4]
      %0 = attention(%q, %q, %q) {layer = 0, scale = 0.5} : f32[T, 1, 4]
      %1 = attention(%0, %q, %q) {layer = 0, scale = 0.5} : f32[T, 1, 4]
      output %1
    }"""
    with pytest.raises(PassError, match="two attention ops"):
        LowerKv().run(parse_program(text), PassContext())
    with pytest.raises(UsageError, match="unknown cache type"):
        LowerKv(dtype="int4").run(parse_program(text), PassContext())


def test_the_order_is_checked_where_asked_for() -> None:
    with pytest.raises(UsageError, match="requires"):
        opt('program "e" phase captured {}', "fuse-rope", check_order=True)


@dataclass(frozen=True)
class LastMinute(Pass):
    """A pass of the last phase."""

    name: ClassVar[str] = "last-minute"
    phase: ClassVar[str] = "plan"

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program)


register_pass(LastMinute)


def test_nothing_stands_behind_the_memory_plan() -> None:
    planned = build_pipeline({"last-minute": True}, plan=PLAN)
    assert planned.names()[-2:] == ["last-minute", "plan-memory"]
    assert build_pipeline({"last-minute": True}).names()[-2:] == ["lower-kv", "last-minute"]
    with pytest.raises(UsageError, match="common-subexpressions comes after plan-memory"):
        build_pipeline({"common-subexpressions": {"after": "plan-memory"}}, plan=PLAN)
    with pytest.raises(UsageError, match="group-loops comes after plan-memory"):
        run_pipeline(replace(model(), phase="planned"), parse_pipeline("group-loops"))
    with pytest.raises(UsageError, match="plan-memory requires kv-paged"):
        parse_pipeline("plan-memory,group-loops").check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rewrite('a', before)", r"NameError: name 'rewrite' is not defined .*bad_one.py, line 2"),
        ("def f(:", "SyntaxError: "),
        ("raise ValueError('no')", "ValueError: no"),
    ],
)
def test_a_module_that_does_not_run_is_its_users_own(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_one.py").write_text(f"\n{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_one", raising=False)
    with pytest.raises(UsageError, match=f"bad_one cannot be executed: {message}"):
        get_pass("bad_one:Any")


def test_a_misspelled_place_has_a_hint() -> None:
    with pytest.raises(UsageError, match=r"no option before_ .*did you mean 'before'\?"):
        build_pipeline({"remove-no-op": {"before_": "fuse-rope"}})


def test_edits_of_passes_that_a_backend_does_not_want() -> None:
    """A recipe for one backend, compiled for another."""
    edits: tuple[PassSpec, ...] = (
        {"group-loops": False, "plan-memory": False},
        {"plan-memory": {}},
        ["group-loops", {"plan-memory": True}],
        [{"plan-memory": {"after": "lower-kv"}}, {"plan-memory": False}],
    )
    for edit in edits:
        assert build_pipeline(edit) == default_pipeline()
    assert build_pipeline({"plan-memory": {"after": "lower-kv"}}).names()[-1] == "plan-memory"
    with pytest.raises(UsageError, match="the pipeline has no pass merge-qkv"):
        build_pipeline([{"merge-qkv": False}, {"merge-qkv": False}])
    with pytest.raises(UsageError, match="pass group-loops has no option width"):
        build_pipeline({"group-loops": {"width": 2}})
    for place in ("before", "after"):
        with pytest.raises(UsageError, match=r"no pass plan-memory: the backend toy does not use"):
            build_pipeline({"nothing": {place: "plan-memory"}}, backend="toy")
