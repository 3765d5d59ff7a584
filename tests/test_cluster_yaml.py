"""cluster.yaml: accepted by Ray's own check, and nothing in it open to the world."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

PATH = Path(__file__).parent.parent / "cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(PATH.read_text())
    return values


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types[prepared["head_node_type"]]["max_workers"] == 0
    assert (types["gpu_worker"]["min_workers"], types["gpu_worker"]["max_workers"]) == (0, 8)


def test_ray_would_refuse_a_mistake(config: dict[str, Any]) -> None:
    config["head_node_type"] = "nothing"
    with pytest.raises(Exception, match="head_node_type"):
        validate_config(prepare_config(config))


def test_nothing_is_open_to_the_world(config: dict[str, Any]) -> None:
    assert "0.0.0.0" not in PATH.read_text()
    assert config["provider"]["use_internal_ips"] is True
    for node_type in config["available_node_types"].values():
        node = node_type["node_config"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["SecurityGroupIds"]  # without, Ray makes a group that admits SSH from everywhere
        assert node["IamInstanceProfile"]  # without, Ray makes one that may do everything with EC2 and S3
    head, worker = (config["available_node_types"][name]["node_config"] for name in ("head", "gpu_worker"))
    assert head["IamInstanceProfile"] != worker["IamInstanceProfile"]
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = next(command for command in config[name] if "ray start" in command)
        assert start.startswith("RAY_AUTH_MODE=token ")
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
