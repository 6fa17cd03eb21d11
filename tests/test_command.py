"""How a job ends: in one line and an exit code, never in a traceback for what a user can mend."""

import errno
import signal

import pytest

from jobs.command import reported
from recsys_dist.errors import DataError


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
