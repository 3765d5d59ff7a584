"""Real FSDP ranks save and load their own rows: equal bits on 1, 2 and 3 ranks, and without sharding.

Three processes do everything, on groups of one, two and three of them, because starting them takes the longest.
"""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from segray.config import ModelConfig, TrainSettings
from segray.models.build import SegmentationModel, build_model
from segray.training import checkpoint_parts
from segray.training.checkpoint import TrainingState, load_state, save_sharded_state, save_state
from segray.training.progress_board import ProgressPoster
from segray.training.worker.optimisation import WeightAverage, build_optimizer, build_schedule
from segray.training.worker.restore import find_rows, load_newest_state, restore_state
from segray.training.worker.state import Trainer
from tests.training.worker.learner import CPU, make_learner

pytestmark = pytest.mark.integration  # Starting the ranks takes half a minute.
NUM_RANKS, NUM_WRITERS = 3, 2
OPTIMIZERS = ("adamw", "sgd")
Tensors = dict[str, torch.Tensor]


class Run:
    """The objects of one rank, with the model sharded over a group of ranks, or not sharded."""

    def __init__(self, optimizer: str, mesh: DeviceMesh | None, seed: int) -> None:
        torch.manual_seed(seed)
        self.model: SegmentationModel = build_model(ModelConfig(arch="classic_unet", widths=(4, 8)), 3).train()
        if mesh:
            fully_shard(self.model, mesh=mesh)
        settings = TrainSettings.model_validate(
            {"optimizer": optimizer, "learning_rate": 0.01, "encoder_lr_factor": 0.1}
        )
        self.optimizer = build_optimizer(self.model, settings)
        self.average = WeightAverage(self.model, 0.9)
        self.schedule = build_schedule(self.optimizer, settings, 10)
        self.learner = make_learner(self.model, self.optimizer)

    def train(self, num_steps: int, rank: int) -> None:
        for step in range(num_steps):
            torch.manual_seed(100 * step + rank)
            self.model(torch.randn(2, 3, 32, 32)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update()

    def gather(self, rank: int, num_steps_done: int) -> TrainingState:
        """Return what a training worker of this rank would save."""
        nothing = cast(Any, None)
        trainer = Trainer(
            job=nothing,
            world_rank=rank,
            world_size=NUM_WRITERS,
            model=self.model,
            learner=self.learner,
            schedule=self.schedule,
            average=self.average,
            learning_rate=0.0,
            store=nothing,
            augmentation=nothing,
            heartbeat=nothing,
            poster=None,
            num_steps_done=num_steps_done,
            epoch_losses=[0.5],
            history=[{"epoch": 1, "val_mean_iou": 0.5}],
            num_skipped=0,
            phases=[],
        )
        state = trainer.gather_state()
        assert state is not None
        return state

    def collect(self) -> Tensors:
        """Return all tensors as whole ones, which torch itself puts together."""
        with self.average.applied():
            average = self.collect_weights("average")
        model = self.collect_weights("model")
        optimizer = {
            f"optimizer.{parameter}.{name}": assemble(value)
            for parameter, values in cast(Any, get_optimizer_state_dict(self.model, self.optimizer))["state"].items()
            for name, value in values.items()
        }
        return {**average, **model, **optimizer}

    def collect_weights(self, owner: str) -> Tensors:
        weights = cast(Tensors, get_model_state_dict(self.model))
        return {f"{owner}.{name}": assemble(value) for name, value in weights.items()}


def assemble(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, with the rows of all ranks of its group."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Poster:
    """Collects what would be posted to the terminal."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def post_line(self, line: str) -> None:
        self.lines.append(line)

    def post_epochs(self, epochs: list[dict[str, Any]]) -> None:
        pass


def restore(run: Run, uri: str) -> Tensors:
    """Load a checkpoint into a run, and return the run's tensors."""
    state = load_state(uri, find_rows(run.model))
    restore_state(state, run.model, run.learner, run.average)
    return run.collect()


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=NUM_RANKS)
    meshes = [DeviceMesh("cpu", list(range(size))) for size in range(1, NUM_RANKS + 1)]
    checkpoint_parts._MAX_FILE_BYTES = 2000  # So that a rank writes several files.
    results: dict[str, Any] = {}
    for optimizer in OPTIMIZERS:
        uris = [f"{folder}/{optimizer}/checkpoint_{number:09d}_abcdef01" for number in (1, 2)]
        if rank < NUM_WRITERS:
            run = Run(optimizer, meshes[NUM_WRITERS - 1], 0)
            for number, uri in enumerate(uris, 1):
                run.train(2, rank)
                results[f"{optimizer} {number}"] = run.collect()
                save_sharded_state(uri, run.gather(rank, number), rank, NUM_WRITERS)
        if rank == 0:
            save_state(f"{folder}/plain-{optimizer}", load_state(uris[1]))
        distributed.barrier()
        for mesh in meshes:
            if rank < mesh.size():
                results[f"{optimizer} on {mesh.size()}"] = restore(Run(optimizer, mesh, 1), uris[1])
                plain = restore(Run(optimizer, mesh, 1), f"{folder}/plain-{optimizer}")
                results[f"{optimizer} from plain on {mesh.size()}"] = plain
        distributed.barrier()
        if rank == 0:
            damage(Path(uris[1]))
        distributed.barrier()
        poster = Poster()
        rows = find_rows(Run(optimizer, meshes[-1], 1).model)
        state = load_newest_state(
            f"{folder}/{optimizer}", cast(ProgressPoster, poster) if rank == 0 else None, CPU, rows, lambda: None
        )
        results[f"{optimizer} newest"] = (state.num_steps_done if state else None, poster.lines)
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def damage(folder: Path) -> None:
    """Flip a bit in a file of the last writer, of which the first reader needs no row."""
    (path, *_) = folder.glob(f"rank-{NUM_WRITERS - 1:05d}-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    multiprocessing.spawn(run_rank, (folder,), nprocs=NUM_RANKS)  # type: ignore[no-untyped-call, attr-defined]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("source", ["", "from plain "])
def test_any_number_of_ranks_restores_the_same_bits(ranks: list[dict[str, Any]], optimizer: str, source: str) -> None:
    expected = ranks[0][f"{optimizer} 2"]  # With BatchNorm's statistics of rank 0, which are those that are saved.
    before = ranks[0][f"{optimizer} 1"]
    owners = {key.partition(".")[0] for key in expected if not torch.equal(expected[key], before[key])}
    assert owners == {"model", "average", "optimizer"}
    for size in range(1, NUM_RANKS + 1):
        for rank in ranks[:size]:
            assert_same_bits(rank[f"{optimizer} {source}on {size}"], expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_process_without_ranks_restores_the_same_bits(
    ranks: list[dict[str, Any]], folder: Path, optimizer: str
) -> None:
    restored = Run(optimizer, None, 1)
    assert_same_bits(restore(restored, f"{folder}/plain-{optimizer}"), ranks[0][f"{optimizer} 2"])
    restored = Run(optimizer, None, 1)
    first = f"{folder}/{optimizer}/checkpoint_000000001_abcdef01"
    assert_same_bits(restore(restored, first), ranks[0][f"{optimizer} 1"])
    restored.model.load_state_dict(load_state(first, only_weights=True).weights)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_rank_writes_its_own_rows(folder: Path, optimizer: str) -> None:
    checkpoint = folder / optimizer / "checkpoint_000000001_abcdef01"
    sizes = [
        sum(file.stat().st_size for file in checkpoint.glob(f"rank-{rank:05d}-*.safetensors"))
        for rank in range(NUM_RANKS)
    ]
    assert sizes[2] == 0
    assert 0.5 < sizes[1] / sizes[0] <= 1
    assert all(file.stat().st_size < 5000 for file in checkpoint.glob("*.safetensors"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_damage_that_one_rank_finds_makes_all_ranks_use_the_checkpoint_before(
    ranks: list[dict[str, Any]], optimizer: str
) -> None:
    assert [rank[f"{optimizer} newest"][0] for rank in ranks] == [1, 1, 1]
    lines = ranks[0][f"{optimizer} newest"][1]
    assert "skipping a damaged checkpoint" in lines[0]
    assert "rank-00001-" in lines[0]
    assert "checkpoint_000000001" in lines[1]
    assert len(lines) == 2
