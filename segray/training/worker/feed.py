"""Load samples and assemble them into batches.

The sample order depends only on (seed, pass), so it is identical for any number of workers. Training reads an endless
stream in which each block of ``num_samples`` positions (a pass) is a random permutation of the samples. Step ``s``
takes the positions from ``s*B`` to ``(s+1)*B``, where B is the global batch size, and each rank loads its share of
them. So every rank takes the same number of full batches, no sample is dropped or repeated within a pass, and a resumed
run continues with the next sample. With class-balanced sampling, a pass instead has each sample as often as its weight
says.

Files in buckets are read by the threads of the sample store. Others decode and augment samples, and write each into its
place in the batch. They are threads because decoders and Pillow's changes of images release the interpreter lock.
Processes would copy every sample once more; ``benchmarks/feed.py`` compares them. A torch DataLoader would also fork
the Ray worker, which is unsafe because the worker already has threads.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from segray.data.augmentation import Augmentation
from segray.data.images import resize_mask
from segray.data.sample_list import Sample
from segray.training.sampling import ImageWeights
from segray.training.worker.sample_store import ORIGINAL_SIZE, EncodedSample, SampleSize, SampleStore

_NO_TRUTH: npt.NDArray[np.integer] = np.empty((0, 0), np.uint8)
KeyT = TypeVar("KeyT")
BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class TrainBatch:
    """A rank's share of a training step, or one part of it for gradient accumulation.

    Attributes:
        images: (N, H, W, 3) uint8.
        truth: (N, H, W) class indices, of the class map's ``index_dtype``.
        image_uris: N URIs, in the order of the images.
    """

    images: torch.Tensor
    truth: torch.Tensor
    image_uris: list[str]


@dataclass(frozen=True)
class EvalBatch:
    """Images at the model's input size, padded to a fixed batch size, with ground truth at the original image sizes.

    Attributes:
        images: (eval_batch_size, H, W, 3) uint8; those beyond ``len(truths)`` are padding.
        truths: Class-index maps (H_i, W_i).
        targets: (len(truths), H, W), the same at the model's input size, for the loss.
        numbers: Index of each image in its split.
    """

    images: torch.Tensor
    truths: list[npt.NDArray[np.integer]]
    targets: torch.Tensor
    numbers: list[int]


@dataclass(frozen=True)
class StreamSettings:
    """How the sample stream is ordered and divided into steps.

    Attributes:
        global_batch_size: Samples per step over all ranks.
        num_parts: Batches that each rank's share of a step is divided into, for gradient accumulation; see
            ``compute_num_parts``.
        seed: Seed of the sample order and of the augmentation.
        image_weights: How often each sample is drawn, or None for equally often.
    """

    global_batch_size: int
    num_parts: int = 1
    seed: int = 0
    image_weights: ImageWeights | None = None


@dataclass(frozen=True)
class RankShare:
    """Which share of the samples to load, and with how many threads.

    Attributes:
        world_rank: Rank of this process, from 0.
        world_size: Number of ranks.
        num_threads: Threads that decode and augment samples.
        num_batches_ahead: Batches that are loaded ahead of the one that is taken.
        pin_memory: Whether batches are in page-locked memory, from which a GPU copies while the host does other work.
    """

    world_rank: int = 0
    world_size: int = 1
    num_threads: int = 1
    num_batches_ahead: int = 8
    pin_memory: bool = False


def compute_num_parts(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return how many parts, of at most ``micro_batch_size`` images, each rank divides its share of a step into.

    So a run that continues with fewer ranks accumulates more gradients, and needs no more memory per rank than before.
    """
    largest_share = -(-global_batch_size // world_size)
    return -(-largest_share // micro_batch_size)


def compute_step_order(
    step: int, num_samples: int, global_batch_size: int, seed: int, image_weights: ImageWeights | None = None
) -> npt.NDArray[np.int64]:
    """Return the sample indices of a training step over all ranks, (global_batch_size,) int64."""
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    indices = np.empty_like(positions)
    for sample_pass in np.unique(positions // num_samples):
        order = _draw_order(num_samples, seed, int(sample_pass), image_weights)
        taken = positions // num_samples == sample_pass
        indices[taken] = order[positions[taken] % num_samples]
    return indices


@lru_cache(maxsize=2)  # A step lies within one pass or spans two.
def _draw_order(
    num_samples: int, seed: int, sample_pass: int, image_weights: ImageWeights | None
) -> npt.NDArray[np.integer]:
    """Return the order of a pass; without weights the same as ``permutation(num_samples)``, in half the memory."""
    generator = np.random.Generator(np.random.PCG64([seed, sample_pass]))
    if image_weights:
        return image_weights.draw(generator)
    order: npt.NDArray[np.integer] = np.arange(num_samples, dtype=np.int32 if num_samples < 2**31 else np.int64)
    generator.shuffle(order)
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
) -> Generator[list[TrainBatch]]:
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
    height, width = augmentation.settings.crop_size or augmentation.image_size
    whole = SampleSize(augmentation.image_size, augmentation.image_size)
    size = whole if augmentation.takes_whole_images else ORIGINAL_SIZE
    truth_dtype = _get_truth_dtype(store)

    def start(pool: ThreadPoolExecutor, step: int) -> tuple[list[TrainBatch], list[Future[None]]]:
        order = compute_step_order(step, len(samples), batch_size, stream.seed, stream.image_weights)
        offsets = np.array_split(np.arange(batch_size), share.world_size)[share.world_rank]
        mine = [samples[order[offset]] for offset in offsets]
        images = torch.empty((len(mine), height, width, 3), dtype=torch.uint8, pin_memory=share.pin_memory)
        truth = torch.empty((len(mine), height, width), dtype=truth_dtype, pin_memory=share.pin_memory)
        image_rows, truth_rows = images.numpy(), truth.numpy()

        def load(row: int, encoded: EncodedSample | None) -> None:
            generator = _build_generator(stream.seed, step * batch_size + int(offsets[row]))
            found = store.load(mine[row], size, encoded)
            image_rows[row], truth_rows[row] = augmentation.apply(*found, generator)

        futures = [pool.submit(load, row, store.request(sample, size)) for row, sample in enumerate(mine)]
        whole_share = TrainBatch(images, truth, [sample.image_uri for sample in mine])
        return _divide(whole_share, stream.num_parts, augmentation.ignore_index), futures

    yield from _load_ahead(steps, start, share)


def _get_truth_dtype(store: SampleStore) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, np.dtype(store.classes.index_dtype).name)
    return dtype


def _divide(batch: TrainBatch, num_parts: int, ignore_index: int) -> list[TrainBatch]:
    """Divide a batch into parts; one without images has the last image, ignored."""
    parts = []
    for rows in np.array_split(np.arange(len(batch.images)), num_parts):
        taken = slice(rows[0], rows[-1] + 1) if len(rows) else slice(-1, None)
        truth = batch.truth[taken]
        if not len(rows):
            truth = torch.from_numpy(np.full_like(truth.numpy(), ignore_index))
        parts.append(TrainBatch(batch.images[taken], truth, batch.image_uris[taken]))
    return parts


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
    size, truth_dtype = SampleSize(image=image_size), _get_truth_dtype(store)

    def start(pool: ThreadPoolExecutor, numbers: Sequence[int]) -> tuple[EvalBatch, list[Future[None]]]:
        images = torch.empty((batch_size, *image_size, 3), dtype=torch.uint8, pin_memory=share.pin_memory)
        targets = torch.empty((len(numbers), *image_size), dtype=truth_dtype, pin_memory=share.pin_memory)
        image_rows, target_rows, truths = images.numpy(), targets.numpy(), [_NO_TRUTH] * len(numbers)
        image_rows[len(numbers) :] = 0

        def load(row: int, encoded: EncodedSample | None) -> None:
            image_rows[row], truth = store.load(samples[numbers[row]], size, encoded)
            truths[row] = np.require(truth, requirements="W")  # torch warns about the read-only memory of the cache.
            target_rows[row] = resize_mask(truths[row], image_size)

        futures = [pool.submit(load, row, store.request(samples[n], size)) for row, n in enumerate(numbers)]
        return EvalBatch(images, truths, targets, list(numbers)), futures

    mine = range(share.world_rank, len(samples), share.world_size)
    # Every rank yields as many batches as the longest share: FSDP ranks must make the same number of forward passes.
    num_longest = -(-len(samples) // share.world_size)
    batches = (mine[first : first + batch_size] for first in range(0, num_longest, batch_size))
    yield from _load_ahead(batches, start, share)


def _load_ahead(
    keys: Iterable[KeyT],
    start: Callable[[ThreadPoolExecutor, KeyT], tuple[BatchT, list[Future[None]]]],
    share: RankShare,
) -> Iterator[BatchT]:
    """Yield the batch of each key, in order, while threads load the next ones.

    Args:
        keys: What the batches are made of.
        start: Starts to load a batch; returns it with the tasks that fill it. It fills arrays by numpy, because a torch
            operation in another thread may start more OpenMP threads than there are cores.
        share: Number of threads, and of batches to load ahead.
    """
    pool = ThreadPoolExecutor(share.num_threads, "decode-sample")
    starter = ThreadPoolExecutor(1, "start-batch")  # Starting a batch here would take 1 ms of the caller's time.
    waiting: deque[Future[tuple[BatchT, list[Future[None]]]]] = deque()
    try:
        for key in keys:
            waiting.append(starter.submit(start, pool, key))
            if len(waiting) > share.num_batches_ahead:
                yield _wait(waiting.popleft())
        while waiting:
            yield _wait(waiting.popleft())
    finally:
        for executor in (starter, pool):
            executor.shutdown(cancel_futures=True)


def _wait(started: Future[tuple[BatchT, list[Future[None]]]]) -> BatchT:
    batch, tasks = started.result()
    for task in tasks:
        task.result()
    return batch
