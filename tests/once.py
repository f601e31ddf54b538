"""Directories that tests share: each is made once, by the process that needs it first."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def made_once(place: Path, make: Callable[[Path], None]) -> Path:
    """The directory `place`, made under another name first: it is whole, or not there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f"{place.name}.lock")):
        if not place.exists():
            unfinished = Path(tempfile.mkdtemp(prefix=".", dir=place.parent))
            try:
                make(unfinished / "made")
                os.rename(unfinished / "made", place)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return place
