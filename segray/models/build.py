"""Build networks by name: each maps images (N, 3, H, W) of any size to logits (N, C, H, W).

segmentation-models-pytorch (smp) and timm take seconds to import, so they are imported only where a network needs them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from segray.config import ModelConfig
from segray.errors import ConfigError, flatten_message
from segray.models.classic_unet import ClassicUNet
from segray.models.dpt import rescale_odd_patches
from segray.models.encoders import TIMM_PREFIX, check_encoder, check_freezing
from segray.models.fcn import FCN, FCN_STRIDES
from segray.models.input_size import ANY_SIZE, MIN_FIXED_PX, EncoderFit, InputSize, Size, find_fit
from segray.models.meta_device import build_on_meta, run_on_meta
from segray.models.segnet import SegNet

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
_CLASSIC_UNET, _SEGNET, _DPT = "classic_unet", "segnet", "dpt"
ARCHITECTURES = (_CLASSIC_UNET, *FCN_STRIDES, _SEGNET, *SMP_ARCHITECTURES)
_VGG_ENCODERS = tuple(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn"))
PROBE_SIZE = MIN_FIXED_PX  # Every network accepts images of this size.
_MAX_REASON_LENGTH = 300


class SegmentationModel(nn.Module):
    """A network that accepts any image size, by padding to a size that suits its encoder and cropping the logits.

    Attributes:
        network: The wrapped module; ``freeze_encoder`` freezes its ``encoder``.
        input_size: The sizes that the wrapped module accepts. If that is one size, larger images are a ``ValueError``.
    """

    def __init__(self, network: nn.Module, freeze_encoder: bool = False, input_size: InputSize = ANY_SIZE) -> None:
        super().__init__()
        self.network = network
        self.input_size = input_size
        self._encoder_is_frozen = freeze_encoder
        if freeze_encoder:
            self.encoder.requires_grad_(False)

    @property
    def encoder(self) -> nn.Module:
        """The part of the network that can be pretrained."""
        return self.network.get_submodule("encoder")

    def get_pretrained(self) -> dict[str, torch.Tensor]:
        """Return the part of the state dict that pretrained weights replace: the encoder's, and FCN's fc6 and fc7."""
        layers = ("encoder", *getattr(self.network, "pretrained_layers", ()))
        prefixes = tuple(f"network.{layer}." for layer in layers)
        return {name: tensor for name, tensor in self.state_dict().items() if name.startswith(prefixes)}

    def forward(self, image_nchw: torch.Tensor) -> torch.Tensor:
        """Map normalised images (N, 3, H, W) to logits (N, C, H, W)."""
        height, width = image_nchw.shape[-2:]
        padding = self.input_size.compute_padding(height, width)
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


def check_model(config: ModelConfig, num_classes: int, image_size: Size) -> SegmentationModel:
    """Build the network on the meta device, without weights, and run it, to check the settings before anything starts.

    The only error that it cannot detect is that the pretrained weights cannot be downloaded.

    Args:
        config: Architecture and encoder.
        num_classes: Number of channels of the logits.
        image_size: Height and width of the model's input.

    Raises:
        ConfigError: Names the setting and the accepted values.
    """
    _check_names(config)  # This imports smp if needed, as build_on_meta requires.
    check_freezing(config)
    without_weights = config.model_copy(update={"encoder_weights": None})
    with _reported(without_weights, image_size):
        model = build_on_meta(lambda: _assemble(without_weights, num_classes, image_size))
    assert isinstance(model, SegmentationModel)
    check_size(model, num_classes, image_size, "image_size")
    return model


def check_size(model: SegmentationModel, num_classes: int, size: Size, setting: str) -> None:
    """Run a model of ``check_model`` on an image of a size, without computing anything.

    Raises:
        ConfigError: It does not return logits of that size; the message names the setting that the size is from.
    """
    try:
        run_on_meta(model, size, num_classes)
    except Exception as error:  # Networks raise many kinds of error for a size that they do not support.
        raise ConfigError(
            f"{setting}: the network of model does not support images of {size[0]}x{size[1]}: {_shorten(error)}; "
            "choose another size or network"
        ) from error


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
        check_encoder(config)
    elif config.encoder_weights is not None or config.freeze_encoder:
        raise ConfigError(
            f"model: {arch} trains its own encoder; set encoder_weights: null and freeze_encoder: false, "
            "or arch: unet for a named encoder"
        )


def build_model(
    config: ModelConfig, num_classes: int, image_size: Size = (PROBE_SIZE, PROBE_SIZE)
) -> SegmentationModel:
    """Build a network with random weights, or with a pretrained encoder if ``encoder_weights`` is set.

    Args:
        config: Architecture and encoder.
        num_classes: Number of channels of the logits.
        image_size: Height and width of the model's input. It matters only for encoders that are built for one size.

    Raises:
        ConfigError: A name is unknown, the architecture does not support the encoder, or the weights cannot be loaded.
    """
    _check_names(config)
    with _reported(config, image_size):
        return _assemble(config, num_classes, image_size)


@contextmanager
def _reported(config: ModelConfig, image_size: Size) -> Iterator[None]:
    """Report errors of libraries as a ``ConfigError`` that names the setting."""
    try:
        yield
    except OSError as error:  # The model hub cannot be reached.
        raise ConfigError(
            f"model.encoder_weights: cannot load {config.encoder_weights!r} for {config.encoder_name}: "
            f"{_shorten(error)}; give this machine access to the model hub, or set null"
        ) from error
    except (KeyError, ValueError, TypeError, AssertionError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"model: {config.arch.lower()} cannot be built on {config.encoder_name} with encoder_weights "
            f"{config.encoder_weights} for image_size {list(image_size)}: {_shorten(error)}; choose another encoder "
            "(docs/reference/encoders.md lists those of timm)"
        ) from error


def _shorten(error: BaseException) -> str:
    return flatten_message(error)[:_MAX_REASON_LENGTH]


def _assemble(config: ModelConfig, num_classes: int, image_size: Size) -> SegmentationModel:
    arch, name, weights = config.arch.lower(), config.encoder_name, config.encoder_weights
    fit = EncoderFit()
    network: nn.Module
    if arch == _CLASSIC_UNET:
        network = ClassicUNet(config.widths, num_classes)
    elif arch == _SEGNET:
        network = SegNet(name, weights, num_classes)
    elif arch in FCN_STRIDES:
        network = FCN(arch, name, weights, num_classes)
    else:
        if name.startswith(TIMM_PREFIX):
            fit = _find_fit(arch, name, num_classes, image_size)
        network = _build_smp_network(arch, name, weights, num_classes, fit.options)
    return SegmentationModel(network, config.freeze_encoder, fit.input_size)


@lru_cache
def _find_fit(arch: str, encoder_name: str, num_classes: int, image_size: Size) -> EncoderFit:
    def build(options: dict[str, Any]) -> nn.Module:
        return _build_smp_network(arch, encoder_name, None, num_classes, options)

    return find_fit(build, arch == _DPT, image_size, num_classes)


def _build_smp_network(
    arch: str, encoder_name: str, weights: str | None, num_classes: int, options: dict[str, Any]
) -> nn.Module:
    import segmentation_models_pytorch as smp

    is_timm = encoder_name.startswith(TIMM_PREFIX)
    network: nn.Module = smp.create_model(
        arch,
        encoder_name=encoder_name,
        encoder_weights=True if is_timm and weights else weights,  # smp warns of a name: timm's weights have none here.
        in_channels=3,
        classes=num_classes,
        **options,
    )
    if arch == _DPT:
        rescale_odd_patches(network)
    return network
