"""What a sweep came to: the best settings, what they cost to find, what mattered."""

from collections.abc import Mapping
from typing import Any

from recsys_dist.errors import TrainError
from recsys_dist.plots import Fans, Parallel, Plot, Ranking
from recsys_dist.train.settings import TrainConfig
from recsys_dist.tune.ledger import Ledger, Plan, Result
from recsys_dist.tune.space import Space, Told, Values, settings
from recsys_dist.tune.sweep import SweepConfig

_SHOWN = 10  # trials of the table


def best(ledger: Ledger, plan: Plan) -> Result:
    """The best result on the highest rung that has one; TrainError where every trial failed."""
    for rung in reversed(range(len(plan.rungs))):
        ranked = ledger.ranked(rung, plan.maximise)
        if ranked:
            return ledger.on_rung(rung)[ranked[0]]
    raise TrainError(f"none of {len(ledger.trials)} trials has a result; {str(ledger.file)!r} says why")


def recipe(cfg: SweepConfig, values: Values) -> TrainConfig:
    """The run that `jobs.train --config` takes: the base with a trial's settings."""
    return settings(cfg.train, values)


def compute(ledger: Ledger, plan: Plan) -> dict[str, Any]:
    """Rows trained by the sweep, and by all its trials had each been trained in full.

    A trial that was never trained in full is taken to cost what those that were cost on average.
    """
    full = {job.trial: r for job, r in ledger.results.items() if job.rung == plan.last and r.trained_rows}
    swept = sum(r.trained_rows for job, r in ledger.results.items() if not job.check)
    rows = [result.trained_rows for result in full.values()]
    in_full = sum(rows) / len(rows) * len(ledger.trials) if rows else 0.0
    return {
        "swept_rows": swept,
        "all_in_full_rows": round(in_full),
        "share": swept / in_full if in_full else None,
        "measured_in_full": len(full),
        "swept_seconds": sum(r.seconds for job, r in ledger.results.items() if not job.check),
    }


def reached(ledger: Ledger, plan: Plan) -> float | None:
    """The best of the sweep over the best of all trials in full.

    None until all were trained in full, and where nothing was better than 0.
    """
    values = {
        job.trial: r.value for job, r in ledger.results.items() if job.rung == plan.last and not r.again
    }
    known = [value for value in values.values() if value is not None]
    mine = best(ledger, plan)
    if len(values) < len(ledger.trials) or mine.value is None or not known:
        return None
    top, bottom = (mine.value, max(known)) if plan.maximise else (min(known), mine.value)
    return top / bottom if bottom else None


def result(cfg: SweepConfig, space: Space, ledger: Ledger) -> dict[str, Any]:
    """All figures, as JSON."""
    plan, found = cfg.plan, best(ledger, cfg.plan)
    own = ledger.on_rung(plan.last).get(0)
    return {
        "model": cfg.train.model.name,
        "metric": cfg.train.chosen_metric,
        "trials": len(ledger.trials),
        "failed": _failures(ledger),
        "rungs": [
            {"fraction": fraction, "trials": len(ledger.on_rung(rung))}
            for rung, fraction in enumerate(plan.rungs)
        ],
        "best": {
            "trial": found.job.trial,
            "value": found.value,
            "fraction": plan.rungs[found.job.rung],
            "settings": ledger.trials[found.job.trial],
            "checkpoint": found.checkpoint,
        },
        "first_trial_value": own.value if own else None,
        "compute": compute(ledger, plan),
        "of_best_in_full": reached(ledger, plan),
        "importance": importance(space, ledger, plan),
        "table": rows(ledger, plan),
    }


def rows(ledger: Ledger, plan: Plan) -> list[dict[str, Any]]:
    """Every trial, best first: by how far it came, then by its value there; failed ones last."""
    found = []
    for trial, values in enumerate(ledger.trials):
        on = [ledger.on_rung(rung).get(trial) for rung in range(len(plan.rungs))]
        by_rung = [result.value if result else None for result in on]
        reached_rung = max((rung for rung, value in enumerate(by_rung) if value is not None), default=-1)
        value = by_rung[reached_rung] if reached_rung >= 0 else None
        found.append(
            {"trial": trial, "rung": reached_rung, "value": value, "by_rung": by_rung, "settings": values}
        )
    sign = -1 if plan.maximise else 1
    return sorted(found, key=lambda row: (-row["rung"], sign * (row["value"] or 0), row["trial"]))


def table(cfg: SweepConfig, ledger: Ledger) -> str:
    """The best trials, for people: the metric on each rung, and the settings."""
    plan = cfg.plan
    keys = list(cfg.space)
    shown = rows(ledger, plan)[:_SHOWN]
    cells = [["trial", *(_part(fraction) for fraction in plan.rungs), *map(_short, keys)]]
    for row in shown:
        values = ["" if value is None else f"{value:.4f}" for value in row["by_rung"]]
        cells.append([str(row["trial"]), *values, *(_text(row["settings"][key]) for key in keys)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    more = len(ledger.trials) - len(shown)
    title = (
        f"{cfg.train.chosen_metric} on the validation days, by the part of the training rows (newest first)"
    )
    return "\n".join([title, *lines, *([f"... and {more} more, stopped earlier"] if more else [])])


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What it means, for people; `found` is what `result` gave."""
    top, cost = found["best"], found["compute"]
    said = [
        f"best: trial {top['trial']}, {found['metric']} {top['value']:.4f} "
        f"on {_part(top['fraction'])} of the rows"
    ]
    if found["first_trial_value"] is not None and top["trial"] != 0:
        said[0] += f"; the settings it started from reach {found['first_trial_value']:.4f}"
    if cost["share"] is not None:
        how = (
            "as measured"
            if cost["measured_in_full"] == found["trials"]
            else "as the full ones cost on average"
        )
        said.append(
            f"compute: {cost['swept_rows']:,} rows trained, {cost['share']:.1%} of the "
            f"{cost['all_in_full_rows']:,} of training all {found['trials']} in full ({how})"
        )
    if found["of_best_in_full"] is not None:
        said.append(
            f"checked: {found['of_best_in_full']:.2%} of the best {found['metric']} of all trials in full"
        )
    if found["failed"]:
        trial, why = next(iter(found["failed"].items()))
        said.append(f"{len(found['failed'])} trials failed; trial {trial}: {why}")
    return said


def importance(space: Space, ledger: Ledger, plan: Plan) -> dict[str, float]:
    """How much each setting decides on the lowest rung, where all trials were; empty for few trials."""
    on = ledger.on_rung(0)
    told = [
        Told(ledger.trials[trial], 0, r.value, last=True)
        for trial, r in sorted(on.items())
        if r.value is not None
    ]
    return space.importance(told, plan.maximise)


def figures(cfg: SweepConfig, space: Space, ledger: Ledger) -> list[Plot]:
    """Importance, parallel coordinates, and how each trial rose from rung to rung."""
    plan, metric, name = cfg.plan, cfg.train.chosen_metric, cfg.train.model.name
    first = {trial: r.value for trial, r in ledger.on_rung(0).items() if r.value is not None}
    weights = importance(space, ledger, plan)
    winner = best(ledger, plan).job.trial
    plots: list[Plot] = []
    if weights:
        title = f"{name}: what decides {metric}"
        plots.append(
            Ranking(title, "importance (PED-ANOVA, lowest rung)", list(weights), list(weights.values()))
        )
    plots.append(
        Parallel(
            f"{name}: settings of the trials",
            f"{metric} on {_part(plan.rungs[0])} of the rows",
            {axis.key: [ledger.trials[trial][axis.key] for trial in first] for axis in space.axes},
            frozenset(axis.key for axis in space.axes if axis.kind == "log"),
            [value if plan.maximise else -value for value in first.values()],
            list(first).index(winner) if winner in first else None,
        )
    )
    lines = [
        [(plan.rungs[rung], value) for rung, value in enumerate(row["by_rung"]) if value is not None]
        for row in reversed(rows(ledger, plan))
    ]
    if any(lines):
        label = "part of the training rows, the newest ones"
        plots.append(Fans(f"{name}: {metric} of the trials", label, metric, [line for line in lines if line]))
    return plots


def _failures(ledger: Ledger) -> dict[int, str]:
    return {job.trial: r.error for job, r in ledger.results.items() if r.error is not None and not job.check}


def _part(fraction: float) -> str:
    return "all" if fraction == 1 else f"{fraction:.1%}".replace(".0%", "%")


def _short(key: str) -> str:
    """`optimizer.deep.lr` -> `deep.lr`: the last two names tell settings apart."""
    return ".".join(key.split(".")[-2:])


def _text(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
