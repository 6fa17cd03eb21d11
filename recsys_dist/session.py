"""The connection to a Ray cluster, alike for every job: join the one that is named, or start one here."""

import logging
import os
import socket

import pyarrow as pa
import ray

from recsys_dist.errors import ClusterError

# Of the shared-memory store that Ray starts here; what does not fit spills to disk, so this bounds memory
# and not the size of a log.
OBJECT_STORE_BYTES = 1 << 30
_PROBE_S = 5.0
# Ray Data runs reads, either side of a shuffle, and its own actors in processes that no other kind may use.
# Of idle ones Ray keeps one a CPU: each stage would start its own anew, for 2 to 3 s of CPU time apiece.
_PROCESSES_PER_CPU = 4
# Arrow's own choice, mimalloc, never gives freed memory back: of a million events that were prepared 1.1 GB
# stayed with an idle process.
_ALLOCATOR = "jemalloc"


def connect(dashboard: bool = False, metrics_port: int | None = None, cpus: int | None = None) -> None:
    """Join the cluster in RAY_ADDRESS (set for submitted jobs), or start one on this machine.

    Without RAY_ADDRESS it never joins a cluster that happens to run here. Ray Train asks the `dashboard`
    which runs are gone, to free what they held: needed where one driver starts many of them. Prometheus
    finds the metrics of a cluster started here at `metrics_port`; `cpus` is how many it has to give away, by
    default the machine's. ClusterError where there is no cluster.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    here = not address
    if here:  # for the trials of a sweep; see `train.trainer`
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    own = {**_own_address(), **_of_processes(cpus)} if here else {}
    os.environ.update(own)
    try:
        if address:
            _probe(address)
        ray.init(
            address="local" if here else None,
            num_cpus=cpus if here else None,
            object_store_memory=OBJECT_STORE_BYTES if here else None,
            include_dashboard=dashboard if here else None,
            _metrics_export_port=metrics_port if here else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, ValueError, RuntimeError) as error:
        where = f"no Ray cluster answers at RAY_ADDRESS={address!r}" if address else "Ray did not start here"
        way = (
            "start it, or unset RAY_ADDRESS to use this machine" if address else "run the same command again"
        )
        raise ClusterError(f"{where}: {error}; {way}") from error
    except Exception as error:
        if type(error) is not Exception:  # which Ray raises where its own start took over 30 s
            raise
        raise ClusterError(
            "Ray did not start within 30 s, as on a machine that is too busy; run the same command again"
        ) from error
    finally:
        for name in own:
            del os.environ[name]


def _own_address() -> dict[str, str]:
    """Variables that choose where a new cluster listens, and tell so to all processes that it starts.

    Without them Ray Train's PlacementGroupCleaner asks whichever cluster of this machine started last whether
    its run still lives, is told no, and ends the workers: two trainings side by side killed each other.
    """
    own, port = {}, os.environ.get("RAY_GCS_SERVER_PORT")
    if port is None:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = own["RAY_GCS_SERVER_PORT"] = str(probe.getsockname()[1])
    return {**own, "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}"}  # type: ignore[no-untyped-call]


def _of_processes(cpus: int | None) -> dict[str, str]:
    """How many idle processes Ray keeps, and how little memory they do, unless the user says so herself."""
    chosen = {"RAY_num_workers_soft_limit": str(_PROCESSES_PER_CPU * (cpus or os.cpu_count() or 1))}
    if _ALLOCATOR in pa.supported_memory_backends():
        chosen["ARROW_DEFAULT_MEMORY_POOL"] = _ALLOCATOR
    return {name: value for name, value in chosen.items() if name not in os.environ}


def _probe(address: str) -> None:
    """OSError where nobody listens at HOST:PORT, at once; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_PROBE_S).close()
