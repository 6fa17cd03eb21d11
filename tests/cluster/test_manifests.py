"""Everything under cluster/ against what will read it: KubeRay's definitions, Ray's own schema, our jobs."""

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from recsys_dist.serve.deployments import ServiceConfig

ROOT = Path(__file__).resolve().parent.parent.parent
CLUSTER = ROOT / "cluster"
DEFINITIONS = ROOT.parent / "shared/schemas/kuberay"


def manifests() -> list[tuple[str, dict[str, Any]]]:
    return [
        (file.name, document)
        for file in sorted((CLUSTER / "kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(file.read_text())
    ]


RAY = [(name, document) for name, document in manifests() if document["apiVersion"] == "ray.io/v1"]
CLUSTERS = {"RayCluster": [], "RayJob": ["rayClusterSpec"], "RayService": ["rayClusterConfig"]}
CLUSTERS["RayCronJob"] = ["jobTemplate", "rayClusterSpec"]


def spec_of_cluster(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    for key in CLUSTERS[document["kind"]]:
        spec = spec[key]
    return spec


def test_each_kind_is_there() -> None:
    assert {document["kind"] for _, document in RAY} == set(CLUSTERS)


def definition(kind: str) -> dict[str, Any]:
    file = DEFINITIONS / f"ray.io_{kind.lower()}s.yaml"
    if not file.exists():
        pytest.skip(f"KubeRay's definitions are not here: {DEFINITIONS}")
    versions = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    [schema] = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
    return strict(schema)


def strict(schema: Any) -> Any:
    """Kubernetes drops fields that it does not know without a word; here they are errors."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: strict(value) for key, value in schema.items()}
    properties = copy.get("properties")
    if isinstance(properties, dict) and copy.get("type") == "object":
        copy.setdefault("additionalProperties", bool(copy.get("x-kubernetes-preserve-unknown-fields")))
    return copy


@pytest.mark.parametrize(("name", "document"), RAY, ids=[name for name, _ in RAY])
def test_kuberay_takes_the_manifest(name: str, document: dict[str, Any]) -> None:
    del name
    jsonschema.validate(document, definition(document["kind"]), jsonschema.Draft202012Validator)


def test_the_check_sees_a_misspelt_field() -> None:
    [document] = [document for _, document in RAY if document["kind"] == "RayCluster"]
    wrong = json.loads(json.dumps(document))
    wrong["spec"]["autoscalerOptions"]["idleTimeout"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idleTimeout"):
        jsonschema.validate(wrong, definition("RayCluster"), jsonschema.Draft202012Validator)


@pytest.mark.parametrize(("name", "document"), RAY, ids=[name for name, _ in RAY])
def test_clusters_ask_for_a_token_scale_and_run_the_ray_that_is_pinned(
    name: str, document: dict[str, Any]
) -> None:
    del name
    spec = spec_of_cluster(document)
    assert spec["authOptions"]["mode"] == "token" and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["rayVersion"] == ray.__version__
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert "cpu" in groups and ("gpu" in groups) == (document["kind"] != "RayService")
    for group in [spec["headGroupSpec"], *groups.values()]:
        [container] = group["template"]["spec"]["containers"]
        is_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"].endswith(":cuda" if is_gpu else ":cpu")
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/recsys"}
    claims = {d["metadata"]["name"] for _, d in manifests() if d["kind"] == "PersistentVolumeClaim"}
    used = re.findall(r"claimName: (\w+)", yaml.safe_dump(document))
    assert set(used) <= claims


def entrypoints() -> Iterator[tuple[str, list[str]]]:
    for _, document in RAY:
        spec = document["spec"].get("jobTemplate", document["spec"])
        for command in re.split(r"[;']", spec.get("entrypoint", "").replace("$recipe", "wide_deep")):
            words = shlex.split(command)
            if words[:2] == ["python", "-m"]:
                yield words[2], words[3:]


@pytest.mark.parametrize(("module", "argv"), list(entrypoints()), ids=lambda value: str(value)[:20])
def test_entrypoints_are_jobs_with_settings_that_they_know(
    module: str, argv: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "log.yaml"
    columns = "{user_id: u, item_id: i, timestamp: t, labels: {click: c}}"
    log.write_text(f"kind: parquet\nevents: events/\ncolumns: {columns}\n")
    (tmp_path / "events").mkdir()
    argv = [str(log) if word.endswith("log.yaml") else word for word in argv]
    job = importlib.import_module({"jobs.train": "jobs.recipes"}.get(module, module))
    job.parse(argv)  # raises for what it does not know


def test_the_service_is_ours_with_settings_that_it_knows() -> None:
    [document] = [document for _, document in RAY if document["kind"] == "RayService"]
    served = yaml.safe_load(document["spec"]["serveConfigV2"])
    ray_serve_schema = importlib.import_module("ray.serve.schema")
    ray_serve_schema.ServeDeploySchema.model_validate(served)
    [application] = served["applications"]
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    cfg = ServiceConfig.parse(application["args"])
    ports = {d["metadata"]["name"]: d["spec"]["ports"] for _, d in manifests() if d["kind"] == "Service"}
    assert ports == {"mlflow": [{"port": 5000}], "valkey": [{"port": 6379}]}
    assert cfg.registry == "http://mlflow:5000" and cfg.state.startswith("/recsys/")
    assert cfg.state_url == "redis://valkey:6379/0", "pods of several machines cannot share an SQLite file"


def test_ray_takes_the_launcher_file() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    config = yaml.safe_load((CLUSTER / "cloud.yaml").read_text())
    jsonschema.validate(config, schema)
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert config["head_node_type"] in config["available_node_types"]


def test_the_image_is_built_from_what_is_there() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()]
    assert "requirements" in copied and all((ROOT / name).exists() for name in copied)
    sent = (CLUSTER / "Dockerfile.dockerignore").read_text()
    assert all(f"!{name}\n" in sent for name in copied)
    assert "useradd" in text and re.search(r"^USER ray$", text, re.M)
    images = {c["image"] for _, d in manifests() for c in containers(d)}
    assert images == {"recsys-dist:cpu", "recsys-dist:cuda", "valkey/valkey:8.1.9"}


def containers(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield from node.get("containers", [])
        for value in node.values():
            yield from containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


def test_links_and_files_that_the_readme_names_exist() -> None:
    text = (CLUSTER / "README.md").read_text()
    for name in set(re.findall(r"cluster/[\w./-]+\.(?:yaml|sh)|cluster/Dockerfile", text)):
        assert (ROOT / name).exists(), name
