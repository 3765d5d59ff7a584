"""File formats that a bundle can be exported to."""

from enum import StrEnum
from typing import Self

from segray.errors import ConfigError


class ExportFormat(StrEnum):
    """File format of an exported bundle."""

    ONNX = "onnx"
    TORCH_EXPORT = "torch_export"

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the format with a name.

        Raises:
            ConfigError: There is no such format.
        """
        if name not in tuple(cls):
            raise ConfigError(f"export format: expected one of {', '.join(cls)}, got {name!r}")
        return cls(name)

    @property
    def file_name(self) -> str:
        """Default name of the exported file, inside the bundle."""
        return "model.onnx" if self is ExportFormat.ONNX else "model.pt2"
