"""Two checkpoints and the data that they were trained on → a Bundle on disk.

Checkpoints that were sharded over any number of workers, in any way, give the same bundle.
"""

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys_dist import index, manifest, tracking
from recsys_dist.bundle import Bundle, Golden, Served
from recsys_dist.data import stages
from recsys_dist.data.collate import collate
from recsys_dist.data.entities import Entities
from recsys_dist.data.examples import sort_events
from recsys_dist.data.logs import LogSpec
from recsys_dist.data.prepared import Prepared
from recsys_dist.data.recent import recent, shown
from recsys_dist.errors import BundleError
from recsys_dist.feature_kinds import Statistic, side
from recsys_dist.index import IndexConfig
from recsys_dist.manifest import DataSpan, IndexFacts
from recsys_dist.models.protocol import Task, model_module, model_schema
from recsys_dist.schema import Schema
from recsys_dist.serve.golden import ask, replay
from recsys_dist.train import checkpoint

DISPLAY = ("title", "name")  # columns of items that no feature needs to read, for people who look at lists
RECALL_AT = 200
_QUERY_USERS = 1024  # of the test days: one half chooses the index's settings, the other measures it


@dataclass(frozen=True)
class Trained:
    """A checkpoint's model, and where it lies."""

    served: Served
    manifest: checkpoint.Manifest
    path: Path


def export(
    prepared: Prepared,
    checkpoints: Mapping[Task, Path],
    evaluations: Mapping[Task, dict[str, Any]],
    out: Path,
    golden: Golden | None = ask,
    cfg: IndexConfig | None = None,
) -> Bundle:
    """Write the bundle of a "recall" and a "ranking" checkpoint to `out`/<version>; BundleError says what
    does not go together.

    `evaluations` are the results of `evaluate_ranking` and `evaluate_recall` on the test days. `golden`
    answers requests with the finished bundle, to be replayed by whoever serves it; a bundle that is there
    and answers otherwise by now is written anew.
    """
    metrics = {task: _metrics(task, found) for task, found in evaluations.items()}
    recall = _load(prepared, checkpoints["recall"], "recall")
    ranking = _load(prepared, checkpoints["ranking"], "ranking")
    with torch.no_grad():
        vectors = np.ascontiguousarray(recall.served.model.item_vectors().numpy())  # type: ignore[operator]
    queries = _user_vectors(prepared, recall.served)
    half = max(1, len(queries) // 2)
    built = index.build(vectors, cfg, queries[:half])
    measured = queries[half:] if len(queries) > 1 else queries
    events, seen = _user_state(prepared)
    made = Bundle(
        path=out,
        manifest=_manifest(
            prepared,
            {"recall": recall, "ranking": ranking},
            metrics,
            IndexFacts(
                kind=built.kind,
                items=len(vectors) - 1,
                dim=vectors.shape[1],
                recall_at_200=index.recall(built, vectors, measured, RECALL_AT),
                queries=len(measured),
            ),
        ),
        encoders=prepared.encoders,
        users=_entities(prepared, "user_id"),
        items=_entities(prepared, "item_id", DISPLAY),
        recall=recall.served,
        ranking=ranking.served,
        positives=_positives(prepared),
        item_vectors=vectors,
        index=built,
        events=events,
        seen=seen,
        golden=[],
    )
    return made.save(out, golden, replay if golden else None)


def _load(prepared: Prepared, path: Path, task: Task) -> Trained:
    """The model of a checkpoint that fits the data and the task; CheckpointError where it is torn."""
    model, found = checkpoint.load_for_inference(path, prepared.schema)
    module = model_module(found.model["name"])
    if module.Model.task != task:
        raise BundleError(
            f"{str(path)!r} is a {module.Model.task} model ({found.model['name']}), not a {task} model"
        )
    data = prepared.manifest
    for what, there, here in (
        ("vocabulary", found.vocabulary_digest, data.vocabulary_digest),
        ("data", found.data_digest, data.data_digest),
    ):
        if there != here:
            raise BundleError(
                f"{str(path)!r} was trained on other data: its {what} digest is {there}, that of "
                f"{str(prepared.path)!r} is {here}; export with the data that it was trained on"
            )
    read = model_schema(module.Config.parse(found.model), found.data_schema, found.label)
    return Trained(Served(model, read), found, path)


def _manifest(
    prepared: Prepared,
    trained: Mapping[Task, Trained],
    metrics: Mapping[Task, dict[str, dict[str, float]]],
    facts: IndexFacts,
) -> manifest.Manifest:
    data, code = prepared.manifest, tracking.provenance()
    shards = [data.splits[name] for name in data.splits if name.startswith("ranking/")]
    changed = (
        ""
        if code.get("git.changed_files", "0") == "0"
        else f" with {code['git.changed_files']} changed files"
    )
    return manifest.Manifest(
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        git_commit=code.get("mlflow.source.git.commit", "unknown") + changed,
        data=DataSpan(
            source=data.config["source"]["kind"],
            data_digest=data.data_digest,
            first_event=min((s.first_event for s in shards if s.first_event), default=None),
            last_event=max((s.last_event for s in shards if s.last_event), default=None),
            valid_from=data.config["split"]["valid_from"],
            test_from=data.config["split"]["test_from"],
        ),
        schema_digest=data.schema_digest,
        vocabulary_digest=data.vocabulary_digest,
        models={task: found.manifest.model for task, found in trained.items()},
        checkpoints={task: "/".join(found.path.parts[-3:]) for task, found in trained.items()},
        labels={
            "ranking": (trained["ranking"].served.schema.ranking_label,),
            "recall": prepared.schema.recall_positive,
        },
        metrics=dict(metrics),
        index=facts,
    )


def _metrics(task: Task, evaluation: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Scorer -> metric -> value; of recall, among items not seen before."""
    if evaluation["split"] != "test":
        raise BundleError(
            f"the {task} model was evaluated on split {evaluation['split']!r}; a bundle tells of test days"
        )
    found: dict[str, dict[str, float]] = {}
    for scorer, values in evaluation.items():
        if isinstance(values, dict):
            numbers = values.get("unseen", values) if task == "recall" else values
            kept = {
                k: float(v) for k, v in numbers.items() if isinstance(v, int | float) and math.isfinite(v)
            }
            if kept:
                found[scorer] = kept
    return found


def _user_vectors(prepared: Prepared, recall: Served) -> np.ndarray:
    """[n, D] of users of the test days, as of the beginning of these."""
    tables = [pq.read_table(file) for file in prepared.files("users/test")]
    with torch.no_grad():
        users = pa.concat_tables(tables).slice(0, _QUERY_USERS)
        vectors: torch.Tensor = recall.model(collate(users, recall.schema))
    return vectors.numpy()


def _positives(prepared: Prepared) -> np.ndarray:
    items = prepared.items
    return np.r_[0, items["train_positives"].to_numpy() + items["valid_positives"].to_numpy()]


def _entities(prepared: Prepared, key: str, display: tuple[str, ...] = ()) -> Entities:
    """Ids with the attributes that features read, and those to `display` where there are any."""
    name = f"{key.removesuffix('_id')}s"
    table = pq.read_table(prepared.path / f"entities/{name}.parquet")
    wanted = {
        key,
        *display,
        *(c.partition(".")[2] for c in _columns(prepared.schema) if side(c) == side(key)),
    }
    kept = table.select([column for column in table.column_names if column in wanted]).combine_chunks()
    return Entities(pa.concat_arrays(kept[key].chunks or [pa.array([], pa.string())]), kept)


def _columns(schema: Schema) -> set[str]:
    """Raw columns that features read."""
    keys = {f.key for f in schema.features if isinstance(f, Statistic)}
    return keys | {f.column for f in schema.features if hasattr(f, "column")}


def _user_state(prepared: Prepared) -> tuple[pa.Table, pa.Table]:
    """`Bundle.events` and `Bundle.seen` over all days of the log, a group of users at a time."""
    schema, item_ids = prepared.schema, prepared.items["item_id"].combine_chunks()
    columns = LogSpec.from_schema(schema).arrow_schema().names
    events, seen = [], []
    for bucket in stages.bucket_numbers(prepared.path):
        table = stages.read_bucket(prepared.path, bucket).select(columns)
        events.append(recent(table, schema))
        seen.append(shown(table, item_ids))
    return (
        sort_events(pa.concat_tables(events, promote_options="default")).combine_chunks(),
        pa.concat_tables(seen).combine_chunks(),
    )
