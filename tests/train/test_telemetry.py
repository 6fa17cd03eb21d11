"""What a run tells of itself, under which names: Ray's metrics, and MLflow's by way of the outbox."""

import re
from pathlib import Path

import pytest

from jobs import tracked
from recsys_dist.outbox import Recorder
from recsys_dist.train import telemetry
from recsys_dist.train.telemetry import Telemetry

POINT = {
    "kind": "curve",
    "phase": "choose",
    "epoch": 1,
    "epochs": 2,
    "step": 7,
    "rows": 70,
    "of_rows": 100,
    "loss": 0.5,
    "rows_per_s": 1000.0,
    "loader_s": 0.25,
    "saving_s": 0.125,
    "step_ms": {"exchange": 2.0, "dense": 3.0},
    "gradients": {"tower.0": 0.75},
    "tables": {"item": {"unknown": 0.1, "distinct": 0.2}},
}
OPERATIONS = Path(__file__).resolve().parents[2] / "docs/operations.md"


@pytest.fixture
def told(monkeypatch) -> dict[tuple[str, ...], float]:
    """(metric, other labels) -> value, of all that is told under {run="r", phase="choose", worker}."""
    found: dict[tuple[str, ...], float] = {}

    class Metric:
        def __init__(self, name: str, _description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == self.keys or set(tags) == set(self.keys)
            assert (tags["run"], tags["phase"]) == ("r", "choose")
            others = [tags[key] for key in self.keys if key not in ("run", "phase", "worker")]
            found[(self.name.removeprefix("recsys_train_"), tags["worker"], *others)] = value

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0, "Ray's counters take no 0"
            self.set(value, tags)

    monkeypatch.setattr(telemetry, "Gauge", Metric)
    monkeypatch.setattr(telemetry, "Counter", Metric)
    return found


def test_each_worker_tells_what_is_its_own_and_one_what_is_alike(told):
    own = {
        ("loader_s",): 0.25,
        ("saving_s",): 0.125,
        ("step_ms", "exchange"): 2.0,
        ("step_ms", "dense"): 3.0,
        ("table", "item", "unknown"): 0.1,
        ("table", "item", "distinct"): 0.2,
    }
    Telemetry("r", 1).tell(POINT, 30)
    assert told == {(name, "1", *labels): value for (name, *labels), value in own.items()}
    told.clear()
    Telemetry("r", 0).tell(POINT, 30)
    alike = {("rows",): 30, ("rows_per_s",): 1000.0, ("loss",): 0.5, ("gradient", "tower.0"): 0.75}
    assert told == {(name, "0", *labels): value for (name, *labels), value in (own | alike).items()}
    told.clear()
    Telemetry("r", 0).tell(POINT, 0)  # all rows since the last point were left out
    assert ("loss", "0") in told and ("rows", "0") not in told


def test_without_ray_it_tells_nobody():
    Telemetry("r", 0).tell(POINT, 30)


def test_mlflow_hears_each_point_once_under_names_that_are_documented(tmp_path):
    record = Recorder(tmp_path)
    for _ in range(2):  # as when the driver is started anew
        tracked._curve_recorder(record, tracked._told(record))(POINT)
    [line] = [line for line, _ in record.read()]
    assert line["step"] == 7
    assert line["values"] == {
        "choose/loss": 0.5,
        "choose/rows_per_s": 1000.0,
        "choose/loader_s": 0.25,
        "choose/saving_s": 0.125,
        "choose/gradient/tower.0": 0.75,
        "choose/step_ms/exchange": 2.0,
        "choose/step_ms/dense": 3.0,
        "choose/table/item/unknown": 0.1,
        "choose/table/item/distinct": 0.2,
    }
    said = OPERATIONS.read_text()
    for name in ("loss", "rows_per_s", "loader_s", "saving_s", "gradient", "step_ms", "table"):
        assert re.search(rf"`{name}[`/]", said), f"docs/operations.md says nothing of {name}"


def test_points_of_former_versions_are_still_read(tmp_path):
    old = {key: POINT[key] for key in ("kind", "phase", "step", "loss", "rows_per_s", "gradients")}
    record = Recorder(tmp_path)
    tracked._curve_recorder(record, tracked._told(record))(old)
    [line] = [line for line, _ in record.read()]
    assert line["values"].keys() == {"choose/loss", "choose/rows_per_s", "choose/gradient/tower.0"}
