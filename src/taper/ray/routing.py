"""Which replica: the one that is expected to end the request first, seen from its deadline.

Ray Serve carries this module into other processes by value; what must be one object there is in `ledger`.
"""

from __future__ import annotations

import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from taper.ray.ledger import Asked, Ledger


class DeadlineRouter(RequestRouter):  # type: ignore[misc]  # ray's classes have no types
    """Ray Serve's request router of a model.

    A request waits behind those of a higher priority, and of its own priority behind those whose deadline is
    no later; each counts with the tokens it may take, times the replica's own seconds a token.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Called once by Serve."""
        self._ledger = Ledger()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All replicas, each a rank of its own, the best first."""
        now_s = time.monotonic()
        replicas = {str(replica.replica_id): replica for replica in candidate_replicas}
        self._ledger.keep(replicas, now_s)
        asked = Asked() if pending_request is None else _asked(pending_request)
        step_s = {name: replica.routing_stats.get("step_s", 0.0) for name, replica in replicas.items()}
        order = self._ledger.order(step_s, asked)
        if pending_request is not None:
            # Serve would ask again without a pause where every replica is full.
            pending_request.routing_context.should_backoff = True
            if order:
                self._ledger.choose(pending_request.metadata.internal_request_id, order[0], asked, now_s)
        return [[replicas[name]] for name in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when a replica has taken a request."""
        request = pending_request.metadata.internal_request_id
        self._ledger.route(request, str(replica_id), _asked(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a request has ended, or its replica."""
        self._ledger.complete(internal_request_id)


def _asked(pending_request: PendingRequest) -> Asked:
    asked = pending_request.kwargs.get("asked")
    if asked is None:
        return Asked()
    left_s, priority, tokens, call = asked
    return Asked(time.monotonic() + left_s, priority, tokens, call)
