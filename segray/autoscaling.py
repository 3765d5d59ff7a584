"""What Ray's autoscaler says of the connected cluster: whether it may grow, and what it will never have room for."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

from segray.capacity import Capacity, describe_work, read_capacity

_POLL_INTERVAL_S = 10  # the autoscaler thinks every 5 s
_IN_KUBERNETES = "KUBERNETES_SERVICE_HOST"  # in the environment of each of its pods


def find_capacity() -> Capacity:
    """Return the capacity of the connected cluster; what may be added is unknown where an autoscaler alone knows it."""
    import ray

    return read_capacity(ray.nodes(), is_open=_IN_KUBERNETES in os.environ or _has_autoscaler())


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
            missing = set(_describe_missing())
        for work in sorted(missing & last - told):  # twice running: nodes may be on their way
            console.print(f"the autoscaler has no nodes for {work}; the run waits for them", highlight=False)
            told.add(work)
        last = missing


def _describe_missing() -> Iterator[str]:
    here = find_capacity()
    for each, count in _read_infeasible():
        if here.count(each, with_more=False) < count:
            yield f"{describe_work(count, 'processes', each)}: {here.describe()}"


def _read_infeasible() -> Iterator[tuple[dict[str, float], int]]:
    """Yield what the autoscaler cannot place: resources of each, and how many."""
    from ray._private.worker import global_worker
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply: Any = GetClusterStatusReply()
    reply.ParseFromString(global_worker.gcs_client.get_cluster_status(timeout_s=_POLL_INTERVAL_S))
    state = reply.autoscaling_state
    groups = [state.infeasible_resource_requests, *(gang.requests for gang in state.infeasible_gang_resource_requests)]
    counted = [counted for group in groups for counted in ResourceRequestUtil.group_by_count(list(group))]
    for constraint in state.infeasible_cluster_resource_constraints:
        counted += constraint.resource_requests
    for request in counted:
        # a placement group marks its requests with resources of its own
        each = {name: amount for name, amount in request.request.resources_bundle.items() if name in ("CPU", "GPU")}
        if each:
            yield each, request.count
