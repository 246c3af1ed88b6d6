"""Malicious checkpoints: each is refused by name, in bounded time and memory, before any weight is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from pdserve.core.checkpoint_files import MAX_CONFIG_BYTES
from pdserve.core.config import ClusterConfig
from pdserve.core.errors import CapacityError, CheckpointError, ConfigError
from pdserve.engine.checkpoint import MAX_INDEX_BYTES, MAX_SHARDS, Checkpoint, fingerprint, open_checkpoint
from pdserve.engine.gpu import Node
from pdserve.engine.model_config import MAX_LAYERS, parse_model_config
from pdserve.engine.safetensors_header import MAX_HEADER_BYTES, MAX_HEADERS_BYTES, MAX_TENSORS
from pdserve.planner.plan import make_plan
from tests.engine.test_checkpoint import LLAMA, refusal, shard, write

DIGITS = int("9" * 4000)
MAX_MESSAGE_CHARS = 1000
MEMORY_BYTES = 1 << 30  # address space, of which the libraries take a part
BOUNDED = """
import resource, sys
from pathlib import Path
from pdserve.core.errors import CheckpointError
from pdserve.engine.checkpoint import open_checkpoint
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
try:
    open_checkpoint(Path(sys.argv[1]))
except CheckpointError as error:
    print(error)
    sys.exit(7)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


def header_of(path: Path, header: bytes, data_bytes: int = 0) -> Path:
    """Writes a safetensors file with this header; its data is a hole."""
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + data_bytes)
    return path


def tensor(shape: object, offsets: object = (0, 0), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def bounded_refusal(path: Path) -> str:
    """Like `refusal`, in a process with little memory and CPU time."""
    command = [sys.executable, "-c", BOUNDED, str(path), str(MEMORY_BYTES)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 7, ended
    return ended.stdout.strip()


FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-1-of-2.safetensors",
]


def with_file(path: Path, file: str) -> Path:
    """Returns the path of `file` in a checkpoint that uses it; the file does not exist."""
    if "model-" in file or "index" in file:
        shard(path)
    (path / file).unlink(missing_ok=True)
    return path / file


@pytest.mark.parametrize("file", FILES)
def test_a_pipe_instead_of_a_file_is_refused(path: Path, file: str) -> None:
    os.mkfifo(with_file(path, file))
    assert refusal(path) == f"{path / file}: not a regular file"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/proc/self"])
def test_a_link_to_a_device_or_a_directory_is_refused(path: Path, file: str, device: str) -> None:
    with_file(path, file).symlink_to(device)
    assert refusal(path) == f"{path / file}: not a regular file"


def test_links_to_regular_files_are_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "cached").mkdir()
    for file in list(path.iterdir()):
        file.rename(tmp_path / "cached" / file.name)
        file.symlink_to(tmp_path / "cached" / file.name)
    assert open_checkpoint(path).config.vocab_size == LLAMA["vocab_size"]
    assert fingerprint(path)


def test_a_pipe_that_replaces_a_file_later_does_not_block_the_fingerprint(path: Path) -> None:
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        fingerprint(path)


@pytest.mark.parametrize(
    ("file", "max_bytes"),
    [
        ("config.json", MAX_CONFIG_BYTES),
        ("generation_config.json", MAX_CONFIG_BYTES),
        ("model.safetensors.index.json", MAX_INDEX_BYTES),
    ],
)
def test_a_file_is_refused_by_its_size_before_it_is_read(path: Path, file: str, max_bytes: int) -> None:
    place = with_file(path, file)
    place.touch()
    os.truncate(place, 1 << 40)
    assert f"{place}: {1 << 40} bytes, expected at most {max_bytes}" in refusal(path)


def test_a_header_is_refused_by_its_size_before_it_is_read(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little"))
    os.truncate(file, 1 << 41)
    assert refusal(path) == f"{file}: header: {1 << 40} bytes, expected at most {MAX_HEADER_BYTES}"


def test_the_headers_of_all_files_are_bounded_together(path: Path) -> None:
    num_files = MAX_HEADERS_BYTES // MAX_HEADER_BYTES + 1
    weight_map = {f"t{index}": f"{index}.safetensors" for index in range(num_files)}
    with_file(path, "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, file in weight_map.items():
        header = json.dumps({name: tensor([0])}).encode()
        header_of(path / file, header + b" " * (MAX_HEADER_BYTES - len(header)))
    assert "expected at most 0" in refusal(path)


def test_the_tensors_of_all_files_are_bounded_together(path: Path) -> None:
    weight_map = {"a": "a.safetensors", "b": "b.safetensors"}
    with_file(path, "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, file in weight_map.items():
        entries = {f"{name}{index}": tensor([0]) for index in range(MAX_TENSORS // 2 + 1)}
        header_of(path / file, json.dumps(entries).encode())
    assert (
        refusal(path)
        == f"{path / 'b.safetensors'}: with it the checkpoint has more than {MAX_TENSORS} tensors"
    )


def test_the_number_of_shards_is_bounded(path: Path) -> None:
    weight_map = {f"t{index}": f"{index}.safetensors" for index in range(MAX_SHARDS + 1)}
    with_file(path, "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert f"weight_map names {MAX_SHARDS + 1} files, expected at most {MAX_SHARDS}" in refusal(path)


@pytest.mark.parametrize("unit", [b"[],", b"{},", b'{"a":0},', b"1000,", b'"ab",', b"0.5,"])
def test_json_that_grows_when_parsed_is_refused_in_bounded_memory(path: Path, unit: bytes) -> None:
    room = MAX_CONFIG_BYTES - 100
    (path / "config.json").write_bytes(b'{"x":[' + unit * (room // len(unit)) + b"0]}")
    assert "architectures is missing" in bounded_refusal(path)


@pytest.mark.parametrize("entry", ['"%x":0', '"%x":{}', '"%x":{"dtype":"","shape":[],"data_offsets":[0,0]}'])
def test_a_header_of_many_names_is_refused_in_bounded_memory(path: Path, entry: str) -> None:
    num_entries = MAX_HEADER_BYTES // (len(entry) + 6)
    header = "{" + ",".join(entry % index for index in range(num_entries)) + "}"
    header_of(path / "model.safetensors", header.encode())
    assert f"more than {MAX_TENSORS} tensors" in bounded_refusal(path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_numbers_that_are_not_json_are_refused(path: Path, file: str, number: str) -> None:
    place = with_file(path, file)
    place.write_text('{"eos_token_id": NUMBER, "weight_map": {"a": NUMBER}}'.replace("NUMBER", number))
    message = refusal(path)
    assert message.startswith(str(place))
    assert len(message) < MAX_MESSAGE_CHARS


@pytest.mark.parametrize("opening", [b'{"a":', b'{"a":[', b'{"weight_map":{"a":'])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_nested_without_end_is_refused(path: Path, file: str, opening: bytes) -> None:
    with_file(path, file).write_bytes(opening * 100_000)
    assert refusal(path).startswith(str(path / file))


def test_a_header_nested_without_end_is_refused(path: Path) -> None:
    header_of(path / "model.safetensors", b'{"a":' * 100_000)
    assert "its header is not one of safetensors" in refusal(path)


@pytest.mark.parametrize(
    "name",
    [
        "\0",
        "a\0b.safetensors",
        "../model.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "x" * 300,
        "\x1b[2J",
        "\u202e",
        "ä\n",
    ],
)
@pytest.mark.parametrize("is_file", [True, False])
def test_an_index_may_only_name_plain_files_and_tensors(path: Path, name: str, is_file: bool) -> None:
    weight_map = {"tensor": name} if is_file else {name: "model-1-of-2.safetensors"}
    with_file(path, "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refusal(path)
    assert "weight_map names" in message
    assert message.isprintable()
    assert len(message) < MAX_MESSAGE_CHARS


@pytest.mark.parametrize(
    "entry",
    [
        tensor([DIGITS]),
        tensor([DIGITS] * 1000),
        tensor([2**31]),
        tensor([1] * 9),
        tensor([-1]),
        tensor([1.5]),
        tensor([True]),
        tensor("12"),
        tensor([1], [0, DIGITS]),
        tensor([1], [0]),
        tensor([1], [4, 0]),
        tensor([1], [-4, 0]),
        tensor([1], dtype="F" * 1000),
        tensor([1], dtype="\x1b[2J"),
        {},
        None,
        "text",
        [[[[]]]],
    ],
    ids=lambda entry: repr(entry)[:40],
)
def test_tensor_fields_of_a_header_are_bounded_before_use(path: Path, entry: object) -> None:
    header_of(path / "model.safetensors", json.dumps({"model.norm.weight": entry}).encode(), data_bytes=64)
    message = refusal(path)
    assert message.isprintable()
    assert len(message) < MAX_MESSAGE_CHARS


@pytest.mark.parametrize("name", ["\0", "x" * 10_000, "\x1b[2J", ""])
def test_tensor_names_in_a_header_are_printable(path: Path, name: str) -> None:
    header_of(path / "model.safetensors", json.dumps({name: tensor([0])}).encode())
    message = refusal(path)
    assert "a tensor is named" in message
    assert message.isprintable()
    assert len(message) < MAX_MESSAGE_CHARS


NUMBERS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "eos_token_id",
    "bos_token_id",
    "original_max_position_embeddings",
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", [DIGITS, -DIGITS, 10**400, -1, [DIGITS] * 100_000, "x" * 1_000_000, {"a": {}}]
)
def test_each_number_of_a_config_is_bounded_and_abbreviated_in_messages(name: str, value: object) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0}
    with pytest.raises(CheckpointError) as caught:
        parse_model_config(LLAMA | {"rope_scaling": scaling, name: value})
    assert name in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < MAX_MESSAGE_CHARS


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_unbounded_layers_are_refused_before_anything_is_listed_per_layer(family: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"num_hidden_layers: got 1000000000, expected .* at most {MAX_LAYERS}"
    ):
        parse_model_config(LLAMA | {"architectures": [f"{family}ForCausalLM"], "num_hidden_layers": 10**9})


ROPE_FIELDS = [
    "factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "rope_theta",
    "low_freq_factor",
]


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize("field", ROPE_FIELDS)
@pytest.mark.parametrize("value", [0, -1, 1, 1e-300, 1e300, 1e-29, 1e29, 2.0])
def test_a_rope_of_unusual_numbers_is_refused_or_computed(kind: str, field: str, value: float) -> None:
    from pdserve.engine.rope import rope_table

    values = {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    try:
        config = parse_model_config(LLAMA | {"rope_scaling": values | {"rope_type": kind, field: value}})
    except CheckpointError:
        return
    assert rope_table(config.rope, config.head_dim, 4).shape == (4, config.head_dim)


def planned(path: Path, **model: Any) -> None:
    node = Node("here", (0, 1), 64 << 30, 64 << 30)
    make_plan(
        ClusterConfig.model_validate({"model": {"path": str(path), **model}}), open_checkpoint(path), (node,)
    ).check()


def test_positions_that_exceed_memory_are_refused_by_the_plan(tmp_path: Path) -> None:
    longest = write(
        tmp_path / "longest",
        max_position_embeddings=1 << 24,
        num_hidden_layers=16,
        hidden_size=256,
        head_dim=64,
    )
    with pytest.raises((CapacityError, ConfigError)):
        planned(longest)
    planned(longest, max_model_len=1024)


def test_the_position_tables_count_as_memory(tmp_path: Path) -> None:
    """One wide head: keys and values of a million tokens take 8 GiB, their angles three times as much."""
    shape: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2048,
        "torch_dtype": "float16",
    }
    model = write(tmp_path / "wide", max_position_embeddings=1 << 20, **shape)
    with pytest.raises(CapacityError, match="memory"):
        planned(model)


def test_a_sparse_file_that_claims_all_memory_is_refused_by_the_plan(path: Path) -> None:
    rows = 2**31 - 1
    config = LLAMA | {
        "vocab_size": rows,
        "tie_word_embeddings": True,
        "num_hidden_layers": 1,
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    from pdserve.engine.tensor_names import expected_tensors

    end, entries = 0, {}
    for name, shape in expected_tensors(parse_model_config(config)).items():
        num_bytes = 4 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        entries[name] = tensor(shape, (end, end := end + num_bytes))
    try:
        header_of(path / "model.safetensors", json.dumps(entries).encode(), data_bytes=end)
    except OSError:
        pytest.skip("this file system has no sparse files of 256 GiB")
    with pytest.raises(CapacityError, match="memory"):
        planned(path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module", params=["config.json", "model.safetensors.index.json", "model.safetensors"])
def mutated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, dict[str, Any]]:
    """A checkpoint, a file of it, and the JSON in it."""
    path = write(
        tmp_path_factory.mktemp("mutated") / "model", rope_scaling={"rope_type": "yarn", "factor": 2.0}
    )
    if request.param == "model.safetensors":
        data = (path / request.param).read_bytes()
        return path, request.param, json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if "index" in request.param:
        shard(path)
    return path, request.param, json.loads((path / request.param).read_text())


@settings(max_examples=200)
@given(data=st.data())
def test_any_change_of_json_gives_a_checkpoint_or_its_error(
    mutated: tuple[Path, str, dict[str, Any]], data: st.DataObject
) -> None:
    path, file, original = mutated
    values: Any = json.loads(json.dumps(original))
    holder = values
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = data.draw(
            st.sampled_from(keys) | st.text(max_size=4) if isinstance(holder, dict) else st.sampled_from(keys)
        )
        below = holder.get(key) if isinstance(holder, dict) else holder[key]
        if not below or not isinstance(below, dict | list) or data.draw(st.booleans()):
            break
        holder = below
    holder[key] = data.draw(JSON)
    text = json.dumps(values).encode()
    cut = data.draw(st.none() | st.integers(0, len(text)))
    if file == "model.safetensors":
        header_of(path / file, text[:cut], data_bytes=100_000)
    else:
        (path / file).write_bytes(text[:cut])
    try:
        outcome: Checkpoint | CheckpointError = open_checkpoint(path)
    except CheckpointError as error:
        outcome = error
    assert isinstance(outcome, Checkpoint) or (
        str(outcome).isprintable() and len(str(outcome)) < MAX_MESSAGE_CHARS
    )
