"""The main job as a user runs it: someone's own log with other column names, to a report and tracked runs."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import quickstart as job
from recsys_dist.errors import ConfigError
from tests.data.small_log import events, items

LOG = """
kind: parquet
events: events/
items: {path: items.parquet, id: sku}
columns: {user_id: uid, item_id: sku, timestamp: ts, labels: {click: clicked}, context: {device: device}}
"""


STAGES = {"prepare", "tune", "recall", "ranking", "export", "serve"}


def own_log(directory: Path) -> None:
    log = events(6000, days=10)
    ours = log.filter(pa.array(~np.asarray(log["history"]))).select(
        ["user_id", "item_id", "timestamp", "click", "device"]
    )
    (directory / "events").mkdir(parents=True)
    renamed = ours.rename_columns(["uid", "sku", "ts", "clicked", "device"])
    pq.write_table(renamed, directory / "events/a.parquet")
    pq.write_table(items().rename_columns(["sku", "genre", "length"]), directory / "items.parquet")
    (directory / "log.yaml").write_text(LOG)


def quickstart(data: Path, out: Path, *options: str) -> str:
    command = [
        sys.executable,
        "-m",
        "jobs.quickstart",
        "--data",
        str(data),
        "--out",
        str(out),
        "--workers",
        "1",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.e2e
@pytest.mark.timeout(600)  # two runs of the whole job
def test_from_ones_own_log_to_a_report(tmp_path: Path) -> None:
    own_log(tmp_path / "log")
    said = quickstart(tmp_path / "log", tmp_path / "out", "--tune", "2")
    assert "target encoding" in said and "popularity" in said
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["ranking"]["label"] == "click" and 0 < report["ranking"]["auc"] < 1
    assert report["ranking"]["rows"] == sum(
        pq.read_metadata(f).num_rows for f in (tmp_path / "out/data/ranking/test").glob("*.parquet")
    )
    assert set(report["recall"]["popularity"]) >= {"recall@50", "recall@100", "recall@200"}
    assert report["peak_rss_bytes"] > 0 and set(report["seconds"]) == STAGES
    assert "<svg" in (tmp_path / "out/report.html").read_text()
    with sqlite3.connect(tmp_path / "out/mlflow.db") as store:
        runs = store.execute("select run_uuid, status from runs").fetchall()
        keys = {row[0] for row in store.execute("select distinct key from metrics")}
    assert {run for run, _ in runs} >= set(report["mlflow"]["run_ids"].values())
    assert report["tune"]["trials"] == 2 and report["tune"]["best"]["settings"]
    assert "Search: of 2 settings" in said
    serving = report["serving"]
    assert serving["requests"] > 0 and serving["errors"] == 0 and 0 < serving["p50_ms"] <= serving["p99_ms"]
    assert (tmp_path / "out/bundles" / serving["bundle"] / "manifest.json").is_file()
    assert "recommended:" in said and "registered as version 1: @" in said
    assert {"choose/loss", "choose/gradient/tower.layers.0", "test/model/auc"} <= keys
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out/models").rglob("*.distcp")}
    assert before, "no checkpoint was written"
    quickstart(tmp_path / "log", tmp_path / "out", "--no-serving", "--tune", "2")
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "out/models").rglob("*.distcp")}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own signal")
def test_what_a_killed_demo_served_with_ends_too() -> None:
    code = (
        "import subprocess, time; from jobs.showcase import _end_with_parent; "
        "child = subprocess.Popen(['sleep', '60'], preexec_fn=_end_with_parent); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    demo = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert demo.stdout is not None
    served = psutil.Process(int(demo.stdout.readline()))
    demo.kill()
    demo.communicate()
    served.wait(10)


@pytest.mark.parametrize("trials", ["0", "-1"])
def test_a_search_of_no_trials_is_refused_before_anything_starts(trials: str) -> None:
    with pytest.raises(ConfigError, match=f"--tune {trials}"):
        job.parse(["--tune", trials])


def test_what_the_test_days_cannot_tell_is_said_so() -> None:
    ranking = {"model": "MLP", "label": "click", "auc": 0.7, "gauc": None, "intervals": {"auc": [0.6, 0.8]}}
    others = {"target_encoding": {"auc": 0.6, "gauc": None}}
    [said] = job._ranking_sentences({**ranking, **others})
    assert "AUC 0.7000" in said and "within a user not defined" in said
    [said] = job._ranking_sentences({**ranking, "auc": None, **others})
    assert "'click' is alike in all rows of the test days" in said
    [said] = job._recall_sentences(
        {"model": "YoutubeDNN", "recall@100": None, "popularity": {"recall@100": None}}
    )
    assert "nobody went on to want an item" in said
