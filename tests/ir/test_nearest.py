"""The hint of a misspelt name: one place that makes it, bounded in its work."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from infc.ir.nearest import did_you_mean, nearest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("codegen", "driver", "frontend", "ir", "passes", "runtime")
KNOWN = ("fuse-rope", "fuse-gelu", "lower-kv")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("fuse-rop", "did you mean 'fuse-rope'?"),
        ("lower_kv", "did you mean 'lower-kv'?"),
        ("", "known"),
        ("zzz", "known"),
    ],
)
def test_the_hint_names_the_nearest_or_says_something_else(word: str, hint: str) -> None:
    assert did_you_mean(word, KNOWN, "known") == hint


def test_without_a_near_name_there_is_none() -> None:
    assert nearest("zzz", KNOWN) is None
    assert did_you_mean("zzz", KNOWN) is None
    assert nearest("fuse", KNOWN) == "fuse-rope"
    assert nearest("fuse", KNOWN, cutoff=0.9) is None


def test_a_word_of_any_length_costs_little() -> None:
    begun = time.perf_counter()
    assert nearest("ab" * 1_000_000, [*KNOWN, "ab" * 40]) == "ab" * 40
    assert time.perf_counter() - begun < 1


def test_nothing_else_looks_for_near_names() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if "get_close_matches" in path.read_text(encoding="utf-8")
    }
    assert found == {"ir/nearest.py"}
