"""The table of bad inputs: every group has a result, and every test that it names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "bad-inputs.md"
RESULTS = {"passed", "refused by name", "not applicable"}


def test_every_group_has_a_result_and_tests_that_exist() -> None:
    rows = re.findall(
        r"^\| (\d+) [^|]+\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), re.M
    )
    assert [int(number) for number, *_ in rows] == list(range(1, 47))
    files = (path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = {name for text in files for name in re.findall(r"^\s*def (test_\w+)", text, re.M)}
    for number, result, what, tests in rows:
        assert result in RESULTS, number
        shown = set(re.findall(r"`(test_\w+)`", tests))
        assert shown <= names, (number, shown - names)
        assert bool(shown) == (result != "not applicable"), number
        assert len(what) > 5
