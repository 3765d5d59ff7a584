"""Find the input sizes that an encoder of timm accepts, and the options that make it accept them.

Convolutional encoders accept any multiple of 32. Transformers differ: Swin and most ViTs accept other sizes than their
default only with ``dynamic_img_size``; MaxViT, BEiT, Hiera and others are built for one ``img_size``; HaloNet needs
multiples of its window. timm does not describe this, so candidates are run on the meta device.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from segray.errors import flatten_message
from segray.models.meta_device import build_on_meta, run_on_meta

STRIDE = 32  # Every network halves its input at most five times.
MIN_FIXED_PX = 128  # The smallest size that every architecture accepts (PAN pools its stride-16 features three times).
_WINDOW_STRIDES = (64, 128, 224, 256)  # Windows of 2, 4, 7 and 8 features at stride 32.
_PLAIN: dict[str, Any] = {}
_DYNAMIC: dict[str, Any] = {"dynamic_img_size": True}

Size = tuple[int, int]
BuildNetwork = Callable[[dict[str, Any]], nn.Module]


@dataclass(frozen=True)
class InputSize:
    """The sizes that a network accepts.

    Attributes:
        stride: Height and width must be multiples of this.
        fixed: The only height and width that the network accepts, or None.
    """

    stride: int = STRIDE
    fixed: Size | None = None

    def compute_padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the padding of an image of this size: left, right, top and bottom, in pixels, as ``torch`` expects it.

        Raises:
            ValueError: The image is larger than the fixed size.
        """
        if self.fixed is None:
            return (0, -width % self.stride, 0, -height % self.stride)
        padding = (0, self.fixed[1] - width, 0, self.fixed[0] - height)
        if min(padding) < 0:
            raise ValueError(
                f"this encoder accepts images of at most image_size, padded to {self.fixed[0]}x{self.fixed[1]}; "
                f"got {height}x{width}"
            )
        return padding


ANY_SIZE = InputSize()


@dataclass(frozen=True)
class EncoderFit:
    """How to build a network for images of a size.

    Attributes:
        input_size: The sizes that the network accepts.
        options: Arguments for the encoder.
    """

    input_size: InputSize = ANY_SIZE
    options: dict[str, Any] = field(default_factory=dict)


def find_fit(build: BuildNetwork, is_vit: bool, image_size: Size, num_classes: int) -> EncoderFit:
    """Return the first way to build a network that accepts images of ``image_size``.

    Candidates that accept any size come first. The result depends only on the arguments and the library versions, so
    the network of a bundle is built as it was for training.

    Args:
        build: Builds the network with options for its encoder, without pretrained weights.
        is_vit: Whether the architecture expects a vision transformer; ``dynamic_img_size`` is then tried first.
        image_size: Height and width in pixels.
        num_classes: Number of channels of the logits.

    Raises:
        ValueError: No candidate accepts the size; the message is the reason of the first one that could be built.
    """
    candidates = _Candidates(build, num_classes)
    for options in (_DYNAMIC, _PLAIN) if is_vit else (_PLAIN, _DYNAMIC):
        if candidates.accept(options, _list_sizes(image_size, STRIDE)):
            return EncoderFit(ANY_SIZE, options)
    fixed = round_up((max(image_size[0], MIN_FIXED_PX), max(image_size[1], MIN_FIXED_PX)), STRIDE)
    for options in (_PLAIN, {"img_size": fixed}):
        if candidates.accept(options, [fixed]):
            return EncoderFit(InputSize(fixed=fixed), options)
    for stride in _WINDOW_STRIDES:
        if candidates.accept(_PLAIN, _list_sizes(image_size, stride)):
            return EncoderFit(InputSize(stride), _PLAIN)
    raise ValueError(candidates.first_reason)


def round_up(size: Size, stride: int) -> Size:
    """Return height and width rounded up to multiples of ``stride``."""
    height, width = (side + -side % stride for side in size)
    return height, width


def _list_sizes(image_size: Size, stride: int) -> list[Size]:
    """Return the padded size, and a larger one, which a network for one size or for multiples of a window refuses."""
    height, width = round_up(image_size, stride)
    return [(height, width), (height + stride, width + 2 * stride)]


class _Candidates:
    """Builds networks on the meta device, each once, and remembers why they were refused."""

    def __init__(self, build: BuildNetwork, num_classes: int) -> None:
        self._build = build
        self._num_classes = num_classes
        self._networks: dict[str, nn.Module] = {}  # By the options that they were built with.
        self._reasons: list[str] = []

    @property
    def first_reason(self) -> str:
        """The first reason, if possible one that is not about an option that the encoder does not know."""
        return next((each for each in self._reasons if "unexpected keyword argument" not in each), self._reasons[0])

    def accept(self, options: dict[str, Any], sizes: list[Size]) -> bool:
        """Return whether the network with these options maps images of all sizes to logits."""
        key = repr(options)
        try:
            with warnings.catch_warnings(action="ignore"):
                if key not in self._networks:
                    self._networks[key] = build_on_meta(lambda: self._build(options))
                for size in sizes:
                    run_on_meta(self._networks[key], size, self._num_classes)
        except Exception as error:  # Networks raise many kinds of error for what they do not support.
            self._reasons.append(flatten_message(error))
            return False
        return True
