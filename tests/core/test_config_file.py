import copy
import pickle
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import example, given, strategies as st
from ruamel.yaml import YAML

from pdserve.core.config import ClusterConfig
from pdserve.core.config_file import ConfigSource, Override, parse_cluster_config
from pdserve.core.config_schema import cluster_schema, cluster_schema_text
from pdserve.core.errors import ConfigError
from pdserve.core.hosts import ExpectedHosts
from pdserve.core.yaml_lines import parse_yaml

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "cluster.yaml"


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_cluster_config(text, "c.yaml")
    return str(caught.value)


def ours(lines: str) -> str:
    """A file whose part of ours starts on line 4."""
    return "cluster_name: x\nmetadata:\n  pdserve:\n" + "".join(
        f"    {line}\n" for line in lines.splitlines()
    )


def test_the_sample_file_spells_out_the_defaults() -> None:
    assert ConfigSource.read(SAMPLE).config() == ClusterConfig().expecting(ExpectedHosts(addresses=()))


def test_an_empty_part_means_the_defaults() -> None:
    assert parse_cluster_config("metadata: {pdserve: {}}") == ClusterConfig()


def test_all_mistakes_are_reported_together_in_line_order() -> None:
    text = ours("""\
listen: {grpc: localhost, https: "127.0.0.1:8000"}
pools:
  prefil: {instances: 1}
  decode:
    instances: -1
    threads: 1.5
model: {dtype: int8, path: ""}
device: gpu
slo:
1: 2""")
    at = "metadata.pdserve"
    assert refusal(text).splitlines() == [
        (
            f"c.yaml:4: {at}.listen.grpc: got 'localhost', expected HOST:PORT such as 127.0.0.1:50051, or a"
            " port of 0 to 65535"
        ),
        f"c.yaml:4: {at}.listen.https: unknown key, did you mean 'http'?",
        f"c.yaml:6: {at}.pools.prefil: unknown key, did you mean 'prefill'?",
        f"c.yaml:8: {at}.pools.decode.instances: got -1, expected at least 0",
        f"c.yaml:9: {at}.pools.decode.threads: got 1.5, expected auto or a positive integer",
        (
            f"c.yaml:10: {at}.model.dtype: got 'int8', expected one of 'auto', 'float32', 'bfloat16' or"
            " 'float16'"
        ),
        f"c.yaml:10: {at}.model.path: got '', expected a text that is not empty",
        f"c.yaml:11: {at}.device: got 'gpu', expected one of 'auto', 'cpu' or 'cuda'",
        f"c.yaml:12: {at}.slo: got nothing, expected a mapping with keys of ttft_ms, itl_ms, enforce",
        (
            f"c.yaml:13: {at}.1: unknown key, expected one of model, pools, slo, kv, routing, limits, listen,"
            " planner, observability, kernels, device, drain_timeout_s, join_timeout_s"
        ),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "kernels: cuda",
            "kernels: got 'cuda', expected one of 'auto', 'native', 'amx', 'avx512_bf16', 'avx512', 'avx2', 'portable', 'torch' or 'triton'",
        ),
        (
            "kernels: null",
            "kernels: got nothing, expected one of 'auto', 'native', 'amx', 'avx512_bf16', 'avx512', 'avx2', 'portable', 'torch' or 'triton'",
        ),
        (
            "kv: {transport: rdma}",
            "kv.transport: got 'rdma', expected one of 'auto', 'shm', 'gloo', 'cuda_ipc' or 'nccl'",
        ),
        ("kv: {block_size: 12}", "kv.block_size: got 12, expected auto or a multiple of 8"),
        (
            "pools: {prefill: {gpus_per_instance: 2}}",
            "pools.prefill.gpus_per_instance: got 2, expected at most 1",
        ),
        (
            "pools: {prefill: {gpus_per_instance: 0}}",
            "pools.prefill.gpus_per_instance: got 0, expected more than 0",
        ),
        ("pools: {prefill: {gpus_per_instance: .nan}}", "pools.prefill.gpus_per_instance: got nan, expected"),
        (
            "pools: {prefill: {gpus_per_instance: half}}",
            "pools.prefill.gpus_per_instance: got 'half', expected a number",
        ),
        (
            "limits: {max_prompt_logprobs: 300000}",
            "limits.max_prompt_logprobs: got 300000, expected at most 262144",
        ),
        ("limits: {max_n: '2'}", "limits.max_n: got '2', expected an integer"),
        ("limits: {max_n: true}", "limits.max_n: got true, expected an integer"),
        ("limits: {max_n: 0}", "limits.max_n: got 0, expected more than 0"),
        ("limits: {max_prompt_tokens: 0}", "limits.max_prompt_tokens: got 0, expected more than 0"),
        ("drain_timeout_s: .inf", "drain_timeout_s: got inf, expected a number"),
        ("drain_timeout_s: soon", "drain_timeout_s: got 'soon', expected a number"),
        ("slo: {itl_ms: -1}", "slo.itl_ms: got -1, expected more than 0"),
        ("model: [embedded]", "model: got ['embedded'], expected a mapping with keys of path, dtype, "),
        ("model: {path: 7}", "model.path: got 7, expected a text that is not empty"),
        ("model: {max_model_len: 0}", "model.max_model_len: got 0, expected auto or a positive integer"),
        (
            "pools: {prefill: {kv_cache_bytes: 5M}}",
            "pools.prefill.kv_cache_bytes: got '5M', expected auto, a number",
        ),
        (
            "listen: {grpc: '0.0.0.0:50051'}",
            (
                "listen.grpc: got '0.0.0.0:50051', expected a loopback address such as 127.0.0.1:50051, or"
                " listen.tls, or"
            ),
        ),
        ("listen: {allow_insecure: 1}", "listen.allow_insecure: got 1, expected true or false"),
        (
            "listen: {tls: {certificate: c.pem}}",
            "listen.tls.certificate: got 'c.pem', expected the path of a file, from / or ~/",
        ),
        (
            "listen: {tls: {key: /k}}",
            "listen.tls: got one without the other, expected certificate and key together",
        ),
        (
            "pools: {prefill: {max_batch_tokens: 12}}",
            "pools.prefill.max_batch_tokens: got 12, expected at least max_batch_size (256)",
        ),
        (
            "pools: {prefill: {max_batch_size: 4096}}",
            "pools.prefill.max_batch_tokens: got 2048, expected at least max_batch_size (4096)",
        ),
        (
            "pools: {prefill: {instances: 0}, decode: {instances: 0}}",
            "pools: got 0 in each, expected at least one instance in prefill or decode",
        ),
    ],
)
def test_a_bad_value_is_reported_with_the_expected_one(line: str, problem: str) -> None:
    assert refusal(ours(line)).startswith(f"c.yaml:4: metadata.pdserve.{problem}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml:1: file: got nothing, expected a mapping with metadata"),
        ("- 1", "c.yaml:1: file: got [1], expected a mapping with metadata"),
        ("cluster_name: x", "c.yaml:1: metadata: missing, expected metadata.pdserve in this file"),
        (
            "metdata: {}",
            "c.yaml:1: metadata: missing, found 'metdata', expected metadata.pdserve in this file",
        ),
        (
            "a: 1\nmetadata: {other: 1}",
            "c.yaml:2: metadata.pdserve: missing, expected metadata.pdserve in this file",
        ),
        ("a: 1\nmetadata:", "c.yaml:2: metadata: got nothing, expected a mapping with pdserve"),
        (
            "metadata: {pdserve: }",
            "c.yaml:1: metadata.pdserve: got nothing, expected a mapping with keys of model",
        ),
        ("a: [1", "c.yaml:1: not valid YAML: expected ',' or ']'"),
        ("a: 1\nb: 1\na: 2", 'c.yaml:3: not valid YAML: found duplicate key "a"'),
        ("a: 1\n---\nb: 1", "c.yaml:2: not valid YAML:"),
        ("a: 1\nb: \x01", "c.yaml:2: not valid YAML: special characters are not allowed"),
        ("a: 1\n\tb: 1", "c.yaml:2: not valid YAML:"),
        ("[" * 500, "c.yaml:1: more than 16 levels"),
        ("a: " + "[" * 20 + "]" * 20, "c.yaml:1: more than 16 levels"),
        (f"a: &a [{'1,' * 200}]\nb: &b [{'*a ,' * 200}]", "c.yaml:1: more than 16 levels or 10000 values"),
        ("? {b: {c: 1}}\n: 1", "c.yaml:1: not valid YAML:"),  # a mapping as a key
        (f"a: {'9' * 5000}", "c.yaml:1: not valid YAML:"),
    ],
)
def test_a_file_without_a_configuration_is_reported(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


def test_a_file_of_thousands_of_levels_is_refused_before_it_is_composed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(YAML, "load", None)
    assert refusal("x: " + "[" * 32_000).startswith("c.yaml:1: more than 16 levels")


def test_keys_merged_from_an_anchor_are_read() -> None:
    text = ours("pools:\n  prefill: &one {instances: 2}\n  decode: {<<: *one, threads: 1}")
    assert parse_cluster_config(text).pools.decode.instances == 2
    assert (
        refusal(text.replace("instances: 2", "instances: two")).count("got 'two', expected an integer") == 2
    )


def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such file"):
        ConfigSource.read(tmp_path / "missing.yaml").config()
    with pytest.raises(ConfigError, match="cannot be read"):
        ConfigSource.read(tmp_path).config()
    bad = tmp_path / "latin1.yaml"
    bad.write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin1\.yaml:2: byte 0xe9 is not UTF-8"):
        ConfigSource.read(bad).config()


SCALARS = (
    st.none() | st.booleans() | st.integers(-1, 10**25) | st.floats() | st.text(max_size=5) | st.just("auto")
)
PATHS = [
    ("model",),
    ("model", "path"),
    ("model", "max_model_len"),
    ("model", "typo"),
    ("pools",),
    ("pools", "prefill"),
    ("pools", "prefill", "instances"),
    ("pools", "decode", "cpus_per_instance"),
    ("pools", "decode", "gpus_per_instance"),
    ("device",),
    ("pools", "decode", "kv_cache_bytes"),
    ("slo", "ttft_ms"),
    ("kv", "block_size"),
    ("limits", "max_prompt_tokens"),
    ("listen", "grpc"),
    ("listen", "http"),
    ("kernels",),
    ("drain_timeout_s",),
    ("join_timeout_s",),
]


@given(
    path=st.sampled_from(PATHS),
    value=SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(), SCALARS),
)
def test_any_value_is_accepted_or_refused_by_its_key(path: tuple[str, ...], value: Any) -> None:
    tree: Any = value
    for key in reversed(path):
        tree = {key: tree}
    text = yaml.safe_dump({"metadata": {"pdserve": tree}}, allow_unicode=False)
    message = ""
    try:
        parse_cluster_config(text)
    except ConfigError as error:
        message = str(error)
    assert not message or f"metadata.pdserve.{'.'.join(path)}" in message


@given(text=st.text() | st.text(alphabet="[]{}:,&*!|>-'\"?#%@`\n\t abc<~"))
@example("a: &x [*x ]")
@example("%YAML 9.9\n---\na")
@example("! a")
@example("&a")
def test_no_text_breaks_the_parser(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_cluster_config(text)


def test_the_committed_schema_is_the_generated_one() -> None:
    committed = (ROOT / "docs" / "cluster.schema.json").read_text()
    assert committed == cluster_schema_text(), (
        "run: python -m pdserve.core.config_schema > docs/cluster.schema.json"
    )


def test_the_schema_agrees_with_the_parser() -> None:
    validator = jsonschema.Draft202012Validator(cluster_schema())
    validator.check_schema(cluster_schema())
    sample = yaml.safe_load(SAMPLE.read_text())
    validator.validate(sample)
    for part, bad in [
        ({"pools": {"prefill": {"instances": -1}}}, True),
        ({"kv": {"block_size": 12}}, True),
        ({"kv": {"block_size": 24}}, False),
        ({"pools": {"prefill": {"kv_cache_bytes": "5M"}}}, True),
        ({"pools": {"prefill": {"kv_cache_bytes": "5MiB"}}}, False),
        ({"http": 1}, True),
    ]:
        changed = copy.deepcopy(sample)
        changed["metadata"]["pdserve"] = part
        assert (not validator.is_valid(changed)) == bad, part


def test_rays_own_validator_accepts_the_sample() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load(SAMPLE.read_text()))
    validate_config(prepared)
    assert prepared["metadata"]["pdserve"]["pools"]["prefill"]["instances"] == 1
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepared, "pdserve": {}})


def test_the_file_written_by_ray_up_on_the_head_is_readable(tmp_path: Path) -> None:
    import json

    from ray.autoscaler._private.util import prepare_config

    bootstrap = tmp_path / "ray_bootstrap_config.yaml"
    bootstrap.write_text(json.dumps(prepare_config(yaml.safe_load(SAMPLE.read_text()))))
    assert ConfigSource.read(bootstrap).config() == ClusterConfig().expecting(ExpectedHosts(addresses=()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ExpectedHosts()),
        (
            "provider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2, b, 10.0.0.1, b]}",
            ExpectedHosts(("10.0.0.2", "b")),
        ),
        ("provider: {type: local, head_ip: 10.0.0.1}", ExpectedHosts(())),
        ("provider: {type: local, coordinator_address: 10.0.0.1:80}", ExpectedHosts()),
        (
            (
                "provider: {type: aws}\navailable_node_types: {head: {}, gpu: {min_workers: 2}, cpu:"
                " {min_workers: 0}}"
            ),
            ExpectedHosts(node_types={"gpu": 2}, max_hosts=2),
        ),
        (
            (
                "provider: {type: aws}\nmax_workers: 9\nhead_node_type: head\navailable_node_types:"
                " {head: {max_workers: 1}, gpu: {min_workers: 2, max_workers: 4}, cpu: {max_workers: 3}}"
            ),
            ExpectedHosts(node_types={"gpu": 2}, max_hosts=7),
        ),
        (
            "provider: {type: gcp}\nmax_workers: 5\navailable_node_types: {gpu: {min_workers: 1}}",
            ExpectedHosts(node_types={"gpu": 1}, max_hosts=5),
        ),
        ("provider: {type: gcp}\nmax_workers: many\navailable_node_types: [1]", ExpectedHosts()),
    ],
)
def test_which_hosts_there_will_be_is_read_from_rays_part(text: str, expected: ExpectedHosts) -> None:
    config = parse_cluster_config(f"metadata: {{pdserve: {{}}}}\n{text}")
    assert config.hosts == expected
    assert pickle.loads(pickle.dumps(config)).hosts == expected, "it travels to the head"


def test_workers_that_are_no_list_of_addresses_are_refused() -> None:
    text = "metadata: {pdserve: {}}\nprovider:\n  type: local\n  worker_ips: 10.0.0.2\n"
    with pytest.raises(ConfigError) as caught:
        parse_cluster_config(text, "c.yaml")
    assert str(caught.value) == "c.yaml:4: provider.worker_ips: got '10.0.0.2', expected a list of addresses"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("pools.decode.instances=3", ("pools", "decode", "instances"), 3),
        ("metadata.pdserve.model.dtype=bf16", ("model", "dtype"), "bf16"),
        ("listen.http=null", ("listen", "http"), None),
        ("pools.prefill={instances: 0}", ("pools", "prefill"), {"instances": 0}),
        ("model.path=a=b", ("model", "path"), "a=b"),
    ],
)
def test_a_value_that_is_set_is_yaml(text: str, key: tuple[str, ...], value: Any) -> None:
    override = Override.parse(text)
    assert (override.path, override.value) == (key, value)


@pytest.mark.parametrize("text", ["", "pools", "=3", "pools..x=3", "Pools=3"])
def test_what_sets_no_key_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected KEY=VALUE, such as "):
        Override.parse(text)


def source(text: str, *overrides: str) -> ConfigSource:
    return ConfigSource(parse_yaml(text, "c.yaml"), tuple(map(Override.parse, overrides)))


FILE = "metadata:\n  pdserve:\n    pools:\n      decode: {instances: 2}\n    model: {dtype: nothing}\n"


def test_values_that_are_set_take_the_place_of_the_files() -> None:
    config = source(
        FILE, "pools.decode.instances=3", "model.dtype=fp16", "pools.prefill.instances=2"
    ).config()
    assert (config.pools.decode.instances, config.pools.prefill.instances) == (3, 2)
    assert config.model.dtype == "float16"


def test_mistakes_name_what_set_them() -> None:
    with pytest.raises(ConfigError) as error:
        source(FILE, "pools.decode.instances=x", "pols.decode=1").config()
    assert str(error.value).splitlines() == [
        "--set pols.decode=1: metadata.pdserve.pols: unknown key, did you mean 'pools'?",
        "--set pools.decode.instances=x: metadata.pdserve.pools.decode.instances: got 'x', expected an integer",
        "c.yaml:5: metadata.pdserve.model.dtype: got 'nothing', expected one of 'auto', 'float32', 'bfloat16'"
        " or 'float16'",
    ]


def test_a_key_is_located_where_it_is_set() -> None:
    assert source(FILE).located("model.dtype") == "c.yaml:5: metadata.pdserve.model.dtype"
    assert source(FILE, "model.dtype=fp16").located("model.dtype") == "--set model.dtype=fp16: model.dtype"
    assert ConfigSource(None).located("model.path") == "model.path"
