"""GPUs' figures as a scrape finds them."""

import msgspec

from pdserve.core.messages import GpuSample, StepReport, WorkerLoad
from pdserve.router.events import WorkerLost, WorkerReady

from ..router.cluster import worker_info
from .support import Watched

FULL = GpuSample(
    index=3,
    uuid="GPU-a",
    name="NVIDIA H100 80GB HBM3",
    memory_total_bytes=1000,
    memory_used_bytes=400,
    power_watts=345.5,
    power_limit_watts=700.0,
    temperature_celsius=61.0,
    sm_clock_hertz=2e9,
    memory_clock_hertz=3e9,
    pcie_sent_bytes_per_s=5.0,
    pcie_received_bytes_per_s=6.0,
    nvlink_sent_bytes=7,
    nvlink_received_bytes=8,
    throttled_by=("power",),
    peak_flops_per_s=1e15,
    peak_bytes_per_s=3e12,
)
GPU = 'gpu="GPU-a",index="3",node="here"'


def beat(watched: Watched, worker_id: str, sample: GpuSample, incarnation: int = 1) -> None:
    watched.handle(StepReport(worker_id=worker_id, incarnation=incarnation, load=WorkerLoad(), gpu=sample))


def gpu_values(watched: Watched) -> dict[str, float]:
    return {name: value for name, value in watched.values().items() if name.startswith("gpu_")}


def test_every_figure_that_a_gpu_reports_is_exposed() -> None:
    watched = Watched("prefill-0", "decode-0")
    assert gpu_values(watched) == {}
    beat(watched, "prefill-0", FULL)
    assert gpu_values(watched) == {
        'gpu_info{gpu="GPU-a",index="3",name="NVIDIA H100 80GB HBM3",node="here",pool="prefill",worker="prefill-0"}': (
            1
        ),
        f"gpu_memory_used_bytes{{{GPU}}}": 400,
        f"gpu_memory_total_bytes{{{GPU}}}": 1000,
        f"gpu_power_watts{{{GPU}}}": 345.5,
        f"gpu_power_limit_watts{{{GPU}}}": 700,
        f"gpu_temperature_celsius{{{GPU}}}": 61,
        f"gpu_sm_clock_hertz{{{GPU}}}": 2e9,
        f"gpu_memory_clock_hertz{{{GPU}}}": 3e9,
        f"gpu_pcie_transmit_bytes_per_second{{{GPU}}}": 5,
        f"gpu_pcie_receive_bytes_per_second{{{GPU}}}": 6,
        f"gpu_nvlink_transmit_bytes_total{{{GPU}}}": 7,
        f"gpu_nvlink_receive_bytes_total{{{GPU}}}": 8,
        f'gpu_throttled{{{GPU},reason="power"}}': 1,
        'gpu_peak_flops_per_second{pool="prefill",worker="prefill-0"}': 1e15,
        'gpu_peak_bytes_per_second{pool="prefill",worker="prefill-0"}': 3e12,
    }
    assert f'pdserve_gpu_throttled{{{GPU},reason="temperature"}} 0.0' in watched.exposition.render().decode()


def test_an_unreported_figure_has_no_series() -> None:
    watched = Watched("prefill-0", "decode-0")
    beat(watched, "prefill-0", GpuSample(index=3, uuid="GPU-a", name="H999", memory_total_bytes=1000))
    text = watched.exposition.render().decode()
    series = {line.partition("{")[0] for line in text.splitlines() if line.startswith("pdserve_gpu_")}
    assert series == {"pdserve_gpu_info", "pdserve_gpu_memory_total_bytes"}


def test_a_shared_gpu_is_reported_once_by_its_latest_sample() -> None:
    watched = Watched("prefill-0", "decode-0")
    beat(watched, "prefill-0", FULL)
    beat(watched, "decode-0", msgspec.structs.replace(FULL, power_watts=200.0))
    values = gpu_values(watched)
    assert [value for name, value in values.items() if name.startswith("gpu_power_watts")] == [200.0]
    assert sorted(name.rpartition("worker=")[2] for name in values if name.startswith("gpu_info")) == [
        '"decode-0"}',
        '"prefill-0"}',
    ]
    assert len([name for name in values if name.startswith("gpu_peak_flops")]) == 2


def test_a_gpu_goes_with_its_last_worker() -> None:
    watched = Watched("prefill-0", "decode-0")
    beat(watched, "prefill-0", FULL)
    watched.handle(WorkerLost("prefill-0", 1, "gone"))
    assert gpu_values(watched) == {}
    watched.handle(WorkerReady(worker_info("prefill-0", incarnation=2)))
    assert gpu_values(watched) == {}, "another process may be on another GPU"
    beat(watched, "prefill-0", FULL)  # late, of the process before
    assert gpu_values(watched) == {}
    beat(watched, "prefill-0", FULL, incarnation=2)
    assert f"gpu_power_watts{{{GPU}}}" in gpu_values(watched)
