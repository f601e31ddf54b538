"""An artifact for a processor of another kind: compiled here, refused here."""

from pathlib import Path

import pytest

import infc
from infc.codegen.cpp import toolchain
from infc.ir.errors import TargetError, ToolchainError

from ..checkpoints import make_checkpoint
from ..codegen.kernels.remote import skip_without_compiler
from .support import compile_checkpoint

ELF_AARCH64 = (183).to_bytes(2, "little")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint("llama", tmp_path / "checkpoint", num_hidden_layers=1)


def test_it_holds_code_for_that_processor(checkpoint: Path, tmp_path: Path) -> None:
    skip_without_compiler()
    artifact = compile_checkpoint(checkpoint, tmp_path / "artifact", target="aarch64")
    assert artifact.manifest.target.name == "aarch64"
    library = (artifact.path / "code/model.so").read_bytes()
    assert library[:4] == b"\x7fELF" and library[18:20] == ELF_AARCH64
    with pytest.raises(TargetError, match="was built for aarch64, but this is x86-64"):
        infc.LLM(artifact, kv_memory="1MiB")


def test_a_missing_compiler_is_told(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(toolchain.CROSS_COMPILERS, "aarch64", "nowhere-g++")
    toolchain.find_cross_toolchain.cache_clear()
    with pytest.raises(ToolchainError, match=r"no C\+\+ compiler for aarch64 .*install nowhere"):
        compile_checkpoint(checkpoint, tmp_path / "artifact", target="aarch64")
    toolchain.find_cross_toolchain.cache_clear()
