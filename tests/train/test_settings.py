"""What a configuration means for the data."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_dist.data.prepared import Manifest, Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.train.phase import best_epoch
from recsys_dist.train.settings import TrainConfig
from tests.batches import small_schema
from tests.train import prepared


def test_models_learn_from_examples_or_from_every_position_of_sequences() -> None:
    splits = {
        name: TrainConfig.parse({"data": "d", "model": {"name": name}}).training_splits(
            small_schema().select(["user", "item", "author", "watched"])
        )
        for name in ("wide_deep", "youtubednn", "sasrec")
    }
    assert splits == {
        "wide_deep": {"choose": ("ranking/train",), "refit": ("ranking/train", "ranking/valid")},
        "youtubednn": {"choose": ("recall/train",), "refit": ("recall/train", "recall/valid")},
        "sasrec": {"choose": ("sequences/watched/choose",), "refit": ("sequences/watched/refit",)},
    }


def test_fewer_workers_keep_the_batch_or_their_parts_of_it() -> None:
    def config(kept: str) -> TrainConfig:
        values = {"data": "d", "model": {"name": "mlp"}, "batch_rows": 100, "elastic_batch": kept}
        return TrainConfig.parse({**values, "num_workers": [1, 3]})

    whole, parts = config("global"), config("per_worker")
    assert [whole.parts(n) for n in (1, 2, 3)] == [[100], [50, 50], [34, 33, 33]]
    assert [whole.resized_rate(n) for n in (1, 2, 3)] == [1, 1, 1]
    assert [parts.parts(n) for n in (1, 2, 3)] == [[33], [33, 33], [34, 33, 33]]
    assert [parts.resized_rate(n) for n in (1, 2, 3)] == pytest.approx([0.33**0.5, 0.66**0.5, 1])
    assert (parts.fewest_workers, parts.most_workers, parts.workers_in_words) == (1, 3, "1 to 3 workers")


@pytest.mark.parametrize(
    ("model", "split"),
    [
        ("mlp", "ranking/train"),
        ("mlp", "ranking/valid"),
        ("youtubednn", "recall/train"),
        ("youtubednn", "users/valid"),
        ("sasrec", "sequences/history/choose"),
    ],
)
def test_a_split_without_rows_is_refused_before_anything_starts(
    model: str, split: str, tmp_path: Path
) -> None:
    whole = Prepared.open(prepared.make(tmp_path))
    empty = {**whole.manifest.model_dump()["splits"], split: {"files": [], "rows": []}}
    data = Prepared(whole.path, Manifest.parse({**whole.manifest.model_dump(), "splits": empty}))
    cfg = TrainConfig.parse({"data": str(tmp_path), "model": {"name": model}})
    cfg.check(whole)
    with pytest.raises(ConfigError, match=f"'{split}' of .* has no rows.*prepare with another valid_from"):
        cfg.check(data)


def test_an_epoch_is_not_chosen_by_a_metric_that_has_no_value(tmp_path: Path) -> None:
    data = Prepared.open(prepared.make(tmp_path))
    values = {"data": str(tmp_path), "model": {"name": "mlp"}}
    TrainConfig.parse(values).check(data)
    assert data.extremes("ranking/valid", "click") == (0, 1)
    for file in data.files("ranking/valid"):
        table = pq.read_table(file, partitioning=None)
        at = table.column_names.index("click")
        pq.write_table(table.set_column(at, "click", pa.array([1.0] * len(table), pa.float32())), file)
    with pytest.raises(ConfigError, match=r"'click' is 1 in all 201 validation rows.*metric=logloss"):
        TrainConfig.parse(values).check(data)
    TrainConfig.parse({**values, "metric": "logloss"}).check(data)
    amounts = TrainConfig.parse({**values, "model": {"name": "youtubednn_ranking"}})
    with pytest.raises(ConfigError, match=r"youtubednn_ranking: metric=logloss is of probabilities"):
        amounts.override(["metric=logloss"]).check(data)
    assert best_epoch([{"gauc": None}, {"gauc": 0.5}, {"gauc": 0.6}], "gauc") == 3
    with pytest.raises(ConfigError, match="gauc has no value on the validation rows"):
        best_epoch([{"gauc": None}, {"gauc": None}], "gauc")
