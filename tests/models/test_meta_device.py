"""Building and running networks on the meta device."""

import pytest
import torch
from torch import nn

from segray.models.meta_device import build_on_meta, run_on_meta


def test_a_constructor_may_read_the_values_of_linspace() -> None:
    rates: list[float] = []

    def build() -> nn.Module:
        rates.extend(value.item() for value in torch.linspace(0, 1, 3))
        return nn.Conv2d(3, 4, 1)

    assert next(build_on_meta(build).parameters()).is_meta
    assert rates == [0, 0.5, 1]  # Called once: not built on the CPU.


def test_a_constructor_that_reads_other_values_is_run_on_the_cpu() -> None:
    def build() -> nn.Module:
        return nn.Conv2d(3, int(torch.ones(4).sum().item()), 1)

    assert next(build_on_meta(build).parameters()).is_meta


def test_logits_of_another_shape_are_refused() -> None:
    model = build_on_meta(lambda: nn.Conv2d(3, 4, 1, stride=2))
    with pytest.raises(ValueError, match=r"the logits have shape \(1, 4, 16, 16\), expected \(1, 4, 32, 32\)"):
        run_on_meta(model, (32, 32), 4)
