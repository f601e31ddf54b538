"""A small artifact that holds nothing runnable: for tests of what surrounds the running."""

from pathlib import Path

from infc.ir.artifact import ArtifactWriter
from infc.ir.manifest import (
    MAIN,
    CompiledProgram,
    Entry,
    Limits,
    Manifest,
    TargetMachine,
    TokenizerFiles,
    WeightsFile,
)
from infc.ir.program import ModelSpec
from infc.ir.resources import KvGroup

CODE = b"not really code " * 40
WEIGHTS = bytes(range(256)) * 20


def manifest() -> Manifest:
    """A manifest with a value in every field, as it stands before the files are listed."""
    main = CompiledProgram(
        entry=Entry("cpp-shared-library", "code/model.so", 1),
        inputs={"input_ids": "i32[T]", "positions": "i32[T]", "logits_index": "i32[R]"},
        outputs={"logits": "f32[R, 64]"},
        limits=Limits(64, 32, 4, 4),
        arena_bytes=4096,
        weights=WeightsFile("weights.safetensors", ("a", "b")),
        resources=(KvGroup("full", (0, 1), 2, 16, 16, "f32", 32),),
    )
    return Manifest(
        infc_version="0.1.0",
        recipe={"model": "here", "runtime": {"max_context": 64}},
        model=ModelSpec("toy", 2, 32, 2, 2, 16, 64, 64, (None, 16), 1234),
        backend="cpp",
        target=TargetMachine("x86-64-v2", ("popcnt", "sse4.2")),
        programs={MAIN: main},
        tokenizer=TokenizerFiles("tokenizer/tokenizer.json", None, (2, 3), None),
    )


def write_artifact(destination: Path) -> Path:
    """Writes the small artifact; returns its path."""
    with ArtifactWriter(destination) as writer:
        fill(writer.path)
        writer.commit(manifest())
    return destination


def fill(directory: Path) -> None:
    """Writes the files that the manifest speaks of."""
    (directory / "code").mkdir()
    (directory / "tokenizer").mkdir()
    (directory / "code/model.so").write_bytes(CODE)
    (directory / "tokenizer/tokenizer.json").write_text('{"model": {}}')
    (directory / "weights.safetensors").write_bytes(WEIGHTS)
