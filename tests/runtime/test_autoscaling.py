"""Tests of segray.runtime.autoscaling; tests/cluster covers the reports of a real autoscaler."""

import math

import pytest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GangResourceRequest

from segray.runtime.autoscaling import find_capacity, find_unplaceable
from segray.runtime.capacity import Capacity


@pytest.mark.usefixtures("ray_session")
def test_a_private_ray_adds_no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    capacity = find_capacity()
    assert capacity.count({"CPU": 1}) >= 4
    assert capacity.count({"TPU": 1}) == 0
    assert capacity.describe().endswith("and may add no nodes")


@pytest.mark.usefixtures("ray_session")
def test_which_nodes_may_be_added_is_unknown_on_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("RAY_ADDRESS", "set, as for a submitted job")
    capacity = find_capacity()
    assert capacity.count({"TPU": 1}) == math.inf
    assert capacity.count({"TPU": 1}, with_more=False) == 0
    assert capacity.describe().endswith("and only its autoscaler knows which nodes it may add")


def test_only_infeasible_requests_that_no_living_node_can_hold_are_reported() -> None:
    small, gpu = ResourceRequestUtil.make({"CPU": 1}), ResourceRequestUtil.make({"CPU": 1, "GPU": 1})
    state = AutoscalingState(
        # Ray Data requests more CPUs than there may be, which is harmless. There are no GPUs.
        infeasible_resource_requests=[small] * 80 + [gpu] * 2,
        infeasible_gang_resource_requests=[GangResourceRequest(requests=[small] * 5)],
    )
    capacity = Capacity(({"CPU": 4},))
    assert list(find_unplaceable(state, capacity)) == [({"CPU": 1, "GPU": 1}, 2), ({"CPU": 1}, 5)]
