"""The page about programs: its program is one, and passes make of it what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infc.driver.cli import run
from infc.ir.text import parse_program, print_program

from .generated import ROOT

PAGE = (ROOT / "docs/program.md").read_text()


def listing(name: str) -> str:
    """The code block of the page that is titled `name`."""
    found = re.search(rf'^```\w+ title="{re.escape(name)}"\n(.*?)^```$', PAGE, re.M | re.S)
    assert found is not None, f"the page shows no {name}"
    return found[1]


def test_the_program_is_printed_as_shown() -> None:
    assert print_program(parse_program(listing("gate.ir"))) == listing("gate.ir")


def test_the_passes_make_of_it_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gate.ir").write_text(listing("gate.ir"))
    shown = re.search(
        r'^```\n\$ infc opt gate.ir -p "(.*?)" --verify\n(.*?)^```$', PAGE, re.M | re.S
    )
    assert shown is not None
    assert run(["opt", "gate.ir", "-p", shown[1], "--verify"]) == 0
    assert capfd.readouterr().out == shown[2]


def test_the_lines_of_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gate.ir").write_text(listing("gate.ir"))
    text = listing("ten_lines.py")
    assert len(text.splitlines()) <= 10
    exec(compile(text, "ten_lines.py", "exec"), {})
    said = capfd.readouterr().out
    assert "linear ['%x', '@gate'] bf16[T, 128] 0" in said
    assert "1 ()" in said
