"""Calibration texts of recipes: in the report and the cache by hash, too little of them refused."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import infc
from infc.driver import calibration
from infc.driver.texts import CALIBRATION, read_text
from infc.ir.artifact import Artifact
from infc.ir.builder import ProgramBuilder
from infc.ir.errors import CapacityError, UsageError
from infc.ir.types import DType, Sym, TensorType
from infc.passes.methods import calibrate_weights, scale_channels

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
        "damping": 0.5,
        "correction": 0.5,
    }
    assert "calibrated" in (made[0].path / "program.ir").read_text()
    # What it generates comes from these weights: not those that are rounded to nearest.
    nearest = build(source, tmp_path / "nearest", "quantization.method=nearest")
    assert contents(nearest.path)["weights.safetensors"] != first["weights.safetensors"]


def test_scaled_channels_are_chosen_on_the_text_before_codes_are(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the threads; and the bar never goes back, though two passes calibrate."""
    made, steps = [], []

    class Bar(Lines):
        def advance(self, done: int, total: int, detail: str = "") -> None:
            steps.append((done, total, detail))

    for threads in (1, 3):
        for module in (calibrate_weights, scale_channels):
            monkeypatch.setattr(module, "available_cpus", lambda count=threads: count)
        steps.clear()
        artifact = infc.compile(
            source / "model.yaml",
            tmp_path / f"out{threads}",
            overrides=[
                *GPTQ,
                "quantization.channel_scaling=awq",
                f"quantization.calibration={{text: '{text}', tokens: 300}}",
            ],
            verify=False,
            cache=False,
            progress=Bar(),
        )
        made.append(contents(artifact.path))
    assert made[0] == made[1]
    report = json.loads(made[0]["report.json"])
    (data,) = (one for one in report["passes"] if one["name"] == "scale-channels")
    assert data["details"]["calibration"]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert data["matches"] == sum(one["used"] for one in data["details"]["errors"]) > 0
    total = next(total for _, total, detail in steps if detail.startswith("scaling channels"))
    passes = [done for done, of, _ in steps if of == total]
    assert passes == sorted(passes)
    halves = [
        max(done for done, _, detail in steps if detail.startswith(words))
        for words in ("scaling channels", "calibrating")
    ]
    assert halves[1] - halves[0] == pytest.approx(halves[0], abs=20)


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
    source: Path,
    tmp_path: Path,
    words: str,
    tokens: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the model is captured, which may take minutes."""
    monkeypatch.delattr("infc.driver.compile._capture")
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


def test_more_tokens_than_memory_holds_are_refused_before_the_work(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "available_memory", lambda: 1 << 20)
    options = f"quantization.calibration={{text: '{text}', tokens: 2000}}"
    with pytest.raises(CapacityError) as caught:
        build(source, tmp_path / "out", options)
    found = re.fullmatch(
        r"quantization.calibration.tokens: calibrating on 2000 tokens takes [\d.]+ .iB, and 1.0 MiB"
        r" are free \(ask for (\d+) or less\)",
        str(caught.value),
    )
    assert found is not None and 0 < int(found[1]) < 2000, str(caught.value)
    assert not (tmp_path / "out").exists()
    build(source, tmp_path / "out", options.replace("2000", found[1]))
    monkeypatch.setattr(calibration, "available_memory", lambda: 1 << 10)
    with pytest.raises(CapacityError, match=r"set quantization.method to nearest"):
        build(source, tmp_path / "out", options)


def test_a_calibration_that_no_method_reads_is_said(source: Path, tmp_path: Path) -> None:
    said = []
    for options in (["quantization.calibration.tokens=64"], []):
        progress = Lines()
        infc.compile(
            source / "model.yaml",
            tmp_path / "out",
            overrides=["quantization={scheme: int4, method: nearest}", *options],
            verify=False,
            cache=False,
            progress=progress,
        )
        said.append("quantization.calibration has no effect with method: nearest" in progress.lines)
    assert said == [True, False]


def test_a_text_that_is_not_there_is_refused_before_anything_else(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="the text cannot be read"):
        build(source, tmp_path / "out", "quantization.calibration.text=gone.txt")


def test_a_checkpoint_without_a_tokenizer(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("infc.driver.compile._capture")
    shutil.copytree(source, tmp_path / "source")
    for path in (tmp_path / "source/checkpoint").glob("*token*"):
        path.unlink()
    with pytest.raises(UsageError, match=r"no tokenizer, which calibration needs .*nearest"):
        build(tmp_path / "source", tmp_path / "out")
    options = ("quantization.method=nearest", "quantization.channel_scaling=awq")
    with pytest.raises(UsageError, match=r"no tokenizer.*channel_scaling to none"):
        build(tmp_path / "source", tmp_path / "out", *options)


def compile_int4(source: Path, output: Path, *overrides: str, verify: bool = False) -> list[str]:
    """What a compilation says that leaves the method open."""
    progress = Lines()
    infc.compile(
        source / "model.yaml",
        output,
        overrides=["quantization=int4", *overrides],
        verify=verify,
        cache=False,
        progress=progress,
    )
    return progress.lines


def test_weights_are_calibrated_unless_the_recipe_says_nearest(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "AUTO_TOKENS", (96, 64))
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 10)
    said = compile_int4(source, tmp_path / "auto")
    assert any("calibrating on 96 tokens of general-calibration" in line for line in said)
    build(source, tmp_path / "gptq", "quantization.calibration.tokens=96")
    compile_int4(source, tmp_path / "nearest", "quantization.method=nearest")
    auto, gptq, nearest = (
        contents(tmp_path / name)["weights.safetensors"] for name in ("auto", "gptq", "nearest")
    )
    assert auto == gptq != nearest


def test_without_a_tokenizer_weights_are_rounded_to_nearest(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    for path in (tmp_path / "source/checkpoint").glob("*token*"):
        path.unlink()
    said = compile_int4(tmp_path / "source", tmp_path / "out")
    reason = "weights are rounded to nearest: the checkpoint has no tokenizer"
    assert any(line.startswith(reason) for line in said)
    with pytest.raises(UsageError, match="no tokenizer, which calibration needs"):
        compile_int4(
            tmp_path / "source", tmp_path / "other", "quantization.calibration={tokens: 64}"
        )


def test_large_models_are_calibrated_on_fewer_tokens_or_not_at_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "AUTO_TOKENS", (96, 64))
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 10)
    monkeypatch.setattr(calibration, "MAX_MOST_COST", 0)
    said = compile_int4(source, tmp_path / "c")
    assert any("calibrating on 64 tokens of general-calibration" in line for line in said)
    monkeypatch.setattr(calibration, "MAX_COST", {8: 1 << 60, 4: 0})
    said = compile_int4(source, tmp_path / "a")
    assert any("rounded to nearest: calibrating so large a model" in line for line in said)
    assert details(build(source, tmp_path / "b"))["calibration"]["tokens"] == 64  # type: ignore[index]


def test_cost_counts_runs_moments_and_feedback() -> None:
    """Two products of one input `[T, 4]`, and one of what comes of the first."""
    b = ProgramBuilder("products")
    b.symbol("T", 1, 64)
    x = b.input("x", TensorType(DType.F32, (Sym("T"), 4)))
    wide = b.emit("linear", x, b.weight("a", TensorType(DType.F32, (5, 4))))
    other = b.emit("linear", x, b.weight("b", TensorType(DType.F32, (7, 4))))
    last = b.emit("linear", wide, b.weight("c", TensorType(DType.F32, (6, 5))))
    b.outputs = [last, other]
    twice_run = 2 * 2 * (5 * 4 + 7 * 4 + 6 * 5)
    moments = 4 * (4**2 + 5**2)
    feedback = 3 * (5 * 4**2 + 7 * 4**2 + 6 * 5**2)
    program = b.build()
    program = replace(program, spec=replace(program.spec, max_context=512))
    for tokens in (64, 1000):
        cost = calibration.calibration_cost(program, tokens)
        assert cost == tokens * (twice_run + moments) + feedback
        searching = calibration.calibration_cost(program, tokens, 3)
        assert searching - cost == tokens * twice_run // 2


def test_cost_counts_every_expert() -> None:
    """Feedback grows with their number, runs and moments with those that a token reaches."""

    def cost(experts: int, tokens: int) -> int:
        b = ProgramBuilder("mixture")
        b.symbol("T", 1, 64)
        x = b.input("x", TensorType(DType.F32, (Sym("T"), 4)))
        index = b.input("index", TensorType(DType.I64, (Sym("T"), 2)))
        share = b.input("share", TensorType(DType.F32, (Sym("T"), 2)))
        up = b.weight("up", TensorType(DType.F32, (experts, 12, 4)))
        down = b.weight("down", TensorType(DType.F32, (experts, 4, 6)))
        b.outputs = [b.emit("moe", x, index, share, up, down, act="silu")]
        program = b.build()
        program = replace(program, spec=replace(program.spec, max_context=512))
        return calibration.calibration_cost(program, tokens)

    feedback = 3 * (12 * 4**2 + 4 * 6**2)
    assert cost(8, 100) - cost(4, 100) == 4 * feedback
    assert cost(8, 200) - cost(8, 100) == cost(4, 200) - cost(4, 100)


def test_a_lack_of_memory_is_an_error_whatever_the_method(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding to nearest instead would give other weights, under the same key of the cache."""
    monkeypatch.setattr(calibration, "available_memory", lambda: 1024)
    with pytest.raises(CapacityError, match=r"calibrating on .* tokens takes .*method to nearest"):
        compile_int4(source, tmp_path / "out")


def test_nothing_is_measured_on_the_text_that_it_was_calibrated_on(
    source: Path, text: Path, tmp_path: Path
) -> None:
    options = (f"quantization.calibration.text='{text}'", f"accuracy.evaluation='{text}'")
    with pytest.raises(UsageError, match=r"of mine.txt is also the text that the accuracy is"):
        build(source, tmp_path / "out", *options)
