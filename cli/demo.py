"""`pdserve demo`: the embedded model through one prefill and one decode worker, asked one thing, and a
picture of its legs."""

from ..core.config import ClusterConfig
from ..proto import pdserve_pb2 as pb
from .client import Client
from .generate import stream_text, text_prompt, write_out
from .timeline import timeline_lines
from .up import say, serving

QUESTION = 'The "with" statement is used to wrap the execution of a block'
MAX_PROMPT_CHARS = 4000


def demo() -> None:
    """Start, ask, show, stop."""
    say("starting the embedded model: one prefill and one decode worker")
    with serving(demo_config()) as client:
        end = _ask(client, demo_prompt())
        print("", *timeline_lines(end), "", sep="\n")
    say("stopped")


def demo_config() -> ClusterConfig:
    """One instance of each pool, on half a core or half a GPU each where there is only one, and a free
    port."""
    from ..engine.gpu import probe_node

    node = probe_node()
    pool = {
        "instances": 1,
        "cpus_per_instance": 1.0 if len(node.cores) > 1 else 0.5,
        "gpus_per_instance": 1.0 if len(node.usable_devices) > 1 else 0.5,
    }
    settings = {"pools": {"prefill": pool, "decode": pool}, "listen": {"grpc": "127.0.0.1:0", "http": None}}
    return ClusterConfig.model_validate(settings | {"routing": {"prefill_on_decode": "never"}})


def demo_prompt() -> str:
    """Python's own documentation up to a sentence to complete: long enough for a transfer of several
    chunks."""
    from pydoc_data.topics import topics

    before, _, _ = topics["compound"].partition(QUESTION)
    return (before + QUESTION)[-MAX_PROMPT_CHARS:]


def _ask(client: Client, prompt: str) -> pb.RequestEnd:
    say(
        f"\nthe prompt: {len(prompt)} characters of Python's documentation; its end, and what the model makes"
        " of it:\n"
    )
    sampling = pb.SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    request = pb.GenerateRequest(prompt=text_prompt(prompt), sampling=sampling)
    write_out(f"... {QUESTION}")
    _, end = stream_text(client.generation.GenerateStream(request), write_out)
    return end
