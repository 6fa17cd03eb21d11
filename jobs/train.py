"""Trains a model: `python -m jobs.train wide_deep data=runs/data`; more with --help."""

import sys
from pathlib import Path

from jobs import recipes, tracked
from jobs.command import reported
from recsys_dist import tracking
from recsys_dist.data.prepared import Prepared
from recsys_dist.train import trainer
from recsys_dist.train.plan import describe
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.telemetry import TRACE


def summary(result: trainer.FitResult, cfg: TrainConfig) -> str:
    """What was trained, for people."""
    metric = cfg.chosen_metric
    epochs = "\n".join(
        f"  epoch {entry['epoch']}: loss {entry['loss']:.4f}, {metric} {entry[metric]:.4f}"
        for entry in result.history
        if "loss" in entry
    )
    if not epochs:  # it counts
        return f"{cfg.model.name}: {metric} {result.history[0][metric]:.4f}\ncheckpoint: {result.checkpoint}"
    refit = ", then trained anew with the validation days" if cfg.refit else ""
    return (
        f"{cfg.model.name}, validated after each epoch:\n{epochs}\n"
        f"epoch {result.chosen_epoch} was best{refit}; "
        f"{result.rows_per_s:,.0f} rows/s with {cfg.workers_in_words}\n"
        f"checkpoint: {result.checkpoint}"
    )


def traced(file: Path) -> str:
    """Where the trace of a run with --profile lies."""
    if file.exists():
        return f"trace: {file} (for ui.perfetto.dev)"
    return "no trace: the run was finished before, or has fewer than 10 steps"


def main(argv: list[str]) -> None:
    asked = recipes.parse(argv)
    cfg = asked.cfg
    if asked.plan:
        prepared = Prepared.open(cfg.data)
        plans = trainer.planned(cfg, prepared)
        run = trainer.finished(cfg, prepared, asked.out)
        print("\n\n".join(describe(plan, run.peak_bytes if run else ()) for plan in plans))
        trainer.refuse_what_does_not_fit(cfg, plans)
        return
    tracking.deliver_pending(Path(asked.out))
    outcome = tracked.run(cfg, Path(asked.out), asked.tracked, evaluate=None)
    print(summary(outcome.fitted, cfg))
    if cfg.profile:
        print(traced(outcome.fitted.run / TRACE))
    print(f"MLflow run {outcome.delivery.run_id or 'not yet delivered'} at {outcome.tracking_uri}")


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
