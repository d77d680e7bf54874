"""The rooms of the package, bottom up, and who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import deft_ray

PACKAGE = Path(deft_ray.__file__).parent

#: A room may import only itself and rooms that stand before it.
ROOMS = (
    "errors",
    "metrics",
    "spec",
    "density",
    "nano",
    "models",
    "tasks",
    "train",
    "compress",
    "results",
    "tracking",
    "sweep",
    "cli",
)

HEAVY = {"torch", "ray", "deepspeed", "transformers", "peft", "mlflow", "matplotlib", "pandas"}

#: Packages that a room's modules never import, not even inside a function.
NEVER = {
    "errors": HEAVY,
    "metrics": HEAVY,
    "spec": HEAVY,
    "density": HEAVY - {"torch"},
    "tasks": {"ray", "mlflow", "deepspeed"},
    "models": {"ray", "mlflow"},
    "train": {"ray", "mlflow"},
    "results": {"torch", "ray", "mlflow"},
    "tracking": {"torch", "ray"},
}

#: Modules that the command line loads before it knows what is asked.
LIGHT = ("errors.py", "metrics.py", "cli.py", "sweep/__main__.py", "nano/__init__.py")

#: The names that an ``__init__.py`` may define beside its docstring.
CONSTANTS = {"__init__.py": {"__version__"}, "nano/__init__.py": {"MODEL_DIR"}}

MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


def room_of(module: str) -> str:
    return module.split("/")[0].removesuffix(".py")


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the dotted names of all imports at or below a node."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module is not None
            yield child.module
            if child.module == "deft_ray":
                yield from (f"deft_ray.{alias.name}" for alias in child.names)


def imported_at_load(tree: ast.Module) -> set[str]:
    """Return the packages that importing a module imports at once: not in a function, not for type checkers."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(name.partition(".")[0] for name in imported(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


def test_every_module_has_its_room() -> None:
    assert {room_of(module) for module in MODULES} - {"__init__"} <= set(ROOMS)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__.py"])
def test_a_room_imports_only_rooms_before_it(module: str) -> None:
    below = ROOMS[: ROOMS.index(room_of(module)) + 1]
    rooms = {name.split(".")[1] for name in imported(tree_of(module)) if name.startswith("deft_ray.")}
    assert rooms - {"__version__"} <= set(below)


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in NEVER])
def test_a_room_keeps_away_from_packages_that_are_not_its_own(module: str) -> None:
    packages = {name.partition(".")[0] for name in imported(tree_of(module))}
    assert packages & NEVER[room_of(module)] == set()


@pytest.mark.parametrize("module", [module for module in MODULES if module in LIGHT or module.startswith("spec/")])
def test_what_the_command_line_loads_first_is_light(module: str) -> None:
    assert imported_at_load(tree_of(module)) & HEAVY == set()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_its_purpose(module: str) -> None:
    assert ast.get_docstring(tree_of(module))


@pytest.mark.parametrize("module", [module for module in MODULES if module.endswith("__init__.py")])
def test_an_init_holds_a_docstring_and_at_most_its_constant(module: str) -> None:
    names: set[str] = set()
    for node in tree_of(module).body[1:]:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(ast.unparse(target) for target in targets)
        else:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            support = module in CONSTANTS and isinstance(node, ast.Import | ast.ImportFrom)
            assert docstring or support, ast.unparse(node)
    assert names == CONSTANTS.get(module, set())
