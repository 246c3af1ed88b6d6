"""The loop of a rank > 0: computes its part of each step that rank 0 sends, and nothing else.

It neither schedules nor samples, and knows no sequences. What rank 0's caller sends between steps goes to
this rank's `Companion`, in the same order."""

from pathlib import Path
from typing import Protocol

import torch

from ...core.messages import KVLayout
from ..checkpoint import open_checkpoint
from ..engine import EngineOptions, Progress, agreed_layout, load_on_host
from ..kv_cache import KVCache
from ..model import Model
from ..tensor_reader import TensorReader
from .group import RankGroup
from .steps import STEP, STOP, Step, decode_step


class Companion(Protocol):
    """Shares a rank's cache and its stream of messages: the rank's transfers. Called on its thread."""

    def handle(self, kind: int, payload: bytearray) -> None:
        """Takes a message of rank 0 of a kind from `FIRST_FREE_KIND` on; all steps sent before are done."""
        ...

    def on_layer(self, layer: int) -> None:
        """The current step's KV of this layer is final."""
        ...


class Follower:
    """One rank's share of the model and of the KV cache. Used by one thread, except `cache`, as in
    `Engine`."""

    def __init__(self, group: RankGroup, model: Model, cache: KVCache) -> None:
        self._group = group
        self._model = model
        self.cache = cache

    @property
    def layout(self) -> KVLayout:
        return self.cache.layout

    @classmethod
    def open(
        cls, path: Path, options: EngineOptions, group: RankGroup, on_progress: Progress = lambda _: None
    ) -> "Follower":
        """Loads this rank's share of the checkpoint in `path`. Raises as `Engine.open` does."""
        with group.start():
            checkpoint = open_checkpoint(path)
            layout = agreed_layout(checkpoint, options, group)
            read = TensorReader(
                checkpoint, getattr(torch, layout.dtype), None, on_progress, shard=group.shard
            )
            _, cache, model = load_on_host(checkpoint.config, layout, read, options, group)
        on_progress(1.0)
        return cls(group, model, cache)

    def run(self, companion: Companion | None = None) -> None:
        """Returns when rank 0 stops the group. Raises RankLost where it is lost; by any other error, which
        the companion may raise too, this rank ends the group."""
        assert self._group.led is not None, "rank 0 has an Engine"
        try:
            while (message := self._group.led.receive()).kind != STOP:
                if message.kind == STEP:
                    self._compute(decode_step(message.payload), companion)
                elif companion is not None:
                    companion.handle(message.kind, message.payload)
        except BaseException:
            self._group.abort()
            raise

    @torch.inference_mode()
    def _compute(self, step: Step, companion: Companion | None) -> None:
        """Makes the same collective calls as rank 0's `ModelRunner.launch`."""
        if step.copies:
            self.cache.copy_blocks(step.copies)
        inputs, sampled = step.inputs, step.inputs.sampled
        on_layer = None if companion is None else companion.on_layer
        hidden = self._model.forward(inputs, self.cache, on_layer)
        for rows in step.prompt_rows:
            self._model.logits(hidden[rows.start : rows.stop])
        if inputs.needs_all_rows and sampled is not None:
            hidden = hidden[sampled.rows]
        self._model.logits(hidden)
