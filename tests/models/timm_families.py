"""Which encoders of timm work: the smallest member of every family, with U-Net and with DPT.

``make encoders`` writes ``docs/reference/encoders.yaml``, which the documentation shows as a table, in half an hour: a
network is in it only after a real forward and backward pass.
``python -m tests.models.timm_families FAMILY …`` updates only the families named.
"""

import sys
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from segray.config import ModelConfig
from segray.errors import ConfigError
from segray.models.build import build_model, check_model, freeze_unused_parameters
from segray.models.input_size import InputSize
from segray.models.meta_device import build_on_meta

TABLE = Path(__file__).parents[2] / "docs/reference/encoders.yaml"
ARCHITECTURES = ("unet", "dpt")
SIZE = (160, 192)  # Neither side is a multiple of a window of 7 or 8 features at stride 32.
NUM_CLASSES = 4


def list_families() -> list[str]:
    """Return timm's families, which are its modules with models other than those for timm's own tests."""
    return [name for name in timm.list_modules() if _list_models(name)]


def load_table() -> dict[str, dict[str, str]]:
    """Return the table: for each family the ``encoder``, and what each architecture accepts on it."""
    loaded: dict[str, dict[str, str]] = yaml.safe_load(TABLE.read_text()) if TABLE.exists() else {}
    return loaded


def describe_fit(arch: str, encoder: str) -> str:
    """Return which image sizes an architecture accepts on an encoder, for the table; ``no`` if it cannot be built."""
    try:
        model = check_model(ModelConfig(arch=arch, encoder_name=encoder), NUM_CLASSES, SIZE)
    except ConfigError:
        return "no"
    if model.input_size.fixed:
        return "image_size"
    return "any" if model.input_size == InputSize() else f"any, padded to {model.input_size.stride}"


def require_contract(arch: str, encoder: str, size: tuple[int, int]) -> None:
    """Check that images are mapped to logits of their size, and that each weight to train has a gradient."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(arch=arch, encoder_name=encoder), NUM_CLASSES, size).train()
    freeze_unused_parameters(model)
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, NUM_CLASSES, *size)
    assert torch.isfinite(logits).all()
    logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def survey(family: str) -> dict[str, str]:
    """Return the row of a family."""
    encoder = f"tu-{_find_smallest(family)}"
    row = {"encoder": encoder, **{arch: describe_fit(arch, encoder) for arch in ARCHITECTURES}}
    for arch in ARCHITECTURES:
        if row[arch] != "no":
            require_contract(arch, encoder, SIZE)
    return row


def _list_models(family: str) -> list[str]:
    models: list[str] = timm.list_models(module=family, exclude_filters=["test_*"])
    return models


def _find_smallest(family: str) -> str:
    return min(_list_models(family), key=lambda name: (_count_weights(name), name))


def _count_weights(name: str) -> int:
    build: Any = timm.create_model
    return sum(parameter.numel() for parameter in build_on_meta(lambda: build(name)).parameters())


def main() -> None:
    """Update the table, and print each row."""
    torch.set_num_threads(1)
    for family in sys.argv[1:] or list_families():
        table = {**load_table(), family: survey(family)}
        print(family, table[family], flush=True)
        TABLE.write_text(yaml.safe_dump({name: table[name] for name in list_families() if name in table}))


if __name__ == "__main__":
    main()
