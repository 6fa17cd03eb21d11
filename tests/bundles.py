"""A tiny pair of models trained on the small log: what tests of export and serving start from.

No Ray: the steps of preparation are called one after the other, and there is one worker, this process.
"""

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from recsys_dist.data import pipeline, stages
from recsys_dist.data.collate import collate
from recsys_dist.data.prepared import MANIFEST, Manifest, Prepared, ShardSet
from recsys_dist.data.split import SPLITS, Split
from recsys_dist.evaluate import EvaluateConfig, evaluate_ranking, evaluate_recall, load_trained
from recsys_dist.models.protocol import Catalogue, model_module
from recsys_dist.schema import Schema
from recsys_dist.train import checkpoint as checkpointing
from recsys_dist.train import saving
from recsys_dist.train.catalogue import catalogue_of
from recsys_dist.train.loop import Epoch, Loss, Workers, idle_batch
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.sharding import ShardedModel, shard
from tests.data import small_log
from tests.data.small_source import Config, Source
from tests.train.ranks import run_ranks

BATCH_ROWS = 60
SPLIT = Split(valid_from=dt.date(2024, 3, 7), test_from=dt.date(2024, 3, 8))
MODELS: dict[str, dict[str, Any]] = {
    "recall": {
        "name": "youtubednn",
        "embedding_dim": 8,
        "side_dim": 4,
        "hidden": [16],
        "output_dim": 8,
        "negatives": 8,
    },
    "ranking": {"name": "wide_deep", "embedding_dim": 8, "hidden": [16]},
}
# so that the log has users and items that training has seen and that have no row
LIMITS = {"user": {"max_rows": 13}, "item": {"max_age_days": 2, "max_rows": 18}}
OPTIMIZER = {"deep": {"lr": 0.3}, "wide": {"lr": 0.3}, "dense": {"lr": 0.01}}


def prepare(
    path: Path,
    log: pa.Table | None = None,
    split: Split = SPLIT,
    limits: dict[str, dict[str, int]] = LIMITS,
    former: Prepared | None = None,
) -> Prepared:
    """What `pipeline.prepare` makes of the small log, in one bucket and a shard per split."""
    log = small_log.events() if log is None else log
    schema, source = limited(small_log.SCHEMA, limits), Source(Config(path=str(path)))
    for name, values in ((stages.BUCKET, 0), (stages.PART, 0), ("row", range(len(log)))):
        column = np.broadcast_to(np.asarray(values, np.int32), len(log))
        log = log.append_column(name, pa.array(column))
    [written] = stages.write_bucket(log, path, ["part"], keep_duplicates=False)
    counts = stages.merge_counts(stages.count_bucket(path, 0, schema, split).to_pylist())
    before = former.encoders if former else None
    world, admissions = pipeline._fit(path, source, schema, counts, split, before)
    pipeline._write_catalogue(path, world, counts)
    shards = dict.fromkeys(SPLITS, 1)
    made = list(stages.write_shards(stages.build_bucket(path, 0, world, split, shards), path, shards))
    sets = {str(row["split"]): pipeline._shard_set([row]) for row in made}
    for name in ("valid", "test"):
        file = f"users/{name}/part-00000.parquet"
        sets[f"users/{name}"] = ShardSet(files=(file,), rows=(pq.read_metadata(path / file).num_rows,))
    fitted = world.encoders.schema
    manifest = Manifest(
        fingerprint=str(written["days"]),
        schema_digest=fitted.digest(),
        vocabulary_digest=world.encoders.digest(),
        fitted_schema=fitted,
        config={"source": {"kind": "small"}, "split": split.model_dump(mode="json")},
        splits=sets,
        ledger={},
        admissions=admissions,
    )
    (path / MANIFEST).write_text(manifest.model_dump_json())
    return Prepared.open(path)


def limited(schema: Schema, limits: dict[str, dict[str, int]]) -> Schema:
    """With the limits on the vocabulary of each feature that is named."""
    features = [f.model_copy(update=limits.get(f.name, {})) for f in schema.features]
    return schema.model_copy(update={"features": tuple(features)})


def train(prepared: Prepared, root: Path, models: dict[str, dict[str, Any]] = MODELS) -> dict[str, Path]:
    """Checkpoints by task, by one worker: this process."""
    root.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo", init_method=(root / "store").as_uri(), rank=0, world_size=1)
    try:
        return {task: _train(config(prepared, task, model=models[task]), root / task) for task in models}
    finally:
        dist.destroy_process_group()


def config(prepared: Prepared, task: str, **settings: Any) -> TrainConfig:
    common = {"data": str(prepared.path), "batch_rows": BATCH_ROWS, "optimizer": OPTIMIZER}
    return TrainConfig.parse({**common, "model": MODELS[task], **settings})


def resave(prepared: Prepared, checkpoints: dict[str, Path], root: Path, workers: int) -> dict[str, Path]:
    """The same weights in checkpoints that `workers` processes wrote, tables cut by rows."""
    return run_ranks(workers, _resave, str(prepared.path), checkpoints, str(root), workers)[0]


def _resave(_rank: int, data: str, checkpoints: dict[str, Path], root: str, workers: int) -> dict[str, Path]:
    saved = {}
    for task, path in checkpoints.items():
        found = checkpointing.Checkpoint(path, checkpointing.verify(path))
        cfg = config(Prepared.open(data), task, num_workers=workers, sharding={"kind": "row_wise"})
        sharded, catalogue = _sharded(cfg)
        checkpointing.load(found, sharded)
        saved[task] = saving.save(Path(root, task), sharded, catalogue, found.manifest, Workers()).path
    return saved


def _sharded(cfg: TrainConfig) -> tuple[ShardedModel, Catalogue]:
    prepared = Prepared.open(cfg.data)
    schema = cfg.inputs(prepared)
    catalogue = catalogue_of(prepared, schema, ("train", "valid"))
    torch.manual_seed(cfg.seed)
    model = model_module(cfg.model.name).Model(cfg.model, schema, catalogue)
    return shard(Loss(model), model.table_groups(), cfg.optimizer, cfg.sharding, cfg.seed), catalogue


def _train(cfg: TrainConfig, root: Path) -> Path:
    prepared, workers = Prepared.open(cfg.data), Workers()
    schema, (sharded, catalogue) = cfg.inputs(prepared), _sharded(cfg)
    rows = pa.concat_tables(
        pq.read_table(file) for s in ("train", "valid") for file in prepared.files(f"{cfg.task}/{s}")
    )
    size = cfg.batch_rows
    batches = (collate(rows.slice(start, size), schema) for start in range(0, len(rows), size))
    totals = Epoch(sharded.model, sharded.optimizers, idle_batch(schema, size), workers).run(batches, 0)
    manifest = checkpointing.Manifest(
        model=cfg.model.model_dump(mode="json"),
        data_schema=prepared.schema,
        vocabulary_digest=prepared.manifest.vocabulary_digest,
        data_digest=prepared.manifest.data_digest,
        seed=cfg.seed,
        phase="refit",
        epoch=1,
        step=totals.steps,
        history=[],
    )
    return saving.save(root, sharded, catalogue, manifest, workers).path


def evaluations(prepared: Prepared, checkpoints: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Both models on the test days, as `jobs` evaluate them."""
    cfg = EvaluateConfig(bootstrap=2, item_pairs=0)  # without Ray
    return {
        "recall": evaluate_recall(prepared, load_trained(checkpoints["recall"], prepared), cfg),
        "ranking": evaluate_ranking(prepared, load_trained(checkpoints["ranking"], prepared), cfg),
    }
