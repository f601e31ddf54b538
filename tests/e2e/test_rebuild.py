"""An artifact rebuilt for another processor is the one that compiling for it gives."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import infc
from infc.driver.cli import run
from infc.driver.rebuild import rebuild_artifact
from infc.ir.artifact import Artifact, ArtifactWriter, open_artifact
from infc.ir.errors import ArtifactError, TargetError, UsageError
from infc.ir.targets import resolve_target

from ..checkpoints import make_checkpoint
from ..runtime.small_artifact import write_small_artifact
from .support import compile_checkpoint, prompts, relative_error, teacher_forced

RECIPE = Path(__file__).parents[2] / "recipes/tiny/model.yaml"
HERE = resolve_target("native").name
OTHERS = [name for name in ("x86-64-v3", "x86-64-v2") if name != HERE]
"""Lesser processors than this one."""


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The bundled model for this machine."""
    output = tmp_path_factory.mktemp("bundled") / "tiny.infc"
    return infc.compile(RECIPE, output, verify=False, cache=False)


@pytest.fixture(scope="module", params=OTHERS)
def rebuilt(
    request: pytest.FixtureRequest, bundled: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """The same for a lesser machine, made of the artifact alone, where the command puts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("rebuilt"))
        assert run(["rebuild", str(bundled.path), "--target", request.param, "-q"]) == 0
        (made,) = Path.cwd().iterdir()
    assert made.name == f"tiny-{request.param}.infc"
    return open_artifact(made)


def test_the_rebuilt_model_says_the_same(bundled: Artifact, rebuilt: Artifact) -> None:
    assert rebuilt.manifest.target.name != bundled.manifest.target.name
    assert open_artifact(rebuilt.path, "full").identity == rebuilt.identity
    sequences = prompts(bundled.manifest.model.vocab_size, lengths=(70, 9))
    expected, actual = teacher_forced(bundled, sequences), teacher_forced(rebuilt, sequences)
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    # Both round to bfloat16 in other places: as far apart as bfloat16 is from float32.
    assert max(errors) < 0.03
    sure = [
        np.sort(e, -1)[:, -1] - np.sort(e, -1)[:, -2] > 0.1 * np.abs(e).max(-1) for e in expected
    ]
    assert sum(int(s.sum()) for s in sure) > 5
    for certain, e, a in zip(sure, expected, actual, strict=True):
        assert (e.argmax(-1) == a.argmax(-1))[certain].all()


def test_and_back_again_are_the_same_bytes(
    bundled: Artifact, rebuilt: Artifact, tmp_path: Path
) -> None:
    place = tmp_path / "back"
    shutil.copytree(rebuilt.path, place)
    back = rebuild_artifact(place, bundled.manifest.target.name, place)  # in its own place
    assert back.identity == bundled.identity
    assert contents(back.path) == contents(bundled.path)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_it_is_what_compiling_gives(dtype: str, tmp_path: Path) -> None:
    """Also where panels don't divide the matrices, and where bytes are kept flipped for VNNI."""
    make_checkpoint("llama", tmp_path / "checkpoint", num_hidden_layers=1)
    sets = {"quantization": "int8"} if dtype == "int8" else {}

    def compiled(target: str) -> Artifact:
        return compile_checkpoint(tmp_path / "checkpoint", tmp_path / target, target=target, **sets)

    wide, narrow = "x86-64-v4+vnni", "x86-64-v3"
    expected = compiled(narrow)
    made = rebuild_artifact(compiled(wide).path, narrow, tmp_path / "made")
    assert contents(made.path) == contents(expected.path)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton compiles the kernels")
@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_for_another_gpu_it_is_what_compiling_gives(scheme: str, tmp_path: Path) -> None:
    """Also where launches of one depend on others, and kernels have other names."""
    make_checkpoint("llama", tmp_path / "checkpoint", num_hidden_layers=1)

    def compiled(target: str) -> Artifact:
        sets = {"quantization": scheme, "backend": "triton", "target": target}
        sets |= {"triton.batch_invariant": "true"}
        return compile_checkpoint(tmp_path / "checkpoint", tmp_path / target, **sets)

    expected, old = compiled("sm_80"), compiled("sm_90")
    made = rebuild_artifact(old.path, "sm_80", tmp_path / "made")
    assert contents(made.path) == contents(expected.path)
    assert made.identity == expected.identity != old.identity
    with pytest.raises(TargetError, match="does not compile for x86-64-v3") as error:
        rebuild_artifact(old.path, "x86-64-v3", tmp_path / "other")
    assert "sm_80" in str(error.value.hint)


def test_a_source_of_another_infc_is_refused(bundled: Artifact, tmp_path: Path) -> None:
    for name in ("code/step.cpp", "code/kernels/linear.hpp"):
        with ArtifactWriter(tmp_path / "other") as writer:
            shutil.copytree(bundled.path, writer.path, dirs_exist_ok=True)
            (writer.path / "manifest.json").unlink()
            with open(writer.path / name, "a") as file:
                file.write("// of another version\n")
            writer.commit(bundled.manifest)
        with pytest.raises(ArtifactError, match="not what this infc generates") as raised:
            rebuild_artifact(tmp_path / "other", "x86-64-v3", tmp_path / "new")
        assert raised.value.where == str(tmp_path / "other" / name)
        assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_backend_without_targets_is_refused(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "a")
    with pytest.raises(UsageError, match="makes the same for every target"):
        rebuild_artifact(tmp_path / "a", "x86-64-v3", tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
