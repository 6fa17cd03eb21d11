"""The service as it is run: Ray Serve, replicas killed, champions swapped, and nothing left behind."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from jobs import bench_faults
from recsys_dist.bundle import Bundle
from recsys_dist.errors import BundleError, ConfigError, RegistryError
from recsys_dist.serve import app
from recsys_dist.serve.app import Watcher
from recsys_dist.serve.pointer import Pointer


def test_a_token_that_is_not_there_is_named_before_anything_is_deployed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"token_file '{tmp_path}/token' cannot be read"):
        app.build({"bundle": "none", "token_file": "token"})


def test_a_bundle_that_is_named_is_served_or_nothing(tmp_path: Path, bundle: Bundle) -> None:
    Pointer(str(bundle.path)).write(tmp_path)  # what was served last
    with pytest.raises(BundleError, match="no bundle"):
        app.build({"bundle": str(tmp_path / "typo"), "state": str(tmp_path)})
    pointer = Pointer.read(tmp_path)
    assert pointer is not None and pointer.path == str(bundle.path)


def test_a_champion_that_answers_otherwise_leaves_the_one_before(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Bundle) -> None:
        raise BundleError("it recommends otherwise")

    monkeypatch.setattr(app, "resolve", lambda _: bundle.path)
    monkeypatch.setattr(app.golden, "replay", refuse)
    cfg = {"registry": f"sqlite:///{tmp_path}/none.db", "state": str(tmp_path)}
    with pytest.raises(BundleError, match="otherwise"):
        app.build(cfg)
    Pointer("before").write(tmp_path)
    app.build(cfg)
    pointer = Pointer.read(tmp_path)
    assert pointer is not None and pointer.path == "before"


class Followed(Watcher):
    """A Watcher without replicas, of a registry that says `champion`; `faults` keep bundles from a fetch."""

    def __init__(self, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(app.serve, "get_replica_context", lambda: SimpleNamespace(app_name="recsys"))
        monkeypatch.setattr(app, "resolve", self.fetch)
        handle: Any = None
        super().__init__({"registry": f"sqlite:///{state}/none.db", "state": str(state)}, handle, handle)
        self._registry: Any = SimpleNamespace(current=lambda _: self.champion)
        self.champion, self.bundles = "old", state / "bundles"
        self.faults: dict[str, Exception] = {}
        self.fetched: list[str] = []
        Pointer(str(self.bundles / "old")).write(state)

    def fetch(self, _: object) -> Path:
        self.fetched.append(self.champion)
        if self.champion in self.faults:
            raise self.faults[self.champion]
        return self.bundles / self.champion

    async def _everywhere(self, *_: object) -> None: ...

    def _service(self) -> Any: ...

    def _describe_log(self, path: str) -> None: ...


def test_a_champion_that_is_not_whole_is_fetched_once_told_and_tried_again_when_wanted_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Followed(tmp_path, monkeypatch)
    old, new = (str(watcher.bundles / name) for name in ("old", "new"))

    def look(champion: str) -> Pointer | None:
        watcher.champion = champion
        asyncio.run(watcher._look())
        return Pointer.read(tmp_path)

    watcher.faults = {"new": BundleError("items.parquet is missing")}
    assert look("new") == look("new") == Pointer(old, "items.parquet is missing")
    assert watcher.fetched == ["new"]
    assert look("old") == Pointer(old)
    watcher.faults = {}
    assert look("new") == Pointer(new)


def test_the_log_is_written_also_where_the_registry_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WrittenError(Exception):
        """Ends the watcher."""

    def write_log() -> None:
        raise WrittenError

    watcher = Followed(tmp_path, monkeypatch)
    state: Any = SimpleNamespace(write_log=write_log)
    watcher._state, watcher.champion, watcher.faults = state, "new", {"new": RegistryError("down")}
    with pytest.raises(WrittenError):
        asyncio.run(asyncio.wait_for(watcher._follow(), 10))


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_no_request_fails_while_replicas_die_and_champions_change(bundle: Bundle, tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    found = bench_faults.measure(bundle, bundle.seen["user_id"].to_pylist(), tmp_path, least_requests=500)
    assert found["failed"] == 0 and found["requests"] >= 500, found
    assert len(found["bundles"]) == 2, "the former and the new champion, and never the bad one"
    assert "golden answer" in found["faults"]["bad champion"]
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
