"""The sample order, which is the same for any number of workers and drops no sample, and the sample cache."""

import errno
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segray.config import AugmentationSettings, DataConfig
from segray.data.augmentation import Augmentation
from segray.data.images import resize_mask
from segray.data.manifest import load_splits
from segray.data.sample_list import Sample
from segray.errors import DataError, StorageError
from segray.training.job import compute_num_steps
from segray.training.worker import sample_store
from segray.training.worker.feed import (
    RankShare,
    StreamSettings,
    TrainBatch,
    compute_num_parts,
    compute_step_order,
    iterate_evaluation,
    iterate_training,
)
from segray.training.worker.sample_file import create_in_memory, open_shared
from segray.training.worker.sample_store import SampleSize, SampleStore, load_labelled_image
from tests.conftest import NUM_TRAIN, PET_CLASSES, SHAPE_SIZE

SIZE = (SHAPE_SIZE, SHAPE_SIZE)
HEADER_BYTES = 36  # Of a kept sample.
STREAM = StreamSettings(global_batch_size=4, seed=7)
SHARE = RankShare(num_threads=2)


def build_augmentation(preset: Any, size: tuple[int, int]) -> Augmentation:
    return Augmentation(AugmentationSettings.model_validate(preset), size, PET_CLASSES.ignore_index)


STRONG = build_augmentation("strong", SIZE)


KEYS = [bytes([number]) * 16 for number in range(3)]


def assert_same(found: Any, expected: Any) -> None:
    for part, expected_part in zip(found, expected, strict=True):
        np.testing.assert_array_equal(part, expected_part, strict=True)


@pytest.fixture
def samples(shapes_root: Path) -> list[Sample]:
    layout = {"layout": {"oxford_iiit_pet": {"root": str(shapes_root)}}}
    return list(load_splits(DataConfig.model_validate(layout)).train)


def train(
    samples: list[Sample],
    steps: range,
    *,
    stream: StreamSettings = STREAM,
    share: RankShare = SHARE,
    augmentation: Augmentation = STRONG,
    cache_bytes: int = 2**30,
) -> list[list[TrainBatch]]:
    """Return a rank's batches of each step."""
    return list(iterate_training(samples, SampleStore(PET_CLASSES, cache_bytes), augmentation, steps, stream, share))


def read(
    samples: list[Sample], steps: range, world_size: int, num_threads: int = 2, **options: Any
) -> list[list[tuple[str, bytes, bytes]]]:
    """Return URI, pixels and ground truth of each sample of each global step, with ranks and parts in order."""
    ranks = [
        train(samples, steps, share=RankShare(rank, world_size, num_threads), **options) for rank in range(world_size)
    ]
    return [
        [
            (uri, image.tobytes(), truth.tobytes())
            for parts in share
            for part in parts
            for uri, image, truth in zip(part.image_uris, part.images.numpy(), part.truth.numpy(), strict=True)
        ]
        for share in zip(*ranks, strict=True)  # Every rank takes the same number of steps.
    ]


def test_order_and_augmentation_are_the_same_for_any_number_of_workers_and_parts(samples: list[Sample]) -> None:
    expected = read(samples, range(6), 1)
    assert all(len(step) == 4 for step in expected)
    for world_size in (2, 3, 4):  # With 3, shares are uneven, as after the loss of a node.
        assert read(samples, range(6), world_size) == expected
    assert read(samples, range(6), 1, stream=replace(STREAM, num_parts=4)) == expected
    assert read(samples, range(6), 2, stream=replace(STREAM, num_parts=2), num_threads=5) == expected


def test_a_resumed_run_continues_with_the_next_sample(samples: list[Sample]) -> None:
    assert read(samples, range(3, 6), 2) == read(samples, range(6), 2)[3:]


def test_a_sample_is_augmented_differently_in_each_pass(samples: list[Sample]) -> None:
    steps = [sample for step in read(samples, range(9), 1) for sample in step]  # Two passes of 18 samples.
    looks: dict[str, set[bytes]] = {}
    for uri, image, _ in steps:
        looks.setdefault(uri, set()).add(image)
    assert all(len(images) == 2 for images in looks.values())


@pytest.mark.parametrize("cache_bytes", [0, 3 * (4 * SHAPE_SIZE**2 + HEADER_BYTES), 2**30])
def test_samples_do_not_depend_on_the_size_of_the_cache(samples: list[Sample], cache_bytes: int) -> None:
    assert read(samples, range(9), 1, cache_bytes=cache_bytes) == read(samples, range(9), 1)


@pytest.mark.parametrize("in_memory", [0, 1, 2])
def test_the_cache_keeps_only_what_fits(samples: list[Sample], tmp_path: Path, in_memory: int) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, sample in zip(paths, samples, strict=False):
        Image.open(sample.image_uri).save(path)
    copies = [Sample(str(path), sample.mask_uri) for path, sample in zip(paths, samples, strict=False)]
    num_bytes = 4 * SHAPE_SIZE**2 + HEADER_BYTES  # Bytes of an image and its ground truth.
    store = SampleStore(PET_CLASSES, in_memory * num_bytes, max_disk_bytes=(2 - in_memory) * num_bytes)
    expected = [store.load(copy) for copy in copies]
    for path in paths:
        path.unlink()
    for copy, (image, truth) in zip(copies[:2], expected, strict=False):
        again = store.load(copy)
        np.testing.assert_array_equal(again[0], image)
        np.testing.assert_array_equal(again[1], truth)
    with pytest.raises(DataError, match=r"2\.png: missing"):
        store.load(copies[2])


@pytest.mark.parametrize("is_short", [True, False])
def test_a_full_disk_ends_caching_but_not_loading(
    samples: list[Sample], is_short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        attempts.append(1)
        if is_short:
            return 3  # Fewer bytes than were to be written.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    attempts: list[int] = []
    store = SampleStore(PET_CLASSES, 0, max_disk_bytes=2**20)
    expected = [store.load(samples[0])]
    monkeypatch.setattr(os, "pwrite", fail)
    expected += [store.load(sample) for sample in samples[1:4]]
    assert len(attempts) == 1
    monkeypatch.undo()
    for _ in range(2):
        for sample, whole in zip(samples, expected, strict=False):
            for part, expected_part in zip(store.load(sample), whole, strict=True):
                np.testing.assert_array_equal(part, expected_part)


def test_a_sample_loaded_by_two_threads_uses_space_once(samples: list[Sample]) -> None:
    file = create_in_memory(2 * (4 * SHAPE_SIZE**2 + HEADER_BYTES))
    found = [load_labelled_image(sample, PET_CLASSES) for sample in samples[:2]]
    for number in (0, 0, 1):
        assert file.write(KEYS[number], found[number])
    assert not file.write(KEYS[2], found[0])
    for key, whole in zip(KEYS, found, strict=False):
        assert_same(file.read(key), whole)


def test_another_process_reads_what_has_been_written_since_it_last_looked(samples: list[Sample]) -> None:
    file = create_in_memory(2**20)
    found = [load_labelled_image(sample, PET_CLASSES) for sample in samples[:2]]
    wide = (found[1][0], found[1][1].astype(np.uint16))
    script = """
import sys
from segray.training.worker.sample_file import open_shared
file = open_shared(sys.argv[1])
for line in sys.stdin:
    file.refresh()
    parts = file.read(bytes.fromhex(line)) or ()
    print(*[f"{part.shape}{part.dtype}{part.tobytes().hex()}" for part in parts], flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, file.path], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdin
        assert reader.stdout
        for key, whole in zip(KEYS, (found[0], wide), strict=False):
            for is_written in (False, True):
                if is_written:
                    file.write(key, whole)
                print(key.hex(), file=reader.stdin, flush=True)
                expected = [f"{part.shape}{part.dtype}{part.tobytes().hex()}" for part in whole if is_written]
                assert reader.stdout.readline() == " ".join(expected) + "\n"
        reader.stdin.close()


def test_a_reader_takes_no_header_that_is_not_complete(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader looks before each write, and when only the second half of it has arrived."""
    file = create_in_memory(2**20)
    reader = open_shared(file.path)
    assert reader
    pwrite = os.pwrite
    seen: list[bool] = []

    def write(fd: int, content: bytes, offset: int) -> int:
        for start in (len(content) // 2, 0):  # The second half first.
            reader.refresh()
            seen.append(KEYS[0] in reader)
            pwrite(fd, content[start:], offset + start)
        return len(content)

    monkeypatch.setattr(os, "pwrite", write)
    found = load_labelled_image(samples[0], PET_CLASSES)
    assert file.write(KEYS[0], found)
    assert not any(seen)
    reader.refresh()
    assert_same(reader.read(KEYS[0]), found)


def test_a_file_of_another_kind_has_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(bytes(range(1, 255)))
    reader = open_shared(str(path))
    assert reader
    reader.refresh()
    assert not reader._locations


def test_a_file_that_cannot_be_opened_is_not_shared(tmp_path: Path) -> None:
    assert open_shared(str(tmp_path / "gone")) is None


@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("preset", ["none", "strong"])
def test_from_the_second_epoch_on_the_ranks_of_a_node_open_no_file(
    samples: list[Sample], world_size: int, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the evaluation, although it needs images of another size."""
    stores = [SampleStore(PET_CLASSES, 2**20, 2**20) for _ in range(world_size)]
    for rank, store in enumerate(stores):
        store.share([path for other, peer in enumerate(stores) if other != rank for path in peer.paths])
    num_fetched = Counter[str]()

    def count(uri: str) -> bytes:
        num_fetched[uri] += 1
        return Path(uri).read_bytes()

    for name in ("fetch_image", "fetch_mask"):
        monkeypatch.setattr(sample_store, name, count)
    stream = StreamSettings(global_batch_size=9, seed=7)  # An epoch is two steps.
    for epoch in range(3):
        for rank, store in enumerate(stores):
            share, augmentation = RankShare(rank, world_size, 2), build_augmentation(preset, (32, 48))
            steps = range(2 * epoch, 2 * epoch + 2)
            assert len(list(iterate_training(samples, store, augmentation, steps, stream, share))) == 2
            list(iterate_evaluation(samples[:5], store, (32, 48), 2, share))
        in_both_splits = {sample.image_uri for sample in samples[:5]}
        assert num_fetched == {
            uri: 2 if sample.image_uri in in_both_splits else 1 for sample in samples for uri in sample
        }


def test_a_sample_is_kept_at_the_size_that_it_is_trained_at_if_no_bit_changes(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, stream = (32, 48), StreamSettings(global_batch_size=18, seed=7)
    flips = {"preset": "strong", "scale": [1, 1], "aspect": [1, 1]}
    assert build_augmentation(flips, small).takes_whole_images
    assert not build_augmentation({**flips, "crop_size": [32, 32]}, small).takes_whole_images
    assert not build_augmentation({**flips, "scale": [1, 1.1]}, small).takes_whole_images
    assert not build_augmentation({**flips, "aspect": [0.9, 1]}, small).takes_whole_images
    num_bytes = 18 * (4 * 32 * 48 + HEADER_BYTES)
    store = SampleStore(PET_CLASSES, num_bytes)
    augmentation = build_augmentation(flips, small)
    ((batch,),) = iterate_training(samples, store, augmentation, range(1), stream, SHARE)
    monkeypatch.setattr(sample_store, "fetch_image", None)  # The samples are kept.
    assert all(store.load(sample, SampleSize(small, small))[0].shape == (*small, 3) for sample in samples)
    monkeypatch.undo()
    for row, index in enumerate(compute_step_order(0, 18, 18, 7)):
        original = load_labelled_image(samples[index], PET_CLASSES)
        generator = np.random.default_rng(np.random.SeedSequence([7, row], spawn_key=(1,)))
        expected = augmentation.apply(*original, generator)
        assert_same((batch.images[row].numpy(), batch.truth[row].numpy()), expected)


def test_both_files_of_a_sample_are_read_at_the_same_time(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    both, prefix = threading.Barrier(2, timeout=10), "s3://bucket"
    remote = [Sample(prefix + sample.image_uri, prefix + sample.mask_uri) for sample in samples]

    def fetch(uri: str) -> bytes:
        both.wait()  # Raises an error if the other file is read only later.
        return Path(uri.removeprefix(prefix)).read_bytes()

    for name in ("fetch_image", "fetch_mask"):
        monkeypatch.setattr(sample_store, name, fetch)
    assert len(train(remote, range(1), stream=StreamSettings(global_batch_size=1), share=RankShare())) == 1


def test_a_closed_store_reads_no_more_of_the_requested_files(monkeypatch: pytest.MonkeyPatch) -> None:
    is_closed = threading.Event()
    fetched: list[str] = []

    def fetch(uri: str) -> bytes:
        fetched.append(uri)
        is_closed.wait(10)
        return b""

    for name in ("fetch_image", "fetch_mask"):
        monkeypatch.setattr(sample_store, name, fetch)
    store = SampleStore(PET_CLASSES, 0)
    requests = [store.request(Sample(f"s3://bucket/{number}.png", "mask"), SampleSize()) for number in range(100)]
    store.close()
    is_closed.set()
    assert requests[-1] is not None
    assert requests[-1].mask.cancelled()
    store._readers.shutdown()
    assert len(fetched) <= sample_store._NUM_READERS


def test_the_error_for_an_unwritable_folder_names_the_setting_and_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match=r"train\.cache_disk_bytes: cannot write to .*gone.*TMPDIR"):
        SampleStore(PET_CLASSES, 0, max_disk_bytes=1)
    SampleStore(PET_CLASSES, 0)


@pytest.mark.parametrize(("num_samples", "batch"), [(18, 4), (7, 3), (3, 8), (101, 16), (1, 2)])
def test_every_pass_is_a_different_permutation(num_samples: int, batch: int) -> None:
    num_passes = 4
    num_steps = compute_num_steps(num_samples * num_passes, batch)
    stream = np.concatenate([compute_step_order(step, num_samples, batch, seed=0) for step in range(num_steps)])
    passes = stream[: num_samples * num_passes].reshape(num_passes, num_samples)
    for order in passes:
        np.testing.assert_array_equal(np.sort(order), np.arange(num_samples))
    if num_samples > 5:
        assert len({tuple(order) for order in passes.tolist()}) == num_passes
    other = np.concatenate([compute_step_order(step, num_samples, batch, seed=1) for step in range(num_steps)])
    assert num_samples == 1 or not np.array_equal(stream, other)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 25])
def test_evaluation_sees_every_image_exactly_once(samples: list[Sample], world_size: int) -> None:
    seen = Counter[int]()
    num_batches = set()
    for rank in range(world_size):
        batches = list(
            iterate_evaluation(
                samples,
                SampleStore(PET_CLASSES, 0),
                SIZE,
                2,
                RankShare(rank, world_size, 2),
            )
        )
        num_batches.add(len(batches))
        for batch in batches:
            assert batch.images.shape == (2, *SIZE, 3)
            assert len(batch.truths) == len(batch.numbers)
            assert not batch.images[len(batch.numbers) :].any()  # Padding.
            seen.update(batch.numbers)
            for image, number in zip(batch.images, batch.numbers, strict=False):
                expected, _ = load_labelled_image(samples[number], PET_CLASSES)
                np.testing.assert_array_equal(image, expected)
    assert seen == Counter(range(NUM_TRAIN))
    assert len(num_batches) == 1  # FSDP ranks must make the same number of forward passes.


def test_training_samples_are_resized_but_evaluation_truth_is_not(samples: list[Sample]) -> None:
    small = (32, 48)
    ((batch,),) = train(
        samples, range(1), stream=replace(STREAM, global_batch_size=2), augmentation=build_augmentation("none", small)
    )
    assert batch.images.shape == (2, *small, 3)
    assert batch.truth.shape == (2, *small)
    mask_uris = dict(samples)
    for image, truth, uri in zip(batch.images, batch.truth, batch.image_uris, strict=True):
        with Image.open(uri) as source, Image.open(mask_uris[uri]) as mask:
            np.testing.assert_array_equal(image, source.resize(small[::-1], Image.Resampling.BILINEAR))
            np.testing.assert_array_equal(truth + 1, resize_mask(np.asarray(mask), small))
    evaluated = next(
        iterate_evaluation(
            samples,
            SampleStore(PET_CLASSES, 0),
            small,
            2,
            RankShare(),
        )
    )
    assert evaluated.images.shape == (2, *small, 3)
    assert [truth.shape for truth in evaluated.truths] == [SIZE, SIZE]


def test_the_error_for_an_unreadable_image_names_the_file_and_segray_check(
    samples: list[Sample], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no")
    with pytest.raises(DataError, match=r"broken\.jpg: unreadable: .*run segray check to list all"):
        load_labelled_image(Sample(str(broken), samples[0].mask_uri), PET_CLASSES)


@pytest.mark.parametrize(("global_batch_size", "micro_batch_size"), [(16, 2), (12, 3), (8, 1), (64, 8), (24, 6)])
def test_fewer_ranks_process_no_more_images_at_once_and_no_more_parts_than_needed(
    global_batch_size: int, micro_batch_size: int
) -> None:
    for world_size in range(1, global_batch_size // micro_batch_size + 1):
        num_parts = compute_num_parts(global_batch_size, micro_batch_size, world_size)
        shares = np.array_split(np.arange(global_batch_size), world_size)
        sizes = [len(part) for share in shares for part in np.array_split(share, num_parts)]
        assert max(sizes) <= micro_batch_size
        assert (num_parts - 1) * micro_batch_size < len(shares[0])


def test_a_rank_with_fewer_images_than_parts_repeats_one_ignored(samples: list[Sample]) -> None:
    stream = StreamSettings(global_batch_size=4, num_parts=compute_num_parts(4, 1, 3), seed=7)
    steps = [train(samples, range(2), stream=stream, share=RankShare(rank, 3)) for rank in range(3)]
    for step in range(2):
        parts = [rank[step] for rank in steps]
        assert [len(rank) for rank in parts] == [2, 2, 2]
        assert all(len(part.images) == 1 for rank in parts for part in rank)
        scored = [part for rank in parts for part in rank if (part.truth != PET_CLASSES.ignore_index).any()]
        order = compute_step_order(step, len(samples), 4, 7)
        assert [part.image_uris[0] for part in scored] == [samples[index].image_uri for index in order]
