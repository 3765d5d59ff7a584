"""Compare the time of a training step on real data with the same step on a batch that is already in memory.

    python benchmarks/train_step.py [--rounds 5]

Uses the U-Net of jobs/camvid.yaml with its augmentation, in one process. Real batches are read, decoded, augmented and
stacked by the feed's threads on the cores that also run the step. Twenty steps of each kind are measured in turn. The
first epoch, in which images are read and decoded, is reported separately.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import torch
from measuring import report

from segray.config import TrainConfig, load_config
from segray.data.augmentation import Augmentation
from segray.data.manifest import load_splits
from segray.data.preprocessing import Preprocessing
from segray.models.build import build_model
from segray.models.losses import SegmentationLoss
from segray.training.job import get_classes
from segray.training.worker.feed import RankShare, StreamSettings, TrainBatch, iterate_training
from segray.training.worker.optimisation import build_optimizer
from segray.training.worker.sample_store import SampleStore
from segray.training.worker.steps import Learner, train_step

_STEPS = 20


def main() -> None:
    """Measure both in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    config = load_config(TrainConfig, str(Path(__file__).parents[1] / "jobs/camvid.yaml"), [])
    splits, classes, settings = load_splits(config.data), get_classes(config), config.train
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config.model, classes.num_classes).to(device).to(memory_format=torch.channels_last).train()
    learner = Learner(
        replica=model,
        loss=SegmentationLoss(config.loss, classes.ignore_index, None, device),
        optimizer=build_optimizer(model, settings),
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        preprocessing=Preprocessing(),
        device=device,
        precision=settings.precision,
    )
    batches = iterate_training(
        splits.train,
        SampleStore(classes, settings.cache_bytes),
        Augmentation(config.augmentation, config.image_size, classes.ignore_index),
        range(10**6),
        StreamSettings(settings.global_batch_size),
        RankShare(num_threads=settings.num_decode_threads),
    )
    synthetic = next(batches)

    def measure(batches: Iterator[list[TrainBatch]]) -> float:
        began = time.perf_counter()
        for _ in range(_STEPS):
            train_step(learner, next(batches), lambda stage: None)
        return (time.perf_counter() - began) / _STEPS

    measure(repeat(synthetic))  # oneDNN selects its kernels.
    num_passes = -(-len(splits.train) // (_STEPS * settings.global_batch_size))
    first_s = statistics.median(measure(batches) for _ in range(num_passes))
    times, synthetic_times = [], []
    for _ in range(rounds):
        synthetic_times.append(measure(repeat(synthetic)))
        times.append(measure(batches))
    real_s, synthetic_s = statistics.median(times), statistics.median(synthetic_times)
    rows = [
        ["a batch in memory", f"{1000 * synthetic_s:.0f}", "1.000"],
        ["real, from the second epoch on", f"{1000 * real_s:.0f}", f"{real_s / synthetic_s:.3f}"],
        ["real, first epoch", f"{1000 * first_s:.0f}", f"{first_s / synthetic_s:.3f}"],
    ]
    figures = {"real_s": times, "synthetic_s": synthetic_times, "first_s": first_s}
    report("train_step", ["data", "ms per step", "ratio"], rows, figures)


if __name__ == "__main__":
    main()
