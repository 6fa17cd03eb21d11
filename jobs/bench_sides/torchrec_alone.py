"""A training loop as TorchRec's own users write it, without Ray and without any module of ours.

  python -m jobs.bench_sides.torchrec_alone RANK WORLD PORT STEPS BATCHES.pt

Whole tables on workers by TorchRec's planner, row-wise Adagrad in the backward pass, Adam for an MLP of one
hidden layer, batches in memory. Each line on stdin has it take STEPS steps, through the batches again and
again; it answers with a JSON line, [wall seconds, CPU seconds of this process].

BATCHES.pt has {"tables": {feature: rows}, "dim", "hidden", "batches"}, each batch {"values", "lengths",
"dense", "label"}.
"""

import itertools
import json
import logging
import os
import sys
import time
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter


class Model(nn.Module):
    """Embeddings and floats side by side into an MLP."""

    def __init__(self, tables: dict[str, int], dim: int, floats: int, hidden: int) -> None:
        super().__init__()
        self.embeddings = EmbeddingBagCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingBagConfig(
                    name=f"of_{name}", num_embeddings=rows, embedding_dim=dim, feature_names=[name]
                )
                for name, rows in tables.items()
            ],
        )
        self.mlp = nn.Sequential(
            nn.Linear(len(tables) * dim + floats, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, dense: torch.Tensor, sparse: KeyedJaggedTensor) -> torch.Tensor:
        """[B] logits."""
        return self.mlp(torch.cat([self.embeddings(sparse).values(), dense], dim=1)).squeeze(1)


def main(rank: int, world: int, port: int, steps: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the planner prints
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    given = torch.load(file)
    batches = [
        (
            one["dense"],
            KeyedJaggedTensor(keys=list(given["tables"]), values=one["values"], lengths=one["lengths"]),
            one["label"],
        )
        for one in given["batches"]
    ]
    model, optimizer = sharded(Model(given["tables"], given["dim"], batches[0][0].shape[1], given["hidden"]))
    criterion = nn.BCEWithLogitsLoss()
    for _ in sys.stdin:
        began, cpu_began = time.perf_counter(), time.process_time()
        for dense, sparse, label in itertools.islice(itertools.cycle(batches), steps):
            optimizer.zero_grad()
            torch.autograd.backward(criterion(model(dense, sparse), label))
            optimizer.step()
        print(
            json.dumps([time.perf_counter() - began, time.process_time() - cpu_began]),
            file=answers,
            flush=True,
        )


def sharded(model: Model) -> tuple[nn.Module, CombinedOptimizer]:
    apply_optimizer_in_backward(RowWiseAdagrad, model.embeddings.parameters(), {"lr": 0.05})
    device, sharder = torch.device("cpu"), EmbeddingBagCollectionSharder()
    whole = {
        table.name: ParameterConstraints(sharding_types=["table_wise"])
        for table in model.embeddings.embedding_bag_configs()
    }
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"), constraints=whole
    )
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    parallel = DistributedModelParallel(model, device=device, plan=plan, sharders=[sharder])
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(parallel.named_parameters())),
        lambda weights: torch.optim.Adam(weights, lr=1e-3, fused=True),
    )
    return parallel, CombinedOptimizer([parallel.fused_optimizer, dense])


if __name__ == "__main__":
    rank, world, port, steps = map(int, sys.argv[1:5])
    main(rank, world, port, steps, sys.argv[5])
