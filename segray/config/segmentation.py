"""Settings of a run over a bucket."""

from typing import Any, Literal

from pydantic import Field, field_validator

from segray.config.data import DEFAULT_MAX_IMAGE_PX, IMAGE_EXTENSIONS
from segray.config.section import Section


class SegmentSettings(Section):
    """How a bucket is segmented."""

    fragment_size: int = Field(64, ge=1, description="most images in one output file")
    fragment_bytes: int = Field(64 * 2**20, ge=1, description="most bytes of encoded images in one output file")
    batch_size: int = Field(8, ge=1, description="images per forward pass")
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = Field(False, description="torch.compile: a slower start, and a C++ compiler on every node")
    num_fetch_threads: int = Field(16, ge=1, description="images of a fragment that are fetched at a time")
    num_predictors: int | None = Field(
        None, ge=1, description="processes that hold the model; null: one for each GPU, or nearly one for each CPU"
    )
    num_gpus_per_predictor: float = Field(0, ge=0)
    mask_encoding: Literal["raw", "png"] = "raw"
    reduce_jpeg: bool = Field(
        False, description="decode a JPEG that is much larger than the model's input at a fraction of its size"
    )
    max_image_px: int = Field(DEFAULT_MAX_IMAGE_PX, ge=1, description="larger images become error rows: too_large")
    extensions: tuple[str, ...] = Field(IMAGE_EXTENSIONS, min_length=1, description="of images, in any case")
    recursive: bool = Field(True, description="also what is in folders below")
    split: str | None = Field(None, description="of a manifest, only the rows of this split")
    relist: bool = Field(True, description="compare a run's plan with a new listing before going on with it")
    max_error_fraction: float = Field(0.01, ge=0, le=1, description="from this share of error rows on, exit code 3")
    num_report_images: int = Field(6, ge=0, le=100, description="pictures in the report; each is read once more")
    retry_errors: bool = Field(False, description="make the fragments again that hold error rows")

    @field_validator("extensions")
    @classmethod
    def _check_extensions(cls, extensions: tuple[str, ...]) -> tuple[str, ...]:
        cleaned = tuple(extension.lower().removeprefix(".") for extension in extensions)
        if not all(cleaned):
            raise ValueError(f"expected extensions such as png, got {list(extensions)}")
        return cleaned

    @property
    def device(self) -> str:
        """What computes: a run that begins on one goes on with it, as their last bits differ."""
        return "gpu" if self.num_gpus_per_predictor else "cpu"

    @property
    def of_rows(self) -> dict[str, Any]:
        """The settings that change what is written, not only how fast; they belong to a run's fingerprint.

        Which images there are is the listing's part of it.
        """
        speed = {"num_fetch_threads", "num_predictors", "num_gpus_per_predictor"}
        listing = {"extensions", "recursive", "split", "relist"}
        outcome = {"max_error_fraction", "num_report_images", "retry_errors"}
        return self.model_dump(mode="json", exclude={*speed, *listing, *outcome})
