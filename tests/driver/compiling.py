"""What tests of compilation share: a recipe, its remarks, and the bytes of what came out."""

import os
import subprocess
import sys
from pathlib import Path

from infc.driver.progress import Reporter

RECIPE = """
model: ./checkpoint
dtype: float32
backend: reference
target: x86-64-v2
runtime: {step_tokens: 64, max_sequences: 4}
"""


class Lines(Reporter):
    """Keeps the remarks."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def remark(self, text: str) -> None:
        self.lines.append(text)


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def run_infc(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infc", *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
