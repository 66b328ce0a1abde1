"""How many replicas: as many as the queue and the deadlines need.

Ray Serve carries this module into its controller by value, so it imports nothing of Taper.
"""

from __future__ import annotations

from typing import Any


def queue_and_slack(context: Any) -> tuple[float, dict[str, Any]]:
    """Ray Serve's autoscaling policy of a model; Serve applies the bounds and the delays.

    The larger of two numbers: requests under way over `target_ongoing_requests`, and the replicas there are
    times the mean pressure of their deadlines (`Slack.pressure`), which at most doubles them.

    Args:
        context: Serve's AutoscalingContext, with `pressure` among the replicas' own metrics.

    Returns:
        The number of replicas, not rounded, and no state.
    """
    running = context.current_num_replicas
    by_queue = context.total_num_requests / context.config.get_target_ongoing_requests()
    pressures = list((context.aggregated_metrics or {}).get("pressure", {}).values())
    mean = sum(pressures) / len(pressures) if pressures else 0.0
    return max(by_queue, running * min(mean, 2.0)), {}
