"""Ray Serve's way to choose a replica, which asks `Placing`.

Ray sends this module to processes as its text, so it holds nothing that they have to share.
"""

from __future__ import annotations

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from .errands import Errand
from .placing import DIGESTS, Known, Placing


class PrefixRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """By the blocks that replicas hold and the work that they have; `routing` names the policy."""

    def initialize_state(self, **options: str) -> None:
        """Called by Ray with what the configuration says."""
        self._placing = Placing(options.get("routing", "prefix"))

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas, the best one first."""
        by_name, known = {}, []
        for each in candidate_replicas:
            name = each.replica_id.to_full_id_str()
            by_name[name] = each
            ongoing = self.replica_queue_len_cache.get(each.replica_id)
            has_room = ongoing is None or ongoing < each.max_ongoing_requests
            known.append(Known(name, ongoing, has_room, each.routing_stats.get(DIGESTS, b"")))
        return [[by_name[name]] for name in self._placing.ranked(known, _errand(pending_request))]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        """A replica has accepted the request."""
        if (errand := _errand(pending_request)) is not None:
            self._placing.accept(replica_id.to_full_id_str(), errand)


def _errand(pending: PendingRequest | None) -> Errand | None:
    arguments = () if pending is None else pending.args
    return next((each for each in arguments if isinstance(each, Errand)), None)
