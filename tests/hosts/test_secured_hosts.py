"""Several hosts in a network that others can read: WireGuard between them, TLS and a key for clients, Ray's
token."""

import pytest

from ..certificates import Authority
from . import wireguard
from .launcher import configure, edit, ray_up
from .network import Hosts, HostsError, run
from .status import await_status, is_whole

pytestmark = [pytest.mark.journey, pytest.mark.hosts, pytest.mark.cluster, pytest.mark.timeout(3600)]

LISTEN = """\
      tls: {certificate: /root/head.pem, key: /root/head.key}
      api_keys: /root/keys
      grpc: 0.0.0.0:50051
"""
NEW_KEY = "pdserve key new alice --requests-per-minute 100 --tokens-per-minute 10000 --file keys"
ASK = "pdserve generate --temperature 0 --max-tokens 8 'The with statement'"


@pytest.fixture(scope="module")
def addresses(hosts: Hosts) -> dict[str, str]:
    """Those of the hosts' WireGuard; nothing else passes between them."""
    if reason := wireguard.whats_missing():
        pytest.skip(reason)
    encrypted = wireguard.encrypt(hosts)
    for host in hosts.names():
        allow = ("ipproto", "udp", "dport", str(wireguard.PORT), "lookup", "main", "priority", "100")
        run("ip", "-n", hosts.space(host), "rule", "add", "to", "10.77.0.0/24", *allow)
        run(
            "ip", "-n", hosts.space(host), "rule", "add", "to", "10.77.0.0/24", "blackhole", "priority", "101"
        )
    return encrypted


@pytest.fixture(scope="module")
def variables(hosts: Hosts, addresses: dict[str, str]) -> str:
    """Those of a client on the operator's host. The cluster serves on all hosts."""
    configure(hosts, addresses)
    edit(hosts, "      grpc: 127.0.0.1:50051 # 0.0.0.0:50051 to be reached from other hosts\n", LISTEN)
    edit(hosts, "      http: 127.0.0.1:8000", "      http: null")
    Authority(hosts.home("operator")).sign("head", addresses["head"])
    for name in ("head.pem", "head.key"):
        (hosts.home("operator") / name).rename(hosts.home("head") / name)
    key = hosts.run("head", NEW_KEY).split()[-1]
    ray_up(hosts)
    assert not await_status(hosts, is_whole)["degraded"]
    return f"PDSERVE_ADDRESS={addresses['head']}:50051 PDSERVE_TLS_CA=ca.pem PDSERVE_API_KEY={key}"


def test_a_cluster_needs_nothing_but_wireguard_between_its_hosts(
    hosts: Hosts, addresses: dict[str, str], variables: str
) -> None:
    with pytest.raises(HostsError, match="Invalid argument"):  # no route
        hosts.run("operator", f"bash -c '< /dev/tcp/{hosts.address('head')}/22'")
    status = await_status(hosts, is_whole)
    assert {host["address"] for host in status["hosts"]} == {
        address for host, address in addresses.items() if host != "operator"
    }
    assert hosts.run("operator", f"{variables} {ASK}")


@pytest.mark.parametrize(
    ("variable", "said"),
    [("PDSERVE_TLS_CA", "speaks TLS"), ("PDSERVE_API_KEY", "key")],
)
def test_a_client_from_another_host_needs_tls_and_a_key(
    hosts: Hosts, variables: str, variable: str, said: str
) -> None:
    kept = " ".join(word for word in variables.split() if not word.startswith(variable))
    with pytest.raises(HostsError, match=said):
        hosts.run("operator", f"{kept} {ASK}")


def test_rays_token_is_private_on_every_host_and_needed_from_any(
    hosts: Hosts, addresses: dict[str, str], variables: str
) -> None:
    for host in hosts.names():
        assert hosts.run(host, "stat -c %a .ray/auth_token") == "600\n"
    ask = f"ray status --address={addresses['head']}:6379"
    assert "Active" in hosts.run("worker1", f"RAY_AUTH_MODE=token {ask}")
    with pytest.raises(HostsError, match=r"[Aa]uthentication"):
        hosts.run("worker1", f"RAY_AUTH_MODE=disabled {ask}")
