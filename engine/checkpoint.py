"""A checkpoint, checked against its own description before any weight is loaded: a directory in Hugging Face
format, or a GGUF file.

Opening reads only JSON and the headers of the weights files (no torch); `engine.tensor_reader` loads the
tensors."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import msgspec

from ..core.checkpoint_files import (
    MAX_CONFIG_BYTES,
    MAX_NAME_CHARS,
    is_name,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    shown,
    shown_text,
    size_of,
    stamp_of,
)
from ..core.errors import CheckpointError
from ..core.gguf_file import is_gguf, read_gguf_header
from .gguf_tensors import gguf_model, gguf_tensors
from .model_config import ModelConfig, parse_model_config
from .safetensors_header import DTYPE_NAMES, MAX_TENSORS, HeaderReader, TensorInfo
from .tensor_names import HEAD, expected_tensors

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 16 << 20  # 65,536 names of 255 characters; parsed, it takes up to 320 MiB
MAX_SHARDS = 1024
_KNOWN_BUFFERS = ("rotary_emb.inv_freq",)  # old checkpoints carry buffers that the model computes by itself
_EXPECTED = "expected a checkpoint directory, a GGUF file, or 'embedded'"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NUM_SAMPLES = 16
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: all tensors that `config` needs are present, in the right shapes."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]

    @property
    def dtype(self) -> str:
        """Returns the dtype that config.json states, or else that of most weights."""
        return (
            self.config.dtype
            or Counter(DTYPE_NAMES[info.dtype] for info in self.tensors.values()).most_common(1)[0][0]
        )

    @property
    def num_parameters(self) -> int:
        return sum(info.num_elements for info in self.tensors.values())


def resolve_model_path(path: str) -> Path:
    """Returns the directory or GGUF file that the configuration's `model.path` names; `embedded` is the model
    bundled with pdserve."""
    if path == "embedded":
        from ..embedded import MODEL_DIR

        return MODEL_DIR
    return Path(path).expanduser()


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises CheckpointError for tensors or fields that are missing, corrupt, unsupported or do not fit
    config.json."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory; {_EXPECTED}{_download(path)}")
    if not path.is_dir() and not is_gguf(path):
        raise CheckpointError(f"{path}: not a checkpoint; {_EXPECTED}")
    try:
        return _opened_gguf(path) if is_gguf(path) else _opened(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def described_checkpoint(config_file: Path) -> Checkpoint:
    """Returns the checkpoint that a config.json describes, without its weights: what it would hold. Raises
    CheckpointError."""
    try:
        config = parse_model_config(read_json(config_file), None, str(config_file))
        with open_regular(config_file) as stream:
            stamp = stamp_of(stream)
    except OSError as error:
        raise CheckpointError(f"{config_file}: cannot be read: {error.strerror}") from None
    dtype = next((code for code, name in DTYPE_NAMES.items() if name == config.dtype), "BF16")
    tensors = {
        name: TensorInfo(config_file, dtype, shape, stamp) for name, shape in expected_tensors(config).items()
    }
    return Checkpoint(config_file, config, tensors)


def _opened(path: Path) -> Checkpoint:
    generation_file = path / GENERATION_CONFIG_FILE
    generation = read_json(generation_file) if generation_file.exists() else None
    config = parse_model_config(read_json(path / CONFIG_FILE), generation, str(path / CONFIG_FILE))
    found = _tensors(path)
    if HEAD in found:  # its config ties the head, yet it has one: transformers uses it
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return Checkpoint(path, config, _checked(path, found, expected_tensors(config), "config.json"))


def _opened_gguf(path: Path) -> Checkpoint:
    header = read_gguf_header(path)
    config = gguf_model(header)
    found = gguf_tensors(header, config)
    return Checkpoint(path, config, _checked(path, found, expected_tensors(config), "its metadata"))


def _download(path: Path) -> str:
    """Returns the command that downloads a checkpoint, if what should be its path is a name of the hub."""
    name = str(path)
    if _HUB_NAME.fullmatch(name) is None:
        return ""
    return f". The hub's {name} is downloaded by: hf download {name} --local-dir {path.name}"


def fingerprint(path: Path) -> str:
    """Distinguishes the weights in `path` from others, even of the same shape, at the cost of a few small
    reads.

    Equal checkpoints give equal fingerprints on every host. The hash covers config.json and, for each weights
    file, its name, its size and samples spread over it, the first of which covers the header."""
    if is_gguf(path):
        digest, files = blake2b(digest_size=16), [path]
        with open_regular(path) as stream:
            digest.update(stream.read(read_gguf_header(path).num_bytes))
    else:
        digest = blake2b(read_bytes(path / CONFIG_FILE, MAX_CONFIG_BYTES), digest_size=16)
        files = sorted({info.file for info in _tensors(path).values()})
    for file in files:
        with open_regular(file) as stream:
            size = size_of(stream)
            digest.update(f"{file.name} {size}".encode())
            for index in range(_NUM_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class _Index(msgspec.Struct):
    weight_map: Annotated[dict[str, str], msgspec.Meta(max_length=MAX_TENSORS)]


def _tensors(path: Path) -> dict[str, TensorInfo]:
    """Returns all tensors of the checkpoint's safetensors files."""
    if (path / WEIGHTS_FILE).exists():
        return HeaderReader().read(path / WEIGHTS_FILE)
    if (path / INDEX_FILE).exists():
        return _sharded_tensors(path)
    if any(file.suffix in (".bin", ".pt", ".pth") for file in path.iterdir()):
        raise CheckpointError(
            f"{path}: has only pickled weights (.bin, .pt), which can run code when loaded; convert it with "
            "transformers: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_PATH)"
        )
    gguf_files = sorted(file.name for file in path.iterdir() if is_gguf(file))
    if gguf_files:
        raise CheckpointError(
            f"{path}: has GGUF files; expected the path of one of them, such as {path / gguf_files[0]}"
        )
    raise CheckpointError(f"{path}: has no weights, expected {WEIGHTS_FILE} or {INDEX_FILE}")


def _sharded_tensors(path: Path) -> dict[str, TensorInfo]:
    index = path / INDEX_FILE
    data = read_bytes(index, MAX_INDEX_BYTES)
    try:
        weight_map = parse_json(data, _Index, index).weight_map
    except CheckpointError as error:
        raise CheckpointError(f"{error}; expected weight_map, from tensor names to file names") from None
    names = sorted(set(weight_map.values()))
    for name in (*names, *weight_map):
        if not is_name(name):
            raise CheckpointError(
                f"{index}: weight_map names {shown(name)}, expected names of at most {MAX_NAME_CHARS}"
                f" characters for tensors, and for files in {path}"
            )
    if len(names) > MAX_SHARDS:
        raise CheckpointError(f"{index}: weight_map names {len(names)} files, expected at most {MAX_SHARDS}")
    reader = HeaderReader()
    headers = {name: reader.read(path / name) for name in names}
    missing = next((tensor for tensor, name in weight_map.items() if tensor not in headers[name]), None)
    if missing is not None:
        raise CheckpointError(
            f"{path / weight_map[missing]}: tensor {missing} is missing, the index says it is there"
        )
    return {tensor: headers[name][tensor] for tensor, name in weight_map.items()}


def _checked(
    path: Path, found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], description: str
) -> dict[str, TensorInfo]:
    """Returns the tensors of `expected`. Refuses missing tensors, other shapes, and additional tensors that
    would change results."""
    for name, shape in expected.items():
        info = found.get(name)
        if info is None:
            raise CheckpointError(f"{path}: tensor {name} of shape {shape} is missing")
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {info.shape}, {description} implies {shape}"
            )
        if not is_gguf(info.file) and info.dtype not in DTYPE_NAMES:
            supported = ", ".join(DTYPE_NAMES)
            raise CheckpointError(
                f"{info.file}: tensor {name} is of dtype {shown_text(info.dtype)}, supported are {supported}"
            )
    for name in found.keys() - expected.keys():
        if not name.endswith(_KNOWN_BUFFERS):
            raise CheckpointError(
                f"{found[name].file}: tensor {name} is unexpected for this model's {description}"
            )
    return {name: found[name] for name in expected}
