"""Golden programs: the whole text that each pass makes of a small one, reviewed by eye.

A case is `golden/<pass>/<case>.ir`: `# RUN: <pipeline>`, a program, and the expected text in
lines that begin with `#>`. `pytest --update-golden` rewrites the expected text.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from infc.driver.testing import check_fixed_point, check_golden
from infc.passes.catalogue import OUR_PASSES

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.glob("*/*.ir"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden(path: Path, update_golden: bool) -> None:
    check_golden(path, update=update_golden)


@pytest.mark.parametrize(
    # Text has no constants that could be read and folded again.
    "path",
    [path for path in CASES if not path.parent.name.startswith("fold-")],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_golden_results_are_fixed_points(path: Path) -> None:
    check_fixed_point(path)


def test_every_pass_has_cases_that_match_and_that_do_not() -> None:
    folders = {path.parent.name for path in CASES}
    assert folders == {kind.name for kind in OUR_PASSES}
    for folder in folders:
        assert len(list((GOLDEN / folder).glob("*.ir"))) >= 2, folder
