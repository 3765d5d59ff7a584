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
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from segray.data.augmentation import Augmentation
from segray.data.images import resize_image
from segray.data.manifest import Sample
from segray.data.preprocessing import pad_batch
from segray.training.worker.sample_store import LabelledImage, SampleStore

_READ_AHEAD_BATCHES = 3
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class TrainBatch:
    """A rank's share of a training step, or a part of it.

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
        numbers: Place of each image in its split.
    """

    images: npt.NDArray[np.uint8]
    truths: list[npt.NDArray[np.integer]]
    numbers: list[int]


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


def _build_generator(seed: int, position: int) -> np.random.Generator:
    """Return the generator of a sample's changes; the key keeps it apart from those of orders."""
    return np.random.default_rng(np.random.SeedSequence([seed, position], spawn_key=(1,)))


def iterate_training(
    samples: Sequence[Sample],
    store: SampleStore,
    augmentation: Augmentation,
    *,
    steps: range,
    global_batch_size: int,
    num_parts: int,
    seed: int,
    world_rank: int,
    world_size: int,
    num_threads: int,
) -> Iterator[list[TrainBatch]]:
    """Yield this rank's share of each global step in ``steps``, in ``num_parts`` batches.

    A sample is changed by a generator of its own, made from the seed and its position in the stream.
    """

    def load(item: tuple[int, Sample]) -> LabelledImage:
        position, sample = item
        return augmentation.apply(*store.load(sample), _build_generator(seed, position))

    def list_share(step: int) -> list[tuple[int, Sample]]:
        order = compute_step_order(step, len(samples), global_batch_size, seed)
        share = np.array_split(np.arange(global_batch_size), world_size)[world_rank]
        return [(step * global_batch_size + int(place), samples[order[place]]) for place in share]

    for share, pairs in _load_ahead(load, map(list_share, steps), num_threads):
        parts = np.array_split(np.arange(len(share)), num_parts)
        yield [
            TrainBatch(
                np.stack([pairs[number][0] for number in part]),
                np.stack([pairs[number][1] for number in part]),
                [share[number][1].image_uri for number in part],
            )
            for part in parts
        ]


def iterate_evaluation(
    samples: Sequence[Sample],
    store: SampleStore,
    image_size: tuple[int, int],
    *,
    batch_size: int,
    world_rank: int,
    world_size: int,
    num_threads: int,
) -> Iterator[EvalBatch]:
    """Yield this rank's share of the samples, each sample on exactly one rank and nothing dropped."""

    def load(number: int) -> LabelledImage:
        image, truth = store.load(samples[number])
        return resize_image(image, image_size), truth

    mine = range(world_rank, len(samples), world_size)
    num_longest = -(-len(samples) // world_size)  # ranks that share weights take as many forward passes each
    batches = (mine[start : start + batch_size] for start in range(0, num_longest, batch_size))
    for numbers, pairs in _load_ahead(load, batches, num_threads):
        images = np.array([image for image, _ in pairs], np.uint8).reshape(-1, *image_size, 3)
        yield EvalBatch(pad_batch(images, batch_size), [truth for _, truth in pairs], list(numbers))


def _load_ahead(
    load: Callable[[ItemT], LabelledImage], batches: Iterable[Sequence[ItemT]], num_threads: int
) -> Iterator[tuple[Sequence[ItemT], list[LabelledImage]]]:
    """Yield each batch with its loaded samples, in order, the next batches being loaded meanwhile."""
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[tuple[Sequence[ItemT], list[Future[LabelledImage]]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, [pool.submit(load, item) for item in batch]))
                if len(waiting) > _READ_AHEAD_BATCHES:
                    yield _wait(*waiting.popleft())
            while waiting:
                yield _wait(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _wait(batch: Sequence[ItemT], futures: list[Future[LabelledImage]]) -> tuple[Sequence[ItemT], list[LabelledImage]]:
    return batch, [future.result() for future in futures]
