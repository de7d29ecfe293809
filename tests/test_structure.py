"""The house as designed: every package is shipped, and imports run one way."""

import ast
import re
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
    "jax_huginn/reporting": {"config", "files", "model", "reporting"},
    "jax_huginn/data": {"config", "files", "data"},
    "jax_huginn/data/sources": {"config", "data"},
    "jax_huginn/interop": {"config", "files", "ops", "model", "interop"},
    "jax_huginn/checkpoints": {"config", "files", "parallel", "model", "interop", "data", "checkpoints"},
    "jax_huginn/inference": {"config", "ops", "parallel", "model", "inference"},
    "jax_huginn/visualization": {"config", "files", "reporting", "checkpoints", "visualization"},
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
        ("jax_huginn/visualization", {"jax", "flax"}, set()),
        ("torch_reference", {"jax", "flax", "jax_huginn"}, set()),
        ("eval_tasks", {"jax", "torch"}, set()),
    ],
)
def test_frameworks_stay_apart(package, banned, except_in):
    for file in (ROOT / package).rglob("*.py"):
        found = {name.split(".")[0] for name in imports_of(file)} & banned
        assert not found or file.name in except_in, f"{file.relative_to(ROOT)} imports {found}"


# ---- Shapes in names ------------------------------------------------------------------------------------------------


def legend_of(file: str) -> list[tuple[str, str]]:
    """(letter, meaning) of every entry of the table of axes in a module's docstring."""
    table = ast.get_docstring(ast.parse((ROOT / file).read_text())) or ""
    rows = [line for line in table.splitlines() if re.match(r"    \w  ", line)]
    return re.findall(r"(?:^ *|   )(\w)  (\S+(?: \S+)*)", "\n".join(rows), flags=re.MULTILINE)


def names_in(file: Path) -> set[str]:
    """Names of all variables, arguments and fields in a file."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return names | {node.arg for node in nodes if isinstance(node, ast.arg)}


def test_every_letter_of_a_shape_has_one_meaning():
    legend = legend_of("jax_huginn/model/__init__.py")
    meanings = dict(legend)
    assert len(meanings) == len(legend) == len(set(meanings.values())) > 20
    assert set(legend_of("torch_reference/model.py")) <= set(legend)
    folders = [f"jax_huginn/{name}" for name in ("ops", "parallel", "model", "inference", "training")]
    for file in (file for folder in (*folders, "torch_reference") for file in (ROOT / folder).glob("*.py")):
        for name in names_in(file):
            shape = re.fullmatch(r"[a-z]\w*_([a-z\d]*[A-Z][A-Za-z\d]*)", name)
            unknown = {letter for letter in shape[1] if not letter.isdigit()} - set(meanings) if shape else set()
            assert not unknown, f"{file.relative_to(ROOT)}: {name} has the unknown axes {unknown}"
