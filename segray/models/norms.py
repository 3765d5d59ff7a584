"""BatchNorm over the batch of all ranks."""

from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional

from segray.errors import ConfigError


class _SumOverRanks(torch.autograd.Function):
    """All-reduce that gradients go back through: what each rank adds is in the output of every rank."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


class GlobalBatchNorm2d(nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm``, which is for GPUs alone, on CPUs too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, H, W) by mean and variance over all ranks' N, H and W."""
        if input.device.type != "cpu":
            normalised: torch.Tensor = super().forward(input)
            return normalised
        momentum, running_mean, running_var = self.momentum, self.running_mean, self.running_var
        assert momentum is not None  # no network of smp averages over all batches
        if not self.training or running_mean is None or running_var is None or not distributed.is_initialized():
            return functional.batch_norm(
                input, running_mean, running_var, self.weight, self.bias, self.training, momentum, self.eps
            )
        values = input.double()
        sums = torch.cat([values.sum((0, 2, 3)), values.square().sum((0, 2, 3)), values.new_tensor([values[:, 0].numel()])])
        totals = _SumOverRanks.apply(sums)  # type: ignore[no-untyped-call]
        count = totals[-1].detach()
        mean, mean_square = (totals[:-1] / count).chunk(2)
        variance = mean_square - mean.square()
        if self.track_running_stats:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean), momentum)
                running_var.lerp_((variance * count / (count - 1)).to(running_var), momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        factor = self.weight.double() / (variance + self.eps).sqrt()
        shift = self.bias.double() - mean * factor
        return (values * factor[:, None, None] + shift[:, None, None]).to(input.dtype)


def synchronise_norms(model: nn.Module) -> None:
    """Replace each BatchNorm of a model by one over the batch of all ranks, in place; weights keep their names.

    Raises:
        ConfigError: The model has a kind of BatchNorm that cannot be replaced.
    """
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm) is nn.BatchNorm2d:
                other = GlobalBatchNorm2d(norm.num_features, norm.eps, norm.momentum or 0.1)
                other.load_state_dict(norm.state_dict())
                other.train(norm.training)
                for parameter, own in zip(other.parameters(), norm.parameters(), strict=True):
                    parameter.requires_grad_(own.requires_grad)
                setattr(module, name, other)
            elif isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, nn.SyncBatchNorm):
                raise ConfigError(
                    f"train.sync_batchnorm: this encoder normalises with {type(norm).__name__}, which cannot be "
                    "synchronised; set false, or choose another encoder"
                )
