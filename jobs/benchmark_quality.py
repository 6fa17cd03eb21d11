"""How good the models are: every model of a suite, over seeds, on test, beside published rows and goals.

examples:
  python -m jobs.benchmark_quality --suite kuairand-click
  python -m jobs.benchmark_quality --suite frappe --models DCNv2,deepfm --seeds 3 num_workers=2
  python -m jobs.benchmark_quality --suite frappe --seeds 0 --json frappe.json      (runs nothing more)
  python -m jobs.benchmark_quality --suite frappe --write docs/results.md           (its section, and plots)
  python -m jobs.benchmark_quality --suite frappe --models DCNv2 \\
      --try "model.dropout=0.1" --try "model.dropout=0.3 optimizer.dense.lr=0.0005" (on validation only)

Prepares the suite's data once, then trains and evaluates each (model, seed); what is finished is never run
again. Killed anywhere, the same command goes on. A model whose settings were changed in jobs/suites.py or
jobs/recipes.py is run anew. Models are named as in the suite's table, or by their recipe.

Settings are chosen on validation: --try trains without refitting, neither looks at test nor shows it, and
adds a line to docs/tried/SUITE.jsonl, which the results list. What proved best goes into jobs/suites.py by
hand.

Written: OUT/results/SUITE with a record per (model, seed) and plots; runs in OUT/models and OUT/mlflow.db.
With --write docs/results.md, all records go into docs/results/SUITE.jsonl too: a section is made of those
that are there and those made here, so that models can be run on several machines.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs import results_page, scores
from jobs.command import reported
from jobs.prepare import summary
from jobs.suite_runs import Bench, read_lines, write_lines
from jobs.suites import SUITES, Row, Suite
from recsys_dist import plots, tracking
from recsys_dist.config import nearest
from recsys_dist.data.output import write_text
from recsys_dist.data.pipeline import prepare
from recsys_dist.errors import ConfigError
from recsys_dist.tracking import TrackingConfig

TRIED = Path("docs/tried")  # in the repository: which settings were considered, and their validation metric


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `suite` is the Suite, `rows` those asked for, `seeds` a range. ConfigError."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark_quality",
        description=__doc__,
        epilog="suites:\n" + "\n".join(_listed(name, suite) for name, suite in SUITES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="*", metavar="key=value", help="where it computes, as in num_workers=2"
    )
    parser.add_argument("--suite", required=True, dest="name", help="one of those below")
    parser.add_argument("--models", metavar="A,B", help="rows of the suite, or recipes; default: all")
    parser.add_argument("--seeds", type=int, help="seeds 0 to n - 1; default: as many as the goals ask for")
    parser.add_argument(
        "--try", action="append", dest="tries", metavar="SETTINGS", help="other settings, on validation"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--write",
        metavar="FILE",
        help="replace the suite's section of this Markdown file, keeping its other records",
    )
    parser.add_argument("--data-root", default="../shared/data", help="raw data (default: %(default)s)")
    parser.add_argument("--out", default="runs/quality", help="directory for runs (default: %(default)s)")
    parser.add_argument("--tracking-uri", help="MLflow server; default: an SQLite file below --out")
    args = parser.parse_intermixed_args(argv)
    if args.name not in SUITES:
        raise ConfigError(f"suite {args.name!r} does not exist{nearest(args.name, list(SUITES))}")
    if args.tries and (args.json or args.write):
        raise ConfigError("--try looks at validation alone; write the results by a command without it")
    if args.seeds is not None and args.seeds < 0:
        raise ConfigError(f"--seeds {args.seeds}: take 1 or more, or 0 to train nothing")
    args.suite = SUITES[args.name]
    args.rows = chosen(args.suite, args.models)
    args.seeds = range(args.suite.seeds if args.seeds is None else args.seeds)
    return args


def _listed(name: str, suite: Suite) -> str:
    return f"  {name}  {suite.title}\n      {', '.join(row.name for row in suite.rows)}"


def chosen(suite: Suite, models: str | None) -> list[Row]:
    """The rows that `models` names, in the suite's order; ConfigError for a name that is none of its."""
    if models is None:
        return list(suite.rows)
    asked = {name.strip().lower() for name in models.split(",")}
    names = {name.lower() for row in suite.rows for name in (row.name, row.recipe)}
    for name in sorted(asked - names):
        raise ConfigError(f"model {name!r} is not in the suite{nearest(name, sorted(names))}")
    return [row for row in suite.rows if {row.name.lower(), row.recipe} & asked]


def main(argv: list[str]) -> None:
    args = parse(argv)
    out = Path(args.out)
    tracked = TrackingConfig.parse({"uri": args.tracking_uri})
    tracking.deliver_pending(out)
    prepared = prepare(args.suite.data.prepare(args.data_root), out / "data" / args.suite.data.name)
    print(summary(prepared), flush=True)
    bench = Bench(args.suite, prepared, out, out / "results" / args.name, tracked)
    tried = TRIED / f"{args.name}.jsonl"
    if args.tries is not None:
        for row, seed, words in told(args, args.tries):
            print(bench.try_out(row, seed, words.split(), args.words, tried), flush=True)
        print(f"\n{results_page.tried(read_lines(tried))}\n\nwritten: {tried}")
        return
    for row, seed, _ in told(args, [""]):
        print(bench.score(row, seed, args.words), flush=True)
    records = bench.records()
    if args.write:
        measured = pictures_of(args.write) / f"{args.name}.jsonl"
        records = bench.records(read_lines(measured))
        write_lines(records, measured)
    result = scores.summarise(args.name, args.suite, records, read_lines(tried))
    print("\n" + publish(result, bench.results, args))


def told(args: argparse.Namespace, tries: list[str]) -> Iterator[tuple[Row, int, str]]:
    """Everything that is to be run, each announced before."""
    runs = [(row, seed, words) for row in args.rows for words in tries for seed in args.seeds]
    for number, (row, seed, words) in enumerate(runs, start=1):
        print(f"== {number}/{len(runs)}  {row.name}, seed {seed}  {words}".rstrip(), flush=True)
        yield row, seed, words


def pictures_of(page: str) -> Path:
    """Where a page's plots lie, and the records that they and its tables are made of."""
    return Path(page).with_suffix("")


def publish(result: dict[str, Any], folder: Path, args: argparse.Namespace) -> str:
    """Write the figures and plots where asked; returns the suite's section."""
    drawn = scores.figures(result) if result["rows"] else []
    files = [plots.save(figure, folder / "plots") for figure in drawn]
    if args.json:
        write_text(json.dumps(result, indent=1) + "\n", Path(args.json))
    if args.write:
        page = Path(args.write)
        pictures = [plots.save(figure, pictures_of(args.write)) for figure in drawn]
        section = results_page.section(
            result, [file.relative_to(page.parent).as_posix() for file in pictures]
        )
        write_text(results_page.replaced(page.read_text() if page.exists() else "", section), page)
        files += [*pictures, page]
    return results_page.section(result) + "\n" + "\n".join(f"written: {file}" for file in files)


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
