"""Ray Train for real, two workers: what a bundle holds, and runs that are killed ending in the same bits."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image
from rich.console import Console

from segray.bundle import load_bundle
from segray.config import TrainConfig
from segray.errors import DataError, RunMismatchError, TrainingError
from segray.train.checkpoint import find_newest_state
from segray.train.driver import run_training
from tests.conftest import NUM_TEST, NUM_TRAIN, SHAPE_SIZE

pytestmark = pytest.mark.usefixtures("ray_session")
NUM_EPOCHS = 4
_DEADLINE_S = 120
MakeConfig = Callable[..., TrainConfig]


def train(config: TrainConfig) -> str:
    """Train, and return what was printed."""
    output = io.StringIO()
    run_training(config, Console(file=output, width=500))
    return output.getvalue()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def has_whole_checkpoint(output: Path) -> bool:
    """Say whether a run has something to go on from: its files appear one after the other, while they are copied."""
    return find_newest_state(str(output / "ray_train"), lambda _: None) is not None


def find_train_workers() -> dict[int, psutil.Process]:
    """Return the training workers under this process by pid."""
    return {p.pid: p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()}


@pytest.fixture(scope="module")
def unbroken(make_train_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    output = tmp_path_factory.mktemp("unbroken")
    printed = train(make_train_config(output, num_epochs=NUM_EPOCHS))
    (output / "printed.txt").write_text(printed)
    return output


def read_weights_sha256(output: Path) -> str:
    return str(json.loads((output / "bundle" / "bundle.json").read_text())["weights_sha256"])


def read_metrics(output: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((output / "bundle" / "metrics.csv").open()))
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in rows]


def test_the_first_line_says_what_is_trained_on_what(unbroken: Path) -> None:
    first, *others = (unbroken / "printed.txt").read_text().splitlines()
    for part in ("CPU", "2 workers", f"{NUM_TRAIN} train", f"{NUM_TEST} val", "3 classes: pet, background, border"):
        assert part in first
    assert [line.split()[1] for line in others] == [f"{epoch}/{NUM_EPOCHS}" for epoch in range(1, NUM_EPOCHS + 1)]


def test_the_bundle_is_the_best_epoch_with_its_history_and_pictures(unbroken: Path) -> None:
    manifest = load_bundle(str(unbroken / "bundle")).manifest
    rows = read_metrics(unbroken)
    scores = [float(row["val_mean_iou"]) for row in rows]
    assert manifest.metrics["epoch"] == scores.index(max(scores)) + 1
    assert manifest.metrics["val_mean_iou"] == max(scores)
    assert manifest.config["train"]["num_epochs"] == NUM_EPOCHS
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, NUM_EPOCHS + 1)]
    assert {"loss", "learning_rate", "val_iou_pet", "val_dice_border"} <= rows[0].keys()
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    for name in ("curves.png", "predictions.png"):
        assert Image.open(unbroken / "bundle" / name).width > 500


def test_validation_scores_every_pixel_once(unbroken: Path) -> None:
    confusion = load_bundle(str(unbroken / "bundle")).manifest.metrics["val_confusion"]
    assert sum(map(sum, confusion)) == NUM_TEST * SHAPE_SIZE**2


def test_a_killed_worker_changes_no_bit(unbroken: Path, make_train_config: MakeConfig, tmp_path: Path) -> None:
    of_runs_before = find_train_workers()

    def kill_a_worker() -> None:
        wait_for(lambda: has_whole_checkpoint(tmp_path))
        workers = find_train_workers()
        workers[max(workers.keys() - of_runs_before)].kill()

    with ThreadPoolExecutor(1) as executor:
        killer = executor.submit(kill_a_worker)
        printed = train(make_train_config(tmp_path, num_epochs=NUM_EPOCHS))
        killer.result()
    assert "going on after epoch" in printed, printed
    assert read_weights_sha256(tmp_path) == read_weights_sha256(unbroken)
    assert read_metrics(tmp_path) == read_metrics(unbroken)


def test_a_killed_driver_changes_no_bit(unbroken: Path, make_train_config: MakeConfig, tmp_path: Path) -> None:
    config = make_train_config(tmp_path / "run", num_epochs=NUM_EPOCHS)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-c", "from segray.cli import main; main()", "train", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    wait_for(lambda: has_whole_checkpoint(tmp_path / "run"))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "run" / "bundle").exists()
    # what a driver can leave that dies while Ray Train writes its list of checkpoints; Ray alone never starts again
    (tmp_path / "run" / "ray_train" / "checkpoint_manager_snapshot.json").write_text("")
    printed = train(config)
    assert "going on after epoch" in printed, printed
    assert read_weights_sha256(tmp_path / "run") == read_weights_sha256(unbroken)
    assert read_metrics(tmp_path / "run") == read_metrics(unbroken)


def test_a_finished_run_is_found_finished(unbroken: Path, make_train_config: MakeConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    assert "nothing to do" in train(make_train_config(unbroken, num_epochs=NUM_EPOCHS))
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before


def test_another_configuration_is_refused(unbroken: Path, make_train_config: MakeConfig) -> None:
    with pytest.raises(RunMismatchError, match=r"train\.learning_rate: there 0\.001, here 0\.5.*another output"):
        train(make_train_config(unbroken, num_epochs=NUM_EPOCHS, learning_rate=0.5))


def test_bad_labels_stop_a_run_before_it_starts(make_train_config: MakeConfig, tmp_path: Path) -> None:
    config = make_train_config(tmp_path)
    data = config.data.model_copy(update={"class_values": (1, 2, 4)})
    with pytest.raises(DataError, match=r"18 bad labels in train .*mask value 3 not declared.*and 15 more"):
        train(config.model_copy(update={"data": data}))
    assert list(tmp_path.iterdir()) == []  # mended settings may use the same output


def test_a_loss_that_is_not_finite_names_step_and_images(make_train_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"loss is (nan|inf) at step \d+, before the weights moved.*\.jpg"
    ) as caught:
        train(make_train_config(tmp_path, learning_rate=1e30, weight_decay=0, num_epochs=3))
    assert str(caught.value).count(".jpg") == 6  # the global batch
    assert not (tmp_path / "bundle").exists()
