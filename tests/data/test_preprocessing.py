"""Normalisation compared with that of segmentation-models-pytorch, and padding of batches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch

from segray.config import ModelConfig
from segray.data.preprocessing import Preprocessing, pad_batch
from segray.errors import ConfigError

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
MEAN, STD = [0.5, 0.4, 0.3], [0.1, 0.2, 0.25]


@pytest.mark.parametrize(
    "settings",
    [
        {"mean": MEAN, "std": STD},
        {"mean": MEAN, "std": STD, "input_range": [0, 1], "input_space": "RGB"},
        {"mean": [104.0, 117.0, 123.0], "std": [1.0, 1.0, 1.0], "input_range": [0, 255]},
    ],
)
def test_normalisation_equals_that_of_smp(make_hub_snapshot: Callable[..., Path], settings: dict[str, Any]) -> None:
    (make_hub_snapshot("vgg16", "imagenet") / "config.json").write_text(json.dumps(settings))
    preprocessing = Preprocessing.of_encoder(ModelConfig(encoder_name="vgg16", encoder_weights="imagenet"))
    got = preprocessing.apply(torch.from_numpy(PIXELS))
    expected = smp.encoders.get_preprocessing_fn("vgg16", "imagenet")(PIXELS).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_weights_that_expect_bgr_are_rejected(make_hub_snapshot: Callable[..., Path]) -> None:
    settings = {"mean": MEAN, "std": STD, "input_space": "BGR"}
    (make_hub_snapshot("vgg16", "imagenet") / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="expects BGR images; choose other weights"):
        Preprocessing.of_encoder(ModelConfig(encoder_name="vgg16", encoder_weights="imagenet"))


def test_the_default_normalisation_is_that_of_imagenet() -> None:
    expected = smp.encoders.preprocess_input(PIXELS, **smp.encoders.get_preprocessing_params("tu-resnet18"))
    got = Preprocessing.of_encoder(ModelConfig()).apply(torch.from_numpy(PIXELS))
    np.testing.assert_allclose(got.numpy(), expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


def test_padding_is_appended_to_a_batch() -> None:
    padded = pad_batch(PIXELS, 5)
    assert padded.shape == (5, 5, 7, 3)
    np.testing.assert_array_equal(padded[:2], PIXELS)
    assert not padded[2:].any()
    assert pad_batch(PIXELS, 2) is PIXELS
