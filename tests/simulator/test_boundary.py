"""The simulator takes production's decisions through their public names, and their constants from where they are
defined."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve import simulator

FOLDER = Path(simulator.__file__).parent
ROOMS = (
    "core",
    "engine",
    "grammar",
    "kv_transfer",
    "prefill_worker",
    "decode_worker",
    "router",
    "worker",
    "head",
)


def trees(room: str) -> Iterator[ast.Module]:
    yield from (ast.parse(path.read_text()) for path in (FOLDER.parent / room).glob("*.py"))


def constants(tree: ast.Module) -> set[str]:
    """Returns the names that a module defines in capitals."""
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return {target.id for target in targets if isinstance(target, ast.Name) and target.id.isupper()}


def private_imports(tree: ast.Module) -> set[str]:
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names if alias.name.startswith("_")}


def private_attributes(tree: ast.Module) -> set[str]:
    """Returns the private names that are read of another object."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {
        node.attr
        for node in nodes
        if node.attr.startswith("_") and not node.attr.startswith("__") and ast.unparse(node.value) != "self"
    }


def own_names(tree: ast.Module) -> set[str]:
    """Returns the private names that a module's classes define."""
    nodes = list(ast.walk(tree))
    names = {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    return names | {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py")))
def test_the_simulator_uses_no_private_name_of_production(name: str) -> None:
    tree = ast.parse((FOLDER / name).read_text())
    own = set[str]().union(*map(own_names, trees("simulator")))
    assert not private_imports(tree)
    assert private_attributes(tree) <= own


def test_the_simulator_defines_no_constant_of_production() -> None:
    own = set[str]().union(*map(constants, trees("simulator")))
    theirs = set[str]().union(*(constants(tree) for room in ROOMS for tree in trees(room)))
    assert own and theirs
    assert not own & theirs
