"""Cross-validation: the runs of its folds, and a whole one with Ray that is resumed."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from segray.config import TrainConfig
from segray.data.manifest import load_folds
from segray.data.preprocessing import Preprocessing
from segray.data.sample_list import Folds, Sample, SampleList, Splits
from segray.errors import RunMismatchError
from segray.models.build import build_model
from segray.models.bundle import load_bundle
from segray.runtime.capacity import Capacity
from segray.training.bundling import write_bundle
from segray.training.checkpoint import TrainingState, save_state
from segray.training.folds import run
from segray.training.folds.estimate import Estimate
from segray.training.folds.run import FoldPlan, count_concurrent, run_folds_and_training
from segray.training.job import TrainJob, get_classes
from segray.training.labels.split_report import SplitReport, join_reports
from segray.training.phases import Phase
from segray.training.worker.evaluation import EvaluationCounts, compute_scores, pool_scores
from tests.conftest import NUM_TEST, NUM_TRAIN, TINY_MODEL

MakeConfig = Callable[..., TrainConfig]


def build_folds(names: str, numbers: list[int]) -> Folds:
    return Folds(SampleList.of(Sample(name, "m") for name in names), np.array(numbers, np.uint8))


FOLDS = build_folds("abcdef", [2, 0, 1, 2, 1, 2])


def make_plan(config: TrainConfig) -> FoldPlan:
    reports = []
    for number in range(3):
        counts = np.eye(3, dtype=np.int64)[number] * 10
        zeros = np.zeros(3, np.int64)
        presence = bytes([128 >> number]) * (number + 1)
        reports.append(SplitReport(number + 1, [], [], counts, zeros, counts, 0, frozenset(), b"", b"", presence))
    return FoldPlan(config, FOLDS, reports)


def test_a_fold_is_a_run_on_the_other_folds_in_a_folder_of_its_own(
    make_train_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_train_config(tmp_path, folds=3)
    config = config.model_copy(update={"loss": config.loss.model_copy(update={"class_weights": "auto"})})
    plan = make_plan(config)
    job = plan.build_trial_job(1)
    assert job.splits == Splits([Sample(name, "m") for name in "abdf"], [Sample(name, "m") for name in "ce"])
    assert job.config.output == f"{tmp_path}/folds/2"
    assert job.run_uri == f"{tmp_path}/folds/2/ray_train"
    assert job.config.train.folds is None
    assert not job.pauses_after_epoch
    assert job.class_weights is not None
    assert job.class_weights.tolist() == [1, 1, 1]  # Class 1 occurs only in the fold that is held out: no weight.
    assert job.image_weights is None
    assert plan.build_config(0).bound_settings == config.bound_settings
    assert not plan.is_finished(1)


def test_what_an_image_contains_stays_with_it_when_folds_are_joined() -> None:
    folds = build_folds("abcde", [1, 0, 1, 0, 1])
    zeros = np.zeros(9, np.int64)
    # Two bytes for each image of nine classes: here its name.
    reports = [
        SplitReport(size, [], [], zeros, zeros, zeros, 0, frozenset(), b"", b"", presence)
        for size, presence in zip(folds.sizes, (b"BbDd", b"AaCcEe"), strict=True)
    ]
    joined = join_reports(reports, folds)
    assert (joined.num_samples, joined.presence) == (5, b"AaBbCcDdEe")
    joined = join_reports(reports, folds, held_out=0)
    assert (joined.num_samples, joined.presence) == (3, b"AaCcEe")
    reports = [replace(report, presence=b"") for report in reports]
    assert join_reports(reports, folds, held_out=0).presence == b""


@pytest.mark.parametrize(
    ("use_gpu", "num_workers", "nodes", "expected"),
    [
        (True, 1, [{"GPU": 4, "CPU": 8}], 3),
        (True, 2, [{"GPU": 4, "CPU": 8}], 2),
        (True, 8, [{"GPU": 4, "CPU": 8}], 1),
        (False, 1, [{"CPU": 64}], 1),
        (False, 1, [{"CPU": 64}, {"CPU": 8}], 2),
        (False, 2, [{"CPU": 64}] * 5, 2),
    ],
)
def test_folds_run_side_by_side_where_the_cluster_has_room(
    make_train_config: MakeConfig,
    tmp_path: Path,
    use_gpu: bool,
    num_workers: int,
    nodes: list[dict[str, float]],
    expected: int,
) -> None:
    settings = make_train_config(tmp_path, use_gpu=use_gpu, num_train_workers=num_workers, global_batch_size=8).train
    assert count_concurrent(settings, 3, Capacity(tuple(nodes))) == expected
    assert count_concurrent(settings, 3, Capacity((), is_open=True)) == (3 if use_gpu else 1)


def make_scores(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    confusion, boundary, sums = (torch.from_numpy(rng.integers(1, 50, shape)) for shape in ((3, 3), (2, 3), (2, 3)))
    boundary[1] += boundary[0]
    return compute_scores(
        EvaluationCounts(confusion, boundary, sums, sums[0] + sums[1], [], [], torch.zeros((3, 2, 0)))
    )


def test_the_bundle_after_a_cross_validation_has_the_last_weights_and_the_pooled_scores(
    make_train_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_train_config(tmp_path, folds=3, num_epochs=2)
    folds = [make_scores(seed) for seed in range(3)]
    change = "fold 1 was trained with other settings: augmentation.hue: the run has 0, got 1"
    estimate = Estimate(config.data.class_names, (1, 2, 3), tuple(folds), pool_scores(folds), (change,))
    run_uri = str(tmp_path / "ray_train")
    job = TrainJob(config, get_classes(config), FOLDS.join(), Preprocessing(), None, run_uri)
    epochs = [
        {"epoch": epoch, "loss": 1.0, "learning_rate": 1e-3, "images_per_s": 1.0, "num_skipped_steps": 0}
        for epoch in (1, 2)
    ]
    phases = [Phase(num_steps_done=0, epoch=1, num_workers=1, settings={"train": {}})]
    for epoch in (1, 2):
        torch.manual_seed(epoch)
        weights = build_model(TINY_MODEL, 3).state_dict()
        optimizer: dict[str, Any] = {"state": {}, "param_groups": []}
        state = TrainingState(epoch, weights, optimizer, {}, history=epochs[:epoch], phases=phases)
        save_state(f"{run_uri}/checkpoint_{epoch:09d}_a", state)
    write_bundle(job, str(tmp_path / "bundle"), Console(quiet=True), estimate)
    bundle = load_bundle(str(tmp_path / "bundle"))
    assert all(torch.equal(value, weights[name]) for name, value in bundle.model.state_dict().items())
    assert bundle.manifest.metrics["epoch"] == 2
    total = np.sum([scores["val_confusion"] for scores in folds], axis=0)
    assert bundle.manifest.metrics["val_confusion"] == total.tolist()
    card = (tmp_path / "bundle" / "model_card.md").read_text()
    iou = estimate.rows[0][1]["iou"]
    assert f"| pet | {iou.pooled:.4f} | {iou.std:.4f} | {iou.lowest:.4f} | {iou.highest:.4f} |" in card
    assert "cross-validation in 3 folds, of 1, 2, 3 images" in card
    assert "6 labelled images, all of them used for training" in card
    assert f"- {change}\n" in card
    assert "highest" not in card
    assert not (tmp_path / "bundle" / "worst.png").exists()


def test_a_fold_that_was_trained_with_other_settings_is_a_warning(
    make_train_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_train_config(tmp_path, folds=3, num_epochs=1)
    strong = TrainConfig.model_validate({**config.model_dump(mode="json"), "augmentation": "strong"})
    used = [[config], [strong, config], [config]]  # The augmentation was changed in the second fold, and changed back.

    def find_phases(run_uri: str) -> list[Phase]:
        configs = used[int(run_uri.split("/")[-2]) - 1]
        return [Phase(num_steps_done=0, epoch=1, num_workers=1, settings=one.phase_settings) for one in configs]

    monkeypatch.setattr(run, "find_newest_history", lambda uri: [{"epoch": 1, **make_scores(0)}])
    monkeypatch.setattr(run, "find_newest_phases", find_phases)
    printed = io.StringIO()
    estimate = run._collect(make_plan(config), Console(file=printed, width=10_000))
    (change,) = estimate.changes
    assert change.startswith("fold 2 was trained, at least in part, with other settings: augmentation.")
    assert printed.getvalue() == (
        f"warning: {change}; to train it again, remove {tmp_path}/folds/2 and rerun the same command\n"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_cross_validation_scores_every_image_once_and_resumes_fold_by_fold(
    make_train_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_train_config(Path(), folds=2, num_epochs=1, num_train_workers=1)  # Workers have another folder.
    printed = io.StringIO()
    bundle_uri = run_folds_and_training(config, Console(file=printed, width=200))
    assert "0 finished" in printed.getvalue()
    rows = list(csv.DictReader((tmp_path / "cross_validation.csv").open()))
    assert [row["class"] for row in rows] == [*config.data.class_names, "mean"]
    content = json.loads((tmp_path / "cross_validation.json").read_text())
    confusions = [np.array(fold["val_confusion"]) for fold in content["folds"]]
    labelled_px = [int(confusion.sum()) for confusion in confusions]
    assert content["pooled"]["val_confusion"] == np.sum(confusions, axis=0).tolist()
    folds = load_folds(config.data, 2)
    assert [fold["num_images"] for fold in content["folds"]] == list(folds.sizes)
    assert len(folds.samples) == NUM_TRAIN + NUM_TEST
    assert sum(labelled_px) == (NUM_TRAIN + NUM_TEST) * 64 * 64  # Every pixel of every image, once.
    assert load_bundle(bundle_uri).manifest.metrics["val_mean_iou"] == pytest.approx(content["pooled"]["val_mean_iou"])

    # Without the last fold's checkpoints and the bundle, only that fold and the final run are trained again.
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "folds" / "1").rglob("checkpoint.json")}
    assert kept
    for folder in ("folds/2/ray_train", "ray_train", "bundle"):
        for path in sorted((tmp_path / folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    printed = io.StringIO()
    run_folds_and_training(config, Console(file=printed, width=200))
    assert "1 finished" in printed.getvalue()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = json.loads((tmp_path / "cross_validation.json").read_text())
    assert again["pooled"]["val_confusion"] == content["pooled"]["val_confusion"]

    printed = io.StringIO()
    run_folds_and_training(config, Console(file=printed, width=200))
    assert "this run is complete; nothing to do" in printed.getvalue()
    for num_folds in (3, None):
        changed = config.model_copy(update={"train": config.train.model_copy(update={"folds": num_folds})})
        with pytest.raises(RunMismatchError, match="different listing"):
            run_folds_and_training(changed, Console(quiet=True))
