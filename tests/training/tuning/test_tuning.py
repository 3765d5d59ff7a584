"""Hyperparameter search: drawn values, invalid search spaces, and a search that is killed and resumed."""

import csv
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ray import tune
from ray.util.placement_group import placement_group_table
from rich.console import Console

from segray.config import AugmentationSettings, TrainConfig, load_config
from segray.data.manifest import load_splits
from segray.data.sample_list import Splits
from segray.errors import ConfigError, RunMismatchError
from segray.models.bundle import load_bundle
from segray.training.driver import run_training
from segray.training.labels.split_report import SplitReport
from segray.training.tuning.search import run_search
from segray.training.tuning.search_space import check_space, draw_values, set_values
from segray.training.tuning.trial import Search, TrialRun

MakeConfig = Callable[..., TrainConfig]
FAILURE = re.compile(r"loss is (nan|inf) at step \d+ \(the weights were not updated\)")
SPACE = {
    "train.learning_rate": {"log_uniform": [1e-4, 1e-2]},
    "loss.dice": {"uniform": [0, 1]},
    "augmentation": {"choice": ["none", "strong"]},
    "train.global_batch_size": {"choice": [6, 12]},
}


def make_config(make: MakeConfig, output: Path, space: dict[str, Any] | None = None, **tune: Any) -> TrainConfig:
    config = make(output, num_epochs=3, num_train_workers=1)
    content = {
        **config.model_dump(mode="json"),
        "tune": {"space": SPACE if space is None else space, **tune},
    }
    return TrainConfig.model_validate(content)


def test_drawn_values_depend_only_on_seed_and_number_and_stay_within_the_space(
    make_train_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(make_train_config, tmp_path)
    drawn = [draw_values(config, number) for number in range(200)]
    assert drawn == [draw_values(config, number) for number in range(200)]
    rates = np.array([values["train.learning_rate"] for values in drawn])
    assert rates.min() >= 1e-4
    assert rates.max() <= 1e-2
    assert 0.4 < (rates < 1e-3).mean() < 0.6  # Uniform in the logarithm.
    assert {values["augmentation"] for values in drawn} == {"none", "strong"}
    assert {values["train.global_batch_size"] for values in drawn} == {6, 12}
    other = make_config(make_train_config, tmp_path, seed=1)
    assert draw_values(other, 0) != drawn[0]


def test_int_uniform_includes_both_ends(make_train_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(make_train_config, tmp_path, {"train.eval_batch_size": {"int_uniform": [2, 4]}})
    assert {draw_values(config, number)["train.eval_batch_size"] for number in range(50)} == {2, 3, 4}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, r"tune\.space: expected settings"),
        ({"data.train": {"choice": [1]}}, r"tune\.space\.data\.train: expected a setting in model, loss"),
        (
            {"train.learning_rat": {"uniform": [0.1, 0.2]}},
            r"train\.learning_rat=0\.1: train\.learning_rat: Extra inputs",
        ),
        (
            {"train.seed.x": {"choice": [1]}},
            r"tune\.space\.train\.seed\.x: seed is 0, not a section that x can be set in",
        ),
        ({"train.learning_rate": {"uniform": [-1, 0.2]}}, r"train\.learning_rate=-1: .*greater than 0"),
        ({"train.num_epochs": {"choice": [3, 9]}}, r"tune\.space\.train\.num_epochs: trials are compared"),
        ({"train": {"choice": [{"seed": 1}]}}, r"^tune\.space\.train: expected single settings"),
        ({"train.folds": {"choice": [3, 5]}}, r"^tune\.space\.train\.folds: cannot be searched"),
        ({"model.encoder_name": {"choice": ["resnet18", "resnet19"]}}, r"unknown encoder 'resnet19'"),
    ],
)
def test_an_invalid_search_space_raises_before_anything_is_written(
    make_train_config: MakeConfig, tmp_path: Path, space: dict[str, Any], message: str
) -> None:
    config = make_config(make_train_config, tmp_path / "out", space)
    if "model.encoder_name" in space:
        config = config.model_copy(update={"model": config.model.model_copy(update={"arch": "unet"})})
    with pytest.raises(ConfigError, match=message):
        check_space(config)
    assert not (tmp_path / "out").exists()


def test_a_drawn_preset_replaces_the_other_settings_of_its_section(
    make_train_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(make_train_config, tmp_path)
    values = {"augmentation.blur": 0.0, "augmentation.preset": "strong"}
    expected = AugmentationSettings.model_validate({"preset": "strong", "blur": 0})
    assert set_values(config, values).augmentation == expected


def test_each_trial_has_the_class_weights_of_its_own_settings(make_train_config: MakeConfig, tmp_path: Path) -> None:
    space = {"loss.class_weights": {"choice": [None, "auto", [1, 2, 3]]}}
    config = make_config(make_train_config, tmp_path, space)
    report = replace(SplitReport.empty(3), pixel_count=np.array([1, 2, 4]), image_px=np.array([8, 8, 8]))
    search = Search(config, Splits([], []), report, str(tmp_path))
    for number in range(20):
        given = draw_values(config, number)["loss.class_weights"]
        weights = search.build_trial_job(number).class_weights
        expected = given if given is None else [2, 1, 0.5] if given == "auto" else list(given)
        assert (None if weights is None else weights.tolist()) == expected


def search(config: TrainConfig) -> str:
    output = io.StringIO()
    run_search(config, Console(file=output, width=300))
    return output.getvalue()


def read_trials(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "trials.csv").open()))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_killed_search_resumes_and_its_best_configuration_trains_to_the_same_score(
    make_train_config: MakeConfig, tmp_path: Path
) -> None:
    output = tmp_path / "search"
    config = make_config(make_train_config, output, num_trials=2)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-c", "from segray.cli import main; main()", "tune", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    deadline_s = time.monotonic() + 240
    while not list((output / "trials" / "001").glob("ray_train/checkpoint_*/checkpoint.json")):
        assert time.monotonic() < deadline_s, "no checkpoint of the second trial within 240 s"
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {path: path.stat().st_mtime_ns for path in (output / "trials" / "000").rglob("checkpoint.json")}
    assert before
    printed = search(config)
    after = {path: path.stat().st_mtime_ns for path in (output / "trials" / "000").rglob("checkpoint.json")}
    assert after == before  # The first trial had finished, so none of its checkpoints is written again.
    trials = read_trials(output)
    assert sorted(int(trial["trial"]) for trial in trials) == [0, 1]
    scores = [float(trial["val_mean_iou"]) for trial in trials]
    assert scores == sorted(scores, reverse=True)
    assert all(trial["outcome"] in ("finished", "stopped early") for trial in trials)
    assert "trial 1: " in printed
    best = load_config(TrainConfig, str(output / "best.yaml"))
    assert best.train.learning_rate == pytest.approx(float(trials[0]["train.learning_rate"]))
    assert (Path(best.output) / "labels.json").exists()  # So its labels are not checked again.
    bundle = load_bundle(run_training(best, Console(quiet=True)))
    assert bundle.manifest.metrics["val_mean_iou"] == pytest.approx(scores[0])
    with pytest.raises(RunMismatchError, match=r"tune\.seed: the run has 0, got 5"):
        search(config.model_copy(update={"tune": config.tune.model_copy(update={"seed": 5})}))


def get_reserved_groups() -> list[dict[str, Any]]:
    """Return the placement groups in which workers hold CPUs; a leaked one would block all later trials."""
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


@pytest.mark.usefixtures("ray_session")
def test_a_failed_trial_does_not_affect_the_others(make_train_config: MakeConfig, tmp_path: Path) -> None:
    space = {"train.learning_rate": {"choice": [1e-3, 1e30]}}
    config = make_config(make_train_config, tmp_path, space, num_trials=2, max_concurrent_trials=2, seed=4)
    rates = [draw_values(config, number)["train.learning_rate"] for number in range(2)]
    assert set(rates) == {1e-3, 1e30}
    search(config)
    for trial in read_trials(tmp_path):
        is_failed = rates[int(trial["trial"])] == 1e30
        assert trial["outcome"].startswith("failed: ") == is_failed
        assert not is_failed or FAILURE.search(trial["outcome"])
        assert trial["outcome"].count(".jpg") == 6 * is_failed  # The global batch.
    assert not get_reserved_groups()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_stopped_trial_has_ended_and_released_its_resources(make_train_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(make_train_config, tmp_path)
    start = Search(config, Splits([], []), SplitReport.empty(3), str(tmp_path))
    trial = tune.with_parameters(TrialRun, search=replace(start, splits=load_splits(config.data)))({"number": 0})
    first = trial.train()
    assert (first["epoch"], first["done"]) == (1, False)
    assert get_reserved_groups()
    trial.stop()
    assert not get_reserved_groups()
    # The finished epoch is in a checkpoint, and no other epoch was started.
    assert len(list((tmp_path / "trials" / "000" / "ray_train").glob("checkpoint_*/checkpoint.json"))) == 1
    again = tune.with_parameters(TrialRun, search=replace(start, splits=load_splits(config.data)))({"number": 0})
    reported = [again.train() for _ in range(3)]
    again.stop()
    assert [(score["epoch"], score["done"]) for score in reported] == [(1, False), (2, False), (3, True)]
    assert reported[0]["val_mean_iou"] == first["val_mean_iou"]
