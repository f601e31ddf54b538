"""One engine: what is in a step, what it takes, and what is done when it ends."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

from ...runtime.replicas.routing import STREAM_TOKENS, Candidate
from .cache import SimulatedCache
from .costs import StepCosts
from .workload import Asked


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLimits:
    """Of an engine: sequences at once, tokens of a step, and blocks of its cache."""

    max_running: int
    step_tokens: int
    num_blocks: int
    block_size: int


@dataclass(slots=True, eq=False)
class Stream:
    """A request from its arrival to its end, wherever it is computed."""

    number: int
    asked: Asked
    given: int = 0
    """Tokens of its answer that the front has."""
    first_at: float | None = None
    known: int = 0
    """Tokens of its prompt that its replica had, as the policy believed."""
    unread: int = 0
    """Tokens that are to be computed before the next one of its answer."""
    found: int = 0
    own: int = 0
    begun_step: int = 0
    num_moves: int = 0
    hit: int = 0
    """Tokens of its prompt that were found when it began first."""

    @property
    def read_tokens(self) -> int:
        """What stands before the next token of its answer."""
        return self.asked.prompt_tokens + self.given

    @property
    def left(self) -> int:
        """Tokens that are still to be generated."""
        return self.asked.output_tokens - self.given


@dataclass(frozen=True, slots=True)
class Ended:
    """What a step gave: who has a first token, who is done, and how many others had a token."""

    first: tuple[Stream, ...]
    done: tuple[Stream, ...]
    num_tokens: int
    num_later: int


class SimulatedReplica:
    """An engine that gives each sequence a token a step, and the rest of the step to prompts.

    Sequences begin in the order in which they came, and have room for their whole answer when
    they do, so that none is preempted. What is being generated is counted together: a step takes
    the same time to simulate, however many sequences there are.
    """

    def __init__(self, index: int, limits: ReplicaLimits, costs: StepCosts) -> None:
        self.index = index
        self.limits, self.costs = limits, costs
        self.cache = SimulatedCache(limits.num_blocks)
        self.streams: dict[int, Stream] = {}
        self.waiting: deque[Stream] = deque()
        self.busy_seconds = 0.0
        self.epoch = 0
        self.is_ready = True
        self.is_draining = False
        self.is_stepping = False
        self.given_at: float | None = None
        """When the front had the tokens of the last step, if those are next of which it has."""
        self._reading: deque[Stream] = deque()
        self._ends: list[tuple[int, int, Stream]] = []
        self._num_steps = 0
        self._context = 0  # tokens stored of all that generate
        self._finishing: list[Stream] = []
        self._work = 0
        self._seconds = 0.0  # of the step that is under way

    @property
    def has_room(self) -> bool:
        """Whether the front sends it requests; some wait in it, so that it never waits."""
        room = len(self.streams) < self.limits.max_running + 4
        return self.is_ready and not self.is_draining and room

    @property
    def candidate(self) -> Candidate:
        """Itself, for a policy, with the same measure of work as the front has."""
        return Candidate(self.index, self._work + STREAM_TOKENS * len(self.streams))

    def send(self, stream: Stream) -> None:
        """Take a request."""
        self.streams[stream.number] = stream
        self._work += stream.asked.prompt_tokens - stream.known
        self.waiting.append(stream)

    def begin_step(self) -> float | None:
        """Decide on a step: its seconds, or None if there is nothing to do."""
        self._admit()
        decoding = len(self._ends)
        budget, prompt, pairs = self.limits.step_tokens - decoding, 0, 0
        while self._reading and budget > 0:
            stream = self._reading[0]
            part = min(budget, stream.unread)
            before = stream.read_tokens - stream.unread
            pairs += part * before
            stream.unread -= part
            prompt, budget = prompt + part, budget - part
            if stream.unread:
                break
            self._finishing.append(self._reading.popleft())
        if not decoding and not prompt:
            return None
        self.is_stepping = True
        begun = len(self._finishing)
        self._seconds = self.costs.step(decoding, self._context, prompt, pairs, begun)
        return self._seconds

    def _admit(self) -> None:
        running = len(self.streams) - len(self.waiting)
        size = self.limits.block_size
        while self.waiting and running < self.limits.max_running:
            stream = self.waiting[0]
            digests = stream.asked.digests
            # One token is computed even of a prompt that is known as a whole.
            most = (stream.asked.prompt_tokens - 1) // size
            found = self.cache.num_found(digests[:most])
            total = -(-(stream.asked.prompt_tokens + stream.asked.output_tokens) // size)
            if not self.cache.take(digests, found, total):
                break
            self.waiting.popleft()
            stream.found, stream.own = found, total - found
            stream.unread = stream.read_tokens - found * size
            if not stream.num_moves:
                stream.hit = found * size
            self._reading.append(stream)
            running += 1

    def end_step(self) -> Ended:
        """The step has ended."""
        self.is_stepping = False
        self.busy_seconds += self._seconds
        self._num_steps += 1
        num_later = len(self._ends)
        self._context += num_later
        first = tuple(self._finishing)
        for stream in first:
            digests = stream.asked.digests
            stream.own -= self.cache.store(digests, stream.found)
            self._work -= stream.asked.prompt_tokens - stream.known
            stream.begun_step = self._num_steps
            self._context += stream.read_tokens + 1
            end = self._num_steps + stream.left - 1
            heapq.heappush(self._ends, (end, stream.number, stream))
        self._finishing = []
        done = []
        while self._ends and self._ends[0][0] <= self._num_steps:
            stream = heapq.heappop(self._ends)[2]
            done.append(stream)
            stream.given = stream.asked.output_tokens
            self._context -= stream.read_tokens
            self.cache.free(stream.asked.digests, stream.own)
            del self.streams[stream.number]
        return Ended(first, tuple(done), num_later + len(first), num_later)

    def die(self) -> list[Stream]:
        """The process is gone, with its cache and the step that was under way: whom it leaves."""
        for _, _, stream in self._ends:
            stream.given += self._num_steps - stream.begun_step + 1
        left = sorted(self.streams.values(), key=lambda each: each.number)
        for stream in left:
            stream.num_moves += 1
        self.cache = SimulatedCache(self.limits.num_blocks)
        self.streams, self.waiting, self._reading = {}, deque(), deque()
        self._ends, self._finishing, self._context, self._work = [], [], 0, 0
        self.is_ready = self.is_stepping = False
        self.given_at = None
        self.epoch += 1
        return left
