"""Load samples and assemble them into batches.

The sample order depends only on (seed, pass), so it is identical for any number of workers. Training reads an endless
stream in which each block of ``num_samples`` positions (a pass) is a random permutation of the samples. Step ``s``
takes the positions from ``s*B`` to ``(s+1)*B``, where B is the global batch size, and each rank loads its share of
them. So every rank takes the same number of full batches, no sample is dropped or repeated within a pass, and a resumed
run continues with the next sample.

Images are decoded by threads, because the decoders release the interpreter lock, and because a torch DataLoader would
fork the Ray worker, which is unsafe because the worker already has threads.
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
from segray.data.preprocessing import pad_batch
from segray.data.sample_list import Sample
from segray.training.worker.sample_store import LabelledImage, SampleStore

_READ_AHEAD_BATCHES = 3
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class TrainBatch:
    """A rank's share of a training step, or one part of it for gradient accumulation.

    Attributes:
        images: (N, H, W, 3) uint8.
        truth: (N, H, W) class indices, of the class map's ``index_dtype``.
        image_uris: N URIs, in the order of the images.
    """

    images: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.integer]
    image_uris: list[str]


@dataclass(frozen=True)
class EvalBatch:
    """Images at the model's input size, padded to a fixed batch size, with ground truth at the original image sizes.

    Attributes:
        images: (eval_batch_size, H, W, 3) uint8; those beyond ``len(truths)`` are padding.
        truths: Class-index maps (H_i, W_i).
        numbers: Index of each image in its split.
    """

    images: npt.NDArray[np.uint8]
    truths: list[npt.NDArray[np.integer]]
    numbers: list[int]


@dataclass(frozen=True)
class StreamSettings:
    """How the sample stream is ordered and divided into steps.

    Attributes:
        global_batch_size: Samples per step over all ranks.
        num_parts: Batches that each rank's share of a step is divided into, for gradient accumulation; see
            ``compute_num_parts``.
        seed: Seed of the sample order and of the augmentation.
    """

    global_batch_size: int
    num_parts: int = 1
    seed: int = 0


@dataclass(frozen=True)
class RankShare:
    """Which share of the samples to load, and with how many threads.

    Attributes:
        world_rank: Rank of this process, from 0.
        world_size: Number of ranks.
        num_threads: Threads that read, decode and augment samples.
    """

    world_rank: int = 0
    world_size: int = 1
    num_threads: int = 1


def compute_num_steps(num_samples: int, global_batch_size: int) -> int:
    """Return the number of steps in an epoch: the smallest number that takes at least ``num_samples`` samples."""
    return -(-num_samples // global_batch_size)


def compute_num_parts(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return how many parts, of at most ``micro_batch_size`` images, each rank divides its share of a step into.

    So a run that continues with fewer ranks accumulates more gradients, and needs no more memory per rank than before.
    """
    largest_share = -(-global_batch_size // world_size)
    return -(-largest_share // micro_batch_size)


def compute_step_order(step: int, num_samples: int, global_batch_size: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the sample indices of a training step over all ranks, (global_batch_size,) int64."""
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    indices = np.empty_like(positions)
    for sample_pass in np.unique(positions // num_samples):
        order = _draw_order(num_samples, seed, int(sample_pass))
        taken = positions // num_samples == sample_pass
        indices[taken] = order[positions[taken] % num_samples]
    return indices


@lru_cache(maxsize=2)  # A step lies within one pass or spans two.
def _draw_order(num_samples: int, seed: int, sample_pass: int) -> npt.NDArray[np.integer]:
    """Return a permutation, the same as ``Generator.permutation(num_samples)`` in half the memory."""
    order: npt.NDArray[np.integer] = np.arange(num_samples, dtype=np.int32 if num_samples < 2**31 else np.int64)
    np.random.Generator(np.random.PCG64([seed, sample_pass])).shuffle(order)
    return order


def _build_generator(seed: int, position: int) -> np.random.Generator:
    """Return the random generator that augments a sample; the spawn key makes it independent of the sample order's."""
    return np.random.default_rng(np.random.SeedSequence([seed, position], spawn_key=(1,)))


def iterate_training(
    samples: Sequence[Sample],
    store: SampleStore,
    augmentation: Augmentation,
    steps: range,
    stream: StreamSettings,
    share: RankShare,
) -> Iterator[list[TrainBatch]]:
    """Yield a rank's share of each step, as a list of ``stream.num_parts`` batches.

    Each sample is augmented by its own random generator, which depends only on the seed and the position in the stream.
    Every rank needs the same number of parts, because they communicate in each. One with fewer images than parts, which
    occurs with parts of one image, repeats its last image there with all pixels ignored.

    Args:
        samples: The training split.
        store: Loads and caches samples.
        augmentation: Random changes, which also resize samples to the model's input size.
        steps: Indices of the steps to yield.
        stream: Order of the samples and their division into steps.
        share: Which share of each step to load.

    Raises:
        DataError: An image or mask cannot be used.
        StorageError: Permissions, network or disk error.
    """
    batch_size = stream.global_batch_size

    def load(item: tuple[int, Sample]) -> LabelledImage:
        position, sample = item
        return augmentation.apply(*store.load(sample), _build_generator(stream.seed, position))

    def list_share(step: int) -> list[tuple[int, Sample]]:
        order = compute_step_order(step, len(samples), batch_size, stream.seed)
        offsets = np.array_split(np.arange(batch_size), share.world_size)[share.world_rank]
        return [(step * batch_size + int(offset), samples[order[offset]]) for offset in offsets]

    for items, pairs in _load_ahead(load, map(list_share, steps), share.num_threads):
        uris = [sample.image_uri for _, sample in items]
        parts = np.array_split(np.arange(len(items)), stream.num_parts)
        yield [_build_batch(part, pairs, uris, augmentation.ignore_index) for part in parts]


def _build_batch(
    part: npt.NDArray[np.int64], pairs: Sequence[LabelledImage], uris: Sequence[str], ignore_index: int
) -> TrainBatch:
    """Return the batch of the samples with the indices ``part``; if there are none, the last sample, ignored."""
    if not len(part):
        image, truth = pairs[-1]
        return TrainBatch(image[None], np.full_like(truth, ignore_index)[None], [uris[-1]])
    return TrainBatch(
        np.stack([pairs[number][0] for number in part]),
        np.stack([pairs[number][1] for number in part]),
        [uris[number] for number in part],
    )


def iterate_evaluation(
    samples: Sequence[Sample],
    store: SampleStore,
    image_size: tuple[int, int],
    batch_size: int,
    share: RankShare,
) -> Iterator[EvalBatch]:
    """Yield a rank's share of the samples in batches; each sample is on exactly one rank, and none is dropped.

    Args:
        samples: The validation split.
        store: Loads and caches samples.
        image_size: Height and width of the model's input.
        batch_size: Images per batch, including padding.
        share: Which share of the samples to load.

    Raises:
        DataError: An image or mask cannot be used.
        StorageError: Permissions, network or disk error.
    """

    def load(number: int) -> LabelledImage:
        image, truth = store.load(samples[number])
        return resize_image(image, image_size), truth

    mine = range(share.world_rank, len(samples), share.world_size)
    # Every rank yields as many batches as the longest share: FSDP ranks must make the same number of forward passes.
    num_longest = -(-len(samples) // share.world_size)
    batches = (mine[start : start + batch_size] for start in range(0, num_longest, batch_size))
    for numbers, pairs in _load_ahead(load, batches, share.num_threads):
        images = np.array([image for image, _ in pairs], np.uint8).reshape(-1, *image_size, 3)
        yield EvalBatch(pad_batch(images, batch_size), [truth for _, truth in pairs], list(numbers))


def _load_ahead(
    load: Callable[[ItemT], LabelledImage], batches: Iterable[Sequence[ItemT]], num_threads: int
) -> Iterator[tuple[Sequence[ItemT], list[LabelledImage]]]:
    """Yield each batch with its loaded samples, in order, while threads load the next batches."""
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
