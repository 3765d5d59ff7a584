"""Measure the driver's memory while it plans and processes a million URIs.

    python benchmarks/driver_memory.py [NUM_URIS]

The images are listed in a text file and do not exist. Each is requested, found missing, passed through the real
pipeline as an error row and written, so that only the model has no work. The driver's resident memory is sampled twice
a second.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
from camvid import make_bundle
from measuring import report

_FOLDER = Path(__file__).parents[1] / "runs/benchmarks/million"


def main() -> None:
    """Run segray and sample the driver's memory."""
    num_uris = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    bundle, output, gone = make_bundle(), _FOLDER / "out", _FOLDER / "gone"
    shutil.rmtree(_FOLDER, ignore_errors=True)
    gone.mkdir(parents=True)
    listing = _FOLDER / "list.txt"
    listing.write_text("".join(f"{gone}/frame-{number:010d}.jpg\n" for number in range(num_uris)))
    command = [str(Path(sys.executable).with_name("segray")), "segment", "--profile", "--bundle", str(bundle)]
    command += ["--images", str(listing), "--output", str(output), "--set", "segment.max_error_fraction=1"]
    command += ["--set", "segment.num_report_images=0"]
    began = time.monotonic()
    log = (_FOLDER / "log.txt").open("w")
    driver = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    process = psutil.Process(driver.pid)
    samples: list[tuple[float, float, int]] = []
    while driver.poll() is None:
        try:
            resident_mb = process.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            break
        done = len(os.listdir(output / "images")) if (output / "images").exists() else 0
        samples.append((time.monotonic() - began, resident_mb, done))
        time.sleep(0.5)
    seconds = time.monotonic() - began
    print((_FOLDER / "log.txt").read_text())
    if driver.wait() not in (0, 3):
        sys.exit(f"exit code {driver.returncode}")
    counts = json.loads((output / "run.json").read_text())
    total = samples[-1][2]
    rows = []
    for share in (0, 0.1, 0.25, 0.5, 0.75, 0.95):
        at_s, resident_mb, done = next(sample for sample in samples if sample[2] >= share * total and sample[2] > 0)
        rows.append([f"{done:,}", f"{at_s:.0f}", f"{resident_mb:.0f}"])
    rows.append(["peak", f"{seconds:.0f}", f"{max(sample[1] for sample in samples):.0f}"])
    figures = {"num_uris": num_uris, "seconds": seconds, "run": counts.get("counts"), "peak_mb": rows[-1][2]}
    report("driver_memory", ["fragments written", "after s", "driver MB"], rows, figures)
    shutil.rmtree(_FOLDER)


if __name__ == "__main__":
    main()
