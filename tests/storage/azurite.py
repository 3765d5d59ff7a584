"""Run a real server of Azure Blob Storage: Azurite, Microsoft's emulator, which checks every signature."""

import base64
import hashlib
import hmac
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from typing import Self

from tests.faults.object_store import find_free_ports, prepare_child

ACCOUNT = "devstoreaccount1"
# The key that every Azurite has; it is no secret.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
VERSION = "2021-08-06"
START_TIMEOUT_S = 60


def find_azurite() -> Path:
    """Return the program of Azurite."""
    folder = Path(__file__).parents[2] / ".venv-azurite"
    program = folder / "node_modules/.bin/azurite-blob"
    if not program.exists():
        raise FileNotFoundError(
            f"no Azure server for the tests: Azurite is not installed in {folder}; run make test-faults to install it "
            "(Node.js is required)"
        )
    return program


class Azurite:
    """The server, which runs from `__enter__` to `__exit__`.

    Args:
        root: An empty folder for its files.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._port = find_free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """URL of the account."""
        return f"http://127.0.0.1:{self._port}/{ACCOUNT}"

    def build_environment(self, endpoint: str = "") -> dict[str, str]:
        """Return the variables with which a client finds the account and its key, at this or another endpoint."""
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": endpoint or self.endpoint,
        }

    def make_container(self, name: str) -> None:
        """Create a container."""
        date = formatdate(usegmt=True)
        lines = ["PUT", *[""] * 11, f"x-ms-date:{date}", f"x-ms-version:{VERSION}", f"/{ACCOUNT}/{ACCOUNT}/{name}"]
        signed = "\n".join([*lines, "restype:container"]).encode()
        signature = base64.b64encode(hmac.new(base64.b64decode(KEY), signed, hashlib.sha256).digest()).decode()
        headers = {"x-ms-date": date, "x-ms-version": VERSION, "Authorization": f"SharedKey {ACCOUNT}:{signature}"}
        url = f"{self.endpoint}/{name}?restype=container"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)).close()

    def __enter__(self) -> Self:
        options = ["--blobHost", "127.0.0.1", "--blobPort", str(self._port)]
        flags = ["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--inMemoryPersistence"]
        with (self._root / "log").open("wb") as log:
            command = [str(find_azurite()), *options, *flags]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=prepare_child)
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(ConnectionError, urllib.error.URLError):
                try:
                    urllib.request.urlopen(self.endpoint, timeout=5).close()
                except urllib.error.HTTPError:  # It answers, if only with a refusal.
                    return self
            time.sleep(0.1)
        raise RuntimeError(f"Azurite did not start: {(self._root / 'log').read_text()}")

    def __exit__(self, *error: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
