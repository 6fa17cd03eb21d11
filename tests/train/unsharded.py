"""Trains a model that `sharding.materialise` gave memory, by the same rules as `shard` has: no workers."""

from collections.abc import Mapping

import torch
from torch import nn

from recsys_dist.train.optim import OptimizerConfig, Optimizers, accumulators_of, attach, table_rules


def train_unsharded(
    model: nn.Module, groups: Mapping[str, list[nn.Parameter]], optimizer: OptimizerConfig
) -> Optimizers:
    """Optimizers of a materialised model that train it by the same rules as `shard` does."""
    rules = table_rules(model, groups, optimizer)
    attach(model, rules)
    return Optimizers(model.named_parameters(), rules, optimizer.dense)


def unsharded_accumulators(model: nn.Module, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """`ShardedModel.accumulators` of a model that `train_unsharded` prepared, with the optimizers it gave."""
    attached = {n: w for n, w in model.named_parameters() if hasattr(w, "_in_backward_optimizers")}
    fused = accumulators_of({n: (w._in_backward_optimizers[0], w) for n, w in attached.items()})
    return {**fused, **optimizers.accumulators()}
