"""Parses the text of cluster.yaml into a `ClusterConfig`, or raises one ConfigError that lists every mistake
with its line.

One file serves `ray up` and pdserve: Ray checks its own keys, ours lie under `metadata.pdserve`.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .config import ClusterConfig
from .errors import ConfigError
from .hosts import ExpectedHosts
from .yaml_lines import Document, KeyPath, parse_yaml

ROOT: KeyPath = ("metadata", "pdserve")


def load_cluster_config(path: str | Path) -> ClusterConfig:
    """The configuration in the file `path`. Raises ConfigError."""
    return parse_cluster_config(_read_text(Path(path)), str(path))


def parse_cluster_config(text: str, filename: str = "cluster.yaml") -> ClusterConfig:
    """The configuration in `text`; `filename` is for messages. Raises ConfigError: a line a mistake, in line
    order."""
    document = parse_yaml(text, filename)
    values = _our_part(document)
    try:
        return ClusterConfig.model_validate(values).expecting(_expected_hosts(document))
    except ValidationError as error:
        problems = [(_where(document, item), _problem(item)) for item in error.errors(include_url=False)]
        raise ConfigError(
            "\n".join(f"{filename}:{line}: {what}" for (line, _), what in sorted(problems))
        ) from None


def _read_text(path: Path) -> str:
    try:
        data = path.expanduser().read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8") from None


def _our_part(document: Document) -> Any:
    """Returns the value under `metadata.pdserve`."""
    values = document.values
    for depth, key in enumerate(ROOT):
        here = ROOT[:depth]
        where = f"{document.filename}:{document.line(here)}"
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{where}: {'.'.join(here) or 'file'}: got {_shown(values)}, expected a mapping with {key}"
            )
        if key not in values:
            similar = difflib.get_close_matches(key, values, n=1)
            found = f", found '{similar[0]}'" if similar else ""
            raise ConfigError(
                f"{where}: {'.'.join((*here, key))}: missing{found}, expected {'.'.join(ROOT)} in this file"
            )
        values = values[key]
    return values


def _expected_hosts(document: Document) -> ExpectedHosts:
    """Reads the expected hosts from Ray's own part of the file."""
    values = document.values
    provider, node_types = (values.get(key) for key in ("provider", "available_node_types"))
    if not isinstance(provider, Mapping):
        return ExpectedHosts()
    if provider.get("type") != "local":
        types = node_types.items() if isinstance(node_types, Mapping) else ()
        counts = {str(name): one.get("min_workers", 0) for name, one in types if isinstance(one, Mapping)}
        return ExpectedHosts(
            node_types={name: count for name, count in counts.items() if isinstance(count, int) and count > 0}
        )
    if "head_ip" not in provider and "worker_ips" not in provider:
        return ExpectedHosts()
    found = provider.get("worker_ips") or []
    if not isinstance(found, list) or not all(isinstance(host, str) and host for host in found):
        where = f"{document.filename}:{document.line(('provider', 'worker_ips'))}"
        raise ConfigError(f"{where}: provider.worker_ips: got {_shown(found)}, expected a list of addresses")
    head = provider.get("head_ip")
    return ExpectedHosts(addresses=tuple(dict.fromkeys(host for host in found if host != head)))


def _where(document: Document, error: ErrorDetails) -> tuple[int, KeyPath]:
    path = ROOT + tuple(str(part) for part in error["loc"])
    return document.line(path), path


def _problem(error: ErrorDetails) -> str:
    loc = tuple(str(part) for part in error["loc"] if part != "[key]")
    name = ".".join(ROOT + loc)
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return f"{name}: unknown key, {_known_keys(loc)}"
    got = error.get("ctx", {}).get("got") or _shown(error["input"])
    return f"{name}: got {got}, expected {_expected(error, loc)}"


def _known_keys(loc: KeyPath) -> str:
    known = list(_section(loc[:-1]).model_fields)
    meant = difflib.get_close_matches(loc[-1], known, n=1)
    return f"did you mean '{meant[0]}'?" if meant else f"expected one of {', '.join(known)}"


def _section(loc: KeyPath) -> type[BaseModel]:
    """The model that describes the mapping at `loc`."""
    section: type[BaseModel] = ClusterConfig
    for key in loc:
        annotation = section.model_fields[key].annotation
        assert isinstance(annotation, type), loc
        section = annotation
    return section


def _expected(error: ErrorDetails, loc: KeyPath) -> str:
    kind, ctx = error["type"], error.get("ctx", {})
    match kind:
        case "expected" | "literal_error":
            return ("one of " if kind == "literal_error" else "") + str(ctx["expected"])
        case "int_type":
            return "an integer"
        case "float_type" | "finite_number":
            return "a number"
        case "bool_type":
            return "true or false"
        case "string_type" | "string_too_short":
            return "a text that is not empty"
        case "greater_than":
            return f"more than {ctx['gt']:g}"
        case "greater_than_equal":
            return f"at least {ctx['ge']:g}"
        case "less_than_equal":
            return f"at most {ctx['le']:g}"
        case "model_type" | "dict_type":
            return f"a mapping with keys of {', '.join(_section(loc).model_fields)}"
    raise AssertionError(f"no wording for {error}")


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str | int | float | list | dict) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
