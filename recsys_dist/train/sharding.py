"""A model spread over workers by TorchRec.

torchrec.distributed is here, in `placement`, `sharders` and `ahead`, and nowhere else.

`shard` spreads a model over the workers of the process group; `materialise` makes its unsharded twin
with the same values. Starting values are a function of (seed, table, block of rows), so they do not
depend on the number of workers or the kind of sharding.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ShardingPlan

from recsys_dist.train import kernels
from recsys_dist.train.collectives import connect
from recsys_dist.train.increments import Touched
from recsys_dist.train.optim import OptimizerConfig, Optimizers, attach, table_rules
from recsys_dist.train.pieces import pieces, placed_as
from recsys_dist.train.placement import ShardingConfig, narrow, planner_of, quiet, tables_of
from recsys_dist.train.sharders import sharders
from recsys_dist.train.starting import fill


class ShardedModel:
    """A model spread over the workers, and everything a checkpoint needs of it.

    model       DistributedModelParallel; call it as the wrapped module
    optimizers  to step after each backward pass
    tables      name of each table's weight -> its TorchRec config
    touched     rows since the last full checkpoint; None: all are full, see `saving.watch`
    """

    def __init__(
        self, model: DistributedModelParallel, optimizers: Optimizers, tables: Mapping[str, Any]
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.tables = tables
        self.touched: Touched | None = None
        self._fused_rates = [(group, group["lr"]) for group in model.fused_optimizer.param_groups]

    def scale_rates(self, factor: float) -> None:
        """Every learning rate, of tables and dense weights, becomes its configured one times `factor`."""
        self.optimizers.scale_rates(factor)
        for group, rate in self._fused_rates:
            group["lr"] = rate * factor
        self.model.fused_optimizer.step()  # hands the rates to the kernels; they step in the backward pass

    def inner(self) -> Any:
        """The model as it was before `Loss` wrapped it; its lookups are collective."""
        return self.model.module.model

    def lookups(self) -> list[nn.Module]:
        """The modules that look this worker's tables up, each of which gives one tensor of embeddings."""
        return [each for module in self.model.modules() for each in getattr(module, "_lookups", [])]

    def weights(self) -> dict[str, Any]:
        """Parameter name -> Tensor or ShardedTensor, views of the live weights."""
        return dict(self.model.state_dict())

    def accumulators(self) -> dict[str, Any]:
        """Table's parameter name -> its optimizer's sum, Tensor or ShardedTensor, views of the live state."""
        fused = self.model.fused_optimizer.state_dict()["state"]
        sums = {name: state for name, states in fused.items() for state in states.values()}
        weights = self.weights()
        for name, local in self.optimizers.accumulators().items():
            sums[name] = placed_as(weights[name], local)
        return sums

    @torch.no_grad()
    def set_known_rows(self, name: str, values: torch.Tensor) -> None:
        """All rows but row 0 of the table whose weight is `name` become those of `values` [rows, dim].

        Each worker sets those that live with it.
        """
        for tensor, (row, column), (height, width) in pieces(self.weights()[name], self.tables[name]):
            unknown = max(0, 1 - row)
            tensor[unknown:].copy_(values[row + unknown : row + height, column : column + width])

    def plan(self) -> dict[str, dict[str, Any]]:
        """Table -> {"kind", "ranks"}."""
        placed = [item for module in self.model.plan.plan.values() for item in module.items()]
        return {t: {"kind": p.sharding_type, "ranks": list(p.ranks or [])} for t, p in placed}


def shard(
    model: nn.Module,
    groups: Mapping[str, list[nn.Parameter]],
    optimizer: OptimizerConfig,
    sharding: ShardingConfig,
    seed: int,
    device: torch.device | str = "cpu",
) -> ShardedModel:
    """Spread `model`, tables on "meta", over the process group. Collective; dense weights follow rank 0.

    `groups` is the model's `table_groups()`. Raises ConfigError for a plan that cannot train rightly.
    """
    kernels.choose()
    rules = table_rules(model, groups, optimizer)
    tables = tables_of(model)
    connect(model)
    narrow(model, rules)
    attach(model, rules)
    using = sharders(sharding.exchange, torch.device(device))
    group = dist.group.WORLD
    assert group is not None, "shard() needs torch.distributed; materialise() is the single-process twin"
    planner = planner_of(sharding, tables, rules, group.size(), torch.device(device).type)
    for module in model.modules():  # which TorchRec leaves where they are if no weight is dense
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), name not in module._non_persistent_buffers_set)
    with quiet():
        plan = planner.collective_plan(model, using, group)
        _keep_gradients(plan, [tables[name].name for name, rule in rules.items() if not rule.fused])
        parallel = DistributedModelParallel(
            model, plan=plan, sharders=using, device=torch.device(device), init_data_parallel=False
        )
        fill({n: w for n, w in parallel.state_dict().items() if n in tables}, tables, seed)
        parallel.init_data_parallel()
    return ShardedModel(parallel, Optimizers(parallel.named_parameters(), rules, optimizer.dense), tables)


def materialise(model: nn.Module, seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """Give an unsharded model's "meta" tables memory and the values that `shard` would; returns `model`."""
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection):
            module.to_empty(device=torch.device(device))
    tables = tables_of(model)
    fill({name: w for name, w in model.state_dict().items() if name in tables}, tables, seed)
    return model.to(device)


def _keep_gradients(plan: ShardingPlan, tables: list[str]) -> None:
    """Have these tables looked up by the kernel that leaves an ordinary gradient to step by.

    (As a planner's constraint TorchRec allows it for data-parallel tables only; it serves all others too.)
    """
    for placed in plan.plan.values():
        for name, parameter in placed.items():
            if name in tables:
                parameter.compute_kernel = EmbeddingComputeKernel.DENSE.value
