"""Frozen configs: a typo is an error that names the nearest key; overrides are validated anew."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from recsys_dist.errors import ConfigError

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # int64, which PyTorch takes


class Config(BaseModel):
    """Base of every config: immutable, unknown keys refused, errors in the project's own words."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_number_is_true(cls, values: Any) -> Any:
        """YAML has `on`, `no` and `false`, of which pydantic would make 1 and 0."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and not _may_be(bool, field.annotation):
                raise ValueError(f"{name} cannot be {str(value).lower()}")
        return values

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """Build from plain data; raises ConfigError that names each wrong key, value and limit."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(error, cls)) from None

    def override(self, assignments: list[str]) -> Self:
        """Apply `dotted.key=value` strings (values are YAML) and validate the result as a whole."""
        values = self.model_dump(mode="json")
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise ConfigError(f"override {assignment!r} is not of the form key=value")
            _assign(values, key.strip(), parse_yaml(text, where=assignment))
        return type(self).parse(values)

    def digest(self) -> str:
        """First 16 hex digits of the sha256 of the canonical JSON: equal configs, equal digests."""
        return digest(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """The whole config as YAML that `load_yaml` and `parse` read back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def digest(value: Any) -> str:
    """First 16 hex digits of the sha256 of JSON-serialisable `value`, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; raises ConfigError where the file is missing, malformed or no mapping."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from None
    values = parse_yaml(text, where=str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"config file {str(path)!r} holds {type(values).__name__}, not key: value lines")
    return values


def rng_for(seed: int, *key: str | int) -> np.random.Generator:
    """An independent random stream for a purpose: `rng_for(seed, "shuffle", epoch)`.

    The same arguments give the same stream on every machine and in every process.
    """
    text = json.dumps([seed, *key]).encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:16], "big"))


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?`, or the list of what is known where nothing is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def parse_yaml(text: str, where: str) -> Any:
    """What YAML `text` says; a ConfigError of one line that names `where` it stands."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2022-13-01 is no date
        said = " ".join(str(error).split())  # YAML's own has lines
        raise ConfigError(f"{where}: not valid YAML: {said}") from None


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    node: Any = values
    for part in parents:
        if not isinstance(node, dict) or part not in node:
            known = list(node) if isinstance(node, dict) else []
            raise ConfigError(f"override {key!r}: no setting {part!r}{nearest(part, known)}")
        node = node[part]
    if not isinstance(node, dict):
        raise ConfigError(f"override {key!r}: {'.'.join(parents)!r} has no settings below it")
    node[leaf] = value  # a key that does not exist is refused, with the nearest, by validation


def _explain(error: ValidationError, cls: type[BaseModel]) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _known_keys(cls, problem["loc"][:-1])
            lines.append(f"unknown setting {where!r}{nearest(str(problem['loc'][-1]), known)}")
        elif isinstance(own := problem.get("ctx", {}).get("error"), ConfigError):
            lines.append(f"setting {where!r}: {own}")  # in our words already, with what was given
        else:
            whole = problem["type"] == "missing" or isinstance(problem["input"], dict)
            given = "" if whole else f" (given: {problem['input']!r:.80})"
            said = problem["msg"].removeprefix("Value error, ")
            lines.append(f"setting {where or cls.__name__!r}: {said}{given}")
    return "; ".join(lines)


def _may_be(kind: type, annotation: Any) -> bool:
    """Whether a field's annotation names `kind`, or anything at all."""
    return annotation in (kind, Any) or any(_may_be(kind, arg) for arg in getattr(annotation, "__args__", ()))


def _known_keys(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names at `path` below `cls`, following nested models and tagged unions."""
    models: list[type[BaseModel]] = [cls]
    for part in path:
        below: list[type[BaseModel]] = []
        for model in models:
            field = model.model_fields.get(str(part))
            if field is not None:
                below += _models_in(field.annotation)
        models = below or models  # a union's tag in the path names no field: stay where we are
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _models_in(arg)]
