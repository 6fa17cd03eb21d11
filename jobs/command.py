"""What every command line shares: errors in plain words, and the settings of a config as help text."""

import argparse
import errno
import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

from pydantic_core import PydanticUndefined

from recsys_dist.config import Config
from recsys_dist.data.output import NO_ROOM
from recsys_dist.errors import ConfigError, RecsysError

_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def reported(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a job; a user's mistake or a full disk is one line on stderr and exit code 2, Ctrl-C is 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.enable()
    _quiet()
    try:
        main(argv)
    except RecsysError as error:
        return _told(str(error))
    except BrokenPipeError:  # whoever read what is printed has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor does Python's end write there
        return 1
    except OSError as error:
        if error.errno not in (*NO_ROOM, *_NO_PLACE):
            raise
        what = repr(error.filename) if error.filename else "a file"
        if error.errno in _NO_PLACE:
            return _told(f"{what} cannot be used: {error.strerror}; name another place, or mend this one")
        said = f"{what} cannot be written: {error.strerror}"
        return _told(f"{said}; make room, and run the same command again: it continues")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second one while Ray's processes end
        print("interrupted; the same command again continues", file=sys.stderr)
        return 130
    return 0


def _told(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _quiet() -> None:
    """Silence notices of libraries that tell a user nothing to act on."""
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # a deprecation inside TorchRec
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose: one process
    # of runs with num_workers=0, which train in this process
    logging.getLogger("torchrec.optim.rowwise_adagrad").setLevel(logging.ERROR)  # FBGEMM steps here
    for said in ("Initializing zero-element tensors", "fbgemm::.*an autograd kernel was not registered"):
        warnings.filterwarnings("ignore", message=said)


def options(parser: argparse.ArgumentParser, argv: list[str], cfg: type[Config]) -> argparse.Namespace:
    """What is on the command line of a job that takes settings, before or after its options.

    ConfigError for a setting of `cfg` that is written as an option.
    """
    args, unknown = parser.parse_known_intermixed_args(argv)
    for word in unknown:
        name = word.lstrip("-").partition("=")[0]
        if name.partition(".")[0].replace("-", "_") in cfg.model_fields:
            raise ConfigError(f"{word}: a setting is written without dashes: {name.replace('-', '_')}=VALUE")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def settings_help(cfg: type[Config], title: str = "settings:") -> str:
    """The fields of a config with their defaults and descriptions, a line each."""
    lines = [title]
    for name, field in cfg.model_fields.items():
        default: Any = field.get_default(call_default_factory=True, validated_data={})
        shown = "" if default is PydanticUndefined else f"={default}" if default is not None else ""
        lines.append(f"  {name}{shown}" + (f"  {field.description}" if field.description else ""))
    return "\n".join(lines)
