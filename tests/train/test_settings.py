"""What a configuration means for the data."""

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
