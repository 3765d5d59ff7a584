"""``segray tune``: settings are drawn, Ray Tune trains with each, and ASHA stops those that lag behind.

What is drawn for a trial is a matter of the seed and its number alone, and what it has learned is in its checkpoints.
So a search that was interrupted is simply begun again: every trial tells what it has behind it and goes on. Ray Tune's
own state, which is pickled, is never read back.

Source of the schedule: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020 (ASHA).
"""

import csv
import io
import logging
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import yaml
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
from segray.runtime.connect import connect_ray, find_segray_error, get_last_line, translated_ray_errors
from segray.storage import join_uri, normalize_uri, write_bytes
from segray.training.binding import Binding
from segray.training.driver import check_network, check_run, describe_run, print_wait
from segray.training.tuning.search_space import check_space, draw_values, format_values, set_values
from segray.training.tuning.trial import METRIC, TIME, Search, TrialRun

_BINDING_NAME = "tune.json"
_NUM_SHOWN = 10


def run_search(config: TrainConfig, console: Console) -> str:
    """Try settings, and return the URI of the best configuration; a search that was interrupted goes on.

    Raises:
        SegrayError: The input or the space is unusable, the output belongs to another search, or every trial failed.
    """
    check_space(config)
    check_network(config)
    splits = load_splits(config.data)
    output = normalize_uri(config.output)
    space = {name: drawn_from.model_dump(mode="json") for name, drawn_from in config.tune.space.items()}
    settings = {**config.of_weights, "tune": {"space": space, "seed": config.tune.seed}}
    binding = Binding(join_uri(output, _BINDING_NAME), settings, splits.compute_sha256())
    binding.require_same()
    console.print(describe_run(config, splits), highlight=False)
    num_workers = config.train.num_train_workers * config.tune.max_concurrent_trials
    with connect_ray(num_workers, num_workers if config.train.use_gpu else 0), reported_shortage(console):
        print_wait(config, console)
        report = check_run(config, splits, console)
        binding.write()
        board = _run_trials(Search(config, splits, report, output), console)
    return _write_best(board, config, output, console)


@dataclass
class TrialRecord:
    """What is known of a trial: its epochs' scores, and how it ended ("" while it runs)."""

    values: dict[str, Any]
    scores: dict[int, float] = field(default_factory=dict)
    outcome: str = ""

    @property
    def best(self) -> float:
        """The highest score; -1 without any."""
        return max(self.scores.values(), default=-1.0)


class ScoreBoard(tune.Callback):  # type: ignore[misc]
    """Keeps the records of all trials, by number, and shows them."""

    def __init__(self, config: TrainConfig, bar: Progress) -> None:
        self.records = {number: TrialRecord(draw_values(config, number)) for number in range(config.tune.num_trials)}
        self._num_epochs = config.train.num_epochs
        self._bar = bar
        self._task = bar.add_task("tune", total=config.tune.num_trials, note="starting")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks down, and a display cannot be

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        """Note a score."""
        self.records[trial.config["number"]].scores[result[TIME]] = result[METRIC]
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Note a trial that ran to its end, or was stopped early."""
        record = self.records[trial.config["number"]]
        self._end(trial, "finished" if max(record.scores, default=0) >= self._num_epochs else "stopped early")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Note a trial that failed; why, Tune says when all is over."""
        self._end(trial, "failed")

    def explain_failures(self, results: Iterable[tune.Result]) -> None:
        """Add to the records of trials that failed what they failed of."""
        for result in results:
            if result.error is not None and result.config is not None:
                reason = find_segray_error(result.error) or get_last_line(result.error)
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
    # on the driver's own node: Tune wants a folder that all its trials see, and theirs are elsewhere
    here = dict.fromkeys(_list_node_resources(), 0.001)
    trainable = tune.with_resources(tune.with_parameters(TrialRun, search=search), here)
    with build_bar(console, "trials") as bar, tempfile.TemporaryDirectory(prefix="segray-tune-") as folder:
        board = ScoreBoard(config, bar)
        tuner = tune.Tuner(
            trainable,
            param_space={"number": tune.grid_search(list(board.records))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=config.tune.max_concurrent_trials,
                scheduler=ASHAScheduler(
                    time_attr=TIME,
                    metric=METRIC,
                    mode="max",
                    max_t=config.train.num_epochs,
                    grace_period=config.tune.grace_epochs,
                    reduction_factor=config.tune.reduction_factor,
                ),
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # runs have their own
                callbacks=[board],
                verbose=0,
            ),
        )
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints what trials failed of at full length
        with translated_ray_errors("the search"):
            board.explain_failures(tuner.fit())
    return board


def _list_node_resources() -> list[str]:
    """Return the resource that stands for the driver's own node."""
    node_id = ray.get_runtime_context().get_node_id()
    (resources,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id)
    return [name for name in resources if name.startswith("node:") and name != "node:__internal_head__"]


def _write_best(board: ScoreBoard, config: TrainConfig, output: str, console: Console) -> str:
    """Write and print what was found; return the URI of the best configuration."""
    ranked = sorted(board.records.items(), key=lambda pair: pair[1].best, reverse=True)
    write_bytes(join_uri(output, "trials.csv"), format_trials_csv(ranked))
    number, best = ranked[0]
    if not best.scores:
        raise TrainingError(f"all {len(ranked)} trials failed; the first: {board.records[0].outcome}")
    table = Table("trial", "val mean IoU", "epochs", "outcome", *best.values)
    for trial, record in ranked[:_NUM_SHOWN]:
        cells = [format_values({name: value}).partition("=")[2] for name, value in record.values.items()]
        table.add_row(str(trial), f"{record.best:.4f}", str(len(record.scores)), record.outcome, *cells)
    console.print(table)
    trial_uri = join_uri(output, "trials", f"{number:03d}")
    chosen = set_values(config, best.values).model_copy(update={"output": trial_uri})
    best_uri = join_uri(output, "best.yaml")
    text = yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False)
    write_bytes(best_uri, f"# trial {number}: val mean IoU {best.best:.4f}\n{text}".encode())
    return best_uri


def format_trials_csv(ranked: Sequence[tuple[int, TrialRecord]]) -> bytes:
    """Return the trials, best first, as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["trial", METRIC, "num_epochs", "outcome", *ranked[0][1].values])
    for number, record in ranked:
        score = record.best if record.scores else ""
        writer.writerow([number, score, len(record.scores), record.outcome, *record.values.values()])
    return buffer.getvalue().encode()
