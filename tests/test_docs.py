"""Documents that are drawn from the code are fresh, and links between documents resolve."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_map_of_rooms_matches_the_imports() -> None:
    checked = subprocess.run(
        [sys.executable, ROOT / "scripts" / "room_map.py", "--check"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_that_documents_name_exist(document: Path, modules: str) -> None:
    """A name may leave out folders from the left."""
    names = set(re.findall(r"\b[\w/]+\.py\b", document.read_text()))
    assert sorted(name for name in names if f"/{name}\n" not in modules) == []


@pytest.fixture(scope="module")
def modules() -> str:
    """Returns the paths of all modules, one a line."""
    rooms = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    paths = [*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]
    return "".join(f"/{path.relative_to(ROOT)}\n" for path in paths)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_that_documents_name_exist(document: Path) -> None:
    """A name without a folder is that of a file beside the one named before."""
    folder, missing = ROOT / "tests", []
    for name in re.findall(r"`(tests/[\w/.]+|test_\w+\.py)[`: ]", document.read_text()):
        path = ROOT / name if "/" in name else folder / name
        folder = path.parent
        if not path.exists():
            missing.append(name)
    assert missing == []
