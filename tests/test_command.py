"""How a job ends: in one line and an exit code, never in a traceback for what a user can mend."""

import errno
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jobs import recipes, train, tune
from jobs.command import reported
from recsys_dist.errors import ConfigError, DataError
from tests.train import prepared


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("no such log"), 2, "error: no such log\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/outbox.jsonl"),
            2,
            "error: 'out/outbox.jsonl' cannot be written: No space left on device; make room, and run the "
            "same command again: it continues\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/sys/runs"),
            2,
            "error: '/sys/runs' cannot be used: Permission denied; name another place, or mend this one\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted; the same command again continues\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(_: list[str]) -> None:
        raise error

    before = signal.getsignal(signal.SIGINT)
    try:
        assert reported(job, []) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == said


def test_any_other_error_of_the_system_is_a_bug_and_keeps_its_traceback() -> None:
    def job(_: list[str]) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    with pytest.raises(FileNotFoundError):
        reported(job, [])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared.make(tmp_path_factory.mktemp("prepared") / "data")


@pytest.mark.parametrize(
    ("job", "argv", "said"),
    [
        (train, ["mlp", "model.hidden=[64,0]"], "'hidden.1': .*greater than or equal to 1"),
        (train, ["deep_crossing", "model.hidden=[0]"], "'hidden.0'"),
        (train, ["dlrm", "model.bottom=[0]"], "'bottom.0'"),
        (train, ["din", "model.unit_hidden=[0]"], "'unit_hidden.0'"),
        (train, ["two_tower", "model.item_hidden=[-1]"], "'item_hidden.0'"),
        (train, ["youtubednn", "model.hidden=[0]"], "'hidden.0'"),
        (train, ["mlp", "model.hidden=[10000000000000]"], "do not fit in this machine's memory; lower"),
        (train, ["mlp", "model.hidden=[1000000000000000000]"], "do not fit in this machine's memory; lower"),
        (train, ["mlp", "model.name=..a:Model"], "name its module in full"),
        (train, ["mlp", "model.name=5"], "needs its name"),
        (train, ["mlp", "sharding.ids={item: -1}"], "'sharding.ids.item'.*greater than or equal to 0"),
        (train, ["mlp", "sharding.ids={item: .nan}"], "'sharding.ids.item'.*finite"),
        (train, ["mlp", f"seed={2**63}"], "'seed'.*less than"),
        (train, ["sasrec", f"model.negatives_seed={2**63}"], "'negatives_seed'.*less than"),
        (train, ["two_tower", "model.negatives_alpha=1000"], "'negatives_alpha'.*less than or equal to 10"),
        (train, ["mlp", "model={hidden: [1"], "model={hidden: .1: not valid YAML"),
        (tune, ["mlp", "--rungs", "[0.5"], "--rungs: not valid YAML"),
        (train, ["mlp", "--tracking-uri", "localhost:5000"], "'uri'.*starts with one of sqlite, http"),
        (tune, ["mlp", "--tracking-uri", "localhost:5000"], "'uri'.*starts with one of sqlite, http"),
    ],
)
def test_a_setting_that_cannot_be_is_told_in_one_line(
    job: ModuleType, argv: list[str], said: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        assert reported(job.main, [*argv, f"data={data}", *["--plan"] * (job is train)]) == 2
    finally:
        signal.signal(signal.SIGINT, before)
    assert re.fullmatch(f"error: .*({said}).*\n", capsys.readouterr().err)


@pytest.mark.parametrize("words", [["--data", "runs/data"], ["--batch-rows=64"], ["--optimizer.deep.lr=0.1"]])
def test_a_setting_with_dashes_is_told_how_it_is_written(words: list[str]) -> None:
    name = words[0].strip("-").partition("=")[0].replace("-", "_")
    with pytest.raises(ConfigError, match=re.escape(f"{name}=VALUE")):
        recipes.parse(["wide_deep", *words])


def test_any_other_unknown_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipes.parse(["wide_deep", "data=x", "--fast"])
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


def test_output_that_nobody_reads_to_its_end_is_no_traceback() -> None:
    """As `| head` does not, which may end before the job prints, and then while Python ends."""
    code = "from jobs.command import reported; exit(reported(lambda _: print('x' * 1_000_000), []))"
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert job.stdout is not None and job.stderr is not None
    job.stdout.close()
    assert job.stderr.read() == b"" and job.wait() == 1
