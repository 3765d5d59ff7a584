"""Measure how busy `segray segment` keeps a GPU, and compare its rate with the compiled bf16 model alone.

    python benchmarks/segment_gpu.py [--num-images 20000] [--batch-size 32] [--share 1 0.5] [--rounds 3]

Uses a resnet34 U-Net at 512x512 with random weights, on CamVid's images as JPEG, or on drawn shapes where there is no
CamVid. The model alone includes input normalisation and reads pixels that are already on the GPU. Rate and utilisation
are those of the middle of the run; utilisation is nvidia-smi's, the share of time in which any kernel ran. ``--share``
sets ``segment.num_gpus_per_predictor``: with 0.5, two predictors share each GPU, so that one computes while the other
converts results to rows. Without a GPU the CPU is measured, without utilisation.
"""

import argparse
import io
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from camvid import CLASS_NAMES, make_images
from measuring import report
from segment_bound import find_steady_times, segment

from segray.models.export import DeployableModel

_ROOT = Path(__file__).parents[1]
_NUM_SHAPES = 100
_SIZE = (512, 512)
_FRAGMENT_SIZE = 256
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(num_images: int) -> tuple[Path, str]:
    """Return a folder of that many JPEG files of 360x480, and what they show: CamVid if ``data/camvid`` has it.

    Drawn shapes replace it on machines that the data set cannot be copied to. They are noisier, so that their files are
    larger and take longer to decode.
    """
    if (_ROOT / "data/camvid/images").exists():
        return make_images(num_images, "jpg"), "CamVid"
    from segray.data.synthetic import draw_shape

    folder = _ROOT / f"runs/benchmarks/shapes-{num_images}"
    folder.mkdir(parents=True, exist_ok=True)
    contents = []
    for seed in range(_NUM_SHAPES):
        buffer = io.BytesIO()
        draw_shape(seed, 480)[0].crop((0, 60, 480, 420)).save(buffer, "JPEG", quality=90)
        contents.append(buffer.getvalue())
    for number in range(num_images):
        (folder / f"{number:06d}.jpg").write_bytes(contents[number % len(contents)])
    return folder, "drawn shapes"


def make_bundle(folder: Path) -> Path:
    """Write a bundle of a resnet34 U-Net with random weights."""
    from segray.config import ModelConfig
    from segray.data.classes import ClassMap
    from segray.data.preprocessing import Preprocessing
    from segray.models.build import build_model
    from segray.models.bundle import BundleDescription, save_bundle

    model = ModelConfig(arch="unet", encoder_name="resnet34", encoder_weights=None)
    num_classes = len(CLASS_NAMES)
    classes = ClassMap(tuple(CLASS_NAMES), tuple(range(num_classes)), (num_classes,))
    description = BundleDescription(model, classes, _SIZE, Preprocessing())
    save_bundle(str(folder), build_model(model, num_classes).state_dict(), description)
    return folder


def measure_model(bundle: Path, batch_size: int) -> float:
    """Return images per second of the compiled bf16 model."""
    from segray.models.bundle import load_bundle

    loaded = load_bundle(str(bundle))
    model = DeployableModel(loaded.model, loaded.manifest.preprocessing).to(_DEVICE)
    compiled = torch.compile(model.to(memory_format=torch.channels_last))
    images = torch.randint(0, 255, (batch_size, *_SIZE, 3), dtype=torch.uint8, device=_DEVICE)
    rates = []
    with torch.inference_mode(), torch.autocast(_DEVICE, torch.bfloat16):
        for _ in range(15):  # The first ones compile.
            began = time.perf_counter()
            for _ in range(10):
                compiled(images)
            if _DEVICE == "cuda":
                torch.cuda.synchronize()
            rates.append(10 * batch_size / (time.perf_counter() - began))
    return statistics.median(rates[5:])


@contextmanager
def watch_gpu() -> Iterator[list[tuple[float, float]]]:
    """Yield a list that fills with samples, 10 per second: time in seconds since 1970, and GPU utilisation (0 to 1)."""
    samples: list[tuple[float, float]] = []
    if _DEVICE != "cuda":
        yield samples
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout
        thread = threading.Thread(target=lambda: samples.extend((time.time(), float(line) / 100) for line in lines))
        thread.start()
        try:
            yield samples
        finally:
            process.terminate()
            thread.join()


def main() -> None:
    """Measure the model alone and whole runs in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-images", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--share", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    images, content = make_inputs(arguments.num_images)
    bundle, output = make_bundle(images.parent / "resnet34-512"), images.parent / "segmented"
    alone, rounds = [], []
    for _ in range(arguments.rounds):
        alone.append(measure_model(bundle, arguments.batch_size))
        for share in arguments.share:
            gpus = [f"segment.num_gpus_per_predictor={share}"] if _DEVICE == "cuda" else []
            sizes = [f"segment.fragment_size={_FRAGMENT_SIZE}", f"segment.batch_size={arguments.batch_size}"]
            with watch_gpu() as samples:
                run = segment(bundle, images, output, *sizes, *gpus)
            times = find_steady_times(output)
            busy = [value for at_s, value in samples if times[0] <= at_s <= times[-1]]
            rate = (len(times) - 1) * _FRAGMENT_SIZE / (times[-1] - times[0])
            rounds.append({"share": share, "images_per_s": rate, "busy": statistics.fmean(busy) if busy else None})
            print(run.output, rounds[-1], flush=True)
    model_rate = statistics.median(alone)
    rows = [["compiled bf16 model alone", f"{model_rate:.1f}", "1.000", ""]]
    for share in arguments.share:
        of_share = [one for one in rounds if one["share"] == share]
        rate = statistics.median(one["images_per_s"] for one in of_share)
        busy = [one["busy"] for one in of_share if one["busy"] is not None]
        shown = f"{statistics.median(busy):.1%}" if busy else ""
        rows.append([f"segray, {share:g} GPUs each", f"{rate:.1f}", f"{rate / model_rate:.3f}", shown])
    columns = ["", "images/s", "relative to the model alone", "GPU busy"]
    report("segment_gpu", columns, rows, {"images": content, "model_images_per_s": alone, "rounds": rounds})


if __name__ == "__main__":
    main()
