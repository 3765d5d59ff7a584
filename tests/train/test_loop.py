"""The learning-rate schedule, for runs of any length."""

import math

import pytest
import torch
from torch import nn

from segray.config import TrainSettings
from segray.train.loop import build_optimizer


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 6, 7, 10, 40])
def test_the_rate_climbs_to_its_peak_and_falls_in_a_run_of_any_length(num_steps: int) -> None:
    settings = TrainSettings(num_epochs=num_steps, global_batch_size=4, learning_rate=0.5)
    model = nn.Linear(1, 1)
    optimizer, schedule = build_optimizer(model, settings, num_samples=4)
    rates = []
    for _ in range(num_steps):
        rates.append(schedule.get_last_lr()[0])
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        schedule.step()  # raises past the planned number of steps
    assert all(math.isfinite(rate) and 0 < rate <= 0.5 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if num_steps >= 7:
        assert max(rates) > 0.45
        assert rates[-1] < 0.1 * max(rates)
