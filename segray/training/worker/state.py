"""Build the objects that a rank trains with, gather their state for a checkpoint, and restore it."""

import os
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LRScheduler

from segray.data.augmentation import Augmentation
from segray.models.build import SegmentationModel, build_model
from segray.models.losses import SegmentationLoss
from segray.models.precision import has_bf16
from segray.runtime.connect import count_cores
from segray.training.checkpoint import TrainingState, find_newest_state, load_state
from segray.training.job import TrainJob
from segray.training.progress_board import ProgressPoster
from segray.training.watchdog import Heartbeat
from segray.training.worker.feed import compute_num_steps
from segray.training.worker.optimisation import WeightAverage, build_optimizer, build_schedule, get_highest_rate
from segray.training.worker.replica import build_replica
from segray.training.worker.sample_store import SampleStore
from segray.training.worker.steps import Learner

# Collects the full state of sharded models in the memory of rank 0.
_FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class Trainer:
    """The objects that one rank trains with, and its progress.

    Attributes:
        job: The job description.
        world_rank: Rank of this process, from 0.
        world_size: Number of ranks.
        model: The model, prepared for training.
        learner: Model, loss and optimizer for ``train_step``.
        schedule: The learning-rate schedule.
        average: The moving average of the weights, or None.
        learning_rate: Highest learning rate of the parameter groups in the last step.
        store: Loads and caches samples.
        augmentation: Random changes of training samples.
        heartbeat: Reports the rank's step and stage for stall detection.
        poster: Posts progress to the terminal; None on ranks other than 0.
        num_steps_done: Training steps completed since the start of the run.
        epoch_losses: Losses of the steps so far of the current epoch.
        history: Metrics of each finished epoch.
    """

    job: TrainJob
    world_rank: int
    world_size: int
    model: SegmentationModel
    learner: Learner
    schedule: LRScheduler
    average: WeightAverage | None
    learning_rate: float
    store: SampleStore
    augmentation: Augmentation
    heartbeat: Heartbeat
    poster: ProgressPoster | None
    num_steps_done: int
    epoch_losses: list[float]
    history: list[dict[str, Any]]

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in an epoch; see ``compute_num_steps``."""
        return compute_num_steps(len(self.job.splits.train), self.job.config.train.global_batch_size)

    def gather_state(self) -> TrainingState | None:
        """Return the state of the run on rank 0, and None on the others; collective, so all ranks must call it."""
        model = get_model_state_dict(self.model, options=_FULL_STATE)
        optimizer = get_optimizer_state_dict(self.model, self.learner.optimizer, options=_FULL_STATE)
        average = None
        if self.average:
            with self.average.applied():  # Copied inside the block: on CPUs the state dict shares the model's memory.
                average = _copy_tensors(get_model_state_dict(self.model, options=_FULL_STATE))
        if self.world_rank != 0:
            return None
        return TrainingState(
            num_steps_done=self.num_steps_done,
            model=_copy_tensors(model),
            optimizer=_copy_tensors(optimizer),
            schedule=self.schedule.state_dict(),
            scaler=self.learner.scaler.state_dict(),
            average=average,
            epoch_losses=list(self.epoch_losses),
            history=list(self.history),
        )


def _copy_tensors(value: Any) -> Any:
    """Copy all tensors in nested dicts and lists; on CPUs they share the run's memory, which changes during an upload.

    The copies are contiguous, so that the upload thread calls no torch operation on them. A torch operation in a second
    thread starts another set of OpenMP threads. If there are then more OpenMP threads than cores, all of them sleep at
    every barrier for the rest of the process's life, and training took 1.5 times as long (measured).
    """
    if isinstance(value, torch.Tensor):
        return value.clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {name: _copy_tensors(inner) for name, inner in value.items()}
    return [_copy_tensors(inner) for inner in value] if isinstance(value, list) else value


def set_up(job: TrainJob, heartbeat: Heartbeat) -> Trainer:
    """Build a rank's objects, and restore the newest intact checkpoint if there is one."""
    config, settings = job.config, job.config.train
    context = ray.train.get_context()
    world_rank = context.get_world_rank()
    poster = ProgressPoster(job.board) if world_rank == 0 else None
    if poster and context.get_world_size() < settings.num_train_workers:
        poster.post_line(f"training on {context.get_world_size()} of {settings.num_train_workers} workers")
    device = ray.train.torch.get_device()
    _configure_torch(settings.deterministic, device, context.get_local_world_size())
    torch.manual_seed(settings.seed)  # For the same initial weights on every rank.
    heartbeat.update(0, "setting up")
    # May download the encoder's weights.
    model = build_model(config.model, job.classes.num_classes, config.image_size)
    heartbeat.update(0, "setting up")
    replica = build_replica(model, settings, device)
    heartbeat.update(0, "setting up")
    learner = _build_learner(job, model, replica, device, poster)
    num_steps = compute_num_steps(len(job.splits.train), settings.global_batch_size) * settings.num_epochs
    schedule = build_schedule(learner.optimizer, settings, num_steps)
    average = WeightAverage(model, settings.ema_decay) if settings.ema_decay else None
    found = _load_newest_state(job, poster, device)
    heartbeat.update(found.num_steps_done if found else 0, "setting up")
    if found:
        restore_state(found, model, learner, schedule, average)
    return Trainer(
        job=job,
        world_rank=world_rank,
        world_size=context.get_world_size(),
        model=model,
        learner=learner,
        schedule=schedule,
        average=average,
        learning_rate=get_highest_rate(learner.optimizer),
        store=SampleStore(job.classes, settings.cache_bytes, settings.cache_disk_bytes),
        augmentation=Augmentation(config.augmentation, config.image_size, job.classes.ignore_index),
        heartbeat=heartbeat,
        poster=poster,
        num_steps_done=found.num_steps_done if found else 0,
        epoch_losses=list(found.epoch_losses) if found else [],
        history=list(found.history) if found else [],
    )


def _build_learner(
    job: TrainJob, model: SegmentationModel, replica: nn.Module, device: torch.device, poster: ProgressPoster | None
) -> Learner:
    settings = job.config.train
    optimizer = build_optimizer(model, settings)
    precision = _resolve_precision(settings.precision, device, poster)
    return Learner(
        replica=replica,
        loss=SegmentationLoss(job.config.loss, job.classes.ignore_index, job.class_weights),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        preprocessing=job.preprocessing,
        device=device,
        precision=precision,
        max_gradient_norm=settings.max_gradient_norm,
    )


def _configure_torch(deterministic: bool, device: torch.device, num_local_ranks: int) -> None:
    """Set the number of CPU threads, or the determinism of GPU kernels, for this process."""
    if device.type == "cpu":  # The workers of a node share its cores.
        torch.set_num_threads(max(1, count_cores() // num_local_ranks))
        return
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # Read at the first matrix multiplication.
        torch.use_deterministic_algorithms(True, warn_only=True)


def _resolve_precision(precision: str, device: torch.device, poster: ProgressPoster | None) -> str:
    """Return the precision to train in, the same on all ranks: fp32 instead of bf16 if a rank lacks native bf16."""
    if precision != "bf16":
        return precision
    supported = torch.tensor(int(has_bf16(device)), device=device)
    if distributed.is_initialized():
        distributed.all_reduce(supported, distributed.ReduceOp.MIN)
    if not supported.item() and poster:
        poster.post_line("bf16 is not supported natively on every worker; training in fp32")
    return "bf16" if supported.item() else "fp32"


def _load_newest_state(job: TrainJob, poster: ProgressPoster | None, device: torch.device) -> TrainingState | None:
    """Return the newest intact checkpoint, or None; rank 0 chooses it, so that all ranks load the same one."""
    found = None
    if poster:
        found = find_newest_state(job.run_uri, poster.post_line)
        if found:
            poster.post_line(f"resuming after {_describe_progress(found[1])}, from {found[0]}")
            poster.post_epochs(found[1].history)
    chosen = [found[0] if found else None]
    if distributed.is_initialized():
        distributed.broadcast_object_list(chosen, src=0, device=device)
    if chosen[0] is None:
        return None
    return found[1] if found else load_state(chosen[0])


def _describe_progress(state: TrainingState) -> str:
    if state.epoch_losses:
        return f"step {state.num_steps_done}"
    return f"epoch {len(state.history)}"


def restore_state(
    state: TrainingState,
    model: SegmentationModel,
    learner: Learner,
    schedule: LRScheduler,
    average: WeightAverage | None,
) -> None:
    """Load the state of a checkpoint into a rank's objects, in place."""
    if average and state.average:
        set_model_state_dict(model, dict(state.average), options=_FULL_STATE)
        average.reset(state.num_steps_done)
    set_model_state_dict(model, dict(state.model), options=_FULL_STATE)
    if state.optimizer["state"]:
        set_optimizer_state_dict(model, learner.optimizer, state.optimizer, options=_FULL_STATE)
    else:  # SGD without momentum has no state, which set_optimizer_state_dict does not expect.
        for group, saved in zip(learner.optimizer.param_groups, state.optimizer["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
    schedule.load_state_dict(state.schedule)
    learner.scaler.load_state_dict(state.scaler)
