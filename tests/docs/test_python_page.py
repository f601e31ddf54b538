"""The examples of the page on Python, run as they stand; those that only serve need no torch."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import infc
from infc.ir.artifact import open_artifact

from .generated import ROOT

PAGE = (ROOT / "docs/python.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
CHECK = "\nimport sys\nprint('\\nloaded', *sorted({'torch', 'transformers'} & set(sys.modules)))\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the examples find their recipe, and leave `build/tiny`."""
    directory = tmp_path_factory.mktemp("page")
    (directory / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        # What verification costs is tested elsewhere.
        patch.setattr(infc, "compile", functools.partial(infc.compile, verify=False))
        exec(compile(EXAMPLES[0], "python.md", "exec"), {})
    return directory


def test_the_first_example_compiles_the_model(place: Path) -> None:
    assert "infc.compile(" in EXAMPLES[0]
    assert open_artifact(place / "build/tiny").manifest.backend == "cpp"


@pytest.mark.parametrize("number", range(1, len(EXAMPLES)))
def test_an_example_runs_and_loads_no_torch(number: int, place: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXAMPLES[number] + CHECK],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    *told, loaded = run.stdout.splitlines()
    assert loaded == "loaded"
    assert any(told), "an example shows something"
