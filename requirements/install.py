"""Creates .venv with exactly the pinned packages; does nothing, quickly, where that is already so.

`python3 requirements/install.py [--kind cpu|cuda] [--this-python]`, called by the Makefile; standard library
only.
Two at once wait for each other; one that was interrupted is completed by the next, because the stamp
that says "complete" is written last.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "requirements"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "recsys_dist.stamp"  # first line: what the venv was made for; second: what is installed
OLDEST, NEWEST = (3, 11), (3, 13)

NO_CPU_TORCH = """
pip could not install the CPU build of torch ({wanted}).
If the lines above say "No matching distribution", your package index has only the CUDA build. Either
  - show pip where PyTorch's CPU wheels are (the PyTorch site names the address under "CPU"), then run
    make again:   export PIP_EXTRA_INDEX_URL=<that address>      or, for a folder of wheels:
                  export PIP_FIND_LINKS=<that folder>
  - or, where NVIDIA's driver is installed, take the CUDA build (several GB):   make CUDA=1 ...
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--kind", choices=["cpu", "cuda"], help="builds of torch and fbgemm; default: as it was"
    )
    parser.add_argument("--this-python", action="store_true", help="use this Python, look for no other")
    args = parser.parse_args()
    require_supported_python(look_further=not args.this_python)
    if up_to_date(args.kind, args.this_python):
        return 0
    with (ROOT / ".venv.lock").open("a") as lock:  # the lock goes with the process, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another make is installing into .venv; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not up_to_date(args.kind, args.this_python):
            install(args.kind or made_for()[0] or "cpu", args.this_python)
    return 0


def up_to_date(kind: str | None, this_python: bool) -> bool:
    old_kind, old_python = made_for()
    return read_stamp()[1:] == [wanted_digest(kind or old_kind)] and (
        not this_python or old_python == running_python()
    )


def running_python() -> str:
    return f"python{sys.version_info[0]}.{sys.version_info[1]}"


def made_for() -> tuple[str, str]:
    """(cpu or cuda, python3.x) that .venv was made for; empty strings where there is no telling."""
    kind, _, python = (read_stamp() or [""])[0].partition(" ")
    return kind, python


def require_supported_python(look_further: bool) -> None:
    """Go on under a supported Python: this one, the one .venv has, or another on PATH."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return
    candidates = [str(PYTHON), *(f"python3.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1))]
    for candidate in candidates if look_further else []:
        try:
            found = subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0
        except OSError:
            continue
        if found:
            os.execvp(candidate, [candidate, *sys.argv, "--this-python"])
    version = ".".join(map(str, sys.version_info[:3]))
    sys.exit(
        f"error: {sys.executable} is Python {version}; this project needs 3.11, 3.12 or 3.13.\n"
        "Install one of them and run make again, or name it:  make PYTHON=/path/to/python3.11 ..."
    )


def wanted_digest(kind: str) -> str:
    """The stamp of an up-to-date .venv: builds, pins, declared dependencies and this checkout's place."""
    told = hashlib.sha256(f"{kind} {ROOT}".encode())
    for path in sorted(PINS.glob("*.*")):
        told.update(path.read_bytes())
    told.update(
        (ROOT / "pyproject.toml").read_bytes().partition(b"[tool.ruff]")[0]
    )  # not the tools' settings
    return f"installed {told.hexdigest()}"


def read_stamp() -> list[str]:
    try:
        return STAMP.read_text().splitlines()
    except OSError:
        return []


def write_stamp(*lines: str) -> None:
    fresh = STAMP.with_suffix(".new")
    fresh.write_text("\n".join(lines) + "\n")
    fresh.replace(STAMP)


def install(kind: str, this_python: bool) -> None:
    python = running_python()
    old_kind, old_python = made_for()
    stale = bool(old_kind) and (old_kind != kind or (this_python and old_python != python))
    if stale:
        say(f"replacing .venv, which was made for {old_kind} and {old_python}")
    if stale or not usable(PYTHON):
        run(sys.executable, "-m", "venv", "--clear", str(VENV))
        old_python = python
    write_stamp(f"{kind} {old_python or python}")
    say(f"installing pinned packages into .venv ({kind} builds; once, two to five minutes)")
    constraints = ["--constraint", str(PINS / "constraints.txt")]
    pip("install", *constraints, "setuptools")
    install_torch(kind, constraints)
    constraints += ["--constraint", str(PINS / f"torch-{kind}.txt")]
    pip("install", *constraints, "--no-build-isolation", "--editable", f"{ROOT}[dev]")
    pip("uninstall", "--yes", "-qqq", "fbgemm-gpu" if kind == "cpu" else "fbgemm-gpu-cpu")
    pip("install", "--no-deps", "--requirement", str(PINS / f"torchrec-{kind}.txt"))
    write_stamp(read_stamp()[0], wanted_digest(kind))
    say("installed")


def install_torch(kind: str, constraints: list[str]) -> None:
    """torch comes first and alone, so that nothing else can drag in another build of it."""
    wanted = PINS / f"torch-{kind}.txt"
    try:
        pip("install", *constraints, "--requirement", str(wanted))
    except subprocess.CalledProcessError:
        if kind == "cpu" and sys.platform == "linux":
            pin = wanted.read_text().splitlines()[1].partition(";")[0]
            sys.exit(NO_CPU_TORCH.format(wanted=pin))
        raise


def usable(python: Path) -> bool:
    """False where .venv is missing, was half made, or its Python is gone."""
    try:
        return (
            subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode
            == 0
        )
    except OSError:
        return False


def pip(*arguments: str) -> None:
    run(str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments)


def run(*command: str) -> None:
    subprocess.run(command, check=True, cwd=ROOT)


def say(text: str) -> None:
    print(f"[install] {text}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\n[install] interrupted; run the same make again to go on")
    except subprocess.CalledProcessError as failed:
        sys.exit(f"[install] failed: {' '.join(failed.cmd)}\n[install] run the same make again to go on")
