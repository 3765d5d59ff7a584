"""Settings of the network, of what it learns from, and of how."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from segray.config.section import Section

LOSS_TERMS = ("ce", "dice", "focal", "lovasz", "jaccard", "tversky", "ohem")

ImageSide = Annotated[int, Field(ge=16, le=16_384)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Range = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class ModelConfig(Section):
    """Network: architecture and encoder by their segmentation-models-pytorch names, or one of segray's own.

    Those are fcn8s, fcn16s, fcn32s and segnet, on a VGG encoder, and classic_unet, which has none to choose.
    """

    arch: str = "unet"
    encoder_name: str = "resnet18"
    encoder_weights: str | None = None
    freeze_encoder: bool = False
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64, 128, 256, 512, 1024), min_length=2, max_length=6, description="channels of classic_unet's levels"
    )


class LossSettings(Section):
    """A weighted sum of losses, as in ``loss: {ce: 1.0, dice: 1.0}``."""

    ce: float = Field(0.0, ge=0, description="weight of cross-entropy; 1 if no loss is named")
    dice: float = Field(0.0, ge=0)
    focal: float = Field(0.0, ge=0)
    lovasz: float = Field(0.0, ge=0)
    jaccard: float = Field(0.0, ge=0)
    tversky: float = Field(0.0, ge=0)
    ohem: float = Field(0.0, ge=0, description="weight of cross-entropy over hard pixels alone")
    class_weights: Literal["auto"] | tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None, description="of ce, focal and ohem, in the order of class_names; auto: median frequency"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of ce")
    focal_gamma: float = Field(2.0, ge=1)
    tversky_alpha: Fraction = Field(0.3, description="weight of false positives")
    tversky_beta: Fraction = Field(0.7, description="weight of false negatives")
    ohem_threshold: float = Field(0.7, gt=0, lt=1, description="hard is a pixel whose class has less probability")
    ohem_min_kept: float = Field(0.0625, gt=0, le=1, description="share of an image's pixels that is kept at least")

    @model_validator(mode="before")
    @classmethod
    def _default_to_cross_entropy(cls, values: Any) -> Any:
        if isinstance(values, dict) and not any(name in values for name in LOSS_TERMS):
            return {**values, "ce": 1.0}
        return values

    @model_validator(mode="after")
    def _check_terms(self) -> Self:
        if not self.terms:
            raise ValueError(f"expected a weight above 0 for one of {', '.join(LOSS_TERMS)}")
        if self.tversky and not self.tversky_alpha + self.tversky_beta:
            raise ValueError("tversky_alpha, tversky_beta: expected one above 0 at least, got 0 and 0")
        if isinstance(self.class_weights, tuple) and not any(self.class_weights):
            raise ValueError(f"class_weights: expected one above 0 at least, got {list(self.class_weights)}")
        return self

    @property
    def terms(self) -> dict[str, float]:
        """The losses that take part, with their weights."""
        return {name: weight for name in LOSS_TERMS if (weight := getattr(self, name)) > 0}


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
    """Random changes of training samples: a preset (``augmentation: light``), and what differs from it."""

    preset: Literal["none", "light", "strong"] = "light"
    crop_size: tuple[ImageSide, ImageSide] | None = Field(
        None, description="height, width of training samples, cut from the image at image_size; null: image_size"
    )
    horizontal_flip: Fraction = Field(0.0, description="probability")
    vertical_flip: Fraction = Field(0.0, description="probability")
    scale: Range = Field((1.0, 1.0), description="enlargement; above 1 a part is cut out, below 1 the rest is ignored")
    aspect: Range = Field((1.0, 1.0), description="stretching of width against height")
    rotation_deg: float = Field(0.0, ge=0, le=180, description="most degrees, to either side")
    colour_jitter: Fraction = Field(0.0, description="most relative change of brightness, contrast and saturation")
    blur: Fraction = Field(0.0, description="probability of a Gaussian blur")
    cutout: Fraction = Field(0.0, description="probability of a blanked rectangle")

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
        """The changes that are made, without those that are off."""
        off = AugmentationSettings(preset="none")
        return {name: value for name, value in self if name != "preset" and value != getattr(off, name)}


class TrainSettings(Section):
    """How the model is trained."""

    num_epochs: int = Field(15, ge=1)
    global_batch_size: int = Field(16, ge=1, description="images per step over all workers")
    num_accumulation_steps: int = Field(1, ge=1, description="parts that a worker's share of a step is computed in")
    seed: int = Field(0, ge=0)

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0, description="highest of the schedule")
    encoder_lr_factor: float = Field(1.0, ge=0, description="learning rate of the encoder, relative")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd (Nesterov)")
    weight_decay: float = Field(1e-2, ge=0, description="not of biases and normalisations")
    schedule: Literal["one_cycle", "poly", "cosine", "constant"] = "one_cycle"
    warm_up_fraction: float | None = Field(None, ge=0, lt=1, description="of all steps; null: 0.2 of one_cycle, else 0")
    poly_power: float = Field(0.9, gt=0)
    max_gradient_norm: float | None = Field(None, gt=0, description="longer gradients are shortened to this")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="score and keep a moving average of the weights")
    early_stopping_epochs: int | None = Field(None, ge=1, description="stop after as many without a better score")

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    channels_last: bool = True
    compile: bool = Field(False, description="torch.compile: slow to start, then faster on GPUs")
    gradient_checkpointing: bool = Field(False, description="compute the encoder twice to need less memory")
    sync_batchnorm: bool = Field(False, description="statistics of the global batch instead of a worker's share")
    sharding: Literal["none", "fsdp"] = Field("none", description="fsdp: weights and optimizer split over workers")
    deterministic: bool = Field(False, description="on GPUs too, the same bits each time; slower")

    num_train_workers: int = Field(1, ge=1)
    min_train_workers: int | None = Field(None, ge=1, description="go on with as few when nodes are lost")
    use_gpu: bool = False
    max_failures: int = Field(3, ge=0, description="how often lost workers are replaced before the run gives up")
    stall_timeout_s: float = Field(600, gt=0, description="a worker that does not move for so long ends the run")
    checkpoint_every_steps: int | None = Field(None, ge=1, description="besides the end of each epoch")
    num_best_checkpoints: int = Field(1, ge=1, description="kept besides the newest")

    eval_every_epochs: int = Field(1, ge=1, description="and after the last")
    eval_batch_size: int = Field(8, ge=1, description="images per evaluation batch and worker")
    num_decode_threads: int = Field(2, ge=1, description="threads that read, decode and augment, in each worker")
    cache_bytes: int = Field(2**30, ge=0, description="memory of each worker for decoded samples")
    cache_disk_bytes: int = Field(
        0, ge=0, description="disk of each worker, in TMPDIR, for decoded samples beyond these"
    )

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        parts = self.num_train_workers * self.num_accumulation_steps
        if self.global_batch_size % parts:
            raise ValueError(
                f"global_batch_size: {self.global_batch_size} cannot be shared evenly by num_train_workers: "
                f"{self.num_train_workers} times num_accumulation_steps: {self.num_accumulation_steps}; "
                f"choose a multiple of {parts}"
            )
        if (self.min_train_workers or 1) > self.num_train_workers:
            raise ValueError(f"min_train_workers: expected at most num_train_workers: {self.num_train_workers}")
        return self


class TrackingSettings(Section):
    """Where metrics go besides metrics.csv."""

    tensorboard: bool = Field(False, description="event files in the folder tensorboard of the output")
    mlflow_uri: str | None = Field(None, description="tracking server, or file: URI of a folder")
    mlflow_experiment: str = "segray"
