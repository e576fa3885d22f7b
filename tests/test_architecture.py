"""The layers of the code, read from its imports. Runs no product code except `imprint --help`."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("models", "adapters", "server")  # each may import itself and what stands before it
MAX_FILE_LINES = 400
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
TORCH_FREE = ("imprint.server.config", "imprint.server.schemas", "imprint.server.scheduler")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("imprint", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {module_name(path): path for path in SOURCES}


def imported_names(tree: ast.AST) -> list[str]:
    """Every name a file imports, wherever the import stands; `from a import b` gives a.b."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def load_time_nodes(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements that run when a module is imported: not function bodies, not TYPE_CHECKING."""
    nodes: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and is_type_checking(node.test):
            nodes += load_time_nodes(node.orelse)
            continue
        nodes.append(node)
        for field in ("body", "orelse", "finalbody"):
            nodes += load_time_nodes(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            nodes += load_time_nodes(handler.body)
    return nodes


def resolve(name: str) -> str | None:
    """The module of ours that an imported name leads to."""
    while name:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


def load_time_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [
        node for node in load_time_nodes(tree.body) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {resolve(name) for node in imports for name in imported_names(node)}
    return {name for name in names if name and name != module_name(path)} - {"imprint"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    allowed = {f"imprint.{name}" for name in LAYERS[: layer + 1]} | {
        "imprint",
        "imprint.__version__",
    }
    for name in imported_names(ast.parse(path.read_text(encoding="utf-8"))):
        top = name.split(".")[0]
        assert top not in LAYERS, f"{path.name} imports {name}: write imprint.{name}"
        if top == "imprint":
            assert ".".join(name.split(".")[:2]) in allowed, f"{module_name(path)} imports {name}"


def test_modules_have_no_cycles() -> None:
    # A package's __init__ re-exports its modules, so a module that imports a name from its own
    # package is a cycle, and reported as one.
    graph = {name: load_time_imports(path) for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_their_job(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert ast.get_docstring(ast.parse(text)), "a module says its job and its limit"


def run_python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("module", [name for name in TORCH_FREE if name in MODULES])
def test_light_modules_load_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr or f"{module} imports torch"


def test_help_starts_without_torch() -> None:
    code = (
        "import sys; from imprint.server.cli import main; sys.argv = ['imprint', '--help']; main()"
    )
    result = run_python("-X", "importtime", "-c", code)
    assert result.returncode == 0, result.stderr
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "imprint" in loaded
    assert "torch" not in loaded


def readme_tree() -> list[str]:
    """The paths in the code block under "## Layout": lines like `models/   what it does`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition("## Layout")[2].partition("```")[2].partition("```")[0]
    return [line.split()[0] for line in block.splitlines() if line.strip()]


def test_readme_tree_names_what_exists() -> None:
    named = readme_tree()
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []
    unnamed = [name for name in (*LAYERS, "deploy", "tests") if f"{name}/" not in named]
    assert unnamed == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_architecture_page_names_every_module(path: Path) -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    layer, *folders = path.relative_to(ROOT).parts[:-1]
    sections = text.split(f"### {layer}/")[1:]
    section = "".join(part.partition("\n#")[0] for part in sections)
    assert all(f"`{folder}/" in section for folder in folders)
    assert path.name == "__init__.py" or f"{path.name}`" in section


def test_architecture_page_names_nothing_else() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    known = {path.name for path in SOURCES} | {path.name for path in (ROOT / "tests").glob("*.py")}
    named = {name.rpartition("/")[2] for name in re.findall(r"`([\w/]+\.py)`", text)}
    assert sorted(named - known) == []
