"""Converts the checkpoints into what each peer loads, with the peer's own tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from .contestants import (
    CTRANSLATE2,
    LLAMA_CPP,
    ONNXRUNTIME,
    OPENVINO,
    Contestant,
    Workdir,
)
from .install import llama_cpp_source
from .steps import Runner, whole_or_absent

_Convert = Callable[[Workdir, Contestant, str, Path, Runner], None]


def convert(workdir: Workdir, contestant: Contestant, shape: str, run: Runner) -> bool:
    """Make the model of a contestant; False where it is there, or the checkpoint is read."""
    tool = _TOOLS.get(contestant.peer.name)
    if tool is None or contestant.model is None:
        return False
    return whole_or_absent(
        workdir.model(contestant, shape),
        lambda partial: tool(workdir, contestant, shape, partial, run),
    )


def _llama_cpp(
    workdir: Workdir, contestant: Contestant, shape: str, out: Path, run: Runner
) -> None:
    plain = workdir.root / "models" / contestant.peer.name / f"{shape}-bf16.gguf"
    if contestant.bits == 16:
        vendored = llama_cpp_source(workdir, run) / "vendor" / "llama.cpp"
        module = "benchmarks.peers.to_gguf"
        run(workdir.python(LLAMA_CPP), "-m", module, vendored, workdir.checkpoint(shape), out)
        return

    def convert_first(partial: Path) -> None:
        _llama_cpp(workdir, _LLAMA_CPP_PLAIN, shape, partial, run)

    whole_or_absent(plain, convert_first)
    kind = "q4_0" if contestant.bits == 4 else "q8_0"
    run(workdir.python(LLAMA_CPP), "-m", "benchmarks.peers.quantize_gguf", plain, out, kind)


_LLAMA_CPP_PLAIN = Contestant(name="llama.cpp-bf16", peer=LLAMA_CPP, bits=16)


def _openvino(workdir: Workdir, contestant: Contestant, shape: str, out: Path, run: Runner) -> None:
    export = workdir.environment(OPENVINO) / "bin" / "optimum-cli"
    four = ["--sym", "--group-size", "128", "--ratio", "1.0"] if contestant.bits == 4 else []
    task = ("--task", "text-generation-with-past", "--weight-format", f"int{contestant.bits}")
    run(export, "export", "openvino", "-m", workdir.checkpoint(shape), *task, *four, out)


def _onnxruntime(
    workdir: Workdir, contestant: Contestant, shape: str, out: Path, run: Runner
) -> None:
    command = (workdir.python(ONNXRUNTIME), "-m", "onnxruntime_genai.models.builder")
    places = ("-i", workdir.checkpoint(shape), "-o", out, "-c", workdir.root / "cache")
    # Blocks of 32 as in q4_0, and activations in int8, the fastest of its accuracy levels.
    options = ("--extra_options", "int4_accuracy_level=4", "int4_block_size=32")
    run(*command, *places, "-p", f"int{contestant.bits}", "-e", "cpu", *options)


def _ctranslate2(
    workdir: Workdir, contestant: Contestant, shape: str, out: Path, run: Runner
) -> None:
    command = workdir.environment(CTRANSLATE2) / "bin" / "ct2-transformers-converter"
    places = ("--model", workdir.checkpoint(shape), "--output_dir", out)
    run(command, *places, "--quantization", f"int{contestant.bits}")


_TOOLS: Mapping[str, _Convert] = {
    LLAMA_CPP.name: _llama_cpp,
    OPENVINO.name: _openvino,
    ONNXRUNTIME.name: _onnxruntime,
    CTRANSLATE2.name: _ctranslate2,
}
