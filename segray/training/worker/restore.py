"""Find the newest checkpoint, and load its state into the objects that a rank trains with."""

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from segray.models.build import SegmentationModel
from segray.training.checkpoint import TrainingState, find_newest_state, load_state
from segray.training.progress_board import ProgressPoster
from segray.training.worker.optimisation import WeightAverage
from segray.training.worker.steps import Learner

# Collects the full state of sharded models in the memory of rank 0.
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def load_newest_state(run_uri: str, poster: ProgressPoster | None, device: torch.device) -> TrainingState | None:
    """Return the newest intact checkpoint, or None; rank 0 chooses it, so that all ranks load the same one.

    Args:
        run_uri: Folder of the checkpoints.
        poster: Posts which checkpoint it is; None on ranks other than 0.
        device: Device of this rank.
    """
    found = None
    if poster:
        found = find_newest_state(run_uri, poster.post_line)
        if found:
            poster.post_line(f"resuming after {_describe_progress(found[1])}, from {found[0]}")
            poster.post_epochs(found[1].history)
    chosen = [found[0] if found else None]
    if distributed.is_initialized():
        distributed.broadcast_object_list(chosen, src=0, device=device)
    if chosen[0] is None:
        return None
    return found[1] if found else load_state(chosen[0])


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
        set_model_state_dict(model, dict(state.average), options=FULL_STATE)
        average.reset(state.num_steps_done)
    set_model_state_dict(model, dict(state.model), options=FULL_STATE)
    if average and not state.average:
        average.reset(state.num_steps_done)
    _restore_optimizer(state, model, learner.optimizer)
    if state.scaler:
        learner.scaler.load_state_dict(state.scaler)


def _restore_optimizer(state: TrainingState, model: SegmentationModel, optimizer: torch.optim.Optimizer) -> None:
    if not state.optimizer["state"]:  # SGD without momentum; set_optimizer_state_dict does not expect this.
        return
    pairs = zip(optimizer.param_groups, state.optimizer["param_groups"], strict=True)
    groups = [{**group, "params": saved["params"]} for group, saved in pairs]
    set_optimizer_state_dict(model, optimizer, {**state.optimizer, "param_groups": groups}, options=FULL_STATE)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:  # Fused optimizers need the memory layout of the parameter.
                values[name] = torch.empty_like(parameter).copy_(value)
