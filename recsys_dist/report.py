"""report.html: what a run learned, in one file that needs no network, for people who were not there."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys_dist.data.output import write_text
from recsys_dist.plots import Bars, Plot, svg

HIGHER_IS_BETTER = {"auc": True, "gauc": True, "logloss": False, "ece": False}
NAMES = {"auc": "AUC", "gauc": "GAUC", "logloss": "log loss", "ece": "ECE", "rows": "rows"}


@dataclass(frozen=True)
class Ledger:
    """Rows of the log: read = kept + the sum of `quarantined`, which counts by reason."""

    read: int
    kept: int
    quarantined: Mapping[str, int]


@dataclass(frozen=True)
class Story:
    """What report.json does not hold.

    summary      sentences in plain words: what was learned, what beat what
    plots        learning curves, reliability diagram, whatever else is worth a figure
    next_steps   (what one can do now, the command for it)
    """

    title: str
    summary: Sequence[str]
    ledger: Ledger
    plots: Sequence[Plot] = ()
    next_steps: Sequence[tuple[str, str]] = field(default=())


def write(report: Mapping[str, Any], story: Story, path: Path) -> None:
    """Write the page. `report` is report.json's content:

    {"ranking": {"label", "auc", "gauc", "logloss", "rows", "model"?, <baseline>: {same metrics}...},
     "recall": {"recall@50", ..., "model"?, "popularity": {same keys}, <other baseline>: {...}},
     "mlflow": {"tracking_uri", "run_ids"}, "seconds": {stage: s}, "peak_rss_bytes"}

    Sections that `report` lacks are left out; a metric may be null.
    """
    parts = [
        f"<h1>{_text(story.title)}</h1>",
        *(f"<p class=lead>{_text(sentence)}</p>" for sentence in story.summary),
        *_ranking(report.get("ranking")),
        *_recall(report.get("recall")),
        *_figures("Training and calibration", story.plots),
        *_ledger(story.ledger),
        *_seconds(report.get("seconds"), report.get("peak_rss_bytes")),
        *_next_steps(story.next_steps, report.get("mlflow")),
    ]
    page = PAGE.replace("{title}", _text(story.title)).replace("{body}", "\n".join(parts))
    write_text(page, path)


def recall_bars(recall: Mapping[str, Any]) -> Bars:
    """recall@k of the model beside its baselines, a group per k."""
    groups = [key for key in recall if key.startswith("recall@")]
    rows = _rows_of(recall, groups)
    heights = {name: [_number(values.get(key)) for key in groups] for name, values in rows.items()}
    return Bars("Recall against the baselines", "share of wanted items found", groups, heights)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _ranking(ranking: Mapping[str, Any] | None) -> Iterator[str]:
    if not ranking:
        return
    metrics = [key for key in HIGHER_IS_BETTER if key in ranking]
    yield f"<h2>Ranking: will the user {_text(ranking.get('label', ''))}?</h2>"
    yield (
        f"<p>{ranking.get('rows', 0):,} held-out exposures. AUC: how often a positive is ranked above a "
        "negative; GAUC: the same within each user; log loss: how far off the probabilities are.</p>"
    )
    yield _table(_rows_of(ranking, metrics), metrics)


def _recall(recall: Mapping[str, Any] | None) -> Iterator[str]:
    if not recall:
        return
    metrics = [key for key in recall if "@" in key]
    yield "<h2>Recall: are the wanted items among the candidates?</h2>"
    yield (
        "<p>recall@k: the share of all held-out pairs of user and item that are among a user's first k "
        "of the full catalogue, items already seen left out.</p>"
    )
    yield _table(_rows_of(recall, metrics), metrics)
    yield from _figures("", [recall_bars(recall)])


def _rows_of(section: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The model first, then every baseline: whatever in the section has the same metrics."""
    rows: dict[str, Mapping[str, Any]] = {str(section.get("model", "model")): section}
    for name, values in section.items():
        if (
            name != "intervals"
            and isinstance(values, Mapping)
            and any(metric in values for metric in metrics)
        ):
            rows[name.replace("_", " ")] = values
    return rows


def _table(rows: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> str:
    head = "".join(f"<th scope=col>{_text(NAMES.get(metric, metric))}</th>" for metric in metrics)
    best = {metric: _best([values.get(metric) for values in rows.values()], metric) for metric in metrics}
    body = []
    for name, values in rows.items():
        cells = "".join(_cell(values.get(metric), best[metric]) for metric in metrics)
        body.append(f"<tr><th scope=row>{_text(name)}</th>{cells}</tr>")
    return f"<div class=scroll><table><tr><th></th>{head}</tr>{''.join(body)}</table></div>"


def _best(values: Sequence[float | None], metric: str) -> float | None:
    known = [value for value in values if value is not None]
    return (max if HIGHER_IS_BETTER.get(metric, True) else min)(known) if len(known) > 1 else None


def _cell(value: float | None, best: float | None) -> str:
    if value is None:
        return "<td>&mdash;</td>"
    shown = f"{value:.4f}"
    return f"<td><strong>{shown}</strong></td>" if value == best else f"<td>{shown}</td>"


def _figures(title: str, plots: Sequence[Plot]) -> Iterator[str]:
    if not plots:
        return
    if title:
        yield f"<h2>{_text(title)}</h2>"
    yield "<div class=figures>"
    for plot in plots:
        image = svg(plot, themed=True).replace(
            "<svg ", f'<svg role="img" aria-label="{_text(plot.title)}" ', 1
        )
        yield f"<figure>{image}</figure>"
    yield "</div>"


def _ledger(ledger: Ledger) -> Iterator[str]:
    refused = sum(ledger.quarantined.values())
    rows = [("read", ledger.read), ("kept", ledger.kept), ("quarantined", refused)]
    rows += [
        (f"— {reason}", count) for reason, count in sorted(ledger.quarantined.items(), key=lambda i: -i[1])
    ]
    yield "<h2>Where every row of the log went</h2>"
    yield _pairs([(name, f"{count:,}") for name, count in rows])


def _seconds(seconds: Mapping[str, float] | None, peak_rss_bytes: int | None) -> Iterator[str]:
    if not seconds:
        return
    yield "<h2>What it cost</h2>"
    pairs = [(stage.replace("_", " "), f"{value:,.1f} s") for stage, value in seconds.items()]
    if peak_rss_bytes is not None:
        pairs.append(("most memory at once", f"{peak_rss_bytes / 1e9:.2f} GB"))
    yield _pairs(pairs)


def _next_steps(steps: Sequence[tuple[str, str]], tracked: Mapping[str, Any] | None) -> Iterator[str]:
    if steps:
        yield "<h2>What to look at next</h2><dl>"
        yield from (
            f"<dt>{_text(what)}</dt><dd><code>{_text(command)}</code></dd>" for what, command in steps
        )
        yield "</dl>"
    if tracked:
        ids = tracked.get("run_ids") or []
        listed = ", ".join(map(str, ids.values() if isinstance(ids, Mapping) else ids)) or "not delivered yet"
        yield f"<p class=small>MLflow: {_text(tracked.get('tracking_uri', ''))} · runs {_text(listed)}</p>"


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    body = "".join(
        f"<tr><th scope=row>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in pairs
    )
    return f"<div class=scroll><table>{body}</table></div>"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta name=color-scheme content="light dark">
<title>{title}</title>
<style>
:root { --ink: #1f2328; --paper: #fff; --soft: #59636e; --line: #d7dbe0; --tint: #f3f5f7;
  --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73; --series-3: #cc79a7; --series-4: #b57700;
  --series-5: #56b4e9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #15181c; --soft: #9aa4ae;
  --line: #363c44; --tint: #1e2329; --series-0: #58b2ec; --series-1: #ff9455; --series-2: #3fc79c;
  --series-3: #e5a3c7; --series-4: #f0b93a; --series-5: #8fd0f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 60rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { max-width: 44rem; margin: .4rem 0; }
.lead { font-size: 1.1rem; }
.small { color: var(--soft); font-size: .875rem; margin-top: 1.5rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th[scope=row] { text-align: left; font-weight: 400; padding-right: 2rem; }
th[scope=col] { font-weight: 600; color: var(--soft); }
.figures { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: .75rem 0 0; }
figure svg { width: 100%; height: auto; max-width: 36rem; }
dt { margin-top: .75rem; }
dd { margin: .2rem 0 0; }
code { display: inline-block; max-width: 100%; overflow-x: auto; padding: .3rem .6rem; border-radius: .3rem;
  background: var(--tint); font: .9rem/1.5 ui-monospace, monospace; }
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
