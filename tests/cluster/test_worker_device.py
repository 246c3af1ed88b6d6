"""The device of a worker's process, and its reports about its GPU."""

import threading
from types import SimpleNamespace

import pytest
from msgspec import structs

from pdserve.core.codec import FrameDecoder, FrameEncoder
from pdserve.core.config import ClusterConfig
from pdserve.core.devices import DeviceKind
from pdserve.core.errors import CapacityError
from pdserve.core.messages import GpuSample, Role, StepReport, WorkerLoad, WorkerMessage
from pdserve.engine.gpu import DeviceInfo, GpuProbe
from pdserve.worker import device as worker_device, gpu_monitor as monitor_module
from pdserve.worker.device import engine_options, names_of, own_gpu
from pdserve.worker.gpu_monitor import GpuMonitor
from pdserve.worker.process import WorkerProcess
from pdserve.worker.spec import WorkerSpec

from ..deadlines import WAIT_S
from ..engine.test_gpu import nvml, unsupported

GPU = DeviceInfo(1, "NVIDIA H100 80GB HBM3", "GPU-11-1", 80 << 30, 79 << 30)


def spec(device: DeviceKind, num_blocks: int | None = None, **pool: float) -> WorkerSpec:
    config = ClusterConfig.model_validate({"pools": {"prefill": pool}})
    return WorkerSpec(
        "prefill-0", 1, Role.PREFILL, config, device, num_blocks, ("127.0.0.1", 1), "secret", None
    )


def test_the_gpu_is_the_one_visible_to_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    gpu = own_gpu("cuda")
    assert gpu == GPU
    assert names_of((0, 3), gpu) == ("cuda:GPU-11-1",)
    assert own_gpu("cpu") is None
    assert names_of((0, 3), None) == ("cpu:0", "cpu:3")


def test_a_worker_without_its_gpu_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_device, "probe_devices", lambda: ())
    with pytest.raises(CapacityError, match="device: cuda, but this process is shown no GPU on"):
        own_gpu("cuda")


def test_an_engine_sizes_its_blocks_to_its_share_of_the_gpu() -> None:
    options = engine_options(spec("cuda", gpus_per_instance=0.5, max_batch_size=7, max_batch_tokens=100))
    assert (options.device, options.num_blocks, options.block_size) == ("cuda", None, 64)
    assert options.memory_fraction == 0.45
    assert (options.max_batch_size, options.max_batch_tokens) == (7, 100)


def test_each_rank_computes_on_its_part_of_the_cores() -> None:
    worker = spec("cpu", num_blocks=12, tensor_parallel=2, devices_per_instance=4)
    first, second = (worker.of_rank(rank, (3, 4, 6, 7)) for rank in (0, 1))
    assert (first.cores, second.cores) == ((3, 4), (6, 7))
    assert (first.name, second.name) == ("prefill-0/1.0", "prefill-0/1.1")
    assert first.key == second.key == worker.key
    assert engine_options(second).num_threads == 2
    assert worker.need.num_cores == 4


def test_an_engine_on_a_cpu_has_the_planned_blocks() -> None:
    options = engine_options(spec("cpu", num_blocks=12))
    assert (options.device, options.num_blocks, options.block_size) == ("cpu", 12, 16)


class Sampled(GpuProbe):
    """A probe that records that it was asked."""

    asked = threading.Event()

    def sample(self) -> GpuSample:
        try:
            return super().sample()
        finally:
            self.asked.set()


def test_a_monitor_returns_each_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch)
    monkeypatch.setattr(monitor_module, "GpuProbe", Sampled)
    monkeypatch.setattr(monitor_module, "INTERVAL_S", 0.0)
    monitor = GpuMonitor(GPU)
    assert monitor.take() is None
    monitor.start()
    assert Sampled.asked.wait(WAIT_S)
    Sampled.asked.clear()
    assert Sampled.asked.wait(WAIT_S)  # so that the previous one is present
    monitor.stop()
    monitor._thread.join(WAIT_S)
    assert not monitor._thread.is_alive()
    sample = monitor.take()
    assert sample is not None
    assert (sample.uuid, sample.power_watts) == ("GPU-11-1", 345.6)
    assert monitor.take() is None


def test_an_unresponsive_driver_ends_only_the_monitor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvml(monkeypatch, nvmlInit=unsupported)
    monitor = GpuMonitor(GPU)
    monitor.start()
    monitor._thread.join(WAIT_S)
    assert monitor.take() is None
    assert "NVIDIA H100 80GB HBM3 is not watched" in caplog.text


def test_a_heartbeat_carries_new_gpu_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    process = WorkerProcess(spec("cuda"))
    report = StepReport(worker_id="prefill-0", incarnation=1, load=WorkerLoad(num_running=3))
    process._worker = SimpleNamespace(report=lambda: report)  # type: ignore[assignment]
    assert without_times(process._beat()) == report
    news = [
        None,
        GpuSample(index=1, uuid="GPU-11-1", name="H999", memory_total_bytes=5, throttled_by=("power",)),
    ]
    process._monitor = SimpleNamespace(take=news.pop)  # type: ignore[assignment]
    beat = process._beat()
    decoder: FrameDecoder[WorkerMessage] = FrameDecoder(WorkerMessage)
    assert list(decoder.feed(FrameEncoder().encode(beat))) == [beat]
    assert isinstance(beat, StepReport)
    assert beat.load == report.load
    assert beat.gpu is not None
    assert beat.gpu.throttled_by == ("power",)
    assert without_times(process._beat()) == report


def without_times(beat: StepReport) -> StepReport:
    """Returns a heartbeat without its ranks' processor times, of which this worker has one."""
    assert len(beat.rank_cpu_s) == 1
    return structs.replace(beat, rank_cpu_s=())
