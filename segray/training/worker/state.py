"""A rank's objects, alive from set-up to the last step, and their state as it goes into a checkpoint and out of it."""

import os
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import distributed
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

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of all ranks' parts, on rank 0


@dataclass
class Trainer:
    """One rank's objects.

    Attributes:
        poster: Where rank 0 shows progress; None on other ranks.
        learning_rate: Highest of the parameter groups in the last step.
        num_steps_done: Steps of the whole run so far.
        epoch_losses: Losses of the steps of the epoch that was begun.
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
        """Steps in which every sample is seen once."""
        return compute_num_steps(len(self.job.splits.train), self.job.config.train.global_batch_size)

    def gather_state(self) -> TrainingState | None:
        """Return the state of the run on rank 0, and None on the others; all ranks must call it."""
        model = get_model_state_dict(self.model, options=_WHOLE)
        optimizer = get_optimizer_state_dict(self.model, self.learner.optimizer, options=_WHOLE)
        average = None
        if self.average:
            with self.average.in_place():  # copied in here: on a CPU it is the model's own memory
                average = _copy(get_model_state_dict(self.model, options=_WHOLE))
        if self.world_rank != 0:
            return None
        return TrainingState(
            num_steps_done=self.num_steps_done,
            model=_copy(model),
            optimizer=_copy(optimizer),
            schedule=self.schedule.state_dict(),
            scaler=self.learner.scaler.state_dict(),
            average=average,
            epoch_losses=list(self.epoch_losses),
            history=list(self.history),
        )


def _copy(value: Any) -> Any:
    """Copy tensors: those on a CPU are the run's own, which go on changing while they are uploaded.

    The copies are contiguous, so that the thread that uploads them need not move a value: an operation of torch in a
    second thread starts OpenMP threads of its own, and where there are more of these than cores, all of them go to
    sleep at every barrier for as long as the process lives. Training then took half as long again.
    """
    if isinstance(value, torch.Tensor):
        return value.clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {name: _copy(inner) for name, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def set_up(job: TrainJob, heartbeat: Heartbeat) -> Trainer:
    """Build a rank's objects, with the newest whole checkpoint in them if there is one."""
    config, settings = job.config, job.config.train
    context = ray.train.get_context()
    world_rank = context.get_world_rank()
    poster = ProgressPoster(job.board) if world_rank == 0 else None
    if poster and context.get_world_size() < settings.num_train_workers:
        poster.post_line(f"training on {context.get_world_size()} of {settings.num_train_workers} workers")
    device = ray.train.torch.get_device()
    _prepare_arithmetic(settings.deterministic, device, context.get_local_world_size())
    torch.manual_seed(settings.seed)  # the same first weights on every rank
    heartbeat.move(0, "setting up")
    model = build_model(config.model, job.classes.num_classes)  # which may fetch the encoder's weights
    heartbeat.move(0, "setting up")
    replica = build_replica(model, settings, device)
    heartbeat.move(0, "setting up")
    optimizer = build_optimizer(model, settings)
    num_steps = compute_num_steps(len(job.splits.train), settings.global_batch_size) * settings.num_epochs
    schedule = build_schedule(optimizer, settings, num_steps)
    precision = _agree_on_precision(settings.precision, device, poster)
    learner = Learner(
        replica=replica,
        loss=SegmentationLoss(config.loss, job.classes.ignore_index, job.class_weights),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        preprocessing=job.preprocessing,
        device=device,
        precision=precision,
        max_gradient_norm=settings.max_gradient_norm,
    )
    average = WeightAverage(model, settings.ema_decay) if settings.ema_decay else None
    found = _find_newest_state_together(job, poster, device)
    heartbeat.move(found.num_steps_done if found else 0, "setting up")
    if found:
        take_up(found, model, learner, schedule, average)
    return Trainer(
        job=job,
        world_rank=world_rank,
        world_size=context.get_world_size(),
        model=model,
        learner=learner,
        schedule=schedule,
        average=average,
        learning_rate=get_highest_rate(optimizer),
        store=SampleStore(job.classes, settings.cache_bytes, settings.cache_disk_bytes),
        augmentation=Augmentation(config.augmentation, config.image_size, job.classes.ignore_index),
        heartbeat=heartbeat,
        poster=poster,
        num_steps_done=found.num_steps_done if found else 0,
        epoch_losses=list(found.epoch_losses) if found else [],
        history=list(found.history) if found else [],
    )


def _prepare_arithmetic(deterministic: bool, device: torch.device, num_ranks_here: int) -> None:
    if device.type == "cpu":  # the workers of a node share its cores
        torch.set_num_threads(max(1, count_cores() // num_ranks_here))
        return
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when the first matrix is multiplied
        torch.use_deterministic_algorithms(True, warn_only=True)


def _agree_on_precision(precision: str, device: torch.device, poster: ProgressPoster | None) -> str:
    """Return ``bf16`` where it was asked for and pays on every rank; all ranks compute in the same."""
    if precision != "bf16":
        return precision
    can = torch.tensor(int(has_bf16(device)), device=device)
    if distributed.is_initialized():
        distributed.all_reduce(can, distributed.ReduceOp.MIN)
    if not can.item() and poster:
        poster.post_line("no bf16 on every worker's processor: training in fp32")
    return "bf16" if can.item() else "fp32"


def _find_newest_state_together(
    job: TrainJob, poster: ProgressPoster | None, device: torch.device
) -> TrainingState | None:
    """Let rank 0 choose the checkpoint, so that all ranks go on from the same one."""
    found = None
    if poster:
        found = find_newest_state(job.run_uri, poster.post_line)
        if found:
            poster.post_line(f"going on after {_describe_place(found[1])}, from {found[0]}")
            poster.post_epochs(found[1].history)
    chosen = [found[0] if found else None]
    if distributed.is_initialized():
        distributed.broadcast_object_list(chosen, src=0, device=device)
    if chosen[0] is None:
        return None
    return found[1] if found else load_state(chosen[0])


def _describe_place(state: TrainingState) -> str:
    if state.epoch_losses:
        return f"step {state.num_steps_done}"
    return f"epoch {len(state.history)}"


def take_up(
    state: TrainingState,
    model: SegmentationModel,
    learner: Learner,
    schedule: LRScheduler,
    average: WeightAverage | None,
) -> None:
    """Put a checkpoint's state into a rank's objects."""
    if average and state.average:
        set_model_state_dict(model, dict(state.average), options=_WHOLE)
        average.restart(state.num_steps_done)
    set_model_state_dict(model, dict(state.model), options=_WHOLE)
    if state.optimizer["state"]:
        set_optimizer_state_dict(model, learner.optimizer, state.optimizer, options=_WHOLE)
    else:  # SGD without momentum remembers nothing, which torch's function does not expect
        for group, saved in zip(learner.optimizer.param_groups, state.optimizer["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
    schedule.load_state_dict(state.schedule)
    learner.scaler.load_state_dict(state.scaler)
