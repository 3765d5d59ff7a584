"""Settings of labelled images, and the meaning of the values in their masks."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from segray.config.section import Section

MAX_CLASSES = 65_535  # Class indices and the ignore index are stored as uint16.
DEFAULT_MAX_IMAGE_PX = 100_000_000
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
MASK_EXTENSIONS = ("png", "bmp", "gif", "tif", "tiff")  # Lossless formats only: JPEG changes class values.

RawValue = Annotated[int, Field(ge=0, le=65_535)]


class SplitConfig(Section):
    """Source of one split: a folder of images and one of masks, a manifest, or a fraction of the training images.

    Give exactly one of: ``images`` and ``masks``; ``manifest``; ``fraction`` (for ``val`` only). ``group_by`` can be
    given with each of them.
    """

    images: str | None = Field(
        None,
        description="URI of a folder of images, searched with its subfolders. An image and its mask must have "
        "the same path below their folders, apart from the extension.",
    )
    masks: str | None = Field(
        None, description="URI of the folder of masks: one-channel PNG, BMP, GIF or TIFF files of class values."
    )
    manifest: str | None = Field(
        None,
        description="URI of a Parquet or CSV file with columns ``image_uri``, ``mask_uri`` and ``split``; the rows of "
        "this split (train or val) are used.",
    )
    fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the training images, 0 to 1, drawn at random and used for validation only. With "
        "``group_by`` whole groups are drawn.",
    )
    seed: int = Field(0, ge=0, description="Seed of the random draw of ``fraction``, and of ``train.folds``.")
    group_by: str | None = Field(
        None,
        description="For ``val`` only: a regular expression, searched in the name of each image. Images for which its "
        "first group (without groups: the whole match) is the same text belong together, such as the frames of a "
        "video, and are never in train and val both. The name of an image is its path below its folder, without the "
        "extension; with a manifest it is the URI, without the extension.",
    )

    @field_validator("group_by")
    @classmethod
    def _check_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"expected a regular expression, got {value!r}: {error}") from error
        return value

    @model_validator(mode="after")
    def _check_one_form(self) -> Self:
        given = {name for name in ("images", "masks", "manifest", "fraction") if getattr(self, name) is not None}
        if given not in ({"images", "masks"}, {"manifest"}, {"fraction"}):
            got = ", ".join(sorted(given)) or "none of them"
            if not given and self.group_by is not None:
                got = "group_by alone: if val has no images of its own, add fraction, which train.folds does not use"
            raise ValueError(f"expected images and masks, or manifest, or (val only) fraction; got {got}")
        return self


class OxfordPetRoot(Section):
    """Location of a data set with the folder layout of Oxford-IIIT Pet."""

    root: str = Field(description="URI of the folder that holds ``images/`` and ``annotations/``.")


class OxfordPetLayout(Section):
    """Folder layout of the Oxford-IIIT Pet data set.

    Under one root: ``images/*.jpg``, ``annotations/trimaps/*.png``, ``annotations/trainval.txt`` (the training split)
    and ``annotations/test.txt`` (the validation split).
    """

    oxford_iiit_pet: OxfordPetRoot = Field(description="Location of the data set.")


class DataConfig(Section):
    """Labelled images, and the meaning of the values in their masks."""

    layout: Literal["folders"] | OxfordPetLayout = Field(
        "folders",
        description="``folders``: ``train`` and ``val`` say where the images are. ``{oxford_iiit_pet: {root: URI}}``: "
        "a data set with the layout of Oxford-IIIT Pet, which defines its own splits and classes.",
    )
    train: SplitConfig | None = Field(
        None, description="Training split. Required, unless layout is ``oxford_iiit_pet``, which defines it."
    )
    val: SplitConfig | None = Field(
        None,
        description="Validation split. Required, unless layout is ``oxford_iiit_pet``; there, ``{fraction: 0.1}`` "
        "replaces its test split.",
    )
    class_names: tuple[str, ...] = Field(
        (), description=f"Names of the classes, in order: 2 to {MAX_CLASSES}, all different."
    )
    class_values: tuple[RawValue, ...] = Field(
        (),
        description="Value of each class in the mask files, 0 to 65535, in the order of ``class_names``. Default: 0, "
        "1, 2 and so on.",
    )
    ignore_values: tuple[RawValue, ...] = Field(
        (), description="Values in the mask files, 0 to 65535, whose pixels are neither trained on nor scored."
    )

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
        if self.train is not None and self.train.group_by is not None:
            raise ValueError("train.group_by: expected only in val; it applies to train and val together")
        if self.layout == "folders":
            if self.train is None or self.train.fraction is not None:
                raise ValueError("train: expected {images: URI, masks: URI} or {manifest: URI}")
            if self.val is None:
                raise ValueError("val: expected {images: URI, masks: URI}, {manifest: URI} or {fraction: 0.1, seed: 0}")
        elif self.train is not None or (self.val is not None and self.val.fraction is None):
            raise ValueError(
                "layout: oxford_iiit_pet defines train and val; remove them, or set only val: {fraction: 0.1}"
            )
        return self
