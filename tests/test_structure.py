"""The house as designed: every package is shipped, and imports run one way."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What the modules of a package may import of this repository.
MAY_IMPORT = {
    "jax_huginn/config": {"config"},
    "jax_huginn/ops": {"config", "ops"},
    "jax_huginn/parallel": {"config", "ops", "parallel"},
    "jax_huginn/model": {"config", "ops", "parallel", "model"},
    "jax_huginn/cost": {"config", "ops", "parallel", "model", "training", "cost"},
    "jax_huginn/reporting": {"config", "model", "reporting"},
    "jax_huginn/data": {"config", "data"},
    "jax_huginn/data/sources": {"config", "data"},
    "jax_huginn/interop": {"config", "files", "ops", "model", "interop"},
    "jax_huginn/checkpoints": {"config", "files", "parallel", "model", "interop", "data", "checkpoints"},
    "jax_huginn/inference": {"config", "ops", "parallel", "model", "inference"},
    "jax_huginn/training": {
        "config",
        "files",
        "ops",
        "parallel",
        "model",
        "data",
        "interop",
        "checkpoints",
        "reporting",
        "training",
    },
}


def imports_of(file: Path) -> set[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_every_package_is_shipped():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [
        folder for top in ("jax_huginn", "torch_reference", "eval_tasks") for folder in (ROOT / top).rglob("*.py")
    ]
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in folders}
    assert set(listed) == found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package):
    files = sorted((ROOT / package).glob("*.py"))
    assert files
    for file in files:
        own = {name.split(".")[1] for name in imports_of(file) if name.startswith("jax_huginn.")}
        assert own <= MAY_IMPORT[package], f"{file.relative_to(ROOT)} imports {own - MAY_IMPORT[package]}"


@pytest.mark.parametrize(
    ("package", "banned", "except_in"),
    [
        ("jax_huginn", {"torch", "torch_reference"}, {"pth.py"}),
        ("jax_huginn/data", {"jax", "flax"}, set()),
        ("jax_huginn/checkpoints", {"optax"}, set()),
        ("torch_reference", {"jax", "flax", "jax_huginn"}, set()),
        ("eval_tasks", {"jax", "torch"}, set()),
    ],
)
def test_frameworks_stay_apart(package, banned, except_in):
    for file in (ROOT / package).rglob("*.py"):
        found = {name.split(".")[0] for name in imports_of(file)} & banned
        assert not found or file.name in except_in, f"{file.relative_to(ROOT)} imports {found}"
