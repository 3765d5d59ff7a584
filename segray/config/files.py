"""Whole configuration files."""

from typing import Any, Self

from pydantic import Field, model_validator

from segray.config.data import DataConfig, OxfordPetLayout
from segray.config.section import Section
from segray.config.segmentation import SegmentSettings
from segray.config.training import (
    AugmentationSettings,
    ImageSide,
    LossSettings,
    ModelConfig,
    TrackingSettings,
    TrainSettings,
)
from segray.config.tuning import TuneSettings

# of train: what changes how fast or how safely weights come out, and not which
_NOT_OF_WEIGHTS = {
    "num_decode_threads",
    "cache_bytes",
    "cache_disk_bytes",
    "max_failures",
    "min_train_workers",
    "stall_timeout_s",
    "checkpoint_every_steps",
    "num_best_checkpoints",
}


class SegmentFile(Section):
    """What ``segray segment`` reads: its ``segment`` section. A training configuration serves as it is."""

    data: DataConfig | None = None
    model: ModelConfig = ModelConfig()
    image_size: tuple[ImageSide, ImageSide] | None = Field(None, description="height, width fed to the model")
    loss: LossSettings = LossSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    train: TrainSettings = TrainSettings()
    tracking: TrackingSettings = TrackingSettings()
    tune: TuneSettings = TuneSettings()
    segment: SegmentSettings = SegmentSettings()
    output: str | None = None


class TrainConfig(SegmentFile):
    """What ``segray train``, ``check`` and ``tune`` read."""

    data: DataConfig
    image_size: tuple[ImageSide, ImageSide] = Field(description="height, width fed to the model")
    output: str

    @model_validator(mode="after")
    def _check_class_weights(self) -> Self:
        weights, names = self.loss.class_weights, self.data.class_names
        if isinstance(weights, tuple) and len(weights) != len(names):
            raise ValueError(
                f"loss.class_weights: expected one for each of the {len(names)} class_names, got {len(weights)}"
            )
        return self

    @property
    def uris(self) -> dict[str, str]:
        """All URIs by the name of their setting."""
        found = {"output": self.output}
        for name, split in (("train", self.data.train), ("val", self.data.val)):
            for part in ("images", "masks", "manifest"):
                if split is not None and (uri := getattr(split, part)) is not None:
                    found[f"data.{name}.{part}"] = uri
        if isinstance(self.data.layout, OxfordPetLayout):
            found["data.layout.oxford_iiit_pet.root"] = self.data.layout.oxford_iiit_pet.root
        return found

    @property
    def of_weights(self) -> dict[str, Any]:
        """The settings that decide which weights come out; a run in the same output must have the same."""
        sections = {"data", "model", "image_size", "loss", "augmentation"}
        train = self.train.model_dump(mode="json", exclude=_NOT_OF_WEIGHTS)
        return {**self.model_dump(mode="json", include=sections), "train": train}
