"""Models that count instead of learning by steps: a run of one, from the prepared data to its result.

It leaves what every run leaves, checkpoints of both phases and a result, so that all that comes after
training does not know the difference. Counting goes over the cluster with Ray Data, and is done again from
the start where it was interrupted.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from recsys_dist import cpu
from recsys_dist.data.output import write_text
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import Catalogue, model_module
from recsys_dist.schema import Schema
from recsys_dist.train import item_cosine, saving, storage
from recsys_dist.train.catalogue import catalogue_of
from recsys_dist.train.checkpoint import Manifest, retain
from recsys_dist.train.loop import idle_batch
from recsys_dist.train.pretrained import RESULT
from recsys_dist.train.progress import Progress
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.validate import item_vectors, recall_users

# phase -> the splits it counts, and the one that it must not look beyond
_PHASES = {"choose": (("train",), "valid"), "refit": (("train", "valid"), "test")}


def counts(cfg: TrainConfig) -> bool:
    """Whether the model has nothing to learn by steps."""
    return bool(getattr(model_module(cfg.model.name).Model, "counted", False))


def count(cfg: TrainConfig, prepared: Prepared, run: Path) -> None:
    """Count the training days and validate, then the validation days too, and write down the result.

    ConfigError where it is to start from another run.
    """
    for name in ("item_vectors", "warm_start"):
        if getattr(cfg, name) is not None:
            raise ConfigError(f"{cfg.model.name} counts, and starts from nothing: leave out {name}")
    if cfg.newest_fraction != 1 or cfg.use_gpu:
        name = "use_gpu" if cfg.use_gpu else "newest_fraction"
        raise ConfigError(f"{cfg.model.name} counts all of the training days, on CPUs: leave out {name}")
    progress = Progress(run, 0, lambda: True, profile=False)
    for phase in _PHASES:
        progress.resume(phase, 0, 0)  # an interrupted run counts anew
    root, history = storage.below(cfg.checkpoints, run), list[dict[str, Any]]()
    for phase in _PHASES if cfg.refit else ("choose",):
        began = time.perf_counter()
        schema, catalogue = cfg.inputs(prepared), _catalogue(cfg, prepared, phase)
        model = model_module(cfg.model.name).Model(cfg.model, schema, catalogue).eval()
        rows = sum(prepared.shards(f"recall/{split}").total_rows for split in _PHASES[phase][0])
        entry = {"epoch": 1, "trained_rows": rows, "seconds": time.perf_counter() - began}
        entry |= _validated(model, cfg, prepared, schema) if phase == "choose" else {}
        history.append(entry)
        manifest = Manifest(
            model=cfg.model.model_dump(mode="json"),
            data_schema=prepared.schema,
            vocabulary_digest=prepared.manifest.vocabulary_digest,
            data_digest=prepared.manifest.data_digest,
            seed=cfg.seed,
            phase=phase,
            epoch=1,
            step=1,
            history=[entry],
        )
        saved = saving.save_whole(root / phase, model, catalogue, manifest)
        retain(root / phase, [saved.path])  # not those of a run that was interrupted
        progress.epoch(phase, 1, entry, 0)
    seconds = sum(entry["seconds"] for entry in history)
    result = {
        "checkpoint": f"{saved.path.parent.name}/{saved.path.name}",
        "chosen_epoch": 1,
        "history": history[:1],
        "seconds": seconds,
        "rows_per_s": sum(entry["trained_rows"] for entry in history) / seconds,
        "peak_bytes": [cpu.peak_bytes()],
    }
    write_text(json.dumps(result), run / RESULT)


def _catalogue(cfg: TrainConfig, prepared: Prepared, phase: str) -> Catalogue:
    """All that the model of a phase knows."""
    splits, beyond = _PHASES[phase]
    catalogue = catalogue_of(prepared, cfg.inputs(prepared), splits)
    if not cfg.model.asks_neighbours:
        return catalogue
    most = min(cfg.model.asks_neighbours, len(catalogue.positives))
    found = item_cosine.neighbours(prepared, beyond, most)
    missing = cfg.model.asks_neighbours - most
    padded = [torch.nn.functional.pad(torch.from_numpy(values), (0, missing)) for values in found]
    return replace(catalogue, neighbours=(padded[0], padded[1]))


def _validated(model: Any, cfg: TrainConfig, prepared: Prepared, schema: Schema) -> dict[str, float]:
    """The metric on the validation days, of the users at their beginning."""
    idle, item_ID, k = idle_batch(schema, cfg.batch_rows), item_vectors(model), cfg.recall_at
    states = [
        recall_users(model, item_ID, table.slice(start, cfg.batch_rows), schema, idle, k)
        for table in map(pq.read_table, prepared.files("users/valid"))
        for start in range(0, len(table), cfg.batch_rows)
    ]
    first, *others = [state for state in states if state is not None]
    found: dict[str, float] = first.merge(*others).compute((k,))
    return found
