"""What the finished runs of a suite come to: means and spreads over seeds, goals met or not, figures."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.suites import Goal, Suite
from recsys_dist.metrics import LESS_IS_BETTER
from recsys_dist.plots import Dots

BEST = "the best of ours"


def summarise(
    name: str, suite: Suite, records: Sequence[dict[str, Any]], tried: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """All figures of a suite, from a record per (row, seed) and a line per setting tried on validation."""
    rows = [_row([r for r in records if r["row"] == row.name]) for row in suite.rows]
    found = {row["row"]: row for row in rows if row}
    baselines = records[0]["baselines"] if records else {}
    return {
        "suite": name,
        "title": suite.title,
        "hardware": sorted({record["hardware"] for record in records}),
        "dates": sorted({record["date"] for record in records}),
        "metrics": list(suite.metrics),
        "rows": list(found.values()),
        "baselines": baselines,
        "published": {row: list(values) for row, values in suite.published.items()},
        "floors": {row: list(values) for row, values in suite.floors.items()},
        "goals": [_judged(goal, suite, found, baselines) for goal in suite.goals],
        "tried": list(tried),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (by n - 1) and standard error of the mean; None for one seed."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "mean": statistics.fmean(values),
        "deviation": deviation,
        "standard_error": deviation / len(values) ** 0.5 if deviation is not None else None,
        "values": list(values),
    }


def _row(records: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table out of its seeds' records; empty without any."""
    if not records:
        return {}
    records = sorted(records, key=lambda record: record["seed"])
    first = records[0]
    return {
        **{key: first[key] for key in ("row", "model", "parameters", "settings", "valid_metric")},
        "seeds": [record["seed"] for record in records],
        "metrics": {m: spread([record["metrics"][m] for record in records]) for m in first["metrics"]},
        "valid": spread([record["valid"] for record in records]),
        "epochs": [record["chosen_epoch"] for record in records],
        "seconds": spread([record["seconds"] for record in records]),
    }


def _judged(
    goal: Goal,
    suite: Suite,
    found: Mapping[str, dict[str, Any]],
    baselines: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """A goal, by which row it is met or not; `met` is None where a row it speaks of was not run."""
    means = {name: {m: row["metrics"][m]["mean"] for m in suite.metrics} for name, row in found.items()}
    best = max(means, key=lambda name: means[name][suite.metrics[0]], default=BEST)
    of = best if goal.of is None else goal.of
    least = goal.least if goal.ahead_of is None else {**baselines, **means}.get(goal.ahead_of, {})
    met = None
    if of in means and least:
        signs = {metric: -1 if metric in LESS_IS_BETTER else 1 for metric in least}
        ahead = [signs[metric] * (means[of][metric] - value) for metric, value in least.items()]
        met = all(by >= 0 if goal.ahead_of is None else by > 0 for by in ahead)
    return {
        "aim": goal.aim,
        "of": goal.of or BEST,
        "ahead_of": goal.ahead_of,
        "least": dict(least),
        "row": of,
        "reached": {metric: means[of][metric] for metric in least} if of in means else {},
        "met": met,
        "seeds": len(found[of]["seeds"]) if of in found else 0,
        "of_seeds": suite.seeds,
    }


def figures(result: Mapping[str, Any]) -> list[Dots]:
    """Ours, with their spread, among published rows, floors and baselines: a figure per metric."""
    drawn = []
    for at, metric in enumerate(result["metrics"]):
        ours = {row["row"]: row["metrics"][metric] for row in result["rows"]}
        points = {
            "ours": {row: (found["mean"], found["deviation"] or 0.0) for row, found in ours.items()},
            "published": {row: (values[at], 0.0) for row, values in result["published"].items()},
            "floor, published": {row: (values[at], 0.0) for row, values in result["floors"].items()},
            "baseline, here": {f"{row}, here": (v[metric], 0.0) for row, v in result["baselines"].items()},
        }
        marks = {
            f"best of ours, {'aim' if goal['aim'] else 'required'}": goal["least"][metric]
            for goal in result["goals"]
            if goal["of"] == BEST and metric in goal["least"]
        }
        shown = {series: found for series, found in points.items() if found}
        drawn.append(Dots(f"{result['suite']}: {metric}", metric, shown, marks))
    return drawn
