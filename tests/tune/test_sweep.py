"""A sweep as a user runs it: killed, resumed, tracked, and its best settings trained."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from jobs import recipes
from jobs import tune as job
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError, NonFiniteLossError, RecsysError, TrainError
from recsys_dist.train.checkpoint import load_for_inference
from recsys_dist.tune import sweep as running
from recsys_dist.tune.ledger import Job, Ledger
from recsys_dist.tune.space import Space
from tests.train import prepared

ROOT = Path(__file__).resolve().parent.parent.parent
SPACE = """
model.hidden: {choice: [[8], [16]]}
optimizer.deep.lr: {log: [0.01, 1]}
optimizer.dense.lr: {choice: [0.01, 1.0e+30]}
"""


def arguments(folder: Path) -> list[str]:
    settings = [
        "model.embedding_dim=8",
        "model.hidden=[8]",
        "optimizer.dense.lr=0.01",
        "batch_rows=64",
        "max_failures=0",
    ]
    options = ["--space", str(folder / "space.yaml"), "--out", str(folder / "out"), "--seed", "1"]
    ladder = ["--trials", "3", "--rungs", "[0.5, 1]", "--keep", "2", "--concurrent", "2"]
    return ["wide_deep", f"data={folder / 'data'}", "epochs=1", *settings, *options, *ladder]


@pytest.mark.e2e
@pytest.mark.timeout(800)  # several small training runs, each with its own processes
def test_a_sweep_is_killed_goes_on_and_its_best_can_be_trained(tmp_path: Path) -> None:
    prepared.make(tmp_path / "data")
    (tmp_path / "space.yaml").write_text(SPACE)
    command = [sys.executable, "-m", "jobs.tune", *arguments(tmp_path), "--json", str(tmp_path / "all.json")]
    killed = subprocess.Popen(
        [*command, "num_workers=1"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not (files := list((tmp_path / "out").glob("sweep-*/trials.jsonl"))) or '"result"' not in read(
        files[0]
    ):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = Ledger(files[0]).results
    assert 0 < len(before) < 5

    alone = [*command, "num_workers=0"]  # the same sweep, whose trials' drivers train
    done = subprocess.run(alone, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    book, found = Ledger(files[0]), json.loads((tmp_path / "all.json").read_text())
    assert before.items() <= book.results.items(), "what was done is not done again"
    assert {job for job in book.results if job.rung == 0} == {Job(trial, 0) for trial in range(3)}
    assert [rung["trials"] for rung in found["rungs"]] in ([3, 1], [3, 2])
    rows = [result.trained_rows for result in book.results.values() if result.value is not None]
    assert set(rows) <= {435, 870} and found["compute"]["swept_rows"] == sum(rows)
    assert found["best"]["fraction"] == 1 and "compute:" in done.stdout

    best = Path(found["best"]["checkpoint"])
    assert list((tmp_path / "out").glob("sweep-*/trials/*/*/choose/*")) == [best], (
        "losers leave no checkpoint"
    )
    _, manifest = load_for_inference(best)
    assert manifest.metrics["auc"] == found["best"]["value"]
    cfg, *_ = recipes.parse(["--config", str(files[0].parent / "best.yaml")])
    assert list(cfg.model.hidden) == found["best"]["settings"]["model.hidden"]
    assert (cfg.refit, cfg.newest_fraction, cfg.model.embedding_dim) == (True, 1.0, 8)
    assert {file.suffix for file in (files[0].parent / "plots").iterdir()} == {".svg"}

    with sqlite3.connect(tmp_path / "out/mlflow.db") as store:
        parents = store.execute("select value from tags where key = 'mlflow.parentRunId'").fetchall()
        [[parent]] = store.execute("select run_uuid from metrics where key = 'best/auc' limit 1").fetchall()
        ended = dict(store.execute("select name, status from runs").fetchall())
    assert parents == [(parent,)] * 3 and len(ended) == 4 and "RUNNING" not in ended.values()

    began = time.perf_counter()
    subprocess.run(alone, cwd=ROOT, capture_output=True, timeout=100, check=True)
    assert time.perf_counter() - began < 60, "a finished sweep starts no cluster"


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def test_as_many_trials_at_a_time_as_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)

    def at_a_time(resources: dict[str, float], *more: str) -> int:
        monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
        cfg, _ = job.parse([*arguments(tmp_path)[:-2], *more])
        return running._concurrent(cfg)

    assert at_a_time({"CPU": 16.0}) == 16
    assert at_a_time({"CPU": 16.0}, "num_workers=4", "threads_per_worker=2") == 2
    assert at_a_time({"CPU": 2.0}, "num_workers=4") == 1
    assert at_a_time({"CPU": 64.0, "GPU": 4.0}, "num_workers=2", "use_gpu=true") == 2
    assert at_a_time({"CPU": 16.0}, "--concurrent", "3") == 3
    assert at_a_time({"CPU": 16.0}, "num_workers=0", "threads_per_worker=2") == 8


def test_a_trial_without_workers_has_what_it_computes_with(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    alone = ["num_workers=0", "threads_per_worker=2", "use_gpu=true"]
    for more, expected in (["num_workers=2"], (0, None)), (alone, (2, 1)):
        cfg, _ = job.parse([*arguments(tmp_path), *more])
        found = running._resources(cfg.train)
        assert (found["cpu"], found.get("gpu")) == expected


def test_a_cluster_that_is_too_small_ends_a_sweep_before_any_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prepared.make(tmp_path / "data")
    (tmp_path / "space.yaml").write_text(SPACE)
    monkeypatch.setattr(running.session, "connect", lambda **_: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(running, "_run", lambda *_: pytest.fail("a trial was started"))
    cfg, args = job.parse([*arguments(tmp_path), "num_workers=2"])
    with pytest.raises(ConfigError, match=r"need 2 CPUs and the cluster has 1; take fewer workers"):
        running.sweep(cfg, args.out, SimpleNamespace())


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConfigError("training would hold 9 GiB, and this machine has 4"), True),
        (TrainError("a worker was lost"), True),
        (NonFiniteLossError("row 7"), False),
    ],
)
def test_a_trial_fails_for_good_by_its_settings_alone(
    error: RecsysError, again: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fit(*_: object) -> None:
        raise error

    monkeypatch.setattr(running.trainer, "fit", fit)
    cfg = {"data": str(prepared.make(tmp_path / "data")), "model": {"name": "mlp"}}
    found = json.loads(running._train({"config": cfg, "out": str(tmp_path), "last": True})["outcome"])
    assert (found["value"], found["error"], found["again"]) == (None, str(error), again)
    wrong = {"config": {**cfg, "label": "clik"}, "out": str(tmp_path), "last": True}
    found = json.loads(running._train(wrong)["outcome"])
    assert "did you mean 'click'" in found["error"] and not found["again"]


def jobs_of(folder: Path, *more: str) -> running._Jobs:
    """A sweep's, with nothing in its ledger."""
    data = Prepared.open(prepared.make(folder / "data"))
    (folder / "space.yaml").write_text(SPACE)
    cfg, _ = job.parse([*arguments(folder), *more])
    ledger = Ledger(folder / "trials.jsonl")
    listener = SimpleNamespace(started=lambda *_: None, finished=lambda *_: None)
    return running._Jobs(cfg, Space.parse(cfg.space, cfg.train, data), ledger, listener)


def outcome(value: float, checkpoint: Path | None = None) -> dict[str, str]:
    found = {"value": value, "trained_rows": 1, "seconds": 1.0, "checkpoint": checkpoint and str(checkpoint)}
    return {"outcome": json.dumps(found)}


def test_rungs_are_parts_of_the_rows_that_the_run_is_to_train_on(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "newest_fraction=0.1")
    assert jobs.suggest("a")["config"]["newest_fraction"] == 0.05
    jobs.on_trial_complete("a", outcome(0.5))
    promoted = jobs.suggest("b")
    assert promoted["last"] and promoted["config"]["newest_fraction"] == 0.1


def test_a_loser_that_is_promoted_later_is_trained_anew(tmp_path: Path) -> None:
    """Of a finished run without its checkpoint, a promotion would name what is not there."""
    jobs = jobs_of(tmp_path, "--check")
    runs = [tmp_path / f"trials/{trial}/run" for trial in range(3)]
    for trial, value in enumerate((0.9, 0.5, 0.6)):
        (runs[trial] / "choose/epoch-0001").mkdir(parents=True)
        (runs[trial] / "result.json").write_text("{}")
        jobs.ledger.start({})
        jobs.running["now"] = Job(trial, jobs.cfg.plan.last, check=trial > 0)
        jobs.running["other"] = Job(1, jobs.cfg.plan.last)
        jobs.on_trial_complete("now", outcome(value, runs[trial] / "choose/epoch-0001"))
    assert [run.exists() for run in runs] == [True, True, False], "the best, and one that trains now"
    jobs.on_trial_complete("other", outcome(0.8, runs[1] / "choose/epoch-0001"))
    assert [run.exists() for run in runs] == [True, False, False]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name one recipe"),
        (["wide_dep"], "did you mean 'wide_deep'"),
        (["wide_deep", "--rungs", "[0.5]"], "end in 1"),
        (["wide_deep", "--rungs", "[0.5, 0.2, 1]"], "rising fractions"),
        (["wide_deep", "--trials", "0"], "'trials'.*greater than or equal to 1"),
        (["wide_deep", "--keep", "1"], "'keep'.*greater than or equal to 2"),
        (["wide_deep", "--trials", "many"], "'trials'.*integer"),
        (["wide_deep", "--space", "nowhere.yaml"], "nowhere.yaml.*cannot be read"),
    ],
)
def test_mistakes_are_explained(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job.parse(argv)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        job.parse(["--help"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("{log: [0.01, 0.3]}", "--check", "best.yaml", "newest 1/16"))
