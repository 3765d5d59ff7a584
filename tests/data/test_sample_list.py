"""Lists of samples: the same items as plain lists, and the same hash as that of earlier versions."""

import hashlib
import json
import pickle

import numpy as np
import pytest

from segray.data import sample_list
from segray.data.sample_list import Sample, SampleList, Splits


def make_samples(num_samples: int) -> list[Sample]:
    uris = [f"s3://bucket/a{number % 3}/b {number % 7}/{number}é" for number in range(num_samples)]
    odd = [Sample("name", "x/"), Sample("/root", 'a"\\\n/b'), Sample("", "//a//b")]
    return odd + [Sample(f"{uri}.jpg", f"/masks/{uri}.png") for uri in uris]


@pytest.fixture(params=[1, 4, 2**20])
def encoded_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces, so that a list of a few samples consists of several."""
    monkeypatch.setattr(sample_list, "_ENCODED_ROWS", request.param)
    monkeypatch.setattr(sample_list, "_BATCH_ROWS", request.param)


@pytest.mark.usefixtures("encoded_rows")
@pytest.mark.parametrize("plain", [make_samples(0), make_samples(20), make_samples(20)[3:], []])
def test_items_are_those_of_a_plain_list(plain: list[Sample]) -> None:
    samples = SampleList.of(iter(plain))
    assert SampleList.of(samples) is samples
    assert len(samples) == len(plain)
    assert list(samples) == plain
    assert [samples[index] for index in range(-len(plain), len(plain))] == plain * 2
    assert all(type(sample) is Sample for sample in samples)
    for part in (slice(2, 9), slice(None, None, 3), slice(100, 200), slice(-1, None, -2)):
        assert list(samples[part]) == plain[part]
    order = np.random.default_rng(0).permutation(len(plain))
    assert list(samples.take(order)) == [plain[index] for index in order]
    with pytest.raises(IndexError):
        samples[len(plain)]
    assert samples == plain
    assert samples != [*plain, Sample("a", "b")]


@pytest.mark.usefixtures("encoded_rows")
@pytest.mark.parametrize("split", [(0, 0), (0, 5), (5, 0), (1, 30)])
def test_the_hash_is_that_of_the_lists_as_json(split: tuple[int, int]) -> None:
    plain = Splits(make_samples(20)[: split[0]], make_samples(30)[: split[1]])
    expected = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    assert plain.compute_sha256() == expected
    assert Splits(*map(SampleList.of, plain)).compute_sha256() == expected


def test_a_list_is_pickled_without_its_buffers_and_takes_little_memory() -> None:
    """Ray keeps the buffers in its object store, and every process of a node maps the same ones."""
    names = [f"s3://bucket/data/street/part-{number // 1000:05}/{number:012}" for number in range(10_000)]
    samples = SampleList.of(Sample(f"{name}.jpg", f"{name}.png") for name in names)
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(samples, protocol=5, buffer_callback=buffers.append)
    assert len(content) < 2000
    assert sum(len(buffer.raw()) for buffer in buffers) < samples.num_bytes + 10_000
    assert pickle.loads(content, buffers=buffers) == samples
    assert samples.num_bytes < 60 * len(samples) < sum(len(uri) for sample in samples for uri in sample)
