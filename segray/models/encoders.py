"""Check the encoder of a configuration: its name, its pretrained weights, and whether freezing it makes sense."""

import difflib

from segray.config import ModelConfig
from segray.errors import ConfigError

TIMM_PREFIX = "tu-"  # Encoders of timm, through the universal encoder of segmentation-models-pytorch.
TIMM_DEFAULT_WEIGHTS = "imagenet"  # For a timm encoder: the weights of the tag in its name, or timm's default ones.


def check_encoder(config: ModelConfig) -> None:
    """Check that the encoder exists and has the pretrained weights of the configuration; nothing is downloaded.

    Raises:
        ConfigError: Names the setting and the accepted values.
    """
    name = config.encoder_name
    if name.startswith(TIMM_PREFIX):
        _check_timm_encoder(name, config.encoder_weights)
        return
    from segmentation_models_pytorch.encoders import encoders

    if name not in encoders:
        close = difflib.get_close_matches(name, encoders, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see segmentation-models-pytorch's list of encoders"
        raise ConfigError(f"model.encoder_name: unknown encoder {name!r}; {hint}")
    pretrained = encoders[name]["pretrained_settings"]
    if config.encoder_weights is not None and config.encoder_weights not in pretrained:
        raise ConfigError(
            f"model.encoder_weights: {name} has no weights {config.encoder_weights!r}; "
            f"choose from {', '.join(pretrained)}, or null"
        )


def check_freezing(config: ModelConfig) -> None:
    """Check that an encoder is frozen only with pretrained weights: frozen random weights never learn anything.

    Only new runs are checked. A bundle contains the weights, so it is built without pretrained ones.

    Raises:
        ConfigError: The encoder would stay random.
    """
    if config.freeze_encoder and config.encoder_weights is None:
        raise ConfigError(
            "model.freeze_encoder: true needs pretrained weights, but model.encoder_weights is null, so the encoder "
            "would stay random; set encoder_weights, such as imagenet, or freeze_encoder: false"
        )


def _check_timm_encoder(name: str, weights: str | None) -> None:
    import timm
    from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, is_model_pretrained, split_model_name_tag

    model_name = name.removeprefix(TIMM_PREFIX)
    arch, tag = split_model_name_tag(model_name)
    if not timm.is_model(model_name):
        close = difflib.get_close_matches(arch, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(TIMM_PREFIX + other for other in close)}?" if close else ""
        raise ConfigError(f"model.encoder_name: timm has no model {arch!r}{hint}")
    tagged = list(get_arch_pretrained_cfgs(arch))
    if tag and model_name not in tagged:
        known = ", ".join(TIMM_PREFIX + other for other in tagged) or "no weights"
        raise ConfigError(f"model.encoder_name: timm has no weights {tag!r} for {arch}; it has {known}")
    if weights is None:
        return
    if not is_model_pretrained(model_name):
        raise ConfigError(f"model.encoder_weights: timm has no pretrained weights for {arch}; set null")
    own = tag or get_pretrained_cfg(model_name).tag
    if weights not in (TIMM_DEFAULT_WEIGHTS, own):
        raise ConfigError(
            f"model.encoder_weights: {name} has no weights {weights!r}; choose {TIMM_DEFAULT_WEIGHTS} for {own}, or "
            f"null; timm's weights are chosen by encoder_name: {', '.join(TIMM_PREFIX + other for other in tagged)}"
        )
