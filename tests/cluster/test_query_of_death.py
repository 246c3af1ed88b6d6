"""A client whose requests end the processes of workers, by a hook of the tests in place of a bug. The cluster
has a Ray of its own, whose processes inherit the hook."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import yaml

from bench.chaos.gray import hooked
from bench.chaos.gray_hook import deadly_name
from pdserve.gateway.auth.keys import make_key, new_key
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc
from pdserve.router.deaths import CONVICTIONS, MAX_CONVICTIONS

pytestmark = pytest.mark.cluster
KEYS = {"mallory": new_key(), "alice": new_key()}


def as_key(name: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {KEYS[name]}"),)


def request(name: str, first_token: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=name,
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=range(first_token, first_token + 20))),
        sampling=pb.SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True),
    )


@contextmanager
def running(tmp_path: Path) -> Iterator[str]:
    """Runs a cluster that knows two keys; yields its address."""
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    file.write_text("".join(make_key(name, key).line + "\n" for name, key in KEYS.items()))
    pool = {"cpus_per_instance": 0.5, "kv_cache_bytes": 64 << 20, "max_batch_size": 64}
    settings = {
        "pools": {"prefill": pool, "decode": pool},
        "listen": {"grpc": "127.0.0.1:0", "http": None, "api_keys": str(file)},
        "observability": {"log_format": "console"},
    }
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"metadata": {"pdserve": settings}}))
    command = "from pdserve.cli.entry import main; main()"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-c", command, "up", str(tmp_path / "cluster.yaml")],
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            ready = next(line for line in process.stderr if line.startswith("ready: "))
            threading.Thread(target=process.stderr.read, daemon=True).start()  # or its writer would wait
            yield ready.split(" at ")[1].split(",")[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def test_a_client_that_goes_on_killing_workers_is_refused(tmp_path: Path) -> None:
    """Each request has a new name and prompt. All of its key is refused, and nobody else."""
    mallory, alice = as_key("mallory"), as_key("alice")
    with hooked() as faults, running(tmp_path) as address, grpc.insecure_channel(address) as channel:
        generation = rpc.GenerationStub(channel)
        before = generation.Generate(request("before", 500), timeout=120, metadata=alice)
        num_deaths = []
        for number in range(MAX_CONVICTIONS):
            name = deadly_name(0, str(number))
            with pytest.raises(grpc.RpcError) as ended:
                generation.Generate(request(name, 10 + 30 * number), timeout=240, metadata=mallory)
            assert ended.value.code() is grpc.StatusCode.INTERNAL, ended.value.details()
            num_deaths.append(len(faults.deaths(f"mallory/{name}")))
        assert num_deaths == [2] * CONVICTIONS + [1] * (MAX_CONVICTIONS - CONVICTIONS)
        with pytest.raises(grpc.RpcError) as refused:
            generation.Generate(request("harmless", 500), timeout=120, metadata=mallory)
        assert refused.value.code() is grpc.StatusCode.INTERNAL
        assert f"{MAX_CONVICTIONS} requests of this client" in (refused.value.details() or "")
        after = generation.Generate(request("after", 500), timeout=240, metadata=alice)
        assert after.choices[0].token_ids == before.choices[0].token_ids
