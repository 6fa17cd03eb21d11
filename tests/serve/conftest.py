import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.redis_server import Server


@pytest.fixture
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="redis") as directory:  # a socket's path may not be long
        started = Server(Path(directory))
        yield started
        started.kill()
