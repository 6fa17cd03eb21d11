"""The command line of jobs.prepare."""

from pathlib import Path

import pytest

from jobs.prepare import parse
from recsys_dist.errors import ConfigError


def test_a_path_with_an_equals_sign_is_a_path_and_not_a_setting(tmp_path: Path) -> None:
    folder = tmp_path / "day=2024-05-01"
    folder.mkdir()
    (folder / "log.yaml").write_text("kind: parquet\nevents: x\ncolumns: {labels: {click: c}}\n")
    cfg, out = parse(["parquet", str(folder / "log.yaml"), "--out", "o", "buckets=3"])
    assert (cfg.source.kind, cfg.buckets, out) == ("parquet", 3, "o")


def test_a_long_setting_is_no_path() -> None:
    names = "".join(f"{{name: feature_{n}}}, " for n in range(40))
    with pytest.raises(ConfigError, match="features"):
        parse(["simulate", "--out", "o", f"features=[{names}]"])
