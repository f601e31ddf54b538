"""Which requests are taken for the reason why engines died."""

from __future__ import annotations

import asyncio
from typing import Any

from infc.runtime.async_streams import Inbox
from infc.runtime.replicas.child import Child, start_engine
from infc.runtime.replicas.messages import VERSION, Open
from infc.runtime.replicas.replica import Replica
from infc.runtime.replicas.streams import RemoteStream
from infc.runtime.replicas.suspects import Suspects
from infc.runtime.sampling.sampling_params import SamplingParams

SLEEPING = "import time; time.sleep(60)"


class NoOwner:
    """Does nothing about what a replica tells."""

    def on_ready(self, replica: Replica) -> None: ...

    def on_told(self, replica: Replica, told: Any) -> None: ...

    def on_given_up(self, replica: Replica, error: Exception) -> None: ...

    def on_death(self, replica: Replica, death: Any, interrupted: Any) -> None: ...


def replicas(count: int) -> list[Replica]:
    def start() -> Child:
        return start_engine(SLEEPING)

    order = Open(VERSION, "", "", {})
    return [Replica(index, order, start, NoOwner()) for index in range(count)]


def streams(count: int) -> list[RemoteStream]:
    loop = asyncio.new_event_loop()
    loop.close()
    inbox = Inbox(loop)
    made = [RemoteStream(f"{i}", [5], SamplingParams(), inbox, i) for i in range(count)]
    for each in made:
        each.is_sent = True
    return made


def test_a_replica_that_is_dying_gets_no_suspect() -> None:
    """It would be blamed for a death that came before it."""
    suspects, (one, two), (first, second) = Suspects(), replicas(2), streams(2)
    one.state = two.state = "ready"
    for _ in range(2):
        suspects.examine(one, [first, second])
    assert suspects.next([two]) is first
    two.streams[1] = first
    first.is_proven = True
    two.state = "waiting"  # its socket is closed, and its process has not ended yet
    assert suspects.next([one]) is None
    assert suspects.examine(two, [first]) == []
    assert suspects.next([one]) is second


def test_what_was_never_sent_is_no_reason() -> None:
    suspects, (one,), (sent, other) = Suspects(), replicas(1), streams(2)
    other.is_sent = False
    for _ in range(3):
        suspects.examine(one, [sent, other])
    assert other.num_strikes == 0
    assert not suspects.holds(other)
    assert suspects.next([]) is None


def test_a_replica_whose_connection_is_lost_takes_nothing() -> None:
    (replica,), (stream,) = replicas(1), streams(1)

    async def run() -> None:
        await replica.start()
        replica.state = "ready"
        replica.send(1, stream)
        assert stream.is_sent
        transport = replica._transport
        assert transport is not None
        transport.abort()
        replica.send(2, stream)
        assert not stream.is_sent
        await asyncio.sleep(0)
        assert replica.state != "ready"
        await replica.close(0)

    asyncio.run(run())
