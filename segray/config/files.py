"""The structure of whole configuration files."""

from typing import Any, Self

from pydantic import Field, model_validator

from segray.config.augmentation import AugmentationSettings
from segray.config.data import DataConfig, OxfordPetLayout
from segray.config.loss import LossSettings
from segray.config.model import ModelConfig
from segray.config.section import ImageSide, Section
from segray.config.segmentation import SegmentSettings
from segray.config.training import TrackingSettings, TrainSettings
from segray.config.tuning import TuneSettings

# Settings of train that change the speed or the fault tolerance of a run, but not its weights. (What a run trains on,
# with or without folds, is in its listing.)
_NOT_WEIGHT_SETTINGS = {
    "folds",
    "num_decode_threads",
    "num_prefetch_batches",
    "cache_bytes",
    "cache_disk_bytes",
    "max_failures",
    "min_train_workers",
    "stall_timeout_s",
    "checkpoint_every_steps",
    "num_best_checkpoints",
    "log_every_steps",
    "time_budget_min",
    "recheck_labels",
}
# Settings of train that bind an output folder: those of the optimizer, whose state is in the checkpoints, and those
# that decide which samples a step takes. The other settings of train may change when a run is resumed.
_BOUND_SETTINGS = {
    "seed",
    "sampling",
    "global_batch_size",
    "optimizer",
    "learning_rate",
    "encoder_lr_factor",
    "layer_decay",
    "momentum",
    "weight_decay",
}


class SegmentFile(Section):
    """Configuration file of ``segray segment``, which uses only its section ``segment``.

    The other sections are accepted, so that the configuration file of a training run can be reused.
    """

    data: DataConfig | None = Field(None, description="Labelled images and classes.")
    model: ModelConfig = Field(ModelConfig(), description="Network architecture.")
    image_size: tuple[ImageSide, ImageSide] | None = Field(
        None,
        description="``[height, width]`` in pixels, 16 to 16384, that images are resized to before they enter the "
        "network. Required for training.",
    )
    loss: LossSettings = Field(LossSettings(), description="Training loss.")
    augmentation: AugmentationSettings = Field(
        AugmentationSettings(), description="Random changes of training samples: a preset name, or a section."
    )
    train: TrainSettings = Field(TrainSettings(), description="Optimisation and execution of training.")
    tracking: TrackingSettings = Field(TrackingSettings(), description="Where metrics are logged.")
    tune: TuneSettings = Field(TuneSettings(), description="Hyperparameter search.")
    segment: SegmentSettings = Field(SegmentSettings(), description="Segmentation of images with a bundle.")
    output: str | None = Field(None, description="URI of the output folder of training. Required for training.")


class TrainConfig(SegmentFile):
    """Configuration file of ``segray train``, ``segray check`` and ``segray tune``."""

    data: DataConfig = Field(description="Labelled images and classes.")
    image_size: tuple[ImageSide, ImageSide] = Field(
        description="``[height, width]`` in pixels, 16 to 16384, that whole images are resized to before they enter "
        "the network. The bundle keeps this size."
    )
    output: str = Field(
        description="URI of the output folder for checkpoints, metrics and the bundle. It belongs to one run; to "
        "resume, rerun with the same output."
    )

    @model_validator(mode="after")
    def _check_class_weights(self) -> Self:
        weights, names = self.loss.class_weights, self.data.class_names
        if isinstance(weights, tuple) and len(weights) != len(names):
            raise ValueError(
                f"loss.class_weights: expected one weight for each of the {len(names)} class_names, got {len(weights)}"
            )
        return self

    @model_validator(mode="after")
    def _check_folds(self) -> Self:
        if self.train.folds == "groups" and (self.data.val is None or self.data.val.group_by is None):
            raise ValueError(
                "train.folds: groups needs data.val.group_by, the expression that says what a group is; got null"
            )
        return self

    @property
    def uris(self) -> dict[str, str]:
        """All URIs of the configuration, by the dotted name of their setting."""
        found = {"output": self.output}
        for name, split in (("train", self.data.train), ("val", self.data.val)):
            for part in ("images", "masks", "manifest"):
                if split is not None and (uri := getattr(split, part)) is not None:
                    found[f"data.{name}.{part}"] = uri
        if isinstance(self.data.layout, OxfordPetLayout):
            found["data.layout.oxford_iiit_pet.root"] = self.data.layout.oxford_iiit_pet.root
        return found

    @property
    def bound_settings(self) -> dict[str, Any]:
        """The settings that bind an output folder to a run; a rerun into the same output must have the same."""
        train = self.train.model_dump(mode="json", include=_BOUND_SETTINGS)
        return {**self.model_dump(mode="json", include={"data", "model", "image_size", "loss"}), "train": train}

    @property
    def phase_settings(self) -> dict[str, Any]:
        """The settings that affect the weights or scores too, but may change when a run is resumed; it records them."""
        train = self.train.model_dump(mode="json", exclude=_BOUND_SETTINGS | _NOT_WEIGHT_SETTINGS)
        return {"augmentation": self.augmentation.model_dump(mode="json"), "train": train}

    @property
    def weight_settings(self) -> dict[str, Any]:
        """All settings that affect the weights or scores; a search compares its trials under one choice of them."""
        bound, phase = self.bound_settings, self.phase_settings
        return {**bound, **phase, "train": {**bound["train"], **phase["train"]}}
