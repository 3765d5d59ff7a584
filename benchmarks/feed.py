"""Measure how well the feed keeps up with a GPU, without one.

    python benchmarks/feed.py [--seconds 10] [--rounds 3] [--preset light]

The images are drawn: 360x480 pixels, JPEG, with PNG masks. Each figure is the median over the rounds.

- Waiting: a step stands for a GPU that takes 20 ms for a batch of 8, so 400 images/s; the host sleeps meanwhile. The
  share of a step that it waits for the batch, with samples from the cache. It needs enough cores for the augmentation
  (``--preset``), which is part of the feed.
- Images/s without cache, compared with decoding and augmenting alone, in one process per core.
- The same with decode processes instead of threads: one per core, which send their results to this process.
"""

import argparse
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from measuring import report, restart_with_kept_memory
from PIL import Image

from segray.config import AugmentationSettings
from segray.data.augmentation import Augmentation
from segray.data.classes import ClassMap
from segray.data.images import resize_image
from segray.data.sample_list import Sample
from segray.data.synthetic import draw_shape
from segray.runtime.connect import count_cores
from segray.training.worker.feed import RankShare, StreamSettings, TrainBatch, iterate_training
from segray.training.worker.sample_file import LabelledImage
from segray.training.worker.sample_store import SampleStore, load_labelled_image

_NUM_IMAGES, _SIZE, _BATCH_SIZE, _STEP_S = 64, (360, 480), 8, 0.02
_CLASSES = ClassMap(("shape", "background"), (1, 2), ignore_values=(3,))
_CHUNK = 2  # Samples per task of a process.


def draw(folder: Path) -> list[Sample]:
    """Write images with noise, so that their JPEG files are as large as those of photographs, and their masks."""
    samples = []
    for number in range(_NUM_IMAGES):
        image, trimap = (np.asarray(part)[: _SIZE[0]] for part in draw_shape(number, _SIZE[1]))
        noise = np.random.default_rng(number).normal(0, 40, (90, 120, 3))
        grain = resize_image(np.clip(noise + 128, 0, 255).astype(np.uint8), _SIZE).astype(np.int16) - 128
        sample = Sample(str(folder / f"{number}.jpg"), str(folder / f"{number}.png"))
        Image.fromarray(np.clip(image + grain, 0, 255).astype(np.uint8)).save(sample.image_uri, quality=90)
        Image.fromarray(trimap).save(sample.mask_uri)
        samples.append(sample)
    return samples


def feed(samples: list[Sample], augmentation: Augmentation, cache_bytes: int) -> Iterator[list[TrainBatch]]:
    """Return the endless batches of one rank that has all cores."""
    share = RankShare(num_threads=count_cores())
    store = SampleStore(_CLASSES, cache_bytes)
    return iterate_training(samples, store, augmentation, range(10**9), StreamSettings(_BATCH_SIZE), share)


def measure_waiting(batches: Iterator[object], seconds: float) -> float:
    """Return the share of a stand-in step's time that the host waits for its batch."""
    waited_s, num_steps = 0.0, 0
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        began_s = time.perf_counter()
        next(batches)
        waited_s += time.perf_counter() - began_s
        num_steps += 1
        time.sleep(_STEP_S)
    return waited_s / (num_steps * _STEP_S)


def measure_rate(batches: Iterator[object], seconds: float) -> float:
    """Return images per second of batches that are only taken."""
    num_images, began_s = 0, time.perf_counter()
    while time.perf_counter() < began_s + seconds:
        next(batches)
        num_images += _BATCH_SIZE
    return num_images / (time.perf_counter() - began_s)


def prepare(augmentation: Augmentation, samples: list[Sample]) -> list[LabelledImage]:
    """Load and augment samples in a process."""
    generator = np.random.default_rng(0)
    return [augmentation.apply(*load_labelled_image(sample, _CLASSES), generator) for sample in samples]


def prepare_for(augmentation: Augmentation, samples: list[Sample], seconds: float) -> float:
    """Load and augment samples in this process for some time; return images per second."""
    num_images, began_s = 0, time.perf_counter()
    while time.perf_counter() < began_s + seconds:
        prepare(augmentation, [samples[num_images % len(samples)]])
        num_images += 1
    return num_images / (time.perf_counter() - began_s)


def feed_from_processes(
    pool: ProcessPoolExecutor, samples: list[Sample], augmentation: Augmentation
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches that processes prepare."""
    endless, waiting = cycle(samples), deque[list[Future[list[LabelledImage]]]]()
    while True:
        while len(waiting) <= 8:
            chunks = [list(islice(endless, _CHUNK)) for _ in range(_BATCH_SIZE // _CHUNK)]
            waiting.append([pool.submit(prepare, augmentation, chunk) for chunk in chunks])
        pairs = [pair for future in waiting.popleft() for pair in future.result()]
        yield np.stack([image for image, _ in pairs]), np.stack([truth for _, truth in pairs])


def main() -> None:
    """Measure everything in turn, in several rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="light")
    arguments = parser.parse_args()
    restart_with_kept_memory()
    augmentation = Augmentation(AugmentationSettings.model_validate(arguments.preset), _SIZE, _CLASSES.ignore_index)
    cores, seconds = count_cores(), arguments.seconds
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(cores, get_context("forkserver")) as pool:
        samples = draw(Path(folder))
        cached, uncached = feed(samples, augmentation, 2**30), feed(samples, augmentation, 0)
        from_processes = feed_from_processes(pool, samples, augmentation)
        for batches in (cached, uncached, from_processes):
            for _ in range(2 * _NUM_IMAGES // _BATCH_SIZE):  # Fill the cache, and start the processes.
                next(batches)

        def prepare_alone() -> float:
            tasks = [pool.submit(prepare_for, augmentation, samples, seconds) for _ in range(cores)]
            return sum(task.result() for task in tasks)

        measured: dict[str, Callable[[], float]] = {
            "waiting": partial(measure_waiting, cached, seconds),
            "cached": partial(measure_rate, cached, seconds),
            "decoding alone": prepare_alone,
            "feed": partial(measure_rate, uncached, seconds),
            "feed from processes": partial(measure_rate, from_processes, seconds),
        }
        for _ in range(arguments.rounds):
            for name, measure in measured.items():
                figures.setdefault(name, []).append(measure())
    median = {name: statistics.median(values) for name, values in figures.items()}
    alone, needed = median["decoding alone"], _BATCH_SIZE / _STEP_S
    rows = [
        ["waiting for a batch from the cache, share of a step of 20 ms", f"{median['waiting']:.1%}", ""],
        ["images/s from the cache", f"{median['cached']:.0f}", f"{median['cached'] / alone:.2f}"],
        [f"cores for {needed:.0f} images/s from the cache", f"{needed * cores / median['cached']:.1f}", ""],
        [f"images/s, decoding alone, {cores} processes", f"{alone:.0f}", "1.00"],
        [
            f"images/s, the feed without cache, {cores} threads",
            f"{median['feed']:.0f}",
            f"{median['feed'] / alone:.2f}",
        ],
        [
            f"images/s, a feed from {cores} processes",
            f"{median['feed from processes']:.0f}",
            f"{median['feed from processes'] / alone:.2f}",
        ],
    ]
    report(
        f"feed-{arguments.preset}",
        ["what", "measured", "relative to decoding alone"],
        rows,
        {"preset": arguments.preset, **figures},
    )


if __name__ == "__main__":
    main()
