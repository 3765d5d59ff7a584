"""Settings: defaults, overrides, and the one-line error message of each mistake."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from segray.config import (
    LOSS_TERMS,
    AugmentationSettings,
    ExportFormat,
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
from segray.config.section import Section
from segray.errors import ConfigError

ROOT = Path(__file__).parents[2]
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
    # YAML 1.1 reads 1e-4 as a string.
    assert load(tmp_path, VALID, "train.learning_rate=1e-4").train.learning_rate == 1e-4


def test_the_oxford_layout_defines_its_classes(tmp_path: Path) -> None:
    values = {**VALID, "data": {"layout": {"oxford_iiit_pet": {"root": "r"}}}}
    data = load(tmp_path, values).data
    assert data.class_names == ("pet", "background", "border")
    assert data.class_values == (1, 2, 3)


def test_segment_accepts_a_training_configuration_or_only_a_segment_section(tmp_path: Path) -> None:
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
        (
            ["train.global_batch_size=7", "train.num_train_workers=2"],
            r"global_batch_size: expected a multiple of 2.*got 7$",
        ),
        (["data.val=null"], r"val: expected"),
        (["data.train={fraction: 0.5}"], r"train: expected"),
        (["train.folds=1"], r"^[^;]*train\.folds: expected groups or a number from 2 to 100, got 1$"),
        (["train.folds=group"], r"^[^;]*train\.folds: expected groups or a number from 2 to 100, got 'group'$"),
        (["segment.fragment_size=0"], r"segment\.fragment_size: .*greater than or equal to 1, got 0"),
        (["train.folds=groups"], r"train\.folds: groups needs data\.val\.group_by.*got null"),
        (["data.val={group_by: a}"], r"data\.val: .*got group_by alone: .*add fraction, which train\.folds does not"),
        (["train.folds=5", "train.early_stopping_epochs=3"], r"early_stopping_epochs: expected null with folds.*got 3"),
        (["data.train.group_by=a"], r"train\.group_by: expected only in val"),
        (["data.val.group_by='a{99999999999}'"], r"group_by: expected a regular expression, got 'a\{9+\}'"),
        (["data.val.group_by='(a'"], r"group_by: expected a regular expression, got '\(a': missing \)"),
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
        (
            ["loss.class_weights=[1, 2, 3]"],
            r"loss\.class_weights: expected one weight for each of the 2 class_names, got 3",
        ),
        (["loss.class_weights=[0, 0]"], r"loss: class_weights: expected at least one above 0, got \[0\.0, 0\.0\]"),
        (["loss.class_weights=[-1, 1]"], r"loss\.class_weights\.0: .*greater than or equal to 0, got -1"),
        (["loss.class_weights=even"], r"loss\.class_weights: input should be 'auto', got 'even'"),
        (
            ["loss={tversky: 1, tversky_alpha: 0, tversky_beta: 0}"],
            r"loss: tversky_alpha, tversky_beta: expected at least one above 0, got 0 and 0",
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
            r"--set augmentation\.blur=0: augmentation is 'strong', not a section that blur can be set in; "
            r"replace augmentation as a whole",
        ),
        (["model={arch: classic_unet, widths: [64]}"], r"model\.widths: .*at least 2 items"),
        (["nonsense"], r"--set nonsense: expected KEY=VALUE"),
        (["data.train={"], r"--set data\.train=\{: the value is not valid YAML"),
    ],
)
def test_an_invalid_setting_is_named_in_the_error(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, VALID, *overrides)
    assert "\n" not in str(caught.value)


def test_a_configuration_can_be_a_mapping_that_is_not_changed(tmp_path: Path) -> None:
    values = {**VALID, "train": {"num_epochs": 3}}
    config = load_config(TrainConfig, values, ["train.seed=5"])
    assert (config.train.num_epochs, config.train.seed) == (3, 5)
    assert values["train"] == {"num_epochs": 3}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert load_config(TrainConfig, path, ["train.seed=5"]) == config
    with pytest.raises(ConfigError, match=r"^settings: train\.num_epoch: unknown setting"):
        load_config(TrainConfig, {**VALID, "train": {"num_epoch": 3}})


def test_an_export_format_is_given_by_name() -> None:
    assert ExportFormat.parse("onnx") is ExportFormat.parse(ExportFormat.ONNX) is ExportFormat.ONNX
    with pytest.raises(ConfigError, match="export format: expected one of onnx, torch_export, got 'tflite'"):
        ExportFormat.parse("tflite")


@pytest.mark.parametrize("content", ["- a list", "a: [", "\tb: 1"])
def test_an_invalid_configuration_file_is_named_in_the_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: expected"):
        load(tmp_path, content)


def test_missing_required_settings_are_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"image_size: this setting is required; output: this setting is required"):
        load(tmp_path, {"data": VALID["data"]})


def test_settings_that_affect_only_speed_or_faults_may_differ_between_reruns(tmp_path: Path) -> None:
    slow, fast = load(tmp_path, VALID), load(tmp_path, VALID, "train.num_decode_threads=9", "segment.num_predictors=7")
    assert slow.weight_settings == fast.weight_settings
    other = load(tmp_path, VALID, "train.seed=1")
    assert other.weight_settings != slow.weight_settings
    for kind in ("row_settings", "bit_settings", "limits"):
        assert getattr(slow.segment, kind) == getattr(fast.segment, kind)
    # Each setting of a run belongs to one kind. Only the first three kinds are recorded and compared.
    segment = slow.segment
    recorded = [*segment.row_settings, *segment.bit_settings, *segment.limits]
    cut = ["fragment_size", "fragment_bytes", "fragment_px"]  # An existing plan keeps its fragments.
    pace = ["num_fetch_threads", "num_predictors", "num_gpus_per_predictor"]  # whether there are GPUs is the "device"
    listing = ["extensions", "recursive", "split", "relist"]  # These are covered by the sha256 of the plan.
    outcome = ["max_error_fraction", "stop_error_fraction", "num_report_images", "retry_errors", "allow_mixed"]
    assert sorted([*recorded, *cut, *pace, *listing, *outcome]) == sorted([*SegmentSettings.model_fields, "device"])
    speed = {"num_decode_threads", "num_prefetch_batches", "cache_bytes", "cache_disk_bytes", "log_every_steps"}
    faults = {"max_failures", "min_train_workers", "stall_timeout_s", "checkpoint_every_steps", "num_best_checkpoints"}
    checks = {"recheck_labels", "folds"}
    length = {"time_budget_min"}  # The driver replaces it by num_epochs.
    assert TrainSettings.model_fields.keys() - slow.weight_settings["train"].keys() == speed | faults | checks | length


def test_threads_change_the_bits_of_predictors_on_cpus_only() -> None:
    for num_gpus, expected in ((0, 4), (1, 1)):
        settings = SegmentSettings(num_threads_per_predictor=4, num_gpus_per_predictor=num_gpus)
        assert settings.bit_settings["num_threads_per_predictor"] == expected


def test_only_what_a_checkpoint_depends_on_binds_a_training_run(tmp_path: Path) -> None:
    config = load(tmp_path, VALID)
    optimizer = {"optimizer", "learning_rate", "encoder_lr_factor", "layer_decay", "momentum", "weight_decay"}
    assert config.bound_settings.keys() == {"data", "model", "image_size", "loss", "train"}
    assert config.bound_settings["train"].keys() == {"seed", "sampling", "global_batch_size"} | optimizer
    # Every setting that can change the weights or the scores is either bound or recorded.
    bound, recorded = config.bound_settings["train"].keys(), config.phase_settings["train"].keys()
    assert not bound & recorded
    assert bound | recorded == config.weight_settings["train"].keys()
    assert "num_epochs" in recorded
    assert "augmentation" in config.phase_settings


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
def test_loss_terms_are_those_given_or_cross_entropy_by_default(
    tmp_path: Path, loss: dict[str, float], terms: dict[str, float]
) -> None:
    settings = load(tmp_path, {**VALID, "loss": loss}).loss
    assert settings.terms == terms
    assert LossSettings.model_validate(settings.model_dump(mode="json")) == settings
    assert load(tmp_path, VALID).loss == LossSettings(ce=1.0)


def test_class_weights_are_auto_or_one_weight_per_class(tmp_path: Path) -> None:
    assert load(tmp_path, VALID, "loss.class_weights=auto").loss.class_weights == "auto"
    assert load(tmp_path, VALID, "loss.class_weights=[0, 2.5]").loss.class_weights == (0.0, 2.5)
    assert load(tmp_path, VALID).loss.class_weights is None


def test_an_augmentation_preset_is_given_alone_or_with_overrides(tmp_path: Path) -> None:
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


def test_find_differences_names_every_difference() -> None:
    theirs = {"model": {"arch": "unet", "encoder_name": "resnet18"}, "seed": 0, "old": 1}
    mine = {"model": {"arch": "fpn", "encoder_name": "resnet18"}, "seed": 3}
    assert find_differences(theirs, mine, "train") == [
        "train.model.arch: the run has 'unet', got 'fpn'",
        "train.old: the run has 1, got None",
        "train.seed: the run has 0, got 3",
    ]
    assert find_differences(theirs, theirs) == []


def test_require_absolute_rejects_relative_paths(tmp_path: Path) -> None:
    require_absolute({"a": "s3://bucket/run/", "b": "/data", "c": "file:///data", "d": None})
    config = load(tmp_path, VALID, "output=/out")
    with pytest.raises(ConfigError, match=r"data\.train\.images: i is a relative path"):
        require_absolute(config.uris)


@pytest.mark.parametrize("path", sorted(ROOT.glob("jobs/*.yaml")), ids=lambda path: path.name)
def test_every_configuration_in_jobs_is_valid(path: Path) -> None:
    kind = SegmentFile if path.name == "segment.yaml" else TrainConfig
    load_config(kind, str(path))


def test_the_configuration_of_segment_jobs_lists_every_setting_with_its_default() -> None:
    listed = yaml.safe_load((ROOT / "jobs" / "segment.yaml").read_text())["segment"]
    assert listed.keys() == SegmentSettings.model_fields.keys()
    assert SegmentSettings.model_validate(listed) == SegmentSettings()


def test_pet_fcn8s_is_vgg16_fcn8s_at_224_with_a_frozen_encoder() -> None:
    config = load_config(TrainConfig, str(ROOT / "jobs" / "pet_fcn8s.yaml"))
    assert config.model == ModelConfig(
        arch="fcn8s", encoder_name="vgg16", encoder_weights="imagenet", freeze_encoder=True
    )
    assert config.image_size == (224, 224)
    assert config.data.class_names == ("pet", "background", "border")


def test_overriding_a_preset_replaces_its_whole_section(tmp_path: Path) -> None:
    whole = load(tmp_path, VALID, "augmentation=light").model_dump(mode="json")
    config = load(tmp_path, whole, "augmentation.preset=strong", "augmentation.blur=0")
    assert config.augmentation == AugmentationSettings.model_validate({"preset": "strong", "blur": 0})


def find_sections(section: type[Section]) -> set[type[Section]]:
    """Return a settings model and all models nested in it."""
    found = {section}
    annotations = [field.annotation for field in section.model_fields.values()]
    while annotations:
        annotation = annotations.pop()
        annotations += get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            found |= find_sections(annotation)
    return found


@pytest.mark.parametrize("section", sorted(find_sections(TrainConfig), key=str), ids=lambda section: section.__name__)
def test_every_setting_has_a_description_for_the_reference(section: type[Section]) -> None:
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description, name
        assert field.description[-1] == ".", name
