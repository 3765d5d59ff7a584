"""Prediction on the device: masks equal the CPU's at clear pixels, and bits do not depend on how images are batched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional

from segray.config import ModelConfig, SegmentSettings
from segray.models.build import build_model
from segray.models.bundle import load_bundle
from segray.models.prediction import predict_image
from segray.segmentation.profile import Stopwatch
from segray.segmentation.stages.compression import compress, decompress
from segray.segmentation.stages.decode import DecodedImage, pack_decoded
from segray.segmentation.stages.inference import Inference
from segray.segmentation.stages.ledger import PREDICT
from segray.segmentation.stages.predictor import FragmentPredictor
from tests.conftest import PET_CLASSES
from tests.gpu.bundles import assert_same_where_clear, compute_logits, save_square_bundle
from tests.gpu.conftest import needs_cuda
from tests.gpu.one_rank import IMAGE_SIDE, draw_images
from tests.segmentation.local_ledger import LocalLedger
from tests.segmented import make_pipeline_job

pytestmark = pytest.mark.gpu
# Sizes of the masks; the last two share a batch with padding.
SIZES = [(64, 64), (50, 77), (130, 40), (9, 200), (64, 64)]
BATCH_SIZE = 3


def make_settings(device: torch.device, **settings: Any) -> SegmentSettings:
    num_gpus = 1 if device.type == "cuda" else 0
    return SegmentSettings.model_validate({"batch_size": BATCH_SIZE, "num_gpus_per_predictor": num_gpus, **settings})


def open_inference(bundle: Path, settings: SegmentSettings) -> Inference:
    return Inference(load_bundle(str(bundle)), settings)


def predict(
    inference: Inference, images: Sequence[npt.NDArray[np.uint8]], sizes: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Return the columns of each image, for at most one batch of images."""
    watch = Stopwatch()
    return inference.finish(inference.launch(images, sizes, watch), [None] * len(images), watch)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_of_a_fragment_equal_those_of_the_cpu(precision: str, bundle: Path, device: torch.device) -> None:
    images = draw_images(len(SIZES), first_seed=100)
    truths = [np.full(size, number % 3, np.uint8) for number, size in enumerate(SIZES)]
    decoded = [
        DecodedImage({"uri": str(number), "height": size[0], "width": size[1]}, image, compress(truth))
        for number, (image, size, truth) in enumerate(zip(images, SIZES, truths, strict=True))
    ]
    decoded.insert(2, DecodedImage({"uri": "broken", "error_kind": "truncated", "error_message": "cut off"}))
    job = make_pipeline_job(bundle, make_settings(device, precision=precision))
    predictor = FragmentPredictor(job, LocalLedger(PREDICT))
    rows = predictor(pack_decoded(0, decoded, Stopwatch()))["rows"][0].as_py()
    assert [row["status"] for row in rows] == ["ok", "ok", "error", "ok", "ok", "ok"]
    usable = [row for row in rows if row["status"] == "ok"]
    logits_nchw = compute_logits(bundle, images)
    for row, logits_chw, size, truth in zip(usable, logits_nchw, SIZES, truths, strict=True):
        mask = np.frombuffer(decompress(row["mask"], size[0] * size[1]), np.uint8).reshape(size)
        assert_same_where_clear(mask, logits_chw, precision)
        assert row["pixel_count"] == np.bincount(mask.ravel(), minlength=3).tolist()
        assert row["tp_px"] == [int(((mask == index) & (truth == index)).sum()) for index in range(3)]
        expected = predict_image(logits_chw, size)
        assert row["entropy"] == pytest.approx(expected.entropy_sum.item() / mask.size, rel=0.1)


@pytest.mark.parametrize(
    ("compiled", "precision"),
    [(False, "fp32"), (False, "bf16"), (True, "fp32"), pytest.param(True, "bf16", marks=needs_cuda)],
)
def test_bits_do_not_depend_on_batch_position_or_neighbours(
    compiled: bool, precision: str, bundle: Path, device: torch.device
) -> None:
    inference = open_inference(bundle, make_settings(device, precision=precision, compile=compiled))
    images = draw_images(BATCH_SIZE, first_seed=200)
    assert_position_changes_no_bit(inference, images, [(IMAGE_SIDE, IMAGE_SIDE), (50, 77), (130, 40)])
    again = open_inference(bundle, make_settings(device, precision=precision, compile=compiled))
    sizes = [(IMAGE_SIDE, IMAGE_SIDE)] * BATCH_SIZE
    assert predict(again, images, sizes) == predict(inference, images, sizes)


def assert_position_changes_no_bit(
    inference: Inference, images: list[npt.NDArray[np.uint8]], sizes: list[tuple[int, int]]
) -> None:
    """Compare each image alone with the same image at every position of a whole batch of others.

    The scores are sums over all pixels, so they reveal a change in the last bit of a logit.
    """
    alone = [predict(inference, [image], [size])[0] for image, size in zip(images, sizes, strict=True)]
    assert [predict(inference, [image], [size])[0] for image, size in zip(images, sizes, strict=True)] == alone
    for shift in range(len(images)):
        order = [(shift + number) % len(images) for number in range(len(images))]
        rows = predict(inference, [images[number] for number in order], [sizes[number] for number in order])
        assert rows == [alone[number] for number in order], f"images moved by {shift}"


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("arch", "encoder_name", "batch_size"),
    [
        ("unet", "resnet34", 32),
        ("unet", "resnet34", 8),
        ("deeplabv3plus", "resnet50", 8),
        ("segformer", "mit_b0", 8),
        ("fcn8s", "vgg16", 8),
    ],
)
def test_batch_position_changes_no_bit_of_full_size_networks(
    arch: str, encoder_name: str, batch_size: int, precision: str, device: torch.device, tmp_path: Path
) -> None:
    side = 512
    torch.manual_seed(0)
    model = ModelConfig(arch=arch, encoder_name=encoder_name)
    weights = build_model(model, PET_CLASSES.num_classes).state_dict()
    save_square_bundle(tmp_path, weights, model, side)
    inference = open_inference(tmp_path, make_settings(device, precision=precision, batch_size=batch_size))
    assert_position_changes_no_bit(inference, draw_images(batch_size, side), [(side, side)] * batch_size)


@needs_cuda
def test_bits_do_not_change_while_the_next_batch_is_in_progress(bundle: Path, device: torch.device) -> None:
    inference = open_inference(bundle, make_settings(device, precision="bf16"))
    images = draw_images(60, first_seed=300)
    sizes = [(400 + number, 300) for number in range(len(images))]
    starts = range(0, len(images), BATCH_SIZE)
    parts = [slice(start, start + BATCH_SIZE) for start in starts]
    one_by_one = [row for part in parts for row in predict(inference, images[part], sizes[part])]
    watch = Stopwatch()
    launched = [inference.launch(images[part], sizes[part], watch) for part in parts]
    together = [row for batch in launched for row in inference.finish(batch, [None] * BATCH_SIZE, watch)]
    assert together == one_by_one


@pytest.mark.parametrize("size", [(12, 20), (45, 77), (7, 9), (1, 1), (100, 3)])
@pytest.mark.parametrize("num_classes", [3, 200])
def test_statistics_of_the_same_logits_equal_those_of_the_cpu(
    num_classes: int, size: tuple[int, int], device: torch.device
) -> None:
    logits = torch.randn(num_classes, 12, 20, generator=torch.Generator().manual_seed(0)) * 3
    expected = predict_image(logits, size)
    predicted = predict_image(logits.to(device), size)
    assert predicted.mask.device.type == device.type
    resized = functional.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    highest = resized.topk(2, dim=0).values
    is_clear = highest[0] - highest[1] > 1e-4
    assert torch.equal(predicted.mask.cpu()[is_clear], expected.mask[is_clear])
    assert (predicted.pixel_count.cpu() - expected.pixel_count).abs().sum() <= 2 * (~is_clear).sum()
    torch.testing.assert_close(predicted.entropy_sum.cpu(), expected.entropy_sum, rtol=1e-5, atol=1e-5)
    if is_clear.all():
        torch.testing.assert_close(predicted.confidence_sum.cpu(), expected.confidence_sum, rtol=1e-5, atol=1e-5)
