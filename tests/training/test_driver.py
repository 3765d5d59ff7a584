"""The checks of a configuration before anything is read or started."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from segray.config import TrainConfig
from segray.errors import ConfigError
from segray.training.driver import check_network

MakeConfig = Callable[..., TrainConfig]


def change(config: TrainConfig, **settings: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(mode="json"), **settings})


def test_segformers_own_encoders_pass(make_train_config: MakeConfig, tmp_path: Path) -> None:
    model = {"arch": "segformer", "encoder_name": "mit_b0"}
    check_network(change(make_train_config(tmp_path), model=model))


def test_the_network_is_run_at_the_size_of_images_and_crops(make_train_config: MakeConfig, tmp_path: Path) -> None:
    config = change(make_train_config(tmp_path), model={"arch": "pan"})  # It needs at least 128 pixels.
    with pytest.raises(ConfigError, match=r"^image_size: .*64x64"):
        check_network(config)
    config = change(config, image_size=[128, 128])
    check_network(config)
    with pytest.raises(ConfigError, match=r"^augmentation\.crop_size: .*96x96"):
        check_network(change(config, augmentation={"preset": "light", "crop_size": [96, 96]}))


def test_a_frozen_encoder_needs_weights(make_train_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.freeze_encoder: true needs pretrained weights"):
        check_network(change(make_train_config(tmp_path), model={"freeze_encoder": True}))
