"""Which bundle may become champion, figure by figure."""

from typing import Any

import pytest

from recsys_dist.gates import GateConfig, judge, report
from recsys_dist.manifest import Manifest


def manifest(auc: float = 0.8, recall: float = 0.5, **changes: Any) -> Manifest:
    """Popularity has AUC .6 and recall .3."""
    return Manifest.parse(
        {
            "version": "v",
            "created": "2024-01-01",
            "git_commit": "c",
            "data": {
                "source": "small",
                "data_digest": "d",
                "first_event": "2024-01-01",
                "last_event": "2024-01-31",
                "valid_from": "2024-01-20",
                "test_from": "2024-01-21",
            },
            "schema_digest": "s",
            "vocabulary_digest": "v",
            "models": {},
            "checkpoints": {},
            "labels": {},
            "metrics": {
                "ranking": {"model": {"auc": auc}, "popularity": {"auc": 0.6}},
                "recall": {"model": {"recall@100": recall}, "popularity": {"recall@100": 0.3}},
            },
            "index": {"kind": "ivf", "items": 9, "dim": 4, "recall_at_200": 0.995, "queries": 9},
            **changes,
        }
    )


CFG = GateConfig(tolerance=0.01)
OTHER_DAYS = manifest(auc=0.7).data.model_copy(update={"data_digest": "other"}).model_dump()


def failed(candidate: Manifest, champion: Manifest | None, measured: Any = None) -> list[str]:
    return [gate.name for gate in judge(candidate, champion, CFG, measured) if not gate.passed]


@pytest.mark.parametrize(
    ("candidate", "champion", "expected"),
    [
        (manifest(), None, []),
        (manifest(), manifest(), []),
        (manifest(auc=0.791), manifest(), []),  # within the tolerance
        (manifest(auc=0.789), manifest(), ["ranking auc against champion v"]),
        (manifest(recall=0.48), manifest(), ["recall recall@100 against champion v"]),
        (manifest(auc=0.595), None, ["ranking auc against popularity"]),  # no tolerance here
        (manifest(recall=0.1), None, ["recall recall@100 against popularity"]),
        (
            manifest(metrics={}),
            None,
            ["ranking auc against popularity", "recall recall@100 against popularity"],
        ),
    ],
)
def test_gates(candidate: Manifest, champion: Manifest | None, expected: list[str]) -> None:
    assert failed(candidate, champion) == expected


def test_an_index_that_finds_too_little() -> None:
    low = {**manifest().index.model_dump(), "recall_at_200": 0.98}
    assert failed(manifest(index=low), None) == ["index"]


def test_figures_of_other_days_are_not_compared_unless_measured_anew() -> None:
    champion = manifest(auc=0.1, recall=0.1, data=OTHER_DAYS)
    assert len(failed(manifest(), champion)) == 2
    assert "not comparable: its figures are of other data (2024-01-21 to" in report(
        judge(manifest(), champion, CFG)
    )
    anew = {"ranking": {"model": {"auc": 0.805}}, "recall": {"model": {"recall@100": 0.55}}}
    assert failed(manifest(), champion, anew) == ["recall recall@100 against champion v"]


def test_the_report_has_every_figure() -> None:
    lines = report(judge(manifest(auc=0.5), None, CFG)).splitlines()
    assert lines[1] == "  FAILED  ranking auc against popularity: 0.5000 beside 0.6000, tolerance 0"
    assert len(lines) == 3
