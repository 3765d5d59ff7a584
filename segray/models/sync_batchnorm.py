"""BatchNorm over the global batch of all ranks, on CPUs and GPUs."""

from typing import Any

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segray.errors import ConfigError


class _SumOverRanks(torch.autograd.Function):
    """All-reduce (sum) with a gradient: each rank's input is part of every rank's output, so gradients are summed."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """The counterpart for CPUs of ``torch.nn.SyncBatchNorm``, which supports only GPUs.

    It is not a subclass, because DistributedDataParallel rejects any ``SyncBatchNorm`` on CPUs.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, H, W); in training with the mean and variance over N, H and W of all ranks.

        Raises:
            ValueError: In training, there is only one value per channel over all ranks.
        """
        if not self.training:
            return super().forward(input)
        values = input.double()
        num_values = values.new_tensor([values[:, 0].numel()])
        sums = torch.cat([values.sum((0, 2, 3)), values.square().sum((0, 2, 3)), num_values])
        # A single process uses the same formula as many: different rounding would make runs diverge in a few steps.
        totals = _SumOverRanks.apply(sums) if distributed.is_initialized() else sums
        count = totals[-1].detach()
        if count <= 1:
            raise ValueError("expected more than 1 value per channel over all ranks when training")
        mean, mean_square = (totals[:-1] / count).chunk(2)
        variance = mean_square - mean.square()
        if self.track_running_stats:
            self._update_running_statistics(mean.detach(), variance.detach() * count / (count - 1))
        factor = self.weight.double() / (variance + self.eps).sqrt()
        shift = self.bias.double() - mean * factor
        normalised: torch.Tensor = values * factor[:, None, None] + shift[:, None, None]
        return normalised.to(input.dtype)

    def _update_running_statistics(self, mean: torch.Tensor, unbiased_variance: torch.Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var), self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


def synchronise_norms(model: nn.Module, device: torch.device) -> None:
    """Replace each BatchNorm of a model with one over the global batch, in place; parameters keep their names.

    Args:
        model: The model, before it is wrapped for data parallelism.
        device: The device that it will be trained on.

    Raises:
        ConfigError: The model has a BatchNorm of a kind that cannot be replaced.
    """
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if not isinstance(norm, _BatchNorm) or isinstance(norm, nn.SyncBatchNorm | GlobalBatchNorm2d):
                continue
            if not _can_be_replaced(norm):
                raise ConfigError(
                    f"train.sync_batchnorm: this network uses a {type(norm).__name__} that cannot be synchronised; "
                    "set false, or choose another encoder"
                )
            kind = GlobalBatchNorm2d if device.type == "cpu" else nn.SyncBatchNorm
            other = kind(norm.num_features, norm.eps, norm.momentum, device=norm.weight.device)
            other.load_state_dict(norm.state_dict())
            other.train(norm.training)
            for parameter, own in zip(other.parameters(), norm.parameters(), strict=True):
                parameter.requires_grad_(own.requires_grad)
            setattr(module, name, other)


def _can_be_replaced(norm: nn.Module) -> bool:
    # A subclass may do more than normalise: timm's BatchNormAct2d includes an activation.
    return type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None
