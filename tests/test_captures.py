"""Captures that tests share: what is read back is what tracing gives, and nothing stale is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infc.frontend import load
from infc.ir.errors import CheckpointError, UnsupportedModelError
from infc.ir.program import Program
from infc.ir.text import print_program
from infc.ir.types import DType

from .captures import Captures
from .checkpoints import edit_config, make_checkpoint


@pytest.fixture
def traced() -> list[tuple[Any, ...]]:
    """Type and context of what was traced, in order."""
    return []


@pytest.fixture
def kept(
    captures: Captures,
    traced: list[tuple[Any, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Captures:
    """A directory of its own, which the frontend uses."""

    def count(config: Any, checkpoint: Any, compute: DType, context: int, log: Any) -> Program:
        traced.append((compute.value, context))
        return captures.capture(config, checkpoint, compute, context, log)

    own = Captures(tmp_path / "captures", count)
    monkeypatch.setattr(load, "_capture", own.run)
    return own


def test_a_model_is_traced_once(
    kept: Captures, traced: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """One with constants, whose capture says something."""
    first, second = (
        make_checkpoint("phi3-longrope", tmp_path / str(seed), seed=seed) for seed in (1, 2)
    )
    heard: list[list[str]] = [[], []]
    programs = [
        load.load_model(path, max_context=128, log=lines.append)
        for path, lines in zip((first, second), heard, strict=True)
    ]
    assert traced == [("f32", 128)]
    assert heard[0] == heard[1] and any("longrope" in line for line in heard[0])
    assert print_program(programs[0]) == print_program(programs[1])
    constants = [w.expr.attrs["key"] for w in programs[0].weights.values() if w.expr.op == "data"]
    assert constants
    for key in constants:
        assert torch.equal(*(program.loaders["data"](str(key)) for program in programs))
    name = "model.embed_tokens.weight"
    own = [program.loaders["checkpoint"](name) for program in programs]
    assert not torch.equal(*own), "weights are those of each checkpoint"


def test_whatever_makes_another_program_is_traced(
    kept: Captures, traced: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    def load_one(**options: Any) -> str:
        options = {"max_context": 64, "log": lambda line: None, **options}
        return print_program(load.load_model(tmp_path / "llama", **options))

    make_checkpoint("llama", tmp_path / "llama", seed=1)
    plain = load_one()
    assert load_one() == plain
    assert load_one(dtype="bfloat16") != plain
    assert load_one(max_context=32) != plain
    edit_config(tmp_path / "llama", rms_norm_eps=0.5)
    assert load_one() != plain
    tensors = load_file(tmp_path / "llama/model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(rounded, tmp_path / "llama/model.safetensors", metadata={"format": "pt"})
    assert load_one(dtype="float32") != plain
    assert traced == [("f32", 64), ("bf16", 64), ("f32", 32), ("f32", 64), ("f32", 64)]


def test_what_depends_on_values_is_not_kept(
    kept: Captures, traced: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """A tied head that is published as well must be the same as the embeddings."""
    make_checkpoint("llama-tied", tmp_path / "llama", seed=1)
    path = tmp_path / "llama/model.safetensors"
    tensors = load_file(path)
    for change in (0.0, 0.0, 1.0):
        head = tensors["model.embed_tokens.weight"] + change
        save_file({**tensors, "lm_head.weight": head}, path, metadata={"format": "pt"})
        if change:
            with pytest.raises(CheckpointError):
                load.load_model(tmp_path / "llama", log=lambda line: None)
        else:
            load.load_model(tmp_path / "llama", log=lambda line: None)
    assert len(traced) == 3


def test_what_is_refused_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Program:
        raise UnsupportedModelError("not this one")

    make_checkpoint("llama", tmp_path / "llama", seed=1)
    monkeypatch.setattr(load, "_capture", Captures(tmp_path / "captures", refuse).run)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="not this one"):
            load.load_model(tmp_path / "llama", log=lambda line: None)
    assert [path for path in (tmp_path / "captures").iterdir() if path.suffix != ".lock"] == []
