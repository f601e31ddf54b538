"""What a token costs beside the model: microseconds a row of logits, by the parameters.

Run: `python benchmarks/sampling.py [--vocabulary N] [--rows N] [--rounds N]`. The cases take turns
in every round, on one thread; the table has the medians. "whole row" is the way without a shortcut
for top-k, "numpy" the meaning in numpy, and "host" what the engine does for a row before the step.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import infc.codegen.cpp.toolchain as toolchain
from infc.ir.targets import resolve_target
from infc.runtime.executors.cpp import adjustment_arrays
from infc.runtime.executors.cpp_abi import StepArrays
from infc.runtime.requests.request import Request
from infc.runtime.sampling.adjustments import Adjustments, adjusted_row
from infc.runtime.sampling.draws import Draws, draws_of
from infc.runtime.sampling.sampler import drawn_token
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling.step_builder import adjustments_of

SOURCE = Path(__file__).with_suffix(".cpp")
NUM_TOKENS = 2000
"""Of a prompt, about half of which are distinct."""

RECOMMENDED = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, repetition penalty": {"repetition_penalty": 1.1},
    "greedy, mask": {"allowed_token_ids": 0.5},
    "temperature": {"temperature": 0.7},
    "temperature, mask": {"temperature": 0.7, "allowed_token_ids": 0.5},
    "temperature, 300 biased": {"temperature": 0.7, "logit_bias": 300},
    "temperature, top-k": {"temperature": 0.7, "top_k": 20},
    "temperature, top-p": {"temperature": 0.7, "top_p": 0.8},
    "recommended by Qwen2.5": RECOMMENDED,
    "recommended by Qwen2.5, mask": {**RECOMMENDED, "allowed_token_ids": 0.5},
}


def main() -> None:
    """Parse the options, build, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((options.rows, options.vocabulary)) * 3).astype(np.float32)
    with tempfile.TemporaryDirectory() as directory:
        library = build(Path(directory))
        cases = {name: Case(library, rows, params, rng) for name, params in CASES.items()}
        ways: list[Mapping[str, Callable[[], float]]] = [
            {
                "a row": case.draw,
                "whole row": case.draw_whole,
                "numpy": case.numpy,
                "host": case.plan,
            }
            for case in cases.values()
        ]
        times = [{way: list[float]() for way in each} for each in ways]
        for _ in range(options.rounds):
            for each, taken in zip(ways, times, strict=True):
                for way, measure in each.items():
                    taken[way].append(measure())
    print(f"{options.rows} rows of {options.vocabulary}, microseconds a row, one thread")
    print(f"{'':32}" + "".join(f"{way:>11}" for way in times[0]))
    for name, taken in zip(cases, times, strict=True):
        print(f"{name:32}" + "".join(f"{median(t) * 1e6:11.1f}" for t in taken.values()))


def build(directory: Path) -> ctypes.CDLL:
    """The compiled kernels."""
    shutil.copytree(Path(toolchain.__file__).parent / "kernels", directory / "kernels")
    source = Path(shutil.copy(SOURCE, directory))
    toolchain.compile_library(source, directory / "sampling.so", resolve_target("native"))
    library = ctypes.CDLL(str(directory / "sampling.so"))
    library.draw_seconds.restype = ctypes.c_double
    return library


class Case:
    """Requests of the same parameters, one a row."""

    def __init__(
        self,
        library: ctypes.CDLL,
        rows: NDArray[np.float32],
        params: Mapping[str, Any],
        rng: np.random.Generator,
    ) -> None:
        self._library, self._rows = library, rows
        count, size = rows.shape
        lists = dict(params)
        if share := lists.get("allowed_token_ids"):
            lists["allowed_token_ids"] = np.flatnonzero(rng.random(size) < share).tolist()
        if biased := lists.get("logit_bias"):
            lists["logit_bias"] = dict.fromkeys(rng.permutation(size)[:biased].tolist(), 1.0)
        chosen = SamplingParams(seed=1, **lists)
        # As of text: half of the tokens come again.
        ids = np.minimum(rng.geometric(1 / (NUM_TOKENS / 3), (count, NUM_TOKENS)), size - 1)
        self._requests = [Request("r", each, chosen, vocab_size=size) for each in ids.tolist()]
        self._positions = [NUM_TOKENS] * count
        self._draws: Draws = draws_of(
            request.draw(row, NUM_TOKENS) for row, request in enumerate(self._requests)
        )
        self._adjustments = self._adjusted()

    def draw(self) -> float:
        """Seconds a row of the kernel."""
        return self._run(self._adjustments, whole=False)

    def draw_whole(self) -> float:
        """The same, without adjustments and the short way for top-k."""
        return self._run(None, whole=True)

    def numpy(self) -> float:
        """Seconds of a row in numpy, which is measured for one."""
        begun = time.perf_counter()
        row = self._rows[0]
        if self._adjustments is not None:
            row = adjusted_row(row, self._adjustments, 0)
        drawn_token(row, self._requests[0].draw(0, NUM_TOKENS))
        return time.perf_counter() - begun

    def plan(self) -> float:
        """Seconds a row to make the arrays, after one more token."""
        for request in self._requests:
            request.token_ids.append(len(request.token_ids))
        begun = time.perf_counter()
        self._adjusted()
        return (time.perf_counter() - begun) / len(self._rows)

    def _adjusted(self) -> Adjustments | None:
        return adjustments_of(self._requests, self._positions)

    def _run(self, adjustments: Adjustments | None, *, whole: bool) -> float:
        tokens = np.zeros(len(self._rows), np.int32)
        step = StepArrays(
            num_draws=len(self._rows),
            draws=self._draws.ctypes.data,
            tokens=tokens.ctypes.data,
            adjustments=adjustment_arrays(adjustments),
        )
        width = self._rows.shape[1]
        data = ctypes.c_void_p(self._rows.ctypes.data)
        seconds = self._library.draw_seconds(
            data, ctypes.c_int64(width), ctypes.byref(step), ctypes.c_int64(whole)
        )
        return float(seconds) / len(self._rows)


if __name__ == "__main__":
    main()
