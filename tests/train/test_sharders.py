"""What crosses between workers in half precision, what training comes to with it, and tables on the host."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recsys_dist.errors import ConfigError
from recsys_dist.train.loop import Epoch, Workers, idle_batch
from recsys_dist.train.placement import ShardingConfig, place
from recsys_dist.train.sharders import sharders
from recsys_dist.train.sharding import shard
from tests.train import tiny, truth
from tests.train.ranks import run_ranks
from tests.train.test_one_truth import KINDS, SGD, global_batches
from tests.train.test_sharding import ROWWISE, build

# measured: 5e-5 of a loss and 1e-4 of a weight; a step in fp16 alone would be 5e-4 of a vector
LOSS_RTOL, WEIGHT_ATOL = 2e-4, 5e-4


def sent_as(rank: int, exchange: str | None) -> dict[str, tuple[truth.Outcome, Counter]]:
    """By SGD, which moves weights by their gradients, where Adagrad divides small ones by their own size."""
    found = {}
    for kind in ("table_wise", "mix"):
        sent, usual = Counter(), dist.all_to_all_single

        def watched(
            output: torch.Tensor, *args: Any, sent: Any = sent, usual: Any = usual, **more: Any
        ) -> Any:
            sent[output.dtype] += output.numel() if output.is_floating_point() else 0
            return usual(output, *args, **more)

        dist.all_to_all_single = watched
        sharding = ShardingConfig.parse({**KINDS[kind], "exchange": exchange})
        mine = truth.share(global_batches(), rank, 2)
        found[kind] = truth.on_worker(build(), SGD, sharding, mine, tiny.schema())[0], +sent
        dist.all_to_all_single = usual
    return found


@pytest.mark.ranks
def test_vectors_and_gradients_travel_in_half_precision_and_train_alike() -> None:
    for whole, half in zip(run_ranks(2, sent_as, None), run_ranks(2, sent_as, "fp16"), strict=True):
        for kind, (expected, sent) in whole.items():
            found, sent_half = half[kind]
            assert sent.keys() == {torch.float32} and sent_half.keys() == {torch.float16}
            assert sent_half[torch.float16] == sent[torch.float32] > 0, "as many numbers"
            assert found.losses != expected.losses
            np.testing.assert_allclose(found.losses, expected.losses, rtol=LOSS_RTOL, err_msg=kind)
            for name, weight in expected.weights.items():
                if "tower" not in name:  # Adam's
                    np.testing.assert_allclose(found.weights[name], weight, atol=WEIGHT_ATOL, err_msg=name)


def test_without_it_nothing_is_converted() -> None:
    assert [each.qcomm_codecs_registry for each in sharders(None, torch.device("cpu"))] == [None, None]


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        ({"exchange": "bf16"}, "exchange=bf16 is for GPUs"),
        ({"offload": {"usr": "fused_uvm"}}, "sharding.offload: the model has no table 'usr'; did you mean"),
        (
            {"offload": {"user": "fused_uvm_caching"}},
            "of FBGEMM's CUDA kernels; on cpu tables are in the host",
        ),
        ({"offload": {"user": "key_value"}}, "fused_uvm"),
    ],
    ids=str,
)
def test_what_cpus_have_not_is_refused(sharding: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loss = build()
        place(loss, loss.model.table_groups(), ROWWISE, ShardingConfig.parse(sharding), 2)


def test_offloaded_tables_are_planned_for_their_kernel() -> None:
    """Without a GPU as far as a plan goes; FTRL and copies on each GPU have no such kernel."""

    def planned(sharding: dict[str, Any]) -> dict[str, str]:
        loss = build()
        cfg = ShardingConfig.parse(
            {"offload": {"user": "fused_uvm_caching", "item": "fused_uvm"}, **sharding}
        )
        found = place(loss, loss.model.table_groups(), ROWWISE, cfg, 2, "cuda")
        return {table.name: table.kernel for table in found}

    kernels = planned({})
    assert (kernels["user"], kernels["item"]) == ("fused_uvm_caching", "fused_uvm")
    with pytest.raises(ConfigError, match="'user' cannot be sharded data_parallel: a copy on each GPU"):
        planned({"tables": {"user": "data_parallel"}})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
def test_a_table_on_the_host_trains_as_one_on_the_gpu(kernel: str) -> None:
    """A cache of a tenth of the rows: what it holds is written back before weights are read."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = [weights_on_gpu(offload) for offload in ({}, {"user": kernel, "item": kernel})]
    finally:
        dist.destroy_process_group()
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=truth.WEIGHT_ATOL)


def weights_on_gpu(offload: dict[str, str]) -> dict[str, torch.Tensor]:
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    loss, sharding = build(), ShardingConfig.parse({"offload": offload, "cached": 0.1})
    sharded = shard(loss, loss.model.table_groups(), ROWWISE, sharding, truth.SEED, device)
    idle = idle_batch(tiny.schema(), truth.ROWS).to(device)
    batches = (batch.to(device) for batch in global_batches())
    Epoch(sharded.model, sharded.optimizers, idle, Workers()).run(batches, 0)
    local = {name: getattr(value, "local_shards", lambda: [])() for name, value in sharded.weights().items()}
    return {name: shards[0].tensor.cpu() for name, shards in local.items() if shards}
