"""Commands of setting up: their output goes to a log, and their failure is one line."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .client import REPOSITORY


class SetupError(Exception):
    """Something cannot be installed or converted; the message says what, and where to look."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs commands from the repository's root, so that modules of `benchmarks` are found."""

    log: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, *command: str | Path, **variables: str) -> None:
        """Run one to its end. SetupError where it fails."""
        words = [str(word) for word in command]
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"+ {' '.join(words)}\n")
            log.flush()
            done = subprocess.run(
                words,
                cwd=REPOSITORY,
                env={**os.environ, **self.variables, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if done.returncode != 0:
            raise SetupError(f"`{_short(words)}` failed with status {done.returncode}: {self.log}")


def whole_or_absent(output: Path, make: Callable[[Path], None]) -> bool:
    """Makes a file or folder under another name and renames it; False where it is there."""
    if output.exists():
        return False
    # The suffix is kept: tools choose formats by it.
    partial = output.with_name(f"partial-{output.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    output.parent.mkdir(parents=True, exist_ok=True)
    make(partial)
    partial.rename(output)
    return True


def _short(words: Sequence[str]) -> str:
    return " ".join([Path(words[0]).name, *words[1:4], *(["…"] if len(words) > 4 else [])])
