"""Comparing an artifact with the checkpoint behind it: the figures, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import infc
from infc.driver import source_model
from infc.driver.cli import run
from infc.driver.evaluate import compare_on_text, evaluate_text
from infc.driver.source_model import SourceModel, open_source
from infc.driver.texts import EVALUATION, read_text
from infc.ir.artifact import Artifact, open_artifact
from infc.ir.builder import ProgramBuilder
from infc.ir.errors import CapacityError, UsageError

from ..test_layout import ROOT

TINY = ROOT / "recipes/tiny"
Build = Callable[..., Artifact]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds of the bundled model by the backend reference, in float32."""

    def make(*overrides: str) -> Artifact:
        place = tmp_path_factory.mktemp("build") / "tiny.infc"
        options = ["backend=reference", "dtype=float32", *overrides]
        return infc.compile(
            TINY / "model.yaml", place, overrides=options, verify=False, cache=False
        )

    return make


@pytest.fixture(scope="module")
def plain(build: Build) -> Artifact:
    return build()


@pytest.fixture(scope="module")
def int4(build: Build) -> Artifact:
    return build("quantization={scheme: int4, method: nearest}")


@pytest.fixture(scope="module")
def checkpoint(plain: Artifact) -> SourceModel:
    return open_source(plain)


@pytest.fixture(scope="module")
def text() -> str:
    (_, prose) = read_text(EVALUATION).documents
    assert prose.text is not None
    return prose.text[:320]


def test_a_build_in_float32_predicts_what_its_source_does(
    plain: Artifact, checkpoint: SourceModel, text: str
) -> None:
    found = compare_on_text(plain, checkpoint, text, context_tokens=80, stride_tokens=60)
    alone = evaluate_text(plain, text, context_tokens=80, stride_tokens=60)
    assert found.mine == alone
    assert found.theirs.nats == pytest.approx(alone.nats, rel=1e-6)
    assert found.divergence.kl_max < 1e-8
    assert found.divergence.same_top > 0.995


def test_the_source_stands_for_a_build_in_float32(
    plain: Artifact, int4: Artifact, checkpoint: SourceModel, text: str
) -> None:
    """The same figures as against an artifact that nothing was lost in."""
    ours = compare_on_text(int4, checkpoint, text, context_tokens=96)
    theirs = compare_on_text(int4, plain, text, context_tokens=96)
    assert ours.divergence.kl_mean == pytest.approx(theirs.divergence.kl_mean, rel=1e-3)
    assert ours.divergence.kl_mean > 0.001
    assert ours.mine == theirs.mine
    assert ours.theirs.nats == pytest.approx(theirs.theirs.nats, rel=1e-6)


def test_rows_do_not_depend_on_how_they_are_divided(
    checkpoint: SourceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = list(range(40, 81))
    shares: list[float] = []
    whole = list(checkpoint.window(tokens, 11, 100, shares.append))
    assert [len(targets) for _, targets in whole] == [30]
    assert whole[0][1] == tokens[11:]
    assert shares == sorted(shares) and shares[-1] == 1
    monkeypatch.setattr("infc.passes.text_runs.LOGITS_BYTES", 7 * 4 * checkpoint.vocab_size)
    parts = list(checkpoint.window(tokens, 11, 8, shares.append))
    # Steps of 8 tokens; those before the first that counts give no rows.
    assert [len(targets) for _, targets in parts] == [6, 8, 8, 8]
    assert [t for _, targets in parts for t in targets] == tokens[11:]
    joined = np.concatenate([logits for logits, _ in parts])
    assert np.abs(joined - whole[0][0]).max() < 1e-4


def test_the_command_compares_with_the_source(
    int4: Artifact, text: str, tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text"
    file.write_text(text)
    figures = []
    for against in ("source", "tiny", str(TINY / "checkpoint")):
        assert run(["eval", str(int4.path), str(file), "--against", against, "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out)["against"])
    assert figures[0] == figures[1] == figures[2]
    assert 0.001 < figures[0]["kl_mean"] <= figures[0]["kl_p99"] <= figures[0]["kl_max"]
    assert not (own_cache / "artifacts").exists()  # nothing was compiled for it


def test_another_vocabulary_is_refused(
    plain: Artifact, artifact: Artifact, checkpoint: SourceModel, text: str
) -> None:
    """The model of the other fixtures has other tokens."""
    with pytest.raises(UsageError, match="the vocabularies differ: 320 tokens and 4096"):
        compare_on_text(artifact, checkpoint, text)


def test_another_tokenizer_is_refused(
    plain: Artifact, checkpoint: SourceModel, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkpoint.tokenizer is not None
    monkeypatch.setattr(checkpoint.tokenizer, "encode", lambda text: [1, 2, 3])
    with pytest.raises(UsageError, match="the tokenizers differ"):
        compare_on_text(plain, checkpoint, text)


@pytest.mark.parametrize("against", ["org.name/none.gguf", "gone/model.yaml", "no such"])
def test_a_missing_checkpoint_is_refused(
    against: str, plain: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(TINY / "heldout.py.txt")
    code = run(["eval", str(plain.path), file, "--max-bytes", "99", "--against", against])
    assert code == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and against in said[-1]


def test_a_source_that_is_not_recorded_is_refused(artifact: Artifact) -> None:
    with pytest.raises(UsageError, match=r"not known: .* was a directory, .*--against"):
        open_source(artifact)


def test_a_source_of_that_name_must_be_the_same(
    plain: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_model, "checkpoint_identity", lambda path: "another")
    with pytest.raises(UsageError, match="is another checkpoint now"):
        open_source(plain)
    said: list[str] = []
    open_source(plain, "tiny", said.append)
    assert said == [f"tiny is not the checkpoint that {plain.path} was compiled from"]


def test_windows_that_do_not_fit_are_refused(
    plain: Artifact, checkpoint: SourceModel, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_model, "available_memory", lambda: 1 << 20)
    with pytest.raises(CapacityError, match=r"a window of \d+ tokens takes .* --context"):
        compare_on_text(plain, checkpoint, text)


def test_without_a_tokenizer_the_artifacts_tokens_count(
    plain: Artifact, text: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(TINY / "checkpoint", copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    found = open_source(plain, copy)
    assert found.tokenizer is None
    compared = compare_on_text(open_artifact(plain.path), found, text, context_tokens=100)
    assert compared.divergence.kl_max < 1e-8


def test_a_checkpoint_with_a_smaller_context_is_refused(plain: Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(TINY / "checkpoint", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    with pytest.raises(UsageError) as caught:
        open_source(plain, copy)
    said = str(caught.value)
    context = plain.manifest.main.limits.max_context
    assert said.startswith(f"{copy}: it is another model than that of {plain.path}, which has a")
    assert f"context of {context} tokens: max_context {context} is more than the 64" in said
    assert said.endswith("(compare with the checkpoint that the artifact was compiled from)")


def test_another_lack_does_not_make_it_another_model(
    plain: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise CapacityError("no memory is left")

    monkeypatch.setattr("infc.frontend.load.load_model", fail)
    with pytest.raises(CapacityError, match="no memory is left"):
        open_source(plain, TINY / "checkpoint")


def test_tensors_of_a_gguf_file_are_dequantized_once(tmp_path: Path) -> None:
    read: list[str] = []

    def loader(name: str) -> torch.Tensor:
        read.append(name)
        return torch.ones(8 if name == "large" else 2)

    program = replace(ProgramBuilder("toy").build(), loaders={"checkpoint": loader})
    kept = source_model._keeping_weights(program).loaders["checkpoint"]
    assert [len(kept(name)) for name in ("a", "large", "a", "large")] == [2, 8, 2, 8]
    assert read == ["a", "large"]
    kept = source_model._KeptTensors(loader, 12)
    read.clear()
    for name in ("a", "large", "a", "large"):
        kept(name)
    assert read == ["a", "large", "large"]
