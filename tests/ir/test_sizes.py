"""Amounts and counts as people read them."""

import pytest

from infc.ir.sizes import format_count, format_size, parse_size


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 artifacts"), (1, "1 artifact"), (2, "2 artifacts")]
)
def test_one_is_not_many(count: int, text: str) -> None:
    assert format_count(count, "artifact") == text


def test_a_plural_of_its_own() -> None:
    assert format_count(1, "match", "matches") == "1 match"
    assert format_count(7, "match", "matches") == "7 matches"


@pytest.mark.parametrize("size", [1, 1023, 1 << 10, 3 << 20, 5 << 30])
def test_a_size_is_read_back(size: int) -> None:
    assert parse_size(format_size(size)) == size
