import pytest
from pydantic import ValidationError

from pdserve.core.config import MAX_INSTANCES, ClusterConfig, PoolSection
from pdserve.core.config_file import parse_cluster_config
from pdserve.core.config_types import parse_host_port, parse_size
from pdserve.core.errors import ConfigError
from pdserve.core.messages import Role


def config(**parts: object) -> ClusterConfig:
    return ClusterConfig.model_validate(parts)


def test_every_key_has_a_default_for_a_laptop_with_two_cores() -> None:
    default = ClusterConfig()
    assert default.model.path == "embedded"
    assert sum(pool.num_instances * pool.num_cpus for _, pool in default.pools.items()) == 2
    assert [default.kv.num_tokens_per_block(device) for device in ("cpu", "cuda")] == [16, 64]
    assert default.listen.grpc_host_port == ("127.0.0.1", 50051)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ClusterConfig().pools.prefill.instances = 2


@pytest.mark.parametrize("prefill", [0, 1])
@pytest.mark.parametrize("decode", [0, 1])
def test_one_pool_may_be_empty_but_not_both(prefill: int, decode: int) -> None:
    pools = {"prefill": {"instances": prefill}, "decode": {"instances": decode}}
    if prefill + decode:
        assert config(pools=pools).pools.prefill.instances == prefill
    else:
        with pytest.raises(ValidationError, match="at least one instance"):
            config(pools=pools)


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_instances_have_a_limit_as_each_is_listed(pool: str) -> None:
    """More froze the head that was to apply them, also as a dry run."""
    assert config(pools={pool: {"instances": MAX_INSTANCES}})
    text = f"metadata: {{pdserve: {{pools: {{{pool}: {{instances: 100000000}}}}}}}}"
    with pytest.raises(ConfigError, match=rf"pools\.{pool}\.instances: got 100000000, expected at most 4096"):
        parse_cluster_config(text)


def test_instances_may_share_a_core() -> None:
    assert PoolSection(cpus_per_instance=0.5).num_cpus == 0.5
    assert PoolSection(cpus_per_instance=0.5).num_threads == 1
    assert PoolSection(devices_per_instance=3).num_cpus == 3
    assert PoolSection(devices_per_instance=3).num_threads == 3
    assert PoolSection(devices_per_instance=3, threads=2).num_threads == 2


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("512MiB", 512 << 20),
        ("1.5 GiB", 3 << 29),
        ("64KiB", 65536),
        ("7B", 7),
        (4096, 4096),
        ("2TiB", 2 << 40),
        ("4GB", 4 * 10**9),
        ("1.5 MB", 1_500_000),
    ],
)
def test_sizes_are_numbers_or_carry_a_unit(text: str | int, num_bytes: int) -> None:
    assert PoolSection.model_validate({"kv_cache_bytes": text}).kv_cache_bytes == num_bytes


@pytest.mark.parametrize(("short", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_dtypes_have_short_names(short: str, dtype: str) -> None:
    assert ClusterConfig.model_validate({"model": {"dtype": short}}).model.dtype == dtype


def test_a_port_alone_listens_on_loopback() -> None:
    assert ClusterConfig.model_validate({"listen": {"grpc": 1234}}).listen.grpc == "127.0.0.1:1234"


@pytest.mark.parametrize("text", ["", "12", "5M", "-5MiB", "0B", 0, -1, 1.5, True, None, "MiB", "5 mib"])
def test_other_sizes_are_refused(text: object) -> None:
    assert parse_size(text) is None
    with pytest.raises(ValidationError, match="512MiB"):
        PoolSection.model_validate({"kv_cache_bytes": text})


@pytest.mark.parametrize(
    ("text", "host_port"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        ("[::1]:0", ("::1", 0)),
        ("gpu-host.example:65535", ("gpu-host.example", 65535)),
        ("localhost", None),
        ("localhost:", None),
        (":80", ("127.0.0.1", 80)),
        ("80", ("127.0.0.1", 80)),
        (80, ("127.0.0.1", 80)),
        (65536, None),
        (True, None),
        ("a:65536", None),
        ("a:b:80", None),
        ("::1:80", None),
    ],
)
def test_addresses_are_host_and_port_or_a_port_of_loopback(
    text: object, host_port: tuple[str, int] | None
) -> None:
    assert parse_host_port(text) == host_port


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.8.8.8:1", "[::1]:5", "localhost:5"])
def test_loopback_needs_no_protection(address: str) -> None:
    assert config(listen={"grpc": address}).listen.grpc == address


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "gpu-host.example:1", "localhost.example:1"]
)
def test_other_hosts_are_let_in_with_tls_or_on_purpose(address: str) -> None:
    with pytest.raises(ValidationError, match=r"listen\.tls, or listen\.allow_insecure: true"):
        config(listen={"grpc": address})
    config(listen={"grpc": address, "allow_insecure": True})
    tls = {"certificate": "/c", "key": "/k"}
    with pytest.raises(ValidationError, match=r"listen\.api_keys or listen\.tls\.client_ca"):
        config(listen={"grpc": address, "tls": tls})
    config(listen={"grpc": address, "tls": tls, "api_keys": "/keys"})
    config(listen={"grpc": address, "tls": tls | {"client_ca": "/ca"}})


def test_there_is_one_way_to_administer() -> None:
    config(listen={"admin_without_key": True})
    with pytest.raises(ValidationError, match="api_keys or admin_without_key"):
        config(listen={"admin_without_key": True, "api_keys": "/etc/pdserve/keys"})


def test_one_client_may_send_a_message_of_any_allowed_size() -> None:
    config(limits={"max_message_bytes": 64 << 20, "max_held_bytes": 512 << 20})
    with pytest.raises(ValidationError, match="max_held_bytes of at least 8 times max_message_bytes"):
        config(limits={"max_message_bytes": 65 << 20, "max_held_bytes": 512 << 20})


@pytest.mark.parametrize("tls", [{"certificate": "/c"}, {"key": "/k"}, {"client_ca": "/a"}])
def test_tls_needs_a_certificate_and_its_key(tls: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="certificate and key"):
        config(listen={"tls": tls})


@pytest.mark.parametrize(
    ("path", "served", "name"),
    [
        ("/models/llama-3/", None, "llama-3"),
        ("embedded", None, "embedded"),
        ("/m/x", "y", "y"),
        ("/", None, "/"),
    ],
)
def test_a_model_is_served_under_the_last_part_of_its_path(path: str, served: str | None, name: str) -> None:
    assert config(model={"path": path, "served_name": served}).model.name == name


def test_instances_slo_and_limits_change_without_a_restart() -> None:
    new = config(
        pools={"prefill": {"instances": 3}, "decode": {"instances": 2}},
        slo={"ttft_ms": 1},
        limits={"max_tokens": 7},
        kv={"cache_sharing": "all"},
    )
    assert ClusterConfig().changes_needing_restart(new) == []


@pytest.mark.parametrize("name", ["", "a:80", "http://a", "a b", ".a", 1])
def test_hosts_that_are_allowed_are_names(name: object) -> None:
    assert config(listen={"allowed_hosts": ["serve.example", "a"]}).listen.allowed_hosts == (
        "serve.example",
        "a",
    )
    with pytest.raises(ValidationError, match="the name of a host"):
        config(listen={"allowed_hosts": [name]})


def test_other_changes_are_named_by_their_keys() -> None:
    new = config(
        model={"path": "/m"},
        pools={"decode": {"instances": 2, "threads": 2}},
        limits={"max_message_bytes": 1},
        listen={"grpc": "127.0.0.1:1"},
        kernels="torch",
    )
    keys = ["model.path", "pools.decode.threads", "limits.max_message_bytes", "listen.grpc", "kernels"]
    assert ClusterConfig().changes_needing_restart(new) == keys
    assert new.changes_needing_restart(ClusterConfig()) == keys


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ({"tensor_parallel": 3}, "tensor_parallel.*1, 2, 4 or 8"),
        ({"tensor_parallel": 2, "devices_per_instance": 3}, r"devices_per_instance.*multiple.*\(2\)"),
        ({"tensor_parallel": 4, "threads": 6}, r"threads.*multiple of tensor_parallel \(4\)"),
    ],
)
def test_ranks_are_a_power_of_two_and_share_cores_evenly(pool: dict[str, int], expected: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){expected}"):
        config(pools={"decode": pool})


def test_each_rank_has_a_core_by_default() -> None:
    pool = config(pools={"decode": {"tensor_parallel": 4}}).pools.decode
    assert (pool.devices_per_instance, pool.num_cpus, pool.num_threads_per_rank) == (4, 4, 1)
    pool = config(pools={"decode": {"tensor_parallel": 2, "devices_per_instance": 8}}).pools.decode
    assert (pool.num_cpus, pool.num_threads_per_rank) == (8, 4)


def test_the_number_of_ranks_is_fixed_while_the_cluster_runs() -> None:
    new = config(pools={"decode": {"tensor_parallel": 2}})
    keys = ["pools.decode.tensor_parallel", "pools.decode.devices_per_instance"]
    assert ClusterConfig().changes_needing_restart(new) == keys


def test_a_configuration_survives_serialisation() -> None:
    original = config(
        pools={"decode": {"kv_cache_bytes": "1GiB", "cpus_per_instance": 0.5, "tensor_parallel": 2}},
        kv={"block_size": 32},
    )
    assert ClusterConfig.model_validate(original.model_dump()) == original
    assert ClusterConfig.model_validate_json(original.model_dump_json()) == original


RANGE = {"prefill": {"instances": {"min": 1, "max": 4}}}


def test_a_range_of_instances_starts_at_its_least_number() -> None:
    pools = config(pools=RANGE).pools
    assert (pools.prefill.num_instances, pools.decode.num_instances) == (1, 1)
    started = config(pools={"decode": {"instances": {"min": 0, "max": 4, "start": 3}}}).pools.decode
    assert started.num_instances == 3 and str(started.instances) == "3 of 0 to 4"


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        ("{min: 3, max: 2}", r"got max: 2, expected max of at least min \(3\)"),
        ("{min: 1}", r"got min, expected max as well"),
        ("{min: 1, max: 4097}", r"got 4097, expected max of at most 4096"),
        ("{min: x, max: 2}", r"got 'x', expected min of an integer"),
        ("{min: 1, max: 2, start: 3}", r"got start: 3, expected start from min to max \(1 to 2\)"),
        ("{min: 1, max: 2, most: 3}", r"got most, expected min, max and start alone"),
    ],
)
def test_a_range_of_instances_is_refused_by_name(given: str, refusal: str) -> None:
    text = f"metadata: {{pdserve: {{pools: {{decode: {{instances: {given}}}}}}}}}"
    with pytest.raises(ConfigError, match=rf"pools\.decode\.instances: {refusal}"):
        parse_cluster_config(text)


def test_a_planner_without_a_range_is_refused() -> None:
    text = "metadata: {pdserve: {planner: {mode: auto}}}"
    with pytest.raises(ConfigError, match=r"planner\.mode: auto, and instances: 1, 1, expected a pool"):
        parse_cluster_config(text)


def test_a_horizon_shorter_than_a_flip_is_refused() -> None:
    text = "metadata: {pdserve: {planner: {horizon_s: 0.5}}}"
    with pytest.raises(ConfigError, match=r"planner\.horizon_s: got 0\.5, expected at least 10"):
        parse_cluster_config(text)


def test_an_applied_range_keeps_the_number_in_force() -> None:
    new = config(pools={**RANGE, "decode": {"instances": 2}})
    kept = new.keeping({Role.PREFILL: 3, Role.DECODE: 5}).pools
    assert (kept.prefill.num_instances, kept.decode.num_instances) == (3, 2)
    assert new.keeping({Role.PREFILL: 9, Role.DECODE: 1}).pools.prefill.num_instances == 4


def test_planner_and_ranges_change_without_a_restart() -> None:
    new = config(pools=RANGE, planner={"mode": "auto", "horizon_s": 60.0, "objective": "cost"})
    assert not config().changes_needing_restart(new)
