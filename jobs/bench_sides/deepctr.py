"""deepctr-torch: `fit` as it ships, and its models in the bare loop.

Form of the model and dimension of embeddings are ours in both settings.
"""

from typing import Any

import numpy as np
import torch
from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
from deepctr_torch.models import DCN, DIEN, DIN, WDL, DeepFM
from torch.nn import functional as F

from jobs.bench_sides.bare import Run, matched
from jobs.bench_sides.rows import FLOATS, HISTORY, LONGEST, TABLES, Rows

MODELS = ("lr", "fm", "mlp", "wide_deep", "dcn", "deepfm", "din", "dien")
DIM = 16


def _lists(prefix: str) -> list[Any]:
    ids = [SparseFeat(prefix + name, TABLES[name], DIM, embedding_name=name) for name in HISTORY]
    return [VarLenSparseFeat(each, LONGEST, length_name="length") for each in ids]


SINGLE = [SparseFeat(name, rows, DIM) for name, rows in TABLES.items()]
DENSE, HISTORIES, NEGATIVES = [DenseFeat("dense", FLOATS)], _lists("hist_"), _lists("neg_hist_")


def prepared(model: str, rows: Rows, batch_rows: int) -> dict[str, Run]:
    """`shipped`: `fit` with Adam and all defaults, its batch of 256 among them. `matched`: see bare."""
    shipped = _model(model, bare=False)
    shipped.compile("adam", "binary_crossentropy")
    columns = _columns(rows)
    count = len(rows["click"])

    def fit() -> int:
        shipped.fit({name: columns[name] for name in shipped.feature_index}, rows["click"], verbose=0)
        return count

    wide = [np.reshape(columns[name], (count, -1)) for name in shipped.feature_index]
    matrix = torch.from_numpy(np.concatenate(wide, axis=1)).float()  # the only form that its models read
    label = torch.from_numpy(rows["click"])
    starts = range(0, count, batch_rows)
    batches = [(matrix[at : at + batch_rows], label[at : at + batch_rows]) for at in starts]
    return {"shipped": fit, "matched": matched(lambda: _model(model, bare=True), _loss, batches, count)}


def _model(name: str, bare: bool) -> Any:
    """As defaults have it, or with `bare` our widths and no penalty; its towers cannot have Dice."""
    fields = [*SINGLE, *HISTORIES, *DENSE]
    none = {"l2_reg_embedding": 0.0} if bare else {}
    match name:
        case "lr":
            return WDL([*SINGLE, *DENSE], [], **none)
        case "fm":
            return DeepFM([*SINGLE, *DENSE], fields, dnn_hidden_units=(), **none)
        case "mlp":
            return WDL([], fields, **none)
        case "wide_deep":
            return WDL(SINGLE, fields, **none)
        case "dcn":
            ours = {"dnn_hidden_units": (256, 128), "cross_num": 3, "l2_reg_cross": 0.0} if bare else {}
            return DCN([], fields, cross_parameterization="matrix", **ours, **none)
        case "deepfm":
            return DeepFM([*SINGLE, *DENSE], fields, **none)
        case "din":
            ours = {"att_hidden_size": (36,)} if bare else {}
            return DIN(fields, list(HISTORY), **ours, **none)
        case _:
            read = [*fields, *NEGATIVES]
            return DIEN(read, list(HISTORY), gru_type="AUGRU", use_negsampling=True, **none)


def _columns(rows: Rows) -> dict[str, np.ndarray]:
    singles = {name: rows["ids"][:, number] for number, name in enumerate(TABLES)}
    lists = {f"hist_{name}": rows[f"history_{name}"] for name in HISTORY}
    lists |= {f"neg_hist_{name}": rows[f"negative_{name}"] for name in HISTORY}
    return {**singles, **lists, "length": rows["length"], "dense": rows["dense"]}


def _loss(model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, label = batch
    loss = F.binary_cross_entropy(model(inputs).squeeze(1), label)
    return (loss + model.aux_loss).squeeze()
