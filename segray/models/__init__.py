"""Networks: ``build_model`` makes one, ``prediction`` turns its logits into masks."""

from segray.models.build import SegmentationModel, build_model, check_model_names

__all__ = ["SegmentationModel", "build_model", "check_model_names"]
