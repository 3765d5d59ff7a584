"""Settings of optimisation, of the training workers, and of metric tracking."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from segray.config.section import Section

MAX_FOLDS = 100


class TrainSettings(Section):
    """Optimisation and execution of training.

    ``seed``, ``sampling``, ``global_batch_size``, ``optimizer``, ``learning_rate``, ``encoder_lr_factor``,
    ``layer_decay``, ``momentum`` and ``weight_decay`` belong to the run: a rerun into the same output must have the
    same. All others may differ; those that affect weights or scores are recorded with the step from which they applied.
    """

    num_epochs: int = Field(
        15,
        ge=1,
        description="Passes over the training images. A finished run continues if a rerun has more; the learning-rate "
        "schedule is then recomputed.",
    )
    time_budget_min: float | None = Field(
        None,
        gt=0,
        description="Minutes that training should take, instead of ``num_epochs``: the number of epochs is computed "
        "once, from some measured steps, and printed. Start-up and label check are not included. ``null``: no budget.",
    )
    global_batch_size: int = Field(
        16,
        ge=1,
        description="Images per optimizer step, over all workers. Must be a multiple of ``num_train_workers`` times "
        "``num_accumulation_steps``.",
    )
    num_accumulation_steps: int = Field(
        1,
        ge=1,
        description="Forward and backward passes per optimizer step. More passes need less memory. A run that "
        "continues with fewer workers (``min_train_workers``) makes more, so that none needs more memory than before.",
    )
    folds: Literal["groups"] | Annotated[int, Field(ge=2, le=MAX_FOLDS)] | None = Field(
        None,
        description="Cross-validate: train one model for each of this many parts of all images (train and val) on the "
        f"other parts, 2 to {MAX_FOLDS}, and score it on its part. ``groups``: one part for each group of "
        "``data.val.group_by``. Then train the model of the bundle on all images. ``null``: train once.",
    )
    seed: int = Field(0, ge=0, description="Seed of initial weights, sample order and augmentation.")
    sampling: Literal["uniform", "class_balanced"] = Field(
        "uniform",
        description="``uniform``: every training image once per epoch. ``class_balanced``: images with rare classes "
        "more often, the others less often, in as many steps (repeat factors of LVIS).",
    )

    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="Optimizer: ``adamw``, or ``sgd`` with Nesterov momentum."
    )
    learning_rate: float = Field(1e-3, gt=0, description="Highest learning rate of the schedule.")
    encoder_lr_factor: float = Field(
        1.0, ge=0, description="Learning rate of the encoder, as a multiple of ``learning_rate``."
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Factor, such as 0.75, by which each layer of the encoder learns more slowly than the layer "
        "after it: the layers of timm, or the stages of other encoders. ``null``: the same rate for all.",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of ``sgd``.")
    weight_decay: float = Field(
        1e-2,
        ge=0,
        description="Weight decay; not applied to biases, normalisation parameters, positional embeddings and tokens.",
    )
    schedule: Literal["one_cycle", "poly", "cosine", "constant"] = Field(
        "one_cycle", description="Learning-rate schedule over all steps."
    )
    warm_up_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of all steps in which the learning rate rises. ``null``: 0.2 for ``one_cycle``, else 0.",
    )
    poly_power: float = Field(
        0.9, gt=0, description="Exponent of the schedule ``poly``: ``(1 - step / steps) ** poly_power``."
    )
    max_gradient_norm: float | None = Field(
        None, gt=0, description="Clip the norm of the gradient to this value. ``null``: no clipping."
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay per step, such as 0.999, of an exponential moving average of the weights, which is then "
        "evaluated and written to the bundle. ``null``: no averaging.",
    )
    early_stopping_epochs: int | None = Field(
        None,
        ge=1,
        description="Stop after this many epochs without a better validation mean IoU. ``null``: run all epochs.",
    )

    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16",
        description="Number format of the network's arithmetic. ``bf16`` and ``fp16`` are mixed precision. ``bf16`` "
        "falls back to ``fp32`` if a worker's processor does not support it. On GPUs ``fp32`` is computed in TF32.",
    )
    channels_last: bool = Field(
        True, description="Store weights and activations with channels last, which is faster. Not used with ``fsdp``."
    )
    compile: bool = Field(False, description="Use ``torch.compile``: a slower start, then faster steps on GPUs.")
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute the activations of the encoder's blocks in the backward pass, to need less memory.",
    )
    sync_batchnorm: bool = Field(
        False, description="Compute BatchNorm statistics over the global batch instead of each worker's share."
    )
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="``fsdp``: split weights and optimizer state over the workers (FSDP2). ``none``: each has a full "
        "copy.",
    )
    deterministic: bool = Field(
        False, description="Use deterministic algorithms on GPUs, so that a rerun gives the same bits; slower."
    )

    num_train_workers: int = Field(1, ge=1, description="Number of training workers (ranks).")
    min_train_workers: int | None = Field(
        None,
        ge=1,
        description="Continue with as few workers as this if nodes are lost or unavailable. ``null``: all are "
        "required.",
    )
    use_gpu: bool = Field(
        False, description="Give each worker one GPU. ``false``: train on CPUs, one Ray CPU per worker."
    )
    max_failures: int = Field(
        3, ge=0, description="How often failed workers are replaced before the run ends with an error."
    )
    stall_timeout_s: float = Field(
        600,
        gt=0,
        description="Seconds without progress of any worker after which the run ends and names the stalled ranks.",
    )
    checkpoint_every_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between checkpoints within an epoch. ``null``: only one at the end of each epoch.",
    )
    log_every_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between rows of ``steps.csv``, which go to TensorBoard and MLflow too: loss, learning rate, "
        "gradient norm and speed of single steps. ``null``: only epochs are logged.",
    )
    num_best_checkpoints: int = Field(
        1, ge=1, description="Checkpoints with the highest scores to keep, besides the newest two."
    )

    recheck_labels: bool = Field(
        False,
        description="Check labels again that an earlier check, recorded in the output folder, found to have no faults. "
        "``false``: only if images, masks, splits or class values are others than in that check.",
    )
    eval_every_epochs: int = Field(
        1, ge=1, description="Epochs between evaluations on the validation split; the last epoch is always evaluated."
    )
    eval_batch_size: int = Field(8, ge=1, description="Images per evaluation batch and worker.")
    num_decode_threads: int | None = Field(
        None,
        ge=1,
        description="Threads per worker that decode and augment images. ``null``: the cores of the node, divided by "
        "its workers.",
    )
    num_prefetch_batches: int = Field(
        8,
        ge=1,
        description="Batches per worker that are read and decoded ahead of the step that takes them. A store with slow "
        "responses needs more, until 32 files are being read; each takes the memory of a batch.",
    )
    cache_bytes: int = Field(
        2**30,
        ge=0,
        description="Memory per worker, in bytes, that keeps decoded images for later epochs; all workers of a node "
        "read what any of them keeps.",
    )
    cache_disk_bytes: int = Field(
        0,
        ge=0,
        description="Disk space per worker, in bytes, in the folder ``TMPDIR``, for decoded images that do not fit "
        "into ``cache_bytes``.",
    )

    @field_validator("folds", mode="before")
    @classmethod
    def _check_folds(cls, value: Any) -> Any:
        if value is None or value == "groups" or (type(value) is int and 2 <= value <= MAX_FOLDS):
            return value
        raise ValueError(f"expected groups or a number from 2 to {MAX_FOLDS}, got {value!r}")

    @property
    def micro_batch_size(self) -> int:
        """Images per worker and forward pass."""
        return self.global_batch_size // (self.num_train_workers * self.num_accumulation_steps)

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.time_budget_min is not None and "num_epochs" in self.model_fields_set:
            raise ValueError(
                f"time_budget_min: expected either time_budget_min ({self.time_budget_min:g}) or num_epochs "
                f"({self.num_epochs}), got both; remove one"
            )
        if self.time_budget_min is not None and self.folds is not None:
            raise ValueError(
                f"time_budget_min: expected null with folds, whose runs need the same num_epochs; got "
                f"{self.time_budget_min:g}; set num_epochs instead"
            )
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        parts = self.num_train_workers * self.num_accumulation_steps
        if self.global_batch_size % parts:
            raise ValueError(
                f"global_batch_size: expected a multiple of {parts}, which is num_train_workers "
                f"({self.num_train_workers}) times num_accumulation_steps ({self.num_accumulation_steps}), "
                f"got {self.global_batch_size}"
            )
        if self.folds is not None and self.early_stopping_epochs is not None:
            raise ValueError(
                "early_stopping_epochs: expected null with folds, because stopping by the images that a fold holds "
                f"out would make their score too high; got {self.early_stopping_epochs}"
            )
        if (self.min_train_workers or 1) > self.num_train_workers:
            raise ValueError(
                f"min_train_workers: expected at most num_train_workers ({self.num_train_workers}), "
                f"got {self.min_train_workers}"
            )
        return self


class TrackingSettings(Section):
    """Where metrics are logged, in addition to ``metrics.csv`` in the output."""

    tensorboard: bool = Field(
        False, description="Write TensorBoard event files to the folder ``tensorboard`` of the output."
    )
    mlflow_uri: str | None = Field(
        None, description="URI of an MLflow tracking server, or a ``file:`` URI of a folder. ``null``: no MLflow."
    )
    mlflow_experiment: str = Field("segray", description="Name of the MLflow experiment; created if it does not exist.")
