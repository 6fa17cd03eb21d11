"""Train and evaluate a model as one tracked run: what `jobs.train` and the quickstart share."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys_dist import plots, tracking
from recsys_dist.config import digest
from recsys_dist.data.prepared import Prepared
from recsys_dist.evaluate import EvaluateConfig, evaluate_ranking, evaluate_recall, load_trained, write_json
from recsys_dist.outbox import Recorder
from recsys_dist.plots import Curves, Plot, Reliability
from recsys_dist.tracking import TrackingConfig
from recsys_dist.train import progress, trainer
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.trainer import FitResult
from recsys_dist.train.warm_start import goes_on_from


@dataclass(frozen=True)
class Outcome:
    """A finished run: how it was trained, and, if asked for, what it is worth on the test days."""

    fitted: FitResult
    evaluation: dict[str, Any] | None
    plots: list[Plot]
    delivery: tracking.Delivery
    tracking_uri: str
    peak_rss_bytes: int


def run(cfg: TrainConfig, out: Path, tracked: TrackingConfig, evaluate: EvaluateConfig | None) -> Outcome:
    """Fit `cfg` below `out`, evaluate, and tell MLflow. What is finished is not done again."""
    prepared = Prepared.open(cfg.data)
    directory = trainer.run_directory(cfg, prepared, out / "models")
    with tracking.open_run(tracked, out, directory.name) as live:
        live.record.config(cfg.model_dump(mode="json"))
        live.record.tags(_chain(cfg, directory.name))
        live.record.data(prepared.path.name, prepared.manifest.data_digest, str(prepared.path))
        told = _told(live.record)
        fitted = trainer.fit(cfg, out / "models", on_report=_curve_recorder(live.record, told))
        live.record.checkpoint(fitted.checkpoint)
        evaluation = evaluated(prepared, fitted.checkpoint, evaluate) if evaluate else None
        figures = figures_of(cfg, fitted, evaluation)
        if evaluation:
            final = final_metrics(evaluation)
            live.record.metrics({key: value for key, value in final.items() if told.get((key, 0)) != value})
        for figure in figures:
            live.record.artifact(plots.save(figure, fitted.run / "plots"), "plots")
        delivery = live.close()
        return Outcome(fitted, evaluation, figures, delivery, live.uri, live.peak_rss_bytes)


def _chain(cfg: TrainConfig, name: str) -> dict[str, str]:
    """Tags that tell the runs of a chain of warm starts: its first run, and the one before this."""
    if cfg.warm_start is None:
        return {"chain": name}
    _, chain = goes_on_from(cfg.warm_start)
    return {"chain": chain.first, "warm_start": Path(cfg.warm_start).name}


def add_evaluation(checkpoint: Path, evaluation: dict[str, Any]) -> tracking.Delivery | None:
    """Add an evaluation to the MLflow run that trained the checkpoint; None where that was not tracked.

    None too while another process writes that run: it delivers this as well.
    """
    run = checkpoint.resolve().parent.parent
    out = run.parent.parent
    record = Recorder(out / "tracking" / run.name)
    if not record.path.exists():
        return None
    record.metrics(final_metrics(evaluation))
    return next((found for found in tracking.deliver_pending(out) if found.name == run.name), None)


def final_metrics(evaluation: dict[str, Any]) -> dict[str, float]:
    """The model's and baselines' numbers as `test/<scorer>/<metric>`."""
    flat: dict[str, float] = {}
    for scorer, found in evaluation.items():
        values = found.get("unseen", found) if isinstance(found, dict) else {}
        for metric, value in values.items():
            if isinstance(value, int | float):
                flat[f"{evaluation['split']}/{scorer}/{metric.replace('@', '_at_')}"] = float(value)
    return flat


def figures_of(cfg: TrainConfig, fitted: FitResult, evaluation: dict[str, Any] | None) -> list[Plot]:
    """Learning curves, the layers' gradients, and the reliability diagram of a ranker."""
    metric = cfg.chosen_metric
    curve = Curves(
        f"{cfg.model.name}: {metric} on the validation days",
        "epoch",
        metric,
        {metric: [(entry["epoch"], entry[metric]) for entry in fitted.history]},
    )
    told = [line for line, _ in progress.read(fitted.run / progress.PROGRESS) if line["kind"] == "curve"]
    phases = {"choose": "training days", "refit": "training and validation days"}
    loss = Curves(
        f"{cfg.model.name}: training loss",
        "step",
        "mean loss of the rows before their step",
        {
            phases[phase]: [(line["step"], line["loss"]) for line in told if line["phase"] == phase]
            for phase in dict.fromkeys(line["phase"] for line in told)
        },
    )
    gradients = _gradients(cfg, told)
    figures: list[Plot] = [*([loss] if loss.lines else []), curve, *([gradients] if gradients.lines else [])]
    if evaluation and "reliability" in evaluation:
        found = evaluation["reliability"]
        title = f"{cfg.model.name}: are its probabilities right?"
        figures.append(Reliability(title, found["predicted"], found["observed"], found["rows"]))
    return figures


def _gradients(cfg: TrainConfig, told: list[dict[str, Any]]) -> Curves:
    """A line per layer: one that falls away vanishes, one that climbs explodes (see dense.clip_norm)."""
    chosen = [line for line in told if line["phase"] == "choose"]
    layers = dict.fromkeys(layer for line in chosen for layer in line["gradients"])
    return Curves(
        f"{cfg.model.name}: gradient of each layer",
        "step",
        "L2 norm before clipping",
        {
            layer: [(line["step"], line["gradients"].get(layer, math.nan)) for line in chosen]
            for layer in layers
        },
        logarithmic=True,
    )


def evaluated(prepared: Prepared, checkpoint: Path, cfg: EvaluateConfig) -> dict[str, Any]:
    """What a run's checkpoint is worth; kept beside it, so that it is computed once."""
    run = checkpoint.absolute().parent.parent
    key = digest([checkpoint.name, prepared.manifest.data_digest, cfg.digest()])
    file = run / f"evaluation-{key}.json"
    if not file.exists():
        trained = load_trained(checkpoint, prepared)
        if trained.model.task == "ranking":
            write_json(evaluate_ranking(prepared, trained, cfg, run), file)
        else:
            write_json(evaluate_recall(prepared, trained, cfg), file)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


# Runs of former versions, which have told less, are told again when they are asked for once more.
_OF_A_POINT: tuple[str, ...] = ("loss", "rows_per_s", "skipped", "loader_s", "saving_s")


def _told(record: Recorder) -> dict[tuple[str, int], float]:
    """(key, step) -> the value that former starts of the run recorded last."""
    return {
        (key, line["step"]): value
        for line, _ in record.read()
        if line["kind"] == "metrics"
        for key, value in line["values"].items()
    }


def _curve_recorder(
    record: Recorder, told: Mapping[tuple[str, int], float]
) -> Callable[[dict[str, Any]], None]:
    """A listener for the trainer's progress that tells each point once, also over restarts of the driver."""

    def on_report(line: dict[str, Any]) -> None:
        phase = line["phase"]
        if line["kind"] == "notice":
            return
        if line["kind"] == "curve":
            step, prefix = line["step"], phase
            found = {name: line[name] for name in _OF_A_POINT if name in line}
            found |= {f"gradient/{layer}": norm for layer, norm in line["gradients"].items()}
            found |= {f"step_ms/{part}": ms for part, ms in line.get("step_ms", {}).items()}
            for table, shares in line.get("tables", {}).items():
                found |= {f"table/{table}/{share}": value for share, value in shares.items()}
        else:
            step, prefix = line.get("epochs_before", 0) + line["epoch"], f"{phase}/epoch"
            found = {key: value for key, value in line.items() if isinstance(value, float)}
        values = {f"{prefix}/{name.replace('@', '_at_')}": value for name, value in found.items()}
        fresh = {key: value for key, value in values.items() if (key, step) not in told}
        if fresh:
            record.metrics(fresh, step=step)

    return on_report
