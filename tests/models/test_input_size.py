"""The size that images are padded to, and how it is found for encoders of each kind."""

from typing import Any

import pytest
import torch
from torch import nn

from segray.models.input_size import EncoderFit, InputSize, find_fit

SIZE = (96, 160)


class Encoder(nn.Module):
    """A network of 4 classes that accepts multiples of ``stride``, and only one size if ``fixed`` is given."""

    def __init__(self, stride: int = 32, fixed: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.stride, self.fixed = stride, fixed
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, image_nchw: torch.Tensor) -> torch.Tensor:
        size = tuple(image_nchw.shape[-2:])
        if any(side % self.stride for side in size) or self.fixed not in (None, size):
            raise AssertionError(f"does not accept {size}")
        logits_nchw: torch.Tensor = self.head(image_nchw)
        return logits_nchw


def build_plain() -> nn.Module:
    return Encoder()


def build_swin(dynamic_img_size: bool = False) -> nn.Module:
    return Encoder(fixed=None if dynamic_img_size else (224, 224))


def build_maxvit(img_size: tuple[int, int] | None = None) -> nn.Module:
    return Encoder(fixed=img_size) if img_size else Encoder(stride=224)


def build_halonet() -> nn.Module:
    return Encoder(stride=256)


def fit(build: Any, size: tuple[int, int] = SIZE, is_vit: bool = False) -> EncoderFit:
    return find_fit(lambda options: build(**options), is_vit, size, 4)


@pytest.mark.parametrize(
    ("build", "size", "expected"),
    [
        (build_plain, SIZE, EncoderFit()),
        (build_swin, SIZE, EncoderFit(options={"dynamic_img_size": True})),
        (build_swin, (224, 224), EncoderFit(options={"dynamic_img_size": True})),
        (build_maxvit, (150, 200), EncoderFit(InputSize(fixed=(160, 224)), {"img_size": (160, 224)})),
        (build_maxvit, SIZE, EncoderFit(InputSize(fixed=(128, 160)), {"img_size": (128, 160)})),
        (build_maxvit, (448, 224), EncoderFit(InputSize(fixed=(448, 224)))),
        (build_halonet, SIZE, EncoderFit(InputSize(stride=256))),
    ],
)
def test_the_first_options_that_accept_the_image_size_are_chosen(
    build: Any, size: tuple[int, int], expected: EncoderFit
) -> None:
    assert fit(build, size) == expected


def test_a_vision_transformer_is_first_tried_with_a_dynamic_size() -> None:
    assert fit(build_swin, (224, 224), is_vit=True).options == {"dynamic_img_size": True}
    assert fit(build_plain, is_vit=True).options == {}


def test_a_network_that_accepts_no_size_is_refused_with_its_own_reason() -> None:
    with pytest.raises(ValueError, match=r"^does not accept \(96, 160\)$"):
        fit(lambda: Encoder(stride=37))
    with pytest.raises(ValueError, match="expected"):  # The logits have 4 channels.
        find_fit(lambda options: build_plain(), False, SIZE, 5)


@pytest.mark.parametrize(
    ("input_size", "size", "padding"),
    [
        (InputSize(), (64, 96), (0, 0, 0, 0)),
        (InputSize(), (40, 33), (0, 31, 0, 24)),
        (InputSize(stride=256), (256, 257), (0, 255, 0, 0)),
        (InputSize(fixed=(160, 224)), (150, 224), (0, 0, 0, 10)),
    ],
)
def test_images_are_padded_to_the_right_and_below(
    input_size: InputSize, size: tuple[int, int], padding: tuple[int, ...]
) -> None:
    assert input_size.compute_padding(*size) == padding


def test_an_image_larger_than_the_fixed_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at most image_size, padded to 160x224; got 161x224"):
        InputSize(fixed=(160, 224)).compute_padding(161, 224)
