"""Build the optimizer and the learning-rate schedule, and average the weights over steps."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler

from segray.config import TrainSettings
from segray.models.build import SegmentationModel
from segray.models.layer_decay import compute_layer_factors

_ONE_CYCLE_WARM_UP = 0.2  # Fraction of all steps in which the one-cycle schedule rises to its peak, by default.
# Parts of names such as pos_embed, rel_pos_h, height_rel, relative_position_bias_table, attention_biases and cls_token.
_NOT_DECAYED = ("pos", "_rel", "bias", "token")
_WARM_UP_START = 1e-2  # Learning rate at the start of a linear warm-up, relative to the peak.


def build_optimizer(model: SegmentationModel, settings: TrainSettings) -> torch.optim.Optimizer:
    """Build AdamW, or SGD with Nesterov momentum, over all parameters that are not frozen.

    Both are fused: only fused optimizers can skip a step that is not finite without the host waiting for the device.

    The encoder has its own learning rate, which ``layer_decay`` lowers layer by layer. Weight decay is not applied to
    parameters with one dimension (biases and the weights of normalisation layers), nor to positional embeddings, tables
    of attention biases, and class tokens: it would pull outputs towards 0 without making the network simpler.

    Raises:
        ConfigError: The encoder has no layers for ``layer_decay``.
    """
    factors = {id(parameter): 1.0 for parameter in model.encoder.parameters()}
    if settings.layer_decay is not None:
        factors = compute_layer_factors(model, settings.layer_decay)
    groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((factors.get(id(parameter)), _is_decayed(name, parameter)), []).append(parameter)
    options = [
        {
            "params": parameters,
            "lr": settings.learning_rate * (1.0 if factor is None else settings.encoder_lr_factor * factor),
            "weight_decay": settings.weight_decay if is_decayed else 0.0,
        }
        for (factor, is_decayed), parameters in groups.items()
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(options, lr=settings.learning_rate, fused=True)
    momentum = settings.momentum
    return _FusedSGD(options, lr=settings.learning_rate, momentum=momentum, nesterov=momentum > 0, fused=True)


class _FusedSGD(torch.optim.SGD):
    """SGD that can skip its first step, and whose parameters may be sharded.

    Torch's fused SGD allocates the momentum in the first step, and leaves it uninitialised if that step is skipped.
    """

    def __init__(self, params: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            if group["momentum"]:
                for parameter in group["params"]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters, unless ``found_inf`` is 1."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters if group["momentum"]]
            torch._fused_sgd_(
                [get_local(parameter) for parameter in parameters],
                [get_local(parameter.grad) for parameter in parameters],
                [get_local(buffer) for buffer in buffers],
                **{name: group[name] for name in ("weight_decay", "momentum", "lr", "dampening", "nesterov")},
                maximize=False,
                is_first_step=False,
                found_inf=getattr(self, "found_inf", None),
            )


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies to a parameter.

    timm's ``no_weight_decay`` cannot be asked, because a network that returns features of several stages does not have
    it. These parts of names occur in all its encoders with positional embeddings, and in no other weights.
    """
    own_name = name.rpartition(".")[2]
    return parameter.ndim > 1 and not any(part in own_name for part in _NOT_DECAYED)


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainSettings, num_steps: int
) -> lr_scheduler.LRScheduler:
    """Build the schedule over ``num_steps`` steps; the peak of each parameter group is its current learning rate.

    ``one_cycle`` is from Smith and Topin, "Super-Convergence", 2018; ``poly`` is (1 - step/steps) ** power, as in
    DeepLab.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    share = settings.warm_up_fraction
    if settings.schedule == "one_cycle":
        # torch divides by the length of the rise minus one step, so a run of a few steps needs a longer rise.
        rise = max(_ONE_CYCLE_WARM_UP if share is None else share, 1.5 / (num_steps + 1))
        return lr_scheduler.OneCycleLR(
            optimizer, peaks, total_steps=num_steps + 1, pct_start=rise, cycle_momentum=False
        )
    num_warm_up = round((share or 0.0) * num_steps)
    num_left = max(1, num_steps - num_warm_up)
    after: lr_scheduler.LRScheduler
    if settings.schedule == "poly":
        after = lr_scheduler.PolynomialLR(optimizer, num_left, settings.poly_power)
    elif settings.schedule == "cosine":
        after = lr_scheduler.CosineAnnealingLR(optimizer, num_left)
    else:
        after = lr_scheduler.ConstantLR(optimizer, 1.0, num_left)
    if not num_warm_up:
        return after
    warm_up = lr_scheduler.LinearLR(optimizer, _WARM_UP_START, total_iters=num_warm_up)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, after], [num_warm_up])


def load_schedule(schedule: lr_scheduler.LRScheduler, state: Mapping[str, Any]) -> None:
    """Set a schedule, and the learning rates of its optimizer, to a saved state of the same schedule."""
    schedule.load_state_dict(dict(state))
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate


def advance_schedule(schedule: lr_scheduler.LRScheduler, num_steps_done: int) -> None:
    """Bring a new schedule to the learning rates that it has after a number of steps.

    Step by step, because torch computes some schedules by recursion: only so are the rates the same to the last bit as
    those of a run that was never interrupted. 100,000 steps take some seconds.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that the optimizer has not made a step yet.
        for _ in range(num_steps_done):
            schedule.step()


def get_highest_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the current learning rate: the highest of all parameter groups."""
    return max(float(group["lr"]) for group in optimizer.param_groups)


class WeightAverage:
    """An exponential moving average of a model's parameters and BatchNorm statistics.

    The decay is limited to (1 + n) / (10 + n) after n steps, as in TensorFlow's ``ExponentialMovingAverage``, so that
    the random initial weights do not dominate the average early in a run.

    Args:
        model: The model to average; the averages are kept on the devices of its tensors.
        decay: Decay per step, once the limit above exceeds it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        tensors = [*model.parameters(), *model.buffers()]
        self._current = [get_local(tensor) for tensor in tensors if tensor.is_floating_point()]
        self.reset(0)

    def reset(self, num_steps: int) -> None:
        """Set the average to the model's current weights, and the number of averaged steps to ``num_steps``."""
        self._average = [tensor.detach().clone() for tensor in self._current]
        self._num_steps = num_steps

    @torch.no_grad()
    def update(self) -> None:
        """Add the model's current weights to the average; call this after each step."""
        decay = min(self._decay, (1 + self._num_steps) / (10 + self._num_steps))
        torch._foreach_lerp_(self._average, self._current, 1 - decay)
        self._num_steps += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the model's weights by the averaged ones while the block runs."""
        own = [tensor.detach().clone() for tensor in self._current]
        with torch.no_grad():
            torch._foreach_copy_(self._current, self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._current, own)


def get_local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this rank holds: the whole tensor, unless the model is sharded."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        local: torch.Tensor = tensor.to_local()
        return local
    return tensor
