"""What TensorRT builds without a GPU: time and size of engines, for models, types and chips.

    python -m benchmarks.engines OUT [--model NAME=DIR ...] [--only TEXT ...]

Builds engines of small random models of several architectures, in every type, one for each chip and
one for all of them, and the same of checkpoints that are given. Each result is written to
OUT/results.jsonl at once, so that a run that is started again goes on where the last one ended; the
table of all results is printed last. Needs a clone, and
`pip install 'infc[compile,tensorrt-compile]'`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import infc
from infc.ir.errors import InfcError
from tests.checkpoints import make_checkpoint

ARCHITECTURES: Final = ("llama", "qwen3", "gemma2", "mistral", "mixtral")
CHIPS: Final = ("sm_80", "sm_86", "sm_89", "sm_120")
E4M3_CHIPS: Final = ("sm_89", "sm_120")
TYPES: Final[dict[str, dict[str, Any]]] = {
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "int4": {"dtype": "bfloat16", "quantization": "q4_0-weights"},
    "fp8": {"dtype": "bfloat16", "quantization": "fp8"},
}
"""Settings of a recipe for each column of the table."""
_UNCODED: Final = {"embedding": "none", "method": "nearest"}
_EXPERTS: Final = {"mixtral": {"skip": ["*experts*"]}}
"""What stays as it is, where there are codes."""
_LIMITS: Final = {
    "runtime.max_context": 128,
    "runtime.max_sequences": 8,
    "runtime.step_tokens": 64,
    "tensorrt.decode_buckets": [8],
}
"""Of the small models: one bucket, one profile of chunks."""
_WHOLE: Final = {
    "runtime.max_context": 2048,
    "runtime.max_sequences": 16,
    "runtime.step_tokens": 512,
    "tensorrt.decode_buckets": [16],
}


@dataclass(frozen=True, slots=True)
class Case:
    """A model, its type, the chips of one engine, and where the weights are."""

    model: str
    kind: str
    chips: tuple[str, ...]
    weights: str = "embedded"


@dataclass(frozen=True, slots=True)
class Result:
    """What an engine took: seconds of emitting it, and bytes of it and of the file of weights."""

    model: str
    kind: str
    chips: tuple[str, ...]
    weights: str
    seconds: float
    engine_bytes: int
    weight_bytes: int
    error: str = ""


def cases(checkpoints: list[str]) -> Iterator[Case]:
    """All of them, the small models first."""
    for model in (*ARCHITECTURES, *checkpoints):
        for kind in TYPES:
            able = E4M3_CHIPS if kind == "fp8" else CHIPS
            yield from (Case(model, kind, (chip,)) for chip in able)
            yield Case(model, kind, able)
            yield Case(model, kind, ("sm_89",), "inputs")


def build(case: Case, checkpoint: Path, out: Path) -> Result:
    """Compile one case, and measure it; the artifact is deleted again."""
    settings = dict(_LIMITS if case.model in ARCHITECTURES else _WHOLE)
    chosen = dict(TYPES[case.kind])
    if "quantization" in chosen:
        scheme = {"scheme": chosen["quantization"]}
        chosen["quantization"] = {**scheme, **_UNCODED, **_EXPERTS.get(case.model, {})}
    first, *others = case.chips
    settings |= chosen
    settings |= {"backend": "tensorrt", "target": first, "tensorrt.chips": others}
    settings |= {"tensorrt.weights": case.weights}
    place = out / "engine.infc"
    shutil.rmtree(place, ignore_errors=True)
    begun = time.perf_counter()
    error, engine, weights = "", 0, 0
    seconds = 0.0
    try:
        infc.compile(
            checkpoint,
            output=place,
            overrides=settings,
            verify=False,
            cache=False,
            progress=False,
        )
        timings = json.loads(place.with_name(f"{place.name}.timings.json").read_text())
        seconds = timings["emit code and weights"]
        engine = (place / "model.engine").stat().st_size
        weights = (place / "weights.safetensors").stat().st_size
    except InfcError as failure:
        error, seconds = str(failure)[:300], time.perf_counter() - begun
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return Result(**asdict(case), seconds=seconds, engine_bytes=engine, weight_bytes=weights,
                  error=error)  # fmt: skip


def checkpoint_of(model: str, given: dict[str, Path], out: Path) -> Path:
    """The directory of a model: one that was given, or a small random one."""
    if model in given:
        return given[model]
    place = out / "checkpoints" / model
    return place if place.exists() else make_checkpoint(model, place, dtype="bfloat16")


def print_table(results: list[Result]) -> None:
    """One line for each model and type."""
    print("| model | type | one chip, s | one chip, MB | all chips in one, s | MB |"
          " weights as inputs: engine + weights, MB |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- |")
    order = {model: place for place, model in enumerate(ARCHITECTURES)}
    results = sorted(results, key=lambda one: (order.get(one.model, len(order)), one.model))
    for model, kind in dict.fromkeys((one.model, one.kind) for one in results):
        found = [one for one in results if (one.model, one.kind) == (model, kind)]
        failed = [one for one in found if one.error]
        made = [one for one in found if not one.error]
        single = [one for one in made if len(one.chips) == 1 and one.weights == "embedded"]
        several = [one for one in made if len(one.chips) > 1]
        inputs = [one for one in made if one.weights == "inputs"]
        cells = [model, kind, _times(single), _sizes(single), _times(several), _sizes(several)]
        cells.append("; ".join(f"{_mb(o.engine_bytes)} + {_mb(o.weight_bytes)}" for o in inputs))
        print("| " + " | ".join(cells) + " |")
        for one in failed:
            print(f"failed: {one}")


def _times(results: list[Result]) -> str:
    seconds = [one.seconds for one in results]
    if len(seconds) < 2:
        return f"{seconds[0]:.1f}" if seconds else ""
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})"


def _sizes(results: list[Result]) -> str:
    sizes = sorted({_mb(one.engine_bytes) for one in results}, key=float)
    return "–".join(dict.fromkeys([sizes[0], sizes[-1]])) if sizes else ""


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"


def read_results(path: Path) -> list[Result]:
    """Those of earlier runs."""
    lines = path.read_text().splitlines() if path.exists() else []
    read = (json.loads(line) for line in lines)
    return [Result(**{**one, "chips": tuple(one["chips"])}) for one in read]


def main() -> None:
    """Build what has no result yet, and print all results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--only", action="append", help="cases of whose text this is a part")
    options = parser.parse_args()
    given = {name: Path(place) for name, place in (one.split("=", 1) for one in options.model)}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    results = read_results(path)
    done = {(one.model, one.kind, one.chips, one.weights) for one in results}
    for case in cases(list(given)):
        key = case.model, case.kind, case.chips, case.weights
        text = " ".join([case.model, case.kind, *case.chips, case.weights])
        if key in done or not any(one in text for one in options.only or [""]):
            continue
        result = build(case, checkpoint_of(case.model, given, options.out), options.out)
        results.append(result)
        with path.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        print(result, flush=True)
    print_table(results)


if __name__ == "__main__":
    main()
