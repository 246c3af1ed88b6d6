"""GPUs by their NVML name: peaks, memory and links, as NVIDIA's data sheets state them."""

from dataclasses import dataclass

from ..core.errors import ConfigError


@dataclass(frozen=True)
class Peaks:
    """One GPU's peak rates."""

    flops_per_s: float  # bfloat16 products added in float32, dense
    bytes_per_s: float  # between its memory and its processors


@dataclass(frozen=True)
class GpuModel:
    """A kind of GPU, as one buys or rents it."""

    name: str  # NVML's
    peaks: Peaks
    fp8_flops_per_s: float | None  # dense; None: it has no such products
    memory_bytes: int
    link_bytes_per_s: (
        float  # to other GPUs of its host, in one direction: NVLink where it has a switch, else PCIe
    )


def peaks_of(name: str) -> Peaks | None:
    """Returns None for a GPU that is not in the table.

    From NVIDIA's data sheets: H100 (2023; its figures with sparsity, halved), H200 (2024), A100 (2022), L4
    and L40S (2023), HGX B200 (2025)."""
    model = _BY_NAME.get(name.removeprefix("NVIDIA "))
    return None if model is None else model.peaks


def gpu_model(text: str) -> GpuModel:
    """Returns the GPU of a short name such as `h200`, or of NVML's name. Raises ConfigError for others."""
    model = GPU_MODELS.get(text.lower()) or _BY_NAME.get(text.removeprefix("NVIDIA "))
    if model is None:
        raise ConfigError(f"gpu: got {text!r}, expected one of {', '.join(GPU_MODELS)}")
    return model


_GB = 1_000_000_000
GPU_MODELS = {
    "b200": GpuModel("B200", Peaks(2250e12, 8.0e12), 4500e12, 180 * _GB, 900e9),
    "h200": GpuModel("H200", Peaks(989e12, 4.8e12), 1979e12, 141 * _GB, 450e9),
    "h100": GpuModel("H100 80GB HBM3", Peaks(989e12, 3.35e12), 1979e12, 80 * _GB, 450e9),
    "h100-nvl": GpuModel("H100 NVL", Peaks(835e12, 3.9e12), 1671e12, 94 * _GB, 64e9),
    "h100-pcie": GpuModel("H100 PCIe", Peaks(756e12, 2.0e12), 1513e12, 80 * _GB, 64e9),
    "a100": GpuModel("A100-SXM4-80GB", Peaks(312e12, 2.039e12), None, 80 * _GB, 300e9),
    "a100-pcie": GpuModel("A100 80GB PCIe", Peaks(312e12, 1.935e12), None, 80 * _GB, 32e9),
    "a100-40gb": GpuModel("A100-SXM4-40GB", Peaks(312e12, 1.555e12), None, 40 * _GB, 300e9),
    "a100-pcie-40gb": GpuModel("A100-PCIE-40GB", Peaks(312e12, 1.555e12), None, 40 * _GB, 32e9),
    "l40s": GpuModel("L40S", Peaks(362e12, 0.864e12), 733e12, 48 * _GB, 32e9),
    "l4": GpuModel("L4", Peaks(121e12, 0.3e12), 242e12, 24 * _GB, 32e9),
}
_BY_NAME = {model.name: model for model in GPU_MODELS.values()}
