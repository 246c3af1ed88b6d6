"""Each load generator: its command for a load, and its figures from the file that it writes.

GuideLLM and aiperf run as they were installed, each from an environment of its own. All three are asked for
streamed `/v1/completions` at temperature 0, outputs as long as they were asked for, and the server's count of
tokens."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pdserve.embedded import MODEL_DIR

Figures = dict[str, float]  # requests/s, ..., "TTFT p50", ...; latencies in ms
NUM_WARM_UP = 4  # requests that do not count; not of aiperf, which would send their prompts again
# a token without text is a token here and in vLLM's benchmark, but is not seen by the two others: special
# ones do not come
EXTRA = {"temperature": 0, "logit_bias": {f"{token_id}": -100 for token_id in range(5)}}
STATISTICS = ("mean", "p50", "p90", "p99")


@dataclass(frozen=True)
class Load:
    """The load that each tool sends; `rate` is an open load with even gaps, `concurrency` a closed one."""

    url: str
    model: str
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    rate: float | None = None
    concurrency: int | None = None

    @property
    def words(self) -> str:
        return f"open, {self.rate:g} requests/s" if self.rate else f"closed, {self.concurrency} at a time"


class LoadTool(Protocol):
    """A load generator."""

    @property
    def name(self) -> str: ...

    def command(self, load: Load, seed: int, folder: Path) -> Sequence[str]:
        """Writes its figures below `folder`."""
        ...

    def environment(self) -> Mapping[str, str]: ...

    def figures(self, folder: Path) -> Figures: ...


def take_turn(tool: LoadTool, load: Load, seed: int, folder: Path) -> Figures:
    """One run. Raises RuntimeError when the tool fails."""
    folder.mkdir(parents=True)
    command, environment = tool.command(load, seed, folder), tool.environment()
    with _off_the_first_core():
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"{tool.name} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return tool.figures(folder)


@contextmanager
def _off_the_first_core() -> Iterator[None]:
    """Keeps processes started in the block off the first core, which is the worker's."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@dataclass(frozen=True)
class Pdserve:
    """`pdserve bench` of this tree."""

    name: str = "pdserve"

    def command(self, load: Load, seed: int, folder: Path) -> Sequence[str]:
        way = (
            {"--rate": f"{load.rate}", "--arrivals": "constant"}
            if load.rate
            else {"--concurrency": f"{load.concurrency}"}
        )
        options = {
            **way,
            "--requests": f"{load.num_requests}",
            "--prompt-tokens": f"{load.num_prompt_tokens}",
            "--output-tokens": f"{load.num_output_tokens}",
            "--seed": f"{seed}",
            "--warm-up": f"{NUM_WARM_UP}",
            "--extra": json.dumps(EXTRA),
            "--json": str(folder / "pdserve.json"),
        }
        return [str(Path(sys.executable).parent / "pdserve"), "bench", load.url, *_words(options)]

    def environment(self) -> Mapping[str, str]:
        return os.environ

    def figures(self, folder: Path) -> Figures:
        total = _read(folder / "pdserve.json")["targets"][0]["total"]
        figures = {
            "requests": total["num_ok"],
            "failed": total["num_requests"] - total["num_ok"],
            "cached tokens": total["num_cached_tokens"],
            "requests/s": total["requests_per_s"],
            "input tokens/s": total["input_tokens_per_s"],
            "output tokens/s": total["output_tokens_per_s"],
        }
        for ours, theirs in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("E2E", "e2e_ms")):
            figures |= {f"{ours} {statistic}": total[theirs][statistic] for statistic in STATISTICS}
        return figures


@dataclass(frozen=True)
class GuideLlm:
    """Without a network it needs HF_HUB_OFFLINE=1. What it calls ITL is TPOT here."""

    environment_folder: Path
    name: str = "GuideLLM"

    def command(self, load: Load, seed: int, folder: Path) -> Sequence[str]:
        way = (
            f"kind=constant,rate={load.rate}" if load.rate else f"kind=concurrent,streams={load.concurrency}"
        )
        backend = {
            "kind": "openai_http",
            "target": load.url,
            "model": load.model,
            "request_format": "/v1/completions",
            "extras": {"body": EXTRA},
        }
        way += f",warmup={NUM_WARM_UP}"  # warm-up of its processes: they start when the load does
        lengths = f"prompt_tokens={load.num_prompt_tokens},output_tokens={load.num_output_tokens}"
        options = {
            "--backend": json.dumps(backend),
            "--profile": way,
            "--constraint": f"kind=max_requests,count={load.num_requests + NUM_WARM_UP}",
            "--tokenizer": f"kind=huggingface_auto,model={MODEL_DIR}",
            "--data": f"kind=synthetic_text,{lengths}",
            "--seed": f"kind=static,value={seed}",
            "--output": f"kind=json,path={folder / 'guidellm.json'}",
        }
        return [
            str(self.environment_folder / "bin" / "guidellm"),
            "run",
            *_words(options),
            "--disable-console",
        ]

    def environment(self) -> Mapping[str, str]:
        return _clean_environment() | {"HF_HUB_OFFLINE": "1"}

    def figures(self, folder: Path) -> Figures:
        metrics = _read(folder / "guidellm.json")["benchmarks"][0]["metrics"]
        figures = {
            "requests": metrics["request_totals"]["successful"],
            "failed": metrics["request_totals"]["errored"],
            "requests/s": metrics["requests_per_second"]["successful"]["mean"],
            "input tokens/s": metrics["prompt_tokens_per_second"]["successful"]["mean"],
            "output tokens/s": metrics["output_tokens_per_second"]["successful"]["mean"],
        }
        for ours, theirs, factor in (
            ("TTFT", "time_to_first_token_ms", 1),
            ("TPOT", "inter_token_latency_ms", 1),
            ("E2E", "request_latency", 1000),
        ):
            values = metrics[theirs]["successful"]
            values = values["percentiles"] | {"mean": values["mean"]}
            figures |= {f"{ours} {statistic}": values[statistic] * factor for statistic in STATISTICS}
        return figures


@dataclass(frozen=True)
class AiPerf:
    """It loads the tokenizer's folder without a network only while HF_HUB_OFFLINE is unset. Its inter token
    latency is TPOT here, its inter chunk latency ITL."""

    environment_folder: Path
    name: str = "aiperf"

    def command(self, load: Load, seed: int, folder: Path) -> Sequence[str]:
        if load.rate:
            way = {"--request-rate": f"{load.rate}", "--arrival-pattern": "constant"}
        else:
            way = {"--concurrency": f"{load.concurrency}"}
        options = {
            "-m": load.model,
            "--tokenizer": str(MODEL_DIR),
            "--url": load.url,
            "--endpoint-type": "completions",
            **way,
            "--request-count": f"{load.num_requests}",
            "--num-dataset-entries": f"{load.num_requests}",
            "--isl": f"{load.num_prompt_tokens}",
            "--isl-stddev": "0",
            "--osl": f"{load.num_output_tokens}",
            "--osl-stddev": "0",
            "--extra-inputs": json.dumps(EXTRA | {"ignore_eos": True}),
            "--random-seed": f"{seed}",
            "--ui": "none",
            "--output-artifact-dir": str(folder),
        }
        flags = ["--streaming", "--use-server-token-count", "--no-gpu-telemetry", "--no-server-metrics"]
        return [str(self.environment_folder / "bin" / "aiperf"), "profile", *_words(options), *flags]

    def environment(self) -> Mapping[str, str]:
        return _clean_environment()

    def figures(self, folder: Path) -> Figures:
        metrics = _read(folder / "profile_export_aiperf.json")
        figures = {
            "requests": metrics["request_count"]["avg"],
            "failed": metrics["completed_request_count"]["avg"] - metrics["request_count"]["avg"],
            "cached tokens": metrics["total_usage_prompt_cache_read_tokens"]["avg"],
            "requests/s": metrics["request_throughput"]["avg"],
            "input tokens/s": metrics["input_token_throughput"]["avg"],
            "output tokens/s": metrics["output_token_throughput"]["avg"],
        }
        for ours, theirs in (
            ("TTFT", "time_to_first_token"),
            ("TPOT", "inter_token_latency"),
            ("ITL", "inter_chunk_latency"),
            ("E2E", "request_latency"),
        ):
            values = metrics[theirs] | {"mean": metrics[theirs]["avg"]}
            figures |= {f"{ours} {statistic}": values[statistic] for statistic in STATISTICS}
        return figures


def _words(options: Mapping[str, str]) -> list[str]:
    return [word for option in options.items() for word in option]


def _clean_environment() -> dict[str, str]:
    """The environment without the path to this tree's modules."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}


def _read(file: Path) -> Any:
    return json.loads(file.read_text())
