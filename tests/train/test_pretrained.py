"""Item tables that start from a finished run: where vectors lie, what they are scaled to, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.youtubednn import Config, Model
from recsys_dist.train import pretrained, saving, trainer
from recsys_dist.train.checkpoint import Manifest, load_for_inference
from recsys_dist.train.loop import Loss, Workers
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.sharding import materialise, shard
from tests.train import prepared, tiny
from tests.train.ranks import run_ranks
from tests.train.test_sharding import ADAGRAD, build
from tests.train.truth import SEED, whole

DIM = 8
STD = 0.05  # of YoutubeDNN's tables
VECTORS = torch.randn(tiny.ROWS["item"], DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared.make(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), seed=0)


def make_run(path: Path, seed: int, vocabulary: str = "v") -> Path:
    """A finished run of YoutubeDNN as `jobs.train` leaves it, whose two phases learned other vectors."""
    run_ranks(1, _save_run, str(path), seed, vocabulary)
    return path


def _save_run(_rank: int, path: str, seed: int, vocabulary: str) -> None:
    cfg = Config(output_dim=DIM, embedding_dim=DIM)
    catalogue = Catalogue(torch.ones(tiny.ROWS["item"], dtype=torch.int64))
    for number, phase in enumerate(("choose", "refit")):
        loss = Loss(Model(cfg, Model.inputs(tiny.schema(), cfg), catalogue))
        groups = loss.model.table_groups()
        sharded = shard(loss, groups, OptimizerConfig(), ShardingConfig(), 10 * seed + number)
        manifest = Manifest(
            model=cfg.model_dump(mode="json"),
            data_schema=tiny.schema(),
            vocabulary_digest=vocabulary,
            data_digest="d",
            seed=seed,
            phase=phase,
            epoch=1,
            step=1,
            history=[{}],
        )
        saved = saving.save(Path(path) / phase, sharded, catalogue, manifest, Workers())
    result = {"checkpoint": str(saved.path.relative_to(path)), "chosen_epoch": 1}
    (Path(path) / pretrained.RESULT).write_text(json.dumps(result))


def vectors_of(checkpoint: Path) -> np.ndarray:
    return load_for_inference(checkpoint)[0].item_vectors().detach().numpy()


PLACEMENTS = (
    {"kind": "table_wise"},
    {"kind": "row_wise"},
    {"tables": {"item": "column_wise", "step": "column_wise"}},
    {"tables": {"item": "data_parallel"}},
)


def started(_rank: int) -> list[dict[str, np.ndarray]]:
    found = []
    for placed in PLACEMENTS:
        loss = build()
        sharded = shard(loss, loss.model.table_groups(), ADAGRAD, ShardingConfig.parse(placed), SEED)
        pretrained.start(sharded, tiny.schema(), VECTORS, std=0.5)
        found.append(whole(sharded.weights()))
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 2])
def test_item_tables_start_from_the_vectors_wherever_their_rows_live(world):
    before = {n: w.detach().numpy() for n, w in materialise(build(), SEED).state_dict().items()}
    expected = VECTORS.numpy() * 0.5 / np.sqrt((VECTORS[1:].numpy() ** 2).mean())
    of_items = [name for name in before if ".item.weight" in name or ".step.weight" in name]
    assert len(of_items) == 2
    for found in (weights for theirs in run_ranks(world, started) for weights in theirs):
        for name in of_items:
            np.testing.assert_allclose(found[name][1:], expected[1:], rtol=1e-6)
            np.testing.assert_array_equal(found[name][0], before[name][0])
        for name in before.keys() - of_items:  # users, and linear weights of items, which have 4 columns
            np.testing.assert_array_equal(found[name], before[name], err_msg=name)


def other_dimension(_rank: int) -> str:
    loss = build()
    sharded = shard(loss, loss.model.table_groups(), ADAGRAD, ShardingConfig(), SEED)
    with pytest.raises(ConfigError) as error:
        pretrained.start(sharded, tiny.schema(), VECTORS.repeat(1, 2), std=None)
    return str(error.value)


@pytest.mark.ranks
def test_vectors_of_another_dimension_are_refused():
    [message] = run_ranks(1, other_dimension)
    assert "have dimension 16" in message and "'item' of 8, 'wide_item' of 4, 'step' of 8" in message


def config(data: Path, run: Path, **settings) -> TrainConfig:
    still = {"deep": {"lr": 1e-12}}  # so that a trained table tells what it started from
    model = {"name": "youtubednn", "embedding_dim": DIM, "output_dim": DIM, "negatives": 16}
    values = {"data": str(data), "model": model, "item_vectors": str(run), "optimizer": still}
    return TrainConfig.parse({**values, "batch_rows": 64, "epochs": 1, "num_workers": 2, **settings})


@pytest.mark.ranks
def test_a_run_is_known_by_the_vectors_it_starts_from(data, run, tmp_path):
    def digest(run: Path | None, **settings) -> str:
        cfg = config(data, run or tmp_path, **({} if run else {"item_vectors": None}), **settings)
        return cfg.run_digest("d")

    elsewhere = shutil.copytree(run, tmp_path / "elsewhere")
    again, other = make_run(tmp_path / "again", seed=0), make_run(tmp_path / "other", seed=1)
    assert digest(run) == digest(elsewhere) == digest(again)
    assert len({digest(run), digest(other), digest(None), digest(run, item_vectors_std=0.1)}) == 4
    assert "item_vectors" not in str(config(data, run, item_vectors=None).identity())


@pytest.mark.ranks
def test_runs_without_fitting_vectors_are_refused(data, run, tmp_path):
    with pytest.raises(ConfigError, match=r"is no finished run: it has no result\.json"):
        trainer.fit(config(data, run / "refit"), tmp_path)
    other = make_run(tmp_path / "other", seed=0, vocabulary="w")
    with pytest.raises(ConfigError, match=r"another vocabulary \(w\) than the data in .* \(v\)"):
        config(data, other).check(Prepared.open(data))


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_each_phase_starts_from_the_same_phase_of_the_other_run(data, run, tmp_path):
    result = trainer.fit(config(data, run, num_workers=0), tmp_path)
    for phase in ("choose", "refit"):
        [checkpoint] = result.run.glob(f"{phase}/epoch-0001-*")
        [source] = run.glob(f"{phase}/epoch-0001-*")
        expected = vectors_of(source)
        expected *= STD / np.sqrt((expected[1:] ** 2).mean())
        model, _ = load_for_inference(checkpoint)
        table = model.item_tables.embedding_bags["output_item"].weight.detach().numpy()
        np.testing.assert_allclose(table[1:], expected[1:], rtol=0.03)  # the std of 4,096 rows that are drawn
