"""Trials: training runs in folders of their own, side by side with Ray Tune, for a search or a cross-validation."""

import logging
import queue
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler
from rich.console import Console

from segray.config import TrainConfig
from segray.data.sample_list import Splits
from segray.runtime.failures import named_failure
from segray.storage import join_uri
from segray.training.checkpoint import RUN_NAME, find_newest_history
from segray.training.driver import build_job
from segray.training.job import TrainJob, is_finished
from segray.training.labels.split_report import SplitReport
from segray.training.pretrained import copy_pretrained, save_pretrained
from segray.training.tuning.search_space import draw_values, set_values

METRIC, TIME = "val_mean_iou", "epoch"


class JobSource(Protocol):
    """What trials are made of."""

    def build_trial_job(self, number: int) -> TrainJob:
        """Return the training job of a trial."""


@dataclass(frozen=True)
class Search:
    """The inputs shared by all trials.

    Attributes:
        config: The configuration in which each trial replaces the searched settings.
        splits: Labelled images for training and validation.
        report: Label report of the training split.
        output: URI of the search's output folder.
    """

    config: TrainConfig
    splits: Splits
    report: SplitReport
    output: str

    def build_trial_job(self, number: int) -> TrainJob:
        """Return the training job of a trial."""
        trial_uri = join_uri(self.output, "trials", f"{number:03d}")
        config = set_values(self.config, draw_values(self.config, number)).model_copy(update={"output": trial_uri})
        copy_pretrained(self.output, config)
        job = build_job(config, self.splits, self.report, join_uri(trial_uri, RUN_NAME))
        return replace(job, pauses_after_epoch=True)


class TrialRun(tune.Trainable):  # type: ignore[misc]
    """Trains with the drawn settings, starting from the trial's newest checkpoint; one step is one evaluated epoch.

    Tune kills the process of a trial that it stops, so the run in that process must end first. Otherwise Ray
    Train's workers would die with the process, but the CPUs and GPUs reserved for them would be released only if Ray's
    dashboard is running (Ray Train asks it whether its controller is alive), and without them no later trial can
    start. Therefore the run pauses after each epoch, and ends by itself if it may not continue. A job that does not
    pause after epochs runs to its end.
    """

    def setup(self, config: dict[str, Any], search: JobSource) -> None:
        """Start training in a thread."""
        self._job = search.build_trial_job(config["number"])
        self._scores: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self._permissions: queue.Queue[bool] = queue.Queue()
        self._history: list[dict[str, Any]] = []
        self._is_waiting = False
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def step(self) -> dict[str, Any]:
        """Let training continue, and return the score of the next evaluated epoch.

        Raises:
            SegrayError: The training run failed.
        """
        if self._is_waiting:
            self._permissions.put(True)
        score = self._scores.get()
        self._is_waiting = True
        if isinstance(score, BaseException):
            raise score
        return score

    def cleanup(self) -> None:
        """Stop training after the current epoch, and wait until the run has ended."""
        self._permissions.put(False)
        self._thread.join()

    def _train(self) -> None:
        try:
            with named_failure("the trial"):
                self._run()
        except BaseException as error:  # Whatever fails must reach step(), which waits for a score.
            self._scores.put(error)

    def _run(self) -> None:
        from segray.training.fit import fit

        if self._track(find_newest_history(self._job.run_uri)) and not self._is_finished():
            save_pretrained(self._job.config)
            fit(self._job, self._job.config.output, Console(quiet=True), self._track)
            self._track(find_newest_history(self._job.run_uri))  # The display may have missed the last epochs.
        if not self._job.pauses_after_epoch:  # The trial is done when its checkpoints are complete.
            last = self._history[-1]
            score = {TIME: last[TIME], METRIC: last.get(METRIC, float("nan"))}
            self._scores.put(score | {tune.result.DONE: True})

    def _track(self, epochs: Sequence[dict[str, Any]]) -> bool:
        """Report each new epoch once, and return whether training may continue after them."""
        for metrics in epochs:
            if metrics[TIME] <= len(self._history):
                continue
            self._history.append(metrics)
            if METRIC in metrics:
                score = {name: metrics[name] for name in (TIME, METRIC)}
                pauses = self._job.pauses_after_epoch
                self._scores.put(score | {tune.result.DONE: pauses and self._is_finished()})
                if pauses and not self._permissions.get():
                    self._permissions.put(False)  # A refusal stays in force for all later calls.
                    return False
        return True

    def _is_finished(self) -> bool:
        return is_finished(self._history, self._job.config.train)


def run_trials(
    source: JobSource,
    numbers: Sequence[int],
    board: tune.Callback,
    *,
    max_concurrent: int,
    scheduler: TrialScheduler | None = None,
) -> tune.ResultGrid:
    """Run trials to their end; Ray must be connected.

    Args:
        source: Makes the training job of each trial.
        numbers: Numbers of the trials.
        board: Is told the score of each evaluated epoch, and how each trial ends.
        max_concurrent: Number of trials that run at the same time.
        scheduler: Decides which trials stop early; None lets all of them finish.
    """
    # The trials run on the driver's node, because Tune needs a folder that all of them can access. Their training
    # workers can run on any node.
    here = dict.fromkeys(_list_node_resources(), 0.001)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # It would print full tracebacks of failed trials.
    with tempfile.TemporaryDirectory(prefix="segray-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(TrialRun, search=source), here),
            param_space={"number": tune.grid_search(list(numbers))},
            tune_config=tune.TuneConfig(max_concurrent_trials=max_concurrent, scheduler=scheduler),
            run_config=tune.RunConfig(
                storage_path=folder,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # Training writes its own.
                callbacks=[board],
                verbose=0,
            ),
        )
        return tuner.fit()


def _list_node_resources() -> list[str]:
    """Return the name of the resource that only the driver's node has (``node:<address>``), in a list."""
    node_id = ray.get_runtime_context().get_node_id()
    (resources,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id)
    return [name for name in resources if name.startswith("node:") and name != "node:__internal_head__"]
