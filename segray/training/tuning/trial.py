"""One trial of a search: an ordinary run in a folder of its own, that waits after each epoch to be told to go on."""

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import tune
from rich.console import Console

from segray.config import TrainConfig
from segray.data.manifest import Splits
from segray.storage import join_uri
from segray.training.checkpoint import RUN_NAME, find_newest_history
from segray.training.driver import build_job
from segray.training.job import TrainJob, is_finished
from segray.training.labels.inspect import LabelReport
from segray.training.tuning.search_space import draw_values, set_values

METRIC, TIME = "val_mean_iou", "epoch"


@dataclass(frozen=True)
class Search:
    """What every trial starts from.

    Attributes:
        config: The configuration that the settings drawn are put into.
        splits: Labelled images.
        report: Of the training labels.
        output: Of the search.
    """

    config: TrainConfig
    splits: Splits
    report: LabelReport
    output: str

    def build_trial_job(self, number: int) -> TrainJob:
        """Return the run of a trial."""
        trial_uri = join_uri(self.output, "trials", f"{number:03d}")
        config = set_values(self.config, draw_values(self.config, number)).model_copy(update={"output": trial_uri})
        job = build_job(config, self.splits, self.report, join_uri(trial_uri, RUN_NAME))
        return replace(job, waits_for_leave=True)


class TrialRun(tune.Trainable):  # type: ignore[misc]
    """Trains with the settings drawn, from the trial's newest checkpoint; a step of it is an evaluated epoch.

    Tune kills the process of a trial that it stops. The run in it must have ended by then: Ray Train's workers would
    die with it, but the CPUs and GPUs reserved for them come back only where Ray's dashboard runs (it is what Ray Train
    asks whether its controller lives), and without them no later trial can start. So the run waits after each epoch,
    and ends by itself when it is told to.
    """

    def setup(self, config: dict[str, Any], search: Search) -> None:
        """Begin to train."""
        self._job = search.build_trial_job(config["number"])
        self._scores: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self._leaves: queue.Queue[bool] = queue.Queue()
        self._history: list[dict[str, Any]] = []
        self._is_waiting = False
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def step(self) -> dict[str, Any]:
        """Return the score of the next epoch that is evaluated.

        Raises:
            SegrayError: Of the run.
        """
        if self._is_waiting:
            self._leaves.put(True)
        score = self._scores.get()
        self._is_waiting = True
        if isinstance(score, BaseException):
            raise score
        return score

    def cleanup(self) -> None:
        """End the run, and wait until it has ended."""
        self._leaves.put(False)
        self._thread.join()

    def _train(self) -> None:
        from segray.training.fit import fit

        try:
            if self._track(find_newest_history(self._job.run_uri)) and not self._is_finished():
                fit(self._job, self._job.config.output, Console(quiet=True), self._track)
                self._track(find_newest_history(self._job.run_uri))  # whatever the display has missed
        except BaseException as error:  # all of them: the step waits for a score
            self._scores.put(error)

    def _track(self, epochs: Sequence[dict[str, Any]]) -> bool:
        """Tell of each epoch, once; return whether the run goes on after them."""
        for metrics in epochs:
            if metrics[TIME] <= len(self._history):
                continue
            self._history.append(metrics)
            if METRIC in metrics:
                score = {name: metrics[name] for name in (TIME, METRIC)}
                self._scores.put(score | {tune.result.DONE: self._is_finished()})
                if not self._leaves.get():
                    self._leaves.put(False)  # once told to stop, for ever
                    return False
        return True

    def _is_finished(self) -> bool:
        return is_finished(self._history, self._job.config.train)
