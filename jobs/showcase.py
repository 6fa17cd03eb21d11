"""Starts the service as a user would, asks it over HTTP, and shows what it answers and how fast."""

import contextlib
import ctypes
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.bundle import Bundle
from recsys_dist.data.counts import is_positive
from recsys_dist.errors import ServeError
from recsys_dist.export import DISPLAY
from recsys_dist.serve.environment import fast, free_port

_SHOWN_USERS, _SHOWN_ITEMS, _WATCHED = 3, 5, 4
_END_TIMEOUT_S = 90


@contextlib.contextmanager
def service(arguments: list[str], state: Path) -> Iterator[int]:
    """`jobs.serve` in a process of its own, on a free port, which is given; ended as Ctrl-C ends it."""
    port = free_port(8000)
    command = [sys.executable, "-m", "jobs.serve", *arguments, "--state", str(state), "--port", str(port)]
    slow = {"--ray-defaults", "--no-ray"} & set(arguments)
    settings = dict(os.environ) if slow else {**os.environ, **fast(state)}  # else it would begin twice
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=settings,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            assert process.stdout is not None
            while not (line := process.stdout.readline()).startswith("serving bundle"):
                if not line:
                    errors.seek(0)
                    raise ServeError(f"the service did not start: {errors.read()[-2000:]}")
            yield port
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(_END_TIMEOUT_S)


def _end_with_parent() -> None:
    """As Ctrl-C would end it, also where the parent is killed and can tell nobody."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGINT)


def show(bundle: Bundle, port: int, requests: int) -> dict[str, Any]:
    """Recommendations for a few users, printed, and the latency of `requests` more, one at a time."""
    users = _regulars(bundle, requests)
    named = _names(bundle)
    for user in users[:_SHOWN_USERS]:
        _, answer = _ask(port, user, _SHOWN_ITEMS)
        print(f"user {user} watched {', '.join(map(named, _watched(bundle, user)))}; recommended:")
        for item in answer["items"]:
            print(f"  {named(item['item_id']):<44} {_why(bundle, item)}")
    timed = [_ask(port, user, 10) for user in users]
    ms = sorted(milliseconds for milliseconds, _ in timed)
    degraded = sum("recall" in r or "ranking" in r for _, answer in timed for r in answer["degraded"])
    return {
        "requests": len(ms),
        "p50_ms": round(statistics.median(ms), 2),
        "p99_ms": round(ms[int(0.99 * (len(ms) - 1))], 2),
        "errors": sum("items" not in answer for _, answer in timed),
        "without_a_stage": degraded,
        "bundle": bundle.manifest.version,
    }


def _ask(port: int, user: str, k: int) -> tuple[float, dict[str, Any]]:
    """Milliseconds and the answer."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        body = json.dumps({"user_id": user, "k": k})
        connection.request("POST", "/recommend", body, {"content-type": "application/json"})
        found: dict[str, Any] = json.loads(connection.getresponse().read())
    found.setdefault("degraded", [])
    return 1000 * (time.perf_counter() - began), found


def _regulars(bundle: Bundle, count: int) -> list[str]:
    """Users with something watched, spread over all of them."""
    wanted = pc.unique(
        bundle.events.filter(pa.array(is_positive(bundle.events, bundle.encoders.schema)))["user_id"]
    )
    at = np.linspace(0, len(wanted) - 1, min(count, len(wanted))).astype(np.int64)
    return wanted.take(pa.array(at)).to_pylist()


def _watched(bundle: Bundle, user: str) -> list[str]:
    own = bundle.events.filter(pc.equal(bundle.events["user_id"], user))
    positive = own.filter(pa.array(is_positive(own, bundle.encoders.schema)))
    return positive["item_id"].to_pylist()[-_WATCHED:]


def _names(bundle: Bundle) -> Any:
    """How to call an item: its title where it has one, else its id and a few attributes."""
    attributes = bundle.items.attributes
    shown = [name for name in DISPLAY if name in attributes.column_names][:1]
    texts = [f.name for f in attributes.schema if pa.types.is_string(f.type) and f.name != "item_id"]
    chosen = attributes.select(shown or texts[:2])

    def named(item: str) -> str:
        position = int(bundle.items.positions(pa.array([item]))[0])
        values = (
            [] if not position else [v for v in chosen.slice(position - 1, 1).to_pylist()[0].values() if v]
        )
        return f"{item} ({', '.join(map(str, values))})" if values else item

    return named


def _why(bundle: Bundle, item: dict[str, Any]) -> str:
    predicted = f"{bundle.manifest.labels['ranking'][0]} {_share(item['probability'])}"
    if item["expected_value"] is not None:
        predicted = f"{bundle.ranking.model.predicts} {item['expected_value']:,.0f}"
    return f"{predicted}, recall score {_number(item['recall_score'])}"


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
