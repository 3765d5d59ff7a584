"""Settings of the network."""

from typing import Annotated

from pydantic import Field

from segray.config.section import Section


class ModelConfig(Section):
    """Network architecture.

    Available are the architectures of segmentation-models-pytorch with any of its encoders; ``fcn8s``, ``fcn16s``,
    ``fcn32s`` and ``segnet`` with a VGG encoder; and ``classic_unet``, which has no separate encoder.
    """

    arch: str = Field(
        "unet",
        description="Architecture: ``unet``, ``unetplusplus``, ``manet``, ``linknet``, ``fpn``, ``pspnet``, "
        "``deeplabv3``, ``deeplabv3plus``, ``pan``, ``upernet``, ``segformer``, ``dpt``, ``fcn8s``, ``fcn16s``, "
        "``fcn32s``, ``segnet`` or ``classic_unet``.",
    )
    encoder_name: str = Field(
        "resnet18",
        description="Encoder, by its name in segmentation-models-pytorch, or ``tu-`` and the name of a timm model. "
        "``fcn8s``, ``fcn16s``, ``fcn32s`` and ``segnet`` need a VGG encoder; ``classic_unet`` ignores it.",
    )
    encoder_weights: str | None = Field(
        None,
        description="Pretrained weights of the encoder, such as ``imagenet``. The driver downloads them and writes "
        "them to the output, where the workers read them. ``null``: random initialisation. "
        "The weights of a timm model are part of its name (``tu-resnet18.a1_in1k``); set ``imagenet`` to load them.",
    )
    freeze_encoder: bool = Field(
        False,
        description="Keep the weights and BatchNorm statistics of the encoder fixed during training. Needs "
        "``encoder_weights``.",
    )
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64, 128, 256, 512, 1024),
        min_length=2,
        max_length=6,
        description="Channels of each level of ``classic_unet``, from full resolution down. Other architectures "
        "ignore it.",
    )

    @property
    def title(self) -> str:
        """The network for people: ``unet on resnet18``, or ``classic_unet``, which has no separate encoder."""
        return self.arch if self.arch.lower() == "classic_unet" else f"{self.arch} on {self.encoder_name}"
