"""Compare the throughput of `segray segment` with an upper bound, and measure the time to its first fragment.

    python benchmarks/segment_bound.py [--num-images 2106] [--rounds 3]

The bound is the number of cores divided by the core-seconds per image of the compiled bf16 model, of decoding and of
encoding. Each is measured alone on the idle machine, with the allocator settings that segray gives its workers; with
the default settings the compiled model takes a seventh longer, which would lower the bound. A second, stricter bound
uses the model as segray runs it, with normalisations folded into convolutions, and compiles it.

The steady-state rate is that of the fragments in the middle of the run, by the modification times of their files. CPU
outside the model is the machine's whole busy time in that period, minus what the predictors measured for the model and
the statistics. "Steps" is the part of it that segray's own code measured: fetch, decode, pack, encode, write. The rest
is Ray's processes, which use the same CPU time per second whether few or many images are processed.
"""

import argparse
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from camvid import IMAGE_SIZE, make_bundle, make_images
from measuring import Measured, report, restart_with_kept_memory, run_measured

_FRAGMENT_SIZE = 32
_BATCH_SIZE = 8


def measure_model(bundle: Path, is_folded: bool) -> float:
    """Return the core-seconds per image of the compiled bf16 model, including input normalisation, on all cores.

    Args:
        bundle: The model bundle.
        is_folded: Fold BatchNorm into the convolutions before compiling, which is the fastest known form.
    """
    from segray.models.bundle import load_bundle
    from segray.models.export import DeployableModel
    from segray.models.fuse_batchnorm import fold_norms

    loaded = load_bundle(str(bundle))
    network = fold_norms(loaded.model, loaded.manifest.image_size) if is_folded else loaded.model
    model = DeployableModel(network, loaded.manifest.preprocessing).to(memory_format=torch.channels_last)
    torch.compiler.reset()
    compiled = torch.compile(model)
    images = torch.randint(0, 255, (_BATCH_SIZE, *loaded.manifest.image_size, 3), dtype=torch.uint8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            compiled(images)
        times = [_time(lambda: compiled(images)) for _ in range(15)]
    return statistics.median(times) * torch.get_num_threads() / _BATCH_SIZE


def measure_decoding(paths: list[Path], size: tuple[int, int]) -> float:
    """Return the core-seconds per image of decoding and resizing on one thread."""
    from segray.data.images import decode_image, resize_image

    contents = [path.read_bytes() for path in paths]
    return statistics.median(_time(lambda c=c: resize_image(decode_image(c), size)) for c in contents)


def measure_encoding(written: Path) -> float:
    """Return the core-seconds per image of encoding masks and statistics as Parquet on one thread."""
    import io

    from pyarrow import parquet as pq

    table = pq.read_table(written)

    def encode() -> None:
        pq.write_table(table, io.BytesIO(), compression="zstd", use_dictionary=["status"], write_page_checksum=True)

    return statistics.median(_time(encode) for _ in range(15)) / len(table)


def _time(act: Any) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def segment(bundle: Path, images: Path, output: Path, *overrides: str) -> Measured:
    """Run `segray segment --profile` as a command, into an empty output folder."""
    shutil.rmtree(output, ignore_errors=True)
    settings = [f"segment.fragment_size={_FRAGMENT_SIZE}", f"segment.batch_size={_BATCH_SIZE}", *overrides]
    command = [sys.executable, "-m", "segray", "segment", "--profile"]
    command += ["--bundle", str(bundle), "--images", str(images), "--output", str(output)]
    return run_measured(command + [part for setting in settings for part in ("--set", setting)])


def read_core_ms(output: str, step: str) -> float:
    """Return the core-milliseconds per image of a step, from the table that ``--profile`` prints."""
    found = re.search(rf"│ \w+ +│ {step} +│ +[\d.]+ │ +([\d.]+) │", output)
    assert found, output
    return float(found.group(1))


def get_written_times(output: Path) -> list[float]:
    """Return the modification times of the fragments' files, sorted, in seconds since 1970."""
    return sorted(path.stat().st_mtime for path in (output / "images").glob("part-*.parquet"))


def find_steady_times(output: Path) -> list[float]:
    """Return the modification times without the first and last tenth of the fragments."""
    times = get_written_times(output)
    margin = max(2, len(times) // 10)
    return times[margin:-margin]


def measure_run(bundle: Path, images: Path, num_images: int, overrides: list[str]) -> dict[str, float]:
    """Segment the images and return measurements from outside and from the run's profile."""
    output = images.parent / "segmented"
    run = segment(bundle, images, output, *overrides)
    print(run.output, flush=True)
    times = find_steady_times(output)
    num_steady, steady_s = (len(times) - 1) * _FRAGMENT_SIZE, times[-1] - times[0]
    own_ms = sum(read_core_ms(run.output, step) for step in ("fetch", "decode", "pack", "encode", "write"))
    model_ms, statistics_ms = read_core_ms(run.output, "predict"), read_core_ms(run.output, "count")
    busy_ms = 1000 * run.count_busy_core_s(times[0], times[-1]) / num_steady
    return {
        "encoding_s": measure_encoding(next((output / "images").iterdir())),
        "images_per_s": num_steady / steady_s,
        "predict_ms": model_ms,
        "statistics_ms": statistics_ms,
        "own_ms": own_ms,
        "outside_ms": busy_ms - model_ms - statistics_ms,
        "idle_share": 1 - busy_ms / 1000 * num_steady / steady_s / torch.get_num_threads(),
        "first_s": get_written_times(output)[0] - run.started_s,
        "wall_s": run.wall_s,
        "core_s": run.busy_core_s / num_images,
    }


def main() -> None:
    """Measure the parts alone, then whole runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-images", type=int, default=2106)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    restart_with_kept_memory()
    bundle = make_bundle()
    rows, figures = [], {}
    for extension in ("png", "jpg"):
        images = make_images(arguments.num_images, extension)
        rounds = []
        for _ in range(arguments.rounds):
            one = {
                "model_s": measure_model(bundle, is_folded=False),
                "folded_s": measure_model(bundle, is_folded=True),
                "decoding_s": measure_decoding(sorted(images.iterdir())[:200], IMAGE_SIZE),
                **measure_run(bundle, images, arguments.num_images, arguments.overrides),
            }
            for share, model in (("share", "model_s"), ("folded_share", "folded_s")):
                needed_s = one[model] + one["decoding_s"] + one["encoding_s"]
                one[share] = one["images_per_s"] * needed_s / torch.get_num_threads()
            rounds.append(one)
            print(rounds[-1], flush=True)
        median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        parts = [f"{1000 * median[name]:.2f}" for name in ("model_s", "folded_s", "decoding_s", "encoding_s")]
        shown = [f"{median[name]:.2f}" for name in ("statistics_ms", "own_ms", "outside_ms", "images_per_s")]
        shares = [f"{median[name]:.3f}" for name in ("share", "folded_share")]
        rows.append([extension, *parts, *shown, *shares, f"{median['first_s']:.1f}"])
        figures[extension] = rounds
    columns = ["input", "model ms", "folded ms", "decode ms", "encode ms", "statistics ms", "steps ms", "outside ms"]
    columns += ["images/s", "share of the bound", "with the folded model", "first fragment s"]
    report("segment_bound", columns, rows, figures)


if __name__ == "__main__":
    main()
