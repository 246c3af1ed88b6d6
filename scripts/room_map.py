"""Draws the map of rooms in docs/architecture.md from the imports themselves.

`python scripts/room_map.py` rewrites the picture, which stands between two marks; with `--check` it says
whether it is fresh. An arrow means "imports". Arrows that others imply are left out (transitive reduction),
so that the picture can be read."""

import argparse
import sys
from pathlib import Path

import grimp

PACKAGE = "pdserve"
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"
BEGIN, END = "<!-- map of rooms: drawn by scripts/room_map.py -->", "<!-- end of the map -->"


def imports_between_rooms() -> set[tuple[str, str]]:
    """The pairs (importing room, imported room)."""
    graph = grimp.build_graph(PACKAGE)
    found = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            pair = module.split(".")[1:2], imported.split(".")[1:2]
            if pair[0] and pair[1] and pair[0] != pair[1]:
                found.add((pair[0][0], pair[1][0]))
    return found


def reduced(edges: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges that no longer path implies (Aho, Garey and Ullman 1972). `edges` have no cycle."""
    below = {room: {b for a, b in edges if a == room} for edge in edges for room in edge}

    def reachable(room: str) -> set[str]:
        return set().union(*({b} | reachable(b) for b in below[room]))

    return sorted((a, b) for a, b in edges if not any(b in reachable(other) for other in below[a] - {b}))


def drawn() -> str:
    """The map as a Mermaid flowchart."""
    arrows = "\n".join(f"    {a} --> {b}" for a, b in reduced(imports_between_rooms()))
    return f"{BEGIN}\n```mermaid\nflowchart TD\n{arrows}\n```\n{END}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 when the picture is stale"
    )
    is_check = parser.parse_args().check
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    fresh = before + drawn() + after
    if is_check:
        if text != fresh:
            print(
                f"{DOCUMENT.name}: the map of rooms is stale; run `python scripts/room_map.py`",
                file=sys.stderr,
            )
        return int(text != fresh)
    DOCUMENT.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
