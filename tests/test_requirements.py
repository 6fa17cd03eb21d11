"""What is installed is what the constraints say, and every dependency of a dependency is pinned."""

from importlib import import_module, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PINS = Path(__file__).resolve().parent.parent / "requirements"
# torchrec's own list, overruled on purpose (requirements/torchrec-cpu.txt says why).
OVERRULED = {("torchrec", "fbgemm-gpu"), ("torchrec", "torchmetrics")}


def pinned(*names: str) -> dict[str, Requirement]:
    lines = [line for name in names for line in (PINS / name).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in found if r.marker is None or r.marker.evaluate()}


def installed_kind() -> str:
    return "cuda" if any(d.name == "fbgemm_gpu" for d in metadata.distributions()) else "cpu"


def test_every_pin_is_exact() -> None:
    for name in (
        "constraints.txt",
        "torch-cpu.txt",
        "torch-cuda.txt",
        "torchrec-cpu.txt",
        "torchrec-cuda.txt",
    ):
        for requirement in pinned(name).values():
            assert [clause.operator for clause in requirement.specifier] == ["=="], f"{name}: {requirement}"
    assert len(pinned("constraints.txt")) > 100


def test_installed_versions_are_the_pinned_ones() -> None:
    kind = installed_kind()
    pins = pinned("constraints.txt", f"torch-{kind}.txt", f"torchrec-{kind}.txt")
    for distribution in metadata.distributions():
        pin = pins.get(canonicalize_name(distribution.name))
        if pin is not None:
            assert pin.specifier.contains(distribution.version, prereleases=True), (
                f"{distribution.name} {distribution.version} is installed, {pin} is pinned"
            )


def test_every_requirement_is_installed_in_a_version_that_fits() -> None:
    declared = metadata.requires("recsys-dist") if has("recsys-dist") else None
    if declared is None:
        pytest.skip("the project itself is not installed in this environment")
    seen: set[tuple[str, str]] = set()
    for requirement in declared:
        check("recsys-dist", Requirement(requirement), "dev", seen)


def check(parent: str, requirement: Requirement, extra: str, seen: set[tuple[str, str]]) -> None:
    name = canonicalize_name(requirement.name)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
        return
    if (parent, name) in OVERRULED:
        return
    version = metadata.version(name)
    assert requirement.specifier.contains(version, prereleases=True), (
        f"{parent} needs {requirement}, has {version}"
    )
    for wanted in requirement.extras or {""}:
        if (name, wanted) not in seen:
            seen.add((name, wanted))
            for child in metadata.requires(name) or []:
                check(name, Requirement(child), wanted, seen)


def has(name: str) -> bool:
    return any(canonicalize_name(d.name) == name for d in metadata.distributions())


def test_the_cpu_install_takes_no_cuda_package() -> None:
    if installed_kind() == "cuda":
        pytest.skip("this environment was installed with CUDA=1")
    names = {canonicalize_name(d.name) for d in metadata.distributions()}
    assert not {name for name in names if name.startswith(("nvidia-", "cuda-")) or name == "triton"}


def test_another_python_is_installed_anew_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(PINS)
    install = import_module("install")
    monkeypatch.setattr(install, "STAMP", tmp_path / "stamp")
    install.write_stamp("cpu python3.99", install.wanted_digest("cpu"))
    assert install.up_to_date(None, this_python=False) and not install.up_to_date(None, this_python=True)
    install.write_stamp(f"cpu {install.running_python()}", install.wanted_digest("cpu"))
    assert install.up_to_date("cpu", this_python=True) and not install.up_to_date("cuda", this_python=True)
