"""Requests of every kind of sampling at once, and what an engine answers to them, masks of a grammar
included.

The grammar has a process in production; here a rule that needs none takes its place, behind the same port.
"""

from typing import Any

import numpy as np
import torch

from bench.comparison.peers.pdserve_peer import NoTransfers
from pdserve.core.messages import Serve, TokenOutput
from pdserve.core.request import SamplingParams, SequenceSpec, TransferId
from pdserve.decode_worker.worker import DecodeWorker
from pdserve.engine.batch import RoleEngine
from pdserve.engine.engine import Engine
from pdserve.engine.outbox import Outbox
from pdserve.engine.token_masks import TokenMasks

_RULE = "token i of the output leaves a rest of i when divided by three"
_RESTS = 3


def mixed_requests(prompts: list[list[int]], num_new_tokens: int, vocab_size: int) -> list[SequenceSpec]:
    """One of each kind, over the prompts in turn; the last has all of it, in two choices."""
    penalties: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4}
    biases: dict[str, Any] = {"logit_bias": ((3, 4.0), (vocab_size - 1, 6.0), (5, -8.0))}
    logprobs: dict[str, Any] = {"logprobs": 3, "prompt_logprobs": 2}
    filters: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0} | penalties,
        {"temperature": 0.0} | biases,
        {"temperature": 0.0} | logprobs,
        {"temperature": 0.0, "grammar": _RULE},
        {"temperature": 1.0},
        filters,
        filters | penalties | biases | logprobs | {"grammar": _RULE, "n": 2},
    ]
    return [
        SequenceSpec(
            transfer=TransferId(f"mixed-{number}", 0),
            prompt_token_ids=tuple(prompts[number % len(prompts)]),
            sampling=SamplingParams(max_tokens=num_new_tokens, ignore_eos=True, seed=number, **kind),
            choices=tuple(range(kind.get("n", 1))),
            cache_salt=str(number),
        )
        for number, kind in enumerate(kinds)
    ]


def answered(
    engine: Engine, specs: list[SequenceSpec], *, max_batch_size: int, max_batch_tokens: int
) -> list[TokenOutput]:
    """Returns all tokens of all choices, ordered by request, choice and position; all requests are submitted
    at the start."""
    outbox, rule = Outbox("bench-0", 1), _Rule(engine.config.vocab_size)
    worker = DecodeWorker(
        RoleEngine(engine.kv, engine.runner, engine.config.num_layers, max_batch_tokens, max_batch_size),
        NoTransfers(),
        outbox,
        rule.masks,
        lambda sequences: None,
    )
    for spec in specs:
        worker.serve(Serve(spec=spec))
    while worker.num_legs:
        worker.step()
    outputs, ended, _ = outbox.take()
    for leg in ended:
        if leg.error is not None:
            raise RuntimeError(f"{leg.transfer}: {leg.error}")
    return sorted(outputs, key=lambda output: (output.transfer.request_id, output.choice, output.index))


def num_differences(ours: list[TokenOutput], theirs: list[TokenOutput], tolerance: float) -> float:
    """Tokens that are not the same, and log probabilities that are further apart than `tolerance` or of other
    tokens."""
    if len(ours) != len(theirs):
        return float("inf")
    return float(sum(_differ(a, b, tolerance) for a, b in zip(ours, theirs, strict=True)))


def _differ(a: TokenOutput, b: TokenOutput, tolerance: float) -> bool:
    if (a.transfer, a.choice, a.index, a.token_id) != (b.transfer, b.choice, b.index, b.token_id):
        return True
    x, y = _logprobs(a), _logprobs(b)
    return len(x) != len(y) or not torch.allclose(x, y, rtol=0.0, atol=tolerance)


def _logprobs(output: TokenOutput) -> torch.Tensor:
    """Every number there is, the tokens' ids included."""
    own = [] if output.logprob is None else [output.logprob]
    pairs = [*output.top_logprobs, *(pair for place in output.prompt_logprobs for pair in place.top)]
    places = [place.logprob for place in output.prompt_logprobs]
    return torch.tensor([*own, *places, *(number for pair in pairs for number in pair)], dtype=torch.float64)


class _Rule:
    """The port of a grammar process that answers at once."""

    def __init__(self, vocab_size: int) -> None:
        self.masks = TokenMasks(self)
        self._rests = np.arange(vocab_size) % _RESTS
        self._num_tokens: dict[int, int] = {}  # by output

    def open(self, key: int, grammar: str, token_ids: tuple[int, ...], client: str) -> None:
        self._num_tokens[key] = len(token_ids)
        self._answer(key)

    def advance(self, key: int, token_id: int) -> None:
        self._num_tokens[key] += 1
        self._answer(key)

    def close(self, key: int) -> None:
        del self._num_tokens[key]

    def _answer(self, key: int) -> None:
        num_tokens = self._num_tokens[key]
        allowed = self._rests == num_tokens % _RESTS
        self.masks.masked(key, num_tokens, np.packbits(allowed, bitorder="little").tobytes())
