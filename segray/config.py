"""Settings: frozen pydantic models, read from a YAML file and overridden with ``--set section.name=value``."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from segray.errors import ConfigError, flatten_message
from segray.storage import is_relative, read_bytes

MAX_CLASSES = 65_535  # class indices and the ignore index share uint16
DEFAULT_MAX_IMAGE_PX = 100_000_000
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
MASK_EXTENSIONS = ("png", "bmp", "gif", "tif", "tiff")  # lossless ones: JPEG blurs class values

Precision = Literal["bf16", "fp32"]
RawValue = Annotated[int, Field(ge=0, le=65_535)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SplitConfig(_Section):
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


class OxfordPetRoot(_Section):
    """Root of a data set laid out like Oxford-IIIT Pet."""

    root: str


class OxfordPetLayout(_Section):
    """``images/*.jpg``, ``annotations/trimaps/*.png``, ``annotations/trainval.txt`` and ``test.txt`` under one root."""

    oxford_iiit_pet: OxfordPetRoot


class DataConfig(_Section):
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


class ModelConfig(_Section):
    """Network: architecture and encoder by their segmentation-models-pytorch names, or fcn8s, fcn16s, fcn32s."""

    arch: str = "unet"
    encoder_name: str = "resnet18"
    encoder_weights: str | None = None
    freeze_encoder: bool = False


class TrainSettings(_Section):
    """How the model is trained."""

    num_epochs: int = Field(15, ge=1)
    global_batch_size: int = Field(16, ge=1, description="images per step over all workers")
    learning_rate: float = Field(1e-3, gt=0, description="peak of the one-cycle schedule")
    weight_decay: float = Field(1e-2, ge=0)
    num_train_workers: int = Field(1, ge=1)
    use_gpu: bool = False
    precision: Precision = "bf16"
    seed: int = Field(0, ge=0)
    eval_batch_size: int = Field(8, ge=1, description="images per evaluation batch and worker")
    num_decode_threads: int = Field(2, ge=1, description="threads that read and decode images, in each worker")
    max_failures: int = Field(3, ge=0, description="how often lost workers are replaced before the run gives up")

    @model_validator(mode="after")
    def _check_batch_divides(self) -> Self:
        if self.global_batch_size % self.num_train_workers:
            raise ValueError(
                f"global_batch_size: {self.global_batch_size} cannot be shared evenly by num_train_workers: "
                f"{self.num_train_workers}; choose a multiple"
            )
        return self


class SegmentSettings(_Section):
    """How a bucket is segmented."""

    fragment_size: int = Field(64, ge=1, description="most images in one output file")
    fragment_bytes: int = Field(64 * 2**20, ge=1, description="most bytes of encoded images in one output file")
    batch_size: int = Field(8, ge=1, description="images per forward pass")
    precision: Precision = "bf16"
    num_predictors: int = Field(1, ge=1)
    num_gpus_per_predictor: float = Field(0, ge=0)
    mask_encoding: Literal["raw", "png"] = "raw"
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
        speed = {"num_predictors", "num_gpus_per_predictor"}
        listing = {"extensions", "recursive", "split", "relist"}
        outcome = {"max_error_fraction", "num_report_images", "retry_errors"}
        return self.model_dump(mode="json", exclude={*speed, *listing, *outcome})


ImageSide = Annotated[int, Field(ge=16, le=16_384)]


class SegmentFile(_Section):
    """What ``segray segment`` reads: its ``segment`` section. A training configuration serves as it is."""

    data: DataConfig | None = None
    model: ModelConfig = ModelConfig()
    image_size: tuple[ImageSide, ImageSide] | None = Field(None, description="height, width fed to the model")
    train: TrainSettings = TrainSettings()
    segment: SegmentSettings = SegmentSettings()
    output: str | None = None


class TrainConfig(SegmentFile):
    """What ``segray train`` and ``segray check`` read."""

    data: DataConfig
    image_size: tuple[ImageSide, ImageSide] = Field(description="height, width fed to the model")
    output: str

    @property
    def uris(self) -> dict[str, str]:
        """All URIs by the name of their setting."""
        found = {"output": self.output}
        for name, split in (("train", self.data.train), ("val", self.data.val)):
            for part in ("images", "masks", "manifest"):
                if split is not None and (uri := getattr(split, part)) is not None:
                    found[f"data.{name}.{part}"] = uri
        if isinstance(self.data.layout, OxfordPetLayout):
            found["data.layout.oxford_iiit_pet.root"] = self.data.layout.oxford_iiit_pet.root
        return found

    @property
    def of_weights(self) -> dict[str, Any]:
        """The settings that decide which weights come out; a run in the same output must have the same."""
        train = self.train.model_dump(mode="json", exclude={"num_decode_threads", "max_failures"})
        return {**self.model_dump(mode="json", include={"data", "model", "image_size"}), "train": train}


ConfigT = TypeVar("ConfigT", bound=SegmentFile)


def load_config(kind: type[ConfigT], uri: str | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a configuration file and apply ``KEY=VALUE`` overrides to it.

    Args:
        kind: ``TrainConfig`` or ``SegmentFile``.
        uri: YAML file, or None for the defaults alone.
        overrides: ``"train.num_epochs=3"``; values are YAML, keys are dotted.

    Raises:
        ConfigError: The file is not YAML, or a setting is unknown, missing or wrong.
        StorageError: The file cannot be read.
    """
    values: Any = {}
    if uri is not None:
        try:
            values = yaml.safe_load(read_bytes(uri).decode("utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{uri}: expected YAML: {flatten_message(error)}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{uri}: expected sections such as data: and train:, got {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_describe(problem, kind) for problem in error.errors())
        raise ConfigError(f"{uri or 'settings'}: {problems}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as --set train.num_epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML; quote it") from error
    *sections, name = key.split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = dict(inner) if isinstance(inner, dict) else {}
        values = values[section]
    values[name] = value


def _describe(problem: Any, kind: type[SegmentFile]) -> str:
    # pydantic adds the tried union member (a class name) to the path; a user knows only the settings
    path = ".".join(
        str(part) for part in problem["loc"] if not str(part)[:1].isupper() and part != "literal['folders']"
    )
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path, list(_iterate_settings(kind)), n=1)
        return f"{path}: unknown setting" + (f"; did you mean {close[0]}?" if close else "; remove it")
    if problem["type"] == "missing":
        return f"{path}: this setting is required"
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if problem["type"] == "value_error" else f", got {problem['input']!r}"
    return f"{path}: {message[0].lower()}{message[1:]}{got}" if path else message + got


def _iterate_settings(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield prefix + name
        for inner in [field.annotation, *get_args(field.annotation)]:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _iterate_settings(inner, f"{prefix}{name}.")


def find_differences(theirs: Any, mine: Any, path: str = "") -> list[str]:
    """Return each setting that differs between two resolved configurations, as ``name: there …, here …``."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        names = sorted(theirs.keys() | mine.keys())
        pairs = [(theirs.get(name), mine.get(name), f"{path}.{name}" if path else name) for name in names]
        return [difference for pair in pairs for difference in find_differences(*pair)]
    return [] if theirs == mine else [f"{path}: there {theirs!r}, here {mine!r}"]


def require_absolute(uris: Mapping[str, str | None]) -> None:
    """Refuse paths that depend on the current folder, given by the name of their setting.

    Submitted jobs run in a folder of their own that is thrown away, and on machines that do not share it.

    Raises:
        ConfigError: Names the first relative path and its setting.
    """
    for setting, uri in uris.items():
        if uri is not None and is_relative(uri):
            raise ConfigError(
                f"{setting}: {uri} is relative, but a submitted job runs in a folder of its own that is thrown away; "
                "give an absolute path that every node sees, or an s3:// URI"
            )
