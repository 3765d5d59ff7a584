"""Tests that need a process of their own: reproducible arithmetic, a process group of one rank, a stalled rank."""

import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import nn

from segray.config import ModelConfig
from segray.training.progress_board import ProgressBoard
from segray.training.watchdog import Heartbeat
from segray.training.worker.steps import train_step
from tests.gpu.one_rank import LocalActor, Trained, draw_batch, measure_distance, start_process, train_in_process
from tests.training.worker.learner import make_learner

pytestmark = pytest.mark.gpu
NUM_STEPS = 4
TIMEOUT_S = 120.0
STALLED_STEP = 2
STALL_S = 90


@pytest.mark.parametrize(
    "model",
    [{"arch": "classic_unet", "widths": (8, 16)}, {"arch": "unet", "encoder_name": "resnet18"}],
    ids=lambda model: str(model["arch"]),
)
def test_deterministic_training_gives_the_same_bits_twice(
    model: dict[str, object], device: torch.device, tmp_path: Path
) -> None:
    run = {"num_steps": NUM_STEPS, "model": ModelConfig.model_validate(model), "deterministic": True}
    first, second = train_in_process(device, [run, run], tmp_path, TIMEOUT_S)
    different = [name for name, value in first.weights.items() if not np.array_equal(value, second.weights[name])]
    assert not different
    assert first.losses == second.losses


@pytest.fixture(scope="module")
def in_group(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Results of one rank without a process group, and of the same rank in a group, with settings that need one."""
    settings: dict[str, dict[str, Any]] = {
        "alone": {},
        "sync_batchnorm": {"sync_batchnorm": True},
        "fsdp": {"sharding": "fsdp"},
    }
    runs = [
        {"num_steps": NUM_STEPS, "precision": "fp32", "optimizer": "sgd", "group": name != "alone", **one}
        for name, one in settings.items()
    ]
    trained = train_in_process(device, runs, tmp_path_factory.mktemp("group"), TIMEOUT_S)
    return dict(zip(settings, trained, strict=True))


@pytest.mark.parametrize("setting", ["sync_batchnorm", "fsdp"])
def test_one_rank_in_a_group_trains_as_it_does_alone(setting: str, in_group: dict[str, Trained]) -> None:
    alone, grouped = in_group["alone"], in_group[setting]
    assert grouped.losses == pytest.approx(alone.losses, rel=1e-2)
    # Names and shapes are the same, so that checkpoints are interchangeable.
    distance = measure_distance(grouped.weights, alone.weights)
    assert distance < 0.02 * measure_distance(alone.weights, {name: 0 * value for name, value in alone.weights.items()})


def test_the_group_uses_the_modules_of_the_device(in_group: dict[str, Trained], device: torch.device) -> None:
    norm = "SyncBatchNorm" if device.type == "cuda" else "GlobalBatchNorm2d"
    assert norm in in_group["sync_batchnorm"].kinds
    assert "BatchNorm2d" not in in_group["sync_batchnorm"].kinds
    assert in_group["fsdp"].kinds[0] == "FSDPSegmentationModel"


def test_a_stalled_rank_is_named_and_its_process_ends(device: torch.device) -> None:
    process, receiver = start_process(device, _stall, device)
    try:
        assert receiver.poll(TIMEOUT_S), "the watchdog did not report a stall"
        diagnosis = receiver.recv()
        process.join(STALL_S / 3)
    finally:
        process.kill()
        process.join()
    assert "rank 0 in step 3 (forward)" in diagnosis
    assert process.exitcode == 1


def _stall(sender: Connection, device: torch.device) -> None:
    """Train until a forward pass hangs: on a GPU in a kernel that keeps running, on a CPU in a sleeping thread."""
    ray.get = lambda reference, timeout=None: reference  # The board is in this process.
    heartbeat = Heartbeat(LocalActor(ProgressBoard(2.0), sender.send), 0, 2.0)
    network = nn.Conv2d(3, 3, 1).to(device)
    learner = make_learner(network, device=device)
    batch = draw_batch()
    train_step(learner, [batch], lambda stage: None)  # Loading CUDA libraries may exceed the timeout.
    heartbeat.start()
    for step in range(STALLED_STEP + 1):
        if step == STALLED_STEP:
            network.register_forward_hook(lambda module, inputs, output: _hang(device))
        heartbeat.update(step, "loading")
        train_step(learner, [batch], partial(heartbeat.update, step))


def _hang(device: torch.device) -> None:
    if device.type == "cuda":
        cycles = STALL_S * 2_000_000_000  # At about 2 GHz.
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    else:
        time.sleep(STALL_S)
