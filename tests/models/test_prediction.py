"""Masks and statistics from logits, compared with plain torch and numpy."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from segray.models import prediction
from segray.models.prediction import compute_mask, predict_image, sum_by_bin, sum_by_comparing

LOGITS = torch.randn(5, 12, 20, generator=torch.Generator().manual_seed(0)) * 3
SIZES = [(12, 20), (45, 77), (7, 9), (1, 1), (100, 3)]


@pytest.mark.parametrize("size", SIZES)
def test_the_mask_is_the_argmax_of_the_resized_logits(size: tuple[int, int]) -> None:
    resized = functional.interpolate(LOGITS[None], size=size, mode="bilinear", align_corners=False)[0]
    assert torch.equal(compute_mask(LOGITS, size), resized.argmax(0))


@pytest.mark.parametrize("size", SIZES)
def test_bands_give_the_same_result_as_the_whole_image(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prediction.MAX_BAND_VALUES, "cpu", 2**20)
    whole = predict_image(LOGITS, size)
    monkeypatch.setitem(prediction.MAX_BAND_VALUES, "cpu", 5 * size[1] * 4)  # Four rows at a time.
    banded = predict_image(LOGITS, size)
    assert torch.equal(banded.mask, whole.mask)
    assert torch.equal(banded.pixel_count, whole.pixel_count)
    torch.testing.assert_close(banded.confidence_sum, whole.confidence_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(banded.entropy_sum, whole.entropy_sum, rtol=1e-5, atol=1e-5)


def test_statistics_equal_those_of_numpy() -> None:
    size = (30, 41)
    resized = functional.interpolate(LOGITS[None], size=size, mode="bilinear", align_corners=False)[0].double().numpy()
    probability = np.exp(resized) / np.exp(resized).sum(0)
    mask, got = resized.argmax(0), predict_image(LOGITS, size)
    for index in range(len(LOGITS)):
        assert got.pixel_count[index] == (mask == index).sum()
        expected = probability.max(0)[mask == index].sum()
        assert got.confidence_sum[index].item() == pytest.approx(expected, rel=1e-6)
    assert got.entropy_sum.item() == pytest.approx(-(probability * np.log(probability)).sum(), rel=1e-6)


def test_certain_predictions_have_entropy_0() -> None:
    logits = torch.full((3, 4, 4), -200.0)
    logits[1] = 200.0
    got = predict_image(logits, (8, 8))
    assert got.entropy_sum.item() == 0
    assert got.confidence_sum.tolist() == [0, 64, 0]


def test_half_precision_logits_are_resized_in_float32() -> None:
    half = LOGITS.bfloat16()
    assert torch.equal(compute_mask(half, (45, 77)), compute_mask(half.float(), (45, 77)))


@pytest.mark.parametrize("num_classes", [2, 128, 129, 300])
def test_ties_go_to_the_first_class_for_any_number_of_classes(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randint(0, 4, (num_classes, 9, 11), generator=generator).float()  # Many values are equal.
    expected = np.argmax(logits.numpy(), 0)  # numpy documents that this is the first.
    got = predict_image(logits, (9, 11))
    assert got.mask.dtype == (torch.uint8 if num_classes <= 256 else torch.int32)
    assert np.array_equal(got.mask.numpy(), expected)
    assert np.array_equal(compute_mask(logits, (9, 11)).numpy(), expected)
    assert got.pixel_count.tolist() == np.bincount(expected.ravel(), minlength=num_classes).tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_non_finite_logit_affects_only_its_pixel_and_makes_statistics_nan(value: float) -> None:
    logits = LOGITS.clone()
    logits[2, 3, 4] = value
    got = predict_image(logits, (12, 20))
    assert int(got.mask.max()) < len(LOGITS)
    assert got.entropy_sum.isnan()
    assert got.confidence_sum.isnan().any()
    is_changed = got.mask.long() != LOGITS.argmax(0)
    assert is_changed.nonzero().tolist() in ([], [[3, 4]])


@pytest.mark.parametrize("num_classes", [2, 200, 300])
def test_sums_by_comparing_equal_sums_by_bin(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, num_classes - 1, (8, 9), generator=generator)  # The last class has no pixel.
    mask = mask.to(torch.uint8 if num_classes <= 128 else torch.int32)
    steps = torch.randint(0, 2**24, (8, 9), generator=generator).float()
    expected_sums = sum_by_bin(mask, steps, num_classes)
    for got, expected in zip(sum_by_comparing(mask, steps, num_classes), expected_sums, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
