"""Query Ray's autoscaler: whether the connected cluster may grow, and which requests it can never place."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

from segray.runtime.capacity import HEAD_RESOURCE, Capacity, describe_work, read_capacity

_POLL_INTERVAL_S = 10  # The autoscaler runs every 5 s.
_IN_KUBERNETES = "KUBERNETES_SERVICE_HOST"  # Set in every pod.


def find_capacity() -> Capacity:
    """Return the capacity of the connected cluster, as far as this process can know it.

    Which nodes may be added is unknown on Kubernetes, and to processes that do not run on the head.
    """
    import ray

    nodes = ray.nodes()
    here = ray.get_runtime_context().get_node_id()
    is_head = any(node["NodeID"] == here and HEAD_RESOURCE in node["Resources"] for node in nodes)
    is_private = not os.environ.get("RAY_ADDRESS")
    is_open = not is_private and (not is_head or _IN_KUBERNETES in os.environ or _has_autoscaler())
    return read_capacity(nodes, is_head=is_head and not is_private, is_open=is_open)


@contextmanager
def reported_shortage(console: Console) -> Iterator[None]:
    """While the block runs, print the requests for which the autoscaler has no node type; Ray waits for them forever.

    A request is printed once, when it has been infeasible at two polls in a row.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_report_until_stopped, args=(console, stop), daemon=True)
    if is_scaled := _has_autoscaler():
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if is_scaled:
            thread.join()


def _has_autoscaler() -> bool:
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2(fetch_from_server=True))


def _report_until_stopped(console: Console, stop: threading.Event) -> None:
    last: set[str] = set()
    reported: set[str] = set()
    while not stop.wait(_POLL_INTERVAL_S):
        missing: set[str] = set()
        with suppress(Exception):  # A failed report must not end a run that is otherwise working.
            capacity = find_capacity()
            unplaceable = find_unplaceable(_read_state(), capacity)
            missing = {describe_work(count, "process", each) for each, count in unplaceable}
        for work in sorted(missing & last - reported):  # In two polls in a row: nodes may be starting.
            console.print(f"the autoscaler has no nodes for {work}: {capacity.describe()}; waiting", highlight=False)
        reported |= missing & last
        last = missing


def find_unplaceable(state: Any, capacity: Capacity) -> Iterator[tuple[dict[str, float], int]]:
    """Yield the requests that neither the autoscaler nor any living node can place: resources of each, and the count.

    Args:
        state: Ray's ``AutoscalingState``. Its infeasible requests include those beyond the maximum number of nodes,
            such as Ray Data's request for twice the resources it has. A single request is therefore yielded only if it
            fits on no living node. The requests of a placement group are placed together or not at all.
        capacity: The cluster's capacity.
    """
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    groups = [(gang.requests, True) for gang in state.infeasible_gang_resource_requests]
    for requests, is_group in [(state.infeasible_resource_requests, False), *groups]:
        for counted in ResourceRequestUtil.group_by_count(list(requests)):
            # A placement group adds marker resources of its own to its requests.
            bundle = counted.request.resources_bundle
            each = {name: bundle[name] for name in ("CPU", "GPU") if name in bundle}
            if each and capacity.count(each, with_more=False) < (counted.count if is_group else 1):
                yield each, counted.count


def _read_state() -> Any:
    from ray._private.worker import global_worker
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply: Any = GetClusterStatusReply()
    reply.ParseFromString(global_worker.gcs_client.get_cluster_status(timeout_s=_POLL_INTERVAL_S))
    return reply.autoscaling_state
