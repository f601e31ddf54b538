"""Configurations are checked before anything is built, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infc.frontend.config import read_config
from infc.frontend.load import load_model
from infc.frontend.rope import fix_length_dependent_rope
from infc.ir.errors import (
    CapacityError,
    CheckpointError,
    InfcError,
    UnsupportedModelError,
    UsageError,
)

from ..checkpoints import edit_config, make_checkpoint
from ..configs.base import COMMON
from ..configs.refused import REFUSED
from .oracle import no_log


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def with_config(llama: Path, directory: Path, **changes: object) -> Path:
    (directory / "config.json").write_bytes((llama / "config.json").read_bytes())
    (directory / "model.safetensors").symlink_to(llama / "model.safetensors")
    edit_config(directory, **changes)
    return directory


@pytest.mark.parametrize("arch", REFUSED)
def test_refused_with_the_reason(
    arch: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(arch, tmp_path)
    capfd.readouterr()
    with pytest.raises(UnsupportedModelError, match=REFUSED[arch].reason):
        load_model(tmp_path, log=no_log)
    assert capfd.readouterr() == ("", "")  # whatever torch or transformers have to say


ABSURD: dict[str, list[object]] = {
    "num_attention_heads": [0, -4, 3, 1 << 20],
    "num_key_value_heads": [0, 3],
    "hidden_size": [0, 1 << 40, "64"],
    "num_hidden_layers": [0, 1 << 20],
    "vocab_size": [-1, 1 << 40],
    "intermediate_size": [0],
    "max_position_embeddings": [0],
    "head_dim": [-8],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in ABSURD.items() for value in values]
)
def test_absurd_sizes(key: str, value: object, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(with_config(llama, tmp_path, **{key: value}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"model_type": 3}', "{}"])
def test_malformed_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


@given(st.dictionaries(st.sampled_from(sorted(COMMON)), st.none() | st.integers()))
def test_any_integers_load_or_are_refused(changes: dict[str, int | None]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        config = {**COMMON, "model_type": "llama", **changes}
        (Path(name) / "config.json").write_text(json.dumps(config))
        try:
            checked = read_config(Path(name))
        except InfcError:
            return
        assert checked.num_attention_heads % checked.num_key_value_heads == 0


def test_missing_directory_and_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is missing"):
        read_config(tmp_path)


def test_unknown_type_names_the_nearest(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="did you mean llama"):
        read_config(with_config(llama, tmp_path, model_type="lama"))


def test_model_without_a_language_head(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="not a causal language model"):
        read_config(with_config(llama, tmp_path, model_type="vit"))


def test_code_of_the_checkpoint_never_runs(llama: Path, tmp_path: Path) -> None:
    with_config(llama, tmp_path, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    ran = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(UnsupportedModelError, match="requires code from the checkpoint"):
        read_config(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("method", ["gptq", "mxfp4", "fp8"])
def test_quantised_checkpoint(method: str, llama: Path, tmp_path: Path) -> None:
    with_config(llama, tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedModelError, match=rf"already quantized \({method}\)"):
        read_config(tmp_path)


def test_a_quantization_that_is_null_is_none(llama: Path, tmp_path: Path) -> None:
    with_config(llama, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert load_model(tmp_path, log=no_log).spec.num_layers == 4


def test_sizes_that_differ_by_layer(tmp_path: Path) -> None:
    """As lists, or as what a layer has of its own: each of them is checked."""
    wide = {**COMMON, "head_dim": 16, "pad_token_id": 0, "model_type": "gemma4_text"}
    for own, message in (
        ({"head_dim": 32}, None),
        ({"head_dim": -8}, "head_dim is -8, expected 1"),
        ({"num_attention_heads": 6}, None),
        ({"num_attention_heads": 3}, "num_attention_heads 3 is not a multiple"),
    ):
        config = {**wide, "per_layer_config": {"2": own}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if message is None:
            assert read_config(tmp_path).per_layer_config[2].head_dim in (16, 32)
            continue
        with pytest.raises(CheckpointError, match=message):
            read_config(tmp_path)
    lists = {**COMMON, "model_type": "gemma3n_text", "intermediate_size": [96, 96, 48, 96]}
    (tmp_path / "config.json").write_text(json.dumps(lists))
    assert read_config(tmp_path).intermediate_size == [96, 96, 48, 96]
    (tmp_path / "config.json").write_text(json.dumps({**lists, "intermediate_size": [96, 0] * 2}))
    with pytest.raises(CheckpointError, match="intermediate_size is 0, expected 1"):
        read_config(tmp_path)


def test_context_beyond_the_model(llama: Path) -> None:
    with pytest.raises(CapacityError, match="128 positions"):
        load_model(llama, max_context=129, log=no_log)
    with pytest.raises(UsageError, match="at least 2"):
        load_model(llama, max_context=1, log=no_log)


def test_unknown_dtype(llama: Path) -> None:
    with pytest.raises(UsageError, match="int3"):
        load_model(llama, dtype="int3", log=no_log)  # type: ignore[arg-type]


def test_dynamic_rope_stretches_by_its_factor_and_no_further(tmp_path: Path) -> None:
    make_checkpoint("llama-dynamic", tmp_path)  # of 128 positions, by a factor of 4
    with pytest.raises(CapacityError, match="513 is more than the 512 positions"):
        load_model(tmp_path, max_context=513, log=no_log)


def test_rope_by_layer_type_that_depends_on_the_length() -> None:
    module = torch.nn.Module()
    module.rope_type = {"full_attention": "longrope"}  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match="full_attention"):
        fix_length_dependent_rope(module, 16, no_log)
