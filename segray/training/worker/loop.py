"""The training loop of a worker: steps, epochs, evaluation, and checkpoints reported to Ray Train."""

import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from functools import cache, partial
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import Checkpoint
from ray.train.v2.api.report_config import CheckpointUploadMode
from torch import distributed
from torch.distributed.fsdp import FSDPModule

from segray.errors import TrainingError
from segray.metrics import compute_defined_mean
from segray.runtime.failures import named_failure
from segray.storage import join_uri
from segray.training.checkpoint import (
    TrainingState,
    name_checkpoint,
    remove_surplus,
    save_sharded_state,
    save_state,
)
from segray.training.job import TrainJob, is_finished
from segray.training.pretrained import WeightsError
from segray.training.watchdog import Heartbeat
from segray.training.worker.device import count_cores_per_rank
from segray.training.worker.evaluation import add_over_ranks, compute_loss, compute_scores, evaluate
from segray.training.worker.feed import (
    EvalBatch,
    RankShare,
    StreamSettings,
    TrainBatch,
    iterate_evaluation,
    iterate_training,
)
from segray.training.worker.non_finite import (
    NonFiniteLossError,
    check_result,
    count_skipped,
    explain_non_finite_loss,
)
from segray.training.worker.optimisation import get_highest_rate
from segray.training.worker.state import Trainer, set_up
from segray.training.worker.step_log import StepLog
from segray.training.worker.steps import train_step

_LAST_EPOCH_ONLY = (
    *("val_confusion", "val_boundary_px", "val_image_sums", "val_image_count"),
    *("val_worst_images", "val_best_images"),
)
# At most two checkpoints wait in memory to be uploaded; a step that would create a third one waits.
_upload_slots = threading.BoundedSemaphore(2)
_UPLOAD_POLL_S = 5.0
_MAX_UPLOAD_S = 3600.0  # Waiting longer counts as a stall.
_READ_EVERY_STEPS = 20  # On a GPU, the host waits once in so many steps.
_PERMISSION_POLL_S = 0.2


def run_loop(job: TrainJob, measure: Callable[[Trainer], dict[str, float]] | None = None) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the start, until training is complete or the driver stops the run.

    Args:
        job: The job description.
        measure: Called instead of training; its result is ``"measured"`` in the returned value.

    Returns:
        ``{"error": None}``, or an error that a restart would not fix. It is returned instead of raised because Ray
        Train restarts the workers after any exception.
    """
    context = ray.train.get_context()
    if context.get_world_rank() == 0:
        ray.get(job.board.restart.remote(context.get_world_size()))
    diagnosis = ray.get(job.board.get_diagnosis.remote())
    if diagnosis:
        return {"error": TrainingError(diagnosis)}
    heartbeat = Heartbeat(job.board, context.get_world_rank(), job.config.train.stall_timeout_s)
    heartbeat.start()
    try:
        trainer = set_up(job, heartbeat)
        with closing(trainer.store):
            if measure:
                return {"error": None, "measured": measure(trainer)}
            with closing(iterate_batches(trainer, job.num_steps)) as batches:
                while not is_finished(trainer.history, job.config.train) and _may_continue(trainer):
                    _run_epoch(trainer, batches)
    except (NonFiniteLossError, WeightsError) as error:  # Raised on every rank, so none waits for another.
        return {"error": error}
    finally:
        heartbeat.stop()
    return {"error": None}


def _may_continue(trainer: Trainer) -> bool:
    """Return whether to start the next epoch, the same on all ranks; wait for the driver if the job pauses."""
    if not trainer.job.pauses_after_epoch:
        return True
    while (allowed := ray.get(trainer.job.board.may_continue.remote(len(trainer.history)))) is None:
        trainer.heartbeat.update(trainer.num_steps_done, "saving")
        time.sleep(_PERMISSION_POLL_S)
    return bool(allowed)


def _run_epoch(trainer: Trainer, batches: Iterator[list[TrainBatch]]) -> None:
    """Train to the end of the current epoch, evaluate if due, and save a checkpoint."""
    settings, epoch = trainer.job.config.train, len(trainer.history) + 1
    started_s, num_steps_before = time.perf_counter(), trainer.num_steps_done
    trainer.learner.replica.train()
    step_log = StepLog(trainer)
    for _ in train_steps(trainer, batches, epoch * trainer.job.steps_per_epoch):
        step_log.record(trainer.unread[-1])
        if not _is_read_due(trainer):
            continue
        read_results(trainer)
        num_images = (trainer.num_steps_done - num_steps_before) * settings.global_batch_size
        images_per_s = num_images / (time.perf_counter() - started_s)
        if trainer.poster:
            loss = trainer.epoch_losses[-1]
            trainer.poster.post(trainer.num_steps_done, f"epoch {epoch}, loss {loss:.3f}, {images_per_s:.1f} images/s")
        if _is_checkpoint_due(trainer):
            _save(trainer, {})
    metrics: dict[str, Any] = {
        "epoch": epoch,
        "loss": compute_defined_mean(np.array(trainer.epoch_losses)),  # A skipped step has no loss.
        "learning_rate": trainer.learning_rate,
        "images_per_s": images_per_s,
        "num_skipped_steps": int(np.isnan(trainer.epoch_losses).sum()),
    }
    is_due = epoch % settings.eval_every_epochs == 0 or epoch == settings.num_epochs
    if is_due and trainer.job.splits.val:  # There are none in the run on all images that follows a cross-validation.
        if trainer.poster:
            trainer.poster.post(trainer.num_steps_done, f"epoch {epoch}, evaluating")
        metrics |= evaluate_split(trainer)
    trainer.epoch_losses = []
    trainer.history = [_drop_large_metrics(earlier) for earlier in trainer.history] + [metrics]
    if trainer.poster:
        trainer.poster.post_line(format_epoch(metrics, settings.num_epochs))
        trainer.poster.post_epochs([metrics])
    _save(trainer, {name: value for name, value in metrics.items() if isinstance(value, int | float)})


def _drop_large_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics without those that are used only for the last epoch, such as its (C, C) confusion matrix."""
    return {name: value for name, value in metrics.items() if name not in _LAST_EPOCH_ONLY}


def train_steps(trainer: Trainer, batches: Iterator[list[TrainBatch]], end: int) -> Iterator[None]:
    """Queue the steps before ``end``, and yield after each; ``read_results`` waits for them and checks them."""
    settings = trainer.job.config.train
    trainer.heartbeat.update(trainer.num_steps_done, "loading")
    for step in range(trainer.num_steps_done, end):
        parts = next(batches)
        torch.manual_seed(_derive_seed(settings.seed, step, trainer.world_rank))
        trainer.unread.append(train_step(trainer.learner, parts, partial(trainer.heartbeat.update, step)))
        trainer.learning_rate = get_highest_rate(trainer.learner.optimizer)
        trainer.schedule.step()
        if trainer.average:
            trainer.average.update()
        trainer.num_steps_done = step + 1
        yield
        trainer.heartbeat.update(trainer.num_steps_done, "loading")


def _is_read_due(trainer: Trainer) -> bool:
    """Return whether to read the results of the last steps now: the same on all ranks, and before each checkpoint.

    Waiting for a GPU after each step would leave it idle until the next one is queued.
    """
    every = 1 if trainer.learner.device.type == "cpu" else _READ_EVERY_STEPS
    done = trainer.num_steps_done
    return done % every == 0 or done % trainer.job.steps_per_epoch == 0 or _is_checkpoint_due(trainer)


def read_results(trainer: Trainer) -> None:
    """Wait for the steps since the last call, and add their losses to those of the epoch.

    Raises:
        NonFiniteLossError: Names the step and its images; raised on every rank, after the same step. The weights of
            later steps are in no checkpoint. In fp16, only after many skipped steps in a row.
    """
    results = torch.stack(trainer.unread).tolist()
    trainer.unread.clear()
    for step, (loss, gradient_norm) in enumerate(results, trainer.num_steps_done - len(results)):
        try:
            loss = check_result(loss, gradient_norm, may_skip=trainer.learner.scaler.is_enabled())
            trainer.num_skipped = count_skipped(trainer.num_skipped, loss)
        except NonFiniteLossError as error:
            raise explain_non_finite_loss(trainer.job, step, error) from error
        trainer.epoch_losses.append(loss)


def iterate_batches(trainer: Trainer, end: int) -> Generator[list[TrainBatch]]:
    """Yield the batches of the steps left before ``end``; the feed keeps loading during an evaluation."""
    job, settings = trainer.job, trainer.job.config.train
    return iterate_training(
        job.splits.train,
        trainer.store,
        trainer.augmentation,
        range(trainer.num_steps_done, end),
        StreamSettings(settings.global_batch_size, trainer.num_parts, settings.seed, job.image_weights),
        _get_share(trainer),
    )


def _get_share(trainer: Trainer) -> RankShare:
    settings = trainer.job.config.train
    num_threads = settings.num_decode_threads or count_cores_per_rank(ray.train.get_context().get_local_world_size())
    is_on_gpu = trainer.learner.device.type == "cuda"
    return RankShare(
        trainer.world_rank, trainer.world_size, num_threads, settings.num_prefetch_batches, pin_memory=is_on_gpu
    )


def _derive_seed(seed: int, step: int, world_rank: int) -> int:
    """Return a different seed for each step and rank, so that checkpoints need not hold any generator state."""
    return int(np.random.SeedSequence([seed, step, world_rank]).generate_state(1, np.uint64)[0] >> 1)


def evaluate_split(trainer: Trainer) -> dict[str, Any]:
    """Return the scores on the whole validation split, of the averaged weights if there are any."""
    with trainer.average.applied() if trainer.average else nullcontext():
        if distributed.is_initialized():  # BatchNorm statistics differ between ranks; rank 0's are saved.
            for buffer in trainer.model.buffers():
                distributed.broadcast(buffer, src=0)
        counts = evaluate(
            trainer.model,
            _iterate_evaluation(trainer),
            classes=trainer.job.classes,
            preprocessing=trainer.job.preprocessing,
            loss=trainer.learner.loss,
            precision=trainer.learner.precision,
        )
        if isinstance(trainer.model, FSDPModule):  # Or the next forward pass would use the gathered averaged weights.
            trainer.model.reshard()
    total = add_over_ranks(counts)
    return {"val_loss": compute_loss(total, trainer.learner.loss), **compute_scores(total)}


def _iterate_evaluation(trainer: Trainer) -> Iterator[EvalBatch]:
    settings = trainer.job.config.train
    batches = iterate_evaluation(
        trainer.job.splits.val,
        trainer.store,
        trainer.job.config.image_size,
        settings.eval_batch_size,
        _get_share(trainer),
    )
    for batch in batches:
        trainer.heartbeat.update(trainer.num_steps_done, "evaluating")
        yield batch


def format_epoch(metrics: dict[str, Any], num_epochs: int) -> str:
    """Return the line to print for a finished epoch."""
    line = (
        f"epoch {metrics['epoch']:>{len(str(num_epochs))}}/{num_epochs}  loss {metrics['loss']:.4f}  "
        f"learning rate {metrics['learning_rate']:.2e}  {metrics['images_per_s']:.1f} images/s"
    )
    if "val_mean_iou" in metrics:
        line += "" if metrics["val_loss"] is None else f"  val loss {metrics['val_loss']:.4f}"
        line += f"  val mean IoU {metrics['val_mean_iou']:.4f}  mean Dice {metrics['val_mean_dice']:.4f}"
    if metrics["num_skipped_steps"]:
        line += f"  {metrics['num_skipped_steps']} steps skipped (not finite in fp16)"
    return line


def _is_checkpoint_due(trainer: Trainer) -> bool:
    """Return whether to save a checkpoint in the middle of an epoch; its end is always saved."""
    every = trainer.job.config.train.checkpoint_every_steps
    done = trainer.num_steps_done
    return every is not None and done % every == 0 and done % trainer.job.steps_per_epoch != 0


def _save(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Report metrics to Ray Train, with a checkpoint that a thread uploads while training continues.

    The thread is rank 0's, or, if the model is sharded, every rank has one, which uploads the rank's part.
    ``ray.train.report`` is a barrier that every rank must reach; this is the only place that calls it.
    """
    trainer.heartbeat.update(trainer.num_steps_done, "saving")
    if trainer.saves_state:
        deadline_s = time.monotonic() + _MAX_UPLOAD_S
        while not _upload_slots.acquire(timeout=_UPLOAD_POLL_S):
            if time.monotonic() < deadline_s:  # Slow storage must not count as a stall.
                trainer.heartbeat.update(trainer.num_steps_done, "saving")
    state = trainer.gather_state()
    if state is None:
        ray.train.report(metrics)
        return
    release = cache(_upload_slots.release)  # Only the first call releases the slot: Ray repeats some failed uploads.
    ray.train.report(
        metrics,
        # Ray requires a folder to upload. It stays empty, because _upload writes the checkpoint directly to storage.
        checkpoint=Checkpoint.from_directory(tempfile.mkdtemp(prefix="segray-checkpoint-")),
        checkpoint_dir_name=name_checkpoint(trainer.num_steps_done),  # Ray takes that of rank 0.
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
        checkpoint_upload_fn=partial(_upload, trainer.job, state, (trainer.world_rank, trainer.world_size), release),
    )


def _upload(
    job: TrainJob,
    state: TrainingState,
    rank_of: tuple[int, int],
    release: Callable[[], None],
    checkpoint: Checkpoint,
    folder_name: str,
) -> Checkpoint:
    """Write a checkpoint, or this rank's part of it; rank 0 also removes those that are no longer needed.

    Ray calls this in a single thread for all uploads of a rank. ``rank_of`` is the rank, and the number of ranks;
    ``release`` releases the upload slot.
    """
    rank, num_ranks = rank_of
    try:
        uri = join_uri(job.run_uri, folder_name)
        with named_failure(f"writing the checkpoint {uri}"):
            if state.rows:
                save_sharded_state(uri, state, rank, num_ranks)
            else:
                save_state(uri, state)
            if rank == 0:
                remove_surplus(job.run_uri, job.config.train.num_best_checkpoints)
    finally:
        release()
    storage = ray.train.get_context().get_storage()
    return Checkpoint(storage.build_checkpoint_path_from_name(folder_name), storage.storage_filesystem)
