"""Point in time: what a user had done strictly before each event. Events sorted by (user, timestamp, item).

n events. Events of one user with equal timestamps do not see each other.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.data import transforms
from recsys_dist.feature_kinds import ListFeature, Searches

_HAS_A_WORD = r"[\p{L}\p{N}]"


@dataclass(frozen=True)
class Timeline:
    """Where each event's past lies among the sorted events: positions `start[i] .. before[i] - 1`."""

    start: np.ndarray  # [n] int64, first event of the same user
    before: np.ndarray  # [n] int64, first event of the same user and timestamp

    @classmethod
    def of(cls, user: np.ndarray, timestamp_us: np.ndarray) -> "Timeline":
        """From the sorted columns: user codes [n] and timestamps [n]."""
        new_user = np.r_[True, user[1:] != user[:-1]][: len(user)]
        new_moment = new_user | np.r_[True, timestamp_us[1:] != timestamp_us[:-1]][: len(user)]
        return cls(_last_true(new_user), _last_true(new_moment))

    def last(self, wanted: np.ndarray, length: int, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The last `length` wanted events in the past of the events at positions `of` [m], oldest first.

        Returns (offsets [m + 1], positions [offsets[-1]]): the past of event `of[i]` is
        `positions[offsets[i]:offsets[i + 1]]`, indices into the sorted events.
        """
        total = np.r_[0, np.cumsum(wanted)]
        stop = total[self.before[of]]
        first = np.maximum(total[self.start[of]], stop - length)
        return _ranges(np.flatnonzero(wanted), first, stop)


def listed(events: pa.Table, feature: ListFeature, user: np.ndarray, real: np.ndarray) -> np.ndarray:
    """[n] bool: the events that a list of past ones tells of, of those that are `real` [n].

    With the feature's label; of searches, the first event of each. `user` [n] codes, equal ones adjacent.
    """
    if not isinstance(feature, Searches):
        return real if feature.where is None else real & (transforms.floats(events[feature.where]) > 0)
    text = pc.utf8_lower(pc.utf8_trim_whitespace(events[feature.column].combine_chunks().cast(pa.string())))
    given = np.asarray(pc.fill_null(pc.match_substring_regex(text, _HAS_A_WORD), False))
    at = np.flatnonzero(given & real)
    code = np.asarray(text.take(pa.array(at)).dictionary_encode().indices)
    begins = np.r_[True, (code[1:] != code[:-1]) | (user[at][1:] != user[at][:-1])][: len(at)]
    wanted = np.zeros(len(events), bool)
    wanted[at[begins]] = True
    return wanted


def chunk_ends(user: np.ndarray, wanted: np.ndarray, length: int) -> np.ndarray:
    """Positions of each user's last wanted event, of every `length`-th before it, and of her first one.

    The last `length` wanted events before each, and itself, are each the item after a known past; over
    all ends that is every wanted event once. `user` [n] codes, equal ones adjacent.
    """
    at = np.flatnonzero(wanted)
    new_user = np.r_[True, user[at][1:] != user[at][:-1]][: len(at)]
    last = np.flatnonzero(np.r_[new_user[1:], True]) if len(at) else at
    left = np.repeat(last, np.diff(np.r_[-1, last])) - np.arange(len(at))
    return at[new_user | (left % length == 0)]


def _last_true(flags: np.ndarray) -> np.ndarray:
    return np.maximum.accumulate(np.where(flags, np.arange(len(flags)), 0))


def _ranges(values: np.ndarray, first: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate `values[first[i]:stop[i]]` for all i, without a loop."""
    lengths = stop - first
    offsets = np.r_[0, np.cumsum(lengths)]
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return offsets, values[np.repeat(first, lengths) + within]
