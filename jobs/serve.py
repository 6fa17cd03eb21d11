"""Serves a bundle over HTTP with Ray Serve, until Ctrl-C.

examples:
  python -m jobs.serve --out runs/quickstart                       the champion of the demo's registry
  python -m jobs.serve --bundle runs/quickstart/bundles/VERSION
  python -m jobs.serve --tracking-uri http://mlflow:5000 --port 8080 service.replicas=2 recall.replicas=2

  curl -X POST localhost:8000/recommend -H 'content-type: application/json' -d '{"user_id": "712", "k": 10}'

A new champion is taken over while requests are answered; one that fails its checks is refused, and /version
says why. Behaviour sent to /events counts at once and is kept below the state directory, as a log that
`python -m jobs.prepare parquet STATE` reads.
"""

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from jobs.command import reported, settings_help
from recsys_dist import cpu, session
from recsys_dist.bundle import Bundle
from recsys_dist.errors import ConfigError, RecsysError
from recsys_dist.serve import environment, golden
from recsys_dist.serve.app import build, resolve, run, stop
from recsys_dist.serve.deployments import ServiceConfig
from recsys_dist.serve.events import describe_log
from recsys_dist.serve.guard import Limits
from recsys_dist.serve.http import create_app
from recsys_dist.serve.local import LocalService
from recsys_dist.serve.state import UserState, canonical_schema, check_state, open_state


def parse(argv: list[str]) -> tuple[ServiceConfig, argparse.Namespace]:
    """The service's settings and the process'; raises ConfigError for a wrong one."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.serve",
        description=__doc__,
        epilog=settings_help(ServiceConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as in ranking.replicas=2")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", default="runs/quickstart", help="results whose registry names the champion")
    where.add_argument("--bundle", help="directory of one bundle")
    where.add_argument("--tracking-uri", help="MLflow server with the registry")
    parser.add_argument("--state", help="directory of new events; default: serving/ below --out")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--no-ray", action="store_true", help="in this process alone, without Ray Serve")
    parser.add_argument(
        "--ray-defaults", action="store_true", help="Ray Serve's own settings, to compare with the fast ones"
    )
    parser.add_argument("--stats-port", type=int, help="HAProxy's page, on all addresses; default: from 8404")
    parser.add_argument("--proxy-metrics-port", type=int, help="HAProxy's metrics; default: from 9101")
    parser.add_argument("--metrics-port", type=int, help="Ray's and ours for Prometheus; default: from 9200")
    args = parser.parse_intermixed_args(argv)
    if not 0 <= args.port < 1 << 16:
        raise ConfigError(f"--port {args.port} is no port: they go from 0 to 65535")
    state = args.state or str(Path(args.out) / "serving")
    values = {"state": state}
    if args.bundle is not None:
        values["bundle"] = args.bundle
    else:
        values["registry"] = args.tracking_uri or f"sqlite:///{Path(args.out).absolute() / 'mlflow.db'}"
    return ServiceConfig.parse(values).override(args.settings), args


def _alone(cfg: ServiceConfig, args: argparse.Namespace) -> None:
    bundle = Bundle.open(resolve(cfg))
    golden.replay(bundle)
    cpu.configure(cfg.ranking.threads)
    check_state(cfg.state_url, cfg.model)
    state = open_state(Path(cfg.state), canonical_schema(bundle), cfg.state_url, cfg.model)
    app = create_app(
        LocalService(bundle, state, budget_ms=cfg.budget_ms), Limits(cfg.body_bytes, cfg.ongoing), cfg.token()
    )
    describe_log(bundle, Path(cfg.state))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn hands it on: `_recording` shall end
    with _listening(args.host, args.port) as listening, _recording(state, cfg.poll_s):
        where = f"http://{args.host}:{args.port}"
        print(f"serving bundle {bundle.manifest.version} at {where}, without Ray", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([listening])


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; name another --host or --port"
        ) from None


@contextmanager
def _recording(state: UserState, every_s: float) -> Iterator[None]:
    """New events go to the log now and then, and at the end."""
    done = threading.Event()

    def write() -> None:
        ended = False
        while not ended:
            ended = done.wait(every_s)
            try:
                state.write_log()
            except (RecsysError, OSError) as error:
                print(f"the log waits: {error}", file=sys.stderr)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def main(argv: list[str]) -> None:
    cfg, args = parse(argv)
    if args.no_ray:
        return _alone(cfg, args)
    wanted = environment.fast(Path(cfg.state), args.stats_port, args.proxy_metrics_port)
    # read once, when Ray Serve is imported: begin anew with them
    if not args.ray_defaults and "RAY_SERVE_THROUGHPUT_OPTIMIZED" not in os.environ:
        os.execve(sys.executable, [sys.executable, "-m", "jobs.serve", *argv], {**os.environ, **wanted})
    app = build(cfg.model_dump(mode="json"))  # first of all: what is wrong with a bundle needs no cluster
    _listening(args.host, args.port).close()  # HAProxy would share a port that another one has
    metrics_port = args.metrics_port or environment.free_port(9200)
    session.connect(metrics_port=metrics_port)
    done = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: done.set())
    try:
        version = run(app, cfg, args.host, args.port)
        print(f"serving bundle {version} at http://{args.host}:{args.port} (try it by hand: /docs)")
        print(f"metrics for Prometheus: http://127.0.0.1:{metrics_port}")
        if "RAY_SERVE_HAPROXY_STATS_PORT" in os.environ:
            stats, proxied = (os.environ[f"RAY_SERVE_HAPROXY_{n}_PORT"] for n in ("STATS", "METRICS"))
            print(f"HAProxy listens on ports {stats} (page) and {proxied} (metrics) too, on all addresses")
        print("Ctrl-C ends it", flush=True)
        done.wait()
    finally:
        stop()


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
