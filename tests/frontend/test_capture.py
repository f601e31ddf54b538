"""Capture: equal layers are traced once, guards hold, and nothing is allocated."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from infc.frontend.capture import Capture, capture_inline, capture_model
from infc.frontend.config import read_config
from infc.frontend.convert import convert_capture
from infc.frontend.layers import NotRepeatableError
from infc.frontend.load import load_model
from infc.ir.errors import UnsupportedModelError
from infc.ir.program import Program, hidden_width
from infc.ir.weights import checkpoint as checkpoint_leaf

from ..checkpoints import make_checkpoint
from ..renaming import rename_values
from .oracle import no_log, parity_error


def converted(capture: Capture) -> Program:
    """The program of a capture, with results named by their order."""
    program = convert_capture(capture, "model", lambda name, _: checkpoint_leaf(name))
    inputs = {value.name for value in program.inputs}
    count = itertools.count()
    return rename_values(program, lambda v: v.name if v.name in inputs else f"r{next(count)}")


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "mixtral"])
def test_clones_are_what_tracing_gives(arch: str, tmp_path: Path) -> None:
    layers: dict[str, Any] = {"n_layer" if arch == "gpt2" else "num_hidden_layers": 8}
    make_checkpoint(arch, tmp_path, **layers)
    config = read_config(tmp_path)
    once = capture_model(config, torch.float32, 64, no_log)
    assert once.stack is not None
    assert any(template != i for i, template in enumerate(once.stack.templates))
    inline = capture_inline(config, torch.float32, 64, no_log)
    assert len(once.exported.graph.nodes) < len(inline.exported.graph.nodes)
    left, right = converted(once), converted(inline)
    assert left.nodes == right.nodes
    assert left.weights == right.weights
    assert [node.source for node in left.nodes] == [node.source for node in right.nodes]


def test_what_enters_the_head_is_the_second_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("gemma2", tmp_path)
    program = load_model(tmp_path, log=no_log)
    head = next(node for node in reversed(program.nodes) if node.op == "linear")
    assert program.output_names == ("logits", "hidden")
    _, hidden = program.outputs
    assert hidden_width(program) == program.spec.hidden_size
    assert str(hidden.type) == f"f32[R, {program.spec.hidden_size}]"
    views = {node.output.name: node for node in program.nodes if node.op == "reshape"}
    assert views[hidden.name].values() == head.values()
    monkeypatch.setattr(Gemma2ForCausalLM, "get_output_embeddings", lambda _: None)
    without = load_model(tmp_path, log=no_log)
    assert without.output_names == ("logits",) and hidden_width(without) is None


def test_every_node_of_a_layer_says_so(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    program = load_model(tmp_path, log=no_log)
    for layer in range(4):
        names = {
            ref.name for node in program.nodes if node.layer == layer for ref in node.weights()
        }
        assert {name.split(".")[2] for name in names} == {str(layer)}
        assert len(names) == 9
    outside = {ref.name for node in program.nodes if node.layer is None for ref in node.weights()}
    assert not any(".layers." in name for name in outside)


def test_last_layer_unlike_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that asks for its own number: the check sees it, and all layers are traced."""
    make_checkpoint("llama", tmp_path, num_hidden_layers=5)
    original: Any = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = original(self, hidden_states, *args, **kwargs)
        return out * 2 if self.self_attn.layer_idx == 4 else out

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    capture = capture_model(read_config(tmp_path), torch.float32, 64, no_log)
    with pytest.raises(NotRepeatableError, match="0 and 4"):
        converted(capture)
    lines: list[str] = []
    program = load_model(tmp_path, log=lines.append)
    assert any("one by one" in line for line in lines)
    assert parity_error(tmp_path, program) < 1e-5


def test_layers_called_in_different_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint("llama", tmp_path, num_hidden_layers=5)
    original: Any = LlamaDecoderLayer.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.self_attn.layer_idx == 2:
            kwargs["cache_position"] = None
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "__call__", call)
    lines: list[str] = []
    capture = capture_model(read_config(tmp_path), torch.float32, 64, lines.append)
    assert any("different ways" in line for line in lines)
    assert capture.stack is not None
    assert capture.stack.templates == list(range(5))


def test_a_sum_over_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint("llama", tmp_path)
    original: Any = LlamaMLP.forward

    def forward(self: Any, x: torch.Tensor) -> Any:
        return original(self, x) + x.mean(dim=1, keepdim=True)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(UnsupportedModelError, match=r"layer 0.*mean.*other tokens"):
        load_model(tmp_path, log=no_log)


def test_a_layer_without_attention_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("llama", tmp_path, num_hidden_layers=3)
    original: Any = LlamaAttention.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = original(self, hidden_states, *args, **kwargs)
        return (hidden_states if self.layer_idx == 1 else out), weights

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="layer 1 was captured with no attention"):
        load_model(tmp_path, log=no_log)


def test_an_unknown_operation_names_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("llama", tmp_path)
    original: Any = LlamaMLP.forward

    def forward(self: Any, x: torch.Tensor) -> Any:
        return original(self, torch.special.i0(x))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(UnsupportedModelError, match=r"layer 0, model\.layers\.0\.mlp.*i0"):
        load_model(tmp_path, log=no_log)


def test_a_branch_on_data_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("llama", tmp_path)
    original: Any = LlamaMLP.forward

    def forward(self: Any, x: torch.Tensor) -> Any:
        return original(self, -x if x.sum() > 0 else x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="cannot be exported") as caught:
        load_model(tmp_path, log=no_log)
    assert "\n" not in str(caught.value)


_MEASURE = """
import json, re, time
import torch
torch.set_num_threads(1)
from transformers import LlamaConfig
from infc.frontend.load import capture_config

def seconds(layers):
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
    )
    start = time.process_time()
    program = capture_config(config, dtype="bfloat16", max_context=2048, log=lambda _: None)
    return time.process_time() - start, program.spec.num_parameters

seconds(4)  # what is imported and cached at the first export
few, _ = seconds(4)
many, parameters = seconds(32)
# ru_maxrss would begin with that of the process that started this one.
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps([few, many, parameters, peak]))
"""


def test_eight_billion_parameters_cost_no_memory() -> None:
    """Peak memory of the whole process below 2 GB; 32 layers below three times 4 layers."""
    out = subprocess.run(
        [sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True
    ).stdout
    few, many, parameters, peak_bytes = json.loads(out.splitlines()[-1])
    assert parameters > 8e9
    assert peak_bytes < 2e9
    assert many < 3 * few
