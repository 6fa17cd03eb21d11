"""Successive halving by numbers that can be worked out by hand."""

import json

import numpy as np
import pytest

from recsys_dist.config import rng_for
from recsys_dist.tune.ledger import Job, Ledger, Plan, Result, next_check, next_job
from recsys_dist.tune.summary import best, compute, reached, rows

PLAN = Plan(trials=20, rungs=(1 / 16, 1 / 4, 1.0), keep=4, maximise=True)
FULL_ROWS = 1600


def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "trials.jsonl")


def finish(book: Ledger, job: Job, value: float | None, plan: Plan = PLAN, **more) -> None:
    book.finish(Result(job, value, round(plan.rungs[job.rung] * FULL_ROWS), 1.0, **more))


def play(book: Ledger, plan: Plan, value_of, workers: int = 2, at_most: int = 10_000) -> list[Job]:
    """Run the sweep with instant training; jobs end in the order in which they began."""
    running: list[Job] = []
    done: list[Job] = []
    while len(done) < at_most:
        job = next_job(book, plan, set(running)) if len(running) < workers else None
        if job is None:
            if not running:
                return done
            ended = running.pop(0)
            finish(book, ended, value_of(ended), plan)
            done.append(ended)
            continue
        if job.trial == len(book.trials):
            book.start({"n": job.trial})
        running.append(job)
    return done


@pytest.mark.parametrize("workers", [1, 2, 5, 20])
@pytest.mark.parametrize("order", ["rising", "falling", "shuffled"])
def test_twenty_trials_cost_no_more_than_a_quarter_however_they_come(tmp_path, workers, order):
    quality = {"rising": np.arange(20), "falling": -np.arange(20), "shuffled": rng_for(0).permutation(20)}[
        order
    ]
    book = ledger(tmp_path)
    jobs = play(book, PLAN, lambda job: float(quality[job.trial]) + job.rung, workers)
    assert [sum(job.rung == rung for job in jobs) for rung in range(3)] == [20, 5, 2]
    spent = compute(book, PLAN)
    assert spent["swept_rows"] == 20 * 100 + 5 * 400 + 2 * 1600
    assert spent["all_in_full_rows"] == 20 * 1600
    assert spent["share"] == pytest.approx(0.225)
    assert best(book, PLAN).job.trial == max(book.on_rung(2), key=lambda trial: quality[trial])


def test_slots_open_as_results_come_in(tmp_path):
    """The first goes straight up; of eight results a second may, of twelve a third: the best left."""
    jobs = play(ledger(tmp_path), PLAN, lambda job: job.trial % 10, workers=1)
    assert jobs[:4] == [Job(0, 0), Job(0, 1), Job(0, 2), Job(1, 0)]
    assert [(jobs[i - 1], job) for i, job in enumerate(jobs) if job.rung == 1][1:] == [
        (Job(7, 0), Job(7, 1)),
        (Job(11, 0), Job(9, 1)),
        (Job(15, 0), Job(8, 1)),
        (Job(19, 0), Job(19, 1)),
    ]
    assert jobs[-1] == Job(9, 2), "the best of a full rung"


def test_the_best_trial_wins_where_rungs_agree_and_the_first_is_measured_beside_it(tmp_path):
    book = ledger(tmp_path)
    play(book, PLAN, lambda job: -abs(job.trial - 13.2), workers=2)
    assert best(book, PLAN).job == Job(13, 2)
    ranked = [row["trial"] for row in rows(book, PLAN)]
    assert ranked[:2] == [13, 0] and len(ranked) == 20


def test_what_is_found_is_never_worse_than_what_was_given(tmp_path):
    """Small parts mislead: all others look better there, and are worse on all rows."""
    book = ledger(tmp_path)
    play(book, PLAN, lambda job: (job.trial == 0) - 0.5 if job.rung == 2 else float(job.trial))
    assert best(book, PLAN).job == Job(0, 2)


def test_less_is_better_for_a_loss(tmp_path):
    plan = Plan(8, (0.25, 1.0), 4, maximise=False)
    book = ledger(tmp_path)
    play(book, plan, lambda job: abs(job.trial - 5.0), workers=1)
    assert sorted(book.on_rung(1)) == [0, 5] and best(book, plan).job.trial == 5


@pytest.mark.parametrize("trials", [1, 2, 3, 5])
def test_small_sweeps_end_on_the_last_rung(tmp_path, trials):
    plan = Plan(trials, (0.25, 0.5, 1.0), 4, True)
    book = ledger(tmp_path)
    play(book, plan, lambda job: float(job.trial))
    assert best(book, plan).job.rung == 2


def test_failures_are_never_promoted_and_do_not_stop_the_others(tmp_path):
    plan = Plan(8, (0.5, 1.0), 2, True)
    book = ledger(tmp_path)
    play(book, plan, lambda job: None if job.trial % 2 == 0 else float(job.trial))
    assert sorted(book.on_rung(1)) == [3, 5, 7]
    assert [told.failed for told in book.told(plan)] == [True, False] * 4
    assert rows(book, plan)[-1]["value"] is None


@pytest.mark.parametrize("kill_after", [0, 3, 7, 21, 26])
def test_a_killed_sweep_read_back_is_the_uninterrupted_one(tmp_path, kill_after):
    quality = rng_for(1).normal(size=20)

    def value_of(job: Job) -> float:
        return float(quality[job.trial])

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = ledger(tmp_path / "a")
    play(whole, PLAN, value_of, workers=1)
    play(ledger(tmp_path / "b"), PLAN, value_of, workers=1, at_most=kill_after)
    with (tmp_path / "b/trials.jsonl").open("a") as stream:
        stream.write('\n{"kind": "result", "resu')  # torn by the kill
    resumed = ledger(tmp_path / "b")
    assert len(resumed.results) == kill_after
    play(resumed, PLAN, value_of, workers=1)
    assert resumed.results == whole.results and resumed.trials == whole.trials
    assert ledger(tmp_path / "b").results == whole.results


def test_an_interrupted_trial_is_begun_again_with_its_settings(tmp_path):
    book = ledger(tmp_path)
    book.start({"lr": 1})
    book.start({"lr": 2})
    finish(book, Job(1, 0), 0.5)
    again = ledger(tmp_path)
    assert again.trials == [{"lr": 1}, {"lr": 2}]
    assert next_job(again, PLAN, set()) == Job(0, 0)
    assert next_job(again, PLAN, {Job(0, 0)}) == Job(2, 0), "a new one"


def test_what_failed_for_the_machine_is_tried_again_what_failed_for_its_settings_is_not(tmp_path):
    book = ledger(tmp_path)
    for trial in range(2):
        book.start({"n": trial})
    finish(book, Job(0, 0), None, error="workers were lost", again=True)
    finish(book, Job(1, 0), None, error="the loss is not finite")
    assert next_job(book, Plan(2, (1.0,), 4, True), set()) is None, "not in the same session"
    assert next_job(ledger(tmp_path), Plan(2, (1.0,), 4, True), set()) == Job(0, 0)


def test_more_trials_go_on_where_fewer_ended(tmp_path):
    small, large = (Plan(n, (0.25, 1.0), 4, True) for n in (4, 12))
    play(ledger(tmp_path), small, lambda job: float(job.trial))
    book = ledger(tmp_path)
    jobs = play(book, large, lambda job: float(job.trial))
    assert [job for job in jobs if job.rung == 0] == [Job(n, 0) for n in range(4, 12)]
    assert best(book, large).job == Job(11, 1)


def test_a_check_trains_the_others_in_full_and_counts_apart(tmp_path):
    plan = Plan(4, (0.25, 1.0), 4, True)
    book = ledger(tmp_path)
    play(book, plan, lambda job: float(job.trial == 1) if job.rung == 0 else 0.8)
    assert sorted(book.on_rung(1)) == [0, 1]
    before = compute(book, plan)
    assert reached(book, plan) is None
    while (job := next_check(book, plan, set())) is not None:
        assert job.check and job.trial in (2, 3)
        finish(book, job, 0.9 if job.trial == 2 else 0.7, plan)
    after = compute(book, plan)
    assert after["swept_rows"] == before["swept_rows"] == 4 * 400 + 2 * 1600
    assert after["measured_in_full"] == 4 and after["share"] == pytest.approx(4800 / 6400)
    assert reached(book, plan) == pytest.approx(0.8 / 0.9)


def test_where_nothing_is_better_than_0_there_is_no_share_of_the_best(tmp_path):
    plan, book = Plan(2, (1.0,), 4, True), ledger(tmp_path)
    play(book, plan, lambda _: 0.0)
    assert reached(book, plan) is None


def test_the_file_is_plain_lines(tmp_path):
    book = ledger(tmp_path)
    finish(book, book.start({"model.hidden": [16]}), 0.5, history=[{"epoch": 1, "auc": 0.5}])
    lines = [json.loads(line) for line in book.file.read_text().splitlines() if line]
    assert [line["kind"] for line in lines] == ["trial", "result"]
    assert lines[1]["result"]["job"] == {"trial": 0, "rung": 0, "check": False}
