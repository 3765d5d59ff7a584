"""The order of samples is data: the same for any number of workers, nothing dropped, nothing twice."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segray.config import DataConfig
from segray.errors import DataError
from segray.images import resize_mask
from segray.manifest import Sample, load_splits
from segray.train.feed import (
    compute_num_steps,
    compute_step_order,
    iterate_evaluation,
    iterate_training,
    load_labelled_image,
)
from tests.conftest import NUM_TRAIN, PET_CLASSES, SHAPE_SIZE

SIZE = (SHAPE_SIZE, SHAPE_SIZE)


@pytest.fixture
def samples(shapes_root: Path) -> list[Sample]:
    layout = {"layout": {"oxford_iiit_pet": {"root": str(shapes_root)}}}
    return load_splits(DataConfig.model_validate(layout)).train


def read(samples: list[Sample], steps: range, world_size: int) -> list[list[str]]:
    """Return the image URIs of each global step, ranks in order."""
    ranks = [
        iterate_training(
            samples,
            PET_CLASSES,
            SIZE,
            steps=steps,
            global_batch_size=4,
            seed=7,
            world_rank=rank,
            world_size=world_size,
            num_threads=2,
        )
        for rank in range(world_size)
    ]
    return [
        [uri for batch in share for uri in batch.image_uris]
        for share in zip(*ranks, strict=True)  # strict: every rank takes the same number of steps
    ]


def test_one_two_and_four_workers_share_one_order(samples: list[Sample]) -> None:
    orders = [read(samples, range(6), world_size) for world_size in (1, 2, 4)]
    assert orders[0] == orders[1] == orders[2]
    assert all(len(step) == 4 for step in orders[0])


def test_resuming_goes_on_at_the_very_next_sample(samples: list[Sample]) -> None:
    assert read(samples, range(3, 6), 2) == read(samples, range(6), 2)[3:]


@pytest.mark.parametrize(("num_samples", "batch"), [(18, 4), (7, 3), (3, 8), (101, 16), (1, 2)])
def test_every_pass_is_a_permutation_and_none_is_like_another(num_samples: int, batch: int) -> None:
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
def test_evaluation_sees_every_image_once(samples: list[Sample], world_size: int) -> None:
    seen = Counter[bytes]()
    for rank in range(world_size):
        for batch in iterate_evaluation(
            samples, PET_CLASSES, SIZE, batch_size=4, world_rank=rank, world_size=world_size, num_threads=2
        ):
            assert batch.images.shape == (4, *SIZE, 3)
            seen.update(image.tobytes() for image in batch.images[: len(batch.truths)])
    assert sorted(seen.values()) == [1] * NUM_TRAIN


def test_training_images_are_resized_and_evaluation_truth_is_not(samples: list[Sample]) -> None:
    small = (32, 48)
    options = {"world_rank": 0, "world_size": 1, "num_threads": 1}
    batch = next(iterate_training(samples, PET_CLASSES, small, steps=range(1), global_batch_size=2, seed=0, **options))
    assert batch.images.shape == (2, *small, 3)
    assert batch.truth.shape == (2, *small)
    mask_uris = dict(samples)
    for image, truth, uri in zip(batch.images, batch.truth, batch.image_uris, strict=True):
        with Image.open(uri) as source, Image.open(mask_uris[uri]) as mask:
            np.testing.assert_array_equal(image, source.resize(small[::-1], Image.Resampling.BILINEAR))
            np.testing.assert_array_equal(truth + 1, resize_mask(np.asarray(mask), small))
    assert batch.images.flags.writeable  # torch refuses to share memory that is not
    evaluated = next(iterate_evaluation(samples, PET_CLASSES, small, batch_size=2, **options))
    assert evaluated.images.shape == (2, *small, 3)
    assert [truth.shape for truth in evaluated.truths] == [SIZE, SIZE]


def test_a_broken_file_is_named_with_its_remedy(samples: list[Sample], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no")
    with pytest.raises(DataError, match=r"broken\.jpg: unreadable: .*run segray check"):
        load_labelled_image(Sample(str(broken), samples[0].mask_uri), PET_CLASSES)
