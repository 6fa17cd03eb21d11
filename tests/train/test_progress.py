"""What the driver reads of a file that workers write, cut and write again."""

import json
import threading

from recsys_dist.train import trainer
from recsys_dist.train.loop import Totals
from recsys_dist.train.progress import PROGRESS, Place, Progress, read


def test_each_line_is_read_once_when_it_is_whole_and_again_from_a_file_that_was_cut(tmp_path):
    file, place = tmp_path / "progress.jsonl", Place()

    def follow() -> list[int]:
        nonlocal place
        found = list(read(file, place))
        place = found[-1][1] if found else place
        return [line["step"] for line, _ in found]

    def text(*steps: int) -> str:
        return "".join(json.dumps({"step": step}) + "\n" for step in steps)

    assert follow() == []
    file.write_text(text(1, 2) + '{"st')
    assert follow() == [1, 2]
    with file.open("a") as stream:
        stream.write('ep": 3}\n')
    assert follow() == [3] and follow() == []
    cut = tmp_path / "cut"
    cut.write_text(text(1, 20) + text(30, 40))  # as a restarted run: it already has more bytes again
    cut.replace(file)
    assert follow() == [1, 20, 30, 40] and follow() == []


def test_what_a_full_disk_cut_short_takes_nothing_with_it(tmp_path):
    progress = Progress(tmp_path, 0, lambda: True, profile=False)
    progress.notice("choose", "first", [])
    with (tmp_path / PROGRESS).open("a") as stream:
        stream.write('{"kind": "cur')
    progress.notice("choose", "second", [])
    progress.resume("refit", 0, 0)
    progress.notice("refit", "third", [])
    assert [line["what"] for line, _ in read(tmp_path / PROGRESS)] == ["first", "second", "third"]


def test_an_epoch_tells_of_its_first_step_at_once_and_then_fifty_times(tmp_path):
    progress, totals = Progress(tmp_path, 0, lambda: True, profile=False), Totals()
    on_step = progress.curve("choose", 1, 1, 0, 100_000, totals)
    for _ in range(1000):
        totals.steps, totals.rows = totals.steps + 1, totals.rows + 100
        totals.weight, totals.loss_sum = totals.weight + 100, totals.loss_sum + 100 * 0.5
        on_step(totals)
    told = [line for line, _ in read(tmp_path / PROGRESS)]
    assert [line["step"] for line in told] == [1, *range(21, 1000, 20), 1000]
    assert {line["loss"] for line in told} == {0.5}


def test_a_notice_is_told_once_though_the_phase_that_goes_on_writes_the_file_anew(tmp_path):
    progress, told, done = Progress(tmp_path, 0, lambda: True, profile=False), [], threading.Event()

    def on_report(line) -> None:
        told.append(line["what"])
        progress.resume("choose", 0, 0)
        done.set()

    progress.notice("choose", "rollback 1", ["step 23 is not finite"])
    trainer._follow(tmp_path / PROGRESS, on_report, done)
    assert told == ["rollback 1"]
