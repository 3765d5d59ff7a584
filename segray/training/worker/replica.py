"""Prepare the model for training on a rank: move it to its device, and wrap it in DDP or shard it with FSDP."""

import ray.train.torch
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from segray.config import TrainSettings
from segray.models.build import SegmentationModel, freeze_unused_parameters
from segray.models.gradient_checkpointing import find_blocks, recompute_encoder
from segray.models.precision import get_dtype
from segray.models.sync_batchnorm import synchronise_norms
from segray.training.worker.steps import rebuild_gradient_buckets


def build_replica(model: SegmentationModel, settings: TrainSettings, device: torch.device, precision: str) -> nn.Module:
    """Prepare a model in place for training; return the module to call: the model itself, or its DDP wrapper.

    Args:
        model: The model.
        settings: Settings of the run.
        device: Device of this rank.
        precision: ``bf16``, ``fp16`` or ``fp32``; see ``resolve_precision``.

    Raises:
        ConfigError: The network does not support a setting.
    """
    if settings.channels_last and settings.sharding == "none":  # FSDP does not support channels-last weights.
        model.to(memory_format=torch.channels_last)
    freeze_unused_parameters(model)
    if settings.sync_batchnorm:
        synchronise_norms(model, device)
    if settings.gradient_checkpointing:
        recompute_encoder(model)
    if settings.sharding == "fsdp" and distributed.is_initialized():
        ray.train.torch.prepare_model(model, parallel_strategy=None)  # Only moves it to its device.
        shard(model, device, precision)
        _compile_if_configured(model, settings)
        return model
    # Gradients lie in the buffers that are summed over the ranks, and need not be copied there.
    options = {"gradient_as_bucket_view": True}
    replica: nn.Module = ray.train.torch.prepare_model(model, parallel_strategy_kwargs=options)
    rebuild_gradient_buckets(replica, device)
    _compile_if_configured(model, settings)  # Only now, or it would compile for the input shape used just above.
    return replica


def shard(model: SegmentationModel, device: torch.device, precision: str) -> None:
    """Split the weights of a model over all ranks, in place, block by block.

    In bf16 and fp16, ranks send each other weights in that format, which is half as much as in fp32. BatchNorm is the
    exception, because its statistics are fp32. Gradients are summed, and weights updated, in fp32.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(get_dtype(precision), torch.float32)
    for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
        fully_shard(norm, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for block in find_blocks(model.network):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _compile_if_configured(model: SegmentationModel, settings: TrainSettings) -> None:
    if settings.compile:
        model.network.compile()
