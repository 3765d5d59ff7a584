"""Run everything that needs a GPU, and write the results to one JSON file.

    python3 benchmarks/gpu_run.py [--pack gpu-pack] [--output runs/gpu_run.json] [--limit-s 560]

Runs the tests marked ``gpu`` and ``segment_gpu.py``, each with a time limit; a failure does not stop the others. Needs
no network and no set-up of the project: what the machine lacks is unpacked from the folder of ``make gpu-pack`` into a
temporary folder. Uses the standard library alone, because nothing else is there before that.

Exit code: 0 if everything passed, 1 if something failed or ran out of time, 2 if nothing could be run.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_site import prepare_site, stop

_ROOT = Path(__file__).parents[1]
_TESTS_LIMIT_S = 270.0
_MIN_BENCHMARK_S = 60.0
_KILL_TIMEOUT_S = 10.0
_LOG_LENGTH = 4000
_BENCHMARK = ["benchmarks/segment_gpu.py", "--num-images", "12000", "--rounds", "1"]
_PROBE = """
import json, torch
if not torch.cuda.is_available():
    raise SystemExit("torch " + torch.__version__ + " finds no CUDA device")
card = torch.cuda.get_device_properties(0)
print(json.dumps({"gpu": card.name, "gpu_memory_gib": round(card.total_memory / 2**30, 1),
    "compute_capability": f"{card.major}.{card.minor}", "num_gpus": torch.cuda.device_count(),
    "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}))
"""
_PACKAGES = ("ray", "torchvision", "triton", "segmentation-models-pytorch", "timm", "pyarrow", "numpy", "pytest")


@dataclass
class Piece:
    """A process of the run.

    Attributes:
        name: What it is called in the results.
        process: The process, which leads a session of its own.
        log: File with everything that it printed.
        started_s: Start, on the monotonic clock.
        wall_s: Elapsed time; None while it runs.
        timed_out: Whether it was killed at its limit.
    """

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    started_s: float
    wall_s: float | None = None
    timed_out: bool = False


def main() -> None:
    """Run the tests side by side, then the benchmark alone, and write the results after each of the two."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pack", type=Path, default=_ROOT / "gpu-pack")
    parser.add_argument("--output", type=Path, default=_ROOT / "runs/gpu_run.json")
    parser.add_argument("--limit-s", type=float, default=560.0, help="of the whole run")
    arguments = parser.parse_args()
    end_s = time.monotonic() + arguments.limit_s
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="segray-gpu-") as folder:
        site = Path(folder) / "site"
        machine["unpacked"] = prepare_site(arguments.pack, site)
        environment = build_environment(site)
        machine |= read_versions(environment)
        results: dict[str, Any] = {"machine": machine}
        results["tests"], results["test_processes"] = run_tests(Path(folder), environment, end_s)
        write_results(arguments.output, results)
        results["benchmarks"] = {"segment_gpu": run_benchmark(Path(folder), environment, end_s)}
        write_results(arguments.output, results)
    sys.exit(report(results, arguments.output))


def describe_machine() -> dict[str, Any]:
    """Return the card, its driver and what torch makes of it.

    Raises:
        SystemExit: Code 2 and one line, if there is no GPU that torch can use.
    """
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        stop("no GPU on this machine (nvidia-smi cannot be run); nothing was run")
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if probe.returncode:
        reason = (probe.stderr.strip() or "no reason given").splitlines()[-1]
        stop(f"torch of {sys.executable} cannot use the GPU ({reason}); nothing was run")
    card: dict[str, Any] = json.loads(probe.stdout)
    return {
        **card,
        "driver": driver[0].strip() if driver else "",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def build_environment(site: Path) -> dict[str, str]:
    """Return the environment of all pieces: the unpacked distributions first, then this working tree."""
    paths = [str(site), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def read_versions(environment: dict[str, str]) -> dict[str, str]:
    """Return the versions that the pieces will import."""
    code = (
        "import json, sys\n"
        "from importlib.metadata import PackageNotFoundError, version\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = version(name)\n"
        "    except PackageNotFoundError: found[name] = 'none'\n"
        "print(json.dumps(found))"
    )
    command = [sys.executable, "-c", code, *_PACKAGES]
    versions: dict[str, str] = json.loads(subprocess.run(command, env=environment, capture_output=True).stdout)
    return versions


def start(name: str, arguments: Sequence[str], folder: Path, environment: dict[str, str]) -> Piece:
    """Start a Python process in the project's root and in a session of its own."""
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Piece(name, process, log, time.monotonic())


def wait(pieces: Sequence[Piece], end_s: float) -> None:
    """Wait until all have ended, or kill those that have not at a time of the monotonic clock."""
    while running := [piece for piece in pieces if piece.wall_s is None]:
        for piece in running:
            if piece.process.poll() is not None:
                piece.wall_s = time.monotonic() - piece.started_s
            elif time.monotonic() >= end_s:
                piece.timed_out = True
                kill(piece)
                piece.wall_s = time.monotonic() - piece.started_s
        time.sleep(0.2)


def kill(piece: Piece) -> None:
    """End a process and what it has started, Ray included: gently first, so that Ray can clean up."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(piece.process.pid, number)
            piece.process.wait(_KILL_TIMEOUT_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def describe(piece: Piece) -> dict[str, Any]:
    """Return how a process ended; if not well, with the end of what it printed."""
    described: dict[str, Any] = {
        "wall_s": round(piece.wall_s or 0.0, 1),
        "exit_code": piece.process.returncode,
        "timed_out": piece.timed_out,
    }
    if piece.process.returncode:
        described["log"] = piece.log.read_text(errors="replace")[-_LOG_LENGTH:]
    return described


def run_tests(
    folder: Path, environment: dict[str, str], end_s: float
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Run the files of ``tests/gpu`` side by side; return the outcome of each test and how each file's process ended.

    Nothing is timed in them, and a file that hangs or crashes costs only its own tests.
    """
    pieces, outcomes = [], []
    for path in sorted((_ROOT / "tests/gpu").glob("test_*.py")):
        arguments = ["-m", "pytest", "-m", "gpu", "-p", "tests.gpu.outcomes", "-p", "no:cacheprovider", str(path)]
        written = folder / f"{path.stem}.jsonl"
        written.touch()
        outcomes.append(written)
        variables = {**environment, "SEGRAY_TEST_OUTCOMES": str(written)}
        pieces.append(start(path.stem, arguments, folder, variables))
    wait(pieces, min(time.monotonic() + _TESTS_LIMIT_S, end_s))
    tests = [json.loads(line) for written in outcomes for line in written.read_text().splitlines()]
    return tests, {piece.name: describe(piece) for piece in pieces}


def run_benchmark(folder: Path, environment: dict[str, str], end_s: float) -> dict[str, Any]:
    """Run ``segment_gpu.py``; return what it has measured, and how it ended."""
    if end_s - time.monotonic() < _MIN_BENCHMARK_S:
        return {"exit_code": None, "timed_out": True, "log": "not started: the tests have taken all the time"}
    written = _ROOT / "benchmarks/results/segment_gpu.json"
    written.unlink(missing_ok=True)
    piece = start("segment_gpu", _BENCHMARK, folder, environment)
    wait([piece], end_s)
    figures = json.loads(written.read_text()) if written.exists() else None
    return {**describe(piece), "figures": figures}


def write_results(output: Path, results: dict[str, Any]) -> None:
    """Write the results so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")


def report(results: dict[str, Any], output: Path) -> int:
    """Print the outcome in a few lines; return the exit code."""
    tests = results["tests"]
    for test in tests:
        if test["outcome"] not in ("passed", "skipped"):
            print(f"{test['outcome']}: {test['test']}\n{test.get('message', '')}")
    pieces = {**results["test_processes"], **results["benchmarks"]}
    broken = {name: piece for name, piece in pieces.items() if piece["exit_code"] != 0}
    for name, piece in broken.items():
        print(f"{name}: {'out of time' if piece['timed_out'] else 'exit code ' + str(piece['exit_code'])}")
        print(piece.get("log", ""))
    counts = {name: sum(test["outcome"] == name for test in tests) for name in ("passed", "failed", "error", "skipped")}
    machine = results["machine"]
    print(f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, CUDA {machine['cuda']}")
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    for row in ((results["benchmarks"]["segment_gpu"].get("figures")) or {}).get("table", []):
        print(", ".join(f"{column}: {value}" for column, value in row.items() if value))
    print(f"written: {output}")
    return 1 if broken or counts["failed"] or counts["error"] else 0


if __name__ == "__main__":
    main()
