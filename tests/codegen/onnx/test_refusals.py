"""What is refused, and what is said instead of what onnxruntime would say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import infc
from infc.codegen.onnx.backend import OnnxBackend
from infc.driver.doctor import examine
from infc.ir.artifact import Artifact, open_artifact
from infc.ir.errors import ArtifactError, InfcError, ToolchainError, UsageError
from infc.ir.extras import ONNX, ONNX_COMPILE, Extra
from infc.ir.formats import FORMATS
from infc.ir.onnx_session import ACCURACY
from infc.ir.safetensors import write_safetensors
from infc.ir.types import DType, TensorType
from infc.runtime.executors import open_executor
from infc.runtime.executors.base import ExecutorConfig

from ...checkpoints import make_checkpoint
from ..harness import build
from ..op_cases import linear_bias, program_of

CONFIG = ExecutorConfig(num_blocks=())


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """A product, and no state."""
    return build(program_of(linear_bias, DType.F32), tmp_path / "art", backend="onnx")


def test_a_missing_package_is_named_with_its_extra(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Extra, "missing", lambda extra: list(extra.libraries))
    needs = r"needs onnxruntime, which is not installed \(pip install 'infc\[onnx\]'\)"
    with pytest.raises(ToolchainError, match=needs):
        open_executor(artifact, CONFIG)
    with pytest.raises(ToolchainError, match=r"needs onnx, .*infc\[onnx-compile\]"):
        build(program_of(linear_bias, DType.F32), tmp_path / "b", backend="onnx")


@pytest.mark.parametrize("version", ["1.30.0", "1.9.0", "0.5"])
def test_an_old_onnxruntime_is_named(
    version: str, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(ToolchainError, match=rf"{version} is too old.*pip install 'onnxruntime>="):
        open_executor(artifact, CONFIG)


def test_truncated_weights_are_found_before_onnxruntime_reads_them(artifact: Artifact) -> None:
    path = artifact.weights_path
    whole = path.stat().st_size
    os.truncate(path, whole - 64)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors: .*truncated.*compile it again"):
        open_executor(artifact, CONFIG)
    with pytest.raises(ArtifactError, match=f"has {whole - 64} bytes instead of {whole}"):
        open_artifact(artifact.path)


def test_moved_weights_are_named(artifact: Artifact) -> None:
    artifact.weights_path.rename(artifact.path.with_name("elsewhere"))
    with pytest.raises(ArtifactError, match="was replaced while it was being opened"):
        open_executor(artifact, CONFIG)
    with pytest.raises(ArtifactError, match=r"the file 'weights\.safetensors' is missing"):
        open_artifact(artifact.path)


def test_weights_of_another_model_are_found(artifact: Artifact) -> None:
    """As long as those of this one, and readable: onnxruntime would run them."""
    import torch

    kind = TensorType(DType.F32, (64, 64))
    write_safetensors(artifact.weights_path, [("other", kind)], lambda name: torch.zeros(64, 64))
    with pytest.raises(ArtifactError, match=r"does not match the manifest|cannot open the model"):
        open_executor(artifact, CONFIG)


def test_a_damaged_model_is_one_line(artifact: Artifact) -> None:
    artifact.entry_path.write_bytes(artifact.entry_path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"onnxruntime .* cannot open the model") as caught:
        open_executor(artifact, CONFIG)
    assert "\n" not in str(caught.value)


GOOD = {"config": {ACCURACY: "4"}, "onnxruntime": "1.31"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no JSON object"),
        ("{}", "config is no object"),
        (json.dumps({**GOOD, "providers": []}), "the key 'providers' is unknown"),
        (json.dumps({**GOOD, "config": ["x"]}), "config is no object"),
        (json.dumps({**GOOD, "config": {ACCURACY: 4}}), ".*accuracy_level is 4"),
        (json.dumps({**GOOD, "config": {ACCURACY: ["4"]}}), ".*accuracy_level is "),
        (
            json.dumps({**GOOD, "config": {"session.intra_op.allow_spinning": "1"}}),
            "the setting 'session.intra_op.allow_spinning' is unknown",
        ),
        (json.dumps({**GOOD, "onnxruntime": 1.31}), "onnxruntime is no version"),
        (json.dumps({**GOOD, "onnxruntime": "new"}), "onnxruntime is no version"),
        (json.dumps({"config": {}}), "onnxruntime is no version"),
    ],
)
def test_other_settings_than_ours_are_refused(text: str, message: str, artifact: Artifact) -> None:
    (artifact.path / "session.json").write_text(text)
    with pytest.raises(ArtifactError, match=rf"session\.json: {message}.*compile it again"):
        open_executor(artifact, CONFIG)


def _edit(artifact: Artifact, edit: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(artifact.entry_path, load_external_data=False)
    edit(model)
    artifact.entry_path.write_bytes(model.SerializeToString())


def _facts(change: Callable[[dict[str, Any]], Any]) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        (prop,) = (one for one in model.metadata_props if one.key == "infc.facts")
        prop.value = json.dumps(change(json.loads(prop.value)))

    return edit


def _no_facts(model: onnx.ModelProto) -> None:
    for prop in model.metadata_props:
        prop.value = "{" if prop.key == "infc.facts" else prop.value


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_no_facts, "no JSON"),
        (_facts(lambda facts: []), "no JSON object"),
        (_facts(lambda facts: {}), "does not match the manifest"),
        (_facts(lambda facts: {**facts, "step_tokens": "many"}), "manifest: step_tokens"),
        (_facts(lambda facts: {**facts, "sizes": [1]}), "manifest: sizes"),
    ],
    ids=range(5),
)
def test_facts_that_are_none_are_refused(
    edit: Callable[[onnx.ModelProto], None], message: str, artifact: Artifact
) -> None:
    _edit(artifact, edit)
    with pytest.raises(ArtifactError, match=message):
        open_executor(artifact, CONFIG)


def _another_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("beams", TensorProto.INT64, [1]))


def _another_type(model: onnx.ModelProto) -> None:
    (value,) = (one for one in model.graph.input if one.name == "positions")
    value.type.tensor_type.elem_type = TensorProto.FLOAT


def _another_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["positions"], ["more"]))
    model.graph.output.append(helper.make_tensor_value_info("more", TensorProto.INT64, ["T"]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_another_input, "it has the input beams"),
        (_another_type, r"its input positions is tensor\(float\)"),
        (_another_output, "it has the output more"),
    ],
)
def test_other_arrays_than_those_of_a_step_are_refused(
    edit: Callable[[onnx.ModelProto], None], message: str, artifact: Artifact
) -> None:
    _edit(artifact, edit)
    with pytest.raises(ArtifactError, match=f"not that of a step: {message}"):
        open_executor(artifact, CONFIG)


def test_weights_that_others_can_write_are_not_mapped(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Artifact, "weights_are_ours", lambda artifact: False)
    with pytest.raises(ArtifactError, match=r"writable by others.*cp -r.*chmod go-w"):
        open_executor(artifact, CONFIG)


def test_formats_are_numbers_times_scales() -> None:
    held = {name for name, form in FORMATS.items() if OnnxBackend().can_hold(form)}
    assert held == {"i8", "i8_g32", "q8_0", "i4_g32", "q4_0"}


@pytest.mark.parametrize(
    ("arch", "sets", "kind", "message"),
    [
        ("llama", {"quantization": "int4"}, UsageError, "b4_g32.*another scheme, such as q4_0,"),
        ("llama", {"quantization": "int4-g64-weights"}, UsageError, "such as q4_0-weights,"),
        ("llama", {"quantization": "q4_1"}, UsageError, "another scheme, such as q4_0,"),
        ("llama", {"quantization": "fp8"}, UsageError, "e4m3.*another scheme, such as int8,"),
        ("llama", {"backend": "cpp", "dtype": "float16"}, UsageError, "float16.*set backend=onnx"),
        (
            *("llama", {"backend": "cpp", "kv_cache.dtype": "float16"}, UsageError),
            "KV cache in float16 .*choose bfloat16, .*set backend=onnx",
        ),
        ("llama", {"kv_cache.dtype": "int8"}, UsageError, "KV cache in int8 .*choose auto, or "),
        ("llama", {"kv_cache.dtype": "fp8"}, UsageError, "KV cache in fp8 .*choose auto, or "),
    ],
)
def test_a_refusal_says_what_to_do_instead(
    arch: str, sets: dict[str, Any], kind: type[InfcError], message: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(arch, tmp_path / "checkpoint")
    overrides = ["backend=onnx", *(f"{key}={value}" for key, value in sets.items())]
    with pytest.raises(kind, match=message):
        infc.compile(
            checkpoint, output=tmp_path / "a", overrides=overrides, verify=False, cache=False
        )


def test_the_oldest_onnxruntime_is_that_of_the_ops(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models with `GroupQueryAttention` need 1.32, others 1.31."""
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    open_executor(artifact, CONFIG).close()
    path = artifact.path / "session.json"
    path.write_text(path.read_text().replace("1.31", "1.32"))
    with pytest.raises(ToolchainError, match=r"1\.31\.1 is too old, this model needs 1\.32"):
        open_executor(artifact, CONFIG)


def old_onnxruntime(directory: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """What the metadata of an installed package say, in front of those of this environment."""
    metadata = directory / f"onnxruntime-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: onnxruntime\nVersion: {version}\n")
    monkeypatch.syspath_prepend(directory)


@pytest.mark.parametrize(
    ("version", "sets", "needed"),
    [
        ("1.30.0", [], "1.31"),
        ("1.31.1", ["onnx.kv=slots", "onnx.dialect=onnxruntime"], "1.32"),
        ("1.31.1", ["onnx.kv=slots"], None),
        ("1.31.1", ["onnx.dialect=onnxruntime"], None),
    ],
)
def test_an_old_onnxruntime_is_named_before_anything_is_compiled(
    version: str,
    sets: list[str],
    needed: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint is not there: it is not looked for either."""
    old_onnxruntime(tmp_path, monkeypatch, version)
    recipe = tmp_path / "model.yaml"
    recipe.write_text("model: ./missing\n")
    expected = rf"{version} is too old, .*install 'onnxruntime>={needed}'" if needed else "missing"
    with pytest.raises(ToolchainError if needed else InfcError, match=expected):
        infc.compile(recipe, overrides=["backend=onnx", *sets], cache=False)


def test_an_old_onnxruntime_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_onnxruntime(tmp_path, monkeypatch, "1.30.0")
    findings = {found.subject: found for found in examine()}
    for subject in ("onnxruntime", "backend onnx"):
        assert not findings[subject].fine
        assert "1.30.0 is too old: pip install 'onnxruntime>=1.31'" in findings[subject].detail


def test_what_serves_needs_neither_onnx_nor_torch(artifact: Artifact) -> None:
    """`infc[onnx]` has onnxruntime alone."""
    script = f"""
import sys
for name in ("onnx", "torch", "transformers", "ml_dtypes"):
    sys.modules[name] = None
import numpy as np
from infc.ir.artifact import open_artifact
from infc.runtime.executors import open_executor
from infc.runtime.executors.base import ExecutorConfig, run_step
from infc.runtime.scheduling.step import Step
ints = lambda *values: np.array(values, np.int32)
executor = open_executor(open_artifact({str(artifact.path)!r}), ExecutorConfig(num_blocks=()))
step = Step(token_ids=ints(1, 2), positions=ints(0, 1), query_starts=ints(0, 2),
            context_lengths=ints(2), block_tables=(), slots=(), block_copies=(),
            logits_index=ints(0, 1))
print(np.isfinite(run_step(executor, step).logits).all())
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "True", ran.stderr


def test_each_extra_installs_what_it_is_asked_for() -> None:
    text = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for name, extra in (("onnx", ONNX), ("onnx-compile", ONNX_COMPILE)):
        asked = {re.split("[<>=]", one)[0] for one in extras[name]}
        assert asked == set(extra.libraries)
        assert f"'infc[{name}]'" in extra.install
