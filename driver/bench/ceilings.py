"""The ceilings of this machine: measured once, and kept in the cache for its processor."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...ir.backends import DEFAULT
from ...ir.cost import OPERATION_KINDS
from ...ir.errors import TargetError, UsageError
from ...ir.machine import available_cpus, available_memory, cpu_model, largest_cache_bytes
from ...ir.roofline import Ceilings
from ...ir.targets import resolve_target
from ...ir.user_cache import cache_directory, read_private, write_private
from ..bare_executor import usual_threads
from ..progress import Reporter

if TYPE_CHECKING:
    from ...codegen.base import MachineProbe
    from ...ir.manifest import Manifest

_READ_BYTES = 512 << 20
_RATES = ("read", *OPERATION_KINDS)
_CACHES_READ = 4  # memory is read when what is read is so many times the largest cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A processor as infc builds for it, and the ceilings that were measured on it."""

    cpu: str
    target: str
    cpus: int
    infc_version: str
    ceilings: tuple[Ceilings, ...] = ()

    def at(self, threads: int) -> Ceilings | None:
        """The ceilings of so many threads, where they were measured."""
        return next((one for one in self.ceilings if one.threads == threads), None)


def known_machine() -> Machine:
    """This machine with what the cache knows of it, which may be nothing."""
    from ... import __version__

    here = Machine(
        cpu=cpu_model(),
        target=resolve_target("native").name,
        cpus=available_cpus(),
        infc_version=__version__,
    )
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        kept = json.loads(read_private(_place(here)))
        return replace(here, ceilings=tuple(Ceilings(**one) for one in kept["ceilings"]))
    return here


def measure_machine(
    reporter: Reporter,
    threads: Iterable[int] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Machine:
    """Measures anew with each number of threads (None: 1, 2, 4 … and all): the rates of now.

    The cache keeps the best that was ever measured, as other work only ever takes from it;
    `on_note` hears why it could not. ToolchainError without a compiler, CapacityError without
    memory to read.
    """
    from ...codegen.registry import get_backend

    before = known_machine()
    counts = sorted(set(_powers(before.cpus) if threads is None else threads))
    if counts and not 1 <= counts[0] <= counts[-1] <= before.cpus:
        raise UsageError(f"expected 1 to {before.cpus} threads, not {counts[-1]}")
    with reporter.stage("build what measures"):
        probe = get_backend(DEFAULT).probe(resolve_target("native"))
    measured: dict[int, Ceilings] = {}
    with reporter.stage("measure the machine"):
        for done, count in enumerate(counts):
            reporter.advance(done, len(counts), f"{count} of {before.cpus} threads")
            measured[count] = _measure(probe, count)
    kept = {one.threads: one for one in before.ceilings} if threads is not None else {}
    together = sorted((kept | measured).items())
    machine = replace(before, ceilings=tuple(one for _, one in together))
    try:
        _keep(replace(machine, ceilings=_best([*before.ceilings, *machine.ceilings])))
    except OSError as error:  # it is measured again next time
        if on_note is not None:
            where = cache_directory()
            on_note(f"the measured limits could not be saved in {where}: {error.strerror}")
    return machine


def known_ceilings(manifest: Manifest) -> Ceilings | None:
    """What the cache knows of this machine, with the threads that an artifact usually has."""
    try:
        return known_machine().at(min(usual_threads(manifest), available_cpus()))
    except TargetError:  # a machine that infc does not build for can still look into artifacts
        return None


def ceilings_of(threads: int, reporter: Reporter, *, anew: bool = False) -> Ceilings:
    """The ceilings of so many threads: from the cache, or measured where it has none."""
    known = None if anew else known_machine().at(threads)
    if known is not None:
        return known
    found = measure_machine(reporter, [threads]).at(threads)
    assert found is not None, "it was just measured"
    return found


def _best(measured: Sequence[Ceilings]) -> tuple[Ceilings, ...]:
    """The best rates of each number of threads; more threads can do what fewer did."""
    best: list[Ceilings] = []
    for count in sorted({one.threads for one in measured}):
        up_to = [one for one in measured if one.threads <= count]
        rates = {name: max(getattr(one, name) for one in up_to) for name in _RATES}
        best.append(Ceilings(threads=count, **rates))
    return tuple(best)


def _powers(cpus: int) -> Iterable[int]:
    """1, 2, 4 … and all."""
    count = 1
    while count < cpus:
        yield count
        count *= 2
    yield cpus


def _measure(probe: MachineProbe, threads: int) -> Ceilings:
    wanted = max(_READ_BYTES, _CACHES_READ * largest_cache_bytes())
    num_bytes = min(wanted, available_memory() // 4) & ~0xFFF
    rates = {kind: probe.product_rate(kind, threads) for kind in OPERATION_KINDS}
    return Ceilings(threads=threads, read=probe.read_rate(threads, num_bytes), **rates)


def _place(machine: Machine) -> Path:
    """One file a processor, number of processors, target and version of infc."""
    fields = {name: value for name, value in asdict(machine).items() if name != "ceilings"}
    key = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]
    return cache_directory() / "machines" / f"{key}.json"


def _keep(machine: Machine) -> None:
    write_private(_place(machine), json.dumps(asdict(machine), indent=1) + "\n")
