"""A bundle answers as it did when it was made, or is refused."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from recsys_dist.bundle import Bundle
from recsys_dist.errors import BundleError
from recsys_dist.serve import golden


def test_what_was_asked_is_answered_again(bundle: Bundle) -> None:
    golden.replay(replace(bundle, golden=golden.ask(bundle)))


def test_other_vectors_are_refused(bundle: Bundle) -> None:
    asked = replace(bundle, golden=golden.ask(bundle))
    other = replace(asked.index, vectors=np.roll(bundle.item_vectors, 1, axis=0))
    with pytest.raises(BundleError, match=r"golden answer|as when it was made"):
        golden.replay(replace(asked, index=other))


def test_another_score_is_refused(bundle: Bundle) -> None:
    cases = copy.deepcopy(golden.ask(bundle))
    cases[0]["answer"][0]["probability"] += 0.01
    with pytest.raises(BundleError, match=r"0\.01 off its golden answer"):
        golden.replay(replace(bundle, golden=cases))


def test_no_golden_requests_are_refused(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="no golden requests"):
        golden.replay(replace(bundle, golden=[]))
