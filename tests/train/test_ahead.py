"""Ids that are exchanged ahead change nothing: not a weight, not a loss, not what is saved when.

On CPUs, where nothing overlaps, the order of things is the same as on GPUs.
"""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline.runtime_forwards import PipelinedForward
from torchrec.distributed.types import ShardedModule

from recsys_dist.train import ahead
from recsys_dist.train.loop import Epoch, Totals, Workers, idle_batch, one_by_one
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.sharding import ShardedModel, shard
from tests.models.test_sharded import ROWWISE, Case, build, global_batches, inputs
from tests.train import truth
from tests.train.ranks import run_ranks

SKIPPED, SAVED = 6, (2, 9, 10)  # steps: with a NaN on the last rank; those before which is saved


def trained(
    case: Case, kind: Any, rank: int, schedule: Any, device: str = "cpu", skip_steps: int = 1
) -> dict[str, Any]:
    """Batches come from the host; `weights` are left out on a GPU."""
    loss, schema = build(case), inputs(case)
    sharding = ShardingConfig(kind=kind)
    sharded = shard(loss, loss.model.table_groups(), ROWWISE, sharding, truth.SEED, device)
    told: list[tuple[int, int, float]] = []
    saved: list[tuple[int, int]] = []

    def on_step(totals: Totals) -> None:
        told.append((totals.rows, totals.skipped, totals.loss_sum))

    idle = idle_batch(schema, truth.ROWS).to(torch.device(device))
    epoch = Epoch(sharded.model, sharded.optimizers, idle, Workers(), on_step)
    epoch.schedule, epoch.seed, epoch.skip_steps = schedule, 3, skip_steps
    asked = iter(range(truth.STEPS + 1))
    epoch.due = lambda: next(asked) + 1 in SAVED
    epoch.save = lambda mine: saved.append((mine, epoch.totals.steps))
    batches = list(truth.share(global_batches(case), rank, case.world))
    if rank == case.world - 1 > 0:
        batches[SKIPPED].dense.fill_(torch.nan)
    totals = epoch.run(iter(batches), 0)
    of_tables = {**sharded.weights(), **sharded.accumulators()}
    weights = truth.whole(of_tables) if device == "cpu" else {}
    return {"weights": weights, "told": told, "saved": saved, "steps": totals.steps, **left(sharded)}


def left(sharded: ShardedModel) -> dict[str, Any]:
    """Lookups that are not as they were before training."""
    tables = [module for module in sharded.model.modules() if isinstance(module, ShardedModule)]
    return {"left": [type(module).__name__ for module in tables if not inspect.ismethod(module.forward)]}


def both_ways(rank: int, case: Case, kind: str) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """One after the other; and how many lookups were exchanged ahead in each step of the second."""
    began = []
    forward = Epoch.forward

    def counted(epoch: Epoch, turn: Any) -> Any:
        tables = [module for module in epoch.model.modules() if isinstance(module, ShardedModule)]
        ahead = [module.forward for module in tables if isinstance(module.forward, PipelinedForward)]
        began.append(sum(lookup.name in lookup.get_context().input_dist_tensors_requests for lookup in ahead))
        return forward(epoch, turn)

    in_turn = trained(case, kind, rank, one_by_one)
    Epoch.forward = counted  # type: ignore[method-assign]
    try:
        return in_turn, trained(case, kind, rank, ahead.overlapped), began
    finally:
        Epoch.forward = forward  # type: ignore[method-assign]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "kind", "lookups"),
    [("wide_deep", "row_wise", 1), ("din", "table_wise", 1), ("youtubednn", "row_wise", 0)],
)
def test_what_is_exchanged_ahead_changes_nothing(name: str, kind: str, lookups: int) -> None:
    """Workers' batches are uneven, empty, and run out; a step is left out; training is saved three times."""
    for in_turn, overlapped, began in run_ranks(2, both_ways, Case(name), kind):
        assert began == [lookups] * truth.STEPS
        assert overlapped["left"] == in_turn["left"] == []
        assert overlapped["told"] == in_turn["told"] and len(in_turn["told"]) == truth.STEPS
        assert in_turn["told"][-1][1] > 0
        assert overlapped["saved"] == in_turn["saved"]
        assert [steps for _, steps in in_turn["saved"]] == list(SAVED)
        for weight, values in in_turn["weights"].items():
            np.testing.assert_array_equal(overlapped["weights"][weight], values, err_msg=weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("skip_steps", [0, 1])  # with 0 nothing makes the host wait for a step
@pytest.mark.parametrize("name", ["wide_deep", "din", "item2vec"])
def test_what_travels_to_a_gpu_meanwhile_is_what_it_trains_on(name: str, skip_steps: int) -> None:
    device, case = "cuda:0", Case(name, world=1)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        in_turn, overlapped = (
            trained(case, "auto", 0, schedule, device, skip_steps)
            for schedule in (one_by_one, ahead.schedule(torch.device(device)))
        )
    finally:
        dist.destroy_process_group()
    assert overlapped["saved"] == in_turn["saved"] and len(overlapped["told"]) == truth.STEPS
    np.testing.assert_allclose(overlapped["told"], in_turn["told"], rtol=truth.LOSS_RTOL)
