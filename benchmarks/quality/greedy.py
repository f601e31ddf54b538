"""Greedy answers from GGUF files: infc's artifacts, the same weights in float32, and llama.cpp.

    python -m benchmarks.peers.setup WORKDIR --only llama.cpp --shapes ""    # once
    python -m benchmarks.quality.greedy WORKDIR [--models qwen2.5-coder-0.5b] [--threads 2]

Each file is compiled twice, with `quantization=adopt` and without quantization in float32. Printed
is on how many of 20 prompts two of the three give the same 32 tokens, and how many tokens are equal
on each prompt. Prompts are chats where the model has a template, otherwise beginnings of texts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Final

import infc
from infc.ir.artifact import open_artifact
from infc.runtime.text.tokenizer import Tokenizer

from ..peers.contestants import LLAMA_CPP, Workdir
from ..peers.steps import Runner, whole_or_absent
from .entries import BUNDLED, MODELS

TOKENS: Final = 32
CONTEXT: Final = 512
CHATS: Final = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "What is the capital of France?",
    "Explain what a binary search does.",
    "Write a function in Python that checks whether a string is a palindrome.",
    "Count from 1 to 20.",
    "Translate to German: Good morning, how are you?",
    "Write a SQL query that counts the rows of a table named users.",
    "What is 12 times 12?",
    "Write a Python class for a stack with push and pop.",
    "List the days of the week.",
    "Write a regular expression that matches an email address.",
    "How do I reverse a list in Python?",
    "Write a bash command that counts the lines of all .py files in a directory.",
    "What does HTTP status 404 mean?",
    "Write a JavaScript function that adds two numbers.",
    "Explain the difference between a list and a tuple in Python.",
    "Write a haiku about the sea.",
    "Implement bubble sort in Python.",
    "What is the largest planet of the solar system?",
    "Write a C program that prints Hello, World!",
)
BEGINNINGS: Final = (
    "The capital of France is",
    "Once upon a time, there was a",
    "The quick brown fox jumps over the lazy dog. The quick brown",
    "1, 2, 3, 4, 5, 6, 7,",
    "Monday, Tuesday, Wednesday,",
    "import numpy as np\nimport pandas as pd\nimport matplotlib",
    "def fibonacci(n):\n    if n",
    "We hold these truths to be self-evident, that",
    "Water boils at a temperature of",
    "The sum of the angles of a triangle is",
    "In the beginning God created",
    "To be, or not to be, that is",
    "A, B, C, D, E, F,",
    "The United States of America is a country in",
    "for i in range(10):\n    print(",
    "Photosynthesis is the process by which",
    "The Earth revolves around the",
    "#include <stdio.h>\n\nint main(",
    "SELECT * FROM users WHERE",
    "Shakespeare was born in",
)
BUILDS: Final = {
    "infc, adopt": ["quantization=adopt"],
    "float32": ["dtype=float32"],
}
"""How a file is compiled, by what its answers are called."""


def main() -> None:
    """Compare every model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=Path)
    packaged = [name for name in MODELS if name != BUNDLED]
    parser.add_argument("--models", default=",".join(packaged))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for name in options.models.split(","):
        if name not in packaged:
            parser.error(f"no model {name!r}: choose from {', '.join(packaged)}")
        compare(name, options.workdir.resolve(), options.threads)


def compare(name: str, root: Path, threads: int) -> None:
    """Print how far the answers of one model agree."""
    model = MODELS[name]
    assert model is not None
    file = model.file(root / "packages")
    folder = root / "greedy" / name
    folder.mkdir(parents=True, exist_ok=True)
    answers: dict[str, list[list[int]]] = {}
    prompts: list[list[int]] = []
    for what, settings in BUILDS.items():
        place = folder / settings[0].replace("=", "-")
        whole_or_absent(place, lambda out, settings=settings: _compile(file, out, settings))
        prompts = prompts or _prompts(place)
        answers[what] = _answer(place, prompts, threads)
    answers["llama.cpp"] = _theirs(file, folder, prompts, root, threads)
    for (one, mine), (other, theirs) in itertools.combinations(answers.items(), 2):
        lengths = [_equal(a, b) for a, b in zip(mine, theirs, strict=True)]
        same = sum(length == TOKENS for length in lengths)
        print(f"{name}: {one} and {other} agree on {same} of {len(lengths)}: {lengths}", flush=True)


def _compile(file: Path, place: Path, settings: list[str]) -> None:
    print(f"{file.name}: {settings[0]}", file=sys.stderr, flush=True)
    overrides = [*settings, f"runtime.max_context={CONTEXT}"]
    infc.compile(file, place, overrides=overrides, verify=False, cache=False, progress=False)


def _prompts(artifact: Path) -> list[list[int]]:
    tokenizer = Tokenizer.load(open_artifact(artifact, "none"))
    assert tokenizer is not None
    if tokenizer.has_chat_template:
        chats = ([{"role": "user", "content": text}] for text in CHATS)
        return [list(tokenizer.encode_chat(chat)) for chat in chats]
    return [list(tokenizer.encode(text)) for text in BEGINNINGS]


def _answer(artifact: Path, prompts: list[list[int]], threads: int) -> list[list[int]]:
    params = infc.SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    with infc.LLM(artifact, threads=threads) as llm:
        return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, params)]


def _theirs(
    file: Path, folder: Path, prompts: list[list[int]], root: Path, threads: int
) -> list[list[int]]:
    places = Workdir(root)
    given, out = folder / "prompts.json", folder / "answers.json"
    given.write_text(json.dumps(prompts), encoding="utf-8")
    command = (places.python(LLAMA_CPP), "-m", "benchmarks.quality.llama_greedy")
    Runner(folder / "llama.log")(*command, file, given, out, str(TOKENS), str(threads))
    found: list[list[int]] = json.loads(out.read_text(encoding="utf-8"))
    return found


def _equal(one: list[int], other: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    pairs = zip(one, other, strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


if __name__ == "__main__":
    main()
