"""An artifact that is begun: what an interrupt leaves of it."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from infc.ir.artifact import ArtifactWriter


def test_an_interrupt_while_a_writer_begins_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held back until the directory is made, and raised before the block is entered."""
    make = tempfile.mkdtemp

    def interrupted(**options: Any) -> str:
        made = make(**options)
        signal.raise_signal(signal.SIGINT)
        return str(made)

    monkeypatch.setattr(tempfile, "mkdtemp", interrupted)
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []
