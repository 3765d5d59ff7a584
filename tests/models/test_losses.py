"""Losses compared with torch, segmentation-models-pytorch and plain loops; ignored pixels; parts of a batch."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import segmentation_models_pytorch as smp
import torch
from torch.nn import functional

from segray.config import LOSS_TERMS, LossSettings
from segray.models.losses import SegmentationLoss, compute_median_frequency_weights

NUM_CLASSES, IGNORE = 4, 255
CLASS_WEIGHTS = np.array([0.5, 2.0, 1.0, 0.25])
# Weights of false positives and of false negatives.
OVERLAPS = {"dice": (0.5, 0.5), "jaccard": (1.0, 1.0), "tversky": (0.2, 0.9)}
ALL_TOGETHER: dict[str, object] = {name: 1.0 + number for number, name in enumerate(LOSS_TERMS)}
EACH_AND_ALL = [*({name: 1.0} for name in LOSS_TERMS), ALL_TOGETHER]


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and truth of three images with 4, 3 and 2 classes, in which 0, 30 and 60% of pixels are ignored."""
    rng = np.random.default_rng(seed)
    truth = np.stack([rng.integers(0, high, (9, 11)) for high in (NUM_CLASSES, NUM_CLASSES - 1, 2)])
    truth[rng.random(truth.shape) < np.array([0.0, 0.3, 0.6])[:, None, None]] = IGNORE
    logits = torch.from_numpy(rng.normal(0, 2, (3, NUM_CLASSES, 9, 11))).float()
    return logits.requires_grad_(), torch.from_numpy(truth)


def build(settings: dict[str, object], class_weights: npt.NDArray[np.float64] | None = None) -> SegmentationLoss:
    return SegmentationLoss(LossSettings.model_validate(settings), IGNORE, class_weights)


def compute(loss: SegmentationLoss, logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return loss.combine(loss.sum(logits, truth), loss.count(truth))


def compute_gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logits)[0]


def iterate_scored(
    logits: torch.Tensor, truth: torch.Tensor
) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
    """Return softmax (pixels, C) and classes (pixels,) of the scored pixels of each image."""
    exponential = np.exp(logits.detach().double().numpy())
    probability = np.moveaxis(exponential / exponential.sum(1, keepdims=True), 1, 3)
    return [
        (image[classes != IGNORE], classes[classes != IGNORE])
        for image, classes in zip(probability, truth.numpy(), strict=True)
    ]


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cross_entropy_and_its_gradient_equal_those_of_torch(
    label_smoothing: float, class_weights: npt.NDArray[np.float64] | None
) -> None:
    logits, truth = draw()
    got = compute(build({"label_smoothing": label_smoothing}, class_weights), logits, truth)
    weight = None if class_weights is None else torch.from_numpy(class_weights).float()
    expected = functional.cross_entropy(
        logits, truth, weight=weight, ignore_index=IGNORE, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compute_gradient(got, logits), compute_gradient(expected, logits))


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.5])
def test_focal_loss_equals_its_formula(gamma: float, class_weights: npt.NDArray[np.float64] | None) -> None:
    logits, truth = draw()
    total = total_weight = 0.0
    for probability, classes in iterate_scored(logits, truth):
        for row, index in zip(probability, classes, strict=True):
            weight = 1.0 if class_weights is None else class_weights[index]
            total -= weight * (1 - row[index]) ** gamma * math.log(row[index])
            total_weight += weight
    got = compute(build({"focal": 1.0, "focal_gamma": gamma}, class_weights), logits, truth)
    assert got.item() == pytest.approx(total / total_weight, rel=1e-5)


@pytest.mark.parametrize("term", OVERLAPS)
def test_overlap_losses_are_means_over_images_and_their_present_classes(term: str) -> None:
    logits, truth = draw()
    alpha, beta = OVERLAPS[term]
    image_losses = []
    for probability, classes in iterate_scored(logits, truth):
        class_losses = []
        for index in np.unique(classes):
            class_probability = probability[:, index]
            tp, fp = class_probability[classes == index].sum(), class_probability[classes != index].sum()
            fn = (1 - class_probability[classes == index]).sum()
            class_losses.append(1 - tp / (tp + alpha * fp + beta * fn))
        image_losses.append(np.mean(class_losses))
    got = compute(build({term: 1.0, "tversky_alpha": 0.2, "tversky_beta": 0.9}, CLASS_WEIGHTS), logits, truth)
    assert got.item() == pytest.approx(np.mean(image_losses), rel=1e-5)


def test_lovasz_loss_is_the_lovasz_extension_of_the_jaccard_loss() -> None:
    logits, truth = draw()
    image_losses = []
    for probability, classes in iterate_scored(logits, truth):
        class_losses = []
        for index in np.unique(classes):
            is_class = classes == index
            error = np.abs(is_class - probability[:, index])
            worst_first, extension, before = np.argsort(-error), 0.0, 0.0
            for number in range(1, len(error) + 1):
                wrong = np.zeros(len(error), bool)
                wrong[worst_first[:number]] = True
                loss = 1 - (is_class & ~wrong).sum() / (is_class | wrong).sum()  # The Jaccard loss if these are wrong.
                extension += error[worst_first[number - 1]] * (loss - before)
                before = loss
            class_losses.append(extension)
        image_losses.append(np.mean(class_losses))
    assert compute(build({"lovasz": 1.0}), logits, truth).item() == pytest.approx(np.mean(image_losses), rel=1e-5)


def test_lovasz_loss_keeps_nothing_of_each_class_and_pixel_for_the_backward_pass() -> None:
    logits = torch.randn(2, 40, 32, 32, requires_grad=True)
    truth = torch.randint(0, 40, (2, 32, 32))
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = compute(build({"lovasz": 1.0}), logits, truth)
    # The logits themselves, and the truth. Without recomputation it is several times as much.
    assert sum(saved.values()) < 1.1 * logits.nbytes
    assert compute_gradient(loss, logits).any()


@pytest.mark.parametrize(
    ("term", "build_reference"),
    [
        ("dice", smp.losses.DiceLoss),
        ("jaccard", smp.losses.JaccardLoss),
        ("tversky", lambda *args, **kwargs: smp.losses.TverskyLoss(*args, **kwargs, alpha=0.2, beta=0.9)),
        ("lovasz", smp.losses.LovaszLoss),
    ],
)
def test_loss_and_gradient_of_one_image_with_all_classes_equal_those_of_smp(
    term: str, build_reference: Callable[..., torch.nn.Module]
) -> None:
    logits, truth = (tensor[:1] for tensor in draw())
    truth[0, :, 0] = IGNORE
    assert np.unique(truth).tolist() == [*range(NUM_CLASSES), IGNORE]
    got = compute(build({term: 1.0, "tversky_alpha": 0.2, "tversky_beta": 0.9}), logits, truth)
    expected = build_reference("multiclass", ignore_index=IGNORE)(logits, truth)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compute_gradient(got, logits), compute_gradient(expected, logits))


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize(("threshold", "min_kept"), [(0.7, 0.05), (0.01, 0.3), (0.3, 1.0)])
def test_hard_example_loss_equals_that_of_a_plain_loop(
    threshold: float, min_kept: float, class_weights: npt.NDArray[np.float64] | None
) -> None:
    logits, truth = draw()
    image_losses = []
    for probability, classes in iterate_scored(logits, truth):
        true_probability = probability[np.arange(len(classes)), classes]
        hardest = set(np.argsort(true_probability)[: math.ceil(min_kept * len(classes))].tolist())
        hard = [number for number, value in enumerate(true_probability) if value < threshold or number in hardest]
        weights = np.ones(NUM_CLASSES) if class_weights is None else class_weights
        image_losses.append(
            np.mean([-weights[classes[number]] * math.log(true_probability[number]) for number in hard])
        )
    settings: dict[str, object] = {"ohem": 1.0, "ohem_threshold": threshold, "ohem_min_kept": min_kept}
    assert compute(build(settings, class_weights), logits, truth).item() == pytest.approx(
        np.mean(image_losses), rel=1e-5
    )


def test_kept_pixels_count_even_with_loss_0_and_ignored_ones_do_not() -> None:
    logits, truth = (tensor[2:] for tensor in draw())
    right = torch.where(torch.arange(NUM_CLASSES)[:, None, None] == truth[:, None], 1e3, -1e3)
    half_right = torch.where(torch.arange(11) < 6, right, logits)
    expected = functional.cross_entropy(half_right, truth, ignore_index=IGNORE)
    torch.testing.assert_close(compute(build({"ohem": 1.0, "ohem_min_kept": 1.0}), half_right, truth), expected)


def test_easy_pixels_have_no_gradient() -> None:
    logits, truth = draw()
    loss = compute(build({"ohem": 1.0, "ohem_threshold": 0.01, "ohem_min_kept": 0.1}), logits, truth)
    learned = compute_gradient(loss, logits).any(1).sum((1, 2))
    num_scored = (truth != IGNORE).sum((1, 2))
    assert (learned >= (num_scored * 0.1)).all()
    assert (learned < num_scored * 0.5).all()


@pytest.mark.parametrize("settings", EACH_AND_ALL)
def test_ignored_pixels_do_not_affect_loss_or_gradient(settings: dict[str, object]) -> None:
    loss, (logits, truth) = build(settings, CLASS_WEIGHTS), draw()
    before = compute(loss, logits, truth)
    changed = torch.where((truth == IGNORE)[:, None], 5 - 3 * logits.detach(), logits.detach()).requires_grad_()
    after = compute(loss, changed, truth)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    gradient = compute_gradient(after, changed)
    torch.testing.assert_close(gradient, compute_gradient(before, logits), rtol=1e-5, atol=1e-9)
    assert not gradient.movedim(1, 3)[truth == IGNORE].any()


@pytest.mark.parametrize("settings", EACH_AND_ALL)
def test_a_batch_in_which_every_pixel_is_ignored_adds_0(settings: dict[str, object]) -> None:
    loss, (logits, truth) = build(settings, CLASS_WEIGHTS), draw()
    nothing = compute(loss, logits, torch.full_like(truth, IGNORE))
    assert nothing.item() == 0
    assert torch.equal(compute_gradient(nothing, logits), torch.zeros_like(logits))
    last_ignored = truth.clone()
    last_ignored[2] = IGNORE
    mixed = compute(loss, logits, last_ignored)
    torch.testing.assert_close(mixed, compute(loss, logits[:2], truth[:2]), rtol=1e-6, atol=0)
    gradient = compute_gradient(mixed, logits)
    assert gradient[:2].any()
    assert torch.equal(gradient[2], torch.zeros_like(gradient[2]))


def test_classes_with_weight_0_give_a_loss_of_0() -> None:
    logits, truth = draw()
    loss = compute(build({"ce": 1.0, "focal": 1.0, "ohem": 1.0}, np.array([0.0, 0.0, 1.0, 1.0])), logits, truth % 2)
    assert loss.item() == 0
    assert not compute_gradient(loss, logits).any()


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("settings", EACH_AND_ALL)
def test_parts_of_a_batch_sum_to_the_whole(
    settings: dict[str, object], class_weights: npt.NDArray[np.float64] | None
) -> None:
    loss, (logits, truth) = build(settings, class_weights), draw()
    whole = compute(loss, logits, truth)
    parts = [slice(0, 1), slice(1, 3)]
    counts = torch.stack([loss.count(truth[part]) for part in parts]).sum(0)
    added = torch.stack([loss.combine(loss.sum(logits[part], truth[part]), counts) for part in parts]).sum()
    torch.testing.assert_close(added, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(compute_gradient(added, logits), compute_gradient(whole, logits), rtol=1e-5, atol=1e-9)


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    logits, truth = draw()
    settings: dict[str, object] = {"lovasz": 0.25, "ce": 1.5, "dice": 3.0, "label_smoothing": 0.1}
    lovasz, ce, dice = (
        compute(build({name: 1.0, "label_smoothing": 0.1}), logits, truth) for name in ("lovasz", "ce", "dice")
    )
    expected = 0.25 * lovasz + 1.5 * ce + 3.0 * dice
    torch.testing.assert_close(compute(build(settings), logits, truth), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits, truth = draw()
    half, loss = logits.to(dtype), build(ALL_TOGETHER, CLASS_WEIGHTS)
    assert loss.sum(half, truth).dtype == torch.float32
    assert torch.equal(loss.sum(half, truth), loss.sum(half.float(), truth))


@pytest.mark.parametrize("settings", [*EACH_AND_ALL, {"focal": 1.0, "focal_gamma": 1.5}])
def test_extreme_logits_have_a_finite_gradient(settings: dict[str, object]) -> None:
    loss, (logits, truth) = build(settings, CLASS_WEIGHTS), draw()
    extreme = (logits.detach().sign() * 1e4).requires_grad_()
    right = torch.where(torch.arange(NUM_CLASSES)[:, None, None] == truth[:, None], 1e4, -1e4).requires_grad_()
    for certain in (extreme, right, right.detach().neg().requires_grad_()):
        value = compute(loss, certain, truth)
        assert torch.isfinite(value)
        assert torch.isfinite(compute_gradient(value, certain)).all()
    assert compute(loss, right, truth).item() == pytest.approx(0, abs=1e-6)


def test_median_frequency_weights_equal_those_computed_by_hand() -> None:
    # Three images of 100 labelled pixels: class 0 is in all of them, 1 in two, 2 in one, 3 in none.
    pixel_count, image_px = np.array([240, 50, 10, 0]), np.array([300, 200, 100, 0])
    # The frequencies are 0.8, 0.25 and 0.1, and their median is 0.25.
    expected = [0.25 / 0.8, 1, 2.5, 1]
    np.testing.assert_allclose(compute_median_frequency_weights(pixel_count, image_px), expected)
