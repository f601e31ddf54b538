"""Golden programs: the whole text that each pass makes of a small one, reviewed by eye.

A case is `golden/<pass>/<case>.ir`: `# RUN: <pipeline>`, a program, and the expected text in
lines that begin with `#>`. `pytest --update-golden` rewrites the expected text.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from infc.ir.text import parse_program, print_program
from infc.passes.commands import opt
from infc.passes.pipeline import default_pipeline

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.glob("*/*.ir"))
PREFIX = "#>"


def _split(text: str) -> tuple[str, str, str]:
    """The pipeline, the input and the expected text of a case."""
    lines = text.splitlines()
    run = next(line.removeprefix("# RUN: ") for line in lines if line.startswith("# RUN: "))
    source = "\n".join(line for line in lines if not line.startswith(PREFIX))
    expected = [
        line.removeprefix(PREFIX).removeprefix(" ") for line in lines if line.startswith(PREFIX)
    ]
    return run, source, "\n".join(expected)


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden(path: Path, update_golden: bool) -> None:
    run, source, expected = _split(path.read_text())
    actual = opt(source, run, source=path.name).rstrip("\n")
    if update_golden:
        lines = [f"{PREFIX} {line}".rstrip() for line in actual.splitlines()]
        path.write_text(source.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n")
        return
    assert actual == expected


@pytest.mark.parametrize(
    # Text has no constants that could be read and folded again.
    "path",
    [path for path in CASES if not path.parent.name.startswith("fold-")],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_golden_results_are_fixed_points(path: Path) -> None:
    run, source, _ = _split(path.read_text())
    once = opt(source, run)
    assert opt(once, run) == once
    assert print_program(parse_program(once)) == once


def test_every_pass_has_cases_that_match_and_that_do_not() -> None:
    folders = {path.parent.name for path in CASES}
    assert folders == set(default_pipeline().names())
    for folder in folders:
        assert len(list((GOLDEN / folder).glob("*.ir"))) >= 2, folder
