"""Compare `segray segment` with other implementations: a plain script, Ray Data and PySpark.

    python benchmarks/segment_rivals.py [--num-images 2106] [--rounds 3] [--only script Spark …]

All process the same images with the same network on the same machine. The other implementations are the scripts in
rivals/, which write the same columns; segray writes more. Whole processes are timed one at a time, in turn. PySpark is
first installed into a folder outside the environment.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
from camvid import make_bundle, make_images
from measuring import read_results, report, run_measured
from segment_bound import segment

_RIVALS = Path(__file__).parent / "rivals"
_SPARK = "pyspark==4.0.1"


def build_commands(
    bundle: Path, images: Path, output: Path, spark: Path
) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Return the command line and the environment variables of each other implementation, by name."""
    arguments = [str(bundle), str(images), str(output)]

    def build(script: str, *options: str) -> list[str]:
        return [sys.executable, str(_RIVALS / script), *arguments, *options]

    bf16 = ("--precision", "bf16")
    with_ray = {"PYTHONPATH": str(_RIVALS)}
    with_spark = {"PYTHONPATH": f"{spark}:{_RIVALS}", "PYSPARK_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return {
        "script, fp32": (build("plain.py"), {}),
        "script, bf16 and channels-last": (build("plain.py", *bf16), {}),
        "Ray Data, as in its guide": (build("ray_data.py"), with_ray),
        "Ray Data, bf16 and channels-last, two actors": (build("ray_data.py", *bf16, "--num-actors", "2"), with_ray),
        "PySpark predict_batch_udf": (build("spark.py", "fp32"), with_spark),
        "PySpark, bf16 and channels-last": (build("spark.py", "bf16"), with_spark),
    }


def read_masks(output: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """Return the written masks by image name, as flat arrays; the column holds bytes or lists of integers."""
    files = [str(path) for path in sorted(output.rglob("*.parquet")) if path.name != "summary.parquet"]
    dataset = ds.dataset([path for path in files if "/plan/" not in path])
    uri = "uri" if "uri" in dataset.schema.names else "path"
    masks = {}
    for batch in dataset.to_batches(columns=[uri, "mask"]):
        for name, mask in zip(batch[uri].to_pylist(), batch["mask"], strict=True):
            is_list = pa.types.is_list(mask.type)
            found = mask.values.to_numpy().view(np.uint8) if is_list else np.frombuffer(mask.as_py(), np.uint8)
            masks[Path(name).name] = found
    return masks


def compare(ours: dict[str, npt.NDArray[np.uint8]], theirs: dict[str, npt.NDArray[np.uint8]]) -> float:
    """Return the share of pixels that have the same class in both."""
    assert ours.keys() == theirs.keys(), f"segray has masks of {len(ours)} images, the other of {len(theirs)}"
    num_equal = sum(int((ours[name] == theirs[name]).sum()) for name in ours)
    return num_equal / sum(mask.size for mask in ours.values())


def main() -> None:
    """Measure segray and the other implementations in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-images", type=int, default=2106)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--add", action="store_true", help="add to the results that results/ has of this machine")
    arguments = parser.parse_args()
    bundle, images = make_bundle(), make_images(arguments.num_images)
    spark = images.parent / "packages"
    if not spark.exists():
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--target", str(spark)]
        subprocess.run([*uv, _SPARK], check=True)
    ours, theirs = images.parent / "segmented", images.parent / "rival"
    earlier = read_results("segment_rivals") if arguments.add else {}
    times: dict[str, list[float]] = {"segray": [], **earlier.get("seconds", {})}
    agreement: dict[str, float] = earlier.get("agreement", {})
    for number in range(arguments.rounds):
        times["segray"].append(segment(bundle, images, ours).wall_s)
        print("segray", times["segray"][-1], flush=True)
        for name, (command, environment) in build_commands(bundle, images, theirs, spark).items():
            if arguments.only and not any(word in name for word in arguments.only):
                continue
            shutil.rmtree(theirs, ignore_errors=True)
            times.setdefault(name, []).append(run_measured(command, environment).wall_s)
            print(name, times[name][-1], flush=True)
            if number == 0:
                agreement[name] = compare(read_masks(ours), read_masks(theirs))
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        [
            name,
            f"{seconds:.0f}",
            f"{arguments.num_images / seconds:.1f}",
            f"{seconds / median['segray']:.2f}",
            f"{agreement[name]:.4%}" if name in agreement else "",
        ]
        for name, seconds in median.items()
    ]
    columns = ["whole process", "s", "images/s", "times as long as segray", "pixels of the same class"]
    figures = {"num_images": arguments.num_images, "seconds": times, "agreement": agreement, "spark": _SPARK}
    report("segment_rivals", columns, rows, figures)


if __name__ == "__main__":
    main()
