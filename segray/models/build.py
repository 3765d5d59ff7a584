"""One way to every network: ``build_model`` gives a module from (N, 3, H, W) to logits (N, C, H, W) at any size."""

import difflib

import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.encoders import encoders
from torch import nn
from torch.nn import functional

from segray.config import ModelConfig
from segray.errors import ConfigError, flatten_message
from segray.models.classic_unet import ClassicUNet
from segray.models.fcn import FCN, FCN_STRIDES
from segray.models.segnet import SegNet

# Every network here halves its input five times at most; other sizes are padded to a multiple and cropped back.
STRIDE = 32
SMP_ARCHITECTURES = tuple(smp.MODEL_ARCHITECTURES_MAPPING)
_CLASSIC_UNET, _SEGNET = "classic_unet", "segnet"
ARCHITECTURES = (_CLASSIC_UNET, *FCN_STRIDES, _SEGNET, *SMP_ARCHITECTURES)
_VGG_ENCODERS = tuple(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn"))
_OPTIONS = {"dpt": {"dynamic_img_size": True}}  # else a vision transformer takes one size only
PROBE_SIZE = 128  # the smallest that every architecture takes (PAN pools its stride-16 features three times)


class SegmentationModel(nn.Module):
    """A network for any image size.

    Attributes:
        network: The wrapped module; its ``encoder`` is what ``freeze_encoder`` freezes.
    """

    def __init__(self, network: nn.Module, freeze_encoder: bool = False) -> None:
        super().__init__()
        self.network = network
        self._encoder_is_frozen = freeze_encoder
        if freeze_encoder:
            self.encoder.requires_grad_(False)

    @property
    def encoder(self) -> nn.Module:
        """The part that may be pretrained."""
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
        """Set training mode; a frozen encoder stays in evaluation mode, so that BatchNorm keeps its statistics."""
        super().train(mode)
        if self._encoder_is_frozen:
            self.encoder.eval()
        return self


def freeze_unused_parameters(model: SegmentationModel) -> None:
    """Freeze parameters that no logit depends on, such as encoder stages past the depth that a decoder asks for.

    DistributedDataParallel would wait for their gradients, and weight decay would shrink them for nothing.
    """
    was_training = model.training
    model.eval()  # so that BatchNorm statistics stay as they are
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logits_nchw = model(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))
    gradients = torch.autograd.grad(logits_nchw.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    model.train(was_training)


def check_model(config: ModelConfig, num_classes: int) -> SegmentationModel:
    """Refuse what ``build_model`` would, weights that cannot be reached excepted; return a network without weights.

    Raises:
        ConfigError: Names the setting, and what can be had.
    """
    _check_names(config)
    with torch.device("meta"):
        return build_model(config.model_copy(update={"encoder_weights": None}), num_classes)


def _check_names(config: ModelConfig) -> None:
    arch, encoder = config.arch.lower(), config.encoder_name
    if arch not in ARCHITECTURES:
        raise ConfigError(f"model.arch: unknown architecture {config.arch!r}; choose from {', '.join(ARCHITECTURES)}")
    if arch in (*FCN_STRIDES, _SEGNET) and encoder not in _VGG_ENCODERS:
        raise ConfigError(
            f"model.encoder_name: {arch} needs a VGG encoder, got {encoder!r}; choose from {', '.join(_VGG_ENCODERS)}"
        )
    if arch == _CLASSIC_UNET:
        if config.encoder_weights is not None or config.freeze_encoder:
            raise ConfigError(
                f"model: {arch} learns its own encoder; set encoder_weights: null and freeze_encoder: false, "
                "or arch: unet for an encoder by name"
            )
        return
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
    """Build a network with random weights, or with a pretrained encoder where ``encoder_weights`` says so.

    Args:
        config: Architecture and encoder.
        num_classes: Channels of the logits.

    Raises:
        ConfigError: An unknown name, a combination that the architecture cannot take, or weights that are not there.
    """
    _check_names(config)
    arch = config.arch.lower()
    try:
        if arch == _CLASSIC_UNET:
            network: nn.Module = ClassicUNet(config.widths, num_classes)
        elif arch == _SEGNET:
            network = SegNet(config.encoder_name, config.encoder_weights, num_classes)
        elif arch in FCN_STRIDES:
            network = FCN(arch, config.encoder_name, config.encoder_weights, num_classes)
        else:
            network = smp.create_model(
                arch,
                encoder_name=config.encoder_name,
                encoder_weights=config.encoder_weights,
                in_channels=3,
                classes=num_classes,
                **_OPTIONS.get(arch, {}),
            )
    except OSError as error:  # the hub cannot be reached
        raise ConfigError(
            f"model.encoder_weights: cannot load {config.encoder_weights!r} for {config.encoder_name}: "
            f"{flatten_message(error)[:300]}; give this machine access to the model hub, or set null"
        ) from error
    except (KeyError, ValueError, AssertionError, AttributeError) as error:
        raise ConfigError(
            f"model: {arch} cannot be built on {config.encoder_name} with encoder_weights {config.encoder_weights}: "
            f"{flatten_message(error)[:300]}"
        ) from error
    return SegmentationModel(network, config.freeze_encoder)
