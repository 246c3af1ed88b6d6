"""Changes the prefill:decode ratio while streams run: `python examples/apply_under_load.py 127.0.0.1:50051
cluster.yaml`.

The second argument is the file that the cluster was started with. Four clients stream all the time; meanwhile
one decode instance more is applied, and taken away again. Each stream must end whole."""

import sys
import threading
from pathlib import Path

import grpc
import yaml

from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc

NUM_CLIENTS = 4
MAX_TOKENS = 32


class StreamingLoad:
    """Clients that stream, one request after the other, until `stop`."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.num_streams = 0
        self.errors: list[str] = []
        self._generation = pdserve_pb2_grpc.GenerationStub(channel)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._clients = [threading.Thread(target=self._run) for _ in range(NUM_CLIENTS)]
        for client in self._clients:
            client.start()

    def _run(self) -> None:
        sampling = pb.SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
        request = pb.GenerateRequest(prompt=pb.Prompt(text="The with statement"), sampling=sampling)
        while not self._ended.is_set():
            try:
                events = list(self._generation.GenerateStream(request, timeout=120))
                num_tokens = sum(len(event.tokens.token_ids) for event in events)
                error = "" if num_tokens == MAX_TOKENS else f"{num_tokens} tokens"
            except grpc.RpcError as failure:
                error = f"{failure.code().name}: {failure.details()}"
            with self._lock:
                self.num_streams += 1
                self.errors += [error] if error else []

    def stop(self) -> None:
        self._ended.set()
        for client in self._clients:
            client.join()


def wait_until_ready(cluster: pdserve_pb2_grpc.ClusterStub, num_decode: int) -> None:
    for status in cluster.WatchStatus(pb.WatchStatusRequest(), timeout=120):
        decode = [worker for worker in status.workers if worker.role == "decode"]
        if len(decode) == num_decode and all(worker.state == pb.WORKER_STATE_READY for worker in decode):
            return


def main(address: str, file: str) -> None:
    config = yaml.safe_load(Path(file).read_text())
    decode = config["metadata"]["pdserve"]["pools"]["decode"]
    before = decode["instances"]
    with grpc.insecure_channel(address) as channel:
        cluster = pdserve_pb2_grpc.ClusterStub(channel)
        load = StreamingLoad(channel)
        try:
            for instances in (before + 1, before):
                decode["instances"] = instances
                for change in cluster.Apply(pb.ApplyRequest(config_yaml=yaml.safe_dump(config))).changes:
                    print(change)
                wait_until_ready(cluster, instances)
        finally:
            load.stop()
    print(f"{load.num_streams} streams, {len(load.errors)} not whole", *load.errors, sep="\n")
    sys.exit(bool(load.errors))


if __name__ == "__main__":
    main(*sys.argv[1:])
