"""One run on a GPU: is it right, and how near is it to what the same GPU does at most? `python -m bench.gpu`
(see `__main__`)."""

import importlib.util
import sys
from pathlib import Path


def _find_pdserve() -> None:
    """This repository's, where none is installed. By itself: on the path, the repository's rooms (`kernels`,
    `engine`) would be taken for packages of that name."""
    if importlib.util.find_spec("pdserve") is not None:
        return
    folder = Path(__file__).resolve().parent.parent.parent / "pdserve"
    spec = importlib.util.spec_from_file_location(
        "pdserve", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules["pdserve"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_find_pdserve()
