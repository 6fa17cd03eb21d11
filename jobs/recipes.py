"""Named runs: what `python -m jobs.train NAME` starts from. A new recipe is one more entry."""

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

from jobs.command import options, settings_help
from recsys_dist.config import load_yaml, nearest
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import COUNTED
from recsys_dist.tracking import TrackingConfig
from recsys_dist.train.settings import TrainConfig

_PREPARED = "runs/data"  # where jobs.prepare's examples write

_TOWERS = ("mlp", "deep_crossing", "dcn", "deepfm", "dlrm", "youtubednn_ranking")
_PAIRS = ("fm", "deepfm")  # sums of products of embeddings: rates that suit a tower overshoot
_ATTENTION: dict[str, dict[str, Any]] = {"din": {}, "dien": {"auxiliary": 0.01}, "dsin": {}}
RECIPES: dict[str, dict[str, Any]] = {
    "wide_deep": {
        "model": {"name": "wide_deep"},
        "batch_rows": 1024,
        "epochs": 3,
        "optimizer": {"deep": {"lr": 0.1}, "wide": {"lr": 0.03}},
    },
    **{
        name: {
            "model": {"name": name},
            "batch_rows": 1024,
            "epochs": 3,
            "optimizer": {"deep": {"lr": 0.02 if name in _PAIRS else 0.1}},
        }
        for name in ("lr", "fm", *_TOWERS)
    },
    **{
        name: {
            "model": {"name": name, "dropout": 0.3, **own},
            "batch_rows": 1024,
            "epochs": 3,
            "optimizer": {"deep": {"lr": 0.02}},
        }
        for name, own in _ATTENTION.items()
    },
    "youtubednn": {"model": {"name": "youtubednn"}, "batch_rows": 2048, "epochs": 2},
    "two_tower": {
        "model": {"name": "two_tower", "mask_history": True},
        "batch_rows": 2048,
        "epochs": 3,
    },
    "sasrec": {
        "model": {"name": "sasrec", "dropout": 0.2, "negatives": 512, "negatives_alpha": 0.5},
        "batch_rows": 32,  # each a whole sequence
        "epochs": 100,
        "patience": 5,
        "metric": "ndcg@100",
        "optimizer": {"deep": {"lr": 0.1}},
    },
    "item2vec": {
        "model": {
            "name": "item2vec",
            "window": 20,
            "negatives_alpha": 0.0,
            "subsample": 1.0,
            "score": "contexts",
        },
        "batch_rows": 512,  # each a whole sequence
        "epochs": 30,
        "patience": 3,
        "optimizer": {"deep": {"lr": 0.15}},
    },
    **{name: {"model": {"name": name}} for name in COUNTED},
}

# What `python -m jobs.tune` searches, by model, where it is given no file.
_ANY = {
    "model.activation": {"choice": ["relu", "gelu", "prelu"]},
    "model.dropout": {"uniform": [0.0, 0.4]},
    "optimizer.deep.lr": {"log": [0.01, 0.3]},
    "optimizer.dense.lr": {"log": [0.0003, 0.01]},
}
_TOWER = {
    "model.hidden": {"choice": [[64], [128, 64], [256, 128], [512, 256], [256, 128, 64], [512, 256, 128]]},
    "model.embedding_dim": {"choice": [8, 16, 32]},
    "batch_rows": {"choice": [512, 1024, 2048, 4096]},
}
_LINEAR = {"optimizer.wide.lr": {"log": [0.003, 0.1]}}
_CROSS = {"model.cross_layers": {"int": [1, 5]}, "model.structure": {"choice": ["parallel", "stacked"]}}
_OWN: dict[str, dict[str, Any]] = {
    "deepfm": _LINEAR,
    "dcn": _CROSS,
    "din": {"model.softmax": {"choice": [False, True]}, "model.unit_hidden": {"choice": [[36], [80, 40]]}},
    "dien": {
        "model.auxiliary": {"log": [0.001, 1.0]},
        "model.evolution": {"choice": ["augru", "agru", "aigru"]},
    },
    "dsin": {"model.heads": {"choice": [1, 2, 4]}, "model.feed_forward": {"choice": [32, 64, 128]}},
}
_DICE = {"model.activation": {"choice": ["dice", "relu", "prelu"]}}
SPACES: dict[str, dict[str, Any]] = {
    "wide_deep": {**_TOWER, **_LINEAR, **_ANY},
    **{name: {**_TOWER, **_OWN.get(name, {}), **_ANY} for name in _TOWERS},
    **{name: {**_TOWER, **_OWN[name], **_ANY, **_DICE} for name in _ATTENTION},
    "lr": {**_LINEAR, "optimizer.dense.lr": _ANY["optimizer.dense.lr"]},
    "fm": {
        "model.embedding_dim": _TOWER["model.embedding_dim"],
        "optimizer.deep.lr": _ANY["optimizer.deep.lr"],
        **_LINEAR,
    },
    "youtubednn": {
        "model.hidden": {"choice": [[128], [256], [512], [512, 256]]},
        "model.embedding_dim": {"choice": [32, 64, 128]},
        "model.output_dim": {"choice": [32, 64, 128]},
        "model.temperature": {"log": [0.03, 0.2]},
        "model.negatives": {"choice": [256, 512, 1024, 2048]},
        "model.negatives_alpha": {"uniform": [0.0, 1.0]},
        "batch_rows": {"choice": [1024, 2048, 4096]},
        **_ANY,
    },
    "two_tower": {
        "model.hidden": {"choice": [[128], [256], [512], [512, 256]]},
        "model.item_hidden": {"choice": [[], [128], [256], [512, 256]]},
        "model.embedding_dim": {"choice": [32, 64, 128]},
        "model.output_dim": {"choice": [32, 64, 128]},
        "model.temperature": {"log": [0.03, 0.2]},
        "model.negatives": {"choice": [0, 512, 1024, 2048]},
        "model.negatives_alpha": {"uniform": [0.0, 1.0]},
        "model.mask_history": {"choice": [False, True]},
        "batch_rows": {"choice": [1024, 2048, 4096]},
        **_ANY,
    },
    "item2vec": {
        "model.dim": {"choice": [32, 64, 128]},
        "model.window": {"choice": [2, 5, 10, 20]},
        "model.negatives_per_pair": {"log": [2.0, 20.0]},
        "model.negatives_alpha": {"uniform": [0.0, 1.0]},
        "model.subsample": {"log": [0.00003, 1.0]},
        "model.score": {"choice": ["items", "contexts"]},
        "batch_rows": {"choice": [64, 128, 256, 512]},
        "optimizer.deep.lr": {"log": [0.01, 0.3]},
    },
    "sasrec": {
        "model.dim": {"choice": [32, 64, 128]},
        "model.blocks": {"choice": [1, 2, 3]},
        "model.heads": {"choice": [1, 2, 4]},
        "model.loss": {"choice": ["sampled_softmax", "gbce"]},
        "model.negatives": {"choice": [256, 512, 1024]},
        "model.negatives_alpha": {"uniform": [0.0, 1.0]},
        "batch_rows": {"choice": [32, 64, 128, 256]},
        **{key: values for key, values in _ANY.items() if key != "model.activation"},
        "model.dropout": {"uniform": [0.0, 0.5]},
    },
}

HELP = """Trains a model on prepared data, on any number of workers.

examples:
  python -m jobs.train wide_deep data=runs/data
  python -m jobs.train wide_deep data=runs/data num_workers=2 model.hidden=[512,256] optimizer.deep.lr=0.1
  python -m jobs.train youtubednn data=runs/data --out runs/recall
  python -m jobs.train sasrec data=runs/data item_vectors=runs/train/models/recall-item2vec-…
  python -m jobs.train wide_deep data=runs/today warm_start=runs/train/models/ranking-wide_deep-…
  python -m jobs.train wide_deep data=runs/data num_workers=[1,4]
  python -m jobs.train --model my_models.tower:Model data=runs/data model.hidden=[64]
  python -m jobs.train wide_deep data=runs/data num_workers=4 --plan
  python -m jobs.train wide_deep data=runs/data num_workers=2 --profile
  python -m jobs.train --config runs/train/models/ranking-wide_deep-…/config.yaml seed=1

The same command again goes on from the newest checkpoint, also with another number of workers, and
returns at once when the run is finished."""


def named(name: str, values: Mapping[str, Any] | None = None) -> TrainConfig:
    """The recipe of that name, with top-level `values` set; ConfigError names the nearest known one."""
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} does not exist{nearest(name, list(RECIPES))}")
    return TrainConfig.parse({"data": _PREPARED, **RECIPES[name], **(values or {})})


class Asked(NamedTuple):
    """What a command line asks for; with `plan` only to be shown what would be placed where."""

    cfg: TrainConfig
    out: str
    tracked: TrackingConfig
    plan: bool


def parse(argv: list[str]) -> Asked:
    """What the command line asks for; ConfigError for a wrong setting."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.train",
        description=HELP,
        epilog=f"recipes: {', '.join(RECIPES)}\n\n{settings_help(TrainConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help="a recipe, dotted settings")
    parser.add_argument("--model", metavar="MODULE:Model", help="a model of your own instead of a recipe")
    parser.add_argument("--plan", action="store_true", help="show where tables would live, and train nothing")
    parser.add_argument(
        "--profile", action="store_true", help="write a trace of a few steps to the run's directory"
    )
    parser.add_argument("--config", help="YAML file with settings, such as a former run's config.yaml")
    parser.add_argument("--out", default="runs/train", help="directory for runs (default: %(default)s)")
    parser.add_argument("--tracking-uri", help="MLflow server; default: an SQLite file below --out")
    args = options(parser, argv, TrainConfig)  # settings may follow options
    names = [word for word in args.words if "=" not in word]
    if len(names) + bool(args.config) + bool(args.model) != 1:
        raise ConfigError(
            f"name one recipe ({', '.join(RECIPES)}), a file with --config, or a model with --model; "
            "see --help"
        )
    if args.model:
        cfg = TrainConfig.parse({"data": _PREPARED, "model": {"name": args.model}})
    else:
        cfg = TrainConfig.parse(load_yaml(args.config)) if args.config else named(names[0])
    tracked = TrackingConfig.parse({"uri": args.tracking_uri})
    cfg = cfg.override([*(["profile=true"] if args.profile else []), *(w for w in args.words if "=" in w)])
    return Asked(cfg, args.out, tracked, args.plan)
