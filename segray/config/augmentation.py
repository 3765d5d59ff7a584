"""Settings of the random changes of training samples."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from segray.config.section import Fraction, ImageSide, Section

Range = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

_PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "light": {"horizontal_flip": 0.5, "scale": (0.75, 1.5), "colour_jitter": 0.1},
    "strong": {
        "horizontal_flip": 0.5,
        "scale": (0.5, 2.0),
        "aspect": (0.8, 1.25),
        "rotation_deg": 10.0,
        "colour_jitter": 0.4,
        "blur": 0.2,
        "cutout": 0.3,
    },
}


class AugmentationSettings(Section):
    """Random changes of training samples: a preset (``augmentation: light``), or a preset and overrides.

    A setting that is not given has the value of the preset, as in ``augmentation: {preset: strong, rotation_deg: 0}``.
    """

    preset: Literal["none", "light", "strong"] = Field(
        "light",
        description="Values of the settings that are not given. ``light``: horizontal flips, scale 0.75 to 1.5 and "
        "colour jitter 0.1. ``strong``: a wider scale, more jitter, and also aspect, rotation, blur and cutout.",
    )
    crop_size: tuple[ImageSide, ImageSide] | None = Field(
        None,
        description="``[height, width]`` in pixels, 16 to 16384, of training samples, which are cut from the image at "
        "``image_size``. ``null``: ``image_size``. Evaluation always uses whole images.",
    )
    horizontal_flip: Fraction = Field(0.0, description="Probability, 0 to 1, of a left-right flip.")
    vertical_flip: Fraction = Field(0.0, description="Probability, 0 to 1, of a top-bottom flip.")
    scale: Range = Field(
        (1.0, 1.0),
        description="``[lowest, highest]`` factor of enlargement. Above 1 a part of the image is cut out; below 1 it "
        "is padded with ignored pixels.",
    )
    aspect: Range = Field(
        (1.0, 1.0), description="``[lowest, highest]`` factor by which the width is stretched relative to the height."
    )
    rotation_deg: float = Field(0.0, ge=0, le=180, description="Maximum rotation in degrees, in either direction.")
    colour_jitter: Fraction = Field(
        0.0, description="Maximum relative change, 0 to 1, of brightness, contrast and saturation."
    )
    blur: Fraction = Field(
        0.0, description="Probability, 0 to 1, of a Gaussian blur with a sigma of 0.3 to 1.5 pixels."
    )
    cutout: Fraction = Field(
        0.0,
        description="Probability, 0 to 1, that one rectangle, with sides 10 to 40% of the sample's, is blanked; its "
        "pixels are ignored in the loss, because their labels no longer show in the image.",
    )

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {"preset": values}
        if isinstance(values, dict):
            return {**_PRESETS.get(str(values.get("preset", "light")), {}), **values}
        return values

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for name in ("scale", "aspect"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: expected [lowest, highest], got [{low}, {high}]")
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that differ from the preset ``none``, by name."""
        off = AugmentationSettings(preset="none")
        return {name: value for name, value in self if name != "preset" and value != getattr(off, name)}
