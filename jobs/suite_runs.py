"""The runs of a suite: each (row, seed) trained and scored once, each setting tried on validation once.

A finished run leaves a record, a small JSON file; it counts as long as settings and data are what they were.
"""

import datetime as dt
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs import tracked
from jobs.suites import Row, Suite
from recsys_dist.config import digest
from recsys_dist.data.output import write_text
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.evaluate import load_trained
from recsys_dist.outbox import flatten
from recsys_dist.tracking import TrackingConfig
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.trainer import FitResult

AMOUNTS = {"xauc", "mae"}  # metrics of an expected amount
BASELINES = ("target_encoding", "popularity", "item_cosine", "item_mean")


@dataclass(frozen=True)
class Bench:
    """A suite on its prepared data: runs, and the records of those that are finished."""

    suite: Suite
    prepared: Prepared
    out: Path
    results: Path
    tracking: TrackingConfig

    def score(self, row: Row, seed: int, where: list[str]) -> str:
        """Train, refit if the suite does, and evaluate on test, unless that is done; says what came of it."""
        cfg = placed(self._config(row, seed), where)
        record = self._record(row, seed)
        if record is None:
            outcome = tracked.run(cfg, self.out, self.tracking, self.suite.evaluation)
            assert outcome.evaluation is not None
            record = self._scored(row, cfg, outcome.fitted, outcome.evaluation)
            write_text(json.dumps(record, indent=1) + "\n", self._file(row, seed))
        found = ", ".join(f"{metric} {value:.4f}" for metric, value in record["metrics"].items())
        return f"   {found}; {_learned(record)}"

    def try_out(self, row: Row, seed: int, settings: list[str], where: list[str], file: Path) -> str:
        """Train with other settings on the training days alone, and note what validation says of them."""
        cfg = placed(self._config(row, seed).override([*settings, "refit=false"]), where)
        run = cfg.run_digest(self.prepared.manifest.data_digest)
        lines = read_lines(file)
        line = next((line for line in lines if line["run"] == run), None)
        if line is None:
            fitted = tracked.run(cfg, self.out, self.tracking, evaluate=None).fitted
            line = {
                "row": row.name,
                "seed": seed,
                "metric": cfg.chosen_metric,
                "value": fitted.history[fitted.chosen_epoch - 1][cfg.chosen_metric],
                "chosen_epoch": fitted.chosen_epoch,
                "seconds": round(fitted.seconds, 1),
                "settings": own_settings(cfg),
                "run": run,
            }
            write_lines([*lines, line], file)
        return f"   validation {line['metric']} {line['value']:.4f}; {_learned(line)}"

    def records(self, published: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """Those of finished runs with the settings that the suite has now, in the order of its rows.

        A run that was not made here counts where `published` has its record.
        """
        files = [file for row in self.suite.rows for file in self._file(row, 0).parent.glob("seed-*.json")]
        every = [*published, *(json.loads(file.read_text()) for file in files)]
        latest = {(record["row"], record["seed"]): record for record in every if self._counts(record)}
        order = [row.name for row in self.suite.rows]
        return [latest[at] for at in sorted(latest, key=lambda at: (order.index(at[0]), at[1]))]

    def _counts(self, record: dict[str, Any]) -> bool:
        """Whether settings and data are what they were."""
        row = next((row for row in self.suite.rows if row.name == record["row"]), None)
        return row is not None and record["key"] == self._key(self._config(row, record["seed"]))

    def _scored(
        self, row: Row, cfg: TrainConfig, fitted: FitResult, evaluation: dict[str, Any]
    ) -> dict[str, Any]:
        """The record of a finished run; of recall, with the items that users had seen left out."""
        found = evaluation.get("amount", evaluation) if AMOUNTS & {*self.suite.metrics} else evaluation
        scored = {name: found[name] for name in ("model", *BASELINES) if name in found}
        values = {name: of.get("unseen", of) for name, of in scored.items()}
        picked = {name: {m: of[m] for m in self.suite.metrics} for name, of in values.items()}
        return {
            "key": self._key(cfg),
            "row": row.name,
            "model": cfg.model.name,
            "seed": cfg.seed,
            "metrics": picked.pop("model"),
            "baselines": {name.replace("_", " "): of for name, of in picked.items()},
            "valid_metric": cfg.chosen_metric,
            "valid": fitted.history[fitted.chosen_epoch - 1][cfg.chosen_metric],
            "chosen_epoch": fitted.chosen_epoch,
            "seconds": fitted.seconds,
            "parameters": parameters(load_trained(fitted.checkpoint, self.prepared).model),
            "settings": own_settings(cfg),
            "date": dt.date.today().isoformat(),
            "hardware": hardware(cfg),
        }

    def _config(self, row: Row, seed: int) -> TrainConfig:
        return self.suite.config(row, seed, self.prepared.path)

    def _key(self, cfg: TrainConfig) -> str:
        run = cfg.run_digest(self.prepared.manifest.data_digest)
        return digest([run, self.suite.evaluation.digest(), self.suite.metrics])

    def _file(self, row: Row, seed: int) -> Path:
        return self.results / re.sub(r"\W+", "_", row.name.lower()) / f"seed-{seed}.json"

    def _record(self, row: Row, seed: int) -> dict[str, Any] | None:
        """What is stored of a run; None where it is not finished, or had other settings."""
        file = self._file(row, seed)
        record: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
        return record if record is not None and self._counts(record) else None


def placed(cfg: TrainConfig, where: list[str]) -> TrainConfig:
    """`cfg` with settings of where and how it computes; ConfigError for one that changes what is learned."""
    elsewhere = cfg.override(where)
    if (elsewhere.identity(), elsewhere.data) != (cfg.identity(), cfg.data):
        raise ConfigError(
            f"{' '.join(where)!r} changes what is learned; measure it on validation with --try, and put what "
            "is best into jobs/suites.py"
        )
    return elsewhere


def own_settings(cfg: TrainConfig) -> dict[str, str]:
    """Dotted settings of what is learned that are not the model's and the trainer's defaults."""
    plain = flatten(TrainConfig.parse({"data": "", "model": {"name": cfg.model.name}}).identity())
    apart = ("seed", "refit", "model.name")
    mine = {key: value for key, value in flatten(cfg.identity()).items() if key not in apart}
    return {key: value for key, value in mine.items() if plain.get(key) != value}


def parameters(model: Any) -> dict[str, int]:
    """How many numbers the dense weights and the embedding tables have."""
    tables = {id(weight) for weights in model.table_groups().values() for weight in weights}
    counts = {"dense": 0, "tables": 0}
    for weight in model.parameters():
        counts["tables" if id(weight) in tables else "dense"] += weight.numel()
    return counts


def hardware(cfg: TrainConfig) -> str:
    """What trains, for people."""
    cores = len(os.sched_getaffinity(0))
    gpu = torch.cuda.get_device_name() if cfg.use_gpu else "no GPU"
    return f"{cores} CPU cores, {gpu}, {cfg.workers_in_words}"


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; none where it does not exist."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_lines(lines: Iterable[dict[str, Any]], file: Path) -> None:
    """What `read_lines` reads."""
    write_text("".join(json.dumps(line) + "\n" for line in lines), file)


def _learned(of: dict[str, Any]) -> str:
    return f"epoch {of['chosen_epoch']} was best; {of['seconds']:.0f} s of training"
