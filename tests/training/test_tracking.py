"""Metrics of a run in metrics.csv, TensorBoard and MLflow."""

import csv
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from segray.config import TrainConfig
from segray.data.classes import ClassMap
from segray.errors import ConfigError, TrainingError
from segray.training.tracking import Tracking, flatten_metrics, format_metrics_csv

CLASSES = ClassMap(("a", "b"), (0, 1))
EVALUATED: dict[str, Any] = {
    "epoch": 2,
    "loss": 0.5,
    "learning_rate": 0.01,
    "images_per_s": 7.5,
    "num_skipped_steps": 2,
    "val_mean_iou": 0.25,
    "val_mean_dice": 0.4,
    "val_dataset_iou": [0.25, None],
    "val_dataset_dice": [0.4, None],
    "val_confusion": [[1, 0], [0, 1]],
}
NOT_EVALUATED = {"epoch": 1, "loss": 0.75, "learning_rate": 0.02, "images_per_s": 7.0, "num_skipped_steps": 0}


STEPS = [
    {"step": step, "epoch": 1, "loss": loss, "learning_rate": 0.02, "gradient_norm": None, "images_per_s": 8.5}
    for step, loss in ((10, 0.9), (20, None), (30, 0.7))
]


def make_config(output: Path, **tracking: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "data": {
                "train": {"images": "/i", "masks": "/m"},
                "val": {"fraction": 0.1},
                "class_names": ["a", "b"],
            },
            "image_size": [32, 32],
            "output": str(output),
            "tracking": tracking,
        }
    )


def read_csv(content: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content)))


def test_the_csv_has_a_column_per_score_and_empty_cells_where_undefined() -> None:
    first, second = read_csv(format_metrics_csv([NOT_EVALUATED, EVALUATED], CLASSES).decode())
    assert second["epoch"] == "2"
    assert second["val_mean_iou"] == "0.25"
    assert second["val_dataset_iou_a"] == "0.25"
    assert second["val_dataset_iou_b"] == ""
    assert second["val_dataset_dice_a"] == "0.4"
    assert first["loss"] == "0.75"
    assert {name for name, value in first.items() if value} == {
        "epoch",
        "loss",
        "learning_rate",
        "images_per_s",
        "num_skipped_steps",
    }
    assert first.keys() == second.keys()


def test_metrics_csv_holds_each_epoch_once_in_order(tmp_path: Path, console: Console) -> None:
    tracking = Tracking(make_config(tmp_path), CLASSES, str(tmp_path), console)
    tracking.log([NOT_EVALUATED])
    assert [row["epoch"] for row in read_csv((tmp_path / "metrics.csv").read_text())] == ["1"]
    tracking.log([EVALUATED])
    tracking.log([NOT_EVALUATED])  # A resumed run logs its earlier epochs again.
    assert [row["epoch"] for row in read_csv((tmp_path / "metrics.csv").read_text())] == ["1", "2"]


def read_tensorboard(folder: Path) -> Mapping[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        name: [(event.step, event.value) for event in accumulator.Scalars(name)]
        for name in accumulator.Tags()["scalars"]
    }


def test_tensorboard_has_every_metric_once_even_after_a_restart(tmp_path: Path, console: Console) -> None:
    config = make_config(tmp_path, tensorboard=True)
    for epochs in ([NOT_EVALUATED], [NOT_EVALUATED, EVALUATED]):  # The second start logs the complete history.
        with Tracking(config, CLASSES, str(tmp_path), console) as tracking:
            tracking.log(epochs)
    found = read_tensorboard(tmp_path / "tensorboard")
    assert found["loss"] == [(1, 0.75), (2, 0.5)]
    assert found["val_dataset_iou_a"] == [(2, 0.25)]
    assert "val_dataset_iou_b" not in found
    assert found.keys() == {
        name for name, value in flatten_metrics(EVALUATED, CLASSES).items() if value is not None
    } - {"epoch"}


def test_each_step_is_logged_once_even_after_a_restart(tmp_path: Path, console: Console) -> None:
    config = make_config(tmp_path, tensorboard=True)
    with Tracking(config, CLASSES, str(tmp_path), console) as tracking:
        tracking.log_steps(STEPS[:2])
        tracking.log([NOT_EVALUATED])
    with Tracking(config, CLASSES, str(tmp_path), console, num_steps_done=10) as tracking:
        tracking.log_steps(STEPS[1:])
    rows = read_csv((tmp_path / "steps.csv").read_text())
    assert [row["step"] for row in rows] == ["10", "20", "30"]
    assert [row["loss"] for row in rows] == ["0.9", "", "0.7"]
    assert set(rows[0]) == set(STEPS[0])
    found = read_tensorboard(tmp_path / "tensorboard")
    assert [(step, round(value, 5)) for step, value in found["step/loss"]] == [(10, 0.9), (30, 0.7)]
    assert {step for step, _ in found["step/learning_rate"]} == {10, 20, 30}
    assert "step/gradient_norm" not in found


def test_steps_of_an_attempt_that_is_not_continued_are_dropped(tmp_path: Path, console: Console) -> None:
    config = make_config(tmp_path, tensorboard=True)
    with Tracking(config, CLASSES, str(tmp_path), console) as tracking:
        tracking.log_steps(STEPS)
    with Tracking(config, CLASSES, str(tmp_path), console, num_steps_done=20) as tracking:
        tracking.log([NOT_EVALUATED])
    assert [row["step"] for row in read_csv((tmp_path / "steps.csv").read_text())] == ["10", "20"]
    assert {step for step, _ in read_tensorboard(tmp_path / "tensorboard")["step/learning_rate"]} == {10, 20}


@pytest.mark.parametrize(
    "content", [b"step;loss\n10;0.5\n", b"\xff", b"step,epoch,loss,learning_rate,gradient_norm,images_per_s\nx"]
)
def test_a_changed_table_of_steps_is_replaced_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "steps.csv").write_bytes(content)
    with Tracking(make_config(tmp_path), CLASSES, str(tmp_path), Console(width=500), num_steps_done=99) as tracking:
        tracking.log_steps(STEPS[:1])
    assert "warning: steps.csv: " in capsys.readouterr().out
    assert [row["step"] for row in read_csv((tmp_path / "steps.csv").read_text())] == ["10"]


def test_an_epoch_whose_steps_were_all_skipped_has_no_loss() -> None:
    assert flatten_metrics({**NOT_EVALUATED, "loss": float("nan")}, CLASSES)["loss"] is None


def test_steps_are_not_written_one_by_one(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr("segray.training.tracking.time.monotonic", lambda: now_s[0])
    with Tracking(make_config(tmp_path), CLASSES, str(tmp_path), console) as tracking:
        tracking.log_steps(STEPS[:1])
        assert not (tmp_path / "steps.csv").exists()
        now_s[0] += 60
        tracking.log_steps(STEPS[1:2])
        assert len(read_csv((tmp_path / "steps.csv").read_text())) == 2
        tracking.log_steps(STEPS[2:])
    assert len(read_csv((tmp_path / "steps.csv").read_text())) == 3
    Tracking(make_config(tmp_path / "other"), CLASSES, str(tmp_path / "other"), console).log([NOT_EVALUATED])
    assert not (tmp_path / "other" / "steps.csv").exists()


def test_steps_that_restarted_workers_repeat_are_in_tensorboard_once(tmp_path: Path, console: Console) -> None:
    with Tracking(make_config(tmp_path, tensorboard=True), CLASSES, str(tmp_path), console) as tracking:
        tracking.log_steps(STEPS[:2])
        tracking.log([NOT_EVALUATED])
        tracking.log_steps(STEPS[1:])
    found = read_tensorboard(tmp_path / "tensorboard")
    assert [step for step, _ in found["step/learning_rate"]] == [10, 20, 30]


def test_steps_are_written_less_often_if_that_takes_long(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    written_at_s: list[float] = []
    monkeypatch.setattr("segray.training.tracking.time.monotonic", lambda: now_s[0])

    def write(uri: str, content: bytes) -> None:
        if uri.endswith("steps.csv"):
            written_at_s.append(now_s[0])
            now_s[0] += 10

    monkeypatch.setattr("segray.training.tracking.write_bytes", write)
    tracking = Tracking(make_config(tmp_path), CLASSES, str(tmp_path), console)
    for _ in range(100):
        now_s[0] += 10
        tracking.log_steps(STEPS)
        tracking.log([NOT_EVALUATED])
    pauses_s = np.diff(written_at_s)
    assert len(pauses_s) >= 3
    assert (pauses_s >= 210).all()


@pytest.mark.integration  # It takes ten seconds.
def test_mlflow_has_one_run_with_settings_and_every_metric_once(tmp_path: Path, console: Console) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = make_config(tmp_path, mlflow_uri=uri, mlflow_experiment="shapes")
    for epochs in ([NOT_EVALUATED], [NOT_EVALUATED, EVALUATED]):
        with Tracking(config, CLASSES, str(tmp_path), console) as tracking:
            tracking.log(epochs)
            tracking.log_steps(STEPS)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("shapes")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["model.arch"] == "unet"
    assert run.data.params["train.learning_rate"] == "0.001"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in losses] == [(1, 0.75), (2, 0.5)]
    assert run.data.metrics["val_dataset_iou_a"] == 0.25
    logged = client.get_metric_history(run.info.run_id, "step/loss")
    assert [(metric.step, metric.value) for metric in logged] == [(10, 0.9), (30, 0.7)]
    assert run.info.status == "FINISHED"
    with Tracking(config, CLASSES, str(tmp_path), console, num_steps_done=20) as tracking:
        tracking.log_steps([{**STEPS[2], "loss": 0.6}])  # Trained again with other settings.
    logged = client.get_metric_history(run.info.run_id, "step/loss")
    assert [(metric.step, metric.value) for metric in logged] == [(10, 0.9), (30, 0.7), (30, 0.6)]
    with pytest.raises(TrainingError), Tracking(config, CLASSES, str(tmp_path), console):
        raise TrainingError("loss is nan")
    assert client.get_run(run.info.run_id).info.status == "FAILED"


def test_a_failing_tracker_gives_one_warning_and_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracking(make_config(tmp_path, tensorboard=True), CLASSES, str(tmp_path), Console(width=500)) as tracking:
        (tmp_path / "tensorboard").write_text("not a folder")
        tracking.log([NOT_EVALUATED])
        tracking.log([EVALUATED])
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "TensorBoardTracker" in warning
    assert "exists already" in warning
    assert len(read_csv((tmp_path / "metrics.csv").read_text())) == 2


def test_an_unreachable_server_is_an_error_before_training(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = make_config(tmp_path, mlflow_uri="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"tracking: mlflow: .*127\.0\.0\.1"):
        Tracking(config, CLASSES, str(tmp_path), console)


@pytest.mark.parametrize(
    ("module", "tracking", "extra"),
    [("torch.utils.tensorboard", {"tensorboard": True}, "tensorboard"), ("mlflow", {"mlflow_uri": "x"}, "mlflow")],
)
def test_the_error_for_a_missing_package_names_the_extra_to_install(
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    tracking: dict[str, object],
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'segray\[{extra}\]'"):
        Tracking(make_config(tmp_path, **tracking), CLASSES, str(tmp_path), console)
