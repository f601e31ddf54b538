"""Whole models on an emulated GPU: real engine, real executor, compiled kernels, small shapes."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import infc
from infc.ir.artifact import Artifact
from infc.runtime.sampling.sampling_params import SamplingParams

from ..configs import CONFIGS
from ..e2e.builds import Build, Builds
from ..e2e.neighbours import Answer, Events, Job, Run, play
from ..e2e.support import prompts
from ..gpu_breadth import RARELY
from .architectures import DENSE, OTHERS
from .engines import Case, checked_draws, emulated, no_graphs, seen_steps
from .scripted import errors, run_script

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton compiles the kernels")

SMALLER = (("num_hidden_layers", 2),)
_FAMILY, _OTHER = prompts(320, (96, 40))


def _job(prompt: list[int], arrival: int = 0, **params: Any) -> Job:
    return Job(tuple(prompt), SamplingParams(ignore_eos=True, **params), arrival)


RUN = Run(
    jobs=(
        _job(_FAMILY[:42], max_tokens=23, temperature=0.0, logprobs=2),
        _job(_OTHER[:21], 1, max_tokens=14, temperature=0.9, top_p=0.9, seed=3, n=3),
        _job([*_FAMILY[:32], 1, 2], 4, max_tokens=16, temperature=0.0, prompt_logprobs=None),
        _job(_OTHER[20:38], 6, max_tokens=5, temperature=0.0, prompt_logprobs=0),
        _job(
            [*_OTHER[30:], 7],
            8,
            **{"max_tokens": 7, "temperature": 1.2, "top_k": 40, "min_p": 0.01, "seed": 9},
            **{"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
            **{"logit_bias": {7: 2.0}, "banned_token_ids": [11], "logprobs": 1},
        ),
    ),
    blocks=10,
    step_tokens=32,
    max_sequences=6,
    threads=1,
)
"""Prompts in chunks, beginnings that others had, choices that share a block, and too few blocks."""

NEEDED = frozenset(
    {
        *("one query each", "mixed", "chunks of prompts", "padded", "carried tokens"),
        *("copied blocks", "adjusted", "prefix hits", "preemptions", "copies on write"),
    }
)
"""What must happen in it on a device; with windows, blocks are free again and nobody preempted."""

BOUNDS = {"float32": 1e-5, "bfloat16": 0.05}
"""Of logits and hidden states, relative to the largest of a row; products in bfloat16 are rounded
by both sides, after sums in another order."""


def case(
    arch: str, target: str, dtype: str = "float32", *, breadth: bool = False, rarely: bool = False
) -> Any:
    """A small model for a chip, as a parameter: of two layers, unless each is told apart."""
    changes = () if "layer_types" in CONFIGS[arch].settings else SMALLER
    found = Case(Build(arch, dtype=dtype, changes=changes), target)
    marks = RARELY if rarely else [pytest.mark.breadth] if breadth else []
    return pytest.param(found, id=found.name, marks=marks)


CHIPS = ("sm_80", "sm_90")
STEPS = [
    *(case("qwen3", "sm_80"), case("gemma2", "sm_90"), case("mixtral", "sm_80")),
    case("gemma2", "sm_90", "bfloat16"),
    *(case("qwen3", "sm_90", breadth=True), case("gemma2", "sm_80", breadth=True)),
    case("mixtral", "sm_90", breadth=True),
    *(case(arch, "sm_90", breadth=True) for arch in OTHERS),
    *(case(arch, "sm_80", rarely=True) for arch in OTHERS),
    *(case(arch, chip, "bfloat16", rarely=True) for arch in (*DENSE, "qwen3") for chip in CHIPS),
]
"""What one chip leaves out, requests have on it. In bfloat16, last bits choose the experts of
random models: two programs choose others."""
REQUESTS = [
    *(case("gemma2", "sm_80"), case("mixtral", "sm_90")),
    *(case("gemma2", "sm_90", rarely=True), case("mixtral", "sm_80", rarely=True)),
    *(case(arch, "sm_80", breadth=True) for arch in ("qwen3", *OTHERS)),
    *(case(arch, "sm_90", rarely=True) for arch in ("qwen3", *OTHERS)),
]


@pytest.mark.parametrize("model", STEPS)
def test_steps_give_what_the_reference_gives(model: Case, builds: Builds) -> None:
    """Every row of logits and hidden states, and draws that follow from these logits."""
    with emulated(model.capability) as drivers, seen_steps() as seen:
        found = run_script(model.artifact(builds))
    (driver,) = drivers
    assert not driver.violations
    assert {"padded", "mixed", "copied blocks", "chunks of prompts"} <= seen.counts.keys()
    graphs = Counter(one.graph is not None for one in driver.launches)
    assert driver.num_replays >= seen.counts["one query each"]
    assert graphs[True] > 5 * graphs[False]
    expected = run_script(builds.artifact(model.reference))
    assert max(errors(found, expected)) < BOUNDS[model.build.dtype]


@pytest.mark.parametrize(
    "target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.breadth)], ids=str
)
def test_a_cache_in_e4m3_holds_what_the_reference_holds(target: str, builds: Builds) -> None:
    """With windows; queries and weights of values are rounded to bfloat16, as over int8."""
    model = Case(Build("gemma2", changes=SMALLER, sets=(("kv_cache.dtype", "fp8"),)), target)
    with emulated(model.capability) as drivers:
        found = run_script(model.artifact(builds))
    assert not drivers[0].violations
    assert max(errors(found, run_script(builds.artifact(model.reference)))) < 0.05


def answers(artifact: Artifact, counts: Counter[str]) -> list[Answer]:
    """What each job of `RUN` gets from an engine; what happened is counted."""
    events = Events(counts)
    with pytest.MonkeyPatch.context() as patch:
        events.watch(patch)
        found = dict(play(artifact, RUN, events))
    return [found[job] for job in RUN.jobs]


def tokens(found: list[Answer]) -> list[list[tuple[int, ...]]]:
    """The tokens of each choice of each job."""
    return [[choice for choice, _ in choices] for choices, _ in found]


def logprobs(found: list[Answer]) -> list[float]:
    """The log-probabilities of all tokens that were wanted, of prompts too."""
    entries = [entry for choices, _ in found for _, choice in choices for entry in choice]
    entries += [entry for _, prompt in found for entry in prompt or () if entry is not None]
    return [entry.logprob for entry in entries]


def checked_answers(model: Case, builds: Builds) -> list[Answer]:
    """What requests get one step ahead, with graphs; infc's own sampler draws each token too."""
    artifact, counts = model.artifact(builds), Counter[str]()
    with emulated(model.capability) as drivers, seen_steps() as seen, checked_draws():
        found = answers(artifact, counts)
    assert not drivers[0].violations
    assert drivers[0].num_replays > seen.counts["one query each"] > 0
    met = {name for name, count in (counts + seen.counts).items() if count}
    whole = None in artifact.manifest.model.windows
    assert (NEEDED if whole else NEEDED - {"preemptions", "prefix hits"}) <= met
    return found


def compare(found: list[Answer], model: Case, builds: Builds) -> None:
    """With what the reference gives."""
    expected = answers(builds.artifact(model.reference), Counter())
    assert tokens(found) == tokens(expected)
    assert logprobs(found) == pytest.approx(logprobs(expected), abs=1e-3)


@pytest.mark.parametrize("model", REQUESTS)
def test_requests_get_what_the_reference_gives(model: Case, builds: Builds) -> None:
    compare(checked_answers(model, builds), model, builds)


QWEN3 = Case(Build("qwen3", changes=SMALLER))


@pytest.fixture(scope="module")
def ahead(builds: Builds) -> list[Answer]:
    """What requests of one model get."""
    return checked_answers(QWEN3, builds)


def test_a_step_ahead_with_graphs_gives_what_the_reference_gives(
    ahead: list[Answer], builds: Builds
) -> None:
    compare(ahead, QWEN3, builds)


def test_graphs_change_no_bit(ahead: list[Answer], builds: Builds) -> None:
    """Nor does asking for all logits, to check what was drawn."""
    with emulated(90, change=no_graphs) as drivers:
        assert answers(QWEN3.artifact(builds), Counter()) == ahead
    assert drivers[0].num_replays == 0


def test_a_step_ahead_gives_the_tokens_of_none(ahead: list[Answer], builds: Builds) -> None:
    with emulated(90, depth=0), seen_steps() as seen:
        found = answers(QWEN3.artifact(builds), Counter())
    assert "carried tokens" not in seen.counts
    assert tokens(found) == tokens(ahead)


TINY = Path(infc.__path__[0]) / "recipes/tiny/model.yaml"
TEXTS = ("def fibonacci(n):\n", "class Point:")
PARAMS = (
    SamplingParams(max_tokens=8, temperature=0.0),
    SamplingParams(max_tokens=6, temperature=0.8, top_k=20, seed=1),
)


@pytest.mark.parametrize(
    "target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.breadth)], ids=str
)
def test_the_bundled_model_writes(target: str, builds: Builds, tmp_path: Path) -> None:
    texts = []
    for backend, sets in (("triton", [f"target={target}"]), ("reference", [])):
        settings = [f"backend={backend}", "kv_cache.memory=8MiB", *sets]
        place = tmp_path / backend
        infc.compile(TINY, output=place, overrides=settings, verify=False, cache=False)
        with emulated(int(target[3:])), infc.LLM(place) as llm:
            outputs = llm.generate(list(TEXTS), list(PARAMS))
        texts.append([(one.outputs[0].token_ids, one.outputs[0].text) for one in outputs])
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "model",
    [
        case("qwen3", "sm_90"),
        case("mixtral", "sm_80", "bfloat16"),
        *(case(arch, "sm_80", breadth=True) for arch in ("gemma2", "gpt_oss", "deepseek_v3")),
    ],
)
def test_a_row_does_not_depend_on_its_neighbours(model: Case, builds: Builds) -> None:
    """One sequence alone, and among others in another order and other blocks: equal bits."""
    artifact = model.artifact(builds)
    alone = (((0, 19),), ((0, 1),), ((0, 1),))
    beside = (((2, 7), (0, 19), (1, 25)), ((2, 1), (1, 1), (0, 1)), ((1, 1), (0, 1), (2, 1)))
    starts = (7, 2, 1)
    with emulated(model.capability):
        rows, among = run_script(artifact, alone), run_script(artifact, beside, seed=8)
    for one, many, start in zip(rows, among, starts, strict=True):
        place = slice(start, start + len(one.logits))
        assert np.array_equal(one.logits, many.logits[place])
        assert one.hidden is not None
        assert many.hidden is not None
        assert np.array_equal(one.hidden, many.hidden[place])
