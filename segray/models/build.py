"""Build networks by name: each maps images (N, 3, H, W) of any size to logits (N, C, H, W).

segmentation-models-pytorch (smp) and timm take seconds to import, so they are imported only where a network needs them.
"""

import difflib

import torch
from torch import nn
from torch.nn import functional

from segray.config import ModelConfig
from segray.errors import ConfigError, flatten_message
from segray.models.classic_unet import ClassicUNet
from segray.models.fcn import FCN, FCN_STRIDES
from segray.models.segnet import SegNet

# Every network halves its input at most five times. Images are padded to a multiple of this, and logits cropped back.
STRIDE = 32
# These are the keys of smp.MODEL_ARCHITECTURES_MAPPING (a test compares them), listed so that smp is not imported here.
SMP_ARCHITECTURES = (
    "unet",
    "unetplusplus",
    "manet",
    "linknet",
    "fpn",
    "pspnet",
    "deeplabv3",
    "deeplabv3plus",
    "pan",
    "upernet",
    "segformer",
    "dpt",
)
_CLASSIC_UNET, _SEGNET = "classic_unet", "segnet"
ARCHITECTURES = (_CLASSIC_UNET, *FCN_STRIDES, _SEGNET, *SMP_ARCHITECTURES)
_VGG_ENCODERS = tuple(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn"))
_OPTIONS = {"dpt": {"dynamic_img_size": True}}  # Without this option a vision transformer accepts only one size.
PROBE_SIZE = 128  # The smallest size that every architecture accepts (PAN pools its stride-16 features three times).


class SegmentationModel(nn.Module):
    """A network that accepts any image size, by padding to a multiple of ``STRIDE`` and cropping the logits.

    Attributes:
        network: The wrapped module; ``freeze_encoder`` freezes its ``encoder``.
    """

    def __init__(self, network: nn.Module, freeze_encoder: bool = False) -> None:
        super().__init__()
        self.network = network
        self._encoder_is_frozen = freeze_encoder
        if freeze_encoder:
            self.encoder.requires_grad_(False)

    @property
    def encoder(self) -> nn.Module:
        """The part of the network that can be pretrained."""
        return self.network.get_submodule("encoder")

    def forward(self, image_nchw: torch.Tensor) -> torch.Tensor:
        """Map normalised images (N, 3, H, W) to logits (N, C, H, W)."""
        height, width = image_nchw.shape[-2:]
        padding = (0, -width % STRIDE, 0, -height % STRIDE)
        if any(padding):
            image_nchw = functional.pad(image_nchw, padding, mode="replicate")
        logits_nchw: torch.Tensor = self.network(image_nchw)
        return logits_nchw[..., :height, :width]

    def train(self, mode: bool = True) -> "SegmentationModel":
        """Set training mode; a frozen encoder stays in evaluation mode, which keeps its BatchNorm statistics fixed."""
        super().train(mode)
        if self._encoder_is_frozen:
            self.encoder.eval()
        return self


def freeze_unused_parameters(model: SegmentationModel) -> None:
    """Freeze parameters that no logit depends on, such as encoder stages deeper than the decoder uses.

    DistributedDataParallel would wait for their gradients, and weight decay would shrink them for no reason.
    """
    was_training = model.training
    model.eval()  # In evaluation mode the probe does not change BatchNorm statistics.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logits_nchw = model(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=parameters[0].device))
    gradients = torch.autograd.grad(logits_nchw.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    model.train(was_training)


def check_model(config: ModelConfig, num_classes: int) -> SegmentationModel:
    """Build the network without weights, on the meta device if possible, to check the settings before loading anything.

    The only error that it cannot detect is that the pretrained weights cannot be downloaded.

    Raises:
        ConfigError: Names the setting and the accepted values.
    """
    _check_names(config)  # This imports smp if needed: inside the context below its constants would be meta tensors.
    without_weights = config.model_copy(update={"encoder_weights": None})
    try:
        with torch.device("meta"):
            return build_model(without_weights, num_classes)
    except RuntimeError:  # smp's MiT encoders read tensor values while they are built, and meta tensors have none.
        return build_model(without_weights, num_classes)


def _check_names(config: ModelConfig) -> None:
    arch = config.arch.lower()
    if arch not in ARCHITECTURES:
        raise ConfigError(f"model.arch: unknown architecture {config.arch!r}; choose from {', '.join(ARCHITECTURES)}")
    if arch in (*FCN_STRIDES, _SEGNET) and config.encoder_name not in _VGG_ENCODERS:
        raise ConfigError(
            f"model.encoder_name: {arch} needs a VGG encoder, got {config.encoder_name!r}; "
            f"choose from {', '.join(_VGG_ENCODERS)}"
        )
    if arch != _CLASSIC_UNET:
        _check_encoder(config)
    elif config.encoder_weights is not None or config.freeze_encoder:
        raise ConfigError(
            f"model: {arch} trains its own encoder; set encoder_weights: null and freeze_encoder: false, "
            "or arch: unet for a named encoder"
        )


def _check_encoder(config: ModelConfig) -> None:
    import timm
    from segmentation_models_pytorch.encoders import encoders

    encoder = config.encoder_name
    if encoder.startswith("tu-"):
        if not timm.is_model(encoder.removeprefix("tu-")):
            raise ConfigError(f"model.encoder_name: timm has no model {encoder.removeprefix('tu-')!r}")
        return
    if encoder not in encoders:
        close = difflib.get_close_matches(encoder, encoders, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see segmentation-models-pytorch's list of encoders"
        raise ConfigError(f"model.encoder_name: unknown encoder {encoder!r}; {hint}")
    pretrained = encoders[encoder]["pretrained_settings"]
    if config.encoder_weights is not None and config.encoder_weights not in pretrained:
        raise ConfigError(
            f"model.encoder_weights: {encoder} has no weights {config.encoder_weights!r}; "
            f"choose from {', '.join(pretrained)}, or null"
        )


def build_model(config: ModelConfig, num_classes: int) -> SegmentationModel:
    """Build a network with random weights, or with a pretrained encoder if ``encoder_weights`` is set.

    Args:
        config: Architecture and encoder.
        num_classes: Number of channels of the logits.

    Raises:
        ConfigError: A name is unknown, the architecture does not support the encoder, or the weights cannot be loaded.
    """
    _check_names(config)
    arch = config.arch.lower()
    try:
        network = _build_network(arch, config, num_classes)
    except OSError as error:  # The model hub cannot be reached.
        raise ConfigError(
            f"model.encoder_weights: cannot load {config.encoder_weights!r} for {config.encoder_name}: "
            f"{flatten_message(error)[:300]}; give this machine access to the model hub, or set null"
        ) from error
    except (KeyError, ValueError, TypeError, AssertionError, AttributeError) as error:
        raise ConfigError(
            f"model: {arch} cannot be built on {config.encoder_name} with encoder_weights {config.encoder_weights}: "
            f"{flatten_message(error)[:300]}"
        ) from error
    return SegmentationModel(network, config.freeze_encoder)


def _build_network(arch: str, config: ModelConfig, num_classes: int) -> nn.Module:
    if arch == _CLASSIC_UNET:
        return ClassicUNet(config.widths, num_classes)
    if arch == _SEGNET:
        return SegNet(config.encoder_name, config.encoder_weights, num_classes)
    if arch in FCN_STRIDES:
        return FCN(arch, config.encoder_name, config.encoder_weights, num_classes)
    import segmentation_models_pytorch as smp

    network: nn.Module = smp.create_model(
        arch,
        encoder_name=config.encoder_name,
        encoder_weights=config.encoder_weights,
        in_channels=3,
        classes=num_classes,
        **_OPTIONS.get(arch, {}),
    )
    return network
