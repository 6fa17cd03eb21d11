import json
import math
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from jobs import recipes, tune
from recsys_dist.data.prepared import Manifest, Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import COUNTED
from recsys_dist.train.settings import TrainConfig
from recsys_dist.tune.space import Space, Told, settings
from tests.train import prepared

SPACE = {
    "model.hidden": {"choice": [[16], [32, 16]]},
    "optimizer.deep.lr": {"log": ["1e-3", 1]},  # as YAML reads 1e-3
    "model.dropout": {"uniform": [0, 0.5]},
    "model.negatives_seed": {"int": [1, 9]},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Prepared:
    return Prepared.open(prepared.make(tmp_path_factory.mktemp("prepared")))


def base(data: Prepared, **model) -> TrainConfig:
    named = {"name": "youtubednn", "hidden": [16], **model}
    return TrainConfig.parse({"data": str(data.path), "model": named, "batch_rows": 64})


def test_proposals_lie_in_the_space_and_follow_from_seed_and_trials(data):
    space = Space.parse(SPACE, base(data), data)

    def proposals(seed: int) -> list[dict]:
        told: list[Told] = []
        for number in range(14):  # beyond TPE's ten random ones
            values = space.propose(told, True, {}, seed)
            told.append(Told(values, 0, float(number), last=True))
        return [one.values for one in told]

    drawn = proposals(0)
    for values in drawn:
        assert values["model.hidden"] in ([16], [32, 16])
        assert 1e-3 <= values["optimizer.deep.lr"] <= 1 and 0 <= values["model.dropout"] <= 0.5
        assert type(values["model.negatives_seed"]) is int and 1 <= values["model.negatives_seed"] <= 9
        cfg = settings(base(data), values)
        assert (cfg.model.dropout, cfg.optimizer.deep.lr) == (
            values["model.dropout"],
            values["optimizer.deep.lr"],
        )
    assert json.loads(json.dumps(drawn)) == drawn, "the ledger keeps them as they are"
    assert proposals(0) == drawn and proposals(1) != drawn
    assert len({json.dumps(values) for values in drawn}) == len(drawn)


def test_the_search_learns(data):
    """Best in the middle of three decades, where uniform draws lie 0.75 decades away on average."""
    space = Space.parse({"optimizer.deep.lr": {"log": [1e-3, 1]}}, base(data), data)
    told: list[Told] = []
    for _ in range(40):
        values = space.propose(told, True, {}, 3)
        decades = abs(math.log10(values["optimizer.deep.lr"]) + 1.5)
        told.append(Told(values, 0, -decades, last=False))
    assert np.mean([-one.value for one in told[20:]]) < 0.5


def test_the_first_trial_is_the_recipe_where_the_space_holds_it(data):
    cfg = base(data, hidden=[32, 16], dropout=0.25)
    space = Space.parse({**SPACE, "batch_rows": {"choice": [32, 128]}}, cfg, data)
    own = space.values_of(cfg)
    assert own == {"model.hidden": [32, 16], "optimizer.deep.lr": 0.05, "model.dropout": 0.25}
    first = space.propose([], True, own, 0)
    assert {key: first[key] for key in own} == own and first["batch_rows"] in (32, 128)


def test_importance_tells_what_decides(data):
    space = Space.parse({key: SPACE[key] for key in list(SPACE)[1:3]}, base(data), data)
    told = []
    for _ in range(20):
        values = space.propose(told, False, {}, 0)
        told.append(Told(values, 0, values["model.dropout"] ** 2, last=True))
    found = space.importance(told, False)
    assert list(found) == ["model.dropout", "optimizer.deep.lr"] and sum(found.values()) == pytest.approx(1)
    assert found["model.dropout"] > 0.7
    assert space.importance(told[:3], False) == {}, "too few to tell"


@pytest.mark.parametrize("recipe", [name for name in recipes.RECIPES if name not in COUNTED])
def test_every_recipe_has_a_space(recipe, data):
    values = (
        data.manifest.model_dump()
    )  # a model may expect an amount or sessions, which this log has none of
    values["fitted_schema"]["labels"] += ({"name": "watch_ms", "kind": "value"},)
    values["fitted_schema"]["features"] += ({"name": "sessions", "kind": "sessions", "max_length": 4},)
    data = Prepared(data.path, Manifest.parse(values))
    cfg = recipes.named(recipe, {"data": str(data.path)})
    space = Space.parse(recipes.SPACES[cfg.model.name], cfg, data)
    assert space.values_of(cfg).keys() == recipes.SPACES[cfg.model.name].keys(), (
        "the recipe is the first trial"
    )


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({}, "search space is empty"),
        ({"model.hiden": {"choice": [[1]]}}, r"model.hiden = \[1\].*did you mean 'hidden'"),
        ({"optimiser.deep.lr": {"log": [1, 2]}}, "no setting 'optimiser'; did you mean 'optimizer'"),
        ({"model.dropout": {"unifrom": [0, 1]}}, "no such range 'unifrom'; did you mean 'uniform'"),
        ({"model.dropout": {"uniform": [0, 1]}}, r"model.dropout = 1: .*less than 1"),
        ({"model.dropout": {"uniform": [0.5, 0.1]}}, "needs lowest < highest"),
        ({"optimizer.deep.lr": {"log": [0, 1]}}, "needs 0 < lowest < highest"),
        ({"optimizer.deep.lr": {"log": [0.01, float("inf")]}}, r"needs 0 < lowest < highest < \.inf"),
        ({"model.dropout": {"choice": [date(2022, 5, 1)]}}, "a choice is text, a number"),
        ({"model.negatives": {"int": [1, 2.5]}}, "int takes .* whole numbers"),
        ({"model.output_dim": {"int": [8, 64]}}, r"model.output_dim = 9: .*multiple of 4"),
        ({"model.dropout": 0.5}, r"expected one of \{choice"),
        ({"model.dropout": {"choice": 0.5}}, "choice takes a list, given: 0.5"),
        ({"epochs": {"choice": []}}, "choice takes a list"),
        *(
            ({key: {"choice": [value]}}, f"{key}: it is alike in all trials.*take it out")
            for key, value in {
                "data": "d",
                "newest_fraction": 0.5,
                "refit": True,
                "checkpoints": "c",
                "metric": "recall@10",
                "label": None,
            }.items()
        ),
        ({"batch_rows": {"choice": [64, 1]}}, r"batch_rows=1 are fewer than the workers \(num_workers=2\)"),
    ],
)
def test_mistakes_are_explained_before_anything_starts(declared, message, data):
    with pytest.raises(ConfigError, match=message):
        Space.parse(declared, base(data).override(["num_workers=2"]), data)


def test_a_yaml_space_reads_as_documented(data, tmp_path: Path):
    (tmp_path / "space.yaml").write_text(
        "optimizer.deep.lr: {log: [1e-3, 0.1]}\nmodel.negatives: {int: [64, 2048]}\n"
    )
    cfg, _ = tune.parse(["youtubednn", f"data={data.path}", "--space", str(tmp_path / "space.yaml")])
    assert [axis.of for axis in Space.parse(cfg.space, cfg.train, data).axes] == [(1e-3, 0.1), (64, 2048)]


def test_choices_are_what_the_settings_make_of_them(data):
    """YAML reads `1e-3` as text."""
    cfg = base(data).override(["optimizer.deep.lr=0.001"])
    space = Space.parse({"optimizer.deep.lr": {"choice": ["1e-3", "1e-2", 0.1]}}, cfg, data)
    assert space.axes[0].of == (0.001, 0.01, 0.1) and space.values_of(cfg) == {"optimizer.deep.lr": 0.001}


def test_what_the_recipe_has_no_value_of_is_no_part_of_its_trial(data):
    space = Space.parse({"sharding.ids.item": {"uniform": [1.0, 2.0]}}, base(data), data)
    assert space.values_of(base(data)) == {}


def test_values_reach_the_settings_as_they_are(data):
    assert settings(base(data), {"data": "runs/\N{GRINNING FACE}"}).data == "runs/\N{GRINNING FACE}"
