"""Who may write a worker's account: the ledger. Placement trusts it, and so nobody else touches it."""

import ast
from pathlib import Path

import pytest

from pdserve import router
from pdserve.router.registry import Worker

FOLDER = Path(router.__file__).parent
OWNERS = {"ledger.py", "registry.py"}  # the registry makes workers
FIELDS = set(Worker.__slots__) - {"info", "role", "worker_id"}
WRITERS = {"start_prefill", "end_prefill", "progress", "note_step", "count_tokens"}


def writes(tree: ast.AST) -> list[str]:
    """Assignments to an account's fields in objects of others, and calls of the methods that write them."""
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if not isinstance(target, ast.Attribute) or ast.unparse(target.value) == "self":
                continue
            if target.attr in FIELDS:
                found.append(f"line {target.lineno}: {ast.unparse(target)}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITERS:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py") if path.name not in OWNERS))
def test_only_the_ledger_writes_a_workers_account(name: str) -> None:
    assert writes(ast.parse((FOLDER / name).read_text())) == []


def test_the_ledgers_own_writes_are_seen() -> None:
    assert len(writes(ast.parse((FOLDER / "ledger.py").read_text()))) > 10
