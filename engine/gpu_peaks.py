"""Peak performance of GPUs, by their NVML name: the reference for measured steps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """The peaks of one GPU."""

    flops_per_s: float  # bfloat16 products added in float32, dense
    bytes_per_s: float  # between its memory and its processors


def peaks_of(name: str) -> Peaks | None:
    """Returns None for a GPU that is not in the table.

    From NVIDIA's data sheets: H100 (2023; its figures with sparsity, halved), H200 (2024), A100 (2022), L4
    and L40S (2023), HGX B200 (2025)."""
    return _PEAKS.get(name.removeprefix("NVIDIA "))


_PEAKS = {
    "B200": Peaks(2250e12, 8.0e12),
    "H200": Peaks(989e12, 4.8e12),
    "H100 80GB HBM3": Peaks(989e12, 3.35e12),
    "H100 NVL": Peaks(835e12, 3.9e12),
    "H100 PCIe": Peaks(756e12, 2.0e12),
    "A100-SXM4-80GB": Peaks(312e12, 2.039e12),
    "A100 80GB PCIe": Peaks(312e12, 1.935e12),
    "A100-SXM4-40GB": Peaks(312e12, 1.555e12),
    "A100-PCIE-40GB": Peaks(312e12, 1.555e12),
    "L40S": Peaks(362e12, 0.864e12),
    "L4": Peaks(121e12, 0.3e12),
}
