"""The tensors of a GGUF file under the names of a Hugging Face checkpoint, and their values. No torch.

Quantised blocks are turned into numbers by ggml's own `gguf` package, a slice of rows at a time."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, BinaryIO

from ..core.checkpoint_files import open_regular
from ..core.errors import CheckpointError
from ..core.gguf_file import GgufHeader
from .gguf_config import config_values
from .json_fields import MAX_FLOAT
from .model_config import ModelConfig, parse_model_config
from .safetensors_header import TensorInfo

if TYPE_CHECKING:
    import numpy as np

    Rows = np.ndarray[Any, np.dtype[np.float32]]

ROPE_DIVISORS = "rope_freqs.weight"
SLICE_ELEMENTS = 1 << 22
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")
_OUTER_NAME = re.compile(r"(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class GgufInfo(TensorInfo):
    """One tensor of a GGUF file; its `dtype` is ggml's name of its type, such as Q4_K."""

    kind: int  # ggml's number of the type
    offset: int  # from the beginning of the file
    row_bytes: int
    num_interleaved_heads: int  # whose rows alternate between both halves of a head; 0: none

    def slices(
        self, stream: BinaryIO, rows: range | None = None, columns: range | None = None
    ) -> Iterator[tuple[int, "Rows"]]:
        """Yields, of the given rows and columns (by default all), the number of a row among them, and the
        float32 values of some rows from there on, in the file's order. Raises OSError.

        Only the given rows are read, and of their blocks those are dequantised that hold such columns."""
        import numpy as np
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        row_elements = self.shape[-1]
        rows = range(self.num_elements // row_elements) if rows is None else rows
        columns = range(row_elements) if columns is None else columns
        _, block_elements, block_bytes = _block(self.kind)
        first_block, last_block = columns.start // block_elements, -(-columns.stop // block_elements)
        skipped = first_block * block_elements
        step = max(1, SLICE_ELEMENTS // row_elements)
        for first in range(0, len(rows), step):
            count = min(step, len(rows) - first)
            stream.seek(self.offset + (rows.start + first) * self.row_bytes)
            packed = bytearray(stream.read(count * self.row_bytes))  # writable, as torch wants arrays
            data = np.frombuffer(packed, np.uint8).reshape(count, self.row_bytes)
            blocks = np.ascontiguousarray(data[:, first_block * block_bytes : last_block * block_bytes])
            values = dequantize(blocks, GGMLQuantizationType(self.kind))
            yield first, values[:, columns.start - skipped : columns.stop - skipped]


def gguf_model(header: GgufHeader) -> ModelConfig:
    """Returns the model that a file describes. Raises CheckpointError."""
    values = config_values(header) | {"dtype": _dtype(header)}
    config = parse_model_config(values, None, str(header.file))
    if ROPE_DIVISORS not in header.tensors:
        return config
    info = _info(header, ROPE_DIVISORS, 0)
    expected = (config.head_dim // 2,)
    if info.shape != expected:
        raise CheckpointError(
            f"{header.file}: tensor {ROPE_DIVISORS} has shape {info.shape}, expected {expected}"
        )
    with open_regular(header.file) as stream:
        divisors = tuple(float(value) for _, rows in info.slices(stream) for value in rows.ravel())
    if not all(1 / MAX_FLOAT < value < MAX_FLOAT for value in divisors):
        raise CheckpointError(f"{header.file}: tensor {ROPE_DIVISORS}: expected positive numbers")
    return dataclasses.replace(config, rope=dataclasses.replace(config.rope, divisors=divisors))


def gguf_tensors(header: GgufHeader, config: ModelConfig) -> dict[str, TensorInfo]:
    """Returns the tensors of a file by their Hugging Face names. Raises CheckpointError for values that lie
    outside the file, or are of a type that is not supported."""
    interleaved = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    if not config.architecture.startswith("Llama"):
        interleaved = {}
    found: dict[str, TensorInfo] = {}
    for name in header.tensors:
        if name == ROPE_DIVISORS:
            continue
        if (match := _LAYER_NAME.fullmatch(name)) is not None and match[2] in _IN_LAYER:
            layer, leaf, part = match.groups()
            heads = interleaved.get(leaf, 0)
            found[f"model.layers.{int(layer)}.{_IN_LAYER[leaf]}.{part}"] = _info(header, name, heads)
        elif (match := _OUTER_NAME.fullmatch(name)) is not None and match[1] in _OUTER:
            found[f"{_OUTER[match[1]]}.{match[2]}"] = _info(header, name, 0)
        else:
            found[name] = _info(header, name, 0)
    return found


def _dtype(header: GgufHeader) -> str:
    """Returns the dtype of most matrices; where these are quantised, the one that holds their exact
    values."""
    kinds = Counter(_block(tensor.kind)[0] for tensor in header.tensors.values() if len(tensor.shape) > 1)
    return _FLOATS.get(kinds.most_common(1)[0][0], "float32") if kinds else "float32"


def _info(header: GgufHeader, name: str, num_interleaved_heads: int) -> GgufInfo:
    tensor = header.tensors[name]
    kind, block_elements, block_bytes = _block(tensor.kind)
    where = f"{header.file}: tensor {name}"
    if not block_elements:
        raise CheckpointError(f"{where} is of type {kind}, which the gguf package cannot dequantise")
    if not tensor.shape or min(tensor.shape) < 1 or tensor.shape[-1] % block_elements:
        raise CheckpointError(f"{where} has shape {tensor.shape}, expected rows of {block_elements}s")
    row_bytes = tensor.shape[-1] // block_elements * block_bytes
    info = GgufInfo(
        file=header.file,
        dtype=kind,
        shape=tensor.shape,
        stamp=header.stamp,
        kind=tensor.kind,
        offset=tensor.offset,
        row_bytes=row_bytes,
        num_interleaved_heads=num_interleaved_heads,
    )
    end = info.offset + info.num_elements // tensor.shape[-1] * row_bytes
    if end > header.stamp.num_bytes:
        raise CheckpointError(
            f"{where} ends at byte {end}, the file has {header.stamp.num_bytes} bytes: it is truncated"
        )
    return info


@cache
def _block(kind: int) -> tuple[str, int, int]:
    """Returns the name of a type, the elements of its blocks and their bytes: 0 of types that cannot be
    dequantised."""
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        known = GGMLQuantizationType(kind)
        num_elements, num_bytes = GGML_QUANT_SIZES[known]
        dequantize(np.zeros((1, num_bytes), np.uint8), known)
    except NotImplementedError:
        return known.name, 0, 0
    except (ValueError, KeyError):
        return f"number {kind}", 0, 0
    return known.name, num_elements, num_bytes
