"""What `infc inspect` says of the bundled model, and that its sums are those of the parts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from infc.driver.bench import ceilings as ceilings_module
from infc.driver.cli import run
from infc.driver.explain.collect import inspect_artifact, pass_facts
from infc.driver.explain.document import artifact_json, nodes_json
from infc.driver.explain.facts import (
    NO_COSTS,
    ArtifactFacts,
    Costs,
    NearMissFacts,
    PassCost,
    PassFacts,
)
from infc.driver.explain.measure import choose_workload, measure_program
from infc.driver.explain.memory import kv_bytes, plan_memory
from infc.driver.explain.narrow import pick_nodes
from infc.driver.explain.shape import model_shape
from infc.driver.explain.text import (
    _losses,
    _shape,
    near_miss_lines,
    render_artifact,
    spell_numbers,
)
from infc.ir.artifact import open_artifact
from infc.ir.errors import TargetError
from infc.ir.manifest import FileDigest
from infc.ir.ops import Cost
from infc.ir.program import ModelSpec, Program
from infc.ir.resources import KvGroup
from infc.ir.roofline import Ceilings
from infc.ir.text import parse_program
from infc.passes.near_miss import NearMiss
from infc.runtime.executors.base import HOST
from infc.runtime.limits import plan_runtime
from infc.runtime.options import RuntimeOptions
from infc.runtime.scheduling.kv_groups import blocks_for

from ...ir.artifacts import manifest
from ...passes.test_verification import model
from .support import MEMORY, SEQUENCES, check_golden, write_explained


def test_golden(facts: ArtifactFacts, update_golden: bool) -> None:
    _, _, text = render_artifact(facts).partition("\nmade by")
    before_files, _, rest = text.partition("\nfiles\n")  # sizes of reports change with any word
    check_golden("tiny.txt", f"made by{before_files}\n{rest.partition('recipe')[2]}", update_golden)


def times(costs: Costs, count: int) -> Costs:
    """The costs of so many equal things."""
    return sum((costs for _ in range(count)), NO_COSTS)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_totals_are_the_sums_of_their_parts(tiny: Path, data: st.DataObject) -> None:
    context = data.draw(st.integers(1, 1024))
    facts = inspect_artifact(
        tiny,
        batch=data.draw(st.integers(1, SEQUENCES)),
        context=context,
        tokens=data.draw(st.integers(1, min(context, 512))),
        memory=1 << 30,
    )
    program = facts.program
    assert program is not None
    assert sum((node.costs for node in program.nodes), NO_COSTS) == program.total
    assert sum((op.costs for op in program.ops), NO_COSTS) == program.total
    layers = (times(layer.costs, len(layer.layers)) for layer in program.layers)
    assert sum(layers, program.outside) == program.total
    assert sum(op.count for op in program.ops) == len(program.nodes)


def test_folded_layers_stand_for_all_nodes(facts: ArtifactFacts) -> None:
    program = facts.program
    assert program is not None
    layers = [one for shown in program.layers for one in shown.layers]
    assert sorted(layers) == list(range(facts.manifest.model.num_layers))
    assert any(len(shown.layers) > 1 for shown in program.layers)
    folded = sum(shown.nodes * len(shown.layers) for shown in program.layers)
    outside = sum(node.layer is None for node in program.nodes)
    assert folded + outside == len(program.nodes)
    for shown in program.layers:
        for layer in shown.layers:
            assert len(pick_nodes(facts, layer)) == shown.nodes


@pytest.mark.parametrize(("name", "low", "high"), [("context", 600, 900), ("batch", 1, 7)])
def test_more_costs_more(tiny: Path, name: str, low: int, high: int) -> None:
    sizes = [{"batch": 1, "context": 600} | {name: value} for value in (low, high)]
    small, large = (
        inspect_artifact(
            tiny, tokens=64, memory=1, batch=size["batch"], context=size["context"]
        ).program
        for size in sizes
    )
    assert small is not None
    assert large is not None
    assert small.total.decode.bytes_read < large.total.decode.bytes_read
    assert small.total.decode.flops < large.total.decode.flops
    by_op = [{op.op: op.costs.decode for op in one.ops} for one in (small, large)]
    assert by_op[0]["paged_attention"].bytes_read < by_op[1]["paged_attention"].bytes_read


def test_every_node_is_captured_or_made_by_a_pass_that_matched(facts: ArtifactFacts) -> None:
    assert facts.program is not None
    matched = {one.name for one in facts.passes if one.matches}
    makers = {node.made_by for node in facts.program.nodes}
    assert makers - {None} <= matched
    assert {"fuse-add-norm", "lower-kv", "merge-qkv", None} <= makers
    changes = [one.op_changes for one in facts.passes if one.name == "fuse-rms-norm"]
    assert changes[0] is not None
    assert changes[0]["rms_norm"] == 13
    assert changes[0]["rsqrt"] == -13


@given(
    st.integers(1, 6),
    st.integers(2, 300),
    st.lists(st.one_of(st.none(), st.integers(1, 100)), min_size=1, max_size=3, unique=True),
)
def test_kv_bytes_are_what_the_runtime_takes(
    batch: int, context: int, windows: list[int | None]
) -> None:
    groups = tuple(
        KvGroup(f"g{i}", (i,), 1 + i, 4, 4, "f32", 16, window) for i, window in enumerate(windows)
    )
    base = manifest()
    limits = replace(base.main.limits, max_context=300, max_sequences=6, logit_rows=6)
    whole = replace(
        base.with_main(resources=groups, limits=limits),
        recipe={},
        files={base.main.weights.file: FileDigest(1, "0" * 64)},
    )
    plan = plan_runtime(
        whole,
        RuntimeOptions(max_context=context, max_sequences=batch, kv_memory="256MiB", threads=1),
    )
    assert kv_bytes(groups, limits.step_tokens, context, batch) == plan.memory[HOST].kv


def test_the_largest_batch_is_the_most_that_fits(tiny: Path, facts: ArtifactFacts) -> None:
    groups = open_artifact(tiny).manifest.main.resources
    memory = facts.memory
    fixed = memory.weights_bytes + memory.arena_bytes + memory.logits_bytes
    for batch in (0, 1, 17, SEQUENCES):
        need = fixed + (kv_bytes(groups, 512, 700, batch) if batch else 0)
        exact = inspect_artifact(tiny, context=700, memory=need).memory
        assert exact.largest_batch == batch
        if batch:
            assert inspect_artifact(tiny, context=700, memory=need - 1).memory.largest_batch < batch


def test_rows_of_logits_are_no_more_than_tokens_of_a_step(facts: ArtifactFacts) -> None:
    """An artifact may have been compiled for more rows than a step can ever have."""
    base = facts.manifest
    outputs = {**base.main.outputs, "hidden": "f32[R, 48]"}
    limits = replace(base.main.limits, logit_rows=1 << 30)
    memory = plan_memory(base.with_main(outputs=outputs, limits=limits), 700, 1 << 30)
    rows = base.main.limits.step_tokens
    assert memory.logits_bytes == rows * (base.model.vocab_size + 48) * 4
    assert memory.largest_batch > 0


def test_the_settings_beside_the_largest_batch_reach_it(tiny: Path) -> None:
    told = inspect_artifact(tiny, context=700, memory=32 << 20)
    text = render_artifact(told)
    found = re.search(r"serve it +--kv-memory (\S+) --max-sequences (\d+) --max-context 700", text)
    assert found, text
    batch = told.memory.largest_batch
    assert 1 < int(found[2]) == batch < SEQUENCES
    options = RuntimeOptions(
        max_context=700, max_sequences=batch, kv_memory=found[1], threads=1, pin=False
    )
    artifact = open_artifact(tiny).manifest
    plan = plan_runtime(artifact, options)
    assert plan.limits.max_running == batch
    assert plan.memory[HOST].kv == told.memory.batch_kv_bytes
    blocks = blocks_for(700, artifact.main.resources[0].block_size)
    assert plan.num_blocks[0] - 1 >= batch * blocks, "each sequence reaches the context"
    assert "to serve it" not in render_artifact(inspect_artifact(tiny, context=700, memory=1))


def test_json_reads_back(facts: ArtifactFacts) -> None:
    text = artifact_json(facts)
    assert TypeAdapter(ArtifactFacts).validate_json(text) == facts
    assert len(json.loads(nodes_json(facts, op="gated_act"))) == 6


def test_near_misses_are_told_with_their_layers(tmp_path: Path) -> None:
    spec = ModelSpec("toy", 1, 8, 2, 2, 4, 16, 64)
    program = replace(parse_program(NEARLY), spec=spec)
    facts = inspect_artifact(write_explained(tmp_path / "near", program), memory=1 << 30)
    misses = [miss for one in facts.passes for miss in one.near_misses]
    assert misses
    assert facts.program is not None
    told = {miss.reason for node in facts.program.nodes for miss in node.near_misses}
    assert told
    text = render_artifact(facts)
    assert "why not (near misses)" in text
    assert next(iter(told)) in text


def test_near_misses_of_older_artifacts_are_sentences() -> None:
    """Those of nodes are read as those that are recorded apart; the others are all reason."""
    nodes = list(model().nodes)
    last = nodes[-1]
    assert last.layer is not None
    nodes += [replace(last, outputs=()), replace(last, outputs=last.outputs * 2)]
    nodes += [replace(node, source="a.b (c.py:3)") for node in nodes]
    misses = [NearMiss.at(node, "no: (x): not so") for node in nodes]

    def read(near_misses: list[Any]) -> tuple[NearMissFacts, ...]:
        counts = dict.fromkeys(("bytes_read", "bytes_written", "operations", "matches", "nodes"), 0)
        entry = {"name": "p", "phase": "fuse", "verified": "", **counts}
        (one,) = pass_facts({"passes": [entry | {"near_misses": near_misses}]}, None)
        return one.near_misses

    assert read([str(miss) for miss in misses]) == read([miss.as_data() for miss in misses])
    for text in ("@w: its rows: odd", "odd", "why not: odd", "odd: odd"):
        assert read([text]) == (NearMissFacts(pass_name="p", node=None, layer=None, reason=text),)


NEARLY = """
program "nearly" phase captured {
  symbol T: 1..64
  weight @gate: f32[8, 8] = checkpoint{name = "gate", dtype = "f32", shape = (8, 8)}
  weight @up: f32[8, 8] = checkpoint{name = "up", dtype = "f32", shape = (8, 8)}
  input %input_ids: i64[T]
  input %x: f32[T, 8]
  %h = reshape(%x) {shape = ("T", 2, 4)} : f32[T, 2, 4]  layer 0
  %a = attention(%h, %h, %h) {layer = 0, scale = 1.0} : f32[T, 2, 4]  layer 0
  %f = reshape(%a) {shape = ("T", 8)} : f32[T, 8]  layer 0
  %g = linear(%f, @gate) : f32[T, 8]  layer 0  from "model.layers.0.mlp.gate"
  %u = linear(%f, @up) : f32[T, 8]  layer 0  from "model.layers.0.mlp.up"
  %s = silu(%g) : f32[T, 8]  layer 0  from "model.layers.0.mlp"
  %m = mul(%s, %u) : f32[T, 8]  layer 0  from "model.layers.0.mlp"
  %y = add(%m, %g) : f32[T, 8]  layer 0  from "model.layers.0.mlp"
  output %y
}
"""


def test_the_summary_is_of_the_program(captured: Program, facts: ArtifactFacts) -> None:
    """Not of what the checkpoint's configuration says."""
    for shape in (model_shape(captured), facts.program.shape if facts.program else None):
        assert shape is not None
        spec = captured.spec
        assert (shape.num_layers, shape.width) == (spec.num_layers, spec.hidden_size)
        assert (shape.vocabulary, shape.num_parameters) == (spec.vocab_size, spec.num_parameters)
        (one,) = shape.attention
        assert (one.heads, one.head_dim, one.kv_heads) == (8, 32, 2)
    text = """program "other" phase captured {
  symbol T: 1..64
  spec {architecture = "x", num_layers = 9, hidden_size = 8, num_heads = 7, vocab_size = 3}
  weight @w: f32[5, 8] = checkpoint{name = "w", dtype = "f32", shape = (5, 8)}
  input %q: f32[T, 4, 2]
  input %k: f32[T, 1, 2]
  %0 = attention(%q, %k, %k) {layer = 0, scale = 1.0, window = 6} : f32[T, 4, 2]  layer 0
  %1 = attention(%0, %q, %q) {layer = 1, scale = 1.0} : f32[T, 4, 2]  layer 1
  %2 = reshape(%1) {shape = ("T", 8)} : f32[T, 8]
  %3 = linear(%2, @w) : f32[T, 5]
  output %3
}"""
    found = model_shape(parse_program(text))
    assert (found.num_layers, found.vocabulary, found.num_parameters) == (2, 5, 40)
    kinds = [(one.layers, one.kv_heads, one.window) for one in found.attention]
    assert kinds == [((0,), 1, 6), ((1,), 4, None)]
    lines = dict(_shape("x", found))
    assert lines["windows"] == "1 layer of 6, 1 layer of full attention"
    assert "1 layer with 4 heads of 2 over 1, 1 layer with 4 heads of 2 over 4" in lines["shape"]


def test_parameters_of_calibrated_weights_are_those_of_the_model() -> None:
    """Nobody knows any more which tensors of the checkpoint they were made of."""
    text = """program "other" phase captured {
  symbol T: 1..64
  spec {architecture = "x", num_layers = 1, hidden_size = 8, vocab_size = 5, num_parameters = 77}
  weight @w: f32[5, 8] = checkpoint{name = "w", dtype = "f32", shape = (5, 8)}
  weight @v: f32[5, 5] = calibrated{key = "v", dtype = "f32", shape = (5, 5)}
  input %x: f32[T, 8]
  %0 = linear(%x, @w) : f32[T, 5]
  %1 = linear(%0, @v) : f32[T, 5]
  output %1
}"""
    assert model_shape(parse_program(text)).num_parameters == 77


def test_layers_have_the_names_of_their_kv_groups(captured: Program, tmp_path: Path) -> None:
    """`group` is an attribute of quantize_rows too: the elements that share a scale."""
    passes = {"quantize-weights": {"scheme": "int8"}}
    path = write_explained(tmp_path / "quantized", captured, passes=passes)
    program = inspect_artifact(path, memory=1 << 30).program
    assert program is not None
    assert {layer.kv_group for layer in program.layers} == {"full"}


def test_equal_near_misses_are_one_line() -> None:
    misses = [
        NearMissFacts(pass_name="p", node=f"{i}", layer=i, reason="too wide") for i in (0, 1, 2, 5)
    ]
    assert list(near_miss_lines(misses)) == ["p, 4 times: too wide (layers 0-2, 5)"]
    assert spell_numbers([]) == ""


def test_a_captured_program_has_no_decode_step(captured: Program, facts: ArtifactFacts) -> None:
    measured = measure_program(captured, facts.workload)
    assert measured.total.decode == Cost()
    assert measured.total.prefill.flops > 0


def test_control_characters_do_not_reach_a_terminal(captured: Program, tmp_path: Path) -> None:
    path = write_explained(tmp_path / "a", captured, name="evil\x1b[2J\nname [bold]x[/bold]")
    text = render_artifact(inspect_artifact(path, memory=1 << 30), color=False)
    assert "\x1b" not in text
    assert "[bold]x[/bold]" in text


def test_the_commands(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tiny), "--memory", "64MiB"]) == 0
    assert "\nlayers\n" in capsys.readouterr().out
    assert run(["inspect", str(tiny), "--layer", "2"]) == 0
    layer = capsys.readouterr().out
    assert layer.startswith("layer 2, equal to 3 others")
    assert "self_attn.paged_attention" in layer
    assert run(["inspect", str(tiny), "--op", "linear"]) == 0
    assert "layers 1-4: 4 equal" in capsys.readouterr().out
    assert run(["inspect", str(tiny), "--program"]) == 0
    assert capsys.readouterr().out == (tiny / "program.ir").read_text()
    assert run(["inspect", str(tiny), "--program", "captured"]) == 0
    assert capsys.readouterr().out == (tiny / "captured.ir").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "6"], "no layer 6 (it has 6, counted from 0)"),
        (["--layer", "-1"], "no layer -1"),
        (["--op", "liner"], "the program has no op 'liner' (did you mean 'linear'?)"),
        (["--layer", "1", "--op", "take"], "layer 1 has no take"),
        (["--batch", "49"], "--batch is 49, expected 1 to 48 sequences in a step"),
        (["--context", "0"], "--context is 0, expected 1 to 1024 tokens of context"),
        (["--tokens", "513"], "--tokens is 513"),
        (["--tokens", "80", "--context", "70"], "80 prompt tokens exceed the context"),
        (["--memory", "lots"], "'lots' is not a memory size"),
        (
            ["--program", "fused"],
            "no program or stage 'fused' (it has main, with captured and final;",
        ),
        (["--graph", "x.png"], "x.png: the file name of a graph must end in .html or .svg"),
        (["--graph", "nowhere/x.svg"], "nowhere/x.svg: cannot be written: No such file"),
    ],
)
def test_bad_input_is_one_line(
    tiny: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["inspect", str(tiny), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"error: {message}")


def test_the_default_workload_is_the_largest(facts: ArtifactFacts) -> None:
    limits = facts.manifest.main.limits
    chosen = choose_workload(limits, None, None, None)
    assert (chosen.batch, chosen.context, chosen.tokens) == (1, 1024, 512)
    assert choose_workload(limits, None, 100, None).tokens == 100


def test_inspecting_loads_no_compiler(tiny: Path) -> None:
    script = (
        "import sys; from infc.driver.cli import run\n"
        f"status = run(['inspect', {str(tiny)!r}]) or run(['inspect', {str(tiny)!r}, '--json'])\n"
        "heavy = {'torch', 'transformers', 'infc.passes', 'infc.frontend', 'infc.codegen'}\n"
        "print(status, *(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.split() == ["0"]


def test_where_ceilings_are_known_ops_have_a_least_time(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = Ceilings(threads=1, read=1e9, fp32=1e9, bf16=2e9, int8=4e9)
    facts = inspect_artifact(tiny, batch=2, context=64, tokens=32, memory=MEMORY, ceilings=known)
    predictions = facts.predictions
    assert predictions is not None
    linear = next(op for op in predictions.ops if op.op == "linear")
    assert facts.program is not None
    weights = sum(w.num_bytes for n in facts.program.nodes if n.op == "linear" for w in n.weights)
    assert linear.decode == pytest.approx(weights / 1e9, rel=0.01)  # a few bytes for two sequences
    assert predictions.decode == pytest.approx(sum(op.decode for op in predictions.ops))
    assert predictions.prefill == pytest.approx(sum(op.prefill for op in predictions.ops))
    assert inspect_artifact(tiny, memory=MEMORY).predictions is None
    monkeypatch.setattr(ceilings_module, "known_machine", lambda: KnownMachine(known))
    assert run(["inspect", str(tiny)]) == 0
    text = capsys.readouterr().out
    assert "at this machine's ceilings: 1.0 GB/s read; fp32 1, bf16 2, int8 4 Gop/s" in text
    rows = text.partition("\nroofline\n")[2].partition("\npasses\n")[0]
    assert [line.split()[0] for line in rows.splitlines()[1:3]] == ["paged_attention", "linear"]
    assert run(["inspect", str(tiny), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"]["ceilings"]["bf16"] == 2e9


class KnownMachine:
    """A machine on which these ceilings were measured, with any number of threads."""

    def __init__(self, ceilings: Ceilings) -> None:
        self._ceilings = ceilings

    def at(self, threads: int) -> Ceilings:
        return self._ceilings


def test_a_machine_that_nothing_is_built_for_has_no_ceilings(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(target: str) -> None:
        raise TargetError("infc runs on Linux on x86-64")

    monkeypatch.setattr(ceilings_module, "resolve_target", refuse)
    assert run(["inspect", str(tiny)]) == 0
    assert "\nroofline\n" not in capsys.readouterr().out


def test_a_loss_without_bounds_is_shown() -> None:
    """A token that a pass bans is infinitely unlikely; JSON has it as text."""
    far: dict[str, float | str] = {
        "kl": "inf",
        "top1": 0.5,
        "error": "inf",
        "rows": 37,
        "what": "the whole model",
    }
    cost = PassCost(0, 0, 0)
    facts = PassFacts(
        name="ban",
        phase="fuse",
        contract="lossy",
        options={},
        matches=1,
        near_misses=(),
        nodes_before=1,
        nodes=1,
        op_changes=None,
        before=None,
        after=cost,
        verified="",
        distance=far,
    )
    (line,) = _losses([facts])
    assert line == "ban: KL inf, top-1 50.0 %, error inf (37 random tokens, the whole model)"
