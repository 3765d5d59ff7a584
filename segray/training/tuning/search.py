"""Hyperparameter search (``segray tune``): Ray Tune trains with randomly drawn settings, and ASHA stops weak trials.

The settings of a trial depend only on the seed and the trial's number, and its progress is in its checkpoints. To
resume an interrupted search, the same command starts all trials again: each reports its finished epochs and continues
from its newest checkpoint. Ray Tune's own state, which is pickled, is never read back.

Source of the schedule: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020 (ASHA).
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from segray.config import TrainConfig
from segray.data.manifest import load_splits
from segray.errors import TrainingError
from segray.progress import build_bar
from segray.runtime.autoscaling import reported_shortage
from segray.runtime.connect import connect_ray
from segray.runtime.failures import describe_cause, find_segray_error, translated_ray_errors
from segray.storage import join_uri, write_bytes
from segray.training.binding import Binding
from segray.training.driver import check_network, check_run, describe_run, print_wait, resolve_output
from segray.training.job import get_classes
from segray.training.labels.record import find_record
from segray.training.pretrained import save_pretrained
from segray.training.sampling import needs_presence
from segray.training.tuning.search_space import check_space, draw_values, format_values, set_values
from segray.training.tuning.trial import METRIC, TIME, Search, run_trials

_BINDING_NAME = "tune.json"
_NUM_SHOWN = 10


def run_search(config: TrainConfig, console: Console) -> "TuneResult":
    """Run or resume a search; writes ``trials.csv`` and ``best.yaml`` under the output.

    Raises:
        SegrayError: The input or the search space is unusable, the output belongs to another search, or every trial
            failed.
    """
    config = resolve_output(config)
    check_space(config)
    check_network(config)
    splits = load_splits(config.data)
    output = config.output
    settings = {
        **config.weight_settings,
        "tune": config.tune.model_dump(mode="json", include={"space", "seed"}),
    }
    binding = Binding(join_uri(output, _BINDING_NAME), settings, splits.compute_sha256())
    binding.require_same()
    console.print(describe_run(config, splits), highlight=False)
    num_workers = config.train.num_train_workers * config.tune.max_concurrent_trials
    with connect_ray(num_workers, num_workers if config.train.use_gpu else 0), reported_shortage(console):
        print_wait(config, console)
        report = check_run(config, splits, console)
        binding.write()
        save_pretrained(config)
        board = _run_trials(Search(config, splits, report, output), console)
    result = _write_best(board, config, output, console)
    checked = splits.compute_sha256(with_version=True)
    if record := find_record(output, checked, get_classes(config), needs_presence(config)):
        record.write(result.config.output)  # For segray train, which continues the best trial.
    return result


class TrialRecord(BaseModel):
    """Settings, scores and outcome of a trial.

    Attributes:
        number: Number of the trial; with ``tune.seed`` it determines the drawn settings.
        values: The drawn settings, by dotted name.
        scores: Validation mean IoU of each evaluated epoch.
        outcome: How the trial ended; empty while it runs.
    """

    number: int
    values: dict[str, Any]
    scores: dict[int, float] = {}
    outcome: str = ""

    @property
    def best(self) -> float:
        """The highest score; -1 if there is none."""
        return max(self.scores.values(), default=-1.0)


@dataclass(frozen=True)
class TuneResult:
    """A complete search.

    Attributes:
        config: The best configuration; training with it resumes the best trial and writes its bundle.
        config_uri: URI of ``best.yaml``, which contains it.
        trials: All trials, best first.
    """

    config: TrainConfig
    config_uri: str
    trials: Sequence[TrialRecord]


class ScoreBoard(tune.Callback):  # type: ignore[misc]
    """Tune callback that keeps the records of all trials by number, and shows progress."""

    def __init__(self, config: TrainConfig, bar: Progress) -> None:
        self.records = {
            number: TrialRecord(number=number, values=draw_values(config, number))
            for number in range(config.tune.num_trials)
        }
        self._num_epochs = config.train.num_epochs
        self._bar = bar
        self._task = bar.add_task("tune", total=config.tune.num_trials, note="starting")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, and a progress display cannot be pickled.

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        """Record the score of an epoch."""
        self.records[trial.config["number"]].scores[result[TIME]] = result[METRIC]
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Record that a trial finished, or was stopped early."""
        record = self.records[trial.config["number"]]
        self._end(trial, "finished" if max(record.scores, default=0) >= self._num_epochs else "stopped early")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Record that a trial failed; Tune reports the reason at the end of the search."""
        self._end(trial, "failed")

    def explain_failures(self, results: Iterable[tune.Result]) -> None:
        """Add the reasons for failure to the records of failed trials."""
        for result in results:
            if result.error is not None and result.config is not None:
                reason = find_segray_error(result.error) or describe_cause(result.error)
                self.records[result.config["number"]].outcome = f"failed: {reason}"

    def _end(self, trial: Trial, outcome: str) -> None:
        number = trial.config["number"]
        record = self.records[number]
        record.outcome = outcome
        score = f"val mean IoU {record.best:.4f}, " if record.scores else ""
        self._bar.console.print(
            f"trial {number}: {score}{len(record.scores)} epochs, {outcome}: {format_values(record.values)}",
            highlight=False,
        )
        self._show()

    def _show(self) -> None:
        num_ended = sum(bool(record.outcome) for record in self.records.values())
        best = max(record.best for record in self.records.values())
        self._bar.update(self._task, completed=num_ended, note=f"best {best:.4f}" if best >= 0 else "")


def _run_trials(search: Search, console: Console) -> ScoreBoard:
    config = search.config
    scheduler = ASHAScheduler(
        time_attr=TIME,
        metric=METRIC,
        mode="max",
        max_t=config.train.num_epochs,
        grace_period=config.tune.grace_epochs,
        reduction_factor=config.tune.reduction_factor,
    )
    with build_bar(console, "trials") as bar, translated_ray_errors("the search"):
        board = ScoreBoard(config, bar)
        results = run_trials(
            search, list(board.records), board, scheduler=scheduler, max_concurrent=config.tune.max_concurrent_trials
        )
        board.explain_failures(results)
    return board


def _write_best(board: ScoreBoard, config: TrainConfig, output: str, console: Console) -> TuneResult:
    """Write ``trials.csv`` and ``best.yaml``, and print the best trials."""
    ranked = sorted(board.records.values(), key=lambda record: record.best, reverse=True)
    write_bytes(join_uri(output, "trials.csv"), format_trials_csv(ranked))
    best = ranked[0]
    if not best.scores:
        raise TrainingError(f"all {len(ranked)} trials failed; the first one {board.records[0].outcome}")
    console.print(_build_table(ranked[:_NUM_SHOWN]))
    trial_uri = join_uri(output, "trials", f"{best.number:03d}")
    chosen = set_values(config, best.values).model_copy(update={"output": trial_uri})
    best_uri = join_uri(output, "best.yaml")
    text = yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False)
    write_bytes(best_uri, f"# trial {best.number}: val mean IoU {best.best:.4f}\n{text}".encode())
    return TuneResult(chosen, best_uri, ranked)


def _build_table(ranked: Sequence[TrialRecord]) -> Table:
    table = Table("trial", "val mean IoU", "epochs", "outcome", *ranked[0].values)
    for record in ranked:
        cells = [format_values({name: value}).partition("=")[2] for name, value in record.values.items()]
        table.add_row(str(record.number), f"{record.best:.4f}", str(len(record.scores)), record.outcome, *cells)
    return table


def format_trials_csv(ranked: Sequence[TrialRecord]) -> bytes:
    """Return the trials, best first, as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["trial", METRIC, "num_epochs", "outcome", *ranked[0].values])
    for record in ranked:
        score = record.best if record.scores else ""
        writer.writerow([record.number, score, len(record.scores), record.outcome, *record.values.values()])
    return buffer.getvalue().encode()
