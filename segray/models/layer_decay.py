"""Layer-wise learning-rate decay: the layers of a pretrained encoder learn the more slowly, the closer to the image.

Source: Clark et al., "ELECTRA", 2020; for images Bao, Dong, Piao and Wei, "BEiT: BERT Pre-Training of Image
Transformers", 2021. The layers and their factors are those of timm's ``param_groups_layer_decay``: the decoder takes
the place of timm's classifier, whose factor is 1, and the last layer of the encoder has the factor ``decay``.
"""

import re

from segray.errors import ConfigError
from segray.models.build import SegmentationModel
from segray.models.meta_device import build_on_meta

# Names of the modules that smp, and ``RescaledEncoder``, put around a model of timm.
_WRAPPERS = re.compile(r"^(vit\.)?(model\.)+")


def compute_layer_factors(model: SegmentationModel, decay: float) -> dict[int, float]:
    """Return the factor of the learning rate of each parameter of the encoder, by the parameter's ``id``.

    Encoders of timm have the layers that timm defines, in vision transformers each block. The encoders of
    segmentation-models-pytorch that know their stages of strides 16 and 32 have three: these two, and what is before.

    Raises:
        ConfigError: The encoder has neither, such as VGG, or its layers are not known to timm.
    """
    encoder = model.encoder
    inner = getattr(encoder, "vit", encoder)
    if isinstance(name := getattr(inner, "name", None), str):
        factors = _list_timm_factors(name, decay)
        named = [(_WRAPPERS.sub("", name).replace(".", "_"), value) for name, value in encoder.named_parameters()]
        is_one_layer = len(set(factors.values())) < 2 and decay != 1
        if is_one_layer or sum(name in factors for name, _ in named) < len(named) / 2:
            raise ConfigError(
                "train.layer_decay: timm does not say which layers this encoder has; set null and use "
                "train.encoder_lr_factor, or choose another encoder"
            )
        return {id(parameter): factors.get(name, decay) for name, parameter in named}
    try:
        stages = inner.get_stages()  # type: ignore[operator]
    except (AttributeError, NotImplementedError) as error:
        raise ConfigError(
            "train.layer_decay: this encoder has no stages; set null and use train.encoder_lr_factor, or choose an "
            "encoder with stages, such as resnet18 or one of timm (tu-…)"
        ) from error
    by_stride = [stages[stride] for stride in sorted(stages)]
    found = {id(parameter): decay ** (len(by_stride) + 1) for parameter in encoder.parameters()}
    for number, modules in enumerate(by_stride):
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            found[id(parameter)] = decay ** (len(by_stride) - number)
    return found


def _list_timm_factors(name: str, decay: float) -> dict[str, float]:
    """Return timm's factor of each parameter of a whole model, by its name with underscores in place of dots.

    A network that returns features of several stages has other names only in that some dots are underscores.
    """
    import timm
    from timm.optim import param_groups_layer_decay

    reference = build_on_meta(lambda: timm.create_model(name))
    groups = param_groups_layer_decay(reference, layer_decay=decay)
    factors: dict[int, float] = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    return {
        parameter_name.replace(".", "_"): factors[id(parameter)]
        for parameter_name, parameter in reference.named_parameters()
        if id(parameter) in factors
    }
