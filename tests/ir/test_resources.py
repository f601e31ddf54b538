"""What is kept between steps answers the same questions, whatever it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.errors import ProgramError
from infc.ir.manifest import parse_manifest
from infc.ir.paged_state import PagedState
from infc.ir.program import EMPTY_SPEC, Program
from infc.ir.resources import KINDS, KvGroup, LatentGroup, Resource, StateGroup
from infc.ir.text import parse_program, print_program

from .artifacts import manifest

SIZES = st.integers(1, 9)
LAYERS = st.lists(st.integers(0, 20), min_size=1, max_size=4, unique=True).map(tuple)
DTYPES = st.sampled_from(["f32", "bf16", "i8", "e4m3"])


@st.composite
def resources(draw: st.DrawFn) -> Resource:
    """Any resource of small sizes."""
    kind = draw(st.sampled_from(sorted(KINDS.values(), key=lambda kind: kind.kind)))
    sizes: dict[str, Any] = {name: draw(SIZES) for name in (*kind.sizes, "block_size")}
    if kind is KvGroup:
        sizes["window"] = draw(st.none() | st.integers(1, 20))
    return kind(name="g", layers=draw(LAYERS), dtype=draw(DTYPES), **sizes)


def sees(resource: Resource, position: int) -> range:
    """The positions that a token needs, its own included: what the question is about."""
    if isinstance(resource, StateGroup):
        return range(max(0, position - 1), position + 1)
    window = resource.window if isinstance(resource, KvGroup) else None
    return range(0 if window is None else max(0, position - window + 1), position + 1)


@given(resources(), st.integers(0, 60))
def test_what_is_kept_is_what_some_later_token_needs(resource: Resource, position: int) -> None:
    later = range(position, position + 40)
    assert resource.keeps(position) == min(min(sees(resource, one)) for one in later)
    assert resource.keeps(position) <= resource.keeps(position + 1)
    most = max(len(sees(resource, one)) for one in range(200))
    assert most == (200 if resource.reach is None else resource.reach)


@given(resources(), st.integers(1, 9), st.integers(0, 40))
def test_a_hit_needs_the_blocks_that_what_follows_sees(
    resource: Resource, num_blocks: int, back: int
) -> None:
    end = num_blocks * resource.block_size
    position = max(0, end - back)
    needs = resource.hit_needs(num_blocks, position)
    if isinstance(resource, StateGroup) and position != end:
        assert needs is None, "a state cannot be taken back"
        return
    stored = {
        place // resource.block_size
        for one in range(position, end + 20)
        for place in sees(resource, one)
        if place < end
    }
    assert needs is not None
    assert set(needs) == stored


@given(resources())
def test_bytes_are_those_of_the_tensors(resource: Resource) -> None:
    size = {"f32": 4, "bf16": 2, "i8": 1, "e4m3": 1}[resource.dtype]
    scales = 4 if size == 1 else 0
    if isinstance(resource, KvGroup):
        state = PagedState.allocate([resource], 3)
        assert state.num_bytes == 3 * resource.bytes_per_block()
        return
    if isinstance(resource, LatentGroup):
        token = resource.latent_dim * size + scales + resource.rope_dim * size + scales
        expected = resource.block_size * token
    else:
        expected = resource.num_elements * size
    assert resource.bytes_per_block() == len(resource.layers) * expected


@given(resources())
def test_texts_and_manifests_say_what_it_is(resource: Resource) -> None:
    program = Program("p", {}, (), (), (), {}, EMPTY_SPEC, "lowered", (resource,))
    assert parse_program(print_program(program)).resources == (resource,)
    made = manifest().with_main(resources=(resource,))
    assert parse_manifest(made.to_text(), where="m").main.resources == (resource,)


def test_keys_and_values_are_written_as_ever() -> None:
    """Older texts, manifests and compiled code know of no kinds."""
    group = KvGroup("full", (0, 1), 2, 16, 16, "f32", 32)
    data = json.loads(manifest().with_main(resources=(group,)).to_text())
    assert "kind" not in data["programs"]["main"]["resources"][0]
    program = Program("p", {}, (), (), (), {}, EMPTY_SPEC, "lowered", (group,))
    assert "kind" not in print_program(program)


def test_a_kind_that_is_not_known() -> None:
    with pytest.raises(ProgramError, match="unknown kind 'ring' of resource r; known: kv, latent"):
        parse_program('program "p" { resource r {kind = "ring", layers = (0,)} }')


@pytest.mark.parametrize("kind", [LatentGroup, StateGroup])
def test_ops_store_keys_and_values_alone(kind: type[Resource]) -> None:
    sizes = dict.fromkeys((*kind.sizes, "block_size"), 4)
    group = kind(name="other", layers=(0,), dtype="f32", **sizes)
    with pytest.raises(ProgramError, match=f"ops on {kind.kind} groups are not defined"):
        PagedState.allocate([group], 2)
