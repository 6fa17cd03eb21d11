"""Raw behaviour logs to training shards.

examples:
  python -m jobs.prepare simulate --out runs/data source.events=1000000
  python -m jobs.prepare kuairand path/to/KuaiRand-Pure --out runs/data
  python -m jobs.prepare movielens path/to/ml-1m --out runs/data test_from=2002-06-01
  python -m jobs.prepare ml1m_ctr path/to/ml-1m/splits/ctr_by_day --out runs/data    (a published split)
  python -m jobs.prepare parquet my_log.yaml --out runs/data         (your own logs: docs/own_logs.md)
  python -m jobs.prepare --config prepare.yaml --out runs/data       (every setting in a file)

Bad rows go to OUT/quarantine with a reason each; OUT/ledger.json adds up. The same command again
reuses what is unchanged, and continues what was interrupted.
"""

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

from jobs.command import options, reported, settings_help
from recsys_dist.config import load_yaml
from recsys_dist.data.pipeline import PrepareConfig, prepare
from recsys_dist.data.prepared import Prepared
from recsys_dist.data.sources.protocol import SourceConfig, source_for, source_module, source_names
from recsys_dist.errors import ConfigError, SourceError
from recsys_dist.usage import UsageSampler


def parse(argv: list[str]) -> tuple[PrepareConfig, str]:
    """The configuration and the output directory; raises ConfigError for a wrong setting."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.prepare",
        description=__doc__,
        epilog="\n".join([settings_help(PrepareConfig), *map(_source_help, source_names())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="source [path] [key=value ...]",
        help=f"kind of log ({', '.join(source_names())}); where it lies: a directory, or the YAML of a "
        "parquet log; settings, dotted as in source.seed=1",
    )
    parser.add_argument("--config", help="YAML file with settings")
    parser.add_argument("--out", required=True, help="directory of the prepared data")
    args = options(parser, argv, PrepareConfig)
    settings = [word for word in args.words if "=" in word and not _is_there(word)]  # day=1/log.yaml
    named = [word for word in args.words if word not in settings]
    if named[2:]:
        raise ConfigError(f"{named[2]!r} is neither a source, its path, nor key=value")
    values = load_yaml(args.config) if args.config else {}
    if named:
        values["source"] = _source(*named).model_dump(mode="json") if named[1:] else {"kind": named[0]}
    return PrepareConfig.parse(values).override(settings), args.out


def _is_there(word: str) -> bool:
    with suppress(OSError):  # long settings are no names of files
        return Path(word).exists()
    return False


def _source(kind: str, path: str) -> SourceConfig:
    found: SourceConfig | None = source_module(kind).recognise(path)
    if found is None:
        other = source_for(path)  # raises where nobody knows what lies there, saying what each source expects
        raise SourceError(f"{path} is a log of {other.kind}, not of {kind}")
    return found


def _source_help(kind: str) -> str:
    return settings_help(source_module(kind).Config, f"settings below `source` of {kind}:")


def summary(prepared: Prepared) -> str:
    """What was prepared, for people."""
    manifest = prepared.manifest
    ledger = manifest.ledger
    refused = "".join(f"\n  {rows:>12,}  {reason}" for reason, rows in ledger["quarantined"].items())
    files = "".join(f"file refused: {said}\n" for said in ledger["refused"].values())
    rows = {name: shards.total_rows for name, shards in manifest.splits.items()}
    split = manifest.config["split"]
    vocabularies = _limited(prepared) + _hashed(prepared)
    return (
        f"{ledger['read']:,} rows read = {ledger['kept']:,} kept + "
        f"{ledger['read'] - ledger['kept']:,} quarantined{refused}\n{files}"
        f"train {rows['ranking/train']:,} exposures, validation {rows['ranking/valid']:,} "
        f"(from {split['valid_from']}), test {rows['ranking/test']:,} (from {split['test_from']}); "
        f"{len(prepared.items):,} items, {len(prepared.schema.features)} features\n{vocabularies}"
        f"prepared data: {prepared.path}"
    )


def _limited(prepared: Prepared) -> str:
    """A line per vocabulary that leaves values of training without a row."""
    return "".join(
        f"{name!r} has rows for {found.kept:,} of {found.values:,} values: {found.rare:,} too rare, "
        f"{found.old:,} too old, {found.beyond:,} beyond max_rows; {found.unknown:.1%} of events read row 0\n"
        for name, found in prepared.manifest.admissions.items()
        if found.kept < found.values
    )


def _hashed(prepared: Prepared) -> str:
    """A line per hashed categorical feature: more buckets let fewer values share a row."""
    found = prepared.manifest.collisions
    return "".join(f"{n!r} is hashed: {share:.1%} of its values share a row\n" for n, share in found.items())


def main(argv: list[str]) -> None:
    cfg, out = parse(argv)
    began = time.perf_counter()
    with UsageSampler() as usage:
        prepared = prepare(cfg, out)
    print(summary(prepared))
    print(
        f"in {time.perf_counter() - began:.0f} s, with {usage.peak_rss_bytes / 1e9:.2f} GB at most in this "
        "process and those it started"
    )


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
