"""Parses the text of cluster.yaml into a `ClusterConfig`, or raises one ConfigError that lists every mistake
with its line.

One file serves `ray up` and pdserve: Ray checks its own keys, ours lie under `metadata.pdserve`.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .bounded_file import read_bounded
from .config import ClusterConfig
from .errors import ConfigError
from .hosts import ExpectedHosts
from .yaml_lines import Document, KeyPath, parse_yaml

ROOT: KeyPath = ("metadata", "pdserve")
RAY_MAX_WORKERS = 2  # Ray's, where the file does not say how many hosts there may be beside the head's
MAX_FILE_BYTES = 1 << 20
_KEY = re.compile(r"[a-z_]+(\.[a-z_]+)*")


def parse_cluster_config(text: str, filename: str = "cluster.yaml") -> ClusterConfig:
    """The configuration in `text`; `filename` is for messages. Raises ConfigError: a line a mistake, in line
    order."""
    return ConfigSource(parse_yaml(text, filename)).config()


@dataclass(frozen=True)
class Override:
    """A value that takes the place of the file's, as `--set KEY=VALUE` gives it."""

    path: KeyPath  # below ROOT
    value: Any
    source: str  # how the user gave it, for mistakes in it

    @staticmethod
    def parse(text: str, source: str | None = None) -> "Override":
        """Parses KEY=VALUE, where VALUE is YAML; by default it was given with --set. Raises ConfigError."""
        key, equals, value = text.partition("=")
        key = key.strip().removeprefix(f"{'.'.join(ROOT)}.")
        if not equals or _KEY.fullmatch(key) is None:
            raise ConfigError(f"--set {text}: expected KEY=VALUE, such as pools.decode.instances=2")
        parsed = parse_yaml(value, f"--set {key}").values
        return Override(tuple(key.split(".")), parsed, source or f"--set {text}")


@dataclass(frozen=True)
class ConfigSource:
    """The origin of a configuration: a file, or none, and what is set beside it."""

    document: Document | None
    overrides: tuple[Override, ...] = ()

    @staticmethod
    def read(path: Path, overrides: Sequence[Override] = ()) -> "ConfigSource":
        """Reads a file. Raises ConfigError."""
        return ConfigSource(parse_yaml(_read_text(path), str(path)), tuple(overrides))

    def config(self) -> ClusterConfig:
        """Raises ConfigError: a line a mistake, in line order."""
        values = self.values()
        hosts = ExpectedHosts() if self.document is None else _expected_hosts(self.document)
        try:
            return ClusterConfig.model_validate(values).expecting(hosts)
        except ValidationError as error:
            raise ConfigError("\n".join(self._problems(error))) from None

    def values(self) -> Any:
        """Returns our part of the file, with what is set beside it. Raises ConfigError."""
        values: Any = {} if self.document is None else _our_part(self.document)
        for override in self.overrides:
            values = _with(values, override.path, override)
        return values

    def located(self, key: str) -> str:
        """Returns the place where a key below ROOT is set, and its full name, for a message."""
        path = tuple(key.split("."))
        override = self._override(path)
        if override is not None:
            return f"{override.source}: {key}"
        if self.document is None:
            return key
        path = ROOT + path
        return f"{self.document.filename}:{self.document.line(path)}: {'.'.join(path)}"

    def _problems(self, error: ValidationError) -> list[str]:
        found = []
        for item in error.errors(include_url=False):
            path = tuple(str(part) for part in item["loc"])
            override = self._override(path)
            line = 0 if self.document is None else self.document.line(ROOT + path)
            where = "" if self.document is None else f"{self.document.filename}:{line}: "
            if override is not None:
                line, where = 0, f"{override.source}: "
            found.append((line, path, where + _problem(item)))
        return [text for _, _, text in sorted(found)]

    def _override(self, path: KeyPath) -> Override | None:
        """Returns the last one that sets the value at `path`, or one around or within it."""
        for override in reversed(self.overrides):
            common = min(len(path), len(override.path))
            if path[:common] == override.path[:common]:
                return override
        return None


def _with(values: Any, path: KeyPath, override: Override) -> Any:
    """Returns a copy of `values` with the override's value at `path`."""
    if not path:
        return override.value
    if not isinstance(values, Mapping):
        raise ConfigError(f"{override.source}: {_shown(values)} has no key {path[0]}")
    return {**values, path[0]: _with(values.get(path[0], {}), path[1:], override)}


def _read_text(path: Path) -> str:
    try:
        data = read_bounded(path.expanduser(), MAX_FILE_BYTES)
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
    provider = values.get("provider")
    if not isinstance(provider, Mapping):
        return ExpectedHosts()
    if provider.get("type") != "local":
        return _hosts_of_a_cloud(values)
    if "head_ip" not in provider and "worker_ips" not in provider:
        return ExpectedHosts()
    found = provider.get("worker_ips") or []
    if not isinstance(found, list) or not all(isinstance(host, str) and host for host in found):
        where = f"{document.filename}:{document.line(('provider', 'worker_ips'))}"
        raise ConfigError(f"{where}: provider.worker_ips: got {_shown(found)}, expected a list of addresses")
    head = provider.get("head_ip")
    return ExpectedHosts(addresses=tuple(dict.fromkeys(host for host in found if host != head)))


def _hosts_of_a_cloud(values: Mapping[str, Any]) -> ExpectedHosts:
    """Reads how many hosts Ray's autoscaler keeps, and how many it may start: with Ray's defaults, and
    without judging what Ray judges."""
    found = values.get("available_node_types")
    types = {
        str(name): one
        for name, one in (found.items() if isinstance(found, Mapping) else ())
        if isinstance(one, Mapping) and name != values.get("head_node_type")
    }
    most = values.get("max_workers", RAY_MAX_WORKERS)

    def counts(key: str, default: int) -> dict[str, int]:
        read = {name: one.get(key, default) for name, one in types.items()}
        return {name: count for name, count in read.items() if isinstance(count, int) and count > 0}

    max_hosts = min(most, sum(counts("max_workers", most).values())) if isinstance(most, int) else 0
    return ExpectedHosts(node_types=counts("min_workers", 0), max_hosts=max_hosts)


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
