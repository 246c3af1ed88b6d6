"""`pdserve plan --devices`: how to divide GPUs that need not be here, for a load that has not come yet."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.config import ClusterConfig
from ..core.errors import ConfigError
from ..engine.checkpoint import Checkpoint, described_checkpoint, open_checkpoint, resolve_model_path
from ..engine.gpu import DeviceInfo, Node
from ..engine.gpu_peaks import GpuModel, gpu_model
from ..loadgen.slo import Slo, parse_slo
from ..loadgen.statistics import Distribution
from ..planner.comparison import Comparison, Question, RankedSplit, compare, limits_of
from ..planner.offered_load import OfferedLoad
from ..planner.priors import Rates
from ..planner.splits import Site, Split, all_splits
from .plan import read_config
from .workload import WorkloadOptions, make_workload

# shares of the data sheets' peaks, as measured on an H200: 790 of 989 TFLOP/s, and 4.3 of 4.8 TB/s
REACHED_FLOPS, REACHED_BYTES = 0.8, 0.9
MIN_LENGTH = 20  # of a trial, in requests' median durations
HOST_CORES_PER_GPU, HOST_BYTES_PER_GPU = 16, 128 << 30


@dataclass(frozen=True)
class Hardware:
    """The devices and the model that are planned for."""

    num_devices: int
    gpu: str
    model: str  # a checkpoint, or a config.json alone; "": the configuration's


@dataclass(frozen=True)
class Answer:
    """How the comparison is made and shown."""

    slo: str  # "": the configuration's
    target: float
    num_requests: int
    price_per_gpu_hour: float | None
    output: str
    plot: Path | None


def show_splits(
    file: Path | None, sets: list[str], hardware: Hardware, workload: WorkloadOptions, answer: Answer
) -> None:
    """Prints the comparison. Raises ConfigError, CheckpointError, LoadError."""
    config = read_config(file, sets)
    gpu = gpu_model(hardware.gpu)
    if not 0 < answer.target < 1:
        raise ConfigError(f"target: got {answer.target:g}, expected a share of requests between 0 and 1")
    load = OfferedLoad(make_workload(workload), answer.num_requests)
    question = Question(_site(config, gpu, hardware), load, _slo(config, answer.slo), answer.target)
    _check_lengths(question)
    compared = compare(question, all_splits(hardware.num_devices), len(os.sched_getaffinity(0)), _progress)
    if answer.plot is not None:
        from .plot_splits import draw_goodput

        draw_goodput(question, compared, answer.plot)
    words = _Words(question, compared, gpu, hardware.num_devices, answer.price_per_gpu_hour)
    print(json.dumps(words.as_dict(), indent=2) if answer.output == "json" else words.text())


def _site(config: ClusterConfig, gpu: GpuModel, hardware: Hardware) -> Site:
    devices = tuple(
        DeviceInfo(index, gpu.name, str(index), gpu.memory_bytes, gpu.memory_bytes)
        for index in range(hardware.num_devices)
    )
    num = hardware.num_devices
    node = Node(
        "planned",
        tuple(range(HOST_CORES_PER_GPU * num)),
        HOST_BYTES_PER_GPU * num,
        HOST_BYTES_PER_GPU * num,
        devices,
        "planned",
    )
    rates = Rates(
        REACHED_FLOPS * gpu.peaks.flops_per_s, REACHED_BYTES * gpu.peaks.bytes_per_s, gpu.link_bytes_per_s
    )
    on_gpus = config.model_copy(update={"device": "cuda"})
    return Site(on_gpus, _checkpoint(config, hardware.model), (node,), rates)


def _checkpoint(config: ClusterConfig, model: str) -> Checkpoint:
    path = resolve_model_path(model or config.model.path)
    return described_checkpoint(path) if path.suffix == ".json" else open_checkpoint(path)


def _slo(config: ClusterConfig, text: str) -> Slo:
    return parse_slo(text) if text else Slo(ttft=config.slo.ttft_ms, tpot=config.slo.itl_ms)


def _check_lengths(question: Question) -> None:
    longest, limit = question.load.longest, question.site.plan(Split(0, 1)).max_model_len
    if longest > limit:
        raise ConfigError(
            f"the longest request has {longest} tokens, expected at most model.max_model_len ({limit}); cut"
            " the lengths, by max= or by --max-prompt-tokens and --max-output-tokens"
        )


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"{text} ...", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Words:
    """The comparison in a table, or as JSON."""

    question: Question
    compared: Comparison
    gpu: GpuModel
    num_devices: int
    price_per_gpu_hour: float | None

    def text(self) -> str:
        question, best = self.question, self.compared.best
        site = question.site
        planned = site.plan(Split(0, 1))
        lines = [
            (
                f"model    {site.checkpoint.path}: {planned.num_parameters / 1e9:.3g} billion parameters,"
                f" {planned.dtype}"
            ),
            (
                f"devices  {self.num_devices} x {self.gpu.name}, at {REACHED_FLOPS:.0%} of the data sheet's"
                f" products and {REACHED_BYTES:.0%} of its bandwidth"
            ),
            (
                f"load     {question.load.num_requests} requests, {question.load.rate:.3g} a second;"
                f" {question.target:.0%} of them within {question.slo}"
            ),
            "",
            _HEAD + "   $/million tokens" * (self.price_per_gpu_hour is not None),
            *(self._row(one) for one in self.compared.ranked),
            *(f"{split!s:<14} does not fit: {reason}" for split, reason in self.compared.impossible),
            "",
            f"best     {best.split}: {self._verdict()}",
            *self._margins(),
            *(f"         {key}: {value}" for key, value in best.split.settings.items()),
            *self._doubts(),
        ]
        lines += ["", "limits at that rate"]
        lines += [f"  {one.split!s:<14} {limits_of(one.at_best)}" for one in self.compared.ranked]
        return "\n".join(lines)

    def _row(self, one: RankedSplit) -> str:
        trial = one.at_offered
        figures = [
            f"{one.goodput:8.2f}",
            f"{trial.attainment:7.1%}",
            *(_pair(summary) for summary in (trial.ttft_ms, trial.tpot_ms, trial.gap_ms)),
            f"{max(trial.kv_shares.values()):5.0%}",
            f"{trial.transfer_bytes_per_s / 1e9:6.2f}",
        ]
        price = self._price_per_million(one)
        figures += [f"{price:8.3f}"] if price is not None else []
        return f"{one.split!s:<14} " + " ".join(figures)

    def _verdict(self) -> str:
        best = self.compared.best
        words = f"{best.goodput:.3g} requests/s within the objectives"
        if self.question.load.rate > best.goodput:
            words += f", less than the {self.question.load.rate:.3g} that are offered"
        return words

    def _margins(self) -> Iterator[str]:
        for other in self.compared.ranked[1:]:
            if (margin := other.margin) is not None:
                doubt = "" if margin.is_certain else ": too near to tell"
                yield (
                    f"         {margin.ratio:.2f} times {other.split}, 95 % confidence {margin.low:.2f} to"
                    f" {margin.high:.2f}{doubt}"
                )

    def _doubts(self) -> Iterator[str]:
        """Yields why the figures may say little."""
        trial = self.compared.best.at_best
        if trial.e2e_ms is not None and trial.duration_s * 1e3 < MIN_LENGTH * trial.e2e_ms.p50:
            yield (
                f"note     a trial at that rate lasts {trial.duration_s:.3g} s, less than {MIN_LENGTH} times"
                " a request's median: queues and KV caches do not fill; give more --requests"
            )

    def _price_per_million(self, one: RankedSplit) -> float | None:
        """Returns the price of a million output tokens at the split's goodput."""
        if self.price_per_gpu_hour is None or not one.goodput:
            return None
        trial = one.at_offered
        tokens_per_s = one.goodput * trial.num_output_tokens / trial.num_requests
        return self.num_devices * self.price_per_gpu_hour / 3600 / tokens_per_s * 1e6

    def as_dict(self) -> dict[str, Any]:
        question = self.question
        return {
            "gpu": self.gpu.name,
            "devices": self.num_devices,
            "model": str(question.site.checkpoint.path),
            "slo_ms": asdict(question.slo),
            "target": question.target,
            "requests": question.load.num_requests,
            "offered_per_s": question.load.rate,
            "splits": [self._split_dict(one) for one in self.compared.ranked],
            "impossible": {str(split): reason for split, reason in self.compared.impossible},
        }

    def _split_dict(self, one: RankedSplit) -> dict[str, Any]:
        trial = one.at_offered
        return {
            "split": str(one.split),
            "settings": one.split.settings,
            "goodput_per_s": one.goodput,
            "margin_of_best": None if one.margin is None else asdict(one.margin),
            "price_per_million_output_tokens": self._price_per_million(one),
            "limits_at_best": limits_of(one.at_best),
            "attainment_at_best": one.at_best.attainment,
            "at_offered": {
                "attainment": trial.attainment,
                "goodput_per_s": trial.goodput,
                "ttft_ms": _as_dict(trial.ttft_ms),
                "tpot_ms": _as_dict(trial.tpot_ms),
                "largest_gap_ms": _as_dict(trial.gap_ms),
                "kv_shares": {role.value: share for role, share in trial.kv_shares.items()},
                "busy_shares": {role.value: share for role, share in trial.busy_shares.items()},
                "preemptions": trial.num_preemptions,
                "transfer_bytes_per_s": trial.transfer_bytes_per_s,
                "link_share": trial.link_share,
            },
        }


_HEAD = "split          goodput/s   met   TTFT p50/p99 ms  TPOT p50/p99 ms   gap p50/p99 ms    KV  GB/s moved"


def _pair(summary: Distribution | None) -> str:
    return f"{'-':>15}" if summary is None else f"{summary.p50:7.0f}/{summary.p99:<7.0f}"


def _as_dict(summary: Distribution | None) -> dict[str, float] | None:
    return None if summary is None else asdict(summary)
