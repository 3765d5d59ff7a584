"""Three real ranks with gloo against one process: the same loss, the same gradients, the same bits after a restart."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from segray.train.feed import TrainBatch
from segray.train.steps import NonFiniteLossError, settle_gradient_buckets, train_step
from segray.transforms import Preprocessing

WORLD_SIZE, NUM_STEPS, IGNORE = 3, 4, 255
CPU = torch.device("cpu")


def build_network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 13, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(13, 3, 1))


def make_batch(step: int, rank: int) -> TrainBatch:
    """Return a rank's batch; ranks have very different numbers of scored pixels."""
    rng = np.random.default_rng([step, rank])
    truth = rng.integers(0, 3, (2, 16, 16)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.4 * rank] = IGNORE
    return TrainBatch(rng.integers(0, 256, (2, 16, 16, 3), np.uint8), truth, [])


def step_once(network: nn.Module, optimizer: torch.optim.Optimizer, batch: TrainBatch) -> float:
    return train_step(
        network, optimizer, batch, preprocessing=Preprocessing(), ignore_index=IGNORE, device=CPU, precision="fp32"
    )


def train(network: nn.Module, rank: int, steps: range) -> list[float]:
    replica = DistributedDataParallel(network)
    settle_gradient_buckets(replica, CPU)
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    return [step_once(replica, optimizer, make_batch(step, rank)) for step in steps]


def fail_on_one_rank(rank: int) -> tuple[str, bool]:
    """Return the error of a step whose loss is NaN on the last rank only, and whether the weights stayed."""
    network = build_network()
    replica = DistributedDataParallel(network)
    if rank == WORLD_SIZE - 1:
        replica.module[4].bias.data[0] = float("nan")
    before = copy.deepcopy(network.state_dict())
    try:
        step_once(replica, torch.optim.SGD(network.parameters(), 0.05), make_batch(0, rank))
    except NonFiniteLossError as error:
        same = all(torch.equal(before[k].nan_to_num(7), v.nan_to_num(7)) for k, v in network.state_dict().items())
        return str(error), same
    return "", False


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=WORLD_SIZE)
    unbroken = build_network()
    losses = train(unbroken, rank, range(NUM_STEPS))
    resumed = build_network()
    train(resumed, rank, range(NUM_STEPS // 2))
    restarted = build_network()
    restarted.load_state_dict(resumed.state_dict())
    train(restarted, rank, range(NUM_STEPS // 2, NUM_STEPS))
    result = {"losses": losses, "unbroken": unbroken.state_dict(), "restarted": restarted.state_dict()}
    torch.save({**result, "failure": fail_on_one_rank(rank)}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder),), nprocs=WORLD_SIZE)  # type: ignore[no-untyped-call, attr-defined]
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def test_ranks_learn_what_one_process_learns_from_the_global_batch(ranks: list[dict[str, Any]]) -> None:
    network = build_network()
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    losses = []
    for step in range(NUM_STEPS):
        shares = [make_batch(step, rank) for rank in range(WORLD_SIZE)]
        images = np.concatenate([share.images for share in shares])
        truth = np.concatenate([share.truth for share in shares])
        losses.append(step_once(network, optimizer, TrainBatch(images, truth, [])))
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses, rel=1e-6)
        for name, expected in network.state_dict().items():
            torch.testing.assert_close(rank["unbroken"][name], expected, rtol=1e-5, atol=1e-7)


def test_a_restart_changes_no_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, expected in ranks[0]["unbroken"].items():
            assert torch.equal(rank["unbroken"][name], expected)
            assert torch.equal(rank["restarted"][name], expected)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_weights_move(ranks: list[dict[str, Any]]) -> None:
    assert [rank["failure"] for rank in ranks] == [("loss is nan", True)] * WORLD_SIZE
