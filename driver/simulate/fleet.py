"""Replicas behind fronts, from the first arrival to the last token."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any
from zlib import crc32

from ...ir.errors import CapacityError, UsageError
from ...runtime.replicas.routing import AnyOf, Arrival, Policy, policy_of
from .costs import FrontCosts, StepCosts
from .outcome import Outcome, Times
from .replica import ReplicaLimits, SimulatedReplica, Stream
from .workload import Workload

_MOST_IDLE = 20_000  # deaths and looks at the load between two steps that give a token


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaling:
    """As the autoscaler of Kubernetes does it: by requests in the fleet for each replica.

    Every `period_seconds`, the number of replicas is chosen so that each has `target` requests;
    within a tenth of it, nothing changes. A new replica takes `start_seconds`, and replicas are
    removed once fewer were enough for `down_seconds`.
    """

    least: int
    most: int
    target: float
    period_seconds: float = 15.0
    start_seconds: float = 30.0
    down_seconds: float = 300.0
    tolerance: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What is simulated: replicas, divided among fronts.

    Requests go to a front at random, as a Service distributes them, or with `fronts_by_prefix` to
    the one that the first block of their prompt stands for, as proxies do that hash.
    """

    replicas: int
    limits: ReplicaLimits
    costs: StepCosts
    fronts: int = 1
    fronts_by_prefix: bool = False
    front_costs: FrontCosts = field(default_factory=FrontCosts)
    routing: str = "prefix"
    autoscaling: Autoscaling | None = None
    failure_seconds: float = math.inf
    """Mean time of a replica to its next death."""
    restart_seconds: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.fronts <= self.replicas:
            raise UsageError(f"{self.fronts} fronts for {self.replicas} replicas")
        if self.autoscaling is not None and self.fronts > 1:
            raise UsageError("replicas of several fronts cannot be scaled")


class _Front:
    """One thread that does one thing after the other, and requests that no replica has room for."""

    def __init__(self, policy: Policy, costs: FrontCosts) -> None:
        self.policy, self.costs = policy, costs
        self.replicas: dict[int, SimulatedReplica] = {}
        self.unplaced: deque[Stream] = deque()
        self.free_at = 0.0
        self.busy_seconds = 0.0

    def work(self, now: float, seconds: float) -> float:
        """When it has done something that it hears of now."""
        self.free_at = max(self.free_at, now) + seconds
        self.busy_seconds += seconds
        return self.free_at


def simulate(fleet: Fleet, workload: Workload) -> Outcome:
    """What happens. The same fleet, workload and seed give the same outcome.

    Raises CapacityError for a request that no replica can hold, and for requests that get no token
    any more, as replicas die too soon.
    """
    size = fleet.limits.block_size
    for each in workload.asked:
        needed = -(-(each.prompt_tokens + each.output_tokens) // size)
        if needed > fleet.limits.num_blocks:
            raise CapacityError(
                f"a request of {each.prompt_tokens} + {each.output_tokens} tokens takes {needed}"
                f" blocks, and a replica has {fleet.limits.num_blocks}"
            )
    return _Simulation(fleet, workload).run()


class _Simulation:
    """Events in order of their time; of equal times, in the order in which they were made."""

    def __init__(self, fleet: Fleet, workload: Workload) -> None:
        self._fleet, self._workload = fleet, workload
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._draw = Random(fleet.seed)
        self._fronts = [
            _Front(_policy(fleet.routing, fleet.seed + at), fleet.front_costs)
            for at in range(fleet.fronts)
        ]
        self._indices = itertools.count()
        self._now = self._last = 0.0
        self._left = len(workload.asked)
        self._first: list[tuple[float, int]] = []
        self._gaps: list[tuple[float, int]] = []
        self._whole: list[tuple[float, int]] = []
        self._tokens = self._hits = self._deaths = self._moved = 0
        self._busy_seconds = self._replica_seconds = 0.0
        self._counts: list[tuple[float, int]] = []
        self._wanted: deque[tuple[float, int]] = deque()
        self._num_starting = 0
        self._num_idle = 0

    def run(self) -> Outcome:
        """All of it."""
        for index in range(self._fleet.replicas):
            self._add(self._fronts[index % self._fleet.fronts])
        for number, asked in enumerate(self._workload.asked):
            self._at(asked.at, self._arrive, Stream(number, asked))
        if self._fleet.autoscaling is not None:
            self._at(self._fleet.autoscaling.period_seconds, self._scale)
        while self._left:
            self._now, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)
        for front in self._fronts:
            for replica in front.replicas.values():
                self._busy_seconds += replica.busy_seconds
        self._count_replicas()
        return self._outcome()

    def _at(self, time: float, act: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), act, arguments))

    # --- requests -----------------------------------------------------------------------------

    def _arrive(self, stream: Stream) -> None:
        front = self._fronts[0]
        if self._fleet.fronts_by_prefix and stream.asked.digests:
            front = self._fronts[crc32(stream.asked.digests[0]) % len(self._fronts)]
        elif len(self._fronts) > 1:
            front = self._draw.choice(self._fronts)
        seconds = front.costs.routing(len(front.replicas))
        self._at(front.work(self._now, seconds), self._place, front, stream)

    def _place(self, front: _Front, stream: Stream) -> None:
        front.unplaced.append(stream)
        self._place_all(front)

    def _place_all(self, front: _Front) -> None:
        while front.unplaced:
            candidates = [each.candidate for each in front.replicas.values() if each.has_room]
            if not candidates:
                return
            stream = front.unplaced.popleft()
            asked = stream.asked
            arrival = Arrival(asked.prompt_tokens, asked.digests, self._fleet.limits.block_size)
            choice = front.policy.choose(arrival, candidates)
            stream.known = choice.num_known
            replica = front.replicas[choice.replica]
            replica.send(stream)
            self._step(front, replica)

    def _step(self, front: _Front, replica: SimulatedReplica) -> None:
        if replica.is_stepping or not replica.is_ready:
            return
        seconds = replica.begin_step()
        self._tell_policy(front, replica)
        if seconds is None:
            replica.given_at = None
            return
        self._at(self._now + seconds, self._stepped, front, replica, replica.epoch)

    def _stepped(self, front: _Front, replica: SimulatedReplica, epoch: int) -> None:
        if epoch != replica.epoch:
            return  # it died in the meantime
        ended = replica.end_step()
        self._tell_policy(front, replica)
        given_at = replica.given_at
        if ended.num_tokens:
            self._num_idle = 0
            given_at = front.work(self._now, front.costs.token * ended.num_tokens)
            if ended.num_later and replica.given_at is not None:
                self._gaps.append((given_at - replica.given_at, ended.num_later))
        for stream in ended.first:
            if stream.first_at is None:
                assert given_at is not None
                stream.first_at = given_at
                self._first.append((given_at - stream.asked.at, 1))
                self._hits += stream.hit
        for stream in ended.done:
            assert given_at is not None
            self._whole.append((given_at - stream.asked.at, 1))
            self._tokens += stream.given
            self._left -= 1
            self._last = max(self._last, given_at)
        replica.given_at = given_at
        if replica.is_draining and not replica.streams:
            self._remove(front, replica)
        else:
            self._step(front, replica)
        if ended.done:
            self._place_all(front)

    def _tell_policy(self, front: _Front, replica: SimulatedReplica) -> None:
        cache = replica.cache
        if cache.stored or cache.removed:
            if front.policy.needs_blocks:
                front.policy.change(replica.index, cache.stored, cache.removed)
            cache.stored, cache.removed = [], []

    # --- replicas -----------------------------------------------------------------------------

    def _add(self, front: _Front) -> None:
        fleet = self._fleet
        replica = SimulatedReplica(next(self._indices), fleet.limits, fleet.costs)
        front.replicas[replica.index] = replica
        self._count_replicas()
        self._await_death(front, replica)
        self._place_all(front)

    def _started(self, front: _Front) -> None:
        self._num_starting -= 1
        self._add(front)

    def _remove(self, front: _Front, replica: SimulatedReplica) -> None:
        self._busy_seconds += replica.busy_seconds
        del front.replicas[replica.index]
        self._count_replicas()
        front.policy.clear(replica.index)

    def _count_replicas(self) -> None:
        """After their number has changed, and at the end."""
        now = max(self._now, self._last)
        if self._counts:
            self._replica_seconds += (now - self._counts[-1][0]) * self._counts[-1][1]
        self._counts.append((now, sum(len(front.replicas) for front in self._fronts)))

    def _await_death(self, front: _Front, replica: SimulatedReplica) -> None:
        if math.isfinite(self._fleet.failure_seconds):
            after = self._draw.expovariate(1 / self._fleet.failure_seconds)
            self._at(self._now + after, self._die, front, replica)

    def _die(self, front: _Front, replica: SimulatedReplica) -> None:
        if replica.index not in front.replicas:
            return
        self._count_idle()
        self._deaths += 1
        left = replica.die()
        front.policy.clear(replica.index)
        self._moved += len(left)
        if replica.is_draining:
            self._remove(front, replica)
        else:
            self._at(self._now + self._fleet.restart_seconds, self._restart, front, replica)
        # The oldest of them is the first in the line at last.
        for stream in reversed(left):
            front.unplaced.appendleft(stream)
        seconds = front.costs.routing(len(front.replicas)) * len(left)
        self._at(front.work(self._now, seconds), self._place_all, front)

    def _restart(self, front: _Front, replica: SimulatedReplica) -> None:
        if replica.index in front.replicas:
            replica.is_ready = True
            self._await_death(front, replica)
            self._place_all(front)

    def _count_idle(self) -> None:
        """Something happened that happens for ever: a death, or a look at the load."""
        self._num_idle += 1
        if self._num_idle > _MOST_IDLE:
            raise CapacityError(
                f"no request gets a token any more after {self._now:.4g} s, and"
                f" {len(self._whole)} of {len(self._workload.asked)} have ended",
                hint="replicas die before they compute a prompt, or requests are far apart",
            )

    # --- autoscaling --------------------------------------------------------------------------

    def _scale(self) -> None:
        rules = self._fleet.autoscaling
        assert rules is not None
        self._count_idle()
        (front,) = self._fronts
        serving = [each for each in front.replicas.values() if not each.is_draining]
        have = len(serving) + self._num_starting
        asked = len(front.unplaced) + sum(len(each.streams) for each in serving)
        ratio = asked / (max(1, len(serving)) * rules.target)
        want = have
        if abs(ratio - 1) > rules.tolerance:
            want = math.ceil(asked / rules.target)
        want = min(rules.most, max(rules.least, want))
        self._wanted.append((self._now, want))
        while self._wanted[0][0] < self._now - rules.down_seconds:
            self._wanted.popleft()
        want = max(want, min(have, max(number for _, number in self._wanted)))
        for _ in range(want - have):
            self._num_starting += 1
            self._at(self._now + rules.start_seconds, self._started, front)
        # Those with the fewest requests are done first.
        for replica in sorted(serving, key=lambda one: (len(one.streams), -one.index)):
            if have <= want or len(serving) <= 1:
                break
            have -= 1
            serving.remove(replica)
            replica.is_draining = True
            if not replica.streams:
                self._remove(front, replica)
        self._at(self._now + rules.period_seconds, self._scale)

    def _outcome(self) -> Outcome:
        return Outcome(
            replicas=self._fleet.replicas,
            most_replicas=max(count for _, count in self._counts),
            fronts=self._fleet.fronts,
            requests=len(self._whole),
            moved=self._moved,
            deaths=self._deaths,
            seconds=self._last - self._workload.asked[0].at,
            tokens=self._tokens,
            prompt_tokens=sum(each.prompt_tokens for each in self._workload.asked),
            hit_tokens=self._hits,
            replica_seconds=self._replica_seconds,
            busy_seconds=self._busy_seconds,
            front_seconds=sum(front.busy_seconds for front in self._fronts),
            first_token=Times.of(self._first),
            gap=Times.of(self._gaps),
            end_to_end=Times.of(self._whole),
            replica_counts=tuple(self._counts),
        )


def _policy(name: str, seed: int) -> Policy:
    """That policy; where it draws, from this seed."""
    return AnyOf(seed) if name == "random" else policy_of(name)
