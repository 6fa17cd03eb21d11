"""docs/results.md: a section per suite, of what `jobs.scores` finds; the same text goes to the terminal."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from recsys_dist.metrics import LESS_IS_BETTER

HEAD = """# Results

Written by `python -m jobs.benchmark_quality`, a section per suite. Figures are means over seeds ± their
standard deviation, in brackets the standard error of the mean, on test. Settings and epochs were chosen on
validation.
"""
_REACHED = {True: "met", False: "not met", None: "not run"}
_OURS_ALONE = 6  # columns that rows of others leave empty


def section(result: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The suite's part of docs/results.md; `pictures` are paths of its plots, as seen from there."""
    seeds = max((len(row["seeds"]) for row in result["rows"]), default=0)
    command = f"`python -m jobs.benchmark_quality --suite {result['suite']} --seeds {seeds}`"
    parts = [
        f"## {result['suite']}",
        f"{result['title']}.",
        "; ".join([*result["dates"], *result["hardware"], command]),
        table(_header(result), _lines(result)),
        table(["", "asked", "reached", ""], [_goal(goal) for goal in result["goals"]]),
        *(f"![{result['suite']}]({picture})" for picture in pictures),
        *_folded(result["tried"]),
    ]
    return "\n\n".join(parts) + "\n"


def replaced(text: str, section: str) -> str:
    """A document with the section of the same heading replaced, or with a new one at its end."""
    lines = (text or HEAD).splitlines()
    starts = [at for at, line in enumerate(lines) if line.startswith("## ")]
    blocks = ["\n".join(lines[a:b]) for a, b in pairwise([0, *starts, len(lines)])]
    heading = section.splitlines()[0]
    same = [at for at, block in enumerate(blocks) if block.splitlines()[:1] == [heading]]
    if same:
        blocks[same[0]] = section
    else:
        blocks.append(section)
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def table(header: list[str], lines: Sequence[list[str]]) -> str:
    """A Markdown table that lines up as plain text too; columns in which no line has anything are dropped."""
    widths = {
        at: max(3, *(len(line[at]) for line in (header, *lines)))
        for at in range(len(header))
        if any(line[at] for line in lines)
    }
    rows = [header, ["-" * widths.get(at, 0) for at in range(len(header))], *lines]
    padded = [[row[at].ljust(width) for at, width in widths.items()] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _header(result: Mapping[str, Any]) -> list[str]:
    chosen_by = next((title(row["valid_metric"]) for row in result["rows"]), "metric")
    ours = ["over published", "epochs", "training, s", "parameters", "of them in tables"]
    return ["", "", *map(title, result["metrics"]), *ours, f"validation {chosen_by}"]


def _lines(result: Mapping[str, Any]) -> list[list[str]]:
    """Ours and all others', the best first."""
    metrics = result["metrics"]
    lines = [(row["metrics"][metrics[0]]["mean"], _ours(row, result)) for row in result["rows"]]
    baselines = {name: [values[m] for m in metrics] for name, values in result["baselines"].items()}
    others = {
        "published": result["published"],
        "floor, published": result["floors"],
        "baseline, here": baselines,
    }
    for kind, rows in others.items():
        for name, values in rows.items():
            lines.append((values[0], [name, kind, *map(number, values), *[""] * _OURS_ALONE]))
    return [line for _, line in sorted(lines, key=lambda found: -found[0])]


def _ours(row: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    metrics, counts = result["metrics"], row["parameters"]
    published = result["published"].get(row["row"])
    over = row["metrics"][metrics[0]]["mean"] - published[0] if published else 0.0
    seeds = ", ".join(map(str, row["seeds"]))
    return [
        f"**{row['row']}**",
        f"seed{'s' if len(row['seeds']) > 1 else ''} {seeds}",
        *(_spread(row["metrics"][metric]) for metric in metrics),
        f"{'-' if over < 0 else '+'}{number(abs(over))}" if published else "",
        ", ".join(map(str, row["epochs"])),
        f"{row['seconds']['mean']:,.0f}",
        f"{counts['dense'] + counts['tables']:,}",
        f"{counts['tables']:,}",
        _spread(row["valid"]),
    ]


def _goal(goal: Mapping[str, Any]) -> list[str]:
    signs = "≥≤" if goal["ahead_of"] is None else "><"
    least = ", ".join(
        f"{title(metric)} {signs[metric in LESS_IS_BETTER]} {number(value)}"
        for metric, value in goal["least"].items()
    )
    asked = goal["of"] if goal["ahead_of"] is None else f"{goal['of']} ahead of {goal['ahead_of']}"
    verdict = _REACHED[goal["met"]]
    if goal["met"] is not None and goal["seeds"] < goal["of_seeds"]:
        verdict += f", with {goal['seeds']} of {goal['of_seeds']} seeds"
    reached = " / ".join(map(number, goal["reached"].values()))
    return [
        "aim" if goal["aim"] else "required",
        f"{asked}: {least}" if least else asked,
        f"{goal['row']} {reached}" if reached else "",
        verdict,
    ]


def _folded(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    summary = f"<details><summary>Tried on validation: {len(lines)} runs</summary>"
    return [summary, tried(lines), "</details>"] if lines else []


def tried(found: Sequence[Mapping[str, Any]]) -> str:
    """What was tried on validation: each row's best first, by the settings in which its tries differ."""
    lines = []
    for row in dict.fromkeys(line["row"] for line in found):
        tries = [line for line in found if line["row"] == row]
        keys = sorted({key for line in tries for key in line["settings"]})
        differing = [k for k in keys if len({line["settings"].get(k) for line in tries}) > 1]
        for line in sorted(tries, key=lambda line: -line["value"]):
            said = ", ".join(f"{k}={line['settings'].get(k, 'default')}" for k in differing)
            lines.append([row, said, str(line["seed"]), title(line["metric"]), number(line["value"])])
    return table(["", "settings that differ", "seed", "", "on validation"], lines)


def title(metric: str) -> str:
    return metric if "@" in metric else metric.upper()


def number(value: float) -> str:
    return f"{value:.4f}".removeprefix("0") if abs(value) < 100 else f"{value:,.0f}"


def _spread(values: Mapping[str, Any]) -> str:
    mean, deviation, error = (values[key] for key in ("mean", "deviation", "standard_error"))
    return number(mean) if deviation is None else f"{number(mean)} ± {number(deviation)} ({number(error)})"
