"""Networks: ``build_model`` makes one, ``prediction`` turns its logits into masks."""

from segray.models.build import SegmentationModel, build_model, check_model, freeze_unused_parameters

__all__ = ["SegmentationModel", "build_model", "check_model", "freeze_unused_parameters"]
