"""The connection to a Ray cluster, alike for every job: join the one that is named, or start one here."""

import logging
import os

import ray

# Of the shared-memory store that Ray starts here; what does not fit spills to disk, so this bounds memory
# and not the size of a log.
OBJECT_STORE_BYTES = 1 << 30


def connect(dashboard: bool = False, metrics_port: int | None = None) -> None:
    """Join the cluster in RAY_ADDRESS (set for submitted jobs), or start one on this machine.

    Without RAY_ADDRESS it never joins a cluster that happens to run here. Ray Train asks the `dashboard`
    which runs are gone, to free what they held: needed where one driver starts many of them. Prometheus
    finds the metrics of a cluster started here at `metrics_port`.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    here = not os.environ.get("RAY_ADDRESS")
    ray.init(
        address="local" if here else None,
        object_store_memory=OBJECT_STORE_BYTES if here else None,
        include_dashboard=dashboard if here else None,
        _metrics_export_port=metrics_port if here else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
