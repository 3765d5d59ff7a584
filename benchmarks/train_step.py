"""Compare the time of a training step on real data with the same step on a batch that is already in memory.

    python benchmarks/train_step.py [--rounds 5] [--plain-loop]

Uses the U-Net of jobs/camvid.yaml with its augmentation, in one process. Real batches are read, decoded, augmented and
stacked by the feed's threads on the cores that also run the step. Twenty steps of each kind are measured in turn. The
first epoch, in which images are read and decoded, is reported separately.

With --plain-loop, whole epochs are compared instead with those of a plain loop over the same images: at the same size,
in batches of the same size and precision, with torch's AdamW as it is by default, without a moving average, and on
images that are in memory, normalised, and not augmented.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from measuring import report, restart_with_kept_memory
from torch.nn import functional

from segray.config import TrainConfig, load_config
from segray.data.augmentation import Augmentation
from segray.data.images import resize_image, resize_mask
from segray.data.manifest import load_splits
from segray.data.preprocessing import Preprocessing
from segray.data.sample_list import Sample
from segray.models.build import SegmentationModel, build_model
from segray.models.losses import SegmentationLoss
from segray.models.precision import autocast, has_bf16
from segray.training.job import compute_num_steps, get_classes
from segray.training.worker.device import count_cores_per_rank
from segray.training.worker.feed import RankShare, StreamSettings, TrainBatch, iterate_training
from segray.training.worker.optimisation import WeightAverage, build_optimizer, build_schedule
from segray.training.worker.sample_store import SampleStore, load_labelled_image
from segray.training.worker.steps import Learner, train_step

_STEPS = 20
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(config: TrainConfig) -> SegmentationModel:
    """Build the model on its device."""
    model = build_model(config.model, get_classes(config).num_classes)
    return model.to(_DEVICE).to(memory_format=torch.channels_last).train()


def build_learner(config: TrainConfig, model: SegmentationModel, precision: str) -> Learner:
    """Build what a step needs."""
    return Learner(
        replica=model,
        loss=SegmentationLoss(config.loss, get_classes(config).ignore_index, None, _DEVICE),
        optimizer=build_optimizer(model, config.train),
        scaler=torch.amp.GradScaler(_DEVICE.type, enabled=False),
        preprocessing=Preprocessing(),
        device=_DEVICE,
        precision=precision,
    )


def feed(config: TrainConfig, samples: list[Sample]) -> Iterator[list[TrainBatch]]:
    """Return the endless batches of one rank."""
    classes, settings = get_classes(config), config.train
    threads = settings.num_decode_threads or count_cores_per_rank(1)
    return iterate_training(
        samples,
        SampleStore(classes, settings.cache_bytes),
        Augmentation(config.augmentation, config.image_size, classes.ignore_index),
        range(10**6),
        StreamSettings(settings.global_batch_size),
        RankShare(0, 1, threads, settings.num_prefetch_batches, pin_memory=_DEVICE.type == "cuda"),
    )


def wait_for_device() -> None:
    """Wait until a GPU has done everything that was queued."""
    if _DEVICE.type == "cuda":
        torch.cuda.synchronize()


def compare_with_synthetic(config: TrainConfig, samples: list[Sample], precision: str, rounds: int) -> None:
    """Measure steps on real and on synthetic data in turn."""
    learner, batches = build_learner(config, build(config), precision), feed(config, samples)
    synthetic = next(batches)

    def measure(batches: Iterator[list[TrainBatch]]) -> float:
        began = time.perf_counter()
        for _ in range(_STEPS):
            train_step(learner, next(batches), lambda stage: None)
        wait_for_device()
        return (time.perf_counter() - began) / _STEPS

    measure(repeat(synthetic))  # oneDNN selects its kernels.
    num_passes = -(-len(samples) // (_STEPS * config.train.global_batch_size))
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


def build_plain_epoch(config: TrainConfig, samples: list[Sample], precision: str) -> Callable[[], None]:
    """Return a function that trains for an epoch as a short script would."""
    classes, size = get_classes(config), config.image_size
    pairs = [load_labelled_image(sample, classes) for sample in samples]
    pixels = torch.from_numpy(np.stack([resize_image(image, size) for image, _ in pairs]))
    images = Preprocessing().apply(pixels).to(_DEVICE)
    truths = torch.from_numpy(np.stack([resize_mask(truth, size) for _, truth in pairs])).long().to(_DEVICE)
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), config.train.learning_rate)

    def run_epoch() -> None:
        order = torch.randperm(len(images))
        for rows in torch.split(order, config.train.global_batch_size):
            with autocast(_DEVICE, precision):
                logits = model(images[rows].contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), truths[rows], ignore_index=classes.ignore_index)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return run_epoch


def build_epoch(config: TrainConfig, samples: list[Sample], precision: str) -> Callable[[], None]:
    """Return a function that trains for an epoch as a rank does."""
    model, settings, batches = build(config), config.train, feed(config, samples)
    learner = build_learner(config, model, precision)
    num_steps = compute_num_steps(len(samples), settings.global_batch_size)
    schedule = build_schedule(learner.optimizer, settings, 10**6)
    average = WeightAverage(model, settings.ema_decay or 0.999)

    def run_epoch() -> None:
        results = []
        for _ in range(num_steps):
            results.append(train_step(learner, next(batches), lambda stage: None))
            schedule.step()
            average.update()
        torch.stack(results).tolist()

    return run_epoch


def compare_with_plain_loop(config: TrainConfig, samples: list[Sample], precision: str, rounds: int) -> None:
    """Measure whole epochs in turn, after one of each."""
    epochs = {"plain": build_plain_epoch(config, samples, precision), "segray": build_epoch(config, samples, precision)}
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    for _ in range(rounds + 1):
        for name, run_epoch in epochs.items():
            began = time.perf_counter()
            run_epoch()
            wait_for_device()
            rates[name].append(len(samples) / (time.perf_counter() - began))
    median = {name: statistics.median(values[1:]) for name, values in rates.items()}
    rows = [[name, f"{rate:.2f}", f"{rate / median['plain']:.3f}"] for name, rate in median.items()]
    report("train_plain_loop", ["loop", "images/s", "ratio"], rows, {"precision": precision, **rates})


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain-loop", action="store_true")
    arguments = parser.parse_args()
    restart_with_kept_memory()
    config = load_config(TrainConfig, str(Path(__file__).parents[1] / "jobs/camvid.yaml"), [])
    precision = config.train.precision if has_bf16(_DEVICE) else "fp32"
    compare = compare_with_plain_loop if arguments.plain_loop else compare_with_synthetic
    compare(config, list(load_splits(config.data).train), precision, arguments.rounds)


if __name__ == "__main__":
    main()
