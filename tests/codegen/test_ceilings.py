"""The probe of the machine's ceilings: built for every target, and plausible in what it says."""

from __future__ import annotations

import pytest

from infc.codegen.cpp.ceilings import KINDS, Probe, build_probe
from infc.ir.errors import CapacityError
from infc.ir.targets import host_features, resolve_target

TARGETS = ("x86-64-v4+vnni+bf16", "x86-64-v4", "x86-64-v3", "x86-64-v2")
FASTEST = 2e12
"""Operations a second that no core does with vectors of these targets."""


@pytest.fixture(scope="module", params=TARGETS)
def probe(request: pytest.FixtureRequest) -> Probe:
    """The probe built for a target, which runs where this machine has it."""
    target = resolve_target(request.param)
    built = build_probe(target)
    if not host_features() >= {*target.features}:
        pytest.skip(f"this machine cannot run code for {target.name}; it was built")
    return built


def test_rates_are_those_of_a_processor(probe: Probe) -> None:
    for kind in KINDS:
        # Few instructions a round, so that one round is not disturbed.
        assert 1e8 < probe.product_rate(kind, 1, 100_000, 50) < FASTEST
    assert 1e8 < probe.read_rate(1, 32 << 20, 3) < 1e12


def test_work_takes_its_time(probe: Probe) -> None:
    """A rate is per operation: where work was optimised away, more of it would be faster."""
    few, many = (probe.product_rate("int8", 1, count, 200) for count in (30_000, 300_000))
    assert many < 3 * few


def test_memory_that_is_not_there_is_refused(probe: Probe) -> None:
    with pytest.raises(CapacityError, match="MiB of memory to read"):
        probe.read_rate(1, 1 << 60)
