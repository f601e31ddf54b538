"""Weights: shards, damage, names and shapes; whatever is wrong names file and tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from infc.frontend import load
from infc.frontend.checkpoint import open_checkpoint
from infc.frontend.load import load_model
from infc.ir.errors import CheckpointError
from infc.ir.weights import evaluate_weight

from ..checkpoints import edit_config, make_checkpoint
from .oracle import no_log, parity_error

Tensors = dict[str, torch.Tensor]
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def rewrite(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / FILE)
    change(tensors)
    save_file(tensors, directory / FILE, metadata={"format": "pt"})


def edit_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_checkpoint("llama", tmp_path, num_hidden_layers=2)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint("llama", tmp_path, num_hidden_layers=2, shard_bytes=100_000)


def test_shards_are_read(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert parity_error(sharded, load_model(sharded, log=no_log)) < 1e-5


def test_missing_shard(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"{victim.name}.*is missing"):
        open_checkpoint(sharded)


def test_index_that_names_another_shard(sharded: Path) -> None:
    first, second = sorted(path.name for path in sharded.glob("*.safetensors"))[:2]

    def swap(placed: dict[str, str]) -> None:
        name = next(name for name, shard in placed.items() if shard == first)
        placed[name] = second

    edit_index(sharded, swap)
    with pytest.raises(CheckpointError, match=f"{second}, which does not contain it"):
        open_checkpoint(sharded)


def test_index_that_leaves_a_tensor_out(sharded: Path) -> None:
    edit_index(sharded, lambda placed: placed.pop(Q_PROJ))
    with pytest.raises(CheckpointError, match=f"does not list .*{Q_PROJ}"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "", ".hidden"])
def test_index_that_leaves_the_directory(shard: str, sharded: Path) -> None:
    edit_index(sharded, lambda placed: placed.update({Q_PROJ: shard}))
    with pytest.raises(CheckpointError, match="not a file name"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_malformed_index(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    paths = sorted(sharded.glob("*.safetensors"))
    left, right = load_file(paths[0]), load_file(paths[1])
    name = next(iter(left))
    save_file({**right, name: left[name]}, paths[1])
    with pytest.raises(CheckpointError, match=f"{name}: is in .* as well"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated_file(kept: int, llama: Path) -> None:
    data = (llama / FILE).read_bytes()
    (llama / FILE).write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match=FILE):
        open_checkpoint(llama)


def test_overlapping_tensors(llama: Path) -> None:
    data = (llama / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    twins = [name for name in names if header[name]["shape"] == header[names[0]]["shape"]]
    header[twins[1]]["data_offsets"] = header[twins[0]]["data_offsets"]
    text = json.dumps(header).encode()
    (llama / FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(CheckpointError, match=f"{FILE}: .*(overlaps|gap)"):
        open_checkpoint(llama)


@settings(max_examples=60)
@given(place=st.integers(0, 3000), value=st.integers(0, 255))
def test_a_changed_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    directory = tmp_path_factory.mktemp("changed")
    save_file({"a": torch.ones(3, 5), "b": torch.ones(7)}, directory / FILE)
    data = bytearray((directory / FILE).read_bytes())
    data[place % len(data)] = value
    (directory / FILE).write_bytes(data)
    try:
        checkpoint = open_checkpoint(directory)
    except CheckpointError:
        return
    for name, kind in checkpoint.types.items():
        assert checkpoint.tensor(name).shape == kind.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors[Q_PROJ][3].fill_(value))
    program = load_model(llama, log=no_log)
    with pytest.raises(CheckpointError, match=Q_PROJ):
        evaluate_weight(program, Q_PROJ)


def test_missing_tensor(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(CheckpointError, match=f"1 parameter without a tensor: {Q_PROJ}"):
        load_model(llama, log=no_log)


def test_unexpected_tensor(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight"):
        load_model(llama, log=no_log)


def test_more_layers_than_weights(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before a model of them all is traced, which would take minutes."""
    edit_config(llama, num_hidden_layers=4096)
    monkeypatch.setattr(load, "_capture", lambda *_: pytest.fail("was captured"))
    with pytest.raises(
        CheckpointError,
        match=r"config\.json: num_hidden_layers is 4096, but the weights are of 2 layers",
    ):
        load_model(llama, log=no_log)


def test_wrong_shape(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({Q_PROJ: torch.ones(64, 32)}))
    with pytest.raises(CheckpointError, match=f"{FILE}: {Q_PROJ}: .*needs shape"):
        load_model(llama, log=no_log)


def test_wrong_element_type(llama: Path) -> None:
    wrong = torch.ones(64, 64, dtype=torch.int8)
    rewrite(llama, lambda tensors: tensors.update({Q_PROJ: wrong}))
    with pytest.raises(CheckpointError, match=f"{FILE}: {Q_PROJ}: .*i8"):
        load_model(llama, log=no_log)


def test_old_rotary_buffers_are_passed_over(llama: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(llama, lambda tensors: tensors.update({name: torch.zeros(8)}))
    assert parity_error(llama, load_model(llama, log=no_log)) < 1e-5


def test_mixed_element_types_are_cast(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].bfloat16()}))
    program = load_model(llama, log=no_log)
    assert program.weights[Q_PROJ].type.dtype.value == "f32"
    assert parity_error(llama, program) < 1e-5


def test_tied_weights_published_twice(tmp_path: Path) -> None:
    make_checkpoint("llama-tied", tmp_path)
    embedding = load_file(tmp_path / FILE)["model.embed_tokens.weight"]
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    program = load_model(tmp_path, log=no_log)
    assert "lm_head.weight" not in program.weights
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .*differ"):
        load_model(tmp_path, log=no_log)
    edit_config(tmp_path, tie_word_embeddings=False)
    assert parity_error(tmp_path, load_model(tmp_path, log=no_log)) < 1e-5


def test_tied_weights_published_under_the_other_name(tmp_path: Path) -> None:
    make_checkpoint("llama-tied", tmp_path)
    rewrite(
        tmp_path,
        lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
    )
    assert parity_error(tmp_path, load_model(tmp_path, log=no_log)) < 1e-5


def test_pickled_weights_are_not_opened(llama: Path) -> None:
    (llama / FILE).rename(llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(llama)


def test_no_weights_at_all(llama: Path) -> None:
    (llama / FILE).unlink()
    with pytest.raises(CheckpointError, match=FILE):
        open_checkpoint(llama)


def test_published_names_of_experts(tmp_path: Path) -> None:
    """As Mixtral was published: one tensor an expert, stacked and joined as it is read."""
    make_checkpoint("mixtral", tmp_path, num_hidden_layers=2)
    assert "model.layers.1.block_sparse_moe.experts.3.w1.weight" in load_file(tmp_path / FILE)
    program = load_model(tmp_path, log=no_log)
    published = load_file(tmp_path / FILE)
    weight = evaluate_weight(program, "model.layers.1.mlp.experts.gate_up_proj")
    prefix = "model.layers.1.block_sparse_moe.experts."
    for expert in range(4):
        parts = [published[f"{prefix}{expert}.{name}.weight"] for name in ("w1", "w3")]
        assert torch.equal(weight[expert], torch.cat(parts))


def test_a_missing_expert(tmp_path: Path) -> None:
    make_checkpoint("mixtral", tmp_path, num_hidden_layers=2)
    gone = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    rewrite(tmp_path, lambda tensors: tensors.pop(gone))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load_model(tmp_path, log=no_log)


def test_published_names_of_gpt2(tmp_path: Path) -> None:
    make_checkpoint("gpt2", tmp_path)
    names = set(load_file(tmp_path / FILE))
    assert {"h.0.attn.bias", "wte.weight"} <= names
    assert not any(name.startswith("transformer.") for name in names)


def test_weights_that_are_a_pipe(llama: Path) -> None:
    (llama / FILE).unlink()
    os.mkfifo(llama / FILE)
    with pytest.raises(CheckpointError, match=f"{FILE}: is not a regular file"):
        open_checkpoint(llama)
