"""How many training workers a cluster can run."""

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


def test_a_worker_needs_one_gpu_or_one_cpu() -> None:
    assert get_worker_needs(build_settings()) == {"GPU": 1}
    assert get_worker_needs(build_settings(use_gpu=False)) == {"CPU": 1}


def test_the_requested_number_is_returned_if_the_cluster_can_provide_it() -> None:
    assert place_workers(build_settings(num_train_workers=3), GROWING) == 3


def test_an_elastic_run_requests_at_most_what_the_cluster_can_provide() -> None:
    """Otherwise Ray's autoscaler would add no node at all."""
    assert place_workers(build_settings(num_train_workers=8, min_train_workers=2), GROWING) == 3


@pytest.mark.parametrize(
    ("settings", "capacity", "message"),
    [
        (
            {"num_train_workers": 4},
            GROWING,
            "train.num_train_workers: requested 4 training workers with 1 GPU each",
        ),
        (
            {"num_train_workers": 8, "min_train_workers": 4},
            GROWING,
            "train.min_train_workers: requested 4 training workers",
        ),
        (
            {},
            Capacity(({"CPU": 8},)),
            "but at most 0 can be placed: the cluster has 8 CPU, 0 GPU on 1 node",
        ),
        ({}, Capacity(({"CPU": 0, "GPU": 4},)), "train: requested 1 label check with 1 CPU, but at most 0 can"),
    ],
)
def test_an_impossible_request_is_an_error(settings: dict[str, int], capacity: Capacity, message: str) -> None:
    with pytest.raises(ClusterError, match=re.escape(message)):
        place_workers(build_settings(**settings), capacity)
