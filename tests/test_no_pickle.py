"""No code of ours turns bytes into objects that can run code: a client or a peer could send them. Ray pickles
data between its own processes, behind its own token (SECURITY.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted(path.resolve() for path in (ROOT / "pdserve").iterdir() if path.is_symlink())
FILES = sorted(file for room in ROOMS for file in room.rglob("*.py"))
MODULES = {
    "pickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "multiprocessing",
    "shelve",
    "xmlrpc",
    "code",
    "runpy",
}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    ("torch", "load"),
    ("np", "load"),
    ("numpy", "load"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("importlib", "import_module"),
}
OBJECT_COLLECTIVES = "_object_list"  # torch.distributed pickles what these carry
ALLOWED = {
    # their own children, on one machine and without a peer
    ("simulator/run.py", "multiprocessing"),
    ("planner/comparison.py", "multiprocessing"),
    ("cluster/actors.py", "importlib.import_module"),  # a name of ours, by way of Ray
}


def suspects(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.partition(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                if module.partition(".")[0] in MODULES:
                    yield module
                yield from (f"{module}.{name.name}" for name in names if (module, name.name) in METHODS)
                yield from (name.name for name in names if name.name.endswith(OBJECT_COLLECTIVES))
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield name
            case ast.Attribute(value=ast.Name(id=base), attr=attribute) if (base, attribute) in METHODS:
                yield f"{base}.{attribute}"
            case ast.Attribute(attr=attribute) if attribute.endswith(OBJECT_COLLECTIVES):
                yield attribute
            case ast.keyword(arg="allow_pickle" | "trust_remote_code", value=ast.Constant(value=True)):
                yield str(node.arg)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import multiprocessing.connection",
        "from torch import load",
        "torch.load(path)",
        "eval(text)",
        "dist.broadcast_object_list(x)",
        "np.fromfile(f, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_every_forbidden_use_is_found(source: str) -> None:
    assert list(suspects(source))


def test_every_room_is_looked_at() -> None:
    assert {"gateway", "router", "kv_transfer", "core", "cluster"} <= {room.name for room in ROOMS}
    assert len(FILES) > 100


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_makes_objects_of_code_from_bytes(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    assert {(name, what) for what in suspects(file.read_text())} <= ALLOWED
