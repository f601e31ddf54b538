"""Panels of one size turned into panels of another, against packing the matrix itself."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from infc.codegen.cpp.layout import BlockLayout, PanelLayout
from infc.codegen.cpp.rebuild import repack
from infc.ir.formats import FORMATS, Format

layouts = st.builds(PanelLayout, nr=st.sampled_from([1, 4, 16, 64]), kp=st.sampled_from([1, 2, 4]))
flipped = st.builds(PanelLayout, nr=st.just(16), kp=st.just(4), flipped=st.just(True))


@given(
    lead=st.lists(st.integers(1, 3), max_size=1),
    n=st.integers(1, 70),
    k=st.integers(1, 9),
    data=st.data(),
)
def test_repacking_is_packing(lead: list[int], n: int, k: int, data: st.DataObject) -> None:
    shape = (*lead, n, k)
    codes = data.draw(st.booleans())
    kinds = layouts | flipped if codes else layouts
    old, new = data.draw(kinds), data.draw(kinds)
    if codes:
        weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    else:
        weight = torch.randn(shape).to(torch.bfloat16).view(torch.int16)
    packed = repack(old.pack(weight).numpy(), old, new, (n, k))
    assert packed.flags.c_contiguous
    assert packed.dtype == old.pack(weight).numpy().dtype
    np.testing.assert_array_equal(packed, new.pack(weight).numpy())


@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    n=st.integers(1, 40),
    groups=st.integers(1, 4),
    form=st.sampled_from([one for one in FORMATS.values() if one.group > 1]),
    sizes=st.tuples(st.sampled_from([4, 16, 64]), st.sampled_from([4, 16, 64])),
    depths=st.tuples(st.sampled_from([2, 4]), st.sampled_from([2, 4])),
)
def test_repacking_groups_is_packing(
    lead: list[int],
    n: int,
    groups: int,
    form: Format,
    sizes: tuple[int, int],
    depths: tuple[int, int],
) -> None:
    width = groups * form.block_bytes
    codes = torch.randint(0, 256, (*lead, n, width), dtype=torch.uint8)
    kps = depths if form.bits == 8 else (4, 4)
    if form.bits == 6:  # lines of 16 outputs
        sizes = (max(16, sizes[0]), max(16, sizes[1]))
    old, new = (
        BlockLayout(nr, form, kp, form.bits == 8 and kp == 4)
        for nr, kp in zip(sizes, kps, strict=True)
    )
    packed = repack(old.pack(codes).numpy(), old, new, (n, width))
    np.testing.assert_array_equal(packed, new.pack(codes).numpy())
