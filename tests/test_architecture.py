"""The floor plan holds: who imports whom, one door per heavy dependency, sizes, no machine's paths."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("recsys_dist", "jobs")

DOORS = {  # dependency: the only modules that may name it
    "ray.data": ("recsys_dist.data.pipeline", "recsys_dist.data.tasks", "recsys_dist.data.feed"),
    "ray.tune": ("recsys_dist.tune.sweep",),
    "optuna": ("recsys_dist.tune.space",),
    "ray.serve": ("recsys_dist.serve.app", "recsys_dist.serve.deployments"),
    "mlflow": ("recsys_dist.delivery", "recsys_dist.registry"),
    "faiss": ("recsys_dist.index",),
    "redis": ("recsys_dist.serve.redis_state",),
    "fbgemm_gpu": ("recsys_dist.train.kernels",),
    # the other is what we are measured by: a loop that has nothing of ours
    "torchrec.distributed": (
        "recsys_dist.train.sharding",
        "recsys_dist.train.placement",
        "recsys_dist.train.sharders",
        "recsys_dist.train.ahead",
        "jobs.bench_sides.torchrec_alone",
    ),
}
IMPORTED_LATE = (  # Matplotlib and MLflow: together more than a second of every job's start
    "recsys_dist/plots.py:svg",
    "recsys_dist/tracking.py:_deliver",
)
NEITHER_RAY_NOR_MLFLOW = (
    "recsys_dist.models",
    "recsys_dist.batch",
    "recsys_dist.metrics",
    "recsys_dist.schema",
    "recsys_dist.feature_kinds",
    "recsys_dist.config",
    "recsys_dist.outbox",
    "recsys_dist.train.loop",
    "recsys_dist.train.optim",
    "recsys_dist.data.transforms",
    "recsys_dist.serve.recommend",
)
LONGEST_FILE_LINES, LONGEST_FUNCTION_LINES, MOST_PARAMETERS = 400, 60, 6


def python_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def inside(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def test_layers_import_downward_only() -> None:
    command = [
        Path(sys.executable).with_name("lint-imports"),
        "--no-cache",
        "--no-logo",
    ]  # it changes logging
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pure_modules_reach_neither_ray_nor_mlflow() -> None:
    graph = grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)
    for module in filter(lambda name: inside(name, NEITHER_RAY_NOR_MLFLOW), sorted(graph.modules)):
        for heavy in {"ray", "mlflow"} & graph.modules:
            chain = graph.find_shortest_chain(importer=module, imported=heavy)
            assert chain is None, " -> ".join(chain or ())


@pytest.mark.parametrize("dependency", DOORS)
def test_one_door_per_heavy_dependency(dependency: str) -> None:
    for path in python_files():
        if not inside(module_name(path), DOORS[dependency]):
            for name, line in names_in(ast.parse(path.read_text())):
                assert not inside(name, (dependency,)), (
                    f"{path.relative_to(ROOT)}:{line} names {name}; only {DOORS[dependency]} may"
                )


def names_in(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every module that the code imports, at the top, in a function or by name, and every dotted use."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((alias.name, node.lineno) for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module, node.lineno
                yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
            case ast.Attribute():
                yield ast.unparse(node), node.lineno
            case ast.Call(func=func, args=[ast.Constant(value=str(module)), *_]) if "import" in ast.unparse(
                func
            ):
                yield module, node.lineno


def test_the_scan_sees_every_way_in() -> None:
    ways = [
        "import mlflow",
        "from mlflow import MlflowClient",
        "def f():\n    import mlflow.tracking",
        "import importlib\nimportlib.import_module('mlflow')",
        "__import__('mlflow')",
    ]
    for way in [*ways, "mlflow.log_metric('a', 1)"]:
        assert any(inside(name, ("mlflow",)) for name, _ in names_in(ast.parse(way))), way
    dotted = "import ray\nray.data.read_parquet('x')"
    assert any(inside(name, ("ray.data",)) for name, _ in names_in(ast.parse(dotted)))
    assert any(inside(name, ("ray.data",)) for name, _ in names_in(ast.parse("from ray import data")))


def test_files_and_functions_stay_small() -> None:
    for path in python_files():
        text = path.read_text()
        where = path.relative_to(ROOT)
        assert len(text.splitlines()) <= LONGEST_FILE_LINES, (
            f"{where} is longer than {LONGEST_FILE_LINES} lines"
        )
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count = sum(1 for argument in arguments if argument.arg not in ("self", "cls"))
                assert lines <= LONGEST_FUNCTION_LINES, f"{where}: {node.name} has {lines} lines"
                assert count <= MOST_PARAMETERS, f"{where}: {node.name} has {count} parameters"


def test_imports_stand_at_the_top() -> None:
    for path in python_files():
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{path.relative_to(ROOT)}:{function.name}"
                for node in ast.walk(function):
                    assert where in IMPORTED_LATE or not isinstance(node, ast.Import | ast.ImportFrom), (
                        f"{where}, line {node.lineno}: an import inside a function"
                    )


def test_no_tracked_file_names_a_machine() -> None:
    machine = re.compile(r"(?<![\w.$-])/(root|work|home/\w+|Users/\w+)/")
    host = re.compile(r"https?://[\w.-]*(index|pypi|pythonhosted)[\w.-]*|--(extra-)?index-url")
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # binary
        for pattern in (machine, host):
            found = pattern.search(text)
            assert path == Path(__file__) or found is None, f"{path.relative_to(ROOT)}: {found and found[0]}"


def test_the_readme_has_a_line_for_every_file() -> None:
    listed = re.findall(r"^- `((?:recsys_dist|jobs)/[\w/]+\.py)` \S", (ROOT / "README.md").read_text(), re.M)
    files = [path.relative_to(ROOT).as_posix() for path in python_files() if path.name != "__init__.py"]
    assert sorted(set(files) - set(listed)) == [], "files without a line in README.md, 'Where is what'"
    assert sorted(set(listed) - set(files)) == [], "lines in README.md for files that do not exist"
    assert len(listed) == len(set(listed))


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: link to {target} leads nowhere"
