"""How many training workers a cluster can have."""

import re

import pytest

from segray.config.training import TrainSettings
from segray.errors import ClusterError
from segray.runtime.capacity import Capacity, NodeType
from segray.training.placement import get_worker_needs, place_workers

HEAD = {"CPU": 0.0}
GPU_NODES = NodeType("gpu", {"CPU": 8, "GPU": 1}, 3)
GROWING = Capacity((HEAD,), (GPU_NODES,), num_more=3)


def build_settings(**settings: object) -> TrainSettings:
    return TrainSettings.model_validate({"num_epochs": 1, "global_batch_size": 24, "use_gpu": True, **settings})


def test_a_worker_is_a_gpu_or_a_cpu() -> None:
    assert get_worker_needs(build_settings()) == {"GPU": 1}
    assert get_worker_needs(build_settings(use_gpu=False)) == {"CPU": 1}


def test_as_many_as_asked_for_where_there_can_be() -> None:
    assert place_workers(build_settings(num_train_workers=3), GROWING) == 3


def test_an_elastic_run_asks_for_no_more_than_there_can_be() -> None:
    """Ray's autoscaler would add none at all."""
    assert place_workers(build_settings(num_train_workers=8, min_train_workers=2), GROWING) == 3


@pytest.mark.parametrize(
    ("settings", "capacity", "message"),
    [
        (
            {"num_train_workers": 4},
            GROWING,
            "train.num_train_workers: 4 training workers of 1 GPU each asked for",
        ),
        ({"num_train_workers": 8, "min_train_workers": 4}, GROWING, "train.min_train_workers: 4 training workers"),
        (
            {},
            Capacity(({"CPU": 8},)),
            "and 0 can ever be placed: the cluster has 8 CPU, 0 GPU on 1 node",
        ),
        ({}, Capacity(({"CPU": 0, "GPU": 4},)), "train: 1 label check of 1 CPU each asked for, and 0 can"),
    ],
)
def test_what_can_never_be_placed_is_refused(settings: dict[str, int], capacity: Capacity, message: str) -> None:
    with pytest.raises(ClusterError, match=re.escape(message)):
        place_workers(build_settings(**settings), capacity)
