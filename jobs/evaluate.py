"""What a trained model is worth on days it never saw, beside the baselines it has to beat.

examples:
  python -m jobs.evaluate runs/train/models/RUN/refit/epoch-0001-ab12cd34 --data runs/data
  python -m jobs.evaluate CHECKPOINT --data runs/data --out runs/evaluation split=valid ks=[20,50]

Writes OUT/evaluation.json and, for a ranker, OUT/predictions/*.parquet; the metrics also go to the MLflow
run that trained the checkpoint.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from jobs import tracked
from jobs.command import options, reported, settings_help
from jobs.export import checkpoint_of
from recsys_dist.data.prepared import Prepared
from recsys_dist.evaluate import EvaluateConfig, evaluate_ranking, evaluate_recall, load_trained, write_json

RANKING = {"auc": "AUC", "gauc": "GAUC", "logloss": "log loss", "ece": "ECE"}
SCORERS = {
    "model": "model",
    "target_encoding": "target encoding",
    "popularity": "popularity",
    "item_cosine": "item-to-item cosine",
    "bayes": "best reachable",
}
WIDTH = 30


def parse(argv: list[str]) -> tuple[EvaluateConfig, argparse.Namespace]:
    """The settings, and the paths; raises ConfigError for a wrong setting."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.evaluate",
        description=__doc__,
        epilog=settings_help(EvaluateConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="directory of a finished run, or of a committed checkpoint")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, as in split=valid")
    parser.add_argument("--data", required=True, help="directory of the prepared data")
    parser.add_argument(
        "--out", default="runs/evaluation", help="directory for results (default: %(default)s)"
    )
    args = options(parser, argv, EvaluateConfig)
    return EvaluateConfig().override(args.settings), args


def ranking_table(result: dict[str, Any]) -> str:
    """AUC, GAUC, log loss and ECE of each scorer, each with its 95 % interval below."""
    lines = [
        f"{result['label']} on {result['split']} days: {result['model']['rows']:,} exposures, "
        f"{result['model']['positives']:,} positive, {result['model']['users']:,} users",
        _row("", list(RANKING.values())),
    ]
    for name in (name for name in SCORERS if name in result):
        lines += _scorer(SCORERS[name], result[name], list(RANKING))
    if "amount" in result:
        ours, mean = result["amount"]["model"], result["amount"]["item_mean"]
        lines.append(
            f"expected {result['amount']['label']}: mean absolute error {ours['mae']:,.4g} "
            f"(each item's mean: {mean['mae']:,.4g}), XAUC {ours['xauc']:.4f} ({mean['xauc']:.4f})"
        )
    low, high = result["model_minus_target_encoding"]["auc"]
    return "\n".join([*lines, f"AUC over target encoding: {low:+.4f} to {high:+.4f} (95 %, paired by user)"])


def recall_table(result: dict[str, Any], ks: tuple[int, ...]) -> str:
    """Recall, NDCG and coverage of each scorer, with and without the items that users had seen."""
    lines = [f"{result['split']} days: {result['users']:,} users, {result['pairs']:,} wanted pairs"]
    metrics = [*(f"recall@{k}" for k in ks), f"ndcg@{max(ks)}", f"coverage@{max(ks)}"]
    for variant, title in (("unseen", "items already seen left out"), ("all", "all items")):
        lines.append(_row(title, metrics))
        for name in (name for name in SCORERS if name in result):
            lines += _scorer(SCORERS[name], result[name][variant], metrics)
    lines += [f"{SCORERS[name]} skipped: {reason}" for name, reason in result["skipped"].items()]
    low, high = result["model_minus_popularity"][f"recall@{max(ks)}"]
    return "\n".join([*lines, f"recall@{max(ks)} over popularity: {low:+.4f} to {high:+.4f} (95 %, paired)"])


def _scorer(title: str, values: dict[str, Any], metrics: list[str]) -> list[str]:
    intervals = values["intervals"]
    spans = [f"{intervals[m][0]:.4f}-{intervals[m][1]:.4f}" if m in intervals else "" for m in metrics]
    numbers = [f"{values[m]:.4f}" if m in values else "" for m in metrics]
    return [_row(title, numbers), _row("", spans)]


def _row(title: str, cells: list[str]) -> str:
    return (f"  {title:<{WIDTH}}" + "".join(f"{cell:>15}" for cell in cells)).rstrip()


def main(argv: list[str]) -> None:
    cfg, args = parse(argv)
    prepared = Prepared.open(args.data)
    checkpoint = checkpoint_of(Path(args.checkpoint))
    trained = load_trained(checkpoint, prepared)
    if trained.model.task == "ranking":
        result = evaluate_ranking(prepared, trained, cfg, args.out)
        print(ranking_table(result))
    else:
        result = evaluate_recall(prepared, trained, cfg)
        print(recall_table(result, cfg.ks))
    write_json(result, Path(args.out) / "evaluation.json")
    print(f"written: {Path(args.out) / 'evaluation.json'}")
    delivery = tracked.add_evaluation(checkpoint, result)
    if delivery:
        print(f"MLflow run {delivery.run_id}: {delivery.trouble or 'the metrics are added'}")


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
