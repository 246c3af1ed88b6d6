"""`pdserve demo`: the embedded model through one prefill and one decode worker, asked one thing, and a picture of its legs."""

from ..core.config import ClusterConfig
from ..proto import pdserve_pb2 as pb
from .client import connect
from .generate import stream_text, text_prompt, write_out
from .timeline import timeline_lines
from .up import follow, say, sigterm_as_interrupt

PROMPT = "The for statement is used to iterate over the elements of a sequence"
MAX_TOKENS = 96


def demo_config() -> ClusterConfig:
    """One instance of each pool on half a core at least, and a free port."""
    from ..engine.gpu import probe_node

    share = 1.0 if len(probe_node().cores) > 1 else 0.5
    pool = {"instances": 1, "cpus_per_instance": share}
    return ClusterConfig.model_validate({"pools": {"prefill": pool, "decode": pool}, "listen": {"grpc": "127.0.0.1:0"}})


def demo() -> None:
    """Start, ask, show, stop."""
    from ..cluster.launch import launch

    say("starting the embedded model: one prefill and one decode worker")
    with launch(demo_config()) as cluster, sigterm_as_interrupt(), connect(cluster.grpc_address) as client:
        follow(client, until_ready=True)
        say(f"\npdserve generate {PROMPT!r}\n")
        sampling = pb.SamplingParams(max_tokens=MAX_TOKENS, temperature=0.7, seed=1)
        request = pb.GenerateRequest(prompt=text_prompt(PROMPT), sampling=sampling)
        write_out(PROMPT)
        _, end = stream_text(client.generation.GenerateStream(request), write_out)
        print("", *timeline_lines(end), "", sep="\n")
    say("stopped")
