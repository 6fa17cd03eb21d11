import pytest

from jobs import recipes
from recsys_dist.errors import ConfigError
from recsys_dist.train.settings import TrainConfig


def test_every_recipe_is_valid_and_overridable():
    for name in recipes.RECIPES:
        cfg, out, _ = recipes.parse([name, "seed=3", "--out", "somewhere", "optimizer.deep.lr=0.5"])
        assert (cfg.seed, cfg.optimizer.deep.lr, out) == (3, 0.5, "somewhere")


def test_a_logged_config_is_read_back(tmp_path):
    cfg, _, _ = recipes.parse(["wide_deep", "model.hidden=[7]"])
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
