"""Configurations are checked before anything is built, and refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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
    with pytest.raises(UnsupportedModelError, match="did you mean 'llama'"):
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"hidden_size": 64}}, "has a text_config, which llama does not have"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, expected a finite number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05, expected a finite number, 0 or more"),
        ({"rope_theta": 0}, "rope_theta is 0, expected a finite number above 0"),
        ({"rope_theta": 10**400}, "rope_theta is 10+, expected a finite number above 0"),
        ({"rope_theta": [1e4, -1]}, "rope_theta is -1, expected a finite number, 0 or more"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, r"rope_scaling\.factor is 'x'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, r"factor is -1\.0"),
        ({"rope_parameters": {"rope_type": "nosuch"}}, "rope_type 'nosuch' is not known"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected 1"),
        ({"hidden_act": "nosuch"}, "hidden_act 'nosuch' is not known"),
        ({"dtype": "float99"}, "dtype 'float99' is not known"),
    ],
)
def test_a_value_that_no_model_has_is_refused_by_its_key(
    changes: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        read_config(with_config(llama, tmp_path, **changes))


@pytest.mark.parametrize(
    "name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"]
)
def test_a_file_that_says_the_weights_are_quantised(name: str, llama: Path, tmp_path: Path) -> None:
    with_config(llama, tmp_path)
    for nothing in ({}, {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}):
        (tmp_path / name).write_text(json.dumps(nothing))
        read_config(tmp_path)
    nested = {"quantization": {"quant_algo": "FP8"}}
    (tmp_path / name).write_text(json.dumps(nested if name.startswith("hf") else {"bits": 4}))
    with pytest.raises(UnsupportedModelError, match=rf"{name}.*already quantized"):
        read_config(tmp_path)


def test_compression_config_is_quantization(llama: Path, tmp_path: Path) -> None:
    with_config(llama, tmp_path, compression_config={"quant_method": "sparse"})
    with pytest.raises(UnsupportedModelError, match=r"already quantized \(sparse\)"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_the_place_of_a_file(name: str, llama: Path, tmp_path: Path) -> None:
    with_config(llama, tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: is not a regular file"):
        read_config(tmp_path)
