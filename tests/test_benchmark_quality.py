"""The quality benchmark: its suites, what records come to, the page of results, runs that are done once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from jobs import benchmark_quality as job
from jobs import results_page, scores, suite_runs, tracked
from jobs.suites import SUITES, Data, Goal, Row, Suite
from recsys_dist.data.sources.protocol import source_names
from recsys_dist.errors import ConfigError
from recsys_dist.tracking import TrackingConfig
from tests import bundles

SUITE = Suite(
    title="Made up",
    data=Data("simulated", "simulate", ""),
    metrics=("auc", "gauc"),
    rows=(Row("DCN", "wide_deep"), Row("DCNv2", "wide_deep", ("model.hidden=[8]",)), Row("MLP", "wide_deep")),
    published={"DCN": (0.71, 0.60), "SAM": (0.80, 0.70)},
    floors={"LR": (0.60, 0.55)},
    goals=(
        Goal("DCN", {"auc": 0.7}),
        Goal(None, {"auc": 0.75, "gauc": 0.65}, aim=True),
        Goal("DCN", ahead_of="MLP"),
        Goal("DIN", ahead_of="DCN"),
    ),
)


def record(row: str, seed: int, auc: float, gauc: float = 0.6) -> dict[str, Any]:
    return {
        "row": row,
        "model": "wide_deep",
        "seed": seed,
        "metrics": {"auc": auc, "gauc": gauc},
        "baselines": {"popularity": {"auc": 0.5, "gauc": 0.5}},
        "valid_metric": "auc",
        "valid": auc + 0.01,
        "chosen_epoch": seed + 1,
        "seconds": 10.0 + 2 * seed,
        "parameters": {"dense": 1_000, "tables": 2_000},
        "settings": {},
        "date": "2026-11-22",
        "hardware": "2 CPU cores, no GPU, 1 worker",
    }


RECORDS = [
    record("DCN", 2, 0.74),
    record("DCN", 0, 0.70),
    record("DCN", 1, 0.72),
    record("DCNv2", 0, 0.76, gauc=0.64),
]


@pytest.mark.parametrize("name", SUITES)
def test_every_row_and_goal_of_a_suite_is_meant(name: str) -> None:
    suite = SUITES[name]
    assert len({row.name for row in suite.rows}) == len(suite.rows)
    for row in suite.rows:
        cfg = suite.config(row, seed=3, data=Path("somewhere"))
        assert cfg.seed == 3 and cfg.data == "somewhere"
        assert cfg.chosen_metric
        cuts = {metric.partition("@")[2] for metric in suite.metrics}
        assert cuts <= ({str(k) for k in suite.ks} if cfg.task == "recall" else {""})
    for values in (*suite.published.values(), *suite.floors.values()):
        assert len(values) == len(suite.metrics) and all(0 < value < 1 for value in values)
    for goal in suite.goals:
        assert set(goal.least) <= set(suite.metrics) and bool(goal.least) != bool(goal.ahead_of)
    if suite.data.kind in source_names():
        assert suite.data.prepare("root").source.kind == suite.data.kind


def test_goals_relative_to_published_rows() -> None:
    asked = {goal.of: goal.least for goal in SUITES["frappe"].goals if goal.of}
    assert asked["DCNv2"] == {"auc": 0.983} and asked["LR"] == {"auc": 0.9341} and "FinalMLP" not in asked


def test_means_and_spreads_by_hand() -> None:
    result = scores.summarise("made-up", SUITE, RECORDS, [])
    dcn, v2 = result["rows"]
    auc = dcn["metrics"]["auc"]  # .70, .72, .74: deviation √((.02² + 0 + .02²) / 2) = .02, error .02 / √3
    assert auc["values"] == [0.70, 0.72, 0.74] and dcn["seeds"] == [0, 1, 2]
    assert auc["mean"] == pytest.approx(0.72) and auc["deviation"] == pytest.approx(0.02)
    assert auc["standard_error"] == pytest.approx(0.011547005)
    assert dcn["valid"]["mean"] == pytest.approx(0.73) and dcn["seconds"]["mean"] == 12
    assert dcn["epochs"] == [1, 2, 3]
    assert v2["metrics"]["auc"]["deviation"] is None and v2["metrics"]["auc"]["mean"] == 0.76
    assert json.loads(json.dumps(result)) == result


def test_goals_are_judged_by_means() -> None:
    met = {
        (goal["of"], goal["ahead_of"]): (goal["met"], goal["row"], goal["seeds"])
        for goal in scores.summarise("made-up", SUITE, RECORDS, [])["goals"]
    }
    assert met["DCN", None] == (True, "DCN", 3)
    assert met[scores.BEST, None] == (False, "DCNv2", 1)  # the best by AUC misses the GAUC
    assert met["DCN", "MLP"][0] is None and met["DIN", "DCN"][0] is None  # MLP and DIN were not run
    more = [*RECORDS, record("MLP", 0, 0.71, gauc=0.6)]
    assert scores.summarise("made-up", SUITE, more, [])["goals"][2]["met"] is False  # level is not ahead
    more[-1] = record("MLP", 0, 0.71, gauc=0.5)
    assert scores.summarise("made-up", SUITE, more, [])["goals"][2]["met"] is True


def test_an_error_is_better_the_less_it_is_and_a_baseline_can_be_what_to_beat() -> None:
    suite = replace(SUITE, metrics=("xauc", "mae"), goals=(Goal("DCN", ahead_of="item mean"),))

    def judged(mae: float) -> dict[str, Any]:
        ours = record("DCN", 0, 0.7) | {"metrics": {"xauc": 0.7, "mae": mae}}
        ours["baselines"] = {"item mean": {"xauc": 0.6, "mae": 12_000.0}}
        return scores.summarise("made-up", suite, [ours], [])

    assert [judged(mae)["goals"][0]["met"] for mae in (11_999.0, 12_000.0, 12_001.0)] == [True, False, False]
    text = results_page.section(judged(11_999.0) | {"published": {}, "floors": {}})
    asked = "DCN ahead of item mean: XAUC > .6000, MAE < 12,000"
    assert ["required", asked, "DCN .7000 / 11,999", "met, with 1 of 3 seeds"] in cells(text)


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_section_says_it_all() -> None:
    tried = [
        {"row": "DCN", "seed": 0, "metric": "auc", "value": v, "settings": {"lr": lr, "epochs": "3"}}
        for v, lr in ((0.71, "0.1"), (0.73, "0.3"))
    ]
    result = scores.summarise("made-up", SUITE, RECORDS, tried)
    text = results_page.section(result, ["results/auc.svg"])
    assert text.startswith("## made-up\n\nMade up.\n\n2026-11-22; 2 CPU cores, no GPU, 1 worker; `python -m ")
    assert "--suite made-up --seeds 3`" in text and "![made-up](results/auc.svg)" in text
    header, *rows = cells(text)
    named = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows if len(row) == len(header)}
    assert list(named) == ["SAM", "**DCNv2**", "**DCN**", "DCN", "LR", "popularity"]  # by AUC
    assert named["**DCN**"] == {
        "": "seeds 0, 1, 2",
        "AUC": ".7200 ± .0200 (.0115)",
        "GAUC": ".6000 ± .0000 (.0000)",
        "over published": "+.0100",
        "epochs": "1, 2, 3",
        "training, s": "12",
        "parameters": "3,000",
        "of them in tables": "2,000",
        "validation AUC": ".7300 ± .0200 (.0115)",
    }
    assert named["**DCNv2**"]["AUC"] == ".7600" and named["**DCNv2**"]["over published"] == ""
    assert named["LR"][""] == "floor, published" and named["popularity"]["AUC"] == ".5000"
    assert ["required", "DCN: AUC ≥ .7000", "DCN .7200", "met"] in cells(text)
    assert [
        "aim",
        "the best of ours: AUC ≥ .7500, GAUC ≥ .6500",
        "DCNv2 .7600 / .6400",
        "not met, with 1 of 3 seeds",
    ] in cells(text)
    assert ["required", "DIN ahead of DCN: AUC > .7200, GAUC > .6000", "", "not run"] in cells(text)
    assert cells(text)[-2:] == [
        ["DCN", f"lr={lr}", "0", "AUC", v] for lr, v in (("0.3", ".7300"), ("0.1", ".7100"))
    ]


def test_nothing_was_run_yet() -> None:
    text = results_page.section(scores.summarise("made-up", SUITE, [], []))
    assert "SAM" in text and "not run" in text and "**" not in text


def test_only_the_suites_own_section_is_replaced() -> None:
    one = results_page.replaced("", "## a\n\nfirst\n")
    two = results_page.replaced(one, "## a b\n\nsecond\n")
    assert one == results_page.HEAD + "\n## a\n\nfirst\n"
    assert two == one + "\n## a b\n\nsecond\n"
    assert results_page.replaced(two, "## a\n\nanew\n") == two.replace("first", "anew")
    assert results_page.replaced(two, "## a b\n\nanew\n") == two.replace("second", "anew")
    assert results_page.replaced("By hand.\n", "## a\n") == "By hand.\n\n## a\n"


def test_figures_hold_ours_with_spread_and_theirs() -> None:
    auc, gauc = scores.figures(scores.summarise("made-up", SUITE, RECORDS, []))
    assert auc.points["ours"]["DCN"] == (pytest.approx(0.72), pytest.approx(0.02))
    assert auc.points["published"] == {"DCN": (0.71, 0.0), "SAM": (0.80, 0.0)}
    assert gauc.points["baseline, here"] == {"popularity, here": (0.5, 0.0)}
    assert auc.marks == {"best of ours, aim": 0.75}


def test_the_command_line() -> None:
    args = job.parse(["--suite", "frappe", "num_workers=2", "--try", "a=1 b=2", "--try", ""])
    assert args.suite is SUITES["frappe"] and args.rows == list(SUITES["frappe"].rows)
    assert list(args.seeds) == [0, 1, 2] and args.words == ["num_workers=2"] and args.tries == ["a=1 b=2", ""]
    assert list(job.parse(["--suite", "ml-1m-ctr", "--seeds", "0"]).seeds) == []
    assert [row.name for row in job.chosen(SUITE, "dcnv2, MLP")] == ["DCNv2", "MLP"]
    assert [row.name for row in job.chosen(SUITE, "wide_deep")] == ["DCN", "DCNv2", "MLP"]
    with pytest.raises(ConfigError, match="suite 'frape' does not exist; did you mean 'frappe'"):
        job.parse(["--suite", "frape"])
    with pytest.raises(ConfigError, match="--try looks at validation alone"):
        job.parse(["--suite", "frappe", "--try", "", "--write", "results.md"])
    with pytest.raises(ConfigError, match="model 'dcn2' is not in the suite; did you mean 'dcnv2'"):
        job.chosen(SUITE, "MLP,dcn2")


def test_what_is_learned_is_changed_by_suites_alone() -> None:
    cfg = SUITE.config(SUITE.rows[1], 0, Path("d"))
    assert suite_runs.placed(cfg, ["num_workers=2", "threads_per_worker=2"]).num_workers == 2
    for setting in ("seed=1", "model.dropout=0.5", "data=other"):
        with pytest.raises(ConfigError, match="changes what is learned; measure it on validation with --try"):
            suite_runs.placed(cfg, [setting])
    own = suite_runs.own_settings(cfg.override(["optimizer.dense.lr=0.5", "num_workers=4"]))
    assert own["model.hidden"] == "[8]" and own["optimizer.dense.lr"] == "0.5"
    assert "num_workers" not in own and "model.embedding_dim" not in own  # not learned; the default


@pytest.mark.ray
@pytest.mark.e2e
def test_a_finished_run_is_never_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = bundles.prepare(tmp_path / "data")
    tiny = ("model.embedding_dim=8", "model.hidden=[8]", "batch_rows=60", "epochs=2", "refit=false")
    suite = replace(SUITE, rows=(Row("W&D", "wide_deep", tiny),))
    row, results, tried = suite.rows[0], tmp_path / "out/results/made-up", tmp_path / "tried/made-up.jsonl"
    bench = suite_runs.Bench(suite, prepared, tmp_path / "out", results, TrackingConfig())
    try:
        said = bench.score(row, 0, ["num_workers=0"])
    finally:
        ray.shutdown()
    [found] = bench.records()
    assert json.loads((results / "w_d/seed-0.json").read_text()) == found
    assert set(found["metrics"]) == {"auc", "gauc"} and set(found["baselines"]) == {
        "target encoding",
        "popularity",
    }
    trained = next((tmp_path / "out/models").glob("*/result.json"))
    evaluation = json.loads(next(trained.parent.glob("evaluation-*.json")).read_text())
    assert found["metrics"]["auc"] == evaluation["model"]["auc"]
    history = json.loads(trained.read_text())["history"]
    assert found["valid"] == max(entry["auc"] for entry in history)
    # 8 weights of the tower's layer for each input and its bias, and 8 + 1 of the last
    assert (found["parameters"]["dense"] - 9) % 8 == 0 and found["parameters"]["tables"] > 0

    # the same settings on validation are this very run: it is found, and Ray, which is gone, is not asked for
    assert f"validation auc {found['valid']:.4f}" in bench.try_out(row, 0, [], [], tried)
    assert bench.try_out(row, 0, [], [], tried) and len(suite_runs.read_lines(tried)) == 1
    shutil.rmtree(tmp_path / "out/models")  # a record is all that it takes
    monkeypatch.setattr(tracked, "run", None)
    assert bench.score(row, 0, ["num_workers=2"]) == said

    changed = replace(suite, rows=(Row("W&D", "wide_deep", (*tiny, "model.dropout=0.5")),))
    other = replace(bench, suite=changed)
    assert other.records() == other.records([found]) == []  # of other settings
    elsewhere = replace(bench, results=tmp_path / "another machine's")
    assert elsewhere.records() == [] and elsewhere.records([found]) == [found]
    with pytest.raises(TypeError, match="not callable"):
        other.score(changed.rows[0], 0, [])  # would run
