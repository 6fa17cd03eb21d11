"""item2vec (Barkan & Koenigstein 2016, MLSP, arXiv 1603.04259): skip-gram with negative sampling (Mikolov et
al. 2013, NeurIPS, arXiv 1310.4546) over what users did, for recall from item to item.

    maximise  Σ_(i, j)  keep(i)·keep(j)·( log sigmoid(u_i·v_j) + N·E_k log sigmoid(-u_i·v_k) )

over the pairs of items at most `window` apart in a user's sequence, either one as i; the items k of the
expectation are drawn from q ∝ (count + 1)^0.75. keep(i) = min(1, √(subsample / share of i)) is the
probability at which the papers keep an occurrence of a frequent item. (Counts and shares are of the
positives that recall learns from, also where the sequence lists other events.) A user is the mean of her
items' vectors u. As in the paper she is compared with the items' u, by the cosine, each at length 1; or
(`score="contexts"`) with their v, by the inner product: what stands near her items, instead of what stands
where they do. Who has no past is read as one with the unknown item (row 0).

B rows, V items of all their sequences together (a row's own item is its last), D dimension, S negatives,
I rows of the item table
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from torchrec import JaggedTensor

from recsys_dist.batch import Batch
from recsys_dist.config import Seed
from recsys_dist.models.layers import DIM_UNIT
from recsys_dist.models.precision import full
from recsys_dist.models.protocol import Catalogue, ModelConfig, Task
from recsys_dist.models.recall import (
    Negatives,
    all_vectors,
    each,
    ending_with,
    item_sequence,
    item_tables,
    newest,
    nothing,
    one_id,
    vectors_of,
)
from recsys_dist.schema import Schema


class Config(ModelConfig):
    name: Literal["item2vec"] = "item2vec"
    sequence: str | None = Field(None, description="sequence of item ids to read; None: the schema's first")
    dim: int = Field(64, ge=1, multiple_of=DIM_UNIT, description="D")
    embedding_std: float = Field(0.05, gt=0, description="tables start as N(0, std²)")
    window: int = Field(5, ge=1, description="how far apart two items may be to be a pair")
    negatives_per_pair: float = Field(5.0, gt=0, description="N")
    negatives: int = Field(256, ge=1, description="S, drawn anew for every global batch; estimate E_k")
    negatives_alpha: float = Field(0.75, ge=0, le=10, description="0 draws uniformly, 1 by popularity")
    negatives_seed: Seed = 0
    score: Literal["items", "contexts"] = Field("items", description="vectors that recall looks among: u, v")
    subsample: float = Field(1e-3, gt=0, description="share of all events above which an item counts less")


class Model(nn.Module):
    """Vectors of users and items; see the module's docstring for the equation."""

    task: ClassVar[Task] = "recall"
    every_position: ClassVar[bool] = True

    def __init__(self, cfg: Config, schema: Schema, catalogue: Catalogue) -> None:
        super().__init__()
        self.cfg = cfg
        item, past = schema.item_id.name, schema.sequences[0]
        self.item, self.past, self.longest = item, past.name, past.max_length
        read = {item: [self.past], f"context_{item}": [item]}
        self.tables = item_tables(schema.item_id, cfg.dim, cfg.embedding_std, read)
        self.negatives = Negatives(
            catalogue.positives, cfg.negatives, cfg.negatives_alpha, cfg.negatives_seed
        )
        share_I = catalogue.positives.double() / catalogue.positives.sum().clamp(min=1)
        # follows from the catalogue, and so is no part of the state
        self.register_buffer(
            "keep_I", (cfg.subsample / share_I).sqrt().clamp(max=1).float(), persistent=False
        )
        self.keep_I: torch.Tensor

    @staticmethod
    def inputs(schema: Schema, cfg: Config) -> Schema:
        """A sequence of item ids, and the item's id; ConfigError where there is none."""
        return item_sequence(schema, cfg.sequence, "item2vec")

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B, D] user vectors."""
        past, row_B = newest(batch.sparse[self.past], self.longest)
        found = vectors_of(self.tables, {self.past: past, self.item: nothing(past.lengths())})
        item_VD = self._normalised(found[self.past])
        of_V = torch.repeat_interleave(row_B, past.lengths())
        summed_BD = item_VD.new_zeros(batch.rows, self.cfg.dim).index_add(0, of_V, item_VD)
        return self._normalised(summed_BD / past.lengths()[row_B.argsort()][:, None])

    def item_vectors(self) -> torch.Tensor:
        """[I, D] item vectors; on sharded tables every worker calls it together and gets them all."""
        rows, device = len(self.keep_I), self.keep_I.device
        key, other = (self.past, self.item) if self.cfg.score == "items" else (self.item, self.past)
        return self._normalised(all_vectors(self.tables, key, [other], rows, device))

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        """[B] sum over the pairs of a row, divided by the sequence's `max_length`."""
        past, row_B = newest(batch.sparse[self.past], self.longest)
        all_V = ending_with(past, one_id(batch.sparse, self.item)[row_B])
        drawn = each(self.negatives.draw(step).to(batch.device))
        contexts = JaggedTensor(
            torch.cat([all_V.values(), drawn.values()]), lengths=torch.cat([all_V.lengths(), drawn.lengths()])
        )
        found = vectors_of(self.tables, {self.past: all_V, self.item: contexts})
        u_VD = found[self.past]
        v_VD, drawn_SD = torch.split(found[self.item], [len(u_VD), len(drawn.values())])
        of_V = torch.repeat_interleave(row_B, all_V.lengths())
        # the unknown item tells of a user who begins, but is nothing to predict
        keep_V = self.keep_I[all_V.values()]
        known_V = keep_V * (all_V.values() > 0)
        loss_V, pairs_V = torch.zeros_like(keep_V), torch.zeros_like(keep_V)
        for apart in range(1, min(self.cfg.window, int(all_V.lengths().max()) - 1) + 1):
            same = of_V[apart:] == of_V[:-apart]
            for i, j in (
                (slice(apart, None), slice(None, -apart)),
                (slice(None, -apart), slice(apart, None)),
            ):
                weight = same * keep_V[i] * known_V[j]
                loss_V[i] += weight * F.softplus(-(u_VD[i] * v_VD[j]).sum(dim=1))
                pairs_V[i] += weight
        others_V = F.softplus(full(u_VD @ drawn_SD.T)).mean(dim=1)
        loss_V = loss_V + pairs_V * self.cfg.negatives_per_pair * others_V
        return loss_V.new_zeros(batch.rows).index_add(0, of_V, loss_V) / self.longest

    def table_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """`"deep"`: the items' vectors u and v."""
        return {"deep": list(self.tables.parameters())}

    def _normalised(self, vectors: torch.Tensor) -> torch.Tensor:
        return F.normalize(vectors, dim=1) if self.cfg.score == "items" else vectors
