"""Compare the throughput model of docs/guides/scale.md with the real pipeline, in which decoding and model only sleep.

    python benchmarks/scale_simulation.py

Ray Data, the ledger, fragments, transport and Parquet are real. Decoding and the model are replaced by sleeps of a set
length, so that many more workers fit on this machine than it has cores. The first measurement uses fragments without
any work: how many per second all processes transfer together on the shared cores, and the driver's CPU time for each.
The others use pipelines with a known bottleneck.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from measuring import report
from segment_growth import make_tiny_bundle

from segray.config import SegmentSettings
from segray.models.bundle import load_manifest
from segray.runtime.connect import connect_ray
from segray.schema import IMAGES_SCHEMA
from segray.segmentation.job import PipelineJob
from segray.segmentation.profile import Stopwatch
from segray.segmentation.stages.compression import compress
from segray.segmentation.stages.decode import DecodedImage, FragmentDecoder, pack_decoded
from segray.segmentation.stages.ledger_client import LedgerClient
from segray.segmentation.stages.predictor import PREDICTED_SCHEMA

_FOLDER = Path(__file__).parents[1] / "runs/benchmarks/scale"
_NUM_CPUS = 32  # Logical CPUs.
_SIZE_PX = 8


@dataclass(frozen=True)
class Setting:
    """A simulated cluster and workload.

    Attributes:
        name: Name of its bottleneck.
        num_predictors: Number of predictors.
        fragment_size: Images per fragment.
        num_fragments: Number of fragments.
        decode_s: Time to decode one image in one task; one task runs on each CPU that no predictor uses.
        predict_s: Time to predict one image in one predictor.
    """

    name: str
    num_predictors: int
    fragment_size: int
    num_fragments: int
    decode_s: float
    predict_s: float

    def compute_rate(self, fragments_per_s: float) -> tuple[float, str]:
        """Return the images per second that the model of docs/guides/scale.md predicts, and the bottleneck."""
        rates = {
            "handing on": fragments_per_s * self.fragment_size,
            "predictors": self.num_predictors / self.predict_s if self.predict_s else float("inf"),
            "decoding": (_NUM_CPUS - self.num_predictors) / self.decode_s if self.decode_s else float("inf"),
        }
        narrowest = min(rates, key=lambda name: rates[name])
        return rates[narrowest], narrowest


_ALONE = Setting("stages that do nothing", 2, 1, 1500, 0.0, 0.0)
_SETTINGS = (
    Setting("predictors", 8, 32, 400, 0.005, 0.010),
    Setting("decoding", 8, 32, 300, 0.050, 0.005),
    Setting("predictors, large fragments", 8, 128, 120, 0.005, 0.010),
    Setting("fragments too small", 8, 2, 1500, 0.001, 0.001),
)


class WaitingDecoder(FragmentDecoder):
    """A decode stage that sleeps as long as fetching and decoding a fragment would take."""

    setting: Setting

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return a simulated fragment."""
        fragment = batch["fragment"][0].as_py()
        plan = self._ledger.begin(fragment)
        time.sleep(self.setting.decode_s * self.setting.fragment_size)
        pixels = np.zeros((_SIZE_PX, _SIZE_PX, 3), np.uint8)
        rows = [{"uri": f"{fragment}-{n}", "height": 1, "width": 1} for n in range(self.setting.fragment_size)]
        packed = pack_decoded(fragment, [DecodedImage(row, pixels) for row in rows], Stopwatch())
        self._ledger.end(fragment, plan)
        return packed


class WaitingPredictor:
    """A predict stage that sleeps as long as the model would take."""

    def __init__(self, setting: Setting, ledger: LedgerClient) -> None:
        self._setting = setting
        self._ledger = ledger

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return rows with masks of one pixel."""
        fragment = batch["fragment"][0].as_py()
        plan = self._ledger.begin(fragment)
        time.sleep(self._setting.predict_s * self._setting.fragment_size)
        blank = dict.fromkeys(IMAGES_SCHEMA.names)
        rows = [
            {**blank, **row, "status": "ok", "mask": compress(b"\0"), "mask_encoding": "raw", "pixel_count": [1, 0]}
            for row in batch["rows"][0].as_py()
        ]
        self._ledger.end(fragment, plan)
        return pa.Table.from_pylist([{"fragment": fragment, "rows": rows, "steps": []}], PREDICTED_SCHEMA)


@contextmanager
def simulated_stages(setting: Setting) -> Iterator[None]:
    """Replace the stages of the pipeline by sleeping ones while the block runs."""
    from segray.segmentation.stages import pipeline

    class Predictor(WaitingPredictor):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(setting, arguments[-1])

    class Decoder(WaitingDecoder):
        pass

    Decoder.setting = setting
    with (
        mock.patch.object(pipeline, "FragmentPredictor", Predictor),
        mock.patch.object(pipeline, "FragmentDecoder", Decoder),
    ):
        yield


def measure_rate(setting: Setting, bundle: Path) -> tuple[float, float]:
    """Return images per second and the driver's CPU seconds per fragment, over the middle 80% of the fragments."""
    from segray.segmentation.stages.pipeline import run_pipeline
    from segray.segmentation.stages.placement import Placement

    output = _FOLDER / "out"
    shutil.rmtree(output, ignore_errors=True)
    manifest, sha256 = load_manifest(str(bundle))
    job = PipelineJob(
        output_uri=str(output),
        cut_sha256="",
        bundle_uri=str(bundle),
        bundle_sha256=sha256,
        classes=manifest.classes,
        image_size=manifest.image_size,
        settings=SegmentSettings(),
        has_truth=False,
    )
    placement = Placement(setting.num_predictors, {"CPU": 1}, decode_cpus=1, write_cpus=0.25, num_tasks=None)
    times = []
    with simulated_stages(setting):
        for _ in run_pipeline(range(setting.num_fragments), job, placement):
            times.append((time.monotonic(), time.process_time()))
    margin = len(times) // 10
    (began_s, began_core_s), (ended_s, ended_core_s) = times[margin], times[-margin - 1]
    num_fragments = len(times) - 2 * margin - 1
    return num_fragments * setting.fragment_size / (ended_s - began_s), (ended_core_s - began_core_s) / num_fragments


def main() -> None:
    """Measure fragments without work, then each setting, and compare the latter with the model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    shutil.rmtree(_FOLDER, ignore_errors=True)
    bundle = make_tiny_bundle(_FOLDER / "bundle")
    figures: dict[str, Any] = {}
    rows = []
    with connect_ray(_NUM_CPUS):
        alone = [measure_rate(_ALONE, bundle) for _ in range(rounds)]
        fragments_per_s, driver_s = (statistics.median(values) for values in zip(*alone, strict=True))
        figures["alone"] = {"fragments_per_s, driver_s": alone}
        rows.append([_ALONE.name, "", f"{fragments_per_s:.0f}", "", f"driver {1000 * driver_s:.1f} ms a fragment"])
        for setting in _SETTINGS:
            measured = [measure_rate(setting, bundle) for _ in range(rounds)]
            expected, narrowest = setting.compute_rate(fragments_per_s)
            rate = statistics.median(rate for rate, _ in measured)
            figures[setting.name] = {"images_per_s, driver_s": measured, "expected": expected, "narrowest": narrowest}
            rows.append([setting.name, f"{expected:.0f}", f"{rate:.0f}", f"{rate / expected:.2f}", narrowest])
    report("scale_simulation", ["setting", "predicted images/s", "measured", "ratio", "limit"], rows, figures)
    shutil.rmtree(_FOLDER)


if __name__ == "__main__":
    main()
