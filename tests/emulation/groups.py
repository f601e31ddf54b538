"""Groups of asynchronous work, which lands as late as its wait allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .wave import Mask, Wave

Array = NDArray[Any]

Job = Callable[[Mask], None]
"""Does what was asked for by the threads in a mask."""

Asked = tuple[int, Job]
"""Work, and the place of the instruction that asked for it."""


@dataclass(slots=True)
class _Group:
    """`members` are the threads for which the group has not landed."""

    members: Mask
    jobs: list[Asked]


@dataclass(slots=True)
class Groups:
    """What was asked for: in groups that each thread has closed, and since."""

    open: list[tuple[Asked, Mask]] = field(default_factory=list)
    closed: list[_Group] = field(default_factory=list)

    def add(self, wave: Wave, job: Job) -> None:
        """Into the group that is open."""
        self.open.append(((wave.place, job), wave.active))

    def commit(self, wave: Wave) -> None:
        """Close the group, which may be empty, for the threads that run."""
        self.closed.append(_Group(wave.active, [asked for asked, _ in self.open]))
        if wave.active is None:
            self.open.clear()
            return
        active = wave.full(wave.active)
        everyone = np.ones((1, 1), bool)
        left = [
            (asked, wave.full(everyone if members is None else members) & ~active)
            for asked, members in self.open
        ]
        self.open = [(asked, members) for asked, members in left if members.any()]

    def wait(self, wave: Wave, keep: int) -> None:
        """Land all groups but the last `keep` of each thread that runs."""
        if wave.active is None and all(group.members is None for group in self.closed):
            while len(self.closed) > keep:
                _land(wave, self.closed.pop(0), None)
            return
        everyone = np.ones((1, 1), bool)
        active = wave.full(everyone if wave.active is None else wave.active)
        newer = np.zeros(active.shape, np.int32)
        due: list[Array] = []
        for group in reversed(self.closed):
            members = wave.full(everyone if group.members is None else group.members)
            due.append(members & active & (newer >= keep))
            newer += members
            group.members = members & ~due[-1]
        for group, threads in zip(self.closed, reversed(due), strict=True):
            if threads.any():
                _land(wave, group, threads)
        self.closed = [
            group for group in self.closed if group.members is not None and group.members.any()
        ]

    @property
    def pending(self) -> list[Asked]:
        """All that has not landed."""
        return [one for group in self.closed for one in group.jobs] + [one for one, _ in self.open]


def _land(wave: Wave, group: _Group, threads: Mask) -> None:
    """Do what was asked for; errors name the instruction that asked."""
    place = wave.place
    for wave.place, job in group.jobs:
        job(threads)
    wave.place = place


def groups_of(wave: Wave, name: str) -> Groups:
    """Those of one kind of work."""
    groups: Groups = wave.state.setdefault(name, Groups())
    return groups
