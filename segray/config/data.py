"""Settings of labelled images, and what the values in their masks mean."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from segray.config.section import Section

MAX_CLASSES = 65_535  # class indices and the ignore index share uint16
DEFAULT_MAX_IMAGE_PX = 100_000_000
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
MASK_EXTENSIONS = ("png", "bmp", "gif", "tif", "tiff")  # lossless ones: JPEG blurs class values

RawValue = Annotated[int, Field(ge=0, le=65_535)]


class SplitConfig(Section):
    """Where one split comes from: a pair of folders, a manifest, or a fraction of the training images."""

    images: str | None = Field(None, description="folder of images, paired with masks by path without extension")
    masks: str | None = Field(None, description="folder of masks")
    manifest: str | None = Field(None, description="Parquet or CSV with columns image_uri, mask_uri and split")
    fraction: float | None = Field(None, gt=0, lt=1, description="share of the training images, drawn at random")
    seed: int = Field(0, ge=0, description="seed of that draw")

    @model_validator(mode="after")
    def _check_one_form(self) -> Self:
        given = {name for name in ("images", "masks", "manifest", "fraction") if getattr(self, name) is not None}
        if given not in ({"images", "masks"}, {"manifest"}, {"fraction"}):
            got = ", ".join(sorted(given)) or "none of them"
            raise ValueError(f"expected images and masks, or manifest, or (val only) fraction; got {got}")
        return self


class OxfordPetRoot(Section):
    """Root of a data set laid out like Oxford-IIIT Pet."""

    root: str


class OxfordPetLayout(Section):
    """``images/*.jpg``, ``annotations/trimaps/*.png``, ``annotations/trainval.txt`` and ``test.txt`` under one root."""

    oxford_iiit_pet: OxfordPetRoot


class DataConfig(Section):
    """Labelled images, and what the values in their masks mean."""

    layout: Literal["folders"] | OxfordPetLayout = "folders"
    train: SplitConfig | None = None
    val: SplitConfig | None = None
    class_names: tuple[str, ...] = ()
    class_values: tuple[RawValue, ...] = Field((), description="raw mask value of each class; default 0..n-1")
    ignore_values: tuple[RawValue, ...] = Field((), description="raw mask values not scored and not learned from")

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if isinstance(values.get("layout"), dict | OxfordPetLayout):
            values.setdefault("class_names", ["pet", "background", "border"])
            values.setdefault("class_values", [1, 2, 3])
        names = values.get("class_names")
        if isinstance(names, list | tuple) and not values.get("class_values"):
            values["class_values"] = list(range(len(names)))
        return values

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if len(self.class_names) < 2 or len(self.class_names) > MAX_CLASSES:
            raise ValueError(f"class_names: expected 2 to {MAX_CLASSES} names, got {len(self.class_names)}")
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"class_names: expected distinct names, got {list(self.class_names)}")
        if len(self.class_values) != len(self.class_names):
            raise ValueError(
                f"class_values: expected one value for each of the {len(self.class_names)} class_names, "
                f"got {len(self.class_values)}"
            )
        values = [*self.class_values, *self.ignore_values]
        if len(set(values)) < len(values):
            raise ValueError(f"class_values and ignore_values: expected distinct values, got {values}")
        if self.layout == "folders":
            if self.train is None or self.train.fraction is not None:
                raise ValueError("train: expected {images: URI, masks: URI} or {manifest: URI}")
            if self.val is None:
                raise ValueError("val: expected {images: URI, masks: URI}, {manifest: URI} or {fraction: 0.1, seed: 0}")
        elif self.train is not None or (self.val is not None and self.val.fraction is None):
            raise ValueError("layout: oxford_iiit_pet brings its own train and val; give val: {fraction: …} or neither")
        return self
