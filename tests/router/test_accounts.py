"""Only the ledger writes a worker's account, on which placement relies."""

import ast
from pathlib import Path

import pytest

from pdserve import router
from pdserve.router.registered_worker import RegisteredWorker

FOLDER = Path(router.__file__).parent
OWNERS = {"ledger.py", "registry.py"}  # the registry makes workers
FIELDS = set(RegisteredWorker.__slots__) - {"info", "role", "worker_id"}
WRITERS = {"start_prefill", "end_prefill", "progress", "note_step", "count_tokens"}


def writes(tree: ast.AST) -> list[str]:
    """Yields assignments to an account's fields from outside, and calls of the methods that write them."""
    nodes = list(ast.walk(tree))
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in nodes if isinstance(node, ast.AugAssign | ast.AnnAssign)]
    fields = [target for target in targets if isinstance(target, ast.Attribute) and target.attr in FIELDS]
    calls = [
        node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    found = [field for field in fields if ast.unparse(field.value) != "self"]
    found += [call for call in calls if call.attr in WRITERS]
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in found]


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py") if path.name not in OWNERS))
def test_only_the_ledger_writes_a_workers_account(name: str) -> None:
    assert writes(ast.parse((FOLDER / name).read_text())) == []


def test_the_check_detects_the_ledgers_own_writes() -> None:
    assert len(writes(ast.parse((FOLDER / "ledger.py").read_text()))) > 10
