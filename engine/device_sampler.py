"""The sampler for logits on a device: by way of the host, which waits for them."""

from dataclasses import dataclass

import torch

from ..kernels.reference import TorchKernels
from .batch import SampledToken, ScheduledChunk
from .device import Device
from .sampler import Sampler


@dataclass(frozen=True)
class DeviceTokens:
    """What was drawn."""

    token_ids: torch.Tensor  # int64 [N], on the device
    sampled: list[list[SampledToken]]

    def report(self) -> list[list[SampledToken]]:
        return self.sampled


class DeviceSampler:
    """Draws the next token of every choice of every sampled row."""

    def __init__(self, device: Device, max_rows: int) -> None:
        self._device = device
        self._sampler = Sampler(TorchKernels())

    def prepare(self, chunks: list[ScheduledChunk]) -> list[ScheduledChunk]:
        return chunks

    def sample(self, logits: torch.Tensor, prepared: list[ScheduledChunk]) -> DeviceTokens:
        sampled = self._sampler.sample(logits.cpu(), prepared) if prepared else []
        ids = torch.tensor([token.token_id for tokens in sampled for token in tokens], dtype=torch.int64)
        return DeviceTokens(ids.to(self._device.torch_device), sampled)
