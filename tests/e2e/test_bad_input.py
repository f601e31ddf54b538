"""Bad input at the command line: each is one clear line and a status, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file, save_file

from infc.codegen.cpp.toolchain import find_toolchain
from infc.driver.cli import run
from infc.ir.artifact import Artifact

from ..checkpoints import make_checkpoint
from ..gguf_files import make_gguf
from .support import compile_checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("INFC_DEBUG", raising=False)


def make(place: Path) -> Path:
    """A small checkpoint, its recipe beside it; returns the recipe."""
    make_checkpoint("llama", place / "checkpoint", tokenizer=True, num_hidden_layers=1)
    (place / "model.yaml").write_text("model: ./checkpoint\nruntime: {step_tokens: 64}\n")
    return place / "model.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artifact(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compile_checkpoint(recipe.parent / "checkpoint", tmp_path_factory.mktemp("a") / "art")


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Status and the one line of error of a command that must fail."""
    capfd.readouterr()
    status = run(list(map(str, arguments)))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: "), captured.err
    assert captured.err.count("\n") == 1
    return status, captured.err.removeprefix("error: ").rstrip("\n")


def cut_short(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1000])


def hold_nan(weights: Path) -> None:
    tensors = load_file(weights)
    tensors[Q_PROJ][3, 5] = torch.nan
    save_file(tensors, weights, {"format": "pt"})


def lose_a_row(weights: Path) -> None:
    tensors = load_file(weights)
    tensors[Q_PROJ] = tensors[Q_PROJ][:-1].clone()
    save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, ": file truncated"),
        (hold_nan, f"(of {Q_PROJ} ...): holds NaN (the checkpoint is damaged)"),
        (lose_a_row, f"{Q_PROJ} is f32[63, 64], config.json needs shape [64, 64]"),
    ],
)
def test_damaged_weights(
    spoil: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = make(tmp_path)
    spoil(tmp_path / "checkpoint/model.safetensors")
    before = sorted(os.listdir(tmp_path))
    output = tmp_path / "out"
    status, line = refused(capfd, "compile", recipe, "-o", output, "-q", "--no-verify")
    assert status == 3
    assert "model.safetensors" in line or Q_PROJ in line
    assert message in line
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "quantization", ["{scheme: int4, method: gptq, calibration: {tokens: 64}}", "adopt"]
)
def test_weights_that_are_no_numbers_are_the_checkpoints_fault(
    quantization: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No pass that reads them, and no comparison of programs, is named in their place."""
    if quantization == "adopt":
        source = tmp_path / "model.gguf"
        make_gguf("llama", source, stored=lambda _: GGMLQuantizationType.Q8_0)
        reader = GGUFReader(source)
        (tensor,) = (one for one in reader.tensors if one.name == "blk.0.attn_q.weight")
        data = bytearray(source.read_bytes())
        data[tensor.data_offset : tensor.data_offset + 2] = b"\0\x7e"  # NaN in float16
        source.write_bytes(data)
        message = "blk.0.attn_q.weight: a scale of its blocks is NaN or infinite (the file is dam"
    else:
        source = make(tmp_path)
        hold_nan(tmp_path / "checkpoint/model.safetensors")
        message = f"(of {Q_PROJ} ...): holds NaN (the checkpoint is damaged)"
    before = sorted(os.listdir(tmp_path))
    options = ("-q", "--set", f"quantization={quantization}", "--set", "backend=reference")
    status, line = refused(capfd, "compile", source, "-o", tmp_path / "out", *options)
    assert status == 3
    assert message in line
    assert "pass" not in line and "does not run" not in line
    assert sorted(os.listdir(tmp_path)) == before


def test_another_instruction_set(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Compiled here for a machine that is told apart by what this one is said to lack."""
    options = ["-q", "--no-verify", "--set", "target=sapphirerapids"]
    assert run(["compile", str(recipe), "-o", str(tmp_path / "art"), *options]) == 0
    (tmp_path / "cpuinfo").write_text("flags : cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2\n")
    monkeypatch.setattr("infc.ir.targets.x86._CPUINFO", tmp_path / "cpuinfo")
    for command in (("generate", tmp_path / "art", "x"), ("serve", tmp_path / "art", "--port", 0)):
        status, line = refused(capfd, *command)
        assert status == 6
        assert "this machine lacks" in line
        assert f"(`infc rebuild {tmp_path / 'art'}` builds it for x86-64-v2)" in line


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CXX": "/nonexistent"}, "$CXX names '/nonexistent', which is not there"),
        ({"CXX": "/bin/false"}, "the compiler /bin/false does not run"),
        ({"CXX": "", "PATH": ""}, "no C++ compiler was found"),
    ],
)
def test_no_compiler(
    variables: dict[str, str],
    message: str,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    find_toolchain.cache_clear()
    try:
        status, line = refused(capfd, "compile", recipe, "-o", tmp_path / "out")
    finally:
        find_toolchain.cache_clear()
    assert (status, os.listdir(tmp_path)) == (5, [])
    assert message in line


def test_disk_full_under_the_compiler(recipe: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk, as the compiler meets it."""
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from infc.driver.cli import run\n"
        "sys.exit(run(['compile', sys.argv[1], '-o', sys.argv[2], '-q', '--no-verify']))\n"
    )
    command = [sys.executable, "-c", script, str(recipe), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (5, 7), done.stderr
    assert done.stderr.count("\n") == 1
    assert "could not write: " in done.stderr or "cannot write the artifact: " in done.stderr
    assert "free some space" in done.stderr or "ulimit -f" in done.stderr
    assert os.listdir(tmp_path) == []


def test_an_output_that_cannot_be_written(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    status, line = refused(capfd, "compile", recipe, "-o", tmp_path / "file/out", "-q")
    assert status == 7
    assert f"cannot write the artifact: {os.strerror(errno.ENOTDIR)}" in line
    assert (tmp_path / "file").read_text() == "mine"
    assert refused(capfd, "compile", recipe, "-o", "/proc/out", "-q")[0] == 7


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["the cat " * 2000], 2, "tokens, the limit for prompt and output together is 128"),
        (["--token-ids", ""], 2, "takes numbers such as 1,2,3"),
        (["x", "--max-tokens", "100000"], 2, "exceed the limit of 128 tokens (use at most"),
        (["--token-ids", "5,99999999"], 2, "99999999 is not a token id"),
        (["--token-ids=-1"], 2, "-1 is not a token id"),
        (["x", "--temperature", "nan"], 2, "temperature is nan, outside 0..100"),
        (["x", "--temperature", "inf"], 2, "temperature is inf, outside 0..100"),
        (["x", "--top-p", "0"], 2, "top_p is 0, which keeps no token"),
        (["x", "--top-p", "1.5"], 2, "top_p is 1.5, outside 0..1"),
        (["x", "--top-k", "-2"], 2, "top_k is -2, outside 0.."),
        (["x", "--seed", "9" * 30], 2, "seed is 999"),
        (["x", "--max-tokens", "0"], 2, "max_tokens is 0, so nothing would be generated"),
        (["x", "--stop", ""], 2, "stop contains an empty string"),
        (["x", "--threads", "100000"], 2, "100000 is not in the range 1<=x<=1024"),
        (["x", "--max-context", "4096"], 8, "max_context is 4096, outside 2..128"),
        (["x", "--kv-memory", "much"], 2, "'much' is not a memory size"),
        (["x", "--kv-memory", "1"], 8, "does not fit into 1 B of KV memory"),
    ],
)
def test_a_request_that_cannot_be_served(
    arguments: list[str],
    status: int,
    message: str,
    artifact: Artifact,
    capfd: pytest.CaptureFixture[str],
) -> None:
    got, line = refused(capfd, "generate", artifact.path, *arguments)
    assert message in line
    assert got == status
