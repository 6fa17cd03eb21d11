"""What a configuration means for the data."""

import pytest

from recsys_dist.train.settings import TrainConfig
from tests.batches import small_schema


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
