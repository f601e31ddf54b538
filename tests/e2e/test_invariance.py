"""Neighbours don't matter: what a request gets is, bit for bit, what it gets alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import product

import pytest

from infc.codegen.cpp.buffers import has_kernels
from infc.ir.artifact import Artifact
from infc.ir.schemes import SCHEMES as ALL_SCHEMES
from infc.runtime.engine import Engine
from infc.runtime.options import RuntimeOptions
from infc.runtime.requests.outputs import RequestOutput
from infc.runtime.sampling.sampling_params import SamplingParams

from ..configs import CONFIGS
from .builds import INT4, INT8, PAIRS, Build, Builds, Settings
from .neighbours import Events, answer_of, block_bytes, compare_with_alone
from .support import prompts

# A window of a few blocks, shorter than the prompts: its sequences still grow, so that they can
# be preempted.
WINDOWED: Settings = (("sliding_window", 40),)
CASES = [
    Build("llama"),
    Build("mistral", changes=WINDOWED),
    Build("mixtral"),
    Build("qwen3", dtype="bfloat16"),
]
"""Plain, windowed, mixture of experts; and the other element type: with many examples."""

OTHERS = [
    Build(arch)
    for arch, small in CONFIGS.items()
    if arch == small.kind and Build(arch) not in CASES
]
OTHERS += [Build(arch, sets=INT8) for arch, small in CONFIGS.items() if arch == small.kind]
OTHERS += [Build("gemma3-one-kv-head", dtype="bfloat16"), Build("llama-tied", sets=INT4)]
OTHERS += [Build("mistral", sets=PAIRS, changes=WINDOWED), Build("gpt_oss", sets=(*INT8, *PAIRS))]
"""Every other architecture, and every one in int8: with a few examples. One whose table of tokens
is the codes of the head; and caches that two layers read."""

FAMILIES: dict[str, Settings] = {
    "llama": (),
    "mistral": WINDOWED,
    "mixtral": (),
    "qwen3": (),
    "gpt2": (),
    "gpt_oss": (),
}
"""Architectures that take different ways through the kernels: plain, windowed, experts, norms of
heads, layer norms with as many keys as queries, and experts with biases behind attention with
sinks; with changes of their configuration."""
SCHEMES = ("float32", "bfloat16", "int8", "int4", "int4-weights")
CODES = SCHEMES[2:]
CACHES = ("float32", "bfloat16", "int8")


def _path(scheme: int, family: int) -> Build:
    """The cache's type goes round with both; codes are computed with in each element type."""
    arch, cache = list(FAMILIES)[family], CACHES[(scheme + family) % len(CACHES)]
    sets: Settings = (("kv_cache.dtype", cache),)
    dtype = SCHEMES[scheme]
    if dtype.startswith("int"):
        sets = (("quantization", dtype), *sets)
        dtype = SCHEMES[(scheme + family) % 2]
    return Build(arch, dtype=dtype, sets=sets, changes=FAMILIES[arch])


PATHS = {
    (scheme, arch): _path(i, j)
    for (i, scheme), (j, arch) in product(enumerate(SCHEMES), enumerate(FAMILIES))
}
"""Each scheme of weights in each family; each with every type of cache."""


MATRICES = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj", "lm_head"),
)
OTHER_SCHEMES = [
    name for name, one in ALL_SCHEMES.items() if has_kernels(one.weight) and name not in SCHEMES
]
MIXES = [
    Build(
        "llama", sets=(("quantization", {"scheme": "int8", "method": "nearest", "rules": rules}),)
    )
    for place in range(0, len(OTHER_SCHEMES), len(MATRICES))
    if (
        rules := [
            {"match": f"*{matrix}", "scheme": scheme}
            for matrix, scheme in zip(MATRICES, OTHER_SCHEMES[place:], strict=False)
        ]
    )
]
"""The schemes that are in none of the others: a matrix of each layer for each."""


@pytest.fixture(params=CASES, ids=lambda build: build.name)
def artifact(request: pytest.FixtureRequest, builds: Builds, as_shipped: None) -> Artifact:
    """A compiled model of each case."""
    return Builds(builds.root / "shipped").artifact(request.param)


def compare(
    artifact: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    examples: int,
    needed: Iterable[str],
    threads: tuple[int, ...] = (),
) -> None:
    """Compares requests beside others with the same alone, in runs that must meet these events."""
    events = Events(Counter())
    events.watch(monkeypatch)
    compare_with_alone(artifact, events, examples, threads)
    for event in needed:
        assert events.counts[event] > 0, f"the runs never met: {event}"


def test_a_request_gets_what_it_gets_alone(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = (
        "preemptions",
        "evictions",
        "prefix hits",
        "prefixes of the same step",
        "copies on write",
        "prompts with logprobs",
        "survivors",
    )
    compare(artifact, monkeypatch, 60, needed)


@pytest.mark.parametrize("build", OTHERS, ids=lambda build: build.name)
def test_a_request_gets_what_it_gets_alone_on_every_architecture(
    build: Build, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few examples of one request beside others, of 1 and of 2 threads beside 2."""
    artifact = builds.artifact(build)
    # Blocks that leave a window are free again: there such sequences need not grow.
    grow = all(window is None for window in artifact.manifest.model.windows)
    compare(artifact, monkeypatch, 3, ("survivors", "preemptions") if grow else ("survivors",))


@pytest.mark.parametrize("build", PATHS.values(), ids=lambda build: build.name)
def test_a_request_gets_what_it_gets_alone_on_every_path(
    build: Build, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every scheme of weights and type of cache: the same runs on 1 thread and on 2."""
    needed = ("survivors", "prefixes of the same step", "copies on write")
    compare(builds.artifact(build), monkeypatch, 1, needed, threads=(1, 2))


@pytest.mark.parametrize("build", MIXES, ids=("first schemes", "more schemes"))
def test_a_request_gets_what_it_gets_alone_with_every_other_scheme(
    build: Build, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = builds.artifact(build)
    text = (artifact.path / "program.ir").read_text(encoding="utf-8")
    wanted = {one["scheme"] for one in dict(build.sets)["quantization"]["rules"]}
    assert wanted <= set(re.findall(r'scheme = "([^"]+)"', text))
    needed = ("survivors", "prefixes of the same step", "copies on write")
    compare(artifact, monkeypatch, 2, needed, threads=(1, 2))


def test_every_scheme_meets_every_type_of_cache() -> None:
    met = {
        scheme: {
            dict(path.sets)["kv_cache.dtype"] for (one, _), path in PATHS.items() if one == scheme
        }
        for scheme in SCHEMES
    }
    assert met == {scheme: set(CACHES) for scheme in SCHEMES}
    codes = [path for (scheme, _), path in PATHS.items() if scheme in CODES]
    assert {(dict(path.sets)["quantization"], path.dtype) for path in codes} == set(
        product(CODES, ("float32", "bfloat16"))
    )


def check_threads(artifact: Artifact, prompt: list[int], blocks: int) -> None:
    """One request gets the same on 1, 2 and 3 threads."""
    answers = []
    for threads in (1, 2, 3):
        options = RuntimeOptions(kv_memory=blocks * block_bytes(artifact), threads=threads)
        engine = Engine.open(artifact, options)
        params = SamplingParams(
            max_tokens=20,
            ignore_eos=True,
            logprobs=5,
            prompt_logprobs=5,
            n=2,
            temperature=1.0,
            seed=1,
        )
        engine.add_request("only", prompt, params)
        parts: list[RequestOutput] = []
        while engine.has_unfinished:
            parts.extend(engine.step())
        engine.close()
        answers.append(answer_of(parts))
    assert answers[0] == answers[1] == answers[2]


def test_threads_do_not_matter(artifact: Artifact) -> None:
    check_threads(artifact, prompts(320, (100,))[0], 40)


def test_threads_that_share_a_long_context_do_not_matter(builds: Builds) -> None:
    """Of one KV head and several chunks: threads take these, where others take heads."""
    changes = (("num_key_value_heads", 1), ("max_position_embeddings", 2048))
    build = Build("llama", changes=changes, sets=(("runtime.max_context", 2048),))
    check_threads(builds.artifact(build), prompts(320, (1500,))[0], 200)
