"""Settings of the training loss."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from segray.config.section import Fraction, Section

LOSS_TERMS = ("ce", "dice", "focal", "lovasz", "jaccard", "tversky", "ohem")


class LossSettings(Section):
    """Training loss: a weighted sum of terms, as in ``loss: {ce: 1.0, dice: 1.0}``.

    ``ce`` and ``focal`` are means over the scored pixels of the global batch. The other terms are computed for each
    image and averaged over the images. Ignored pixels do not contribute. ``dice``, ``jaccard``, ``tversky`` and
    ``lovasz`` are means over the classes in the image's ground truth.
    """

    ce: float = Field(0.0, ge=0, description="Weight of cross-entropy. It is 1 if no term is given.")
    dice: float = Field(
        0.0,
        ge=0,
        description="Weight of the soft Dice loss, with the sum of probabilities, "
        "not of their squares, in the denominator.",
    )
    focal: float = Field(0.0, ge=0, description="Weight of the focal loss: cross-entropy that emphasises hard pixels.")
    lovasz: float = Field(0.0, ge=0, description="Weight of the Lovász-Softmax loss, a surrogate of IoU.")
    jaccard: float = Field(0.0, ge=0, description="Weight of the soft Jaccard (IoU) loss.")
    tversky: float = Field(
        0.0,
        ge=0,
        description="Weight of the Tversky loss: Dice with separate weights for false positives and negatives.",
    )
    ohem: float = Field(
        0.0, ge=0, description="Weight of online hard example mining: cross-entropy of the hard pixels of each image."
    )
    class_weights: Literal["auto"] | tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None,
        description="Weight of each class in ``ce``, ``focal`` and ``ohem``, in the order of ``class_names``. "
        "``auto``: median frequency balancing, from the label check. ``null``: all classes weigh the same.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Label smoothing of ``ce``: the probability moved from the true class to all classes.",
    )
    focal_gamma: float = Field(
        2.0,
        ge=1,
        description="Exponent of ``focal``; a larger value gives less weight to pixels that are already classified "
        "correctly.",
    )
    tversky_alpha: Fraction = Field(0.3, description="Weight of false positives in ``tversky``, 0 to 1.")
    tversky_beta: Fraction = Field(0.7, description="Weight of false negatives in ``tversky``, 0 to 1.")
    ohem_threshold: float = Field(
        0.7,
        gt=0,
        lt=1,
        description="``ohem``: a pixel is hard if the probability of its true class is below this value.",
    )
    ohem_min_kept: float = Field(
        0.0625,
        gt=0,
        le=1,
        description="``ohem``: share of an image's scored pixels, 0 to 1, that always count, hardest first.",
    )

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
            raise ValueError("tversky_alpha, tversky_beta: expected at least one above 0, got 0 and 0")
        if isinstance(self.class_weights, tuple) and not any(self.class_weights):
            raise ValueError(f"class_weights: expected at least one above 0, got {list(self.class_weights)}")
        return self

    @property
    def terms(self) -> dict[str, float]:
        """The terms with a weight above 0, with their weights."""
        return {name: weight for name in LOSS_TERMS if (weight := getattr(self, name)) > 0}
