"""Build the objects that a rank trains with, and gather their state for a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LRScheduler

from segray.config import TrainSettings
from segray.data.augmentation import Augmentation
from segray.models.build import SegmentationModel, build_model
from segray.models.losses import SegmentationLoss
from segray.training.checkpoint import TrainingState
from segray.training.job import TrainJob
from segray.training.phases import Phase, add_phase, describe_phases, have_same_schedule
from segray.training.pretrained import WeightsError, load_pretrained
from segray.training.progress_board import ProgressPoster
from segray.training.watchdog import Heartbeat
from segray.training.worker.device import configure_torch, resolve_precision
from segray.training.worker.feed import compute_num_parts
from segray.training.worker.optimisation import (
    WeightAverage,
    advance_schedule,
    build_optimizer,
    build_schedule,
    get_highest_rate,
    get_local,
    load_schedule,
)
from segray.training.worker.replica import build_replica
from segray.training.worker.restore import FULL_STATE, find_rows, gather, load_newest_state, restore_state
from segray.training.worker.sample_store import SampleStore
from segray.training.worker.steps import Learner


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
        epoch_losses: Losses of the steps so far of the current epoch, NaN for a skipped step.
        history: Metrics of each finished epoch.
        num_skipped: Steps that were skipped in a row before the next one.
        phases: Settings that changed during the run.
        unread: Results of the steps since the host last waited for the device, (2,) each; see ``train_step``.
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
    num_skipped: int
    phases: list[Phase]
    unread: list[torch.Tensor] = field(default_factory=list)

    @property
    def num_parts(self) -> int:
        """The number of forward and backward passes per step; see ``compute_num_parts``."""
        settings = self.job.config.train
        return compute_num_parts(settings.global_batch_size, settings.micro_batch_size, self.world_size)

    @property
    def saves_state(self) -> bool:
        """Whether this rank writes a part of each checkpoint: rank 0, and every rank of a sharded model."""
        return self.world_rank == 0 or isinstance(self.model, FSDPModule)

    def gather_state(self) -> TrainingState | None:
        """Return what this rank saves of the state of the run, or None; collective, so all ranks must call it.

        Of a sharded model every rank saves its own rows; of other models rank 0 saves everything.
        """
        rows = find_rows(self.model)
        options = None if rows else FULL_STATE
        model = get_model_state_dict(self.model, options=options)
        optimizer = get_optimizer_state_dict(self.model, self.learner.optimizer, options=options)
        average = None
        if self.average:
            with self.average.applied():  # Copied inside the block: on CPUs the state dict shares the model's memory.
                average = _copy_tensors(get_model_state_dict(self.model, options=options))
        if not self.saves_state:
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
            num_skipped=self.num_skipped,
            phases=self.phases,
            rows=rows,
        )


def _copy_tensors(value: Any) -> Any:
    """Copy all tensors in nested dicts and lists; on CPUs they share the run's memory, which changes during an upload.

    Of a sharded tensor, this rank's rows are copied.

    The copies are contiguous, so that the upload thread calls no torch operation on them. A torch operation in a second
    thread starts another set of OpenMP threads. If there are then more OpenMP threads than cores, all of them sleep at
    every barrier for the rest of the process's life, and training took 1.5 times as long (measured).
    """
    if isinstance(value, torch.Tensor):
        return get_local(value).to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {name: _copy_tensors(inner) for name, inner in value.items()}
    return [_copy_tensors(inner) for inner in value] if isinstance(value, list) else value


def set_up(job: TrainJob, heartbeat: Heartbeat) -> Trainer:
    """Build a rank's objects, and restore the newest intact checkpoint if there is one.

    Raises:
        WeightsError: A rank cannot read the weights to start from; raised on every rank.
        SegrayError: A setting is wrong, or the checkpoints cannot be read.
    """
    config, settings = job.config, job.config.train
    context = ray.train.get_context()
    world_rank = context.get_world_rank()
    poster = ProgressPoster(job.board) if world_rank == 0 else None
    if poster and context.get_world_size() < settings.num_train_workers:
        poster.post_line(describe_shortage(settings, context.get_world_size()))
    device = ray.train.torch.get_device()
    configure_torch(settings.deterministic, device, context.get_local_world_size())
    torch.manual_seed(settings.seed)  # For the same initial weights on every rank.
    announce = partial(heartbeat.update, 0, "setting up")
    announce()
    without_weights = config.model.model_copy(update={"encoder_weights": None})
    model = build_model(without_weights, job.classes.num_classes, config.image_size)
    problem = None
    try:
        load_pretrained(config, model)  # Before it is sharded, when no checkpoint can be read yet.
    except WeightsError as error:
        problem = error
    announce()
    precision = resolve_precision(settings.precision, device, poster)
    replica = build_replica(model, settings, device, precision)
    announce()
    learner = _build_learner(job, model, replica, device, precision)
    average = WeightAverage(model, settings.ema_decay) if settings.ema_decay else None
    found = load_newest_state(job.run_uri, poster, device, find_rows(model), announce)
    problems = [other for other in gather(problem) if other]
    if problems and not found:  # A checkpoint has all weights.
        raise problems[0]
    heartbeat.update(found.num_steps_done if found else 0, "setting up")
    if found:
        restore_state(found, model, learner, average)
    phases = _list_phases(job, found, context.get_world_size(), poster)
    return Trainer(
        job=job,
        world_rank=world_rank,
        world_size=context.get_world_size(),
        model=model,
        learner=learner,
        schedule=_build_schedule(job, learner.optimizer, found, phases),
        average=average,
        learning_rate=get_highest_rate(learner.optimizer),
        store=_build_store(job, context.get_node_rank()),
        augmentation=Augmentation(config.augmentation, config.image_size, job.classes.ignore_index),
        heartbeat=heartbeat,
        poster=poster,
        num_steps_done=found.num_steps_done if found else 0,
        epoch_losses=list(found.epoch_losses) if found else [],
        history=list(found.history) if found else [],
        num_skipped=found.num_skipped if found else 0,
        phases=phases,
    )


def _build_store(job: TrainJob, node_rank: int) -> SampleStore:
    """Build a sample store that shares its samples with the other ranks of the node."""
    settings = job.config.train
    store = SampleStore(job.classes, settings.cache_bytes, settings.cache_disk_bytes)
    if distributed.is_initialized():
        ranks: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(ranks, (node_rank, store.paths))
        del ranks[distributed.get_rank()]
        store.share([path for other_node_rank, paths in ranks if other_node_rank == node_rank for path in paths])
    return store


def describe_shortage(settings: TrainSettings, world_size: int) -> str:
    """Return the line to print if a run has fewer workers than configured."""
    num_parts = compute_num_parts(settings.global_batch_size, settings.micro_batch_size, world_size)
    return (
        f"training on {world_size} of {settings.num_train_workers} workers, with {num_parts} instead of "
        f"{settings.num_accumulation_steps} accumulation steps, so that each still processes at most "
        f"{settings.micro_batch_size} images at once"
    )


def _list_phases(
    job: TrainJob, found: TrainingState | None, world_size: int, poster: ProgressPoster | None
) -> list[Phase]:
    """Return the phases of the run including the one that begins now, and print what changed since the checkpoint."""
    earlier = found.phases if found else []
    phase = Phase(
        num_steps_done=found.num_steps_done if found else 0,
        epoch=len(found.history) + 1 if found else 1,
        num_workers=world_size,
        settings=job.config.phase_settings,
    )
    phases = add_phase(earlier, phase)
    if poster and earlier and len(phases) > len(earlier):
        poster.post_line(describe_phases(phases)[-1])
    return phases


def _build_schedule(
    job: TrainJob, optimizer: torch.optim.Optimizer, found: TrainingState | None, phases: Sequence[Phase]
) -> LRScheduler:
    """Build the schedule of all epochs and bring it to the step of the checkpoint, if there is one."""
    schedule = build_schedule(optimizer, job.config.train, job.num_steps)
    if found and found.phases and have_same_schedule(found.phases[-1], phases[-1]):
        load_schedule(schedule, found.schedule)
    elif found:  # A checkpoint of an earlier version has no phases; for the same settings the rates are the same.
        advance_schedule(schedule, min(found.num_steps_done, job.num_steps))
    return schedule


def _build_learner(
    job: TrainJob, model: SegmentationModel, replica: nn.Module, device: torch.device, precision: str
) -> Learner:
    settings = job.config.train
    optimizer = build_optimizer(model, settings)
    return Learner(
        replica=replica,
        loss=SegmentationLoss(job.config.loss, job.classes.ignore_index, job.class_weights, device),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        preprocessing=job.preprocessing,
        device=device,
        precision=precision,
        max_gradient_norm=settings.max_gradient_norm,
    )
