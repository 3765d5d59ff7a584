"""Settings: what is read, and the one line that a mistake gets."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from segray.config import (
    LOSS_TERMS,
    AugmentationSettings,
    LossSettings,
    ModelConfig,
    SegmentFile,
    SegmentSettings,
    TrainConfig,
    TrainSettings,
    find_differences,
    load_config,
    require_absolute,
)
from segray.errors import ConfigError

VALID: dict[str, Any] = {
    "data": {
        "train": {"images": "i", "masks": "m"},
        "val": {"fraction": 0.1},
        "class_names": ["a", "b"],
    },
    "image_size": [64, 96],
    "output": "out",
}


def load(tmp_path: Path, values: Any, *overrides: str) -> TrainConfig:
    path = tmp_path / "config.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return load_config(TrainConfig, str(path), overrides)


def test_defaults_and_overrides(tmp_path: Path) -> None:
    config = load(tmp_path, VALID, "train.num_epochs=3", "model.encoder_name=vgg16", "data.class_values=[5, 9]")
    assert config.train.num_epochs == 3
    assert config.model.encoder_name == "vgg16"
    assert config.data.class_values == (5, 9)
    assert load(tmp_path, VALID).data.class_values == (0, 1)
    assert load(tmp_path, VALID, "train.learning_rate=1e-4").train.learning_rate == 1e-4  # YAML 1.1 reads a string


def test_oxford_layout_brings_its_classes(tmp_path: Path) -> None:
    values = {**VALID, "data": {"layout": {"oxford_iiit_pet": {"root": "r"}}}}
    data = load(tmp_path, values).data
    assert data.class_names == ("pet", "background", "border")
    assert data.class_values == (1, 2, 3)


def test_segment_reads_a_training_configuration_and_a_segment_section_alone(tmp_path: Path) -> None:
    path = tmp_path / "segment.yaml"
    path.write_text(yaml.safe_dump({**VALID, "segment": {"batch_size": 3}}))
    assert load_config(SegmentFile, str(path)).segment.batch_size == 3
    path.write_text("segment: {fragment_size: 5}")
    assert load_config(SegmentFile, str(path)).segment.fragment_size == 5
    assert load_config(SegmentFile, None, ["segment.fragment_size=9"]).segment.fragment_size == 9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.num_epoch=3"], r"train\.num_epoch: unknown setting; did you mean train\.num_epochs\?"),
        (["train.num_epochs=zero"], r"train\.num_epochs: .*got 'zero'"),
        (["train.num_epochs=0"], r"train\.num_epochs: .*greater than or equal to 1"),
        (["train.global_batch_size=7", "train.num_train_workers=2"], r"7 cannot be shared evenly .*choose a multiple"),
        (["data.val=null"], r"val: expected"),
        (["data.train={fraction: 0.5}"], r"train: expected"),
        (["data.train={images: a}"], r"data\.train: expected images and masks.*got images"),
        (["data.class_names=[a]"], r"class_names: expected 2 to"),
        (["data.class_names=[a, a]"], r"distinct names"),
        (["data.class_values=[0]"], r"one value for each of the 2 class_names, got 1"),
        (["data.ignore_values=[1]"], r"distinct values"),
        (["data.layout=cityscapes"], r"data\.layout: .*'folders'.*got 'cityscapes'"),
        (["image_size=[64]"], r"image_size"),
        (["segment.mask_encoding=jpeg"], r"segment\.mask_encoding: .*'raw' or 'png'"),
        (["loss={ce: 0, dice: 0}"], r"loss: expected a weight above 0 for one of ce, dice, .*ohem$"),
        (["loss.dice=-1"], r"loss\.dice: .*greater than or equal to 0, got -1"),
        (["loss.dise=1"], r"loss\.dise: unknown setting; did you mean loss\.dice\?"),
        (["loss.class_weights=[1, 2, 3]"], r"loss\.class_weights: expected one for each of the 2 class_names, got 3"),
        (["loss.class_weights=[0, 0]"], r"loss: class_weights: expected one above 0 at least, got \[0\.0, 0\.0\]"),
        (["loss.class_weights=[-1, 1]"], r"loss\.class_weights\.0: .*greater than or equal to 0, got -1"),
        (["loss.class_weights=even"], r"loss\.class_weights: input should be 'auto', got 'even'"),
        (
            ["loss={tversky: 1, tversky_alpha: 0, tversky_beta: 0}"],
            r"loss: tversky_alpha, tversky_beta: expected one above",
        ),
        (["loss.dice=.inf"], r"loss\.dice: .*finite number, got inf"),
        (["augmentation=wild"], r"augmentation\.preset: .*'none', 'light' or 'strong', got 'wild'"),
        (["augmentation={preset: [light]}"], r"augmentation\.preset: .*'none', 'light' or 'strong', got \['light'\]"),
        (["augmentation.scale=[2, 1]"], r"augmentation: scale: expected \[lowest, highest\], got \[2\.0, 1\.0\]"),
        (["augmentation.aspect=[1.5, 1]"], r"augmentation: aspect: expected \[lowest, highest\]"),
        (["augmentation.scale=[0, 1]"], r"augmentation\.scale\.0: .*greater than 0, got 0"),
        (["augmentation.blur=1.5"], r"augmentation\.blur: .*less than or equal to 1, got 1\.5"),
        (["augmentation.crop_size=[64]"], r"augmentation\.crop_size\.1: this setting is required"),
        (
            ["augmentation=strong", "augmentation.blur=0"],
            r"--set augmentation\.blur=0: augmentation is 'strong', no section to set blur in; set it as a whole",
        ),
        (["model={arch: classic_unet, widths: [64]}"], r"model\.widths: .*at least 2 items"),
        (["nonsense"], r"--set nonsense: expected KEY=VALUE"),
        (["data.train={"], r"--set data\.train=\{: the value is not YAML"),
    ],
)
def test_a_mistake_names_the_setting(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, VALID, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["- a list", "a: [", "\tb: 1"])
def test_a_file_that_is_not_a_configuration_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: expected"):
        load(tmp_path, content)


def test_required_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"image_size: this setting is required; output: this setting is required"):
        load(tmp_path, {"data": VALID["data"]})


def test_settings_that_only_change_the_speed_do_not_bind_a_run(tmp_path: Path) -> None:
    slow, fast = load(tmp_path, VALID), load(tmp_path, VALID, "train.num_decode_threads=9", "segment.num_predictors=7")
    assert slow.of_weights == fast.of_weights
    assert slow.segment.of_rows == fast.segment.of_rows
    other = load(tmp_path, VALID, "train.seed=1", "segment.batch_size=3")
    assert other.of_weights != slow.of_weights
    assert other.segment.of_rows != slow.segment.of_rows
    # a setting that is added binds a run, until somebody decides here that it does not
    speed = {"num_fetch_threads", "num_predictors", "num_gpus_per_predictor"}
    listing = {"extensions", "recursive", "split", "relist"}  # bound through the plan that they make
    outcome = {"max_error_fraction", "num_report_images", "retry_errors"}
    assert SegmentSettings.model_fields.keys() - slow.segment.of_rows.keys() == speed | listing | outcome
    speed = {"num_decode_threads", "cache_bytes", "cache_disk_bytes"}
    faults = {"max_failures", "min_train_workers", "stall_timeout_s", "checkpoint_every_steps", "num_best_checkpoints"}
    assert TrainSettings.model_fields.keys() - slow.of_weights["train"].keys() == speed | faults


@pytest.mark.parametrize(
    ("loss", "terms"),
    [
        ({}, {"ce": 1.0}),
        ({"label_smoothing": 0.1}, {"ce": 1.0}),
        ({"ce": 1.0, "dice": 1.0}, {"ce": 1.0, "dice": 1.0}),
        ({"dice": 0.5}, {"dice": 0.5}),
        ({"ohem": 1, "ce": 0}, {"ohem": 1.0}),
        (dict.fromkeys(LOSS_TERMS, 2), dict.fromkeys(LOSS_TERMS, 2.0)),
    ],
)
def test_the_losses_are_those_that_are_named_or_cross_entropy(
    tmp_path: Path, loss: dict[str, float], terms: dict[str, float]
) -> None:
    settings = load(tmp_path, {**VALID, "loss": loss}).loss
    assert settings.terms == terms
    assert LossSettings.model_validate(settings.model_dump(mode="json")) == settings
    assert load(tmp_path, VALID).loss == LossSettings(ce=1.0)


def test_class_weights_are_auto_or_one_for_each_class(tmp_path: Path) -> None:
    assert load(tmp_path, VALID, "loss.class_weights=auto").loss.class_weights == "auto"
    assert load(tmp_path, VALID, "loss.class_weights=[0, 2.5]").loss.class_weights == (0.0, 2.5)
    assert load(tmp_path, VALID).loss.class_weights is None


def test_a_preset_of_augmentation_is_a_word_or_where_a_section_starts_from(tmp_path: Path) -> None:
    def load_augmentation(value: object) -> AugmentationSettings:
        return load(tmp_path, {**VALID, "augmentation": value}).augmentation

    none, light, strong = (load_augmentation(name) for name in ("none", "light", "strong"))
    assert load(tmp_path, VALID).augmentation == light
    assert load_augmentation({}) == light
    assert load_augmentation({"preset": "strong"}) == strong
    changes = {name for name in AugmentationSettings.model_fields if name not in ("preset", "crop_size")}
    assert {name for name in changes if getattr(none, name) not in (0, (1, 1))} == set()
    assert {name for name in changes if getattr(light, name) != getattr(none, name)} == {
        "horizontal_flip",
        "scale",
        "colour_jitter",
    }
    assert {name for name in changes if getattr(strong, name) == getattr(none, name)} == {"vertical_flip"}
    assert load_augmentation({"preset": "strong", "blur": 0, "crop_size": [64, 96]}) == strong.model_copy(
        update={"blur": 0.0, "crop_size": (64, 96)}
    )
    assert AugmentationSettings.model_validate(strong.model_dump(mode="json")) == strong
    assert load(tmp_path, VALID, "augmentation.vertical_flip=0.5").augmentation == light.model_copy(
        update={"vertical_flip": 0.5}
    )


def test_every_difference_of_two_runs_is_named() -> None:
    theirs = {"model": {"arch": "unet", "encoder_name": "resnet18"}, "seed": 0, "old": 1}
    mine = {"model": {"arch": "fpn", "encoder_name": "resnet18"}, "seed": 3}
    assert find_differences(theirs, mine, "train") == [
        "train.model.arch: there 'unet', here 'fpn'",
        "train.old: there 1, here None",
        "train.seed: there 0, here 3",
    ]
    assert find_differences(theirs, theirs) == []


def test_jobs_refuse_relative_paths(tmp_path: Path) -> None:
    require_absolute({"a": "s3://bucket/run/", "b": "/data", "c": "file:///data", "d": None})
    config = load(tmp_path, VALID, "output=/out")
    with pytest.raises(ConfigError, match=r"data\.train\.images: i is relative"):
        require_absolute(config.uris)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("jobs/*.yaml")), ids=lambda path: path.name)
def test_every_configuration_of_jobs_is_valid(path: Path) -> None:
    kind = SegmentFile if path.name == "segment.yaml" else TrainConfig
    load_config(kind, str(path))


def test_the_textbook_task_is_vgg16_fcn8s_at_224_with_a_frozen_encoder() -> None:
    config = load_config(TrainConfig, str(Path(__file__).parents[1] / "jobs" / "pet_fcn8s.yaml"))
    assert config.model == ModelConfig(
        arch="fcn8s", encoder_name="vgg16", encoder_weights="imagenet", freeze_encoder=True
    )
    assert config.image_size == (224, 224)
    assert config.data.class_names == ("pet", "background", "border")


def test_a_preset_stands_for_all_settings_of_its_section(tmp_path: Path) -> None:
    whole = load(tmp_path, VALID, "augmentation=light").model_dump(mode="json")
    config = load(tmp_path, whole, "augmentation.preset=strong", "augmentation.blur=0")
    assert config.augmentation == AugmentationSettings.model_validate({"preset": "strong", "blur": 0})
