"""Cross-validation (``train.folds``): train and score a model for each fold, then train one on all images.

Each fold is an ordinary training run in a folder of its own, ``OUTPUT/folds/1`` and so on, that Ray Tune runs as a
trial; folds run side by side if the cluster is large enough. A fold's score is that of its last epoch: choosing an
epoch by the images that the fold holds out would make it too high. To resume, the same command starts the folds that
are not finished, each from its newest checkpoint.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from segray.config import TrainConfig, TrainSettings, find_differences
from segray.data.manifest import load_folds
from segray.data.sample_list import Folds
from segray.errors import TrainingError
from segray.progress import build_bar
from segray.runtime.autoscaling import find_capacity, reported_shortage
from segray.runtime.capacity import Capacity
from segray.runtime.connect import connect_ray
from segray.runtime.failures import describe_cause, find_segray_error, translated_ray_errors
from segray.storage import join_uri, write_bytes
from segray.training.checkpoint import RUN_NAME, find_newest_history, find_newest_phases
from segray.training.driver import (
    Validated,
    bind_output,
    build_job,
    check_network,
    check_once,
    is_bundled,
    print_wait,
    resolve_output,
    run_training,
    train_to_bundle,
)
from segray.training.folds.estimate import Estimate, describe_spread
from segray.training.job import TrainJob, get_classes, is_finished
from segray.training.labels.command import check_folds
from segray.training.labels.split_report import SplitReport, join_reports
from segray.training.placement import get_worker_needs
from segray.training.pretrained import copy_pretrained, find_preprocessing, save_pretrained
from segray.training.tuning.trial import METRIC, TIME, run_trials


def run_folds_and_training(config: TrainConfig, console: Console) -> str:
    """Train as configured, after a cross-validation if ``train.folds`` is set; return the URI of the bundle.

    Raises:
        SegrayError: As ``run_training``; ``TrainingError`` if a fold failed.
    """
    config = resolve_output(config)
    if config.train.folds is None:
        return run_training(config, console)
    check_network(config)
    folds = load_folds(config.data, config.train.folds)
    listing = folds.compute_sha256()
    bind_output(config, listing)
    validated = None if is_bundled(config) else _cross_validate(config, folds, listing, console)
    return train_to_bundle(config, folds.join(), listing, console, validated)


@dataclass(frozen=True)
class FoldPlan:
    """The folds of a cross-validation.

    Attributes:
        config: The configuration, with an absolute output; each fold has its own folder in it.
        folds: The labelled images, and the fold of each.
        reports: Label report of each fold.
    """

    config: TrainConfig
    folds: Folds
    reports: Sequence[SplitReport]

    def build_config(self, number: int) -> TrainConfig:
        """Return the configuration of a fold, given by its index from 0."""
        output = join_uri(self.config.output, "folds", str(number + 1))
        train = self.config.train.model_copy(update={"folds": None})
        return self.config.model_copy(update={"output": output, "train": train})

    def build_trial_job(self, number: int) -> TrainJob:
        """Return the training job of a fold, given by its index from 0; it has the class weights of its own images."""
        config = self.build_config(number)
        copy_pretrained(self.config.output, config)
        report = join_reports(self.reports, self.folds, held_out=number)
        return build_job(config, self.folds.hold_out(number), report, join_uri(config.output, RUN_NAME))

    def read_history(self, number: int) -> list[dict[str, Any]]:
        """Return the metrics of the finished epochs of a fold, given by its index from 0."""
        return find_newest_history(join_uri(self.build_config(number).output, RUN_NAME))

    def is_finished(self, number: int) -> bool:
        """Return whether a fold is finished, given by its index from 0."""
        return is_finished(self.read_history(number), self.config.train)


class FoldBoard(tune.Callback):  # type: ignore[misc]
    """Tune callback that shows the progress of all folds."""

    def __init__(self, plan: FoldPlan, num_finished: int, bar: Progress) -> None:
        self._num_epochs = plan.config.train.num_epochs
        self._scores: dict[int, dict[str, Any]] = {}
        self._num_finished = num_finished
        self._bar = bar
        total = len(plan.folds.sizes) * self._num_epochs
        self._task = bar.add_task("folds", total=total, completed=num_finished * self._num_epochs, note="starting")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, and a progress display cannot be pickled.

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        """Show the epoch and score of a fold."""
        number = trial.config["number"]
        self._scores[number] = result
        completed = self._num_finished * self._num_epochs + sum(score[TIME] for score in self._scores.values())
        note = f"fold {number + 1}, epoch {result[TIME]}: mean IoU {result[METRIC]:.4f}"
        self._bar.update(self._task, completed=completed, note=note)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Print the score of a finished fold."""
        number = trial.config["number"]
        score = f"mean IoU {self._scores[number][METRIC]:.4f}" if number in self._scores else "finished"
        self._bar.console.print(f"fold {number + 1}: {score}", highlight=False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Print that a fold failed; the reason is known when all folds have ended."""
        self._bar.console.print(f"fold {trial.config['number'] + 1}: failed", highlight=False)


def _cross_validate(config: TrainConfig, folds: Folds, listing: str, console: Console) -> Validated:
    """Run the folds that are not finished, and write ``cross_validation.csv`` and ``.json`` under the output."""
    num_workers = config.train.num_train_workers
    with connect_ray(num_workers, num_workers if config.train.use_gpu else 0), reported_shortage(console):
        print_wait(config, console)
        find_preprocessing(config)
        checked = folds.compute_sha256(with_version=True)
        reports = list(check_once(config, checked, partial(check_folds, config, folds, console), console).values())
        save_pretrained(config)
        plan = FoldPlan(config, folds, reports)
        _run_folds(plan, listing, count_concurrent(config.train, len(folds.sizes), find_capacity()), console)
    estimate = _collect(plan, console)
    write_bytes(join_uri(config.output, "cross_validation.json"), estimate.format_json())
    write_bytes(join_uri(config.output, "cross_validation.csv"), estimate.format_csv())
    console.print(_build_table(estimate))
    return Validated(estimate, join_reports(reports, folds))


def count_concurrent(settings: TrainSettings, num_folds: int, capacity: Capacity) -> int:
    """Return how many folds run at the same time: as many as the cluster has GPUs for, or nodes without GPUs.

    A worker without a GPU uses all cores of its node, so a second fold beside it would gain nothing. Ray may still
    place the workers of two folds on one node, because each requests only one CPU.
    """
    needs = get_worker_needs(settings)
    num_places = capacity.count(needs) if settings.use_gpu else capacity.count_nodes(needs)
    return int(max(1, min(num_folds, num_places / settings.num_train_workers)))


def _run_folds(plan: FoldPlan, listing: str, max_concurrent: int, console: Console) -> None:
    """Run the folds that are not finished; ``listing`` is the sha256 of all folds.

    Raises:
        RunMismatchError: The folder of a fold belongs to a run with other settings or images.
        TrainingError: A fold failed; the others have ended.
    """
    sizes = plan.folds.sizes
    bindings = [
        bind_output(plan.build_config(number), hashlib.sha256(f"{number} {listing}".encode()).hexdigest())
        for number in range(len(sizes))
    ]
    numbers = [number for number in range(len(sizes)) if not plan.is_finished(number)]
    console.print(
        f"cross-validation: {len(sizes)} folds of {', '.join(map(str, sizes))} images, {len(sizes) - len(numbers)} "
        f"finished, {max_concurrent} at a time",
        highlight=False,
    )
    if not numbers:
        return
    for number in numbers:
        bindings[number].write()
    with build_bar(console, "epochs") as bar, translated_ray_errors("the cross-validation"):
        board = FoldBoard(plan, len(sizes) - len(numbers), bar)
        results = run_trials(plan, numbers, board, max_concurrent=max_concurrent)
    failed = [result for result in results if result.error is not None]
    if failed:
        error = failed[0].error
        first = (failed[0].config or {}).get("number", 0) + 1
        raise TrainingError(
            f"{len(failed)} of {len(sizes)} folds failed; to resume, rerun the same command. Fold {first}: "
            f"{find_segray_error(error) or describe_cause(error)}"
        ) from error


def _collect(plan: FoldPlan, console: Console) -> Estimate:
    """Return the scores of all folds, of the last epoch of each; warn of folds that had other settings."""
    from segray.training.tracking import format_metrics_csv
    from segray.training.worker.evaluation import pool_scores

    scores, changes = [], []
    for number in range(len(plan.folds.sizes)):
        config, history = plan.build_config(number), plan.read_history(number)
        if not is_finished(history, config.train) or METRIC not in history[-1]:
            raise TrainingError(
                f"fold {number + 1} has no scores of its last epoch; to train the fold again, rerun the same command "
                f"after removing {config.output}"
            )
        phases = find_newest_phases(join_uri(config.output, RUN_NAME))
        differences = [line for phase in phases for line in find_differences(phase.settings, config.phase_settings)]
        if differences:
            listed = "; ".join(dict.fromkeys(differences))
            changes.append(f"fold {number + 1} was trained, at least in part, with other settings: {listed}")
            remedy = f"to train it again, remove {config.output} and rerun the same command"
            console.print(f"warning: {changes[-1]}; {remedy}", highlight=False)
        write_bytes(join_uri(config.output, "metrics.csv"), format_metrics_csv(history, get_classes(config)))
        scores.append({name: value for name, value in history[-1].items() if not name.endswith("_images")})
    pooled = pool_scores(scores)
    return Estimate(plan.config.data.class_names, plan.folds.sizes, tuple(scores), pooled, tuple(changes))


def _build_table(estimate: Estimate) -> Table:
    table = Table("class", "IoU", "std", "min", "max", "Dice", "std", "min", "max")
    for name, spreads in estimate.rows:
        table.add_row(name, *(cell for spread in spreads.values() for cell in describe_spread(spread)))
    return table
