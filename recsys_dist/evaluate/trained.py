"""What both evaluations share: their settings, a trained model with the schema it reads, and JSON."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field

from recsys_dist.config import Config
from recsys_dist.data.output import write_text
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import CheckpointError
from recsys_dist.models.protocol import model_module, model_schema
from recsys_dist.schema import Schema
from recsys_dist.train.checkpoint import load_for_inference

Work = Callable[[str], pa.Table]  # one file in, one table out
MapFiles = Callable[[Work, list[str]], Iterable[pa.Table]]  # `map`, or the same over many workers


class EvaluateConfig(Config):
    """Settings of `jobs/evaluate.py`."""

    split: Literal["valid", "test"] = "test"
    batch_rows: int = Field(8192, ge=1, description="rows scored at once; part of what exact results mean")
    ks: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = Field(
        (50, 100, 200), min_length=1, description="cuts of the recall metrics"
    )
    bootstrap: int = Field(200, ge=2, description="replicates behind the 95 % intervals")
    seed: int = 0
    encoded: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="id features of the target encoding; None takes ids and categorical context",
    )
    smoothing: float = Field(20.0, gt=0, description="rows of prior in the target encoding's rates")
    item_pairs: int = Field(
        100_000_000,
        ge=0,
        description="pairs of similar items that the item-to-item baseline keeps (4 to 8 bytes each): all "
        "of up to 10,000 items, else equally many of each item; 0 leaves it out",
    )


@dataclass(frozen=True)
class Trained:
    """A RankModel or RecallModel in eval mode, unsharded, and the fitted schema that it reads."""

    model: Any
    schema: Schema


def load_trained(checkpoint: str | Path, prepared: Prepared) -> Trained:
    """The model of a checkpoint; CheckpointError where it is torn or was trained on other features or ids."""
    model, manifest = load_for_inference(checkpoint, prepared.schema)
    if manifest.vocabulary_digest != prepared.manifest.vocabulary_digest:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} numbers ids by another vocabulary "
            f"({manifest.vocabulary_digest}) than the data in {str(prepared.path)!r} "
            f"({prepared.manifest.vocabulary_digest}); evaluate on the data that it was trained on"
        )
    cfg = model_module(manifest.model["name"]).Config.parse(manifest.model)
    return Trained(model, model_schema(cfg, manifest.data_schema, manifest.label))


def known_before(split: str) -> tuple[str, ...]:
    """The splits that lie before `split`: what a baseline, and a refitted model, may learn from."""
    return ("train",) if split == "valid" else ("train", "valid")


def write_json(values: dict[str, Any], file: Path) -> None:
    """Write `values` with NaN as null, which JSON has no other word for."""
    write_text(json.dumps(_without_nan(values), indent=1) + "\n", file)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
