"""Finds better settings of a model: architecture and training, with a fraction of the compute.

examples:
  python -m jobs.tune wide_deep data=runs/data
  python -m jobs.tune youtubednn data=runs/data --trials 40 epochs=1
  python -m jobs.tune wide_deep data=runs/data num_workers=0          (small data: trials start no workers)
  python -m jobs.tune wide_deep data=runs/data --space my_space.yaml --rungs [0.1,1] --keep 3
  python -m jobs.train --config runs/tune/sweep-wide_deep-…/best.yaml     (train what was found, in full)

Every trial is a whole training run with other settings, proposed by Optuna's TPE; the first has the recipe's
own. All start on the newest 1/16 of the training rows; of those on a rung, one in four go on to the next
(1/4, then all), each trained anew there: the best, and the first, so that what is found is never worse than
it. What decides is the metric on the validation days; the test days stay untouched. As many trials run at a
time as the cluster has CPUs for.

A space is a YAML file with a line per searched setting:
  model.hidden: {choice: [[256, 128], [512, 256]]}
  optimizer.deep.lr: {log: [0.01, 0.3]}
  model.dropout: {uniform: [0, 0.4]}
  model.negatives: {int: [64, 2048]}
Without one, the model's own space is searched. How long histories are is set when preparing the data.

The same command again goes on after a kill and returns at once when it is done; more --trials extend it.
Written to OUT/sweep-MODEL-…: best.yaml, sweep.json, plots/, trials.jsonl, and the best trial's checkpoint.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jobs import recipes
from jobs.command import options, reported, settings_help
from recsys_dist import plots, tracking
from recsys_dist.config import load_yaml, nearest, parse_yaml
from recsys_dist.data.output import write_text
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.outbox import Recorder
from recsys_dist.tracking import TrackingConfig
from recsys_dist.train.settings import TrainConfig
from recsys_dist.tune import summary
from recsys_dist.tune.ledger import Ledger, Result
from recsys_dist.tune.space import Space, Values
from recsys_dist.tune.sweep import SweepConfig, sweep

_SWEEP = ("trials", "rungs", "keep", "seed", "concurrent", "check")


def parse(argv: list[str]) -> tuple[SweepConfig, argparse.Namespace]:
    """The sweep and where it goes; raises ConfigError for a wrong setting."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.tune",
        description=__doc__,
        epilog=f"recipes: {', '.join(recipes.RECIPES)}\n\n{settings_help(TrainConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help="a recipe, dotted settings")
    parser.add_argument("--config", help="YAML of a run to start from, instead of a recipe")
    parser.add_argument("--space", metavar="FILE", help="YAML of what to search; default: the model's own")
    for name in _SWEEP:
        field = SweepConfig.model_fields[name]
        flag: dict[str, Any] = {"action": "store_true"} if name == "check" else {}
        plain = field.default is None or field.default is False
        shown = "" if plain else f"(default: {json.dumps(field.default)})"
        said = f"{field.description or ''} {shown}".strip()
        parser.add_argument(f"--{name}", help=said, default=field.default, **flag)
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    parser.add_argument("--out", default="runs/tune", help="directory for sweeps (default: %(default)s)")
    parser.add_argument("--tracking-uri", help="MLflow server; default: an SQLite file below --out")
    args = options(parser, argv, TrainConfig)
    base = _base(args)
    space = load_yaml(args.space) if args.space is not None else _space_of(base.model.name)
    given = {name: getattr(args, name) for name in _SWEEP}
    chosen = {k: parse_yaml(v, where=f"--{k}") if isinstance(v, str) else v for k, v in given.items()}
    return SweepConfig.parse({"train": base.model_dump(mode="json"), "space": space, **chosen}), args


def _base(args: argparse.Namespace) -> TrainConfig:
    names = [word for word in args.words if "=" not in word]
    if len(names) + bool(args.config) != 1:
        raise ConfigError(
            f"name one recipe ({', '.join(recipes.RECIPES)}) or a file with --config; see --help"
        )
    cfg = TrainConfig.parse(load_yaml(args.config)) if args.config else recipes.named(names[0])
    return cfg.override([word for word in args.words if "=" in word])


def _space_of(model: str) -> dict[str, Any]:
    if model not in recipes.SPACES:
        raise ConfigError(
            f"no search space of model {model!r}{nearest(model, list(recipes.SPACES))}; give one with --space"
        )
    return recipes.SPACES[model]


class Told:
    """Passes on what happens: to MLflow, a run per trial nested under the sweep's; to a terminal, a bar."""

    def __init__(self, cfg: SweepConfig, live: tracking.Run) -> None:
        self.cfg, self.live = cfg, live
        self.children: dict[int, Recorder] = {}
        self.bar = tqdm(unit="run", leave=False, disable=not sys.stderr.isatty())

    def started(self, trial: int, values: Values) -> None:
        if trial not in self.children:
            child = self.live.child(f"{self.live.record.directory.name}-trial-{trial:03d}")
            child.config(summary.recipe(self.cfg, values).model_dump(mode="json"))
            self.children[trial] = child
        else:
            self.children[trial].status("RUNNING")

    def finished(self, result: Result, ledger: Ledger) -> None:
        child, job, metric = self.children[result.job.trial], result.job, self.cfg.train.chosen_metric
        fraction = self.cfg.fraction(job.rung)
        if result.value is None:
            child.tags({"failed": result.error or ""})
        else:
            values = {
                "newest_fraction": fraction,
                "trained_rows": result.trained_rows,
                "seconds": result.seconds,
            }
            prefix = "check/" if job.check else ""
            at_best = next(entry for entry in result.history if entry[metric] == result.value)
            found = {k: v for k, v in at_best.items() if isinstance(v, int | float) and k != "epoch"}
            child.metrics({f"{prefix}{k}": v for k, v in (found | values).items()}, step=job.rung)
            self._sweep_metrics(ledger)
        child.status("FAILED" if result.value is None else "FINISHED")
        self.bar.set_postfix_str(
            f"trial {job.trial}: {metric} {result.value or float('nan'):.4f} at {fraction:.3g}"
        )
        self.bar.update()

    def _sweep_metrics(self, ledger: Ledger) -> None:
        plan = self.cfg.plan
        spent = summary.compute(ledger, plan)
        found = {f"best/{self.cfg.train.chosen_metric}": summary.best(ledger, plan).value or 0.0}
        self.live.record.metrics({**found, "swept_rows": spent["swept_rows"]}, step=len(ledger.results))


@dataclass(frozen=True)
class Outcome:
    """A finished sweep: `figures` are those of sweep.json in `folder`, beside best.yaml."""

    figures: dict[str, Any]
    folder: Path
    table: str
    delivery: tracking.Delivery
    tracking_uri: str

    @property
    def best(self) -> TrainConfig:
        """What `jobs.train --config` takes."""
        return TrainConfig.parse(load_yaml(self.folder / "best.yaml"))


def main(argv: list[str]) -> None:
    cfg, args = parse(argv)
    out = Path(args.out)
    tracking.deliver_pending(out)
    found = run(cfg, out, TrackingConfig.parse({"uri": args.tracking_uri}))
    if args.json:
        write_text(json.dumps(found.figures, indent=1), Path(args.json))
    print(in_words(found))
    print(f"MLflow run {found.delivery.run_id or 'not yet delivered'} at {found.tracking_uri}")
    print(f"train it in full: python -m jobs.train --config {found.folder / 'best.yaml'}")


def in_words(found: Outcome) -> str:
    return "\n".join([found.table, "", *summary.sentences(found.figures)])


def run(cfg: SweepConfig, out: Path, tracked: TrackingConfig) -> Outcome:
    """Sweep below `out`, from wherever it is, and tell MLflow."""
    prepared = Prepared.open(cfg.train.data)
    cfg.train.check(prepared)
    space = Space.parse(cfg.space, cfg.train, prepared)
    folder = cfg.directory(prepared, out)
    with tracking.open_run(tracked, out, folder.name) as live:
        live.record.config(cfg.model_dump(mode="json"))
        live.record.data(prepared.path.name, prepared.manifest.data_digest, str(prepared.path))
        told = Told(cfg, live)
        ledger = sweep(cfg, out, told)
        told.bar.close()
        found = summary.result(cfg, space, ledger)
        files = write(cfg, space, ledger, found, folder)
        for file in files:
            live.record.artifact(file, "plots" if file.suffix == ".svg" else "")
        return Outcome(found, folder, summary.table(cfg, ledger), live.close(), live.uri)


def write(cfg: SweepConfig, space: Space, ledger: Ledger, found: dict[str, Any], folder: Path) -> list[Path]:
    """The best settings, all figures and the plots, as files."""
    best = summary.recipe(cfg, found["best"]["settings"])
    write_text(best.to_yaml(), folder / "best.yaml")
    write_text(json.dumps(found, indent=1), folder / "sweep.json")
    drawn = [plots.save(figure, folder / "plots") for figure in summary.figures(cfg, space, ledger)]
    return [folder / "best.yaml", folder / "sweep.json", *drawn]


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
