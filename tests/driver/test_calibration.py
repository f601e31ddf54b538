"""Calibration texts of recipes: in the report and the cache by hash, too little of them refused."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import infc
from infc.driver import calibration
from infc.driver.texts import CALIBRATION, read_text
from infc.ir.artifact import Artifact
from infc.ir.errors import UsageError
from infc.passes.methods import calibrate_weights

from .compiling import Lines, contents

GPTQ = ["quantization.scheme=int4", "quantization.method=gptq"]
WORDS = " ".join(f"the {i}th word is {i * i % 17}" for i in range(400))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    place = tmp_path / "of mine.txt"
    place.write_text(WORDS)
    return place


def build(source: Path, output: Path, *overrides: str, cache: bool = False) -> Artifact:
    return infc.compile(
        source / "model.yaml",
        output,
        overrides=[*GPTQ, *overrides],
        verify=False,
        cache=cache,
        progress=Lines(),
    )


def details(artifact: Artifact) -> dict[str, object]:
    report = json.loads((artifact.path / "report.json").read_text())
    (data,) = (one for one in report["passes"] if one["name"] == "calibrate-weights")
    found: dict[str, object] = data["details"]
    return found


def test_two_compilations_are_the_same_whatever_the_threads(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte; and nothing of this machine, such as the directory of the text, is in it."""
    options = (f"quantization.calibration={{text: '{text}', tokens: 300}}",)
    made = []
    for threads in (1, 3):
        monkeypatch.setattr(calibrate_weights, "available_cpus", lambda count=threads: count)
        made.append(build(source, tmp_path / f"out{threads}", *options))
    first, second = (contents(one.path) for one in made)
    assert first == second
    assert str(tmp_path).encode() not in b"".join(first.values())
    assert details(made[0])["calibration"] == {
        "name": "of mine.txt",
        "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "tokens": 300,
        "windows": 3,
        "damping": 0.01,
        "correction": 0.5,
    }
    assert "calibrated" in (made[0].path / "program.ir").read_text()
    # What it generates comes from these weights: not those that are rounded to nearest.
    nearest = build(source, tmp_path / "nearest", "quantization.method=nearest")
    assert contents(nearest.path)["weights.safetensors"] != first["weights.safetensors"]


def test_the_bundled_text_is_the_default(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 10)
    made = build(source, tmp_path / "out", "quantization.calibration.tokens=64")
    found = details(made)["calibration"]
    assert isinstance(found, dict)
    assert (found["name"], found["sha256"]) == (CALIBRATION, read_text(CALIBRATION).sha256)


def test_another_text_is_another_artifact(source: Path, text: Path, tmp_path: Path) -> None:
    """Under the same name too; the same text is found in the cache again."""
    options = (f"quantization.calibration={{text: '{text}', tokens: 64}}",)

    def hashed() -> object:
        found = details(build(source, tmp_path / "out", *options, cache=True))["calibration"]
        assert isinstance(found, dict)
        return found["sha256"]

    first = hashed()
    text.write_text(WORDS[::-1])
    second = hashed()
    text.write_text(WORDS)
    assert first == hashed() != second


@pytest.mark.parametrize(
    ("words", "tokens", "message"),
    [
        ("a few words", 100, r"short.txt: too little text: .* at least 100 are needed"),
        (WORDS[:600], 8192, r"short.txt: too little text: .* at least 1024 are needed"),
        ("", 100, r"short.txt: too little text: 1 tokens"),
    ],
)
def test_too_little_text(
    source: Path, tmp_path: Path, words: str, tokens: int, message: str
) -> None:
    place = tmp_path / "short.txt"
    place.write_text(words)
    options = (f"quantization.calibration={{text: '{place}', tokens: {tokens}}}",)
    with pytest.raises(UsageError, match=message):
        build(source, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_less_text_than_was_asked_for_is_said(source: Path, text: Path, tmp_path: Path) -> None:
    progress = Lines()
    infc.compile(
        source / "model.yaml",
        tmp_path / "out",
        overrides=[*GPTQ, f"quantization.calibration.text='{text}'"],
        verify=False,
        cache=False,
        progress=progress,
    )
    said = [line for line in progress.lines if line.startswith("calibrating on")]
    assert len(said) == 1
    assert said[0].endswith("tokens: of mine.txt has no more, and 8192 are asked for")


def test_a_text_that_is_not_there_is_refused_before_anything_else(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="the text cannot be read"):
        build(source, tmp_path / "out", "quantization.calibration.text=gone.txt")


def test_a_checkpoint_without_a_tokenizer(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    for path in (tmp_path / "source/checkpoint").glob("*token*"):
        path.unlink()
    with pytest.raises(UsageError, match=r"no tokenizer, which calibration needs .*nearest"):
        build(tmp_path / "source", tmp_path / "out")
