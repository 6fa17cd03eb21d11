"""Item tables that start from what another run learned: the item vectors of a finished recall run.

A phase takes the vectors of the run's same phase, so that what chooses the epochs has seen no validation day.

I rows of the item table, D dimension
"""

import json
from pathlib import Path
from typing import Any

import torch

from recsys_dist.config import digest
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import model_module
from recsys_dist.schema import Schema
from recsys_dist.train import checkpoint as checkpoints
from recsys_dist.train.sharding import ShardedModel

RESULT = "result.json"  # of a finished run
_SETTING = "item_vectors"
_TENSORS = ".distcp"  # files that hold them; the others' content depends on where and when they were written


def content(run: str, setting: str) -> str:
    """Digest of what `run` learned, wherever it lies; ConfigError where that is no finished run."""
    paths = dict.fromkeys(checkpoint_of(run, phase, setting) for phase in ("choose", "refit"))
    manifests = [checkpoints.verify(path) for path in paths]
    return digest([[e.sha256 for n, e in sorted(m.files.items()) if n.endswith(_TENSORS)] for m in manifests])


def check(run: str, prepared: Prepared) -> None:
    """ConfigError where `run` has no item vectors, or numbers items otherwise than `prepared` does."""
    manifest = checkpoints.verify(checkpoint_of(run, "refit", _SETTING))
    if model_module(manifest.model["name"]).Model.task != "recall":
        raise ConfigError(
            f"item_vectors={run!r} is of {manifest.model['name']!r}, which ranks: only recall models have "
            "item vectors; name a run of one, such as item2vec"
        )
    if manifest.vocabulary_digest != prepared.manifest.vocabulary_digest:
        raise ConfigError(
            f"item_vectors={run!r} numbers items by another vocabulary ({manifest.vocabulary_digest}) than "
            f"the data in {str(prepared.path)!r} ({prepared.manifest.vocabulary_digest}); train that model "
            "on these data"
        )


def item_vectors(run: str, phase: str) -> torch.Tensor:
    """[I, D] what the model of `run` compares users with, as it stood at the end of `phase`."""
    model, _ = checkpoints.load_for_inference(checkpoint_of(run, phase, _SETTING))
    with torch.no_grad():
        vectors: torch.Tensor = model.item_vectors()  # type: ignore[operator]
    return vectors


def start(sharded: ShardedModel, schema: Schema, vectors_ID: torch.Tensor, std: float | None) -> None:
    """Every table of items with this dimension starts with these vectors; row 0, the unknown item, does not.

    They are scaled as one to the root mean square `std`; None takes that of each table's own start.
    ConfigError where the model has no such table.
    """
    features = {schema.item_id.name, *(feature.name for feature in schema.item_sequences)}
    of_items = {n: t for n, t in sharded.tables.items() if not features.isdisjoint(t.feature_names)}
    found = {name: table for name, table in of_items.items() if table.embedding_dim == vectors_ID.shape[1]}
    if not found:
        dims = ", ".join(f"{table.name!r} of {table.embedding_dim}" for table in of_items.values())
        raise ConfigError(
            f"item_vectors have dimension {vectors_ID.shape[1]}, and the model's tables of items are "
            f"{dims or 'none'}; give both models the same, as by model.embedding_dim or model.dim"
        )
    rms = vectors_ID[1:].double().square().mean().sqrt()
    for name, table in found.items():
        scale = (_drawn_rms(table) if std is None else std) / rms
        sharded.set_known_rows(name, (vectors_ID * scale).float())


def _drawn_rms(table: Any) -> torch.Tensor:
    """Root mean square that the rows of a TorchRec table start with; takes no random number of the run."""
    drawn = torch.empty(4096, table.embedding_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        table.init_fn(drawn)
    return drawn.double().square().mean().sqrt()


def checkpoint_of(run: str, phase: str, setting: str) -> Path:
    """What a finished run has of a phase; ConfigError, naming `setting`, where it is none."""
    file = Path(run) / RESULT
    if not file.is_file():
        raise ConfigError(
            f"{setting}={run!r} is no finished run: it has no {RESULT}. Name the directory of one, below "
            "runs/train/models"
        )
    result = json.loads(file.read_text())
    final = Path(run) / result["checkpoint"]
    if phase == "refit" or final.parent.name == phase:
        return final
    best = checkpoints.of_epoch(Path(run, phase), result["chosen_epoch"])
    assert isinstance(best, Path)
    return best
