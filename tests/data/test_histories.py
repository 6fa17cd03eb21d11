"""Each event's past against a loop over all events."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recsys_dist.data.histories import Timeline, chunk_ends

EVENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=30)


@given(EVENTS, st.integers(1, 4), st.randoms())
def test_pasts_are_what_a_loop_finds(events: list[tuple[int, int, bool]], length: int, chance) -> None:  # type: ignore[no-untyped-def]
    events = sorted(events)
    user, time = (np.array([e[k] for e in events], np.int64) for k in (0, 1))
    wanted = np.array([e[2] for e in events], bool)
    timeline = Timeline.of(user, time)
    past = [
        [i for i, (u, t, _) in enumerate(events) if u == user[n] and t < time[n]] for n in range(len(events))
    ]
    of = np.array([n for n in range(len(events)) if chance.random() < 0.7], np.int64)
    offsets, at = timeline.last(wanted, length, of)
    lists = [at[offsets[k] : offsets[k + 1]].tolist() for k in range(len(of))]
    assert lists == [[i for i in past[n] if wanted[i]][-length:] for n in of]


def test_equal_times_do_not_see_each_other() -> None:
    timeline = Timeline.of(np.array([0, 0, 0, 1]), np.array([5, 5, 6, 6]))
    offsets, _ = timeline.last(np.ones(4, bool), 9, np.arange(4))
    assert np.diff(offsets).tolist() == [0, 0, 2, 0]


@given(EVENTS, st.integers(1, 4))
def test_chunks_hold_every_wanted_event_as_a_target_once(
    events: list[tuple[int, int, bool]], length: int
) -> None:
    user = np.array(sorted(e[0] for e in events), np.int64)
    wanted = np.array([e[2] for e in events], bool)
    ends = chunk_ends(user, wanted, length)
    covered: list[int] = []
    for end in ends:
        past = [i for i in range(end) if user[i] == user[end] and wanted[i]][-length:]
        covered += [*past[1:], end]
    assert sorted(covered) == np.flatnonzero(wanted).tolist()
