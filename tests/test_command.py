"""How a job ends: in one line and an exit code, never in a traceback for what a user can mend."""

import errno
import re
import signal

import pytest

from jobs import recipes
from jobs.command import reported
from recsys_dist.errors import ConfigError, DataError


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


@pytest.mark.parametrize("words", [["--data", "runs/data"], ["--batch-rows=64"], ["--optimizer.deep.lr=0.1"]])
def test_a_setting_with_dashes_is_told_how_it_is_written(words: list[str]) -> None:
    name = words[0].strip("-").partition("=")[0].replace("-", "_")
    with pytest.raises(ConfigError, match=re.escape(f"{name}=VALUE")):
        recipes.parse(["wide_deep", *words])


def test_any_other_unknown_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipes.parse(["wide_deep", "data=x", "--fast"])
    assert "unrecognized arguments: --fast" in capsys.readouterr().err
