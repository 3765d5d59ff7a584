"""Settings: frozen pydantic models, read from a YAML file and overridden with ``--set section.name=value``."""

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
from segray.config.segmentation import SegmentSettings
from segray.config.training import (
    LOSS_TERMS,
    AugmentationSettings,
    LossSettings,
    ModelConfig,
    TrackingSettings,
    TrainSettings,
)
from segray.config.tuning import SearchRange, TuneSettings

__all__ = [
    "DEFAULT_MAX_IMAGE_PX",
    "IMAGE_EXTENSIONS",
    "LOSS_TERMS",
    "MASK_EXTENSIONS",
    "MAX_CLASSES",
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
