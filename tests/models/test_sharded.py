"""Every model, with every loss, sharded over workers scores and learns as it does in one process."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torchrec import EmbeddingCollection

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.models.protocol import model_module, model_names
from recsys_dist.schema import Schema
from recsys_dist.train.loop import Loss
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.placement import ShardingConfig
from tests.batches import random_batch, small_catalogue, small_schema
from tests.train import truth
from tests.train.ranks import run_ranks

# The last has no tables for sequences. Column-wise: test_one_truth, for a lookup is alike in all models.
KINDS = ("table_wise", "row_wise", "data_parallel")
ROWWISE = OptimizerConfig.parse({"deep": {"lr": 0.05}, "wide": {"lr": 0.05}, "dense": {"lr": 0.003}})
FTRL = {"rule": "ftrl", "lr": 0.1, "beta": 0.01, "l1": 0.02}
OPTIMIZERS = {
    "rowwise": ROWWISE,
    "ftrl": OptimizerConfig.parse({**ROWWISE.model_dump(), "wide": FTRL}),
    "decay": ROWWISE.override(["deep.weight_decay=0.01", "wide.weight_decay=0.01"]),
    "sgd": ROWWISE.override(["deep.rule=sgd"]),
}

# As in truth.py, of more layers: where a gradient is small its rounding is part of a step, so that a weight
# may be off by a sixth of one, Adam's 3e-3 (measured: 1.4e-4). What depends on such weights is not.
WEIGHT_ATOL = 5e-4
SCORE_ATOL = 2e-4


# what is looked up by single ids, which regularisation needs: searches are known by their words' mean alone
SINGLE = ("user", "item", "author", "hour", "watched", "watched_authors", "age", "duration")


@dataclass(frozen=True)
class Case:
    """A model with these settings; `world` workers of it are compared with one."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "rowwise"
    world: int = 2
    kinds: tuple[str, ...] = KINDS

    def __str__(self) -> str:
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        return " ".join([self.name, self.optimizer, *settings, f"{self.world} workers"])


def loss_of(name: str, **settings: Any) -> Case:
    """A loss that is not its model's usual one, on three workers and the tables that all of them hold."""
    return Case(name, settings, world=3, kinds=("row_wise",))


CASES = [
    *map(Case, model_names(counted=False)),
    Case("wide_deep", optimizer="ftrl"),
    Case("wide_deep", optimizer="decay"),
    # its history is regularised, its negatives not; Adagrad would hide how large a gradient is
    Case("dien", {"regularisation": 5.0, "embedding_std": 0.5, "features": SINGLE}, "sgd"),
    loss_of("mlp", objective={"positive_weight": 3.0}),
    loss_of("mlp", objective={"loss": "focal", "positive_weight": 2.0}, norm="batch"),
    loss_of("mlp", objective={"tasks": {"like": 0.5, "watch_ms": 0.1}}),
    loss_of("youtubednn_ranking", count_all=True, objective={"tasks": {"like": 0.5}}),
    loss_of("youtubednn", negatives=32),
    loss_of("youtubednn", loss="bpr", negatives=32),
    loss_of("youtubednn", loss="gbce", negatives=32),
    loss_of("youtubednn", shared=True, hidden=None, features=("watched",), negatives=32),
    loss_of("youtubednn", shared=True, negatives=32),
    loss_of("two_tower", negatives=32, negatives_alpha=0.5, mask_history=True),
    loss_of("two_tower", negatives=0),
    loss_of("sasrec", loss="softmax"),
    loss_of("sasrec", loss="gbce", negatives=32),
]


def config(case: Case) -> Any:
    """With smooth activations: at a kink rounding decides which way a gradient goes."""
    fields = model_module(case.name).Config.model_fields
    smooth = {"activation": "gelu"} if "activation" in fields else {}
    return model_module(case.name).Config.parse({**smooth, **case.settings})


def inputs(case: Case) -> Schema:
    return model_module(case.name).Model.inputs(small_schema(), config(case))


def build(case: Case) -> Loss:
    torch.manual_seed(truth.SEED)
    return Loss(model_module(case.name).Model(config(case), inputs(case), small_catalogue()))


def kinds(case: Case) -> tuple[str, ...]:
    sequences = any(isinstance(module, EmbeddingCollection) for module in build(case).modules())
    return tuple(kind for kind in case.kinds if not (sequences and kind == "data_parallel"))


def global_batches(case: Case) -> list[Batch]:
    schema = inputs(case)
    batches = (
        random_batch(schema, truth.rows_of_step(step), rng_for(step, "workers"))
        for step in range(truth.STEPS)
    )
    return truth.hardened(batches, schema)


def outputs(model: Any, probe: Batch) -> list[np.ndarray]:
    """Scores of `probe`, and item vectors."""
    scores = model.eval()(probe).detach().numpy()
    return [scores, *([model.item_vectors().detach().numpy()] if model.task == "recall" else [])]


def on_rank(rank: int, case: Case) -> dict[str, tuple[truth.Outcome, list[np.ndarray]]]:
    found, batches = {}, global_batches(case)
    for kind in kinds(case):
        mine = truth.share(batches, rank, case.world)
        outcome, sharded = truth.on_worker(
            build(case), OPTIMIZERS[case.optimizer], ShardingConfig(kind=kind), mine, inputs(case)
        )
        found[kind] = outcome, outputs(sharded.inner(), batches[0])
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES, ids=str)
def test_workers_learn_what_one_process_learns(case: Case) -> None:
    loss, batches = build(case), global_batches(case)
    truth.start(loss)
    before = outputs(loss.model, batches[0])
    expected = truth.unsharded(loss, OPTIMIZERS[case.optimizer], batches, inputs(case))
    after = outputs(loss.model, batches[0])
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(after, before, strict=True))  # it did learn
    for rank, found in enumerate(run_ranks(case.world, on_rank, case)):
        for kind, (outcome, scored) in found.items():
            truth.assert_same(outcome, expected, f"{case}, {kind}, rank {rank} of {case.world}", WEIGHT_ATOL)
            for mine, theirs in zip(scored, after, strict=True):
                np.testing.assert_allclose(mine, theirs, atol=SCORE_ATOL, err_msg=f"{case} {kind}")
