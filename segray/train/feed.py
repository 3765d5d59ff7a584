"""Samples to batches: an order that is data, not an accident of scheduling.

Training reads an endless stream in which each run of ``num_samples`` positions is a permutation of the samples, drawn
by (seed, pass). Step ``s`` takes positions ``s*B`` to ``(s+1)*B`` (B: global batch size), each rank its share of those.
So any number of workers sees one order, every rank takes the same number of full batches, no sample is dropped or
seen twice in a pass, and a resumed run goes on at the very next sample.

Images are decoded by threads, for the decoders release the interpreter lock, and a Ray worker, which has threads of its
own, must not be forked as a torch DataLoader would.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from segray.classes import ClassMap
from segray.errors import DataError, ImageFault
from segray.images import resize_image, resize_mask
from segray.manifest import Sample
from segray.samples import read_image, read_truth
from segray.transforms import pad_batch

_READ_AHEAD_BATCHES = 3
_LabelledImage = tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]
_Loader = Callable[[Sample], _LabelledImage]


@dataclass(frozen=True)
class TrainBatch:
    """One rank's share of a training step, at the model's input size.

    Attributes:
        images: (N, H, W, 3) uint8.
        truth: (N, H, W) class indices, the class map's ``index_dtype``.
        image_uris: N URIs, in the order of the images.
    """

    images: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.integer]
    image_uris: list[str]


@dataclass(frozen=True)
class EvalBatch:
    """Images at the model's input size, padded to a fixed number, with the truth at each image's own size.

    Attributes:
        images: (eval_batch_size, H, W, 3) uint8; those past ``len(truths)`` are padding.
        truths: Class-index maps (H_i, W_i).
    """

    images: npt.NDArray[np.uint8]
    truths: list[npt.NDArray[np.integer]]


def compute_num_steps(num_samples: int, global_batch_size: int) -> int:
    """Return the steps of an epoch: enough to see every sample."""
    return -(-num_samples // global_batch_size)


def compute_step_order(step: int, num_samples: int, global_batch_size: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the sample indices of a global training step, (global_batch_size,) int64."""
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    indices = np.empty_like(positions)
    for sample_pass in np.unique(positions // num_samples):
        order = _draw_order(num_samples, seed, int(sample_pass))
        taken = positions // num_samples == sample_pass
        indices[taken] = order[positions[taken] % num_samples]
    return indices


@lru_cache(maxsize=2)  # a step lies in one pass, or at the seam of two
def _draw_order(num_samples: int, seed: int, sample_pass: int) -> npt.NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, sample_pass])).permutation(num_samples)


def load_labelled_image(sample: Sample, classes: ClassMap) -> _LabelledImage:
    """Read an image (H, W, 3) uint8 and its class-index map (H, W), both at their own size.

    Raises:
        DataError: One of them cannot be used, or their sizes differ.
        StorageError: The store refused or failed.
    """
    uri = sample.image_uri
    try:
        image = read_image(uri)
        uri = sample.mask_uri
        return image, read_truth(uri, image.shape[:2], classes)
    except ImageFault as fault:
        raise DataError(f"{uri}: {fault.kind}: {fault}; run segray check for all such files") from fault


def iterate_training(
    samples: Sequence[Sample],
    classes: ClassMap,
    image_size: tuple[int, int],
    *,
    steps: range,
    global_batch_size: int,
    seed: int,
    world_rank: int,
    world_size: int,
    num_threads: int,
) -> Iterator[TrainBatch]:
    """Yield this rank's batch of each global step in ``steps``."""

    def load(sample: Sample) -> _LabelledImage:
        image, truth = load_labelled_image(sample, classes)
        return resize_image(image, image_size), resize_mask(truth, image_size)

    share = global_batch_size // world_size
    mine = slice(world_rank * share, (world_rank + 1) * share)
    batches = (
        [samples[index] for index in compute_step_order(step, len(samples), global_batch_size, seed)[mine]]
        for step in steps
    )
    for batch, pairs in _load_ahead(load, batches, num_threads):
        images, truths = zip(*pairs, strict=True)
        yield TrainBatch(np.stack(images), np.stack(truths), [sample.image_uri for sample in batch])


def iterate_evaluation(
    samples: Sequence[Sample],
    classes: ClassMap,
    image_size: tuple[int, int],
    *,
    batch_size: int,
    world_rank: int,
    world_size: int,
    num_threads: int,
) -> Iterator[EvalBatch]:
    """Yield this rank's share of the samples, each sample on exactly one rank and nothing dropped."""

    def load(sample: Sample) -> _LabelledImage:
        image, truth = load_labelled_image(sample, classes)
        return resize_image(image, image_size), truth

    mine = samples[world_rank::world_size]
    batches = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    for _, pairs in _load_ahead(load, batches, num_threads):
        images, truths = zip(*pairs, strict=True)
        yield EvalBatch(pad_batch(np.stack(images), batch_size), list(truths))


def _load_ahead(
    load: _Loader, batches: Iterable[Sequence[Sample]], num_threads: int
) -> Iterator[tuple[Sequence[Sample], list[_LabelledImage]]]:
    """Yield each batch with its loaded samples, in order, the next batches being loaded meanwhile."""
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[tuple[Sequence[Sample], list[Future[_LabelledImage]]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, [pool.submit(load, sample) for sample in batch]))
                if len(waiting) > _READ_AHEAD_BATCHES:
                    yield _wait(*waiting.popleft())
            while waiting:
                yield _wait(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _wait(
    batch: Sequence[Sample], futures: list[Future[_LabelledImage]]
) -> tuple[Sequence[Sample], list[_LabelledImage]]:
    return batch, [future.result() for future in futures]
