"""The building blocks of cluster.yaml's sections: their base class, and field types that pydantic lacks, such
as `auto` or a number, sizes such as 512MiB, host:port."""

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

Auto = Literal["auto"]
_UNIT_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DECIMAL_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join((*_UNIT_BYTES, *_DECIMAL_BYTES))})")
DTYPES = ("float32", "bfloat16", "float16")
_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LOOPBACK = "127.0.0.1"
_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+):(?P<port>\d{1,5})")
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://[a-z0-9._-]+(:[0-9]{1,5})?|[a-z][a-z0-9+.-]*://\[[0-9a-f:]+\](:[0-9]{1,5})?"
)
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class ConfigSection(BaseModel):
    """A section: unknown keys and values of other types are refused. The docstring under a field describes it
    in the schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def expected(what: str, got: str | None = None) -> PydanticCustomError:
    """The error of a field whose value is not `what`. `got` describes the value where the value itself would
    not do."""
    return PydanticCustomError("expected", "expected {expected}", {"expected": what, "got": got})


def parse_size(value: object) -> int | None:
    """Returns the bytes of a positive integer or a string such as 512MiB or 4GB; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value > 0 else None
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return None
    return int(float(match[1]) * (_UNIT_BYTES | _DECIMAL_BYTES)[match[2]]) or None


def format_size(num_bytes: int) -> str:
    """Formats bytes in the largest unit that keeps the number at 1 or above: 1.5 GiB."""
    for unit, unit_bytes in reversed(_UNIT_BYTES.items()):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.3g} {unit}"
    return f"{num_bytes} B"


def parse_host_port(value: object) -> tuple[str, int] | None:
    """Returns host and port of `127.0.0.1:50051`, `[::1]:50051`, or of a port alone, which means loopback;
    None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and value.isascii() and value.removeprefix(":").isdigit():
        value = f"{LOOPBACK}:{value.removeprefix(':')}"
    match = _HOST_PORT.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match["port"]) > 65535:
        return None
    return match["host"].strip("[]"), int(match["port"])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there. A name other than localhost may mean any
    address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _auto_size(value: object) -> int | Auto:
    size = parse_size(value)
    if size is None and value != "auto":
        raise expected("auto, a number of bytes, or a size such as 512MiB or 4GiB")
    return size or "auto"


def _auto_int(accept: Callable[[int], bool], what: str) -> Callable[[object], int | Auto]:
    def validate(value: object) -> int | Auto:
        if value == "auto":
            return "auto"
        if isinstance(value, bool) or not isinstance(value, int) or not accept(value):
            raise expected(f"auto or {what}")
        return value

    return validate


def _host_port(value: object) -> str:
    parsed = parse_host_port(value)
    if parsed is None:
        raise expected("HOST:PORT such as 127.0.0.1:50051, or a port of 0 to 65535")
    return format_host_port(*parsed)


def format_host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# limit per pool: each instance is listed and planned before it is known whether there is room
MAX_INSTANCES = 4096


@dataclass(frozen=True)
class InstanceRange:
    """The numbers of instances that a planner may choose from, limits included, and the one in force."""

    min: int
    max: int
    start: int

    def __str__(self) -> str:
        return f"{self.start} of {self.min} to {self.max}"


def _instances(value: object) -> int | InstanceRange:
    if isinstance(value, InstanceRange):
        return value
    if not isinstance(value, Mapping):
        return _num_instances(value, 0, "")
    if unknown := value.keys() - {"min", "max", "start"}:
        raise expected("min, max and start alone", got=f"{', '.join(sorted(map(str, unknown)))}")
    if missing := {"min", "max"} - value.keys():
        raise expected(f"{' and '.join(sorted(missing))} as well", got=f"{', '.join(value) or 'nothing'}")
    least = _num_instances(value["min"], 0, "min of ")
    most = _num_instances(value["max"], 0, "max of ")
    if most < least:
        raise expected(f"max of at least min ({least})", got=f"max: {most}")
    start = value.get("start", max(least, 1) if most else 0)
    if isinstance(start, bool) or not isinstance(start, int) or not least <= start <= most:
        raise expected(f"start from min to max ({least} to {most})", got=f"start: {start!r}")
    return InstanceRange(least, most, start)


def _num_instances(value: object, least: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise expected(f"{what}an integer", got=None if not what else repr(value))
    if value < least:
        raise expected(f"{what}at least {least}", got=None if not what else repr(value))
    if value > MAX_INSTANCES:
        raise expected(f"{what}at most {MAX_INSTANCES}", got=None if not what else repr(value))
    return value


def _dtype(value: object) -> object:
    """Spells out the short name of a dtype."""
    return _DTYPE_NAMES.get(value, value) if isinstance(value, str) else value


def _origin(value: object) -> str:
    if isinstance(value, str) and (value == "*" or _ORIGIN.fullmatch(value)):
        return value
    raise expected("an origin such as https://app.example.com or http://localhost:3000, or '*'")


def _host_name(value: object) -> str:
    if not isinstance(value, str) or _HOST_NAME.fullmatch(value) is None:
        raise expected("the name of a host such as serve.example, without a port")
    return value


def _absolute_path(value: object) -> str:
    if not isinstance(value, str) or not value.startswith(("/", "~/")):
        raise expected("the path of a file, from / or ~/")
    return value


def _schema(*kinds: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"const": "auto"}, *kinds]})


_positive = _auto_int(lambda value: value > 0, "a positive integer")
_block_size = _auto_int(lambda value: value > 0 and value % 8 == 0, "a multiple of 8")

_NUMBER = {"type": "integer", "minimum": 0, "maximum": MAX_INSTANCES}
Instances = Annotated[
    int | InstanceRange,
    PlainValidator(_instances),
    PlainSerializer(lambda value: value if isinstance(value, int) else str(value)),
    WithJsonSchema(
        {
            "anyOf": [
                _NUMBER,
                {
                    "type": "object",
                    "properties": {"min": _NUMBER, "max": _NUMBER, "start": _NUMBER},
                    "required": ["min", "max"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
AutoSize = Annotated[
    int | Auto,
    PlainValidator(_auto_size),
    _schema({"type": "integer", "minimum": 1}, {"type": "string", "pattern": f"^{_SIZE.pattern}$"}),
]
AutoPositiveInt = Annotated[int | Auto, PlainValidator(_positive), _schema({"type": "integer", "minimum": 1})]
AutoBlockSize = Annotated[
    int | Auto, PlainValidator(_block_size), _schema({"type": "integer", "minimum": 8, "multipleOf": 8})
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    BeforeValidator(_dtype),
    WithJsonSchema({"enum": ["auto", *DTYPES, *_DTYPE_NAMES]}),
]
HostPort = Annotated[
    str,
    PlainValidator(_host_port),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^(.+:|:)?\d{1,5}$"},
                {"type": "integer", "minimum": 0, "maximum": 65535},
            ]
        }
    ),
]
HostName = Annotated[
    str, PlainValidator(_host_name), WithJsonSchema({"type": "string", "pattern": f"^{_HOST_NAME.pattern}$"})
]
Origin = Annotated[
    str, PlainValidator(_origin), WithJsonSchema({"type": "string", "pattern": f"^({_ORIGIN.pattern}|\\*)$"})
]
AbsolutePath = Annotated[
    str, PlainValidator(_absolute_path), WithJsonSchema({"type": "string", "pattern": "^~?/"})
]
