"""Prepare the model for training on a rank: move it to its device, and wrap it in DDP or shard it with FSDP."""

import ray.train.torch
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from segray.config import TrainSettings
from segray.models.build import SegmentationModel, freeze_unused_parameters
from segray.models.gradient_checkpointing import find_blocks, recompute_encoder
from segray.models.sync_batchnorm import synchronise_norms
from segray.training.worker.steps import rebuild_gradient_buckets


def build_replica(model: SegmentationModel, settings: TrainSettings, device: torch.device) -> nn.Module:
    """Prepare a model in place for training; return the module to call: the model itself, or its DDP wrapper.

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
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        for block in find_blocks(model.network):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        _compile_if_configured(model, settings)
        return model
    replica: nn.Module = ray.train.torch.prepare_model(model)
    rebuild_gradient_buckets(replica, device)
    _compile_if_configured(model, settings)  # Only now, or it would compile for the input shape used just above.
    return replica


def _compile_if_configured(model: SegmentationModel, settings: TrainSettings) -> None:
    if settings.compile:
        model.network.compile()
