from pathlib import Path

from recsys_dist.train.fence import Fence, take_over


def test_the_newest_group_of_the_newest_start_holds_the_run(tmp_path: Path) -> None:
    start = take_over(tmp_path)
    first = Fence(tmp_path, start)
    assert not first.holds(), "not yet"
    assert first.take() and first.holds()
    second = Fence(tmp_path, start)  # Ray Train started the workers again
    assert second.take() and second.holds() and not first.holds()
    late = Fence(tmp_path, start)  # starts only when its driver is dead and the run goes on elsewhere
    third = Fence(tmp_path, take_over(tmp_path))
    assert not second.holds() and not late.take()
    assert third.take() and not late.take() and third.holds()
