"""Segment a million tiny images while processes are killed, and check that every image is exactly one correct row.

    python benchmarks/soak.py [--images 1000000] [--kill-s 60]
    python benchmarks/soak.py --store [--images 50000]

Images are 1x1 to 64x64, in all formats; one in a thousand is broken, in all known ways. While `segray segment` runs, a
decode task, a predictor, a writer, the ledger and the driver with its private Ray are killed, each about `--kill-s`
seconds after fragments are written again, and the command is repeated until the run is complete. The last part
(`--calm-share`) runs without kills, so that processes live long enough to see whether their memory grows. With
`--store`, images and results are on the object store of the fault tests, and 5% of all requests fail (503, resets, cut
bodies, lost answers).

At the end, each image must have exactly one row, with the expected `error_kind`; the summary must be the sum of the
rows; and sampled fragments must equal, byte for byte, those of a run over the same images without faults. `memory.csv`
has the resident memory of driver, predictors and decoders every 10 s, without shared pages. Rerun the same command to
resume. The exit code is 1 if anything is wrong.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from measuring import report

from tests.conftest import save_varied_bundle
from tests.faults.soak.checks import check_rows, check_summary, choose_fragments, compare_fragments
from tests.faults.soak.disturb import DisturbedRun
from tests.faults.soak.images import ImageSet
from tests.faults.soak.place import Place, local_place, store_place
from tests.faults.soak.processes import KINDS, Killer, summarize_memory

_RUNS = Path(__file__).parents[1] / "runs/benchmarks"
_INPUT_PX = 32  # The model's input size.
_COLUMNS = ["process", "samples", "first quarter MiB", "last quarter MiB", "most MiB"]
_COLUMNS += ["longest life s", "its first quarter MiB", "its last quarter MiB"]


def compare_with_calm_run(place: Place, settings: list[str], num_compared: int, fragment_size: int) -> list[str]:
    """Segment the images of sampled fragments again without faults, and return the differences."""
    chosen, uris = choose_fragments(place.output_uri, num_compared, fragment_size)
    listing, output = place.folder / "calm.txt", f"{place.output_uri}-calm"
    listing.write_text("".join(f"{uri}\n" for uri in uris))
    with place.start_segment(settings, "calm.log", str(listing), output) as process:
        if code := process.wait():
            return [f"the run without faults ended with exit code {code}; see {place.folder / 'calm.log'}"]
    return compare_fragments(place.output_uri, chosen, output)


def soak(arguments: argparse.Namespace, place: Place, images: ImageSet) -> dict[str, Any]:
    """Run the soak and its checks, and return all figures."""
    values = {"fragment_size": arguments.fragment_size, "precision": "fp32", "num_report_images": 0}
    values |= {"max_image_px": 1_000_000, "max_error_fraction": 1}
    settings = [f"segment.{name}={value}" for name, value in values.items()]
    began_s, killer = time.monotonic(), Killer(arguments.kill_s, place.folder / "kills.csv")
    num_disturbed = arguments.images * (1 - arguments.calm_share) / arguments.fragment_size
    run = DisturbedRun(place, settings, killer, num_disturbed)
    run.run()
    figures = {"images": arguments.images, "wall_s": round(time.monotonic() - began_s), "starts": run.num_starts}
    problems = list(run.unexpected)
    if place.proxy is not None:
        figures["requests"] = len(place.proxy.requests)
        problems += [f"proxy: {error!r}" for error in place.proxy.errors]
        place.proxy.errors.clear()
        place.proxy.clear()
    rows, wrong = check_rows(images, place.images_uri, place.output_uri)
    problems += wrong or check_summary(place.output_uri)
    if not wrong:
        problems += compare_with_calm_run(place, settings, arguments.compare, arguments.fragment_size)
    return {
        **figures,
        "killed": {kind: killer.num_killed[kind] for kind in KINDS},
        "rows": rows,
        "problems": problems,
        "memory": summarize_memory(place.folder / "memory.csv"),
    }


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", action="store_true", help="use the object store of the fault tests")
    parser.add_argument("--images", type=int, help="default: 1000000, or 50000 with --store")
    parser.add_argument("--broken-every", type=int, default=1000, help="one of so many images is broken")
    parser.add_argument("--fragment-size", type=int, default=64)
    parser.add_argument("--kill-s", type=float, default=60, help="mean time between two kills of a kind of process")
    parser.add_argument("--calm-share", type=float, default=0.3, help="share of the images without kills, at the end")
    parser.add_argument("--compare", type=int, default=1000, help="fragments to compare with a run without faults")
    parser.add_argument("--folder", type=Path, help="keep all files there, and do not write benchmarks/results")
    arguments = parser.parse_args()
    arguments.images = arguments.images or (50_000 if arguments.store else 1_000_000)
    return arguments


def main() -> None:
    """Run the soak, write its figures, and remove its files if nothing is wrong."""
    arguments = parse_arguments()
    name = "soak_store" if arguments.store else "soak"
    folder = (arguments.folder or _RUNS / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "bundle").exists():
        save_varied_bundle(folder / "bundle", _INPUT_PX)
    images = ImageSet(arguments.images, arguments.broken_every)
    with (store_place if arguments.store else local_place)(folder, images) as place:
        figures = soak(arguments, place, images)
    (folder / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({**figures, "memory": "see the table"}, indent=1))
    if not arguments.folder:
        lines = [row.values() for row in figures["memory"]]
        rows = [[f"{value:.0f}" if isinstance(value, float) else f"{value}" for value in line] for line in lines]
        report(name, _COLUMNS, rows, figures)
    if figures["problems"]:
        sys.exit(1)
    if not arguments.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
