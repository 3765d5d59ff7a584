"""Class-balanced sampling, compared with its formula and counted over many epochs."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from segray.training.sampling import ImageWeights, compute_image_weights, pack_presence
from segray.training.worker.feed import compute_step_order

NUM_IMAGES, BATCH = 40, 7


def make_weights() -> ImageWeights:
    """Of 40 images, 36 have weight 1 and 4 weight 3, so that in each epoch of 40 they have 30 and 10 places."""
    return ImageWeights(np.repeat(np.array([1, 3], np.float32), [36, 4]))


@pytest.mark.parametrize("num_classes", [3, 8, 19])
def test_an_image_has_the_repeat_factor_of_its_rarest_class(num_classes: int) -> None:
    present = np.random.default_rng(0).random((NUM_IMAGES, num_classes)) < np.geomspace(0.9, 0.05, num_classes)
    present[:, 0] = True
    present[3] = False
    count = present.sum(0)
    presence = b"".join(pack_presence(row) for row in present)
    expected = [
        max([1.0, *(math.sqrt(NUM_IMAGES / n) for n, has in zip(count.tolist(), row, strict=True) if has)])
        for row in present
    ]
    np.testing.assert_allclose(compute_image_weights(presence, count).values, expected, rtol=1e-6)
    assert max(expected) > 3


def draw_epochs(num_epochs: int, weights: ImageWeights | None = None, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return the image numbers of whole epochs, (num_epochs, 40), assembled from steps that do not align with them."""
    num_steps = -(-num_epochs * NUM_IMAGES // BATCH)
    stream = np.concatenate([compute_step_order(step, NUM_IMAGES, BATCH, seed, weights) for step in range(num_steps)])
    return stream[: num_epochs * NUM_IMAGES].reshape(num_epochs, NUM_IMAGES)


def test_each_epoch_has_each_image_as_often_as_its_share_rounded_up_or_down() -> None:
    epochs = draw_epochs(2000, make_weights())
    counts = np.array([np.bincount(epoch, minlength=NUM_IMAGES) for epoch in epochs])
    share = make_weights().values / make_weights().values.sum() * NUM_IMAGES
    assert (counts.sum(1) == NUM_IMAGES).all()
    assert ((counts >= np.floor(share)) & (counts <= np.ceil(share))).all()
    np.testing.assert_allclose(counts.mean(0), share, atol=0.06)  # 4 standard errors.
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)
    first_half = epochs[:, : NUM_IMAGES // 2]
    assert (first_half >= 36).mean() == pytest.approx(10 / 40, abs=0.01)  # They are spread over the epoch.


def test_the_order_depends_only_on_seed_epoch_and_weights() -> None:
    again = ImageWeights(make_weights().values.copy())
    np.testing.assert_array_equal(draw_epochs(5, make_weights()), draw_epochs(5, again))
    assert not np.array_equal(draw_epochs(5, make_weights()), draw_epochs(5, make_weights(), seed=1))


def test_equal_weights_draw_every_image_once() -> None:
    for epoch in draw_epochs(20, ImageWeights(np.full(NUM_IMAGES, 1.7, np.float32))):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(NUM_IMAGES))
