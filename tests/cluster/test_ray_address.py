"""The Ray that RAY_ADDRESS names: trusted only where this user or root listens, and where a token keeps
others out."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import ray

from pdserve.cluster import ray_address
from pdserve.cluster.errors import LaunchError
from pdserve.cluster.launch import _Ray
from pdserve.cluster.ray_address import RayAddress, check_listener, check_token, listening_uids
from pdserve.cluster.ray_folder import ACCEPT

from ..other_user import NOBODY, listening_as_nobody

pytestmark = pytest.mark.cluster


@pytest.fixture
def connecting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Tries to adopt the Ray at an address in RAY_ADDRESS, as `pdserve up` does; AssertionError: Ray would
    connect."""

    def init(**options: object) -> None:
        raise AssertionError(options)

    def connect(address: str) -> None:
        monkeypatch.setenv("RAY_ADDRESS", address)
        _Ray.connect(tmp_path)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    return connect


@pytest.fixture
def answering(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that answers the first call of a Ray client with `request.param`."""
    code: grpc.StatusCode = request.param

    def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
        assert not dict(context.invocation_metadata()).get("authorization"), (
            "our token is for nobody who has not proved itself"
        )
        if code is not grpc.StatusCode.OK:
            context.abort(code, "as the test wants it")
        return b""

    server = grpc.server(ThreadPoolExecutor(1))
    method = grpc.unary_unary_rpc_method_handler(answer)
    service, name = ray_address.CALL.strip("/").split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:6379", "127.0.0.1", 6379),
        ("head.example:1\n", "head.example", 1),
        ("[::1]:65535", "::1", 65535),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    assert RayAddress.parse(text) == RayAddress(host, port)
    assert str(RayAddress(host, port)) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "auto",
        "local",
        "ray://head:10001",
        "head",
        "head:",
        ":6379",
        "head:0",
        "head:65536",
        "head:six",
        "head:²",
        "::1:6379",
        "[]:1",
    ]
    + ["a b:1", "a\0b:1", "Linux version 6.1 (gcc: 12)\n", "head:" + "9" * 5000],
)
def test_any_other_text_is_no_address(text: str) -> None:
    with pytest.raises(LaunchError, match=r"RAY_ADDRESS: got .*, expected HOST:PORT") as caught:
        RayAddress.parse(text)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["auto", "local", "Linux version 6.1 (gcc: 12)"])
def test_no_ray_is_looked_for_where_the_address_names_none(
    connecting: Callable[[str], None], text: str
) -> None:
    with pytest.raises(LaunchError, match=r"RAY_ADDRESS: got .*, expected HOST:PORT"):
        connecting(text)


HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
TABLE = (
    HEADER
    + "   0: 0100007F:18EB 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 11 1 0 100"
    " 0 0 10 0\n   1: 00000000:18EB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0"
    " 12 1 0 100 0 0 10 0\n   2: 0100007F:18EB 0100007F:B70A 01 00000000:00000000 00:00000000 00000000   "
    " 33        0 13 1 0 20 4 30 10 -1\n   3: 0100007F:18EC 00000000:0000 0A 00000000:00000000 00:00000000"
    " 00000000    34        0 14 1 0 100 0 0 10 0\n"
)
TABLE_6 = (
    HEADER
    + "   4: 00000000000000000000000000000000:18EB 00000000000000000000000000000000:0000 0A 00000000:00000000"
    " 00:00000000 00000000 65534        0 15 1 0 100 0 0 10 0\n   5: 0000000000000000FFFF00000100007F:A126"
    " 0000000000000000FFFF00000100007F:18EB 06 00000000:00000000 03:00001764 00000000     0        0 0"
    " 3 0\n"
)


@pytest.mark.parametrize(
    ("table", "port", "uids"),
    [
        (TABLE, 6379, [1000, 0]),
        (TABLE, 6380, [34]),
        (TABLE, 1, []),
        (TABLE_6, 6379, [65534]),
        (TABLE_6, 0xA126, []),
        (HEADER, 1, []),
    ],
)
def test_listening_users_are_found_in_the_kernels_socket_table(
    table: str, port: int, uids: list[int]
) -> None:
    assert list(listening_uids(table, port)) == uids


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_local_port_that_this_user_listens_on_is_accepted(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = RayAddress(host, server.getsockname()[1])
        check_listener(address)
    with pytest.raises(
        LaunchError, match=f"no Ray cluster answers at RAY_ADDRESS={address}: nothing listens"
    ):
        check_listener(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_a_port_that_another_user_listens_on_is_not_connected_to(
    connecting: Callable[[str], None], host: str
) -> None:
    with (
        listening_as_nobody() as port,
        pytest.raises(LaunchError, match=f"the user with id {NOBODY} listens on port {port}"),
    ):
        connecting(f"{host}:{port}")


def test_a_host_that_has_no_address_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"RAY_ADDRESS: the host of a\.\.b:1 has no known address"):
        check_listener(RayAddress("a..b", 1))


def test_the_address_of_another_host_is_left_to_the_network() -> None:
    check_listener(RayAddress("203.0.113.1", 1))  # reserved for documentation: no host has it


def test_a_ray_with_a_token_is_adopted() -> None:
    check_token(ray.get_runtime_context().gcs_address, accept=False)


@pytest.mark.parametrize("answering", [grpc.StatusCode.OK], indirect=True)
def test_a_ray_without_a_token_is_not_connected_to(
    answering: str,
    connecting: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(LaunchError, match="has no token") as caught:
        connecting(answering)
    for part in (answering, "ray get-auth-token --generate", "RAY_AUTH_MODE=token ray start", ACCEPT):
        assert part in str(caught.value)
    assert caplog.records == []
    monkeypatch.setenv(ACCEPT, "1")
    with pytest.raises(AssertionError, match=answering):
        connecting(answering)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "has no token" in record.getMessage()


@pytest.mark.parametrize("answering", [grpc.StatusCode.UNAUTHENTICATED], indirect=True)
def test_a_ray_that_refuses_a_call_without_a_token_is_connected_to(
    answering: str, connecting: Callable[[str], None]
) -> None:
    with pytest.raises(AssertionError, match=answering):
        connecting(answering)


@pytest.mark.parametrize("answering", [grpc.StatusCode.UNIMPLEMENTED], indirect=True)
def test_a_server_with_another_answer_is_no_ray(answering: str, connecting: Callable[[str], None]) -> None:
    with pytest.raises(LaunchError, match=f"no Ray cluster answers at {answering}: UNIMPLEMENTED"):
        connecting(answering)


def test_an_existing_connection_to_a_ray_without_a_token_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(address: str, accept: bool) -> None:
        raise LaunchError(f"{address} {accept}")

    monkeypatch.setattr(ray_address, "check_token", refuse)
    with pytest.raises(LaunchError, match=f"{ray.get_runtime_context().gcs_address} False"):
        _Ray.connect(tmp_path)


WITHOUT_TOKEN = """
import logging, os, ray, shutil, subprocess, sys, tempfile
from pathlib import Path
from pdserve.cluster.launch import _Ray

folder = Path(tempfile.mkdtemp(prefix="pdserve-", dir="/tmp"))
started = _Ray._start(folder, {"namespace": "pdserve", "log_to_driver": False, "logging_level": logging.ERROR})
up = f"from pathlib import Path; from pdserve.cluster.launch import _Ray; print(_Ray.connect(Path({str(folder)!r})))"
env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
for more in ({}, {sys.argv[1]: "1"}):
    ran = subprocess.run([sys.executable, "-c", up], env=env | more, capture_output=True, text=True)
    print((ran.stdout or ran.stderr).strip().splitlines()[-1], flush=True)
started.disconnect()
shutil.rmtree(folder)
"""


def test_a_real_ray_without_a_token_is_refused_unless_it_is_accepted() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_AUTH_MODE": "disabled"}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_TOKEN, ACCEPT], env=env, capture_output=True, text=True, timeout=250
    )
    refused, accepted = ran.stdout.splitlines()
    assert "LaunchError" in refused and "has no token" in refused, ran.stderr
    assert accepted == "_Ray(ours=True, token=None)", ran.stderr
