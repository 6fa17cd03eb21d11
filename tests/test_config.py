from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from recsys_dist.config import Config, digest, load_yaml, nearest, rng_for
from recsys_dist.errors import ConfigError


class Small(Config):
    kind: Literal["small"] = "small"
    width: int = Field(8, ge=1)


class Large(Config):
    kind: Literal["large"] = "large"
    widths: tuple[int, ...] = (64, 32)


class Train(Config):
    epochs: int = Field(2, ge=1)
    learning_rate: float = 0.1


class Job(Config):
    train: Train = Train()
    model: Annotated[Small | Large, Field(discriminator="kind")] = Small()
    name: str | None = None


def test_override_reaches_nested_settings_and_reads_yaml() -> None:
    job = Job().override(["train.epochs=3", "train.learning_rate=1e-3", "name=null"])
    assert (job.train.epochs, job.train.learning_rate, job.name) == (3, 0.001, None)
    assert Job().override(["model={kind: large, widths: [8, 4]}"]).model == Large(widths=(8, 4))


def test_override_leaves_the_original_alone() -> None:
    job = Job()
    job.override(["train.epochs=3"])
    assert job.train.epochs == 2


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epoch=3", "unknown setting 'train.epoch'; did you mean 'epochs'?"),
        ("trian.epochs=3", "no setting 'trian'; did you mean 'train'?"),
        ("train.epochs=0", r"setting 'train.epochs': .*greater than or equal to 1 \(given: 0\)"),
        ("train.epochs=many", r"'train.epochs'.*valid integer.*\(given: 'many'\)"),
        ("train.epochs=no", "setting 'train': epochs cannot be false$"),
        ("train.learning_rate=on", "setting 'train': learning_rate cannot be true$"),
        ("train.epochs", "not of the form key=value"),
        ("train.epochs.first=1", "'train.epochs' has no settings below it"),
        ("train=[", "not valid YAML"),
        ("model.widht=3", "did you mean 'width'?"),
    ],
)
def test_a_wrong_override_names_the_thing_and_the_way_out(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Job().override([assignment])


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs.*; .*colour") as caught:
        Job.parse({"train": {"epochs": 0}, "colour": "red"})
    assert "known: model, name, train" in str(caught.value)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Job().name = "x"  # type: ignore[misc]


def test_yaml_round_trip_and_digest(tmp_path: Path) -> None:
    job = Job(model=Large(widths=(3, 2, 1)), name="a: b")
    path = tmp_path / "job.yaml"
    path.write_text(job.to_yaml())
    again = Job.parse(load_yaml(path))
    assert again == job
    assert again.digest() == job.digest() != Job().digest()


def test_digest_ignores_key_order_only() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})
    # sha256 of {"a":1}, computed with `printf '{"a":1}' | sha256sum`
    assert digest({"a": 1}) == "015abd7f5cc57a2d"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "holds list"),
        (b"a: [", "not valid YAML"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot"),
    ],
)
def test_an_unusable_config_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "job.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(path)
    assert "job.yaml" in str(caught.value)


def test_nearest_lists_what_is_known_where_nothing_is_near() -> None:
    assert nearest("epoch", ["epochs", "seed"]) == "; did you mean 'epochs'?"
    assert nearest("zzz", ["seed", "epochs"]) == "; known: epochs, seed"


def test_streams_repeat_by_key_and_differ_between_keys() -> None:
    def first(*key: str | int) -> int:
        return int(rng_for(7, *key).integers(1 << 62))

    assert first("shuffle", 1) == first("shuffle", 1)
    keys: list[tuple[str | int, ...]] = [
        ("shuffle", 1),
        ("shuffle", 2),
        ("shuffle", "1"),
        ("init", 1),
        ("shuffle1",),
    ]
    assert len({first(*key) for key in keys}) == len(keys)
    assert int(rng_for(8, "shuffle", 1).integers(1 << 62)) != first("shuffle", 1)


@given(st.integers(0, 2**63 - 1), st.lists(st.one_of(st.text(max_size=8), st.integers(-5, 5)), max_size=3))
def test_any_key_gives_a_repeatable_stream(seed: int, key: list[str | int]) -> None:
    np.testing.assert_array_equal(rng_for(seed, *key).random(3), rng_for(seed, *key).random(3))
