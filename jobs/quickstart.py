"""The main job, from a behaviour log to two trained, evaluated, tracked models, served, and a report.

examples:
  python -m jobs.quickstart                                     (simulates a log)
  python -m jobs.quickstart --data path/to/KuaiRand-Pure        (a directory of a known data set)
  python -m jobs.quickstart --data my_log.yaml                  (your own logs: docs/own_logs.md)
  python -m jobs.quickstart --tune 20                           (searches the ranking model's settings first)

The same command again reuses what is unchanged and continues what was interrupted.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from jobs import export as export_job
from jobs import prepare as prepare_job
from jobs import recipes, showcase, tracked
from jobs import tune as tune_job
from jobs.command import reported
from recsys_dist import report, session, tracking
from recsys_dist.bundle import Bundle
from recsys_dist.data.output import write_text
from recsys_dist.data.pipeline import PrepareConfig, prepare
from recsys_dist.data.prepared import Prepared
from recsys_dist.data.sources.protocol import source_for
from recsys_dist.errors import ConfigError, RegistryError
from recsys_dist.evaluate import EvaluateConfig
from recsys_dist.models.protocol import Task
from recsys_dist.registry import CHAMPION, Registry, RegistryConfig
from recsys_dist.report import Ledger, Story
from recsys_dist.train.settings import TrainConfig
from recsys_dist.tune.sweep import SweepConfig

RECIPES: dict[Task, str] = {"recall": "youtubednn", "ranking": "wide_deep"}
REQUESTS = 200  # whose latency the report tells


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="simulate", help="logs to use; default: simulate some")
    parser.add_argument("--out", default="runs/quickstart", help="directory for everything that is made")
    parser.add_argument("--workers", type=int, default=2, help="training workers")
    parser.add_argument(
        "--tune", type=int, metavar="TRIALS", help="search the ranking model's settings first"
    )
    parser.add_argument("--tracking-uri", help="MLflow server; default: an SQLite file below --out")
    parser.add_argument(
        "--no-serving", action="store_true", help="end with the bundle; do not start the service"
    )
    args = parser.parse_args(argv)
    if args.tune is not None and args.tune < 1:
        raise ConfigError(f"--tune {args.tune}: expected a number of trials from 1 on, or no --tune at all")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    out = Path(args.out)
    clock = Clock(5 - args.no_serving + bool(args.tune))
    settings = tracking.TrackingConfig.parse({"uri": args.tracking_uri})
    tracking.deliver_pending(out)
    session.connect(dashboard=bool(args.tune))
    with clock.stage("prepare", "preparing the log"):
        prepared = prepare(PrepareConfig(source=source_for(args.data)), out / "data")
        print(prepare_job.summary(prepared))
    common = {"data": str(prepared.path), "num_workers": args.workers}
    configs = {task: recipes.named(recipe, common) for task, recipe in RECIPES.items()}
    tuned = None
    if args.tune:
        with clock.stage("tune", f"searching settings of {RECIPES['ranking']}"):
            tuned = searched(configs["ranking"], args.tune, out, settings)
            configs["ranking"] = tuned.best.model_copy(update={"num_workers": args.workers})
            print(tune_job.in_words(tuned))
    outcomes: dict[Task, tracked.Outcome] = {}
    for task, cfg in configs.items():
        with clock.stage(task, f"training and evaluating {cfg.model.name} ({task})"):
            outcomes[task] = tracked.run(cfg, out, settings, EvaluateConfig())
            print(_trained(outcomes[task]))
    with clock.stage("export", "exporting both models as one bundle"):
        bundle, champion = exported(prepared, outcomes, out, args.tracking_uri)
    serving = None
    if not args.no_serving:
        with clock.stage("serve", "serving it, and asking for recommendations"):
            ray.shutdown()  # the service has a cluster of its own
            follow = (
                ["--out", str(out)] if champion and not args.tracking_uri else ["--bundle", str(bundle.path)]
            )
            with showcase.service(follow, out / "serving") as port:
                serving = showcase.show(bundle, port, REQUESTS)
    result = summarise(prepared, outcomes, clock.seconds)
    result |= {"serving": serving} if serving else {}
    result |= {"tune": tuned.figures} if tuned else {}
    write_text(json.dumps(result, indent=1), out / "report.json")
    serve = f"make serve OUT={out}" if champion else f"python -m jobs.serve --bundle {bundle.path}"
    story = tell(prepared, outcomes, result, out, serve)
    report.write(result, story, out / "report.html")
    print("\n" + "\n".join(story.summary))
    print("\nNext:\n" + "\n".join(f"  {what}: {command}" for what, command in story.next_steps))


def searched(cfg: TrainConfig, trials: int, out: Path, settings: tracking.TrackingConfig) -> tune_job.Outcome:
    """A sweep whose trials need no workers; its best settings the demo's workers then train."""
    base = cfg.model_copy(update={"num_workers": 0})
    space = recipes.SPACES[cfg.model.name]
    sweep = {"train": base.model_dump(mode="json"), "space": space, "trials": trials}
    if trials <= 2:
        sweep["rungs"] = [1.0]  # two at least go up each rung: all would be trained on every one
    return tune_job.run(SweepConfig.parse(sweep), out, settings)


def exported(
    prepared: Prepared, outcomes: dict[Task, tracked.Outcome], out: Path, tracking_uri: str | None
) -> tuple[Bundle, bool]:
    """The bundle, and whether it is the registry's champion now."""
    checkpoints: dict[Task, Path] = {task: outcomes[task].fitted.checkpoint for task in export_job.TASKS}
    cfg = export_job.ExportConfig()
    uri = tracking_uri or f"sqlite:///{out.absolute() / 'mlflow.db'}"
    registry = Registry(RegistryConfig.parse({"uri": uri}))
    try:
        bundle, published = export_job.run(cfg, prepared, checkpoints, out, registry)
    except RegistryError as error:  # it may be away; the bundle is here all the same
        print(f"not registered: {error}")
        bundle, published = export_job.run(cfg, prepared, checkpoints, out, None)
    print(export_job.summary(bundle, published, out))
    return bundle, published is not None and CHAMPION in published.entry.aliases


class Clock:
    """Seconds of each of so many stages."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        print(f"\n== {len(self.seconds) + 1}/{self.stages}  {title}", flush=True)
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)


def summarise(
    prepared: Prepared, outcomes: dict[Task, tracked.Outcome], seconds: dict[str, float]
) -> dict[str, Any]:
    """report.json."""
    ranking, recall = outcomes["ranking"].evaluation or {}, outcomes["recall"].evaluation or {}
    keep = ("auc", "gauc", "logloss", "ece", "rows")
    scorers = [name for name in ("target_encoding", "popularity", "bayes") if name in ranking]
    cuts = [key for key in recall["model"]["unseen"] if key.startswith(("recall@", "ndcg@"))]
    others = [name for name in ("popularity", "item_cosine") if name in recall]
    return {
        "data": {
            "source": prepared.manifest.config["source"],
            "digest": prepared.manifest.data_digest,
            "path": str(prepared.path),
            "split": prepared.manifest.config["split"],
            "ledger": {k: prepared.manifest.ledger[k] for k in ("read", "kept", "quarantined", "refused")},
        },
        "ranking": {
            "model": "Wide & Deep",
            "label": ranking["label"],
            **{k: ranking["model"][k] for k in keep},
            "intervals": ranking["model"]["intervals"],
            **{name: {k: ranking[name][k] for k in keep if k in ranking[name]} for name in scorers},
        },
        "recall": {
            "model": "YoutubeDNN",
            **{k: recall["model"]["unseen"][k] for k in cuts},
            "users": recall["users"],
            "pairs": recall["pairs"],
            **{name: {k: recall[name]["unseen"][k] for k in cuts} for name in others},
        },
        "mlflow": {
            "tracking_uri": outcomes["ranking"].tracking_uri,
            "run_ids": {task: outcome.delivery.run_id for task, outcome in outcomes.items()},
        },
        "seconds": seconds,
        "peak_rss_bytes": max(outcome.peak_rss_bytes for outcome in outcomes.values()),
    }


def tell(
    prepared: Prepared, outcomes: dict[Task, tracked.Outcome], result: dict[str, Any], out: Path, serve: str
) -> Story:
    """What the run means, for people."""
    ledger = prepared.manifest.ledger
    summary = [
        _data_sentence(prepared),
        *_ranking_sentences(result["ranking"]),
        *_recall_sentences(result["recall"]),
        *_tuning_sentences(result.get("tune")),
        *_serving_sentences(result.get("serving")),
    ]
    waiting = sum(outcome.delivery.waiting_records for outcome in outcomes.values())
    if waiting:
        summary.append(
            f"MLflow at {result['mlflow']['tracking_uri']} could not be reached: {waiting} records wait in "
            f"{out / 'tracking'} and are sent by the next run."
        )
    next_steps = [
        ("the report, with plots", str(out / "report.html")),
        ("the service, until Ctrl-C", serve),
        ("every run, curve and setting, in MLflow", f"make mlflow OUT={out}"),
        (
            "another model or setting",
            f"python -m jobs.train wide_deep data={prepared.path} model.hidden=[512,256]",
        ),
    ]
    kinds = Ledger(ledger["read"], ledger["kept"], ledger["quarantined"])
    figures = [figure for outcome in outcomes.values() for figure in outcome.plots]
    return Story("From behaviour logs to a recommender", summary, kinds, figures, next_steps)


def _data_sentence(prepared: Prepared) -> str:
    rows = {name: shards.total_rows for name, shards in prepared.manifest.splits.items()}
    split = prepared.manifest.config["split"]
    return (
        f"Learned from {rows['ranking/train'] + rows['ranking/valid']:,} exposures before "
        f"{split['test_from']}, tested on the {rows['ranking/test']:,} that followed, which no model or "
        "vocabulary had seen."
    )


def _ranking_sentences(ranking: dict[str, Any]) -> Iterator[str]:
    encoding, label = ranking["target_encoding"], ranking["label"]
    if ranking["auc"] is None:
        yield f"Ranking: {label!r} is alike in all rows of the test days: nothing can be said of their order."
        return
    low, high = ranking["intervals"]["auc"]
    verdict = "beats" if ranking["auc"] > encoding["auc"] else "does NOT beat"
    yield (
        f"Ranking: {ranking['model']} puts a {label} above a non-{label} in "
        f"{ranking['auc']:.1%} of pairs (AUC {ranking['auc']:.4f}, 95% interval {low:.4f} to {high:.4f}; "
        f"within a user {_figure(ranking['gauc'])}). It {verdict} target encoding ({encoding['auc']:.4f}; "
        f"{_figure(encoding['gauc'])})."
    )
    if "bayes" in ranking:
        best, left = ranking["bayes"]["auc"], ranking["bayes"]["auc"] - ranking["auc"]
        yield f"The simulator's own probabilities reach {best:.4f}: {left:.4f} are left to learn."


def _figure(value: float | None) -> str:
    return "not defined, as no user has both outcomes" if value is None else f"{value:.4f}"


def _recall_sentences(recall: dict[str, Any]) -> Iterator[str]:
    cut = "recall@100" if "recall@100" in recall else next(key for key in recall if key.startswith("recall@"))
    if recall[cut] is None:
        yield "Recall: nobody went on to want an item on the test days, so nothing can be said of it."
        return
    names = {"popularity": "plain popularity", "item_cosine": "item-to-item cosine"}
    verdicts = [
        f"{'beats' if recall[cut] > recall[key][cut] else 'does NOT beat'} {name} ({recall[key][cut]:.1%})"
        for key, name in names.items()
        if key in recall
    ]
    yield (
        f"Recall: {recall['model']} finds {recall[cut]:.1%} of what users went on to want among "
        f"{cut.removeprefix('recall@')} candidates; it {' and '.join(verdicts)}."
    )


def _tuning_sentences(tune: dict[str, Any] | None) -> Iterator[str]:
    if tune is not None:
        best, own, share = tune["best"], tune["first_trial_value"], tune["compute"]["share"]
        gain = f"the best reaches {best['value']:.4f}"
        if best["trial"] == 0:
            gain = "none beat the recipe's own"
        elif own is not None:
            gain += f", the recipe's own {own:.4f}"
        cost = f", at {share:.0%} of the cost of training all in full" if share is not None else ""
        by = f"by {tune['metric']} on the validation days"
        yield f"Search: of {tune['trials']} settings, {by}, {gain}{cost}."


def _serving_sentences(serving: dict[str, Any] | None) -> Iterator[str]:
    if serving is not None:
        yield (
            f"Serving: {serving['requests']} requests over HTTP, one at a time, {serving['errors']} errors; "
            f"half were answered within {serving['p50_ms']:.0f} ms, 99% within {serving['p99_ms']:.0f} ms."
        )


def _trained(outcome: tracked.Outcome) -> str:
    fitted = outcome.fitted
    return (
        f"epoch {fitted.chosen_epoch} of {len(fitted.history)} was best on the validation days; "
        f"{fitted.rows_per_s:,.0f} rows/s; checkpoint: {fitted.checkpoint}"
    )


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
