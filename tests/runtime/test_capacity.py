"""What a cluster has room for, now and when it has grown; worked out by hand for small ones."""

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
        ({"CPU": 1}, 4, 4 + 16 + 16),  # two nodes more, of the type that holds most
        ({"GPU": 1}, 0, 4),
        ({"CPU": 1, "GPU": 1}, 0, 4),
        ({"CPU": 5, "GPU": 1}, 0, 2),  # 8 CPUs have room for one of them
        ({"GPU": 0.5}, 0, 8),
        ({"GPU": 0.6}, 0, 4),  # none has parts of two GPUs
        ({"GPU": 3}, 0, 0),
        ({"TPU": 1}, 0, 0),
        ({"memory": 5e9}, 1 + 3, math.inf),
    ],
)
def test_room_is_counted_on_each_node_by_itself(each: dict[str, float], now: float, later: float) -> None:
    capacity = Capacity((HEAD, SMALL), (LARGE, PLAIN), num_more=2)
    assert capacity.count(each, with_more=False) == now
    assert capacity.count(each) == later


def test_room_that_nobody_knows_is_not_denied() -> None:
    capacity = Capacity((SMALL,), is_open=True)
    assert capacity.count({"GPU": 1}) == math.inf
    assert capacity.count({"GPU": 1}, with_more=False) == 0
    require_placeable(capacity, "worker", {"GPU": 1}, 100, "a setting")


def test_what_is_refused_is_named_with_what_there_is() -> None:
    capacity = Capacity((HEAD, SMALL), (LARGE, PLAIN), num_more=2)
    with pytest.raises(ClusterError) as refused:
        require_placeable(capacity, "training worker", {"GPU": 1}, 5, "train.num_train_workers")
    assert str(refused.value) == (
        "train.num_train_workers: 5 training workers of 1 GPU each asked for, and 4 can ever be placed: the cluster "
        "has 4 CPU, 0 GPU on 2 nodes, and may add 2 out of 3 large (8 CPU, 2 GPU), 3 plain (16 CPU, 0 GPU); "
        "ask for less, or let the cluster have more"
    )
    wait = describe_wait(capacity, "training worker", {"GPU": 1}, 4)
    assert wait
    assert wait.startswith("waiting for room for 4 training workers of 1 GPU each: the cluster has 4 CPU, 0 GPU on 2")
    assert describe_wait(capacity, "predictor", {"CPU": 1}, 4) is None


def build_node(resources: dict[str, float], node_type: str = "", *, alive: bool = True) -> dict[str, Any]:
    """Return a node as ``ray.nodes()`` shows it."""
    labels = {"ray.io/node-id": "0", **({"ray.io/node-group": node_type} if node_type else {})}
    return {"Alive": alive, "Resources": resources, "Labels": labels}


NODES = [
    build_node({"CPU": 0, "node:__internal_head__": 1.0}, "head"),
    build_node({"CPU": 8, "GPU": 1}, "spot"),
    build_node({"CPU": 8, "GPU": 1}, "spot", alive=False),
]


def test_a_cluster_that_nobody_scales_is_what_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    capacity = read_capacity(NODES, is_head=True, is_open=False)
    assert capacity.count({"GPU": 1}) == 1
    assert capacity.describe() == "the cluster has 8 CPU, 1 GPU on 2 nodes, and may add none"
    (tmp_path / "ray_bootstrap_config.yaml").write_text("left behind by another cluster")
    assert read_capacity(NODES, is_head=False, is_open=False) == capacity
    assert read_capacity(NODES, is_head=False, is_open=True).count({"GPU": 5}) == math.inf


def test_what_ray_up_was_told_says_what_may_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
    assert capacity.count({"memory": 4e9}) == math.inf, "what a type does not tell is not held against it"
    assert capacity.describe() == (
        "the cluster has 8 CPU, 1 GPU on 2 nodes, and may add 4 out of 2 spot (8 CPU, 1 GPU), "
        "4 on_demand (8 CPU, 1 GPU)"
    )


@pytest.mark.parametrize(("num_alive", "expected"), [(1, math.inf), (2, 0)])
def test_of_machines_of_ones_own_nobody_knows_until_they_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_alive: int, expected: float
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    types = {"local.cluster.node": {"resources": {}, "max_workers": 2}}
    config = {"max_workers": 2, "available_node_types": types}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config))
    nodes = [NODES[0], *(build_node({"CPU": 4}) for _ in range(num_alive))]
    assert read_capacity(nodes, is_head=True, is_open=False).count({"GPU": 1}) == expected
