"""Matrices and caches of codes: `cpp` computes what `reference` does, on every architecture."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from infc.ir.artifact import Artifact

from ..configs import CONFIGS
from .builds import INT4, INT4_WEIGHTS, INT8, INT8_PRODUCTS, Build, Builds, Settings
from .support import prompts, teacher_forced

ARCHITECTURES = {CONFIGS[name].kind: name for name in reversed(CONFIGS)}
"""One configuration a model type: what codes mean does not depend on the kind of rope."""

EQUAL = 2e-5
"""Error of a row whose codes are the same all along, relative to its largest logit."""
SHARE_EQUAL = 0.4
"""A last bit can round to the neighbouring code, here and there: that row, and those that attend
to it, are off by more. A fault past the first block would leave a quarter of the rows equal."""
SHARE_EQUAL_TABLE = 0.15
"""The same if tokens are looked up as codes. Their rows lie on a grid, so that many elements of the
first layer are half way between two codes, and the last bit of the norm decides."""
SHARE_EQUAL_ROUTED = 0.1
"""The same where experts are routed: more products, and their sums are of floats."""
STEP = 0.1
"""Error of such rows; int8 itself changes a row of these models by up to three times that."""
SHARE_REROUTED = 0.04
"""Where experts are routed, a neighbouring code may be another expert: rows off by more still."""


def row_errors(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest difference of each row, relative to its largest logit."""
    errors: NDArray[np.float32] = np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)
    return errors


def both(arch: str, sets: Settings, builds: Builds) -> tuple[Artifact, list[NDArray[np.float32]]]:
    """The artifact of `cpp`, and the rows of logits of both backends."""
    cpp, reference = (builds.artifact(Build(arch, b, sets=sets)) for b in ("cpp", "reference"))
    lengths = (70, 33, max(5, CONFIGS[arch].min_tokens), 95)
    sequences = prompts(cpp.manifest.model.vocab_size, lengths)
    return cpp, [np.concatenate(teacher_forced(one, sequences)) for one in (cpp, reference)]


CASES = [(arch, INT8) for arch in ARCHITECTURES.values()]
CASES += [(ARCHITECTURES[kind], INT8_PRODUCTS) for kind in ("llama", "gemma", "gpt2", "phi3")]
CASES += [(ARCHITECTURES[kind], INT4) for kind in ("llama", "mixtral", "gpt2", "gemma2")]


@pytest.mark.parametrize(("arch", "sets"), CASES)
def test_codes_are_those_of_the_reference(arch: str, sets: Settings, builds: Builds) -> None:
    cpp, rows = both(arch, sets, builds)
    errors = row_errors(*rows)
    program = (cpp.path / "program.ir").read_text()
    share = SHARE_EQUAL if sets == INT8_PRODUCTS else SHARE_EQUAL_TABLE
    share = SHARE_EQUAL_ROUTED if "scaled_moe" in program else share
    assert (errors <= EQUAL).mean() >= share
    assert (errors > STEP).mean() <= (SHARE_REROUTED if "scaled_moe" in program else 0.0)
    assert "scaled_linear" in program
    assert ("scaled_embedding" in program) == (sets != INT8_PRODUCTS)
    assert ("i8" in cpp.manifest.main.resources[0].dtype) == (sets != INT4)
    assert ("scaled_moe" in program) == ("moe" in (cpp.path / "captured.ir").read_text())


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2", "gemma2"])
def test_every_row_is_that_of_the_reference_where_rows_stay_floats(
    kind: str, builds: Builds
) -> None:
    """Nothing is rounded to codes, so no row may be off by more than the order of sums."""
    cpp, rows = both(ARCHITECTURES[kind], INT4_WEIGHTS, builds)
    assert row_errors(*rows).max() <= EQUAL
    program = (cpp.path / "program.ir").read_text()
    assert "decoded_linear" in program and "quantize_rows" not in program
    assert ("scaled_moe" in program) == (kind == "mixtral")
