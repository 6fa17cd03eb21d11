"""The model card of a bundle, for people, made from its manifest."""

from recsys_dist.manifest import Manifest

# what to show of each task, where it was measured
_SHOWN = {
    "ranking": ("auc", "gauc", "logloss", "ece"),
    "recall": ("recall@50", "recall@100", "recall@200", "ndcg@100"),
}
_NAMES = {
    "model": "this model",
    "target_encoding": "target encoding",
    "popularity": "popularity",
    "item_cosine": "item-to-item cosine",
    "bayes": "best reachable (simulated truth)",
}


def text(manifest: Manifest, predicts: str | None, calibrated: bool) -> str:
    """Markdown. `predicts` is the amount that the ranker expects; None: its label's probability."""
    data, labels = manifest.data, manifest.labels
    by = f"expected `{predicts}`" if predicts else f"predicted probability of `{labels['ranking'][0]}`"
    on_days = f", calibrated on the days from {data.valid_from} on, before {data.test_from}"
    return f"""# Model card: recommender bundle {manifest.version}

Made {manifest.created} by recsys_dist at git commit {manifest.git_commit}.

## What it is

Two models that answer together: `{manifest.models["recall"]["name"]}` finds candidates among
{manifest.index.items:,} items, `{manifest.models["ranking"]["name"]}` orders them by the
{by}{on_days if calibrated else ""}.
With them: vocabularies, statistics, the index, popular items and the newest events of each user.

## Data

{data.source} (digest {data.data_digest}), exposures from {data.first_event} to {data.last_event} (UTC).
Vocabularies and statistics were fitted before {data.valid_from}; the models learned from the days before
{data.test_from}, and the figures below are from that day on. An item counts as wanted where
{" or ".join(f"`{label}`" for label in labels["recall"])} is positive.

## How good it is, beside what it has to beat

{_table("ranking", manifest)}

{_table("recall", manifest)}

The index ({manifest.index.kind}) finds {manifest.index.recall_at_200:.2%} of the 200 items that exact search
finds ({manifest.index.queries:,} users).

## Intended use

Recommending items of this catalogue to users of the service whose log this is. Users and items that the log
does not have are served by what is known without them, and flagged.

## Limits

- It learned from what users were shown by the system of that time; what was never shown it can only guess.
- Predicted probabilities hold for exposures as in the log; after a change of layout or audience they drift.
- Items newer than the log are not found until the next export.
- No part of it was examined for fairness between groups of users or of makers of items.
- `events.parquet` and `seen.parquet` hold behaviour of single users: treat the bundle as the log itself.
"""


def _table(task: str, manifest: Manifest) -> str:
    found = manifest.metrics.get(task, {})
    shown = [name for name in _SHOWN[task] if any(name in values for values in found.values())]
    if not shown:
        return f"Not measured for {task}."
    lines = [f"| {task} | {' | '.join(shown)} |", f"|---|{'---|' * len(shown)}"]
    for scorer, values in found.items():
        cells = [f"{values[name]:.4f}" if name in values else "" for name in shown]
        lines.append(f"| {_NAMES.get(scorer, scorer)} | {' | '.join(cells)} |")
    return "\n".join(lines)
