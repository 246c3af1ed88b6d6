"""A minimal scheduler for tests: every sequence is admitted at once and takes part in every step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from pdserve.core.request import SamplingParams, SequenceSpec, TransferId
from pdserve.engine.batch import Batch, SampledToken, ScheduledChunk
from pdserve.engine.engine import Engine
from pdserve.engine.sequence import Sequence


def make_sequence(
    engine: Engine,
    prompt: Iterable[int],
    *,
    choices: tuple[int, ...] | None = None,
    output: Iterable[int] = (),
    cache_salt: str = "",
    **sampling: Any,
) -> Sequence:
    """A dispatch of `choices` (by default all), greedy and with logprobs unless `sampling` overrides it."""
    params = SamplingParams(**({"temperature": 0.0, "logprobs": 0, "ignore_eos": True} | sampling))
    spec = SequenceSpec(
        transfer=TransferId("r", 0),
        prompt_token_ids=tuple(prompt),
        sampling=params,
        choices=tuple(range(params.n)) if choices is None else choices,
        output_token_ids=tuple(output),
        eos_token_ids=engine.config.eos_token_ids,
        cache_salt=cache_salt,
    )
    return Sequence(spec, spec.choices[0], engine.kv.max_model_len)


def run_to_end(
    engine: Engine,
    sequences: list[Sequence],
    *,
    max_chunk: int = 4096,
    use_cache: bool = True,
    on_layer: Callable[[int], None] | None = None,
) -> list[list[SampledToken]]:
    """Returns the output of each sequence and releases its blocks. A sequence with n > 1 is forked after its
    first token, and its choices' outputs follow one another. One that holds blocks continues from their
    content."""
    for seq in sequences:
        if not seq.block_ids:
            engine.kv.admit(seq, use_cache and not seq.wants_prompt_logprobs)
    outputs: dict[int, dict[int, list[SampledToken]]] = {id(seq): {} for seq in sequences}
    running = [(seq, seq) for seq in sequences]  # (sequence, the one it was forked from)
    while running:
        chunks = []
        for seq, _ in running:
            num_tokens = min(max_chunk, seq.num_uncomputed_tokens)
            assert engine.kv.grow(seq, seq.num_computed_tokens + num_tokens)
            done = num_tokens == seq.num_uncomputed_tokens
            fresh = seq.num_output_tokens == 0
            chunks.append(
                ScheduledChunk(
                    seq, num_tokens, (seq.spec.choices if fresh else (seq.choice,)) if done else ()
                )
            )
        sampled = engine.runner.launch(Batch(tuple(chunks), engine.kv.take_copies()), on_layer).collect()
        still = []
        for (seq, root), chunk, tokens in zip(running, chunks, sampled, strict=True):
            engine.kv.computed(seq, chunk.num_tokens)
            siblings = [seq, *(seq.fork(choice) for choice in chunk.choices[1:])]
            for sibling in siblings[1:]:
                engine.kv.fork(seq, sibling)
            for sibling, token in zip(siblings, tokens, strict=False):
                outputs[id(root)].setdefault(sibling.choice, []).append(token)
                if sibling.append(token.token_id) is None:
                    still.append((sibling, root))
                else:
                    engine.kv.release(sibling)
            if not tokens:
                still.append((seq, root))
        running = still
    engine.pool.check_integrity()
    return [[token for choice in outputs[id(seq)].values() for token in choice] for seq in sequences]


def random_prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (length,), generator=generator).tolist()
