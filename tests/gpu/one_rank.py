"""Run one training rank on a given device without a Ray cluster, in Ray Train's local mode."""

import math
import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import repeat
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import ray.train
import ray.train.torch
import torch

from segray.config import ModelConfig, TrainConfig
from segray.data.preprocessing import Preprocessing
from segray.data.sample_list import Sample, Splits
from segray.data.synthetic import draw_shape
from segray.training.job import TrainJob, get_classes
from segray.training.progress_board import ProgressBoard
from segray.training.watchdog import Heartbeat
from segray.training.worker.feed import TrainBatch
from segray.training.worker.loop import read_results, train_steps
from segray.training.worker.state import Trainer, set_up
from segray.training.worker.steps import train_step

IMAGE_SIDE = 64
MODEL = ModelConfig(arch="classic_unet", widths=(8, 16))
BATCH_SIZE = 4
STALL_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Trained:
    """The result of training on one rank, in types that can be sent to another process.

    Attributes:
        losses: Loss of each step.
        weights: State dict of the model, as in a checkpoint.
        precision: Number format that the rank computed in.
        logits_dtype: Data type of the network's output in the last step.
        loss_scale: Scale of the gradient scaler after the last step; 1 unless in fp16.
        device_type: Device type of the weights.
        kinds: Class names of the replica and of all modules of the model, in this order.
    """

    losses: list[float]
    weights: dict[str, npt.NDArray[Any]]
    precision: str
    logits_dtype: str
    loss_scale: float
    device_type: str
    kinds: list[str]


class LocalActor:
    """Gives an object the interface of a Ray actor: ``actor.method.remote(…)`` calls the method at once."""

    def __init__(self, instance: object, on_text: Callable[[str], None] = lambda text: None) -> None:
        self._instance = instance
        self._on_text = on_text

    def __getattr__(self, name: str) -> SimpleNamespace:
        def call(*arguments: Any) -> Any:
            result = getattr(self._instance, name)(*arguments)
            if isinstance(result, str):
                self._on_text(result)
            return result

        return SimpleNamespace(remote=call)


def draw_images(num_images: int, side: int = IMAGE_SIDE, first_seed: int = 0) -> list[npt.NDArray[np.uint8]]:
    """Return images (side, side, 3) uint8 of drawn shapes."""
    return [np.asarray(draw_shape(first_seed + number, side)[0]) for number in range(num_images)]


def draw_batch() -> TrainBatch:
    """Return images of drawn shapes and their truth as class indices."""
    shapes = [draw_shape(seed, IMAGE_SIDE) for seed in range(BATCH_SIZE)]
    images = np.stack([np.asarray(image) for image, _ in shapes])
    truth = np.stack([np.asarray(trimap) - 1 for _, trimap in shapes])  # Trimap values 1, 2, 3 are classes 0, 1, 2.
    return TrainBatch(
        torch.from_numpy(images), torch.from_numpy(truth.astype(np.uint8)), [str(seed) for seed in range(BATCH_SIZE)]
    )


def _build_job(folder: Path, num_steps: int, model: ModelConfig, settings: dict[str, Any]) -> TrainJob:
    """Build the job of a run with one step per epoch; its samples are never read."""
    train = {"num_epochs": num_steps, "global_batch_size": BATCH_SIZE, "learning_rate": 0.01, **settings}
    config = TrainConfig.model_validate(
        {
            "data": {"layout": {"oxford_iiit_pet": {"root": str(folder)}}},
            "image_size": [IMAGE_SIDE, IMAGE_SIDE],
            "model": model.model_dump(),
            "train": train,
            "output": str(folder),
        }
    )
    samples = [Sample(f"image {number}", f"mask {number}") for number in range(BATCH_SIZE)]
    board = LocalActor(ProgressBoard(STALL_TIMEOUT_S))
    return TrainJob(config, get_classes(config), Splits(samples, []), Preprocessing(), None, str(folder), board=board)


def run_as_rank(device: torch.device, act: Callable[[], None], *, group: bool = False) -> None:
    """Call a function in the context of a Ray Train worker, but in this process.

    Args:
        device: The device that Ray Train assigns to the rank.
        act: The function.
        group: Whether to create a process group of one rank: with NCCL if CUDA is available, else with Gloo.
    """
    environment: AbstractContextManager[Any] = nullcontext()
    if group:
        ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_find_free_port())}
        environment = mock.patch.dict(os.environ, ranks | address)
    scaling = ray.train.ScalingConfig(num_workers=0)  # Zero workers select the local mode.
    trainer = ray.train.torch.TorchTrainer(lambda _: act(), train_loop_config={}, scaling_config=scaling)
    # One thread: the network is tiny, and threads that share cores with other processes wait for each other.
    one_core = mock.patch("segray.training.worker.device.count_cores", return_value=1)
    with environment, one_core, mock.patch("ray.train.torch.get_device", return_value=device):
        trainer.fit()


def _find_free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def train(
    device: torch.device,
    folder: Path,
    *,
    num_steps: int = 8,
    model: ModelConfig = MODEL,
    group: bool = False,
    **settings: Any,
) -> Trained:
    """Train on one batch of drawn shapes with the objects that a worker sets up.

    Args:
        device: Where to train.
        folder: The folder that is searched for checkpoints; it has none.
        num_steps: Steps of the whole run.
        model: The network.
        group: Whether the rank is in a process group of one.
        settings: Settings of the section ``train`` that differ from the defaults.
    """
    job = _build_job(folder, num_steps, model, settings)
    trained: list[Trained] = []

    def act() -> None:
        trainer = set_up(job, Heartbeat(job.board, 0, STALL_TIMEOUT_S))
        dtypes: list[torch.dtype] = []
        trainer.model.network.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        trainer.learner.replica.train()
        batch, losses = draw_batch(), []
        for _ in range(num_steps):
            losses.append(train_step(trainer.learner, [batch], lambda stage: None)[0].item())
            trainer.schedule.step()
        trained.append(_describe(trainer, losses, dtypes[-1]))

    run_as_rank(device, act, group=group)
    return trained[0]


def train_without_waiting(device: torch.device, folder: Path, num_steps: int = 4, **settings: Any) -> list[float]:
    """Train on one pinned batch; return the losses.

    Whatever makes the host wait for a GPU raises an error, except in the first step, which loads libraries.
    """
    job = _build_job(folder, num_steps, MODEL, settings)
    losses: list[float] = []

    def act() -> None:
        trainer = set_up(job, Heartbeat(job.board, 0, STALL_TIMEOUT_S))
        trainer.learner.replica.train()
        drawn = draw_batch()
        batch = replace(drawn, images=drawn.images.pin_memory(), truth=drawn.truth.pin_memory())
        steps = train_steps(trainer, repeat([batch]), num_steps)
        next(steps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in steps:
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")
        read_results(trainer)
        losses.extend(trainer.epoch_losses)

    run_as_rank(device, act)
    return losses


def _describe(trainer: Trainer, losses: list[float], logits_dtype: torch.dtype) -> Trained:
    state = trainer.gather_state()
    assert state is not None
    return Trained(
        losses=losses,
        weights={name: value.numpy() for name, value in state.model.items()},
        precision=trainer.learner.precision,
        logits_dtype=str(logits_dtype).removeprefix("torch."),
        loss_scale=trainer.learner.scaler.get_scale(),
        device_type=next(trainer.model.parameters()).device.type,
        kinds=[type(module).__name__ for module in (trainer.learner.replica, *trainer.model.modules())],
    )


def measure_distance(weights: dict[str, npt.NDArray[Any]], other: dict[str, npt.NDArray[Any]]) -> float:
    """Return the Euclidean distance of two models' weights and statistics."""
    assert list(weights) == list(other)
    return math.hypot(*(float(np.linalg.norm(weights[name] - other[name].astype(np.float64))) for name in other))


def start_process(
    device: torch.device, act: Callable[..., None], *arguments: Any
) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """Start a process that calls a function with the sending end of a pipe, then the arguments; return both.

    The process shares no state of CUDA or OpenMP with this one. On a CPU it is forked from a server that has imported
    the function's module, which saves time. CUDA cannot be used after a fork, and an import may initialise it.
    """
    context: SpawnContext | ForkServerContext
    if device.type == "cuda":
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([act.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=act, args=(sender, *arguments), daemon=True)
    process.start()
    sender.close()
    return process, receiver


def train_in_process(device: torch.device, runs: list[dict[str, Any]], folder: Path, timeout_s: float) -> list[Trained]:
    """Call ``train`` once for each of ``runs``, in one new process; fail the test if that process crashes or hangs."""
    process, receiver = start_process(device, _train_all, device, runs, folder)
    try:
        if not receiver.poll(timeout_s):
            pytest.fail(f"no result after {timeout_s:g} s")
        trained: list[Trained] | str = receiver.recv()
    except EOFError:
        process.join()
        pytest.fail(f"the process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
    if isinstance(trained, str):
        pytest.fail(trained)
    return trained


def _train_all(sender: Connection, device: torch.device, runs: list[dict[str, Any]], folder: Path) -> None:
    import traceback

    try:
        sender.send([train(device, folder, **run) for run in runs])
    except Exception:
        sender.send(traceback.format_exc())
