"""Compare the time of computing per-image confusion matrices in segray and in torchmetrics.

    python benchmarks/confusion.py [--rounds 7]

Both count 360x480 masks of 11 classes one by one, with ignored pixels, on one thread. torchmetrics is measured with its
default settings and without argument validation. The script asserts that the counts are equal.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from measuring import report
from torchmetrics.classification import MulticlassConfusionMatrix

from segray.models.confusion import compute_confusion

_NUM_CLASSES, _IGNORE_INDEX, _SIZE, _NUM_IMAGES = 11, 255, (360, 480), 40


def make_pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return ground truth and mask of each image: blocks of classes, 10% wrong pixels, 5% ignored pixels."""
    generator = np.random.default_rng(0)
    pairs = []
    for _ in range(_NUM_IMAGES):
        blocks = generator.integers(0, _NUM_CLASSES, (_SIZE[0] // 40, _SIZE[1] // 40))
        truth = np.kron(blocks, np.ones((40, 40), np.int64)).astype(np.uint8)
        mask = np.where(generator.random(_SIZE) < 0.1, generator.integers(0, _NUM_CLASSES, _SIZE), truth)
        truth[generator.random(_SIZE) < 0.05] = _IGNORE_INDEX
        pairs.append((torch.from_numpy(truth), torch.from_numpy(mask.astype(np.uint8))))
    return pairs


def measure(count: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rounds: int) -> tuple[float, torch.Tensor]:
    """Return the median seconds per image, and the summed counts."""
    pairs = make_pairs()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        total = torch.stack([count(truth, mask) for truth, mask in pairs]).sum(0)
        times.append((time.perf_counter() - began) / len(pairs))
    return statistics.median(times), total


def main() -> None:
    """Measure segray and torchmetrics."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)

    def count_theirs(metric: MulticlassConfusionMatrix) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def count(truth: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            metric.reset()
            metric.update(mask, truth)
            counts: torch.Tensor = metric.compute()
            return counts

        return count

    def build(validate: bool) -> MulticlassConfusionMatrix:
        return MulticlassConfusionMatrix(_NUM_CLASSES, ignore_index=_IGNORE_INDEX, validate_args=validate)

    ours_s, ours = measure(lambda t, m: compute_confusion(t, m, _NUM_CLASSES, _IGNORE_INDEX), rounds)
    rows, figures = [["segray", f"{1000 * ours_s:.2f}", "1.0"]], {"segray_s": ours_s}
    for name, validate in (("torchmetrics", True), ("torchmetrics, validate_args=False", False)):
        theirs_s, theirs = measure(count_theirs(build(validate)), rounds)
        assert torch.equal(ours, theirs), "the counts differ"
        rows.append([name, f"{1000 * theirs_s:.2f}", f"{theirs_s / ours_s:.1f}"])
        figures[name] = theirs_s
    report("confusion", ["counts by", "ms per image", "times as long"], rows, figures, "torchmetrics")


if __name__ == "__main__":
    main()
