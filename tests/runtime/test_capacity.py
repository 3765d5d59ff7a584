"""Tests of segray.runtime.capacity: what small clusters can hold before and after growing, computed by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from segray.errors import ClusterError
from segray.runtime.capacity import Capacity, NodeType, describe_wait, read_capacity, require_placeable

HEAD = {"CPU": 0.0, "memory": 8e9}
SMALL = {"CPU": 4.0, "memory": 16e9}
LARGE = NodeType("large", {"CPU": 8, "GPU": 2, "memory": math.inf}, 3)
PLAIN = NodeType("plain", {"CPU": 16, "memory": math.inf}, 3)


@pytest.mark.parametrize(
    ("each", "now", "later"),
    [
        ({"CPU": 1}, 4, 4 + 16 + 16),  # Two more nodes, of the type that holds most.
        ({"GPU": 1}, 0, 4),
        ({"CPU": 1, "GPU": 1}, 0, 4),
        ({"CPU": 5, "GPU": 1}, 0, 2),  # 8 CPUs hold one of them.
        ({"GPU": 0.5}, 0, 8),
        ({"GPU": 0.6}, 0, 4),  # A task never uses parts of two GPUs.
        ({"GPU": 3}, 0, 0),
        ({"TPU": 1}, 0, 0),
        ({"memory": 5e9}, 1 + 3, math.inf),
    ],
)
def test_tasks_are_counted_on_each_node_separately(each: dict[str, float], now: float, later: float) -> None:
    capacity = Capacity((HEAD, SMALL), (LARGE, PLAIN), num_more=2)
    assert capacity.count(each, with_more=False) == now
    assert capacity.count(each) == later


def test_requests_are_not_refused_if_the_nodes_that_may_be_added_are_unknown() -> None:
    capacity = Capacity((SMALL,), is_open=True)
    assert capacity.count({"GPU": 1}) == math.inf
    assert capacity.count({"GPU": 1}, with_more=False) == 0
    require_placeable(capacity, "worker", {"GPU": 1}, 100, "a setting")


def test_a_refusal_names_the_requested_and_the_available_resources() -> None:
    capacity = Capacity((HEAD, SMALL), (LARGE, PLAIN), num_more=2)
    with pytest.raises(ClusterError) as refused:
        require_placeable(capacity, "training worker", {"GPU": 1}, 5, "train.num_train_workers")
    assert str(refused.value) == (
        "train.num_train_workers: requested 5 training workers with 1 GPU each, but at most 4 can be placed: the "
        "cluster has 4 CPU, 0 GPU on 2 nodes and may add 2 of: 3 large (8 CPU, 2 GPU), 3 plain (16 CPU, 0 GPU); "
        "request less, or allow the cluster more nodes"
    )
    wait = describe_wait(capacity, "training worker", {"GPU": 1}, 4)
    assert wait
    assert wait.startswith("waiting for nodes for 4 training workers with 1 GPU each: the cluster has 4 CPU, 0 GPU on")
    assert describe_wait(capacity, "predictor", {"CPU": 1}, 4) is None


def build_node(resources: dict[str, float], node_type: str = "", *, alive: bool = True) -> dict[str, Any]:
    """Return a node in the format of ``ray.nodes()``."""
    labels = {"ray.io/node-id": "0", **({"ray.io/node-group": node_type} if node_type else {})}
    return {"Alive": alive, "Resources": resources, "Labels": labels}


NODES = [
    build_node({"CPU": 0, "node:__internal_head__": 1.0}, "head"),
    build_node({"CPU": 8, "GPU": 1}, "spot"),
    build_node({"CPU": 8, "GPU": 1}, "spot", alive=False),
]


def test_a_cluster_without_autoscaler_adds_no_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    capacity = read_capacity(NODES, is_head=True, is_open=False)
    assert capacity.count({"GPU": 1}) == 1
    assert capacity.describe() == "the cluster has 8 CPU, 1 GPU on 2 nodes and may add no nodes"
    (tmp_path / "ray_bootstrap_config.yaml").write_text("left behind by another cluster")
    assert read_capacity(NODES, is_head=False, is_open=False) == capacity
    assert read_capacity(NODES, is_head=False, is_open=True).count({"GPU": 5}) == math.inf


def test_the_configuration_of_ray_up_defines_which_nodes_may_be_added(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = {
        "max_workers": 5,
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "max_workers": 0},
            "spot": {"resources": {"CPU": 8, "GPU": 1, "memory": 32e9}, "max_workers": 3},
            "on_demand": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 8},
        },
    }
    (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    capacity = read_capacity(NODES, is_head=True, is_open=False)
    assert {node_type.name: node_type.num_more for node_type in capacity.types} == {"spot": 2, "on_demand": 4}
    assert capacity.num_more == 4
    assert capacity.count({"GPU": 1}) == 5
    assert capacity.count({"memory": 4e9}) == math.inf, (
        "a type that does not state its memory is assumed to have enough"
    )
    assert capacity.describe() == (
        "the cluster has 8 CPU, 1 GPU on 2 nodes and may add 4 of: 2 spot (8 CPU, 1 GPU), 4 on_demand (8 CPU, 1 GPU)"
    )


@pytest.mark.parametrize(("num_alive", "expected"), [(1, math.inf), (2, 0)])
def test_resources_of_on_premises_machines_are_unknown_until_they_have_joined(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_alive: int, expected: float
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    types = {"local.cluster.node": {"resources": {}, "max_workers": 2}}
    config = {"max_workers": 2, "available_node_types": types}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config))
    nodes = [NODES[0], *(build_node({"CPU": 4}) for _ in range(num_alive))]
    assert read_capacity(nodes, is_head=True, is_open=False).count({"GPU": 1}) == expected
