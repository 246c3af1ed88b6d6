"""Samples tokens from logits, the last part of a step. Follows vLLM in the meaning of parameters and in the
order in which they apply: logit bias, penalties, min_tokens and grammar, temperature, top-k, top-p, min-p."""

import torch

from ..core.request import SamplingParams
from ..kernels import Kernels
from ..kernels.random_numbers import uniform
from ..kernels.sampling import GREEDY_BELOW
from .batch import SampledToken, ScheduledChunk
from .distribution import Floats, best_tokens, draw, log_sum_exp
from .penalties import Penalties, is_adjusted


class Sampler:
    """Draws the next token of every choice of every sampled row."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._penalties = Penalties()

    def sample(self, logits: torch.Tensor, chunks: list[ScheduledChunk]) -> list[list[SampledToken]]:
        """Row i of float32 logits [R, V] belongs to `chunks[i]`; returns a token for each of its choices.
        Overwrites `logits`."""
        if all(_is_plain(chunk) for chunk in chunks):
            best = self._kernels.argmax(logits).tolist()
            return [
                [SampledToken(token_id)] * len(chunk.choices)
                for token_id, chunk in zip(best, chunks, strict=True)
            ]
        rows = logits.numpy()
        raw = [
            None if _sampling(chunk).logprobs is None else row.copy()
            for row, chunk in zip(rows, chunks, strict=True)
        ]
        for row, chunk in zip(rows, chunks, strict=True):
            self._penalties.apply(chunk.sequence, row)
        any_greedy = any(_is_greedy(_sampling(chunk)) for chunk in chunks)
        best = self._kernels.argmax(logits).tolist() if any_greedy else []
        sampled = []
        for index, chunk in enumerate(chunks):
            greedy = _is_greedy(_sampling(chunk))
            token_ids = [best[index]] * len(chunk.choices) if greedy else _draw(rows[index], chunk)
            sampled.append(_report(token_ids, raw[index], _sampling(chunk)))
        return sampled


def _sampling(chunk: ScheduledChunk) -> SamplingParams:
    return chunk.sequence.spec.sampling


def _is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < GREEDY_BELOW


def _is_plain(chunk: ScheduledChunk) -> bool:
    """Returns whether the sequence wants the token of the largest logit and nothing more."""
    sampling = _sampling(chunk)
    return _is_greedy(sampling) and sampling.logprobs is None and not is_adjusted(chunk.sequence)


def _draw(logits: Floats, chunk: ScheduledChunk) -> list[int]:
    sampling, index = _sampling(chunk), chunk.sequence.num_output_tokens
    return draw(logits, sampling, [uniform(sampling.seed, choice, index) for choice in chunk.choices])


def _report(token_ids: list[int], raw: Floats | None, sampling: SamplingParams) -> list[SampledToken]:
    """`raw` is the model's original row, where logprobs are requested."""
    if raw is None or sampling.logprobs is None:
        return [SampledToken(token_id) for token_id in token_ids]
    normaliser = log_sum_exp(raw)
    best = best_tokens(raw, sampling.logprobs) if sampling.logprobs > 0 else ()
    top = tuple((int(token_id), float(raw[token_id]) - normaliser) for token_id in best)
    return [SampledToken(token_id, float(raw[token_id]) - normaliser, top) for token_id in token_ids]
