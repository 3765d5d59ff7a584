"""The drawn samples are the ones that training starts with, for any number of workers."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from segray.config import TrainConfig
from segray.data.augmentation import Augmentation
from segray.data.manifest import load_splits
from segray.plots import LabelledPicture, draw_samples
from segray.storage import get_file_name
from segray.training.labels import command
from segray.training.labels.preview import draw_training
from segray.training.labels.split_report import SplitReport
from segray.training.sampling import compute_image_weights
from segray.training.worker.feed import RankShare, StreamSettings, iterate_training
from segray.training.worker.sample_store import SampleStore
from tests.conftest import PET_CLASSES


def test_drawn_samples_are_the_first_ones_of_a_run_with_two_workers(
    make_train_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = make_train_config(tmp_path, seed=5)
    samples = load_splits(config.data).train
    ranks = [
        iterate_training(
            samples,
            SampleStore(PET_CLASSES, 2**30),
            Augmentation(config.augmentation, config.image_size, PET_CLASSES.ignore_index),
            range(2),
            StreamSettings(global_batch_size=6, num_parts=3, seed=5),
            RankShare(rank, 2, num_threads=2),
        )
        for rank in range(2)
    ]
    batches = [batch for step in zip(*ranks, strict=True) for share in step for batch in share]
    fed = [
        LabelledPicture(get_file_name(uri), image, truth)
        for batch in batches
        for uri, image, truth in zip(batch.image_uris, batch.images.numpy(), batch.truth.numpy(), strict=True)
    ]
    drawn = draw_training(config, samples, PET_CLASSES, 8)  # These span two steps.
    assert drawn == draw_samples(fed[:8], PET_CLASSES)
    assert drawn != draw_training(make_train_config(tmp_path, seed=6), samples, PET_CLASSES, 8)


def test_with_class_balanced_sampling_the_samples_are_drawn_with_its_weights(
    make_train_config: Callable[..., TrainConfig], tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_train_config(tmp_path, sampling="class_balanced")
    splits = load_splits(config.data)
    num_images = len(splits.train)
    counts = np.array([num_images, num_images, 1])  # The third class is in the last image only.
    presence = bytes([0b11000000]) * (num_images - 1) + bytes([0b11100000])
    report = replace(SplitReport.empty(3), num_samples=1, pixel_count=counts, image_count=counts, presence=presence)
    monkeypatch.setattr(command, "check_splits", lambda *_: {"train": report, "val": report})
    monkeypatch.setattr(command, "connect_ray", nullcontext)
    assert command.run_check(config, console, num_drawn=3)
    weights = compute_image_weights(presence, counts)
    drawn = (tmp_path / "augmented.png").read_bytes()
    assert drawn == draw_training(config, splits.train, PET_CLASSES, 3, weights)
    assert drawn != draw_training(config, splits.train, PET_CLASSES, 3)
