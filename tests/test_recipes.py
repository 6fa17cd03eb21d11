import pytest

from jobs import recipes
from recsys_dist.errors import ConfigError
from recsys_dist.train.settings import TrainConfig


def test_every_recipe_is_valid_and_overridable():
    for name in recipes.RECIPES:
        cfg, out, *_ = recipes.parse([name, "seed=3", "--out", "somewhere", "optimizer.deep.lr=0.5"])
        assert (cfg.seed, cfg.optimizer.deep.lr, out) == (3, 0.5, "somewhere")


def test_a_logged_config_is_read_back(tmp_path):
    cfg, *_ = recipes.parse(["wide_deep", "model.hidden=[7]"])
    assert not cfg.profile
    assert recipes.parse(["wide_deep", "model.hidden=[7]", "--profile"])[0] == cfg.override(["profile=true"])
    (tmp_path / "config.yaml").write_text(cfg.to_yaml())
    assert recipes.parse(["--config", str(tmp_path / "config.yaml")])[0] == cfg
    assert recipes.parse(["seed=9", "--config", str(tmp_path / "config.yaml")])[0].seed == 9


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["wide_dep"], "did you mean 'wide_deep'"),
        ([], "name one recipe"),
        (["wide_deep", "epoch=3"], "did you mean 'epochs'"),
        (["wide_deep", "optimizer.deep.lrr=3"], "did you mean 'lr'"),
        (["wide_deep", "epochs=0"], "'epochs'.*greater than or equal to 1"),
        (["wide_deep", "youtubednn"], "name one recipe"),
    ],
)
def test_mistakes_are_explained(argv, message):
    with pytest.raises(ConfigError, match=message):
        recipes.parse(argv)


def test_help_names_recipes_and_settings(capsys):
    with pytest.raises(SystemExit):
        recipes.parse(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in (*recipes.RECIPES, *TrainConfig.model_fields))


TOWER = """
from recsys_dist.models import mlp

class Config(mlp.Config):
    name: str = "my_models.tower:Model"
    extra: int = 3

class Model(mlp.Model):
    pass
"""


def test_a_model_of_ones_own_is_a_file_anywhere(tmp_path, monkeypatch):
    (tmp_path / "my_models").mkdir()
    (tmp_path / "my_models/tower.py").write_text(TOWER)
    (tmp_path / "my_models/empty.py").write_text("")
    (tmp_path / "my_models/nameless.py").write_text("from recsys_dist.models.mlp import Config, Model")
    monkeypatch.syspath_prepend(tmp_path)
    cfg, *_ = recipes.parse(["--model", "my_models.tower:Model", "model.extra=5", "model.hidden=[8]"])
    assert (cfg.model.extra, cfg.model.hidden, cfg.task) == (5, (8,), "ranking")
    assert TrainConfig.parse(cfg.model_dump(mode="json")) == cfg, "as workers and the bundle read it"
    for name, message in (
        ("my_models.towr:Model", "No module named 'my_models.towr'"),
        ("my_models.empty:Model", "has no Config"),
        ("my_models.nameless:Model", 'must say .*: `name: str = "my_models.nameless:Model"`'),
        ("my_models.tower:Tower", "name it as …:Model"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipes.parse(["--model", name])
