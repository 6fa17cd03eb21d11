import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from recsys_dist.plots import Bars, Curves, Dots, Fans, Parallel, Plot, Ranking, Reliability, save, svg
from recsys_dist.report import Ledger, Story, recall_bars, write

REPORT: dict[str, Any] = {
    "ranking": {
        "label": "click", "rows": 133_545, "model": "Wide & Deep",
        "auc": 0.7412, "gauc": 0.6431, "logloss": 0.5711,
        "target_encoding": {"auc": 0.7067, "gauc": 0.6371, "logloss": 0.5701},
    },
    "recall": {
        "model": "YoutubeDNN", "recall@50": 0.2612, "recall@100": 0.3487, "recall@200": 0.4533,
        "popularity": {"recall@50": 0.1711, "recall@100": 0.2578, "recall@200": None},
    },
    "mlflow": {"tracking_uri": "sqlite:///runs/quickstart/mlflow.db", "run_ids": ["0af3", "77be"]},
    "seconds": {"prepare": 41.234, "train_ranking": 63.0},
    "peak_rss_bytes": 2_345_000_000,
}  # fmt: skip
CURVES = Curves(
    "Learning curve",
    "epoch",
    "validation AUC",
    {"ranking": [(1, 0.71), (2, 0.74), (3, 0.735)], "recall": [(1, 0.6)]},
)
RELIABILITY = Reliability("Reliability", [0.1, 0.3, 0.5, 0.8], [0.12, 0.28, 0.55, 0.74], [900, 400, 90, 10])
STORY = Story(
    title="Quickstart on <kuairand>",
    summary=["The ranking model beats the target encoding by 0.0345 AUC."],
    ledger=Ledger(1_000, 993, {"null user": 2, "time in the future": 5}),
    plots=[CURVES, RELIABILITY],
    next_steps=[("the runs in MLflow", "make mlflow")],
)


class Cells(HTMLParser):
    """Rows of all tables as lists of text, and whether a cell is emphasised."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.strong: list[str] = []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self._inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "td" in self._inside or "th" in self._inside:
            self.rows[-1][-1] += data
        if "strong" in self._inside:
            self.strong.append(data)


@pytest.fixture
def page(tmp_path: Path) -> str:
    write(REPORT, STORY, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def test_the_page_holds_the_numbers(page: str) -> None:
    cells = Cells()
    cells.feed(page)
    assert ["Wide & Deep", "0.7412", "0.6431", "0.5711"] in cells.rows
    assert ["target encoding", "0.7067", "0.6371", "0.5701"] in cells.rows
    assert ["popularity", "0.1711", "0.2578", "—"] in cells.rows
    assert ["read", "1,000"] in cells.rows
    assert ["— time in the future", "5"] in cells.rows
    assert ["quarantined", "7"] in cells.rows
    assert ["most memory at once", "2.35 GB"] in cells.rows
    assert ["prepare", "41.2 s"] in cells.rows
    assert "make mlflow" in page and "0af3, 77be" in page


def test_the_better_number_stands_out_and_lower_log_loss_is_better(page: str) -> None:
    cells = Cells()
    cells.feed(page)
    assert cells.strong == ["0.7412", "0.6431", "0.5701", "0.2612", "0.3487"]


def test_the_page_needs_no_network_and_escapes_what_it_shows(page: str) -> None:
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)", page)
    assert not re.search(r'(src|href)="https?:', page.replace('xlink:href="#', ""))
    assert "Quickstart on &lt;kuairand&gt;" in page
    assert page.count("<svg") == 3


def test_missing_sections_are_left_out(tmp_path: Path) -> None:
    write({}, Story("Only a ledger", [], Ledger(1, 1, {})), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "Ranking" not in text and "<svg" not in text and "Where every row" in text


@pytest.mark.parametrize("plot", [CURVES, RELIABILITY, recall_bars(REPORT["recall"])])
def test_figures_are_valid_svg_with_labelled_axes(plot: Plot, tmp_path: Path) -> None:
    texts = "".join(ElementTree.fromstring(svg(plot)).itertext())
    wanted = {
        Curves: ["epoch", "validation AUC", "Learning curve"],
        Reliability: ["predicted probability", "share of positives seen"],
        Bars: ["recall@100", "share of wanted items found", "0.349", "popularity"],
    }
    for text in wanted[type(plot)]:
        assert text in texts
    assert "nan" not in texts and "0.000" not in texts
    assert svg(plot) == svg(plot)
    assert save(plot, tmp_path / "plots").read_text().startswith("<?xml")


@pytest.mark.parametrize("best", [None, 1])
def test_figures_of_a_sweep(best: int | None) -> None:
    columns = {"model.hidden": [[8], [16, 8], [8]], "lr": [1e-3, 0.1, 0.01], "dropout": [0.0, 0.25, 0.5]}
    parallel = Parallel("Settings", "auc", columns, frozenset({"lr"}), [0.5, 0.7, 0.6], best)
    texts = [text.strip() for text in ElementTree.fromstring(svg(parallel)).itertext()]
    assert {"16-8", "8", "0.001", "0.1", "0.5"} <= set(texts)
    ranking = Ranking("What decides", "importance", ["lr", "dropout"], [0.75, 0.25])
    texts = [text.strip() for text in ElementTree.fromstring(svg(ranking)).itertext()]
    assert texts.index("lr") < texts.index("dropout") and {"0.75", "0.25"} <= set(texts)
    fans = Fans("Rungs", "part", "auc", [[(0.25, 0.5)], [(0.25, 0.6), (1.0, 0.7)]])
    assert "100%" in "".join(ElementTree.fromstring(svg(fans)).itertext())


def test_figures_of_a_benchmark() -> None:
    ours = {"DIN": (0.75, 0.01), "MLP": (0.72, 0.0)}
    dots = Dots(
        "Suite", "auc", {"ours": ours, "published": {"DIN": (0.74, 0.0), "SAM": (0.76, 0.0)}}, {"aim": 0.77}
    )
    texts = [text.strip() for text in ElementTree.fromstring(svg(dots)).itertext()]
    names = ["MLP  0.7200", "DIN  0.7500", "SAM  0.7600"]
    assert [text for text in texts if text in names] == names  # upwards, ours before theirs
    assert {"ours", "published", "aim", "auc"} <= set(texts)


def test_themed_figures_follow_the_page() -> None:
    themed = svg(CURVES, themed=True)
    assert "currentColor" in themed and "var(--series-0)" in themed and "var(--line)" in themed
    assert "#0072b2" not in themed


def test_an_empty_or_broken_curve_still_draws() -> None:
    ElementTree.fromstring(svg(Curves("Empty", "x", "y", {})))
    ElementTree.fromstring(
        svg(Curves("Logarithmic", "x", "y", {"a": [(0, 0.0), (1, 2.0)]}, logarithmic=True))
    )
    ElementTree.fromstring(svg(Curves("Gap", "x", "y", {"a": [(0, float("nan")), (1, 2.0)]})))
    ElementTree.fromstring(svg(Reliability("No rows", [], [], [])))
