"""Programs captured from GGUF files give the logits of the models that were written into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from infc.frontend.load import load_model
from infc.frontend.sources.gguf.tensors import GgufTensors
from infc.frontend.sources.open import open_source
from infc.ir.errors import CheckpointError, UnsupportedModelError
from infc.ir.program import Program
from infc.ir.verify import verify
from infc.ir.weights import evaluate_expr, evaluate_weight, infer_weight, leaves

from ..gguf_files import FILES, finish, make_gguf
from .oracle import ROWS, captured_logits, no_log, prompt, relative_error

TOLERANCE = 1e-5
VISIBLE = 1e-3


def load(path: Path, **options: Any) -> Program:
    defaults: dict[str, Any] = {"step_tokens": 64, "logit_rows": 16, "log": no_log}
    return load_model(path, **{**defaults, **options})


def error(model: Any, program: Program) -> float:
    """The relative error of a program against the model that it was written from."""
    ids = prompt()
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0][list(ROWS)]
    return relative_error(captured_logits(program, ids, ROWS), expected)


def described(path: Path) -> Any:
    """The model that a file describes, built by transformers with the weights of the file."""
    source = open_source(path)
    config = source.read_config(allow_remote_code=False, log=no_log)
    weights = source.open_weights()
    implementation = {"attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **implementation)
    loaders = {"checkpoint": weights.tensor}
    state = {name: evaluate_expr(one, loaders) for name, one in weights.published().items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert (set(missing), unexpected) == (tied, [])
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """Of the prompt that all comparisons take, `[tokens, vocabulary]`."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=prompt()[None]).logits[0]
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_file_describes_the_model_that_was_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = make_gguf(name, path)
    assert relative_error(logits(described(path)), logits(model)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-llama3", "gemma3", "gpt_oss", "mixtral"])
def test_captured_logits_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = make_gguf(name, path)
    lines: list[str] = []
    program = load(path, log=lines.append)
    verify(program)
    assert error(model, program) < TOLERANCE
    assert lines == []


@pytest.mark.parametrize(
    ("name", "suffix", "change"),
    [
        ("llama", "attn_k.weight", lambda value: -value),
        ("gemma2", "post_ffw_norm.weight", lambda value: value - 1),
        ("llama-llama3", "rope_freqs.weight", torch.ones_like),
        ("qwen3_moe", "ffn_up_exps.weight", lambda value: value.flip(0)),
        ("gpt_oss", "attn_sinks.weight", torch.zeros_like),
    ],
)
def test_a_planted_fault_shows(name: str, suffix: str, change: Any, tmp_path: Path) -> None:
    """The same comparison, of files that differ in one kind of tensor."""
    model = make_gguf(name, tmp_path / "model.gguf")
    path = tmp_path / "changed.gguf"
    rewrite(
        tmp_path / "model.gguf",
        path,
        lambda tensor, value: change(value) if tensor.endswith(suffix) else value,
    )
    assert relative_error(logits(described(path)), logits(model)) > VISIBLE


def rewrite(source: Path, target: Path, change: Any, **renamed: str) -> None:
    """A copy of a file with its tensors changed (None leaves one out), or renamed."""
    reader = gguf.GGUFReader(source)
    field = reader.fields["general.architecture"]
    writer = gguf.GGUFWriter(target, field.contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub)
    for tensor in reader.tensors:
        value = change(tensor.name, torch.tensor(np.array(tensor.data)))
        if value is not None:
            name = renamed.get(tensor.name, tensor.name)
            writer.add_tensor(name, value.contiguous().numpy())
    finish(writer)


def test_weights_are_read_one_by_one_and_late(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "model.gguf"
    model = make_gguf("llama", path)
    read: list[str] = []
    whole = GgufTensors.tensor

    def tensor(self: GgufTensors, name: str) -> torch.Tensor:
        read.append(name)
        return whole(self, name)

    monkeypatch.setattr(GgufTensors, "tensor", tensor)
    program = load(path)
    assert read == []
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(evaluate_weight(program, name), model.state_dict()[name])
    assert read == ["blk.1.attn_q.weight"]


def test_rows_stay_whole(tmp_path: Path) -> None:
    """A quantized block lies in a row: whatever is done to a matrix leaves its rows as they are."""
    for name in ("llama", "gemma2", "mixtral", "qwen2_moe"):
        make_gguf(name, tmp_path / f"{name}.gguf")
        for expr in open_source(tmp_path / f"{name}.gguf").open_weights().published().values():
            kind = infer_weight(expr)
            assert kind is not None
            for leaf in leaves(expr):
                shape: Any = leaf.attrs["shape"]
                assert kind.shape[-1] == shape[-1]


KINDS = [
    kind
    for kind in GGMLQuantizationType
    if kind.name.startswith(("Q2", "Q3", "Q4", "Q5", "Q6", "IQ", "MXFP4", "TQ"))
    or kind.name == "Q8_0"
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_are_widened_as_the_package_does(
    kind: GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 60, (6, 4 * size), dtype=np.uint8)  # no exponent of NaN
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("one", raw, raw_dtype=kind)
    finish(writer)
    monkeypatch.setattr("infc.frontend.sources.gguf.tensors._CHUNK_BYTES", 3 * size + 1)
    tensors = GgufTensors(tmp_path / "one.gguf")
    assert tensors.format("one") == kind.name
    place = tensors.header.entries["one"]
    stored = (tmp_path / "one.gguf").read_bytes()[place.begin : place.end]
    assert stored == raw.tobytes()
    expected = gguf.quants.dequantize(raw, kind)
    assert expected.shape == (6, 4 * block)
    assert np.array_equal(tensors.tensor("one").numpy(), expected)


def quantized(path: Path, kind: GGMLQuantizationType) -> None:
    """A llama whose matrices are in a format."""
    make_gguf("llama", path, stored=lambda _: kind)


def test_packed_weights_are_their_documented_values(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    quantized(path, GGMLQuantizationType.Q4_1)
    lines: list[str] = []
    program = load(path, log=lines.append)
    assert program.outputs[0].type.dtype.value == "f32"
    assert lines == ["the checkpoint is Q4_1: computing in float32, which holds it exactly"]
    tensors = GgufTensors(path)
    weight = evaluate_weight(program, "model.layers.0.mlp.up_proj.weight")
    assert torch.equal(weight, tensors.tensor("blk.0.ffn_up.weight"))
    assert error(described(path), program) < TOLERANCE
    del lines[:]
    load(path, dtype="bfloat16", log=lines.append)
    assert lines == ["the checkpoint is Q4_1: rounding its matrices to bfloat16 loses precision"]


def test_what_is_bfloat16_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    quantized(path, GGMLQuantizationType.BF16)
    program = load(path)
    assert program.spec.dtype == "bf16"
    weight = evaluate_weight(program, "model.layers.0.mlp.up_proj.weight")
    assert torch.equal(weight, GgufTensors(path).tensor("blk.0.ffn_up.weight"))


def test_keys_without_effect_are_said(tmp_path: Path) -> None:
    path = with_key(tmp_path, "llama.attention.novelty", 3)
    lines: list[str] = []
    load(path, log=lines.append)
    assert lines == ["keys of the GGUF file without effect: llama.attention.novelty"]


def with_key(place: Path, key: str, value: Any, name: str = "llama", **more: Any) -> Path:
    """A file in which one key has another value, or (None) none; `more` are keys that it lacks."""
    make_gguf(name, place / "model.gguf")
    path = place / "changed.gguf"
    reader = gguf.GGUFReader(place / "model.gguf")
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    if key == "general.architecture":
        writer = gguf.GGUFWriter(path, value)
    for known, field in reader.fields.items():
        if known not in (key, "general.architecture") and not known.startswith("GGUF."):
            writer.add_key_value(known, field.contents(), field.types[0])
    if value is not None and key != "general.architecture":
        more = {key: value, **more}
    for added, one in more.items():
        kinds = {bool: "BOOL", int: "INT64", float: "FLOAT64", str: "STRING"}
        writer.add_key_value(added, one, gguf.GGUFValueType[kinds[type(one)]])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    finish(writer)
    return path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "mamba", r"architecture 'mamba' is not supported .*qwen3"),
        ("llama.block_count", None, r"gguf: llama.block_count: is missing from the metadata"),
        ("llama.block_count", 3, r"llama.block_count: is 3, but there are 2 blocks"),
        ("llama.block_count", 1 << 40, r"llama.block_count: is 1099511627776, expected 1 to 4096"),
        ("llama.block_count", "two", r"llama.block_count: is b'two', expected 1 to"),
        ("llama.embedding_length", 63, r"embedding_length: is 63, but token_embd.weight is \[320"),
        ("llama.attention.head_count", 0, r"head_count: is 0, expected 1 to"),
        ("llama.attention.head_count", 8, r"parameter model.*its metadata needs shape"),
        ("llama.attention.head_count_kv", 3, r"head_count_kv|num_key_value_heads 3"),
        ("llama.feed_forward_length", 95, r"blk.0.ffn_down.weight: .*its metadata needs shape"),
        ("llama.context_length", -1, r"context_length: is -1, expected 1 to"),
        ("llama.attention.layer_norm_rms_epsilon", None, r"rms_epsilon: is missing"),
        ("llama.attention.value_length", 32, r"value_length: is 32 and key_length is 16"),
        ("llama.rope.freq_base", float("nan"), r"freq_base: is nan, expected a finite number"),
        ("llama.rope.freq_base", -1.0, r"freq_base: is -1.0, expected a finite number"),
        ("llama.rope.dimension_count", 8, r"dimension_count: is 8, and the size of a head 16"),
        ("llama.rope.dimension_count", 17, r"dimension_count: is 17, and a head has 16"),
        ("llama.rope.scaling.type", "spiral", r"scaling.type: is 'spiral', which is not supp"),
        ("llama.rope.scaling.type", "longrope", r"rope_factors_short.weight or .* is missing"),
        ("llama.attention.clamp_kqv", 8.0, r"clamp_kqv: is 8.0, which is not supported for llama"),
        ("llama.attention.causal", False, r"causal: is False, which is not supported for llama"),
        ("llama.expert_count", 4, r"expert_used_count: is missing"),
        ("split.count", 2, r"is one of 2 parts of a model \(put them together"),
        (
            "tokenizer.ggml.model",
            "bert",
            r"the tokenizer 'bert' is not supported \(supported: gpt2",
        ),
    ],
)
def test_metadata_that_is_wrong_is_refused_by_key(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(with_key(tmp_path, key, value))


def test_a_trained_context_without_a_logarithm_to_divide_by_is_refused(tmp_path: Path) -> None:
    path = with_key(tmp_path, "phi3.rope.scaling.original_context_length", 1, "phi3-longrope")
    with pytest.raises(CheckpointError, match=r"original_context_length: is 1, expected 2 to"):
        load(path)


@pytest.mark.parametrize(("factor", "multiplier"), [(0.5, 20.0), (1e300, 1e308)])
def test_a_yarn_without_a_divisor_above_0_is_refused(
    factor: float, multiplier: float, tmp_path: Path
) -> None:
    scaling: dict[str, Any] = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": factor,
    }
    key = "llama.rope.scaling.yarn_log_multiplier"
    path = with_key(tmp_path, key, multiplier, **scaling)
    message = r"yarn_log_multiplier: is .*, which is too large for the factor"
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_windows_that_a_model_would_lack_are_refused(tmp_path: Path) -> None:
    path = with_key(tmp_path, "qwen2.attention.sliding_window", 8, "qwen2")
    with pytest.raises(UnsupportedModelError, match="sliding_window: is 8, which is not supported"):
        load(path)
    path = with_key(tmp_path, "olmo2.attention.sliding_window", 8, "olmo2")
    with pytest.raises(UnsupportedModelError, match="OLMo 3, which has windows"):
        load(path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("llama", "token_embd.weight", r"tensor token_embd.weight: is missing"),
        ("llama", "blk.1.attn_q.weight", r"1 parameter without a tensor: .*1.self_attn.q_proj"),
        ("llama", "output_norm.weight", r"1 parameter without a tensor: model.norm.weight"),
        ("mixtral", "blk.1.ffn_up_exps.weight", r"blk.1: gate, up and down of its experts"),
    ],
)
def test_tensors_that_are_missing_are_named(
    name: str, tensor: str, message: str, tmp_path: Path
) -> None:
    make_gguf(name, tmp_path / "model.gguf")
    path = tmp_path / "changed.gguf"
    rewrite(tmp_path / "model.gguf", path, lambda n, value: None if n == tensor else value)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_tensor_of_another_model_is_named(tmp_path: Path) -> None:
    make_gguf("qwen3", tmp_path / "model.gguf")
    path = with_architecture(tmp_path, "qwen2")
    with pytest.raises(CheckpointError, match=r"tensor blk.0.attn_k_norm.weight: is a tensor that"):
        load(path)


@pytest.mark.parametrize("number", ["00", "01", "\u0661", "-1", "1_0"])
def test_a_number_of_a_layer_is_written_in_one_way(number: str, tmp_path: Path) -> None:
    make_gguf("llama", tmp_path / "model.gguf")
    path = tmp_path / "changed.gguf"
    name = f"blk.{number}.attn_q.weight"
    renamed = {"blk.1.attn_q.weight": name}
    rewrite(tmp_path / "model.gguf", path, lambda _, value: value, **renamed)
    with pytest.raises(CheckpointError, match=rf"tensor {name}: is a tensor that models of this"):
        load(path)


def with_architecture(place: Path, name: str) -> Path:
    """The file said to be of another architecture."""
    reader = gguf.GGUFReader(place / "model.gguf")
    old = reader.fields["general.architecture"].contents()
    path = place / "renamed.gguf"
    writer = gguf.GGUFWriter(path, name)
    for key, field in reader.fields.items():
        if key != "general.architecture" and not key.startswith("GGUF."):
            writer.add_key_value(
                key.replace(f"{old}.", f"{name}."), field.contents(), field.types[0]
            )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    finish(writer)
    return path


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    make_gguf("llama", tmp_path / "model.gguf")
    path = tmp_path / "changed.gguf"

    def spoil(name: str, value: torch.Tensor) -> torch.Tensor:
        return value.log() if name == "blk.0.ffn_up.weight" else value

    rewrite(tmp_path / "model.gguf", path, spoil)
    program = load(path)
    with pytest.raises(CheckpointError, match=r"ffn_up.weight .*holds NaN|up_proj.*holds NaN"):
        evaluate_weight(program, "model.layers.0.mlp.up_proj.weight")
