"""Find the newest checkpoint, and load its state into the objects that a rank trains with."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from segray.models.build import SegmentationModel
from segray.training.checkpoint import TrainingState, load_state, rank_checkpoints, warn_of_damage
from segray.training.checkpoint_parts import Rows, Tensors
from segray.training.progress_board import ProgressPoster
from segray.training.worker.optimisation import WeightAverage, get_local
from segray.training.worker.steps import Learner

# Whole tensors, in the memory of rank 0.
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)
ValueT = TypeVar("ValueT")


def find_rows(model: nn.Module) -> dict[str, Rows]:
    """Return the rows that this rank holds of each parameter of a sharded model; empty for other models."""
    rows = {}
    for name, tensor in get_model_state_dict(model).items():
        if isinstance(tensor, DTensor):
            assert tensor.placements == (Shard(0),), f"{name}: FSDP2 divides parameters by rows"
            shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            rows[name] = Rows(offset[0], offset[0] + shape[0])
    return rows


def load_newest_state(
    run_uri: str,
    poster: ProgressPoster | None,
    device: torch.device,
    rows: Mapping[str, Rows],
    announce: Callable[[], None],
) -> TrainingState | None:
    """Return the newest checkpoint that is intact on all ranks, or None; rank 0 chooses it. Collective.

    Args:
        run_uri: Folder of the checkpoints.
        poster: Posts which checkpoint it is; None on ranks other than 0.
        device: Device of this rank.
        rows: The rows of sharded parameters that this rank holds; it loads nothing else.
        announce: Called before each file is read, for stall detection.
    """
    uris = rank_checkpoints(run_uri, poster.post_line) if poster else []
    while uri := _broadcast(uris.pop(0) if uris else None, device):
        state, problem = None, None
        try:
            state = load_state(uri, rows, announce=announce)
        except ValueError as error:
            problem = str(error)
        problems = [found for found in gather(problem) if found]
        if state and not problems:
            if poster:
                poster.post_line(f"resuming after {_describe_progress(state)}, from {uri}")
                poster.post_epochs(state.history)
            return state
        if poster:
            warn_of_damage(uri, problems[0], poster.post_line)
    return None


def _broadcast(uri: str | None, device: torch.device) -> str | None:
    """Return the value that rank 0 passes."""
    chosen = [uri]
    if distributed.is_initialized():
        distributed.broadcast_object_list(chosen, src=0, device=device)
    return chosen[0]


def gather(value: ValueT) -> list[ValueT]:
    """Return the values of all ranks; collective."""
    values = [value]
    if distributed.is_initialized():
        values *= distributed.get_world_size()
        distributed.all_gather_object(values, value)
    return values


def _describe_progress(state: TrainingState) -> str:
    if state.epoch_losses:
        return f"step {state.num_steps_done}"
    return f"epoch {len(state.history)}"


def restore_state(
    state: TrainingState, model: SegmentationModel, learner: Learner, average: WeightAverage | None
) -> None:
    """Load the state of a checkpoint into a rank's objects, in place.

    What the settings of this start define does not come from the checkpoint: the optimizer keeps its learning rates and
    weight decay, a new moving average begins with the weights of the checkpoint, and a new scaler with its own factor.
    """
    if average and state.average:
        _load_weights(model, state.average, state.rows)
        average.reset(state.num_steps_done)
    _load_weights(model, state.model, state.rows)
    if average and not state.average:
        average.reset(state.num_steps_done)
    if state.rows:
        _restore_sharded_optimizer(state, model, learner.optimizer)
    else:
        _restore_optimizer(state, model, learner.optimizer)
    if state.scaler:
        learner.scaler.load_state_dict(state.scaler)


def _load_weights(model: SegmentationModel, weights: Tensors, rows: Mapping[str, Rows]) -> None:
    if not rows:
        set_model_state_dict(model, dict(weights), options=FULL_STATE)
        return
    for name, tensor in cast(Tensors, get_model_state_dict(model)).items():
        _copy_rows(tensor, weights.get(name))


@torch.no_grad()
def _copy_rows(target: torch.Tensor, source: torch.Tensor | None) -> None:
    """Copy this rank's rows of a tensor; there is no source if it has none."""
    local = get_local(target)
    if local.numel():
        assert source is not None
        local.copy_(source)


def _restore_sharded_optimizer(
    state: TrainingState, model: SegmentationModel, optimizer: torch.optim.Optimizer
) -> None:
    if not state.optimizer["state"]:  # SGD without momentum.
        return
    # torch creates the optimizer's tensors here if there are none yet.
    target = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer))
    for parameter, values in target["state"].items():
        for name, tensor in values.items():
            _copy_rows(tensor, state.optimizer["state"].get(parameter, {}).get(name))


def _restore_optimizer(state: TrainingState, model: SegmentationModel, optimizer: torch.optim.Optimizer) -> None:
    if not state.optimizer["state"]:  # SGD without momentum; set_optimizer_state_dict does not expect this.
        return
    # Not the groups of the checkpoint: an earlier version may have divided the parameters in another way.
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(model, optimizer, {**state.optimizer, "param_groups": groups}, options=FULL_STATE)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:  # Fused optimizers need the memory layout of the parameter.
                values[name] = torch.empty_like(parameter).copy_(value)
