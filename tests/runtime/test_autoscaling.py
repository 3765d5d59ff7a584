"""What is known of a cluster's growth; what its autoscaler says is tried in tests/cluster."""

import math

import pytest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GangResourceRequest

from segray.runtime.autoscaling import find_capacity, find_unplaceable
from segray.runtime.capacity import Capacity


@pytest.mark.usefixtures("ray_session")
def test_a_private_ray_has_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    capacity = find_capacity()
    assert capacity.count({"CPU": 1}) >= 4
    assert capacity.count({"TPU": 1}) == 0
    assert capacity.describe().endswith("and may add none")


@pytest.mark.usefixtures("ray_session")
def test_in_kubernetes_nobody_knows_what_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("RAY_ADDRESS", "as a submitted job has it")
    capacity = find_capacity()
    assert capacity.count({"TPU": 1}) == math.inf
    assert capacity.count({"TPU": 1}, with_more=False) == 0
    assert capacity.describe().endswith("and only its autoscaler knows what it may add")


def test_of_what_the_autoscaler_calls_infeasible_only_what_can_never_run_is_told() -> None:
    small, gpu = ResourceRequestUtil.make({"CPU": 1}), ResourceRequestUtil.make({"CPU": 1, "GPU": 1})
    state = AutoscalingState(
        # Ray Data wishes for more than there may be, which is no trouble; of GPUs there is none
        infeasible_resource_requests=[small] * 80 + [gpu] * 2,
        infeasible_gang_resource_requests=[GangResourceRequest(requests=[small] * 5)],
    )
    here = Capacity(({"CPU": 4},))
    assert list(find_unplaceable(state, here)) == [({"CPU": 1, "GPU": 1}, 2), ({"CPU": 1}, 5)]
