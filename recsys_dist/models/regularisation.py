"""Mini-batch aware regularisation (DIN, Zhou et al. 2018, arXiv 1706.06978, §5.1): L2 of the ids in a batch.

    w_j <- w_j - η [ 1/|B| Σ ∂L/∂w_j + λ alpha_j / n_j w_j ]                                    (eq. 6)

alpha_j is 1 where id j occurs in the global batch and else 0; n_j training rows have it. No weight but those
that the batch looks up anyway is touched, and an id is pulled less at a time the more often it comes.

B rows, V ids of all features, R rows of all tables
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recsys_dist.batch import Batch
from recsys_dist.feature_kinds import Bag, IdFeature
from recsys_dist.models.layers import WorkerSum, table_rows
from recsys_dist.schema import Schema


class BatchAwareL2(nn.Module):
    """λ alpha_j / n_j, shared out among all occurrences of id j in the global batch.

    Exact for any number of workers and sharding, for an id that a row or several workers have more than once,
    and for whatever steps the tables: the term joins the gradient of looked-up embeddings (`pulled`), and the
    loss that is told stays the data's. Costs one sum over the workers a step, of a number per table row.
    """

    def __init__(
        self, rate: float, schema: Schema, features: list[IdFeature], rows: Mapping[str, torch.Tensor]
    ) -> None:
        """`rows` are `Catalogue.occurrences`; a model that only predicts has none, and calls this never."""
        super().__init__()
        self.rate, self.workers = rate, WorkerSum()
        self.lists = {feature.name for feature in features if isinstance(feature, Bag)}
        sizes = {schema.table(feature): table_rows(feature) for feature in features}
        before = dict(zip(sizes, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))
        self.first = {feature.name: before[schema.table(feature)] for feature in features}
        found = [rows[table] for table in sizes if table in rows]
        n_R = torch.cat(found) if found else torch.empty(0)
        self.register_buffer("n_R", n_R.clamp(min=1).float(), persistent=False)
        self.n_R: torch.Tensor

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Feature -> what each of its looked-up vectors is pulled by: [B] of single ids, [V] of sequences."""
        found = {name: batch.sparse[name] for name in self.first}
        id_V = torch.cat([jagged.values() + self.first[name] for name, jagged in found.items()])
        real = [batch.real.repeat_interleave(jagged.lengths()) for jagged in found.values()]
        real_V = torch.cat(real).to(self.n_R.dtype)
        # the last number counts the workers: the loop averages their gradients
        count_R = self.n_R.new_zeros(len(self.n_R) + 1)
        count_R[-1] = 1
        count_R = self.workers(count_R.index_add_(0, id_V, real_V))
        rate_V = real_V * self.rate * count_R[-1] / (self.n_R * count_R[:-1].clamp(min=1))[id_V]
        rates = dict(zip(found, rate_V.split([len(mask) for mask in real]), strict=True))
        return {
            name: rate if name in self.lists else _by_row(rate, found[name].lengths())
            for name, rate in rates.items()
        }


def pulled(x: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """`x` [..., D] itself, whose gradient has `rate` [...] times `x` more."""
    out: torch.Tensor = _Pulled.apply(x, rate)  # type: ignore[no-untyped-call]
    return out


class _Pulled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, rate)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, rate = ctx.saved_tensors
        return torch.addcmul(gradient[0], rate[..., None].to(x.dtype), x), None


def _by_row(rate_V: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """[B]: zero for rows that have no id, padding."""
    return rate_V.new_zeros(len(lengths_B)).masked_scatter(lengths_B > 0, rate_V)
