"""Settings: frozen pydantic models, read from a YAML file and overridden with ``--set section.name=value``."""

from segray.config.augmentation import AugmentationSettings
from segray.config.data import (
    DEFAULT_MAX_IMAGE_PX,
    IMAGE_EXTENSIONS,
    MASK_EXTENSIONS,
    MAX_CLASSES,
    DataConfig,
    OxfordPetLayout,
    SplitConfig,
)
from segray.config.export import ExportFormat
from segray.config.files import SegmentFile, TrainConfig
from segray.config.load import find_differences, load_config, require_absolute
from segray.config.loss import LOSS_TERMS, LossSettings
from segray.config.model import ModelConfig
from segray.config.segmentation import SegmentSettings
from segray.config.training import MAX_FOLDS, TrackingSettings, TrainSettings
from segray.config.tuning import SearchRange, TuneSettings

__all__ = [
    "DEFAULT_MAX_IMAGE_PX",
    "IMAGE_EXTENSIONS",
    "LOSS_TERMS",
    "MASK_EXTENSIONS",
    "MAX_CLASSES",
    "MAX_FOLDS",
    "AugmentationSettings",
    "DataConfig",
    "ExportFormat",
    "LossSettings",
    "ModelConfig",
    "OxfordPetLayout",
    "SearchRange",
    "SegmentFile",
    "SegmentSettings",
    "SplitConfig",
    "TrackingSettings",
    "TrainConfig",
    "TrainSettings",
    "TuneSettings",
    "find_differences",
    "load_config",
    "require_absolute",
]
