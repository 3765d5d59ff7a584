"""Several gloo ranks compared with a single process: equal losses, gradients and scores, and exact resumption."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed, multiprocessing, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from segray.config import LossSettings, ModelConfig, TrainSettings
from segray.data.preprocessing import Preprocessing
from segray.data.sample_list import Sample
from segray.models.build import SegmentationModel, build_model
from segray.models.losses import SegmentationLoss
from segray.models.sync_batchnorm import synchronise_norms
from segray.training.worker.evaluation import add_over_ranks, compute_loss, compute_scores, evaluate
from segray.training.worker.feed import RankShare, iterate_evaluation
from segray.training.worker.optimisation import build_optimizer, get_local
from segray.training.worker.replica import shard
from segray.training.worker.sample_store import SampleStore
from segray.training.worker.steps import rebuild_gradient_buckets, train_step
from tests.conftest import PET_CLASSES, TINY_MODEL
from tests.training.worker.learner import CPU, build_network, make_batch, make_learner, split

pytestmark = pytest.mark.integration  # Starting the ranks takes half a minute.
NUM_STEPS, GLOBAL_BATCH, NUM_IMAGES = 30, 8, 101
TERMS: dict[str, object] = {"ce": 1.0, "dice": 0.5, "ohem": 0.5}
SGD = TrainSettings(optimizer="sgd", momentum=0, learning_rate=0.05, weight_decay=0)
ADAMW = TrainSettings(optimizer="adamw", learning_rate=0.01)
LOSS = SegmentationLoss(LossSettings.model_validate(TERMS), PET_CLASSES.ignore_index)


def build_normalised_network() -> SegmentationModel:
    torch.manual_seed(0)
    network = build_model(ModelConfig(arch="classic_unet", widths=(4, 8)), 3).train()
    synchronise_norms(network, CPU)
    return network


def train(
    network: nn.Module,
    steps: range,
    rank: int = 0,
    world_size: int = 1,
    num_parts: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """Train on a rank's share of each global batch; shares are uneven if the batch cannot be divided evenly."""
    replica: nn.Module = network
    if world_size > 1:
        replica = DistributedDataParallel(network)
        rebuild_gradient_buckets(replica, CPU)
        replica.train()  # type: ignore[no-untyped-call]
    optimizer = optimizer or torch.optim.SGD(network.parameters(), 0.05, fused=True)
    learner = make_learner(replica, optimizer, TERMS, max_gradient_norm=0.5)
    losses = []
    for step in steps:
        share = split(make_batch([step], GLOBAL_BATCH), world_size)[rank]
        losses.append(train_step(learner, split(share, num_parts), lambda stage: None)[0].item())
    return losses


def train_sharded(
    rank: int, world_size: int, precision: str, settings: TrainSettings
) -> tuple[list[float], dict[str, torch.dtype]]:
    """Return the losses, and the data type of the weights in a forward pass by the class of their module."""
    network = build_normalised_network()
    shard(network, CPU, precision)
    dtypes: dict[str, torch.dtype] = {}

    def record(module: nn.Module, *_: object) -> None:
        dtypes[type(module).__name__.removeprefix("FSDP")] = module.get_parameter("weight").dtype

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(record)
    learner = make_learner(network, build_optimizer(network, settings), TERMS, 0.5, precision)
    losses = []
    for step in range(NUM_STEPS):
        share = split(make_batch([step], GLOBAL_BATCH), world_size)[rank]
        losses.append(train_step(learner, [share], lambda stage: None)[0].item())
    before = [get_local(parameter).clone() for parameter in network.parameters()]
    if rank == world_size - 1:
        network.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    train_step(learner, [make_batch([0, rank])], lambda stage: None)
    assert all(torch.equal(get_local(new), old) for new, old in zip(network.parameters(), before, strict=True))
    return losses, dtypes


def overflow_on_one_rank(rank: int, world_size: int, is_sharded: bool) -> dict[str, Any]:
    """Make a step in fp16 whose gradient overflows in one of two parts of the last rank, and then one that does not."""
    network = build_normalised_network()
    replica: nn.Module = network
    if is_sharded:
        shard(network, CPU, "fp16")
    else:
        replica = DistributedDataParallel(network)
        rebuild_gradient_buckets(replica, CPU)
    replica.train()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    learner = replace(make_learner(replica, build_optimizer(network, ADAMW), TERMS, 0.5, "fp16"), scaler=scaler)
    parts = split(make_batch([0, rank]), 2)
    outputs: list[torch.Tensor] = []

    def overflow(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        outputs.append(output)
        if len(outputs) == 1:
            output.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[no-untyped-call]

    hooks = [network.register_forward_hook(overflow)] if rank == world_size - 1 else []
    before = copy_tensors(network)
    loss, norm = train_step(learner, parts, lambda stage: None)
    is_unchanged = all(torch.equal(new, old) for new, old in zip(copy_tensors(network), before, strict=True))
    scale = scaler.get_scale()
    for hook in hooks:
        hook.remove()
    train_step(learner, parts, lambda stage: None)
    return {
        "is_finite": (bool(loss.isfinite()), bool(norm.isfinite())),
        "is_unchanged": is_unchanged,
        "scales": (scale, scaler.get_scale()),
        "before": before,
        "after": copy_tensors(network),
    }


def copy_tensors(network: nn.Module) -> list[torch.Tensor]:
    """Return copies of the whole weights and of the buffers."""
    tensors = [*network.parameters(), *network.buffers()]
    whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return [tensor.detach().clone() for tensor in whole]


def fail_on_one_rank(rank: int, world_size: int) -> tuple[bool, bool]:
    """Return whether a step with a NaN on the last rank only has a loss of NaN, and leaves the weights unchanged."""
    network = build_network()
    replica = DistributedDataParallel(network)
    if rank == world_size - 1:
        replica.module[4].bias.data[0] = float("nan")
    before = copy.deepcopy(network.state_dict())
    loss, _ = train_step(make_learner(replica), [make_batch([0, rank])], lambda stage: None)
    same = all(torch.equal(before[k].nan_to_num(7), v.nan_to_num(7)) for k, v in network.state_dict().items())
    return bool(loss.isnan()), same


def score(folder: Path, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Return the scores on 101 images, of which this rank evaluates its share."""
    torch.manual_seed(0)
    model = build_model(TINY_MODEL, 3)
    samples = [
        Sample(str(folder / f"{number}.png"), str(folder / f"{number}-mask.png")) for number in range(NUM_IMAGES)
    ]
    batches = iterate_evaluation(
        samples,
        SampleStore(PET_CLASSES, 0),
        (32, 32),
        7,
        RankShare(rank, world_size),
    )
    counts = evaluate(model, batches, classes=PET_CLASSES, preprocessing=Preprocessing(), loss=LOSS, precision="fp32")
    total = add_over_ranks(counts)
    return {"val_loss": compute_loss(total, LOSS), **compute_scores(total)}


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/init{world_size}"
    distributed.init_process_group("gloo", init, rank=rank, world_size=world_size)
    uninterrupted = build_network()
    result: dict[str, Any] = {"losses": train(uninterrupted, range(NUM_STEPS), rank, world_size)}
    repeated = build_network()
    train(repeated, range(NUM_STEPS), rank, world_size)
    resumed = build_network()
    train(resumed, range(13), rank, world_size)
    restarted = build_network()
    restarted.load_state_dict(resumed.state_dict())
    train(restarted, range(13, NUM_STEPS), rank, world_size)
    in_parts = build_network()
    train(in_parts, range(NUM_STEPS), rank, world_size, num_parts=2)
    normalised = build_normalised_network()
    result["normalised_losses"] = train(normalised, range(NUM_STEPS), rank, world_size)
    for name, network in {
        "uninterrupted": uninterrupted,
        "repeated": repeated,
        "restarted": restarted,
        "in_parts": in_parts,
        "normalised": normalised,
    }.items():
        result[name] = network.state_dict()
    result["sharded"] = {precision: train_sharded(rank, world_size, precision, SGD) for precision in ("fp32", "bf16")}
    network = build_normalised_network()
    optimizer = build_optimizer(network, ADAMW)
    result["adamw_losses"] = train(network, range(NUM_STEPS), rank, world_size, optimizer=optimizer)
    result["sharded"]["adamw"] = train_sharded(rank, world_size, "fp32", ADAMW)
    result["overflow"] = [overflow_on_one_rank(rank, world_size, is_sharded) for is_sharded in (False, True)]
    result["scores"] = score(folder, rank, world_size)
    result["failure"] = fail_on_one_rank(rank, world_size)
    torch.save(result, folder / f"{world_size}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 101 images of different sizes, and their masks."""
    folder = tmp_path_factory.mktemp("ranks")
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        size = (20 + number % 7, 24 + number % 5)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(rng.integers(0, 4, size).astype(np.uint8)).save(folder / f"{number}-mask.png")
    return folder


@pytest.fixture(scope="module", params=[3, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 4))])
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    world_size: int = request.param
    multiprocessing.spawn(run_rank, (world_size, folder), nprocs=world_size)  # type: ignore[no-untyped-call, attr-defined]
    return [torch.load(folder / f"{world_size}-{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.fixture(scope="module")
def single_process() -> tuple[nn.Module, list[float]]:
    network = build_network()
    return network, train(network, range(NUM_STEPS))


@pytest.fixture(scope="module")
def single_process_normalised() -> tuple[nn.Module, list[float]]:
    network = build_normalised_network()
    return network, train(network, range(NUM_STEPS))


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ranks_learn_the_same_as_a_single_process(
    ranks: list[dict[str, Any]], single_process: tuple[nn.Module, list[float]]
) -> None:
    network, losses = single_process
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], losses, atol=1e-4)
        for name, expected in network.state_dict().items():
            torch.testing.assert_close(rank["uninterrupted"][name], expected, rtol=1e-3, atol=1e-5)


def test_ranks_with_sync_batchnorm_learn_the_same_as_a_single_process(
    ranks: list[dict[str, Any]], single_process_normalised: tuple[nn.Module, list[float]]
) -> None:
    network, losses = single_process_normalised
    for rank in ranks:
        np.testing.assert_allclose(rank["normalised_losses"], losses, atol=1e-4)
        for name, expected in network.state_dict().items():
            torch.testing.assert_close(rank["normalised"][name], expected, rtol=1e-2, atol=2e-3)


def test_ranks_with_sharded_weights_learn_the_same_as_without(ranks: list[dict[str, Any]]) -> None:
    """In bf16, they send each other weights in that format, except those of BatchNorm, whose statistics are fp32."""
    for rank in ranks:
        losses, dtypes = rank["sharded"]["fp32"]
        np.testing.assert_allclose(losses, rank["normalised_losses"], atol=1e-4)
        assert set(dtypes.values()) == {torch.float32}
        losses, dtypes = rank["sharded"]["bf16"]
        np.testing.assert_allclose(losses, rank["normalised_losses"], atol=0.05)
        assert dtypes == {"Conv2d": torch.bfloat16, "GlobalBatchNorm2d": torch.float32}


def test_ranks_with_sharded_weights_learn_the_same_as_without_by_adamw(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        losses, _ = rank["sharded"]["adamw"]
        np.testing.assert_allclose(losses, rank["adamw_losses"], atol=0.02)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_in_fp16_all_ranks_skip_a_step_whose_gradient_overflows_on_one(
    ranks: list[dict[str, Any]], is_sharded: bool
) -> None:
    """BatchNorm statistics stay as they were, too; the next step changes the weights."""
    for rank in ranks:
        found = rank["overflow"][is_sharded]
        assert found["is_finite"] == (True, False)
        assert found["is_unchanged"]
        assert found["scales"] == (128, 128)
        assert not torch.equal(found["after"][0], found["before"][0])
        for new, first in zip(found["after"], ranks[0]["overflow"][is_sharded]["after"], strict=True):
            assert torch.equal(new, first)


def test_weights_are_identical_after_thirty_steps_with_the_same_seed_and_world_size(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert_same_bits(rank["repeated"], ranks[0]["uninterrupted"])


def test_weights_are_identical_after_a_restart(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_same_bits(rank["restarted"], ranks[0]["uninterrupted"])


def test_gradient_accumulation_on_every_rank_equals_the_larger_batch(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, expected in rank["uninterrupted"].items():
            torch.testing.assert_close(rank["in_parts"][name], expected, rtol=1e-3, atol=1e-5)


def test_scores_are_identical_for_any_number_of_ranks_and_no_image_is_dropped(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    expected = score(folder)
    num_scored = sum((np.asarray(Image.open(folder / f"{n}-mask.png")) > 0).sum() for n in range(NUM_IMAGES))
    assert sum(map(sum, expected["val_confusion"])) == num_scored
    loss = expected.pop("val_loss")
    for rank in ranks:
        scores = dict(rank["scores"])
        assert scores.pop("val_loss") == pytest.approx(loss, rel=1e-7)  # The network rounds by batch and threads.
        assert scores == expected


def test_a_non_finite_loss_on_one_rank_is_seen_by_all_ranks_and_no_weight_changes(ranks: list[dict[str, Any]]) -> None:
    assert [rank["failure"] for rank in ranks] == [(True, True)] * len(ranks)
