"""A bundle is whole, is what was exported, or is refused by name."""

from recsys_dist.bundle import Bundle


def test_what_is_opened_is_what_was_written(bundle: Bundle) -> None:
    again = Bundle.open(bundle.path)
    assert again.manifest == bundle.manifest
