"""Settings of segmentation."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from segray.config.data import DEFAULT_MAX_IMAGE_PX, IMAGE_EXTENSIONS
from segray.config.section import Section


class SegmentSettings(Section):
    """How ``segray segment`` applies a bundle to images.

    A fragment is a group of images that is processed, retried and written together: one Parquet file of the output.
    A rerun into the same output must have the same ``mask_encoding`` and ``reduce_jpeg``, because they change the rows;
    see ``allow_mixed`` and ``retry_errors`` for those that may change under conditions.
    """

    fragment_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Maximum number of images per fragment. ``auto``: 64, or for fewer than 2,048 images as many as "
        "give 32 fragments (at least 8), or for more than 1.28 million images as many as give 20,000 fragments; "
        "``fragment_bytes`` and ``fragment_px`` apply too.",
    )
    fragment_bytes: int = Field(
        64 * 2**20,
        ge=1,
        description="Maximum bytes of encoded images per fragment. A larger image is a fragment of its own.",
    )
    fragment_px: int = Field(
        2**26,
        ge=1,
        description="Maximum pixels per fragment at the model's input size, which limits the memory that its decoded "
        "images take: 3 bytes per pixel.",
    )
    batch_size: int = Field(8, ge=1, description="Images per forward pass. Lower it if a GPU runs out of memory.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Number format of the network's arithmetic: ``bf16`` (mixed precision) or ``fp32``."
    )
    compile: bool = Field(
        False, description="Use ``torch.compile``. It starts more slowly and needs a C++ compiler on every node."
    )
    num_fetch_threads: int = Field(16, ge=1, description="Images of a fragment that are downloaded at the same time.")
    num_predictors: int | None = Field(
        None,
        ge=1,
        description="Processes that hold the model. ``null``: as many as the GPUs allow; without GPUs, at most 7/8 of "
        "the CPUs, with 2 GiB of memory and 2 fragments each.",
    )
    num_threads_per_predictor: int = Field(
        1,
        ge=1,
        description="CPUs of a predictor without a GPU. More are of use if there is not enough memory for a predictor "
        "per CPU; another number may change the last bits of rows.",
    )
    num_gpus_per_predictor: float = Field(
        0, ge=0, description="GPUs per predictor; a fraction such as 0.5 shares a GPU. 0: predict on CPUs."
    )
    mask_encoding: Literal["raw", "png"] = Field(
        "raw",
        description="How masks are stored: ``raw`` (uint8 or uint16 pixels, row by row) or ``png`` (with the class "
        "palette).",
    )
    reduce_jpeg: bool = Field(
        False,
        description="Decode JPEG files that are much larger than the model's input at 1/2, 1/4 or 1/8 of their size. "
        "Faster, but pixels differ slightly.",
    )
    max_image_px: int = Field(
        DEFAULT_MAX_IMAGE_PX,
        ge=1,
        description="Maximum height times width of an image, in pixels. Larger images become error rows "
        "(``too_large``).",
    )
    image_timeout_s: float = Field(
        300,
        gt=0,
        description="Maximum time to decode an image, or to predict one, in seconds. Images that take longer become "
        "error rows (``timeout``).",
    )
    extensions: tuple[str, ...] = Field(
        IMAGE_EXTENSIONS, min_length=1, description="File name extensions of images, in upper or lower case."
    )
    recursive: bool = Field(True, description="Include images in subfolders.")
    split: str | None = Field(
        None, description="Use only the rows of a manifest whose column ``split`` has this value. ``null``: all rows."
    )
    relist: bool = Field(
        True,
        description="On a rerun, list the images again and compare them with the plan. ``false``: use the plan as it "
        "is.",
    )
    max_error_fraction: float = Field(
        0.01, ge=0, le=1, description="The exit code is 3 if the share of error rows, 0 to 1, is this or higher."
    )
    stop_error_fraction: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Stop the run, with exit code 5, once at least 1,000 rows are written and more than this share of "
        "them, 0 to 1, are error rows. ``1``: never.",
    )
    allow_mixed: bool = Field(
        False,
        description="On a rerun, allow another ``batch_size``, ``precision``, ``compile``, "
        "``num_threads_per_predictor`` or kind of device than "
        "before, although rows written now may then differ from earlier ones in their last bits.",
    )
    num_report_images: int = Field(
        6, ge=0, le=100, description="Images shown in ``report.html``; each is read a second time."
    )
    retry_errors: bool = Field(
        False,
        description="On a rerun, process fragments with error rows again. Use it after fixing the images, or to raise "
        "``max_image_px`` or ``image_timeout_s``.",
    )

    @field_validator("extensions")
    @classmethod
    def _check_extensions(cls, extensions: tuple[str, ...]) -> tuple[str, ...]:
        cleaned = tuple(extension.lower().removeprefix(".") for extension in extensions)
        if not all(cleaned):
            raise ValueError(f"expected extensions such as png, got {list(extensions)}")
        return cleaned

    @property
    def device(self) -> str:
        """Kind of device that predicts, ``gpu`` or ``cpu``. A run uses only one, because their last bits differ."""
        return "gpu" if self.num_gpus_per_predictor else "cpu"

    @property
    def row_settings(self) -> dict[str, Any]:
        """The settings that change the written rows; a run folder belongs to one choice of them.

        Those that select images are covered by the sha256 of the plan. ``bit_settings`` and ``limits`` may change under
        conditions; all others change only how the images are divided, the speed, the exit code or the report.
        """
        return self.model_dump(mode="json", include={"mask_encoding", "reduce_jpeg"})

    @property
    def bit_settings(self) -> dict[str, Any]:
        """The settings that may change the last bits of rows; a run changes them only with ``allow_mixed``."""
        settings = self.model_dump(
            mode="json", include={"batch_size", "precision", "compile", "num_threads_per_predictor"}
        )
        if self.num_gpus_per_predictor:  # Predictors with a GPU have one thread, whatever is set.
            settings["num_threads_per_predictor"] = 1
        return {**settings, "device": self.device}

    @property
    def limits(self) -> dict[str, Any]:
        """The settings above which an image is an error row; a run raises them only with ``retry_errors``."""
        return self.model_dump(mode="json", include={"max_image_px", "image_timeout_s"})
