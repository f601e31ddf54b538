"""The plug-in: its rewrite as text, its kernel against its meaning."""

from pathlib import Path

import pytest

from infc.testing import check_golden, check_kernel

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.ir")), ids=lambda path: path.stem)
def test_the_rewrite_gives_this_text(path: Path) -> None:
    check_golden(path)


@pytest.mark.parametrize(("width", "dtype"), [(130, "f32"), (96, "bf16")])
def test_the_kernel_computes_the_meaning(width: int, dtype: str) -> None:
    check_kernel("threshold_gate", [width], dtype=dtype, threshold=0.3)
