"""What every training worker runs: steps, epochs, and the only place that reports to Ray Train."""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import Checkpoint
from ray.train.v2.api.report_config import CheckpointUploadMode
from torch import distributed

from segray.errors import TrainingError
from segray.storage import join_uri
from segray.training.checkpoint import TrainingState, name_checkpoint, remove_surplus, save_state
from segray.training.job import TrainJob, is_finished
from segray.training.watchdog import Heartbeat
from segray.training.worker.evaluation import add_over_ranks, compute_scores, evaluate
from segray.training.worker.feed import EvalBatch, compute_step_order, iterate_evaluation, iterate_training
from segray.training.worker.optimisation import get_highest_rate
from segray.training.worker.state import Trainer, set_up
from segray.training.worker.steps import NonFiniteLossError, train_step

_OF_LAST_EPOCH = ("val_confusion", "val_worst_images", "val_best_images")
# checkpoints in memory, being uploaded or waiting for it; the step that makes one more waits
_uploads = threading.BoundedSemaphore(2)
_UPLOAD_POLL_S = 5.0
_LEAVE_POLL_S = 0.2


def run_loop(job: TrainJob) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the start, to the last epoch, or as far as there is leave.

    Returns:
        ``{"error": None}``, or an error that starting again would not mend. It is returned and not raised because Ray
        Train would restart the workers for any exception.
    """
    context = ray.train.get_context()
    if context.get_world_rank() == 0:
        ray.get(job.board.restart.remote(context.get_world_size()))
    verdict = ray.get(job.board.get_verdict.remote())
    if verdict:
        return {"error": TrainingError(verdict)}
    heartbeat = Heartbeat(job.board, context.get_world_rank(), job.config.train.stall_timeout_s)
    heartbeat.start()
    try:
        trainer = set_up(job, heartbeat)
        while not is_finished(trainer.history, job.config.train) and _has_leave(trainer):
            _run_epoch(trainer)
    except NonFiniteLossError as error:  # on every rank alike; one that returned alone would leave the others waiting
        return {"error": error}
    finally:
        heartbeat.stop()
    return {"error": None}


def _has_leave(trainer: Trainer) -> bool:
    """Wait for the driver's word, and return whether the next epoch begins: for each rank the same."""
    if not trainer.job.waits_for_leave:
        return True
    while (leave := ray.get(trainer.job.board.has_leave.remote(len(trainer.history)))) is None:
        trainer.heartbeat.move(trainer.num_steps_done, "saving")
        time.sleep(_LEAVE_POLL_S)
    return bool(leave)


def _run_epoch(trainer: Trainer) -> None:
    """Train to the end of the epoch that was begun, evaluate it if it is due, and save it."""
    settings, epoch = trainer.job.config.train, len(trainer.history) + 1
    started_s, num_steps_before = time.perf_counter(), trainer.num_steps_done
    trainer.learner.replica.train()
    for loss in _train_steps(trainer, range(trainer.num_steps_done, epoch * trainer.steps_per_epoch)):
        trainer.epoch_losses.append(loss)
        num_images = (trainer.num_steps_done - num_steps_before) * settings.global_batch_size
        images_per_s = num_images / (time.perf_counter() - started_s)
        if trainer.poster:
            trainer.poster.post(trainer.num_steps_done, f"epoch {epoch}, loss {loss:.3f}, {images_per_s:.1f} images/s")
        if _is_checkpoint_due(trainer):
            _save(trainer, {})
    metrics: dict[str, Any] = {
        "epoch": epoch,
        "loss": float(np.mean(trainer.epoch_losses)),
        "learning_rate": trainer.learning_rate,
        "images_per_s": images_per_s,
    }
    if epoch % settings.eval_every_epochs == 0 or epoch == settings.num_epochs:
        if trainer.poster:
            trainer.poster.post(trainer.num_steps_done, f"epoch {epoch}, evaluating")
        metrics |= _evaluate(trainer)
    trainer.epoch_losses = []
    trainer.history = [_shorten(earlier) for earlier in trainer.history] + [metrics]
    if trainer.poster:
        trainer.poster.post_line(format_epoch(metrics, settings.num_epochs))
        trainer.poster.post_epochs([metrics])
    _save(trainer, {name: value for name, value in metrics.items() if isinstance(value, int | float)})


def _shorten(metrics: dict[str, Any]) -> dict[str, Any]:
    """Leave out what only the last epoch's metrics are asked for, and what grows with the square of the classes."""
    return {name: value for name, value in metrics.items() if name not in _OF_LAST_EPOCH}


def _train_steps(trainer: Trainer, steps: range) -> Iterator[float]:
    """Yield the loss of each step."""
    job, settings = trainer.job, trainer.job.config.train
    batches = iterate_training(
        job.splits.train,
        trainer.store,
        trainer.augmentation,
        steps=steps,
        global_batch_size=settings.global_batch_size,
        num_parts=settings.num_accumulation_steps,
        seed=settings.seed,
        world_rank=trainer.world_rank,
        world_size=trainer.world_size,
        num_threads=settings.num_decode_threads,
    )
    trainer.heartbeat.move(trainer.num_steps_done, "loading")
    for step, parts in zip(steps, batches, strict=True):
        torch.manual_seed(_fold_seed(settings.seed, step, trainer.world_rank))
        try:
            loss = train_step(trainer.learner, parts, partial(trainer.heartbeat.move, step))
        except NonFiniteLossError as error:
            order = compute_step_order(step, len(job.splits.train), settings.global_batch_size, settings.seed)
            uris = ", ".join(job.splits.train[index].image_uri for index in order)
            raise NonFiniteLossError(
                f"{error} at step {step + 1}, before the weights moved; lower train.learning_rate "
                f"({settings.learning_rate}), or look at the images of this step: {uris}"
            ) from error
        trainer.learning_rate = get_highest_rate(trainer.learner.optimizer)
        trainer.schedule.step()
        if trainer.average:
            trainer.average.update()
        trainer.num_steps_done = step + 1
        yield loss
        trainer.heartbeat.move(trainer.num_steps_done, "loading")


def _fold_seed(seed: int, step: int, world_rank: int) -> int:
    """Return a seed of its own for each step and rank, so that no generator state has to be saved to resume."""
    return int(np.random.SeedSequence([seed, step, world_rank]).generate_state(1, np.uint64)[0] >> 1)


def _evaluate(trainer: Trainer) -> dict[str, Any]:
    """Return the scores of the whole validation split, with the averaged weights where there are."""
    with trainer.average.in_place() if trainer.average else nullcontext():
        if distributed.is_initialized():  # each rank's BatchNorm has its own statistics; rank 0's are those kept
            for buffer in trainer.model.buffers():
                distributed.broadcast(buffer, src=0)
        counts = evaluate(
            trainer.model,
            _iterate_evaluation(trainer),
            classes=trainer.job.classes,
            preprocessing=trainer.job.preprocessing,
            device=trainer.learner.device,
            precision=trainer.learner.precision,
        )
    return compute_scores(add_over_ranks(counts))


def _iterate_evaluation(trainer: Trainer) -> Iterator[EvalBatch]:
    settings = trainer.job.config.train
    batches = iterate_evaluation(
        trainer.job.splits.val,
        trainer.store,
        trainer.job.config.image_size,
        batch_size=settings.eval_batch_size,
        world_rank=trainer.world_rank,
        world_size=trainer.world_size,
        num_threads=settings.num_decode_threads,
    )
    for batch in batches:
        trainer.heartbeat.move(trainer.num_steps_done, "evaluating")
        yield batch


def format_epoch(metrics: dict[str, Any], num_epochs: int) -> str:
    """Return the line that is printed for an epoch."""
    line = (
        f"epoch {metrics['epoch']:>{len(str(num_epochs))}}/{num_epochs}  loss {metrics['loss']:.4f}  "
        f"learning rate {metrics['learning_rate']:.2e}  {metrics['images_per_s']:.1f} images/s"
    )
    if "val_mean_iou" in metrics:
        line += f"  val mean IoU {metrics['val_mean_iou']:.4f}  mean Dice {metrics['val_mean_dice']:.4f}"
    return line


def _is_checkpoint_due(trainer: Trainer) -> bool:
    """Say whether to save in the middle of an epoch; its end is saved in any case."""
    every = trainer.job.config.train.checkpoint_every_steps
    done = trainer.num_steps_done
    return every is not None and done % every == 0 and done % trainer.steps_per_epoch != 0


def _save(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Report, with a checkpoint that a thread of rank 0 uploads while training goes on.

    A report is a barrier that every rank must reach; this is the only place that makes one.
    """
    trainer.heartbeat.move(trainer.num_steps_done, "saving")
    if trainer.world_rank == 0:
        while not _uploads.acquire(timeout=_UPLOAD_POLL_S):  # a slow store is no stall
            trainer.heartbeat.move(trainer.num_steps_done, "saving")
    state = trainer.gather_state()
    if state is None:
        ray.train.report(metrics)
        return
    ray.train.report(
        metrics,
        # Ray wants a folder to upload; ours is written straight to the store, checked and with its index last
        checkpoint=Checkpoint.from_directory(tempfile.mkdtemp(prefix="segray-checkpoint-")),
        checkpoint_dir_name=name_checkpoint(trainer.num_steps_done),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=partial(_upload, trainer.job, state),
    )


def _upload(job: TrainJob, state: TrainingState, checkpoint: Checkpoint, folder_name: str) -> Checkpoint:
    """Write a checkpoint, and remove those that it makes superfluous; Ray has one thread for all uploads."""
    try:
        save_state(join_uri(job.run_uri, folder_name), state)
        remove_surplus(job.run_uri, job.config.train.num_best_checkpoints)
    finally:
        _uploads.release()
    storage = ray.train.get_context().get_storage()
    return Checkpoint(storage.build_checkpoint_path_from_name(folder_name), storage.storage_filesystem)
