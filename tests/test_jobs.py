"""Tests of the built wheel in a bare environment: the command, and jobs submitted to a head that requires a token."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import parquet as pq

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
_START_TIMEOUT_S = 60
_JOB_TIMEOUT_S = 240


def find_free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


@pytest.fixture(scope="module")
def bare_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel like `make wheel`, install it with its dependencies, and return the folder of its commands."""
    uv, folder = str(BIN / "uv"), tmp_path_factory.mktemp("wheel")
    python = folder / "env" / "bin" / "python"
    install = [uv, "pip", "install", "--quiet", f"--python={python}", f"--constraint={ROOT / 'requirements.txt'}"]
    subprocess.run([uv, "build", "--quiet", f"--out-dir={folder}", str(ROOT)], check=True)
    subprocess.run([uv, "venv", "--quiet", f"--python={sys.executable}", str(folder / "env")], check=True)
    (wheel,) = folder.glob("segray-*.whl")
    subprocess.run([*install, str(wheel)], check=True)
    return python.parent


def test_the_wheel_provides_the_command_and_no_tests(bare_environment: Path, tmp_path: Path) -> None:
    command = [str(bare_environment / "segray"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    assert all(f" {verb} " in done.stdout for verb in ("train", "tune", "segment", "status", "check", "export", "demo"))
    missing = subprocess.run([str(bare_environment / "python"), "-c", "import pytest"], stderr=subprocess.DEVNULL)
    assert missing.returncode == 1, "the environment must not contain the tests' dependencies"


@pytest.fixture(scope="module")
def job_environment(bare_environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Run a head in a process group of its own and return the environment variables with which jobs reach it."""
    folder = tmp_path_factory.mktemp("head")
    (folder / "token").write_text("0123456789abcdef" * 4)
    port, dashboard_port, agent_port, client_port = find_free_ports(4)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{bare_environment}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_worker_niceness": "0",  # As in tests/conftest.py.
    }
    command = [
        str(bare_environment / "ray"),
        "start",
        "--head",
        "--block",
        "--num-cpus=4",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
    ]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={agent_port}", f"--ray-client-server-port={client_port}"]
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while "Ray runtime started" not in (folder / "log").read_text():
            assert head.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline_s, (folder / "log").read_text()
            time.sleep(0.2)
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}"}
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # The session contains only the head, its daemons and its workers.
        head.wait()


def submit(environment: dict[str, str], *arguments: str, working_dir: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", *arguments],
        cwd=working_dir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_JOB_TIMEOUT_S,
        check=False,
    )


def test_a_job_runs_from_the_wheel(
    job_environment: dict[str, str], bundle_dir: Path, shapes_root: Path, tmp_path: Path
) -> None:
    """That jobs run from the source tree, the cluster tests show."""
    shutil.copytree(ROOT / "jobs", tmp_path / "elsewhere" / "jobs")  # Without the package next to it.
    command = ["python", "jobs/segment.py", "jobs/segment.yaml", "--bundle", str(bundle_dir)]
    command += ["--images", f"{shapes_root}/images", "--output", f"{tmp_path}/segmented"]
    segmented = submit(job_environment, *command, working_dir=tmp_path / "elsewhere")
    assert segmented.returncode == 0, segmented.stdout + segmented.stderr
    assert "25 images segmented, 0 error rows" in segmented.stdout
    assert json.loads((tmp_path / "segmented" / "run.json").read_text())["status"] == "complete"
    assert sum(pq.read_metadata(path).num_rows for path in tmp_path.glob("segmented/images/*.parquet")) == 25


def test_the_segray_command_can_be_submitted_as_a_job(job_environment: dict[str, str], tmp_path: Path) -> None:
    failed = submit(job_environment, "segray", "train", "street.yaml", working_dir=tmp_path)
    assert failed.returncode != 0
    assert re.search(r"error: .*street\.yaml: no such file or folder", failed.stdout), failed.stdout


def test_a_mistake_in_a_job_gives_an_exit_code_and_one_line(job_environment: dict[str, str]) -> None:
    failed = submit(
        job_environment, "python", "jobs/segment.py", "--bundle", "/none", "--images", "x", "--output", "/out"
    )
    assert failed.returncode != 0
    assert "error: --images: x is a relative path" in failed.stdout + failed.stderr


def test_without_the_token_a_job_is_refused(job_environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("f" * 64)
    wrong = {**job_environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    refused = submit(wrong, "python", "jobs/train.py", "--help")
    assert refused.returncode != 0
    assert "Invalid authentication token" in refused.stdout + refused.stderr
