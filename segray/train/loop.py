"""What every training worker runs: set up, epochs, and exactly one report for each epoch."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import distributed, nn

from segray.classes import ClassMap
from segray.cluster import count_cores
from segray.config import TrainSettings
from segray.metrics import compute_defined_mean, compute_dice, compute_iou, count_from_confusion, to_nullable
from segray.models.build import SegmentationModel, build_model, freeze_unused_parameters
from segray.models.precision import has_bf16
from segray.train.checkpoint import TrainingState, find_newest_state, load_state, save_state
from segray.train.feed import compute_num_steps, compute_step_order, iterate_evaluation, iterate_training
from segray.train.job import TrainJob
from segray.train.progress import ProgressPoster
from segray.train.steps import NonFiniteLossError, evaluate, settle_gradient_buckets, train_step

WARM_UP_FRACTION = 0.2  # of all steps, in which the one-cycle schedule climbs to its peak


@dataclass
class _Trainer:
    """One worker's objects, alive from set-up to the last epoch."""

    job: TrainJob
    world_rank: int
    world_size: int
    device: torch.device
    precision: str
    replica: nn.Module  # what computes gradients: the model, wrapped where there are several workers
    model: SegmentationModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    history: list[dict[str, Any]]
    num_epochs_done: int = 0


def run_loop(job: TrainJob) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the start, to the last epoch.

    Returns:
        ``{"error": None}``, or the message of an error that starting again would not mend. It is returned and not
        raised because Ray Train would restart the workers for any exception.
    """
    trainer = _set_up(job)
    poster = ProgressPoster(trainer.job.progress_board) if trainer.world_rank == 0 else None
    while trainer.num_epochs_done < trainer.job.config.train.num_epochs:
        try:
            metrics = _run_epoch(trainer, poster)
        except NonFiniteLossError as error:
            return {"error": str(error)}
        trainer.history.append(metrics)
        trainer.num_epochs_done += 1
        if poster:
            poster.post_line(format_epoch(metrics, trainer.job.config.train.num_epochs))
        _report(trainer, metrics)
    return {"error": None}


def _set_up(job: TrainJob) -> _Trainer:
    settings = job.config.train
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":  # the workers of a node share its cores
        torch.set_num_threads(max(1, count_cores() // context.get_local_world_size()))
    torch.manual_seed(settings.seed)  # the same first weights on every rank
    model = build_model(job.config.model, job.classes.num_classes).to(memory_format=torch.channels_last)
    freeze_unused_parameters(model)
    found = _find_newest_state_together(job, context.get_world_rank(), device)
    if found:
        model.load_state_dict(found.model)
    replica = ray.train.torch.prepare_model(model)
    settle_gradient_buckets(replica, device)
    precision = _agree_on_precision(job, context.get_world_rank(), device)
    optimizer, schedule = build_optimizer(model, settings, len(job.splits.train))
    if found:
        optimizer.load_state_dict(found.optimizer)
        schedule.load_state_dict(found.schedule)
    return _Trainer(
        job=job,
        world_rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=device,
        precision=precision,
        replica=replica,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        history=list(found.history) if found else [],
        num_epochs_done=found.num_epochs_done if found else 0,
    )


def build_optimizer(
    model: nn.Module, settings: TrainSettings, num_samples: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Build AdamW on a one-cycle schedule (Smith and Topin, "Super-Convergence", 2018) over all epochs."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    total_steps = compute_num_steps(num_samples, settings.global_batch_size) * settings.num_epochs + 1
    # torch divides by the length of the climb less one step, so a run of a few steps needs a longer climb
    climb = max(WARM_UP_FRACTION, 1.5 / total_steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=total_steps, pct_start=climb, cycle_momentum=False
    )
    return optimizer, schedule


def _agree_on_precision(job: TrainJob, world_rank: int, device: torch.device) -> str:
    """Return ``bf16`` where it was asked for and pays on every rank; all ranks compute in the same."""
    if job.config.train.precision != "bf16":
        return job.config.train.precision
    can = torch.tensor(int(has_bf16(device)), device=device)
    if distributed.is_initialized():
        distributed.all_reduce(can, distributed.ReduceOp.MIN)
    if not can.item() and world_rank == 0:
        ProgressPoster(job.progress_board).post_line("no bf16 on every worker's processor: training in fp32")
    return "bf16" if can.item() else "fp32"


def _find_newest_state_together(job: TrainJob, world_rank: int, device: torch.device) -> TrainingState | None:
    """Let rank 0 choose the checkpoint, so that all ranks go on from the same one."""
    found = None
    if world_rank == 0:
        poster = ProgressPoster(job.progress_board)
        found = find_newest_state(job.run_uri, poster.post_line)
        if found:
            poster.post_line(f"going on after epoch {found[1].num_epochs_done}, from {found[0]}")
    chosen = [found[0] if found else None]
    if distributed.is_initialized():
        distributed.broadcast_object_list(chosen, src=0, device=device)
    if chosen[0] is None:
        return None
    return found[1] if found else load_state(chosen[0])


def _run_epoch(trainer: _Trainer, poster: ProgressPoster | None) -> dict[str, Any]:
    settings, splits = trainer.job.config.train, trainer.job.splits
    num_steps = compute_num_steps(len(splits.train), settings.global_batch_size)
    started_s = time.perf_counter()
    losses = []
    for step, loss in _train_epoch(trainer, num_steps):
        losses.append(loss)
        if poster:
            images_per_s = len(losses) * settings.global_batch_size / (time.perf_counter() - started_s)
            poster.post(step + 1, f"epoch {trainer.num_epochs_done + 1}, loss {loss:.3f}, {images_per_s:.1f} images/s")
    train_s = time.perf_counter() - started_s
    if poster:
        poster.post(_count_steps(trainer) + num_steps, f"epoch {trainer.num_epochs_done + 1}, evaluating")
    scores = compute_scores(_evaluate_together(trainer), trainer.job.classes)
    return {
        "epoch": trainer.num_epochs_done + 1,
        "loss": float(np.mean(losses)),
        "learning_rate": trainer.schedule.get_last_lr()[0],
        "images_per_s": num_steps * settings.global_batch_size / train_s,
        **scores,
    }


def _train_epoch(trainer: _Trainer, num_steps: int) -> Iterator[tuple[int, float]]:
    settings, splits, classes = trainer.job.config.train, trainer.job.splits, trainer.job.classes
    first_step = trainer.num_epochs_done * num_steps
    steps = range(first_step, first_step + num_steps)
    trainer.replica.train()
    batches = iterate_training(
        splits.train,
        classes,
        trainer.job.config.image_size,
        steps=steps,
        global_batch_size=settings.global_batch_size,
        seed=settings.seed,
        world_rank=trainer.world_rank,
        world_size=trainer.world_size,
        num_threads=settings.num_decode_threads,
    )
    for step, batch in zip(steps, batches, strict=True):
        torch.manual_seed(_fold_seed(settings.seed, step, trainer.world_rank))
        try:
            loss = train_step(
                trainer.replica,
                trainer.optimizer,
                batch,
                preprocessing=trainer.job.preprocessing,
                ignore_index=classes.ignore_index,
                device=trainer.device,
                precision=trainer.precision,
            )
        except NonFiniteLossError as error:
            order = compute_step_order(step, len(splits.train), settings.global_batch_size, settings.seed)
            uris = ", ".join(splits.train[index].image_uri for index in order)
            raise NonFiniteLossError(
                f"{error} at step {step + 1}, before the weights moved; lower train.learning_rate "
                f"({settings.learning_rate}), or look at the images of this step: {uris}"
            ) from error
        trainer.schedule.step()
        yield step, loss


def _fold_seed(seed: int, step: int, world_rank: int) -> int:
    """Return a seed of its own for each step and rank, so that no generator state has to be saved to resume."""
    return int(np.random.SeedSequence([seed, step, world_rank]).generate_state(1, np.uint64)[0] >> 1)


def _evaluate_together(trainer: _Trainer) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the confusion matrix of the whole validation split, summed over ranks."""
    if distributed.is_initialized():  # each rank's BatchNorm has its own statistics; rank 0's are those that are kept
        for buffer in trainer.model.buffers():
            distributed.broadcast(buffer, src=0)
    settings = trainer.job.config.train
    batches = iterate_evaluation(
        trainer.job.splits.val,
        trainer.job.classes,
        trainer.job.config.image_size,
        batch_size=settings.eval_batch_size,
        world_rank=trainer.world_rank,
        world_size=trainer.world_size,
        num_threads=settings.num_decode_threads,
    )
    confusion = evaluate(
        trainer.model,
        batches,
        classes=trainer.job.classes,
        preprocessing=trainer.job.preprocessing,
        device=trainer.device,
        precision=trainer.precision,
    )
    if distributed.is_initialized():
        distributed.all_reduce(confusion)
    result: np.ndarray[Any, np.dtype[np.int64]] = confusion.cpu().numpy()
    return result


def compute_scores(confusion: np.ndarray[Any, np.dtype[np.int64]], classes: ClassMap) -> dict[str, Any]:
    """Return validation scores by name: means over defined classes, and lists over all classes (None: undefined)."""
    counts = count_from_confusion(confusion)
    iou, dice = compute_iou(counts), compute_dice(counts)
    return {
        "val_mean_iou": compute_defined_mean(iou),
        "val_mean_dice": compute_defined_mean(dice),
        "val_iou": to_nullable(iou),
        "val_dice": to_nullable(dice),
        "val_confusion": confusion.tolist(),
    }


def format_epoch(metrics: dict[str, Any], num_epochs: int) -> str:
    """Return the line that is printed for an epoch."""
    return (
        f"epoch {metrics['epoch']:>{len(str(num_epochs))}}/{num_epochs}  loss {metrics['loss']:.4f}  "
        f"learning rate {metrics['learning_rate']:.2e}  {metrics['images_per_s']:.1f} images/s  "
        f"val mean IoU {metrics['val_mean_iou']:.4f}  mean Dice {metrics['val_mean_dice']:.4f}"
    )


def _count_steps(trainer: _Trainer) -> int:
    settings = trainer.job.config.train
    return trainer.num_epochs_done * compute_num_steps(len(trainer.job.splits.train), settings.global_batch_size)


def _report(trainer: _Trainer, metrics: dict[str, Any]) -> None:
    """Report an epoch: a barrier that every rank must reach, the only call of ``ray.train.report`` there is."""
    plain = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    if trainer.world_rank != 0:
        ray.train.report(plain)
        return
    with tempfile.TemporaryDirectory() as folder:
        state = TrainingState(
            trainer.num_epochs_done,
            trainer.model.state_dict(),
            trainer.optimizer.state_dict(),
            trainer.schedule.state_dict(),
            trainer.history,
        )
        save_state(Path(folder), state)
        ray.train.report(plain, checkpoint=ray.train.Checkpoint.from_directory(folder))
