"""FBGEMM's lookups on CPUs, each sent to the faster of its kernels that give the same.

Two backward passes are slow, and can be gone around from here:

- That of lookups without pooling (a vector per id, as SASRec reads histories) gathers gradients in nested
  hash maps. The same lookup are bags of one id each, in one table of which the group's are stretches: a
  tenth of the time, and the same weights to the last bit.
- That of row-wise Adagrad generates, for a table with one feature, machine code that goes from AVX to SSE
  and back at every row. Intel's cores since Golden Cove take hundreds of cycles for that. A table with
  several features is left to compiled code: a sixth of the time there, the same but for rounding. So a
  feature that has its table alone gets a companion of no ids and no width.

F features of a group of tables, G of them with companions, B rows
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from fbgemm_gpu.split_embedding_codegen_lookup_invokers import (
    lookup_adagrad,
    lookup_rowwise_adagrad,
    lookup_sgd,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from recsys_dist import cpu

Invoke = Callable[..., torch.Tensor]
_MOST_ROWS = 2**31 - 1  # of a table, for these kernels
_ARRANGED = WeakTensorKeyDictionary()  # by a group's own `D_offsets`


def choose() -> None:
    """From now on in this process; a second call changes nothing."""
    for module in (lookup_adagrad, lookup_rowwise_adagrad, lookup_sgd):
        if not hasattr(module.invoke, "__wrapped__"):
            slow_alone = module is lookup_rowwise_adagrad and cpu.slow_between_avx_and_sse()
            module.invoke = rerouted(module.invoke, slow_alone)


def rerouted(invoke: Invoke, slow_alone: bool) -> Invoke:
    """What gives the same as FBGEMM's `invoke` of a rule, which is `slow_alone` for features that are."""

    @functools.wraps(invoke)
    def by_route(common: Any, rule: Any, *states: Any, **more: Any) -> torch.Tensor:
        if _joinable(common):
            common, of_G = _joined(common)
        elif slow_alone and _plain(common):
            common, of_G = _accompanied(common)
        else:
            return invoke(common, rule, *states, **more)
        common = common._replace(**_chosen(common, "weights_", of_G))
        return invoke(common, rule, *(each._replace(**_chosen(each, "", of_G)) for each in states), **more)

    return by_route


def _plain(common: Any) -> bool:
    """On the CPU, some ids, equally many rows of each feature, all of which learn."""
    on_cpu = common.host_weights.numel() > 0 and len(common.indices) > 0
    return on_cpu and common.feature_requires_grad is None and common.vbe_metadata.B_offsets is None


def _joinable(common: Any) -> bool:
    """Without pooling, and tables of one width that lie side by side."""
    if common.pooling_mode != PoolingMode.NONE or not _plain(common):
        return False
    first_F, width_F = common.hash_size_cumsum[:-1], common.D_offsets.diff()
    side_by_side = torch.equal(common.weights_offsets, first_F * width_F)
    return side_by_side and len(width_F.unique()) == 1 and int(common.hash_size_cumsum[-1]) <= _MOST_ROWS


def _joined(common: Any) -> tuple[Any, torch.Tensor]:
    """As bags of one id in one table with one feature and its companion; which feature each is."""
    first_F, rows, width = common.hash_size_cumsum[:-1], _rows(common), int(common.D_offsets[1])
    bags = len(common.indices)
    both = first_F.new_zeros(2)
    one = common._replace(
        indices=common.indices + torch.repeat_interleave(first_F, common.offsets[::rows].diff()),
        offsets=torch.arange(2 * bags + 1).clamp(max=bags),
        D_offsets=common.D_offsets.new_tensor([0, width, width]),
        total_D=width,
        hash_size_cumsum=torch.cat([both, common.hash_size_cumsum[-1:]]),
        pooling_mode=PoolingMode.SUM,
    )
    return one, both


def _accompanied(common: Any) -> tuple[Any, torch.Tensor]:
    """With a companion after each feature that has its table alone; which feature each is, or accompanies."""
    of_G, companion_G1, arrangement = _arranged(common)
    rows = _rows(common)
    begin_GB, end_G1 = common.offsets[:-1].view(-1, rows)[of_G], common.offsets[rows::rows][of_G][:, None]
    offsets_GB = torch.where(companion_G1, end_G1, begin_GB)
    offsets = torch.cat([offsets_GB.flatten(), common.offsets[-1:]])
    return common._replace(offsets=offsets, **arrangement), of_G


def _arranged(common: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """What of that is the same for every batch of a group of tables."""
    if common.D_offsets not in _ARRANGED:
        first_F = common.hash_size_cumsum[:-1]
        _, features = torch.unique_consecutive(first_F, return_counts=True)
        of_G = torch.repeat_interleave(torch.repeat_interleave(features == 1, features) + 1)
        companion_G = pad(of_G[1:] == of_G[:-1], (1, 0))
        arrangement = {
            "D_offsets": torch.cat([common.D_offsets[of_G + companion_G], common.D_offsets[-1:]]),
            "hash_size_cumsum": torch.cat([first_F[of_G], common.hash_size_cumsum[-1:]]),
        }
        _ARRANGED[common.D_offsets] = of_G, companion_G[:, None], arrangement
    return _ARRANGED[common.D_offsets]


def _rows(common: Any) -> int:
    """B"""
    return (len(common.offsets) - 1) // (len(common.D_offsets) - 1)


def _chosen(of_features: Any, prefix: str, of_G: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where each feature's weights, or state, begin and lie: [F] to [G]."""
    return {name: getattr(of_features, name)[of_G] for name in (f"{prefix}offsets", f"{prefix}placements")}
