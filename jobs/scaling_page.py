"""What `jobs.bench_scaling` measured and what follows on paper: for the terminal, and docs/scaling.md."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.cost_model import PHASES
from jobs.results_page import table
from jobs.scaling_paper import FREE, H100, ROWS_PER_GPU, ZIPF, Point, best
from recsys_dist.plots import Curves, save

LIMIT_AT_LEAST = 0.5  # of lookups and matrix products at the machine's own rates, over a step

_HEAD = """# Scale, on paper and by simulation

Written by `python -m jobs.bench_scaling --json scaling.json --write docs/scaling.md`, {where}. The cost
model is `jobs/cost_model.py`: a phase of a step takes what the model asks (counted on the real code, see
`recsys_dist/train/rehearsal.py`) over one rate of the machine, and of several workers the busiest sets the
time.

## Fitted and checked here

Each repeat measures the rates of each worker, before and after it trains end to end, with all workers of
its group at it, so that what workers (and others, on a shared machine) take from each other is in the
rates; the slowest worker's count. "counted" knows nothing but those rates. "fitted" adds one number per
model for what is not counted (elementwise arithmetic, Python), from the runs of one worker: so one worker
is the fit, and two and three are the check. A ratio below 1 is a step that took longer than predicted. What
the model has not is waiting for a worker that has no core at the moment, in each of a step's collectives,
which three workers on two cores do, and two where others use the machine. "limit" is the time that lookups
and matrix products alone would take at the machine's own rates, over the step's; at least {least:.0%} is
asked of one worker. Medians of {repeats} repeats, in brackets the lowest and the highest.
"""
_PAPER = """## On paper: 8 to 512 GPUs, a terabyte of tables

None of this was measured. Rates are those of NVIDIA's data sheet of an H100 SXM5, times a share that is
assumed to be reached: lookups {gather:.0%} and streams {stream:.0%} of 3.35 TB/s, matrix products
{flops:.0%} of 494.7 Tflop/s (TF32, dense), {send:.0%} of NVLink's 450 GB/s each way within a machine of 8
GPUs, and of InfiniBand's 400 Gb/s a GPU between machines. Assumed outright: {latency:.0f} us a collective
and {peer:.0f} us more per peer, {step:.0f} ms a step for launching kernels. {rows:,} rows per GPU;
{held:.0%} of 80 GB for tables and their optimizer's states; ids by Zipf with exponent {zipf}, of which the
busiest GPU's are counted. The loader is ours as measured above, on
the benchmark's rows: one reader and one collating thread per worker.

DLRM has 26 tables of 128 columns and MLPs of 512-256 and 1024-1024-512-256; DIN 10 tables of 64 columns and
a history of 10 items on average, a vector for each. `loader` is what feeding a GPU takes at our rate,
`step` all else, `rows/s` what the longer of the two allows. `row_wise` cuts tables into stretches of rows,
which vocabularies number by frequency: the first worker has them all; `row_hashed` has rows in an order
that knows no frequency. `column_wise` needs full Adagrad, whose states are as large as the tables. Narrow
columns are taken to be read at the same bytes a second, which flatters them. `busiest` is the lookups of
the busiest GPU over the mean. The fastest kind that fits is bold.
"""
_MENDS = """What would mend it, in this order: more than one reader and collating thread per worker; fewer
bytes of vectors, by quantised all-to-all; sums of a machine's part of the rows before they leave it
(TorchRec's table-row-wise and grid shardings) in the place of row-wise, whose every worker sends a part of
every sum; vocabularies that are numbered without regard to frequency wherever tables are cut by rows.
"""
_PREDICTED = {"counted_s": "counted / measured", "predicted_s": "fitted / measured"}


def measured(result: dict[str, Any]) -> str:
    """A line per model and number of workers."""
    lines = []
    for name, found in result["models"].items():
        for world in found["repeats"][0]:
            runs = [run[world] for run in found["repeats"]]
            times = [run["measured_s"] for run in runs]
            lines.append(
                [
                    name,
                    world,
                    f"{result['batch_rows'] / statistics.median(times):,.0f}",
                    f"{1e3 * statistics.median(times):.1f} ({1e3 * min(times):.1f}..{1e3 * max(times):.1f})",
                    *(_ratio([run[key] / run["measured_s"] for run in runs]) for key in _PREDICTED),
                    f"{statistics.median(run['limit'] for run in runs):.0%}",
                    _slowest(runs),
                ]
            )
    heads = [
        "model",
        "workers",
        "rows/s",
        "ms a step",
        *_PREDICTED.values(),
        "limit",
        "predicted to take most",
    ]
    return "\n".join([_where(result), "", table(heads, lines), "", _verdict(result)])


def _ratio(found: Sequence[float]) -> str:
    return f"{statistics.median(found):.2f} ({min(found):.2f}..{max(found):.2f})"


def _slowest(runs: list[dict[str, Any]]) -> str:
    share = {
        phase: statistics.median(run["phases"][phase] / run["predicted_s"] for run in runs)
        for phase in PHASES
    }
    most = sorted(share, key=lambda phase: -share[phase])[:3]
    return ", ".join(f"{phase} {share[phase]:.0%}" for phase in most)


def _verdict(result: dict[str, Any]) -> str:
    alone = {
        name: statistics.median(run["1"]["limit"] for run in found["repeats"])
        for name, found in result["models"].items()
    }
    said = ", ".join(f"{name} {share:.1%}" for name, share in alone.items())
    met = [name for name, share in alone.items() if share >= LIMIT_AT_LEAST]
    reached = f"met by {', '.join(met)}" if met else "not met"
    rates = "One worker, of the machine's own gather bandwidth and sgemm rate"
    return f"{rates}: {said}; {LIMIT_AT_LEAST:.0%} is {reached}."


def _where(result: dict[str, Any]) -> str:
    alone = [run["1"]["machine"] for found in result["models"].values() for run in found["repeats"]]
    gather, flops, loader = (
        statistics.median(one[key] for one in alone) for key in ("gather", "flops", "loader")
    )
    return (
        f"{result['hardware']['cpus']} cores, load {result['load']:.0f}, {result['date']}; global batch "
        f"{result['batch_rows']:,}. One worker alone: {gather / 1e9:.1f} GB/s of lookups, "
        f"{flops / 1e9:.0f} Gflop/s, {loader:,.0f} rows/s loaded"
    )


def told(points: list[Point]) -> str:
    """A line per model, number of GPUs and kind of sharding that was looked at closely."""
    heads = [
        "model",
        "GPUs",
        "sharding",
        "GB a GPU",
        "busiest",
        "step, ms",
        "loader, ms",
        "rows/s",
        "breaks first",
    ]
    shown = [point for point in points if point.gpus in (8, 64, 512)]
    fastest = best(points)
    lines = [
        [
            p.model,
            str(p.gpus),
            f"**{p.kind}**" if p in fastest and p.fits else p.kind,
            f"{p.held_bytes / 1e9:.0f}{'' if p.fits else ', too much'}",
            f"{p.spread.busiest:.1f}",
            f"{1e3 * p.unfed_s:.1f}",
            f"{1e3 * p.phases['loader']:.1f}",
            f"{ROWS_PER_GPU * p.gpus / p.step_s / 1e6:.2f} M" if p.fits else "",
            _breaks(p),
        ]
        for p in shown
    ]
    return "\n".join([table(heads, lines), "", *_first(points)])


def _breaks(p: Point) -> str:
    if not p.fits:
        return "memory"
    then = f"{p.slowest} ({p.phases[p.slowest] / p.unfed_s:.0%} of the step)"
    return f"loader, then {then}" if p.phases["loader"] > p.unfed_s else then


def _first(points: list[Point]) -> list[str]:
    """In words, for the best kind of each size."""
    said = []
    for p in best(points):
        if p.gpus in (8, 64, 512):
            what = f"by {p.kind}: {_breaks(p)}" if p.fits else "the tables fit in no way"
            said.append(f"- {p.model} on {p.gpus} GPUs, {what}.")
    return said


def write(page: Path, result: dict[str, Any], points: list[Point]) -> None:
    """The page, and its figures in `results/` beside it."""
    pictures = [save(plot, page.parent / "results") for plot in _plots(points)]
    repeats = len(next(iter(result["models"].values()))["repeats"])
    head = _HEAD.format(where=result["date"], least=LIMIT_AT_LEAST, repeats=repeats)
    paper = _PAPER.format(
        gather=H100.gather / 3.35e12,
        stream=H100.stream / 3.35e12,
        flops=H100.flops / 494.7e12,
        send=H100.near / 450e9,
        latency=H100.latency_s * 1e6,
        peer=H100.per_peer_s * 1e6,
        step=H100.step_s * 1e3,
        rows=ROWS_PER_GPU,
        zipf=ZIPF,
        held=FREE,
    )
    shown = [f"![{path.stem}](results/{path.name})" for path in pictures]
    page.write_text(
        "\n\n".join([head.strip(), measured(result), paper.strip(), told(points), _MENDS.strip(), *shown])
        + "\n"
    )


def _plots(points: list[Point]) -> list[Curves]:
    fastest = [p for p in best(points) if p.fits]
    names = dict.fromkeys(p.model for p in fastest)
    label = "GPUs, as a power of two"

    def line(name: str, value: Any) -> list[tuple[float, float]]:
        return [(math.log2(p.gpus), value(p)) for p in fastest if p.model == name]

    rates = {f"{n}, fed at once": line(n, lambda p: ROWS_PER_GPU * p.gpus / p.unfed_s / 1e6) for n in names}
    rates |= {f"{n}, our loader": line(n, lambda p: ROWS_PER_GPU * p.gpus / p.step_s / 1e6) for n in names}
    shares = [
        Curves(
            f"Scaling {name} phases",
            label,
            "share of a step, fed at once",
            {ph: line(name, lambda p, ph=ph: p.phases[ph] / p.unfed_s) for ph in PHASES if ph != "loader"},
        )
        for name in names
    ]
    return [Curves("Scaling predicted rows", label, "million rows/s", rates, logarithmic=True), *shares]
