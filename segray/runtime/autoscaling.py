"""What Ray's autoscaler says of the connected cluster: whether it may grow, and what it will never have room for."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

from segray.runtime.capacity import HEAD_RESOURCE, Capacity, describe_work, read_capacity

_POLL_INTERVAL_S = 10  # the autoscaler thinks every 5 s
_IN_KUBERNETES = "KUBERNETES_SERVICE_HOST"  # in the environment of each of its pods


def find_capacity() -> Capacity:
    """Return the capacity of the connected cluster, as far as this process can know it.

    Of a cluster that it does not see from its head, and of one on Kubernetes, it does not know what may be added.
    """
    import ray

    nodes = ray.nodes()
    here = ray.get_runtime_context().get_node_id()
    is_head = any(node["NodeID"] == here and HEAD_RESOURCE in node["Resources"] for node in nodes)
    is_private = "RAY_ADDRESS" not in os.environ
    is_open = not is_private and (not is_head or _IN_KUBERNETES in os.environ or _has_autoscaler())
    return read_capacity(nodes, is_head=is_head and not is_private, is_open=is_open)


@contextmanager
def reported_shortage(console: Console) -> Iterator[None]:
    """While the block runs, print what the autoscaler has found no node type for: Ray itself would wait for ever."""
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
    told: set[str] = set()
    while not stop.wait(_POLL_INTERVAL_S):
        missing: set[str] = set()
        with suppress(Exception):  # whatever is wrong with a report must not end a run with which all is well
            here = find_capacity()
            missing = {describe_work(count, "process", each) for each, count in find_unplaceable(_read_state(), here)}
        for work in sorted(missing & last - told):  # twice running: nodes may be on their way
            console.print(f"the autoscaler has no nodes for {work}: {here.describe()}; waiting", highlight=False)
        told |= missing & last
        last = missing


def find_unplaceable(state: Any, here: Capacity) -> Iterator[tuple[dict[str, float], int]]:
    """Yield what the autoscaler cannot place and no living node will ever hold: resources of each, and how many.

    Args:
        state: Ray's ``AutoscalingState``. It counts as infeasible also what exceeds the most nodes that there may be,
            such as Ray Data's wish for twice as much as it has; of loose requests those are told alone that no node at
            all has room for. The parts of a group are placed together or not at all.
        here: The cluster's capacity.
    """
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    groups = [(gang.requests, True) for gang in state.infeasible_gang_resource_requests]
    for requests, is_group in [(state.infeasible_resource_requests, False), *groups]:
        for counted in ResourceRequestUtil.group_by_count(list(requests)):
            # a placement group marks its requests with resources of its own
            bundle = counted.request.resources_bundle
            each = {name: bundle[name] for name in ("CPU", "GPU") if name in bundle}
            if each and here.count(each, with_more=False) < (counted.count if is_group else 1):
                yield each, counted.count


def _read_state() -> Any:
    from ray._private.worker import global_worker
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply: Any = GetClusterStatusReply()
    reply.ParseFromString(global_worker.gcs_client.get_cluster_status(timeout_s=_POLL_INTERVAL_S))
    return reply.autoscaling_state
