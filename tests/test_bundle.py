"""A bundle is whole and is what was exported, or is refused by name."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch

from recsys_dist import manifest
from recsys_dist.bundle import Bundle
from recsys_dist.config import digest
from recsys_dist.data.collate import collate
from recsys_dist.data.examples import World, features
from recsys_dist.errors import BundleError
from recsys_dist.manifest import MANIFEST
from recsys_dist.serve import golden
from recsys_dist.train.checkpoint import load_for_inference
from tests.conftest import Pair
from tests.train.ranks import _forked


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return shutil.copytree(bundle.path, tmp_path / "bundle")


@pytest.mark.parametrize("task", ["recall", "ranking"])
def test_an_opened_model_answers_as_its_checkpoint_does(bundle: Bundle, pair: Pair, task: str) -> None:
    opened = Bundle.open(bundle.path)
    world = World(opened.encoders, opened.users, opened.items)
    made = features(opened.events, world, np.arange(len(opened.events)))
    served = getattr(opened, task)
    batch = collate(pa.table(made), served.schema)
    model, _ = load_for_inference(pair.checkpoints[task])
    with torch.no_grad():
        torch.testing.assert_close(served.model(batch), model(batch), rtol=0, atol=0)
        if task == "recall":
            np.testing.assert_array_equal(opened.item_vectors, model.item_vectors().numpy())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in served.model.parameters())


def test_an_opened_bundle_is_the_one_that_was_saved(bundle: Bundle, pair: Pair) -> None:
    opened = Bundle.open(bundle.path)
    assert opened.manifest == bundle.manifest and opened.golden == bundle.golden
    assert opened.encoders.digest() == pair.prepared.encoders.digest()
    for name in ("events", "seen"):
        assert getattr(opened, name).equals(getattr(bundle, name))
    for name in ("users", "items"):
        assert getattr(opened, name).attributes.equals(getattr(bundle, name).attributes)
    assert opened.item_ids.to_pylist() == pair.prepared.items["item_id"].to_pylist()
    counts = dict(zip(range(1, len(opened.positives)), opened.positives[1:].tolist(), strict=True))
    assert opened.popular.tolist() == sorted(counts, key=lambda row: (-counts[row], row))
    assert opened.popular.dtype == np.int32


def test_nothing_in_it_is_a_pickle(bundle: Bundle) -> None:
    kinds = {file.suffix for file in bundle.path.rglob("*") if file.is_file()}
    assert kinds == {".json", ".md", ".parquet", ".safetensors"}


def test_every_changed_byte_is_found_and_named(copy: Path) -> None:
    files = sorted(file for file in copy.rglob("*") if file.is_file())
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        changed = bytearray(content)
        place = content.index(b'"auc"') + 7 if file.name == MANIFEST else len(content) // 2
        changed[place] = changed[place] ^ 1
        file.write_bytes(changed)
        with pytest.raises(BundleError, match=file.relative_to(copy).as_posix().replace(".", r"\.")):
            Bundle.open(copy)
        file.write_bytes(content)
    Bundle.open(copy)


def edit(directory: Path, **changes: Any) -> None:
    """Rewrite the manifest as a careless program might, with a right checksum."""
    values = json.loads((directory / MANIFEST).read_text())
    values.pop("checksum")
    values |= changes
    (directory / MANIFEST).write_text(json.dumps({**values, "checksum": digest(values)}))


def without_bias(directory: Path) -> None:
    weights = safetensors.torch.load_file(directory / "ranking.safetensors")
    weights.pop(next(name for name in weights if name.endswith("bias")))
    safetensors.torch.save_file(weights, directory / "ranking.safetensors")
    manifest.read(directory).sealed(manifest.entries(directory)).save(directory)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "events.parquet").unlink(), "events.parquet is missing"),
        (lambda d: (d / "users.parquet").write_bytes(b"PAR1"), "users.parquet has 4 bytes instead of"),
        (lambda d: (d / MANIFEST).unlink(), f"is no bundle: it has no {MANIFEST}"),
        (lambda d: (d / MANIFEST).write_text("{"), "manifest.json' cannot be read: JSONDecodeError"),
        (lambda d: (d / MANIFEST).write_text("3"), "manifest.json' cannot be read"),
        (lambda d: edit(d, format=2), "is of format 2, this program reads format 1"),
        (lambda d: edit(d, schema_digest="0123"), "schema_digest is '0123' here"),
        (lambda d: edit(d, vocabulary_digest="0123"), "vocabulary_digest is '0123' here"),
        (lambda d: edit(d, version="0123"), "version '0123' is not that of its files"),
        (lambda d: edit(d, metric={}), "unknown setting 'metric'; did you mean 'metrics'"),
        (without_bias, r"ranking.safetensors: .*Missing key\(s\).*bias"),
    ],
)
def test_what_does_not_agree_is_named(copy: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(copy)
    with pytest.raises(BundleError, match=said):
        Bundle.open(copy)


def test_models_in_each_others_place_are_refused(copy: Path) -> None:
    models = manifest.read(copy).models
    edit(copy, models={"recall": models["ranking"], "ranking": models["recall"]})
    with pytest.raises(BundleError, match="task of model 'wide_deep' is 'recall' here and 'ranking' there"):
        Bundle.open(copy)


def test_the_same_again_leaves_what_is_there(bundle: Bundle, tmp_path: Path) -> None:
    first = bundle.save(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in first.path.rglob("*")}
    assert first.path == tmp_path / bundle.manifest.version
    assert bundle.save(tmp_path).manifest == first.manifest
    assert {file: file.stat().st_mtime_ns for file in first.path.rglob("*")} == before
    (first.path / "seen.parquet").unlink()
    Bundle.open(bundle.save(tmp_path).path)  # damaged, it is written anew


def test_golden_answers_come_from_what_was_written(bundle: Bundle, tmp_path: Path) -> None:
    def answers(opened: Bundle) -> list[dict[str, Any]]:
        return [{"version": opened.manifest.version, "items": opened.popular[:3].tolist()}]

    saved = bundle.save(tmp_path, golden=answers)
    assert saved.golden == [{"version": bundle.manifest.version, "items": bundle.popular[:3].tolist()}]
    assert Bundle.open(saved.path).golden == saved.golden


def test_a_bundle_whose_golden_answers_no_longer_hold_is_written_anew(bundle: Bundle, tmp_path: Path) -> None:
    cases = golden.ask(bundle)
    wrong = [{**case, "answer": case["answer"][::-1]} for case in cases]
    assert bundle.save(tmp_path, lambda _: wrong).golden == wrong
    saved = bundle.save(tmp_path, golden.ask, golden.replay)
    golden.replay(Bundle.open(saved.path))
    inode = saved.path.stat().st_ino
    assert bundle.save(tmp_path, golden.ask, golden.replay).path.stat().st_ino == inode, "and once only"


def test_parts_that_do_not_agree_leave_nothing(bundle: Bundle, tmp_path: Path) -> None:
    shorter = replace(bundle, item_vectors=bundle.item_vectors[:-1])
    with pytest.raises(BundleError, match=r"rows of the item table is \d+ here and \d+ there"):
        shorter.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def save_and_die(source: Path, root: Path) -> None:
    Bundle.open(source).save(root, golden=lambda _: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.ranks
def test_killed_while_writing_leaves_no_bundle_and_the_next_clears_up(bundle: Bundle, tmp_path: Path) -> None:
    process = _forked.Process(target=save_and_die, args=(bundle.path, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    [left] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert left.name.startswith(".")
    saved = bundle.save(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [saved.path]
    Bundle.open(saved.path)
