"""Which library builds and runs engines, and what is said where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from infc.ir.errors import ToolchainError
from infc.ir.tensorrt_engine import LIBRARIES, import_library


def test_a_library_that_cannot_be_loaded_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, LIBRARIES[1], None)
    monkeypatch.delitem(sys.modules, LIBRARIES[0], raising=False)
    package = tmp_path / LIBRARIES[0] / "__init__.py"
    package.parent.mkdir()
    package.write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    with pytest.raises(ToolchainError, match=r"loaded: libcudart.*reinstall tensorrt-rtx\)$"):
        import_library()


def test_a_library_that_is_not_there_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ToolchainError, match=r"tensorrt_rtx, which is not.*infc\[tensorrt\]"):
        import_library()
