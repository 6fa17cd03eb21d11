"""torch-rechub: its trainer and loader as they ship, and its models in the bare loop.

Form of the model and dimension of embeddings are ours in both settings.
"""

from typing import Any

import torch
from torch.nn import functional as F
from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
from torch_rechub.models.ranking import DIEN, DIN, DCNv2, DeepFM, WideDeep
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator

from jobs.bench_sides.bare import Run, matched
from jobs.bench_sides.rows import FLOATS, HISTORY, TABLES, Rows

MODELS = ("wide_deep", "dcn", "deepfm", "din", "dien")
DIM = 16
EXAMPLES_BATCH = 2048  # the loader's own default is 16, with which no one trains


def prepared(model: str, rows: Rows, batch_rows: int) -> dict[str, Run]:
    """`shipped`: an epoch of CTRTrainer, by its default Adam with weight decay. `matched`: see bare."""
    count, columns = len(rows["click"]), _columns(rows)
    loader, *_ = DataGenerator(columns, rows["click"]).generate_dataloader(
        x_val=columns, y_val=rows["click"], x_test=columns, y_test=rows["click"], batch_size=EXAMPLES_BATCH
    )
    trainer = CTRTrainer(_model(model), loss_mode=model != "dien")

    def epoch() -> int:
        trainer.train_one_epoch(loader)
        return count

    inputs = {name: torch.from_numpy(column) for name, column in columns.items()}
    inputs = {
        name: column if column.is_floating_point() else column.long() for name, column in inputs.items()
    }
    label = torch.from_numpy(rows["click"])
    starts = range(0, count, batch_rows)
    batches = [
        ({name: column[at : at + batch_rows] for name, column in inputs.items()}, label[at : at + batch_rows])
        for at in starts
    ]
    return {"shipped": epoch, "matched": matched(lambda: _model(model), _loss, batches, count)}


def _model(name: str) -> Any:
    """Towers of our widths, as its examples have them too; dropout is 0 by default."""
    single = [SparseFeature(table, rows, DIM, padding_idx=0) for table, rows in TABLES.items()]
    dense = [DenseFeature(f"float_{number}") for number in range(FLOATS)]
    fields, tower = [*single, *_lists("history", "mean")], {"dims": [256, 128]}
    match name:
        case "wide_deep":
            return WideDeep([_wide(table, rows) for table, rows in TABLES.items()], [*fields, *dense], tower)
        case "dcn":
            return DCNv2([*fields, *dense], 3, tower, use_low_rank_mixture=False)
        case "deepfm":
            return DeepFM([*fields, *dense], fields, tower)
    candidate = [each for each in single if each.name in HISTORY]
    others = [each for each in single if each.name not in HISTORY]
    histories = _lists("history", "concat")
    if name == "din":  # its DIN reads no floats
        return DIN(others, histories, candidate, tower, {"dims": [36]})
    return DIEN([*others, *dense], histories, _lists("negative", "concat"), candidate, tower, alpha=1.0)


def _wide(table: str, rows: int) -> Any:
    return SparseFeature(f"wide_{table}", rows, 1)


def _lists(kind: str, pooling: str) -> list[Any]:
    return [
        SequenceFeature(f"{kind}_{n}", TABLES[n], DIM, pooling, shared_with=n, padding_idx=0) for n in HISTORY
    ]


def _columns(rows: Rows) -> dict[str, Any]:
    singles = {name: rows["ids"][:, number] for number, name in enumerate(TABLES)}
    wide = {f"wide_{name}": ids for name, ids in singles.items()}
    floats = {f"float_{number}": rows["dense"][:, number] for number in range(FLOATS)}
    lists = {name: column for name, column in rows.items() if name.startswith(("history_", "negative_"))}
    return {**singles, **wide, **floats, **lists}


def _loss(model: Any, batch: tuple[dict[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    inputs, label = batch
    found = model(inputs)
    probability, further = found if isinstance(found, tuple) else (found, 0.0)
    return F.binary_cross_entropy(probability, label) + further
