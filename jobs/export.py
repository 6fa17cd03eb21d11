"""A trained pair of models to a bundle, and the bundle to the registry: what `jobs.serve` loads.

examples:
  python -m jobs.export                                            (the newest pair of runs/quickstart)
  python -m jobs.export --run runs/train --data runs/data          (the newest pair that jobs.train made)
  python -m jobs.export --data runs/data --out runs/mine \\
      --recall runs/train/models/RECALL-RUN --ranking runs/train/models/RANKING-RUN/refit/CHECKPOINT
  python -m jobs.export --no-register                              (a directory to copy and serve; no MLflow)
  python -m jobs.export --list                                     (what is registered, and who is champion)
  python -m jobs.export --promote 3                                (champion, whatever its gates said)
  python -m jobs.export --rollback                                 (back to the champion before)

A bundle is one immutable directory OUT/bundles/VERSION with both models, vocabularies, item vectors, index,
users' newest events and the figures; its version is a digest of its content, so the same pair gives the same
bundle. Registered, it becomes @champion where its gates hold: not worse on the test days than popularity, nor
than the present champion, which is measured on the same days. Otherwise it becomes @challenger, and the
champion stays. A service that follows the registry takes a new champion over by itself.
"""

import argparse
import datetime as dt
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from jobs import tracked
from jobs.command import options, reported, settings_help
from recsys_dist.bundle import Bundle
from recsys_dist.config import Config
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.evaluate import EvaluateConfig, evaluate_bundle
from recsys_dist.export import export
from recsys_dist.gates import GateConfig, Metrics, report
from recsys_dist.index import IndexConfig
from recsys_dist.models.protocol import Task
from recsys_dist.registry import CHAMPION, Publication, Registry, RegistryConfig
from recsys_dist.train.checkpoint import MANIFEST
from recsys_dist.train.pretrained import RESULT

TASKS: tuple[Task, ...] = ("recall", "ranking")
_OTHER = "train anew, or name another run or checkpoint with --recall and --ranking"


class ExportConfig(Config):
    """Settings of this job, as in gates.tolerance=0.005."""

    model: str = Field("recsys_dist", min_length=1, description="name of the registered model")
    index: IndexConfig = IndexConfig()
    gates: GateConfig = GateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def parse(argv: list[str]) -> tuple[ExportConfig, argparse.Namespace]:
    """The settings, and the paths; raises ConfigError for a wrong setting."""
    below: dict[str, type[Config]] = {"index": IndexConfig, "gates": GateConfig, "evaluate": EvaluateConfig}
    parser = argparse.ArgumentParser(
        prog="python -m jobs.export",
        description=__doc__,
        epilog="\n".join(settings_help(cfg, f"settings below `{name}`:") for name, cfg in below.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, as in gates.tolerance=0")
    parser.add_argument("--run", default="runs/quickstart", help="where models lie (default: %(default)s)")
    parser.add_argument("--data", help="directory of the prepared data (default: RUN/data)")
    for task in TASKS:
        help_ = f"run or checkpoint of the {task} model (default: the newest of RUN that fits the data)"
        parser.add_argument(f"--{task}", type=Path, help=help_)
    parser.add_argument("--out", help="bundles go to OUT/bundles (default: RUN)")
    parser.add_argument("--tracking-uri", help="MLflow server; default: the SQLite file OUT/mlflow.db")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--no-register", action="store_true", help="only write the bundle")
    instead.add_argument("--list", action="store_true", help="only show what is registered")
    instead.add_argument(
        "--promote", metavar="VERSION", help="only make this one champion: its number, bundle or alias"
    )
    instead.add_argument("--rollback", action="store_true", help="only make the former champion champion")
    args = options(parser, argv, ExportConfig)
    args.run, args.out = Path(args.run), Path(args.out or args.run)
    return ExportConfig().override(args.settings), args


def run(
    cfg: ExportConfig,
    prepared: Prepared,
    checkpoints: Mapping[Task, Path],
    out: Path,
    registry: Registry | None,
) -> tuple[Bundle, Publication | None]:
    """Evaluate what is not yet evaluated, export, and publish where there is a registry."""
    evaluations = {
        task: tracked.evaluated(prepared, path, cfg.evaluate) for task, path in checkpoints.items()
    }
    bundle = export(prepared, checkpoints, evaluations, out / "bundles", cfg=cfg.index)

    def measure(champion: Path) -> Metrics:
        return evaluate_bundle(Bundle.open(champion), prepared, cfg.evaluate)

    return bundle, registry.publish(bundle.path, cfg.gates, measure) if registry else None


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a run of `jobs.train` ended with; a checkpoint is its own."""
    if (path / RESULT).is_file():
        found = path / _told(path / RESULT, "checkpoint")
        if not (found / MANIFEST).is_file():
            raise ConfigError(
                f"{str(path / RESULT)!r} names the checkpoint {str(found)!r}, without {MANIFEST}; {_OTHER}"
            )
        return found
    if (path / MANIFEST).is_file():
        return path
    raise ConfigError(
        f"{str(path)!r} is neither a finished run (no {RESULT}) nor a checkpoint (no {MANIFEST})"
    )


def _told(file: Path, key: str) -> str:
    try:
        return str(json.loads(file.read_text())[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{str(file)!r} has no {key} that can be read: {reason}; {_OTHER}") from None


def newest(root: Path, task: Task, prepared: Prepared) -> Path:
    """The checkpoint of the run below `root` that was finished last, of those trained on this data."""
    results = sorted((root / "models").glob(f"{task}-*/{RESULT}"), key=lambda file: file.stat().st_mtime)
    for file in reversed(results):
        found = checkpoint_of(file.parent)
        if _told(found / MANIFEST, "data_digest") == prepared.manifest.data_digest:
            return found
    raise ConfigError(
        f"{str(root / 'models')!r} holds {len(results)} finished {task} runs, none of them on the data in "
        f"{str(prepared.path)!r}; train one with jobs.train, or name it with --{task}"
    )


def registry_of(cfg: ExportConfig, args: argparse.Namespace) -> Registry:
    uri = args.tracking_uri or f"sqlite:///{args.out.absolute() / 'mlflow.db'}"
    return Registry(RegistryConfig.parse({"uri": uri, "model": cfg.model}))


def summary(bundle: Bundle, published: Publication | None, out: Path) -> str:
    """What was made and what became of it, for people."""
    facts = bundle.manifest
    size = sum(entry.size_bytes for entry in facts.files.values()) / 1e6
    lines = [
        f"bundle {facts.version}: {bundle.path} ({size:.1f} MB; {facts.index.items:,} items, "
        f"{facts.index.kind} index with recall@200 {facts.index.recall_at_200:.4f})"
    ]
    if published is None:
        return "\n".join([*lines, f"serve it: python -m jobs.serve --bundle {bundle.path}"])
    entry = published.entry
    alias = ", ".join(f"@{name}" for name in entry.aliases) or "no alias"
    if published.gates:
        lines += ["gates:", report(published.gates)]
    lines.append(f"registered as version {entry.number}: {alias}")
    if CHAMPION not in entry.aliases:
        lines.append(f"the champion stays; to promote all the same: --promote {entry.number}")
    else:
        lines.append(f"serve it: python -m jobs.serve --out {out}")
    return "\n".join(lines)


def listing(registry: Registry) -> str:
    """A line for each registered version, newest first."""
    lines = []
    for entry in registry.entries():
        made = dt.datetime.fromtimestamp(entry.created_ms / 1000, dt.UTC)
        failed = entry.gates.count("FAILED")
        aliases = " ".join(f"@{alias}" for alias in entry.aliases)
        judged = f"{failed} gates failed" if failed else "gates passed" if entry.gates else "not judged"
        lines.append(
            f"{entry.number:>4}  {entry.bundle}  {made:%Y-%m-%d %H:%M}  {judged:<16}  {aliases}".rstrip()
        )
    return "\n".join(lines) or "nothing is registered yet"


def main(argv: list[str]) -> None:
    cfg, args = parse(argv)
    if args.list:
        print(listing(registry_of(cfg, args)))
    elif args.promote is not None or args.rollback:
        registry = registry_of(cfg, args)
        entry = registry.rollback() if args.rollback else registry.promote(args.promote)
        print(f"version {entry.number} (bundle {entry.bundle}) is @{CHAMPION}")
    else:
        prepared = Prepared.open(args.data or args.run / "data")
        named = {"recall": args.recall, "ranking": args.ranking}
        checkpoints = {
            task: checkpoint_of(named[task]) if named[task] else newest(args.run, task, prepared)
            for task in TASKS
        }
        print("\n".join(f"{task}: {path}" for task, path in checkpoints.items()), flush=True)
        into = None if args.no_register else registry_of(cfg, args)
        bundle, published = run(cfg, prepared, checkpoints, args.out, into)
        print(summary(bundle, published, args.out))


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
