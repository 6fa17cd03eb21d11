"""Workers that come and go with the nodes of a real, local cluster."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from jobs.ledger_model import trained_once
from recsys_dist.data.prepared import Prepared
from recsys_dist.train import trainer
from recsys_dist.train.checkpoint import latest_valid
from recsys_dist.train.settings import TrainConfig
from tests.train import prepared


@pytest.fixture
def cluster():
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=found.address, logging_level="ERROR", log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.mark.ray
@pytest.mark.e2e
def test_a_new_node_grows_the_run_and_a_lost_one_shrinks_it(cluster, tmp_path):
    """From the newest checkpoint each time: every row is trained once, in batches as large as before."""
    enough = tmp_path / "enough"
    model = {"name": "tests.train.waiting:Model", "shards": prepared.SPLITS["train"], "until": str(enough)}
    cfg = TrainConfig.parse(
        {
            "data": str(prepared.make(tmp_path / "data")),
            "model": {**model, "pause_s": 0.5},
            "optimizer": {"deep": {"lr": 0.5}},
            "batch_rows": 9,
            "epochs": 1,
            "refit": False,
            "num_workers": [1, 2],
            "resize_every_s": 1,
            "checkpoint_every_s": 0.5,
            "max_failures": 1,
        }
    )
    run = trainer.run_directory(cfg, Prepared.open(cfg.data), tmp_path / "out")
    with ThreadPoolExecutor(1) as pool:
        fitted = pool.submit(trainer.fit, cfg, tmp_path / "out")
        until(lambda: newest_workers(run) == 1 or fitted.done())
        node = cluster.add_node(num_cpus=1)
        until(lambda: newest_workers(run) == 2 or fitted.done())
        assert not fitted.done(), "the run never grew"
        cluster.remove_node(node, allow_graceful=False)
        until(lambda: newest_workers(run) == 1 or fitted.done())
        enough.touch()
        result = fitted.result()
    assert latest_valid(result.checkpoint.parent).manifest.workers == 1
    assert trained_once(result.checkpoint, 0.5) == {"once": 870, "lost": 0, "repeated": 0}
    assert latest_valid(result.checkpoint.parent).manifest.step == -(-870 // 9)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def newest_workers(run: Path) -> int:
    """How many workers wrote the newest checkpoint; 0 where there is none."""
    with contextlib.suppress(FileNotFoundError):  # one may be removed meanwhile
        found = latest_valid(run / "choose")
        return found.manifest.workers if found else 0
    return 0
