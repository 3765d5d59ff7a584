"""Measure how long the label check takes to find near-duplicates between two splits, from hashes of drawn images.

    python benchmarks/near_duplicates.py [--num-images 10000 100000 1000000 3000000]

A fifth of the images are the validation split. The hashes are those of smooth random thumbnails, whose bits depend on
each other as those of photographs do; a thousand of the validation images are copies with up to 7 changed bits. The
worst case are images of one scene that differ by noise. One process, one thread; the hashes exist already, because the
label check computes them while it reads the images. In a second pass the two left columns of all thumbnails have one
colour, as those of photographs with a margin have.
"""

import argparse
import resource
import time

import numpy as np
import numpy.typing as npt
from measuring import report

from segray.training.labels.near_duplicates import NUM_BITS, THUMBPRINT, find_near_duplicates, pack_bits

_NUM_COPIES = 1_000
_MAX_NOISE = 0.05  # Share of the bits that differ between images of one scene.


def make_thumbprints(num_images: int, rng: np.random.Generator, margin: int = 0) -> npt.NDArray[np.void]:
    """Return thumbprints of thumbnails: sums of noise of several scales, with a left margin of one colour."""
    thumbprints = np.zeros(num_images, THUMBPRINT)
    for start in range(0, num_images, 50_000):
        part = thumbprints[start : start + 50_000]
        cells = rng.normal(size=(len(part), 9, 9))
        cells += rng.normal(size=(len(part), 3, 3)).repeat(3, 1).repeat(3, 2)
        cells[:, :, :margin] = 0
        bits = np.stack([cells[:, :-1, 1:] > cells[:, :-1, :-1], cells[:, 1:, :-1] > cells[:, :-1, :-1]], 1)
        part["bits"] = pack_bits(bits)
        part["colour"] = rng.integers(100, 140, (len(part), 3))
    return thumbprints


def change_bits(thumbprints: npt.NDArray[np.void], rng: np.random.Generator) -> npt.NDArray[np.void]:
    """Return copies of which the first has 0 changed bits, the next 1, and so on to 7 and again from 0."""
    copies = thumbprints.copy()
    for number, copy in enumerate(copies):
        for bit in rng.choice(NUM_BITS, number % 8, replace=False).tolist():
            copy["bits"][bit // 16] ^= np.uint16(1 << bit % 16)
    return copies


def make_scene(num_images: int, rng: np.random.Generator) -> npt.NDArray[np.void]:
    """Return thumbprints of one scene, each with a few random bits changed."""
    thumbprints = np.repeat(make_thumbprints(1, rng), num_images)
    noise = np.packbits(rng.random((num_images, NUM_BITS)) < _MAX_NOISE, axis=1).view(np.uint16)
    thumbprints["bits"] ^= noise
    return thumbprints


def measure(val: npt.NDArray[np.void], train: npt.NDArray[np.void]) -> tuple[float, list[tuple[int, int, int]]]:
    """Return the processor time in seconds, and the pairs found."""
    began = time.process_time()
    found = find_near_duplicates(val.tobytes(), train.tobytes())
    return time.process_time() - began, found.pairs


def main() -> None:
    """Measure each number of images, and the worst case for the smallest."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    counts = parser.parse_args().num_images
    rng = np.random.default_rng(0)
    rows, figures = [], {}
    for margin, num_images in ((margin, num_images) for margin in (0, 2) for num_images in counts):
        train, val = np.split(make_thumbprints(num_images, rng, margin), [num_images * 4 // 5])
        val[:_NUM_COPIES] = change_bits(train[rng.choice(len(train), _NUM_COPIES, replace=False)], rng)
        cpu_s, found = measure(val, train)
        num_copies = sum(number < _NUM_COPIES for number, _, _ in found)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        name = f"{num_images:,}" + (" with a margin" if margin else "")
        rows.append([name, f"{cpu_s:.2f} s", f"{peak_mb} MB", str(num_copies), str(len(found) - num_copies)])
        figures[f"{num_images}_margin" if margin else str(num_images)] = {
            "cpu_s": cpu_s,
            "peak_mb": peak_mb,
            "num_copies": num_copies,
            "num_others": len(found) - num_copies,
        }
    scene = make_scene(counts[0], rng)
    cpu_s, _ = measure(scene[: counts[0] // 5], scene[counts[0] // 5 :])
    rows.append([f"{counts[0]:,} of one scene", f"{cpu_s:.2f} s", "", "", ""])
    figures["one_scene"] = {"num_images": counts[0], "cpu_s": cpu_s}
    columns = ["images", "processor time", "peak memory", f"of {_NUM_COPIES:,} copies found", "other pairs found"]
    report("near_duplicates", columns, rows, figures, "numpy")


if __name__ == "__main__":
    main()
