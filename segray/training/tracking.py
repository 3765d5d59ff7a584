"""Write the metrics of each epoch to ``metrics.csv`` and, if configured, to TensorBoard and MLflow.

Trackers run in the driver, so workers need no credentials for them. A tracker that fails does not end the run.
"""

import csv
import io
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console

from segray.config import TrainConfig
from segray.data.classes import ClassMap
from segray.errors import ConfigError, SegrayError, flatten_message
from segray.storage import exists, join_uri, read_bytes, remove_folder, write_bytes
from segray.training.step_table import StepRow, StepTable, read_steps

_STEPS_NAME = "steps.csv"
_FLUSH_INTERVAL_S = 30.0
_MAX_FLUSH_SHARE = 0.05  # Of the time: with millions of steps, writing all of them takes longer.
_STEP_PREFIX = "step/"  # Of the names of the metrics of single steps, which have the same names as those of epochs.
_MLFLOW_BATCH = 1000  # Maximum number of metrics per request.
_PER_EPOCH = ("epoch", "loss", "learning_rate", "images_per_s", "num_skipped_steps")
_PER_CLASS = (
    "dataset_iou",
    "dataset_dice",
    "precision",
    "recall",
    "accuracy",
    "boundary_iou",
    "mean_image_iou",
    "mean_image_dice",
)
_MEANS = (
    "loss",
    "mean_iou",
    "mean_dice",
    "mean_precision",
    "mean_recall",
    "mean_accuracy",
    "mean_boundary_iou",
    "image_iou",
    "image_dice",
    "pixel_accuracy",
)


class Tracker(Protocol):
    """A destination for metrics."""

    def log(self, epoch: int, scalars: Mapping[str, float]) -> None:
        """Log the metrics of an epoch; a resumed run logs its earlier epochs again, with the same values."""

    def log_steps(self, rows: Sequence[StepRow]) -> None:
        """Log rows of ``steps.csv``; a resumed run logs earlier ones again."""

    def close(self, succeeded: bool) -> None:
        """Finish tracking; ``succeeded`` is whether the run ended without an error."""


def flatten_metrics(metrics: Mapping[str, Any], classes: ClassMap) -> dict[str, float | None]:
    """Return all scalar metrics of an epoch by name, per-class ones as ``val_precision_car``; None where undefined."""
    if math.isnan(metrics.get("loss", 0.0)):  # All steps of the epoch were skipped.
        metrics = {**metrics, "loss": None}
    flat = {name: metrics.get(name) for name in _PER_EPOCH}
    flat |= {f"val_{name}": metrics.get(f"val_{name}") for name in _MEANS}
    for score in _PER_CLASS:
        values = metrics.get(f"val_{score}") or [None] * classes.num_classes
        flat |= {f"val_{score}_{name}": value for name, value in zip(classes.names, values, strict=True)}
    return flat


def format_metrics_csv(history: Sequence[Mapping[str, Any]], classes: ClassMap) -> bytes:
    """Return the metrics of all epochs as CSV, one row per epoch; an undefined score is an empty cell."""
    buffer = io.StringIO()
    rows = [flatten_metrics(metrics, classes) for metrics in history]
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else _PER_EPOCH, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


class Tracking:
    """All trackers of a run; they are finished at the end of a ``with`` block.

    Args:
        config: Configuration of the run.
        classes: Classes of the run.
        output: URI of the output folder.
        console: Where a warning is printed, once, for each tracker that fails.
        num_steps_done: The step after which the run resumes. Later rows of ``steps.csv`` are of an attempt that the
            run does not continue.

    Raises:
        ConfigError: A tracker's package is not installed, or its server or folder cannot be opened.
    """

    def __init__(
        self, config: TrainConfig, classes: ClassMap, output: str, console: Console, num_steps_done: int = 0
    ) -> None:
        self._classes = classes
        self._output = output
        self._console = console
        self._history: dict[int, Mapping[str, Any]] = {}
        self._trackers: list[Tracker] = []
        self._failed: list[Tracker] = []
        self._steps = StepTable()
        self._new_steps: list[StepRow] = []
        self._try(_STEPS_NAME, lambda: self._read_steps(num_steps_done))
        if config.tracking.tensorboard:
            self._trackers.append(_open("tensorboard", lambda: TensorBoardTracker(output)))
        if config.tracking.mlflow_uri:
            self._trackers.append(_open("mlflow", lambda: MlflowTracker(config, output)))
        self._last_flush_s = time.monotonic()
        self._pause_s = 0.0  # At least, between two flushes.

    def _read_steps(self, num_steps_done: int) -> None:
        """Log the steps of earlier starts again, because trackers may have lost them."""
        rows = read_steps(join_uri(self._output, _STEPS_NAME))
        self._new_steps = [row for row in rows if (row["step"] or 0) <= num_steps_done]

    def log(self, epochs: Sequence[Mapping[str, Any]]) -> bool:
        """Log the metrics of epochs; always return True, as no metrics stop the training."""
        for metrics in epochs:
            self._history[metrics["epoch"]] = metrics
        self.write_csv([self._history[epoch] for epoch in sorted(self._history)])
        for metrics in epochs:
            flat = flatten_metrics(metrics, self._classes)
            scalars = {name: value for name, value in flat.items() if value is not None and name != "epoch"}
            self._call_trackers(lambda tracker: tracker.log(metrics["epoch"], scalars))  # noqa: B023
        self._flush_steps_after(self._pause_s)
        return True

    def log_steps(self, rows: Sequence[StepRow]) -> None:
        """Log steps; they are written every half a minute, at the end of an epoch, and at the end of the run.

        If that takes more than a twentieth of the time, they are written less often.
        """
        self._new_steps += rows
        self._flush_steps_after(max(_FLUSH_INTERVAL_S, self._pause_s))

    def _flush_steps_after(self, pause_s: float) -> None:
        if time.monotonic() - self._last_flush_s >= pause_s:
            self._flush_steps()

    def _flush_steps(self) -> None:
        began_s = time.monotonic()
        rows = list({row["step"]: row for row in self._new_steps}.values())  # A resumed run repeats some.
        self._new_steps = []
        if rows:
            self._steps.add(rows)
            self._try(_STEPS_NAME, lambda: write_bytes(join_uri(self._output, _STEPS_NAME), self._steps.format()))
            self._call_trackers(lambda tracker: tracker.log_steps(rows))
        self._last_flush_s = time.monotonic()
        self._pause_s = (self._last_flush_s - began_s) / _MAX_FLUSH_SHARE

    def write_csv(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write ``metrics.csv`` with the metrics of all epochs."""
        content = format_metrics_csv(history, self._classes)
        self._try("metrics.csv", lambda: write_bytes(join_uri(self._output, "metrics.csv"), content))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._flush_steps()
        for tracker in self._trackers:
            self._try(type(tracker).__name__, lambda: tracker.close(succeeded=kind is None))  # noqa: B023
        for tracker in self._failed:
            with suppress(Exception):  # A warning has been printed.
                tracker.close(succeeded=kind is None)

    def _call_trackers(self, call: Callable[[Tracker], None]) -> None:
        """Call a method of each tracker; one that fails is not called again."""
        for tracker in list(self._trackers):
            if not self._try(type(tracker).__name__, lambda: call(tracker)):  # noqa: B023
                self._trackers.remove(tracker)
                self._failed.append(tracker)

    def _try(self, name: str, act: Callable[[], object]) -> bool:
        try:
            act()
        except Exception as error:  # Trackers and their servers raise many types.
            self._console.print(f"warning: {name}: {flatten_message(error)}; training continues", highlight=False)
            return False
        return True


def _clean_name(name: str) -> str:
    """Replace the characters that MLflow does not allow in names; class names may contain any."""
    return re.sub(r"[^\w\-./ ]", "_", name)


def _split_row(row: StepRow) -> tuple[int, dict[str, float]]:
    """Return the number of a step, and its defined metrics by the names that they have in trackers."""
    names = [name for name, value in row.items() if name not in ("step", "epoch") and value is not None]
    return int(row["step"] or 0), {_STEP_PREFIX + name: float(row[name] or 0) for name in names}


class _LoggedSteps:
    """The steps that a tracker has, and their losses. Workers that restart repeat the steps since the checkpoint."""

    def __init__(self, losses: Mapping[int, float | None]) -> None:
        self._losses = dict(losses)

    def add_new(self, rows: Sequence[StepRow]) -> list[tuple[int, dict[str, float]]]:
        """Add rows, and return ``_split_row`` of those that the tracker does not have, or has with another loss.

        The loss is another one if the run resumed with other settings.
        """
        new = []
        for step, scalars in map(_split_row, rows):
            loss = scalars.get(_STEP_PREFIX + "loss")
            if step not in self._losses or self._losses[step] != loss:
                self._losses[step] = loss
                new.append((step, scalars))
        return new


def _open(extra: str, build: Callable[[], Tracker]) -> Tracker:
    try:
        return build()
    except ImportError as error:
        raise ConfigError(f"tracking: {extra} is not installed; run: pip install 'segray[{extra}]'") from error
    except SegrayError:
        raise
    except Exception as error:
        raise ConfigError(f"tracking: {extra}: {flatten_message(error)}") from error


class TensorBoardTracker:
    """Writes event files to the folder ``tensorboard`` of the output, on any kind of storage."""

    def __init__(self, output: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder_uri = join_uri(output, "tensorboard")
        remove_folder(self._folder_uri)  # Every start logs the complete history again.
        self._spool = Path(tempfile.mkdtemp(prefix="segray-tensorboard-"))
        self._writer = SummaryWriter(str(self._spool))
        self._logged_steps = _LoggedSteps({})

    def log(self, epoch: int, scalars: Mapping[str, float]) -> None:
        """See ``Tracker.log``."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, epoch)
        self._upload()

    def log_steps(self, rows: Sequence[StepRow]) -> None:
        """See ``Tracker.log_steps``."""
        for step, scalars in self._logged_steps.add_new(rows):
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
        self._upload()

    def _upload(self) -> None:
        self._writer.flush()
        for path in self._spool.iterdir():
            write_bytes(join_uri(self._folder_uri, path.name), path.read_bytes())

    def close(self, succeeded: bool) -> None:
        """See ``Tracker.close``."""
        self._writer.close()
        shutil.rmtree(self._spool)


class MlflowTracker:
    """Logs to a run on an MLflow server; a resumed training run continues the same MLflow run."""

    def __init__(self, config: TrainConfig, output: str) -> None:
        # With the default of 7 retries, a mistyped URI takes four minutes to fail.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=config.tracking.mlflow_uri)
        uri = join_uri(output, "mlflow.json")
        if exists(uri):
            self._run_id = json.loads(read_bytes(uri))["run_id"]
        else:
            self._run_id = self._create_run(config, output)
            write_bytes(uri, json.dumps({"run_id": self._run_id}).encode())
        self._num_logged = len(self._client.get_metric_history(self._run_id, "loss"))
        rates, losses = (
            self._client.get_metric_history(self._run_id, _STEP_PREFIX + name) for name in ("learning_rate", "loss")
        )
        without_loss: dict[int, float | None] = {metric.step: None for metric in rates}
        self._logged_steps = _LoggedSteps(without_loss | {metric.step: metric.value for metric in losses})

    def _create_run(self, config: TrainConfig, output: str) -> str:
        name = config.tracking.mlflow_experiment
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run_id: str = self._client.create_run(experiment_id, tags={"segray.output": output}).info.run_id
        for section in ("model", "loss", "augmentation", "train"):
            for setting, value in getattr(config, section).model_dump(mode="json").items():
                self._client.log_param(run_id, f"{section}.{setting}", value)
        self._client.log_param(run_id, "image_size", config.image_size)
        return run_id

    def log(self, epoch: int, scalars: Mapping[str, float]) -> None:
        """See ``Tracker.log``."""
        if epoch > self._num_logged:
            self._send([(epoch, scalars)])

    def log_steps(self, rows: Sequence[StepRow]) -> None:
        """See ``Tracker.log_steps``."""
        self._send(self._logged_steps.add_new(rows))

    def _send(self, scalars_of_steps: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [
            Metric(_clean_name(name), value, now_ms, step)
            for step, scalars in scalars_of_steps
            for name, value in scalars.items()
        ]
        for start in range(0, len(metrics), _MLFLOW_BATCH):
            self._client.log_batch(self._run_id, metrics[start : start + _MLFLOW_BATCH])

    def close(self, succeeded: bool) -> None:
        """See ``Tracker.close``."""
        self._client.set_terminated(self._run_id, "FINISHED" if succeeded else "FAILED")
