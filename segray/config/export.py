"""File formats that a bundle can be exported to."""

from enum import StrEnum


class ExportFormat(StrEnum):
    """What a bundle can be exported to."""

    ONNX = "onnx"
    TORCH_EXPORT = "torch_export"

    @property
    def file_name(self) -> str:
        """Name of the file that is written into the bundle by default."""
        return "model.onnx" if self is ExportFormat.ONNX else "model.pt2"
