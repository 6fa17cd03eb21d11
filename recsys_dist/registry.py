"""Bundles in MLflow's model registry: publish, promote, roll back, and find the champion again.

A version enters the registry only after all its files were uploaded, fetched again and verified; the alias
`champion` moves last, in one step. Interrupted anywhere, the old champion stands, and the same command
again goes on. Which versions were champions, in order, is a tag of the registered model.
"""

import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import mlflow.artifacts
from mlflow.entities import Metric, Param
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from pydantic import AfterValidator, Field

from recsys_dist import manifest
from recsys_dist.config import Config
from recsys_dist.delivery import (
    TROUBLE,
    experiment_id,
    one_writer,
    prepare_mlflow,
    short_reason,
    sqlite_path,
)
from recsys_dist.errors import BundleError, RegistryError
from recsys_dist.gates import Gate, GateConfig, Metrics, judge, report, same_days
from recsys_dist.manifest import GOLDEN, MANIFEST, Manifest
from recsys_dist.outbox import of_known_scheme, without_credentials

log = logging.getLogger(__name__)

CHAMPION, CHALLENGER = "champion", "challenger"
_BUNDLE, _CHAMPIONS, _GATES = "bundle", "champions", "gates"  # tags
_LONGEST_TAG = 4_000

Measure = Callable[[Path], Metrics]  # a former champion's bundle -> its figures on the new test days


class RegistryConfig(Config):
    """Which registry. Credentials go into MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN."""

    uri: Annotated[str, AfterValidator(of_known_scheme)] = Field(
        description="as in sqlite:///runs/quickstart/mlflow.db or http://host:5000"
    )
    model: str = Field("recsys_dist", min_length=1, description="name of the registered model")
    experiment: str = "recsys_dist"
    request_timeout_s: int = Field(60, ge=1, description="of one call; a large file is one call")


@dataclass(frozen=True)
class Entry:
    """A registered version: `number` is the registry's, `bundle` the bundle's own."""

    number: str
    bundle: str
    aliases: tuple[str, ...]
    created_ms: int
    gates: str


@dataclass(frozen=True)
class Publication:
    """What became of a published bundle: it is champion, or challenger for the gates that failed."""

    entry: Entry
    gates: list[Gate]


class Registry:
    """One registered model. Every method raises RegistryError where the registry does not answer."""

    def __init__(self, cfg: RegistryConfig) -> None:
        prepare_mlflow(cfg.request_timeout_s)
        os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        self.cfg = cfg

    @cached_property
    def _client(self) -> MlflowClient:
        """Made when first used: it creates an SQLite file that is not there."""
        return MlflowClient(tracking_uri=self.cfg.uri, registry_uri=self.cfg.uri)

    def publish(
        self, directory: Path, gates: GateConfig | None = None, measure: Measure | None = None
    ) -> Publication:
        """Upload a bundle, verify it there, judge it, and move an alias: champion or challenger.

        `measure` gives the present champion's figures on the bundle's test days, where its own are of
        other days; without it such a champion is not replaced.
        """
        candidate = manifest.verify(directory)
        with self._asked(make=True), one_writer(self.cfg.uri):
            version = self._registered(candidate) or self._upload(directory, candidate)
            champion = self._champion()
            if champion is not None and champion.tags.get(_BUNDLE) == candidate.version:
                if champion.version != version.version:  # the same, that was not whole any more
                    former = self._champions()[:-1]
                    self._alias(CHAMPION, version)  # first: the list follows the alias, see _champions
                    self._remember([*former, str(version.version)])
                return Publication(self._entry(version), [])
            judged = self._judge(candidate, champion, gates or GateConfig(), measure)
            self._tag(version, _GATES, report(judged))
            if all(gate.passed for gate in judged):
                self._crown(version)
            else:
                self._alias(CHALLENGER, version)
            return Publication(self._entry(version), judged)

    def promote(self, which: str) -> Entry:
        """Make a version champion whatever its gates said: a number, a bundle's version or an alias."""
        with self._asked(), one_writer(self.cfg.uri):
            version = self._find(which)
            self._refuse_damaged(version)
            self._crown(version)
            return self._entry(version)

    def rollback(self) -> Entry:
        """Make the champion before the present one champion again."""
        with self._asked(), one_writer(self.cfg.uri):
            champions = self._champions()
            if len(champions) < 2:
                raise RegistryError(f"{self.cfg.model!r} has had no champion before the present one")
            version = self._find(champions[-2])
            self._refuse_damaged(version)
            self._alias(CHAMPION, version)  # first: the list follows the alias, see _champions
            self._remember(champions[:-1])
            return self._entry(version)

    def entries(self) -> list[Entry]:
        """Every version, newest first."""
        with self._asked():
            found = self._client.search_model_versions(f"name = '{self.cfg.model}'")
            return sorted(map(self._entry, found), key=lambda entry: int(entry.number), reverse=True)

    def current(self, which: str = CHAMPION) -> str:
        """The version of the bundle that `which` (alias, number or bundle version) stands for: one call."""
        with self._asked():
            return self._find(which).tags[_BUNDLE]

    def resolve(self, which: str, cache: Path) -> Path:
        """A verified local copy of a bundle, below `cache`; what is there and whole is not fetched again.

        Where the registry does not answer, what `which` stood for last, if that is in the cache.
        """
        last = cache / f"{which}.last"
        try:
            with self._asked():
                version = self._find(which)
                path = self._fetched(version, cache)
        except RegistryError as error:
            path = cache / last.read_text() if last.is_file() else cache / which
            if not (path / MANIFEST).is_file():
                raise
            log.warning("%s; going on with bundle %s, which %s was last", error, path.name, which)
            manifest.verify(path)
            return path
        fresh = last.with_name(f"{last.name}.{uuid.uuid4().hex[:8]}")
        fresh.write_text(path.name)
        fresh.replace(last)
        return path

    @contextmanager
    def _asked(self, make: bool = False) -> Iterator[None]:
        database = sqlite_path(self.cfg.uri)
        if database is not None and not database.is_file() and not make:
            raise RegistryError(f"there is no registry {str(database)!r}; train or export something first")
        try:
            yield
        except TROUBLE as error:
            where = without_credentials(self.cfg.uri)
            raise RegistryError(f"the registry at {where} failed: {short_reason(error)}") from None

    def _model(self) -> RegisteredModel | None:
        try:
            return self._client.get_registered_model(self.cfg.model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _champion(self) -> ModelVersion | None:
        model = self._model()
        number = model.aliases.get(CHAMPION) if model else None
        return self._client.get_model_version(self.cfg.model, str(number)) if number else None

    def _find(self, which: str) -> ModelVersion:
        model = self._model()
        number = model.aliases.get(which) if model else None
        if number is not None:
            return self._client.get_model_version(self.cfg.model, str(number))
        found = self._client.search_model_versions(f"name = '{self.cfg.model}'") if model else []
        for version in found:
            if which in (str(version.version), version.tags.get(_BUNDLE)):
                return version
        known = ", ".join(f"{v.version} ({v.tags.get(_BUNDLE)})" for v in found) or "nothing yet"
        raise RegistryError(
            f"registered model {self.cfg.model!r} has no version or alias {which!r}; it has: {known}"
        )

    def _registered(self, candidate: Manifest) -> ModelVersion | None:
        """The newest version that has the bundle; None where it is no longer whole, or has other figures.

        Golden answers and figures are no part of a bundle's version: they may have been made anew.
        """
        bundle = candidate.version
        found = self._client.search_model_versions(
            f"name = '{self.cfg.model}' and tags.{_BUNDLE} = '{bundle}'"
        )
        version = max(found, key=lambda version: int(version.version), default=None)
        if version is None:
            return None
        try:
            there = self._verified(version)
        except (BundleError, *TROUBLE) as error:
            log.warning(
                "version %s is not whole, uploading it anew: %s", version.version, short_reason(error)
            )
            return None
        if (there.files.get(GOLDEN), there.metrics) != (candidate.files.get(GOLDEN), candidate.metrics):
            log.warning("version %s has other golden answers or figures, uploading it anew", version.version)
            return None
        return version

    def _verified(self, version: ModelVersion) -> Manifest:
        """Of what the registry has of a version, downloaded for it."""
        with tempfile.TemporaryDirectory() as folder:
            return manifest.read(self._download(str(version.source), Path(folder), version.tags[_BUNDLE]))

    def _refuse_damaged(self, version: ModelVersion) -> None:
        try:
            self._verified(version)
        except BundleError as error:
            raise RegistryError(f"version {version.version} is not whole in the registry: {error}") from None

    def _upload(self, directory: Path, facts: Manifest) -> ModelVersion:
        experiment = experiment_id(self._client, self.cfg.uri, self.cfg.experiment)
        run = self._client.create_run(experiment, run_name=f"export-{facts.version}").info.run_id
        status = "FAILED"
        try:
            model = self._client.create_logged_model(
                experiment, f"bundle-{facts.version}", run, {_BUNDLE: facts.version}, model_type="recommender"
            )
            self._client.log_model_artifacts(model.model_id, str(directory))
            with tempfile.TemporaryDirectory() as folder:
                self._download(model.artifact_location, Path(folder), facts.version)
            self._client.finalize_logged_model(model.model_id, "READY")
            self._tell(run, model.model_id, facts)
            if self._model() is None:
                self._client.create_registered_model(self.cfg.model)
            version = self._client.create_model_version(
                self.cfg.model,
                source=model.artifact_location,  # `models:/` is looked up in the process's default store
                run_id=run,
                tags={_BUNDLE: facts.version},
                await_creation_for=0,
                model_id=model.model_id,
            )
            status = "FINISHED"
        finally:
            self._client.set_terminated(run, status)
        return version

    def _tell(self, run: str, model_id: str, facts: Manifest) -> None:
        """The bundle's figures, at the run that exported it and at the model."""
        now_ms = time.time_ns() // 1_000_000
        metrics = [
            Metric(f"test/{task}/{scorer}/{name.replace('@', '_at_')}", value, now_ms, 0, model_id=model_id)
            for task, scorers in facts.metrics.items()
            for scorer, values in scorers.items()
            for name, value in values.items()
        ]
        index = Metric("index/recall_at_200", facts.index.recall_at_200, now_ms, 0, model_id=model_id)
        told = {"bundle": facts.version, "data": facts.data.data_digest, "git_commit": facts.git_commit}
        told |= {f"checkpoint.{task}": path for task, path in facts.checkpoints.items()}
        self._client.log_batch(run, [*metrics, index], [Param(key, value) for key, value in told.items()])

    def _judge(
        self, candidate: Manifest, champion: ModelVersion | None, cfg: GateConfig, measure: Measure | None
    ) -> list[Gate]:
        if champion is None:
            return judge(candidate, None, cfg)
        measured, former = None, self._manifest(champion)
        if measure is not None and not same_days(candidate, former):
            with tempfile.TemporaryDirectory() as folder:
                measured = measure(self._fetched(champion, Path(folder)))
        return judge(candidate, former, cfg, measured)

    def _manifest(self, version: ModelVersion) -> Manifest:
        with tempfile.TemporaryDirectory() as folder:
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"{version.source}/{MANIFEST}", dst_path=folder, tracking_uri=self.cfg.uri
            )
            return manifest.read(Path(folder))

    def _fetched(self, version: ModelVersion, cache: Path) -> Path:
        bundle = version.tags.get(_BUNDLE, "")
        if not re.fullmatch("[0-9a-f]{16}", bundle):  # it names a directory here
            raise RegistryError(
                f"version {version.version} of {self.cfg.model!r} holds no bundle, but {bundle!r}"
            )
        path = cache / bundle
        if path.is_dir():
            try:
                if self._answers_as(version, manifest.verify(path)):
                    return path
                log.info("the registry has other golden answers of bundle %s; fetching it anew", bundle)
            except BundleError as error:
                log.warning("%s; fetching it anew", error)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=cache) as folder:
            fetched = self._download(str(version.source), Path(folder), path.name)
            if path.is_dir():
                shutil.rmtree(path)  # only now: until then it may be all that there is
            try:
                fetched.rename(path)
            except OSError:  # another process of this machine was quicker
                manifest.verify(path)
        return path

    def _answers_as(self, version: ModelVersion, copy: Manifest) -> bool:
        try:
            return self._manifest(version).files.get(GOLDEN) == copy.files.get(GOLDEN)
        except (BundleError, *TROUBLE):  # what is there cannot be read, and the copy is whole
            return True

    def _download(self, location: str, folder: Path, bundle: str) -> Path:
        """The bundle at `location`, verified."""
        asked: dict[str, Any] = {"artifact_uri": location, "tracking_uri": self.cfg.uri}
        try:
            fetched = Path(mlflow.artifacts.download_artifacts(dst_path=str(folder), **asked))
        except TROUBLE:
            if mlflow.artifacts.list_artifacts(**asked):
                raise
            raise BundleError(
                f"all files of bundle {bundle} are gone from the registry; publish it anew"
            ) from None
        found = manifest.verify(fetched).version
        if found != bundle:
            raise BundleError(f"the registry gives bundle {found} for {bundle}; publish it anew")
        return fetched

    def _crown(self, version: ModelVersion) -> None:
        champions = self._champions()
        if champions[-1:] != [str(version.version)]:
            self._remember([*champions, str(version.version)])
        self._alias(CHAMPION, version)
        model = self._model()
        if model is not None and str(model.aliases.get(CHALLENGER)) == str(version.version):
            self._client.delete_registered_model_alias(self.cfg.model, CHALLENGER)

    def _champions(self) -> list[str]:
        """Numbers of all champions, the present one last.

        The alias is the truth: what stands behind it in the tag was about to be, or is no longer.
        """
        model = self._model()
        number = str(model.aliases.get(CHAMPION, "")) if model else ""
        listed = [n for n in (model.tags.get(_CHAMPIONS, "") if model else "").split(",") if n]
        if not number:
            return []
        if number not in listed:
            return [*listed, number]
        return listed[: len(listed) - listed[::-1].index(number)]

    def _remember(self, champions: list[str]) -> None:
        self._client.set_registered_model_tag(self.cfg.model, _CHAMPIONS, ",".join(champions))

    def _alias(self, alias: str, version: ModelVersion) -> None:
        self._client.set_registered_model_alias(self.cfg.model, alias, str(version.version))

    def _tag(self, version: ModelVersion, key: str, value: str) -> None:
        self._client.set_model_version_tag(self.cfg.model, str(version.version), key, value[:_LONGEST_TAG])

    def _entry(self, version: ModelVersion) -> Entry:
        number = str(version.version)
        fresh = self._client.get_model_version(self.cfg.model, number)
        model = self._model()
        aliases = model.aliases if model else {}
        return Entry(
            number,
            fresh.tags.get(_BUNDLE, ""),
            tuple(sorted(name for name, of in aliases.items() if str(of) == number)),
            fresh.creation_timestamp,
            fresh.tags.get(_GATES, ""),
        )
