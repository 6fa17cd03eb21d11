"""Ranking on held-out days: a model beside target encoding, item popularity and, where known, the truth.

N rows
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from recsys_dist.baselines import LabelCounts, TargetEncoding, encoded_columns
from recsys_dist.data import collate
from recsys_dist.data.output import write_parquet
from recsys_dist.data.prepared import Prepared
from recsys_dist.evaluate.trained import EvaluateConfig, MapFiles, Trained, known_before
from recsys_dist.metrics import RankingState, intervals, ranking_replicates, reliability
from recsys_dist.metrics.amounts import amount_metrics
from recsys_dist.train.loop import idle_batch
from recsys_dist.train.validate import score_rows

_NO_SCORES = {"user_id", "label", "observed", "expected", "item_mean"}
TRUTH = "bayes_probability"  # the simulator's own click probability: no model can rank better


def evaluate_ranking(
    prepared: Prepared,
    trained: Trained,
    cfg: EvaluateConfig,
    out: str | Path | None = None,
    map_files: MapFiles = map,
) -> dict[str, Any]:
    """Score `ranking/<split>` and compare. Writes `predictions/*.parquet` below `out` where given.

    A model that expects an amount (`RankModel.predicts`) is held against what was observed too, beside each
    item's mean: `amount`; its logits are no log-odds, so that of the other metrics those of order count.

    Returns label, split, and for each of `model`, `target_encoding`, `popularity` and (simulated logs)
    `bayes` its metrics and their 95 % `intervals`; `model_minus_target_encoding` has the interval of the
    difference; `reliability` the model's calibration curve. Popularity is no probability: AUC and GAUC
    only. The same files in any order, on any number of workers, give the same result.
    """
    label = trained.schema.ranking_label
    score = Scorer(
        trained=trained,
        amounts_I=item_amounts(prepared, trained.model.predicts, cfg.split),
        encoding=fit_target_encoding(prepared, label, cfg),
        positives_I=item_positives(prepared, cfg.split),
        item=prepared.schema.item_id.name,
        batch_rows=cfg.batch_rows,
        predictions=Path(out) / "predictions" if out is not None else None,
    )
    table = pa.concat_tables(map_files(score, prepared.files(f"ranking/{cfg.split}")))
    states = {name: _state(table, name) for name in table.column_names if name not in _NO_SCORES}
    drawn = {name: ranking_replicates(state, cfg.bootstrap, cfg.seed) for name, state in states.items()}
    result: dict[str, Any] = {"label": label, "split": cfg.split}
    for name, state in states.items():
        metrics = {**state.compute(), "intervals": intervals(drawn[name])}
        ranks_only = name == "popularity" or (name == "model" and trained.model.predicts)
        result[name] = _ranks_only(metrics) if ranks_only else metrics
    difference = {name: drawn["model"][name] - drawn["target_encoding"][name] for name in drawn["model"]}
    result["model_minus_target_encoding"] = intervals(difference)
    if trained.model.predicts:
        predicted = {"model": table["expected"], "item_mean": table["item_mean"]}
        observed = table["observed"].to_numpy()
        amounts = {name: amount_metrics(values.to_numpy(), observed) for name, values in predicted.items()}
        result["amount"] = {"label": trained.model.predicts, **amounts}
        return {**result, **{name: {**result.get(name, {}), **found} for name, found in amounts.items()}}
    curve = reliability(states["model"].scores, states["model"].labels)
    result["reliability"] = {
        "predicted": curve.predicted.tolist(),
        "observed": curve.observed.tolist(),
        "rows": curve.rows.tolist(),
    }
    return result


@dataclass(frozen=True)
class Scorer:
    """Scores one file at a time, so that how files fall to workers changes nothing."""

    trained: Trained
    encoding: TargetEncoding
    positives_I: np.ndarray
    item: str
    batch_rows: int
    predictions: Path | None
    amounts_I: np.ndarray | None

    def __call__(self, file: str) -> pa.Table:
        """user_id, label and a column of logits per scorer; popularity's are counts."""
        schema = self.trained.schema
        present = set(pq.read_schema(file).names)
        wanted = {*collate.columns(schema), *self.encoding.deviation, self.item, "user_id", "item_id", TRUTH}
        table = pq.read_table(file, columns=sorted(wanted & present))
        logits = self._logits(table)
        ids = {name: table[name].to_numpy() for name in {*self.encoding.deviation, self.item}}
        columns: dict[str, Any] = {
            "user_id": table["user_id"],
            "label": table[schema.ranking_label],
            "model": logits,
            "target_encoding": self.encoding.scores(ids),
            "popularity": self.positives_I[ids[self.item]].astype(np.float64),
        }
        if self.amounts_I is not None:
            columns["observed"] = table[self.trained.model.predicts].cast(pa.float64())
            columns["expected"] = self.trained.model.prediction(torch.from_numpy(logits).double()).numpy()
            columns["item_mean"] = self.amounts_I[ids[self.item]]
        if TRUTH in present:
            p = np.clip(table[TRUTH].to_numpy().astype(np.float64), 1e-12, 1 - 1e-7)
            columns["bayes"] = np.log(p) - np.log1p(-p)
        if self.predictions is not None:
            self._write_predictions(table, logits, file)
        return pa.table(columns)

    def _logits(self, table: pa.Table) -> np.ndarray:
        """[N] float32, `batch_rows` rows at a time."""
        model, schema, size = self.trained.model, self.trained.schema, self.batch_rows
        idle = idle_batch(schema, size)
        starts = range(0, len(table), size)
        scores = [score_rows(model, table.slice(start, size), schema, idle) for start in starts]
        return np.concatenate([np.empty(0, np.float32), *scores])

    def _write_predictions(self, table: pa.Table, logits: np.ndarray, file: str) -> None:
        assert self.predictions is not None
        rows = {name: table[name] for name in ("user_id", "item_id", "row_id") if name in table.column_names}
        rows["label"] = table[self.trained.schema.ranking_label]
        predicted = self.trained.model.prediction(torch.from_numpy(logits).double())
        name = f"expected_{self.trained.model.predicts}" if self.trained.model.predicts else "probability"
        rows[name] = pa.array(predicted.numpy(), pa.float32())
        write_parquet(pa.table(rows), self.predictions / Path(file).name)


def fit_target_encoding(prepared: Prepared, label: str, cfg: EvaluateConfig) -> TargetEncoding:
    """Label rates per id of the splits before `cfg.split`."""
    columns = encoded_columns(prepared.schema, cfg.encoded)
    counts = []
    for split in known_before(cfg.split):
        for file in prepared.files(f"ranking/{split}"):
            table = pq.read_table(file, columns=[*columns, label])
            ids = {name: table[name].to_numpy() for name in columns}
            counts.append(LabelCounts.of(ids, table[label].to_numpy(), prepared.schema))
    return TargetEncoding.fit(counts[0].merge(*counts[1:]), cfg.smoothing)


def item_amounts(prepared: Prepared, label: str | None, split: str) -> np.ndarray | None:
    """[rows of the item table] mean amount of each item's exposures before `split`; None without a label.

    An item without any has the mean of all.
    """
    if label is None:
        return None
    item = prepared.schema.item_id
    total_I, count_I = np.zeros(item.rows or 0), np.zeros(item.rows or 0)
    for name in known_before(split):
        for file in prepared.files(f"ranking/{name}"):
            table = pq.read_table(file, columns=[item.name, label])
            rows = table[item.name].to_numpy()
            total_I += np.bincount(rows, table[label].to_numpy(), len(total_I))
            count_I += np.bincount(rows, minlength=len(count_I))
    everywhere = total_I.sum() / max(count_I.sum(), 1)
    return np.where(count_I > 0, total_I / np.maximum(count_I, 1), everywhere)


def item_positives(prepared: Prepared, split: str) -> np.ndarray:
    """[rows of the item table] how often each item was a recall positive before `split`; row 0 is 0."""
    known = [prepared.items[f"{name}_positives"].to_numpy() for name in known_before(split)]
    return np.r_[0, np.sum(known, axis=0)]


def _state(table: pa.Table, name: str) -> RankingState:
    encoded = table["user_id"].combine_chunks().dictionary_encode()
    users = pc.rank(encoded.dictionary).to_numpy()[encoded.indices.to_numpy()]  # in the order of the ids
    return RankingState(table[name].to_numpy(), table["label"].to_numpy(), users)


def _ranks_only(metrics: dict[str, Any]) -> dict[str, Any]:
    order = ("auc", "gauc")
    counts = {name: value for name, value in metrics.items() if name in ("rows", "positives", "users")}
    return {
        **counts,
        **{k: metrics[k] for k in order},
        "intervals": {k: metrics["intervals"][k] for k in order},
    }
