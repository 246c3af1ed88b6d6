"""A checkpoint directory of Hugging Face format, checked against its own config.json before any weight is loaded.

Opening reads only JSON and the headers of the safetensors files (no torch); `engine.tensor_reader` loads the tensors.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError
from .model_config import ModelConfig, parse_model_config
from .safetensors_header import DTYPE_NAMES, TensorInfo, read_header
from .tensor_names import HEAD, expected_tensors

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_KNOWN_BUFFERS = ("rotary_emb.inv_freq",)  # old checkpoints carry what the model computes by itself
_NUM_SAMPLES = 16
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: all that `config` needs is there, in its shapes."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]

    @property
    def dtype(self) -> str:
        """What config.json says the weights are, or else what most of them are."""
        return self.config.dtype or Counter(DTYPE_NAMES[info.dtype] for info in self.tensors.values()).most_common(1)[0][0]

    @property
    def num_parameters(self) -> int:
        return sum(info.num_elements for info in self.tensors.values())


def resolve_model_path(path: str) -> Path:
    """The directory that `model.path` of the configuration means; `embedded` is the model that comes with pdserve."""
    if path == "embedded":
        from ..embedded import MODEL_DIR

        return MODEL_DIR
    return Path(path).expanduser()


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises CheckpointError for what is missing, corrupt, not supported or does not fit config.json."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; expected a checkpoint directory, or 'embedded'")
    generation_file = path / GENERATION_CONFIG_FILE
    generation = _read_json(generation_file) if generation_file.exists() else None
    config = parse_model_config(_read_json(path / CONFIG_FILE), generation, str(path / CONFIG_FILE))
    found = _tensors(path)
    if HEAD in found:  # tied by its config, and yet with a head: transformers uses the head it has
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return Checkpoint(path, config, _checked(path, found, expected_tensors(config)))


def fingerprint(path: Path) -> str:
    """Tells the weights in `path` from others, also of the same shape, at the cost of a few small reads.

    Equal directories give equal fingerprints on every host. Hashed are config.json, and of each weights file its name, its
    size and samples spread over it, the first of which covers the header.
    """
    digest = blake2b(_read_bytes(path / CONFIG_FILE), digest_size=16)
    for file in sorted({info.file for info in _tensors(path).values()}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for index in range(_NUM_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read_bytes(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return values


def _tensors(path: Path) -> dict[str, TensorInfo]:
    """All tensors of the checkpoint's safetensors files."""
    if (path / WEIGHTS_FILE).exists():
        return read_header(path / WEIGHTS_FILE)
    if (path / INDEX_FILE).exists():
        return _sharded_tensors(path)
    if any(file.suffix in (".bin", ".pt", ".pth") for file in path.iterdir()):
        raise CheckpointError(
            f"{path}: has only pickled weights (.bin, .pt), which can run code when loaded; convert it with "
            "transformers: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_PATH)"
        )
    raise CheckpointError(f"{path}: has no weights, expected {WEIGHTS_FILE} or {INDEX_FILE}")


def _sharded_tensors(path: Path) -> dict[str, TensorInfo]:
    weight_map = _read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path / INDEX_FILE}: expected weight_map, from tensor names to file names")
    headers = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{path / INDEX_FILE}: weight_map names {name!r}, expected a file in {path}")
        headers[name] = read_header(path / name)
    missing = next((tensor for tensor, name in weight_map.items() if tensor not in headers[name]), None)
    if missing is not None:
        raise CheckpointError(f"{path / weight_map[missing]}: tensor {missing} is missing, the index says it is there")
    return {tensor: headers[name][tensor] for tensor, name in weight_map.items()}


def _checked(path: Path, found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """The tensors of `expected`, none missing, none of another shape, and nothing beside them that would change results."""
    for name, shape in expected.items():
        info = found.get(name)
        if info is None:
            raise CheckpointError(f"{path}: tensor {name} of shape {shape} is missing")
        if info.shape != shape:
            raise CheckpointError(f"{info.file}: tensor {name} has shape {info.shape}, config.json implies {shape}")
        if info.dtype not in DTYPE_NAMES:
            supported = ", ".join(DTYPE_NAMES)
            raise CheckpointError(f"{info.file}: tensor {name} is of dtype {info.dtype}, supported are {supported}")
    for name in found.keys() - expected.keys():
        if not name.endswith(_KNOWN_BUFFERS):
            raise CheckpointError(f"{found[name].file}: tensor {name} is unexpected for this model's config.json")
    return {name: found[name] for name in expected}
