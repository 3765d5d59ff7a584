"""What is known of a cluster's growth; what its autoscaler says is tried in tests/cluster."""

import math

import pytest

from segray.autoscaling import find_capacity


@pytest.mark.usefixtures("ray_session")
def test_a_private_ray_has_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    capacity = find_capacity()
    assert capacity.count({"CPU": 1}) >= 4
    assert capacity.count({"TPU": 1}) == 0
    assert capacity.describe().endswith("and may add none")


@pytest.mark.usefixtures("ray_session")
def test_in_kubernetes_nobody_knows_what_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    capacity = find_capacity()
    assert capacity.count({"TPU": 1}) == math.inf
    assert capacity.count({"TPU": 1}, with_more=False) == 0
    assert capacity.describe().endswith("and only its autoscaler knows what it may add")
