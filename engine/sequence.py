"""One worker's mutable view of one choice of a dispatch: its tokens, how many of them have KV, and the blocks
of that KV."""

import msgspec

from ..core.hashing import block_hashes
from ..core.request import FinishReason, SamplingParams, SequenceSpec
from .bad_words import BadWords


class Sequence:
    """Tokens `[0, num_computed_tokens)` have KV in `block_ids`; the last token has none until a step computes
    it.

    Owned by the engine thread. Its state is which holder has it: a scheduler's queue, or a transfer.
    """

    def __init__(self, spec: SequenceSpec, choice: int, max_model_len: int) -> None:
        self.spec = spec
        self.transfer = spec.transfer
        self.choice = choice
        self.priority = spec.priority  # the lower is served earlier; may be lowered while it waits
        self.num_prompt_tokens = len(spec.prompt_token_ids)
        self.token_ids: list[int] = list(spec.token_ids)
        self.num_computed_tokens = 0
        self.num_in_flight_tokens = 0  # behind those: of a step that was launched and not collected
        self.num_pending_tokens = 0  # 1: that step draws a token, which is not among `token_ids` yet
        self.num_cached_tokens = 0  # of these, how many came from the prefix cache when it was admitted
        self.block_ids: list[int] = []
        # of the next token, one bit each, when the output follows a grammar
        self.token_mask: bytes | None = None
        self.is_mask_late = True  # it was missing when it was needed, or nothing was computed for it yet
        self._block_hashes: list[bytes] = []
        self._num_given_tokens = spec.num_tokens  # by the dispatch
        self._max_num_tokens = min(max_model_len, self.num_prompt_tokens + spec.sampling.max_tokens)
        # its tokens so far bear on the next one not through the model alone
        self.depends_on_tokens = bool(spec.sampling.grammar or spec.sampling.bad_words) or has_penalties(
            spec.sampling
        )
        self._bad_words = BadWords(spec.sampling.bad_words) if spec.sampling.bad_words else None
        self._stop_token_ids = frozenset(spec.sampling.stop_token_ids)
        if not spec.sampling.ignore_eos:
            self._stop_token_ids |= frozenset(spec.eos_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_launched_tokens(self) -> int:
        """Returns the number of tokens that have KV, or will have it when the step under way is done."""
        return self.num_computed_tokens + self.num_in_flight_tokens

    @property
    def num_output_tokens(self) -> int:
        """Returns the number of tokens generated so far, by this and by earlier attempts, including a pending
        one: the index of the next one."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def may_sample(self) -> bool:
        """Returns whether it is known which tokens may come next."""
        return self.token_mask is not None or not self.spec.sampling.grammar

    @property
    def num_computable_tokens(self) -> int:
        """Returns how many tokens the next step may take: uncomputed ones, and a pending one unless the
        sequence is certain to end with it. Excludes the last one while a mask is late, as it produces the
        next token."""
        if self.num_pending_tokens:
            return 0 if len(self.token_ids) + 1 >= self._max_num_tokens else 1
        late = self.is_mask_late and not self.may_sample
        return len(self.token_ids) - self.num_computed_tokens - self.num_in_flight_tokens - late

    @property
    def needs_known_tokens(self) -> bool:
        """Returns whether its next step can only be prepared when all its tokens are known, and not while the
        last is pending."""
        return self.depends_on_tokens or (len(self.spec.choices) > 1 and self.is_fresh)

    @property
    def is_fresh(self) -> bool:
        """Returns whether this dispatch has produced no token yet."""
        return len(self.token_ids) == self._num_given_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Returns whether its next token carries the prompt's log probabilities: until then, none of the
        prompt may come from a cache."""
        return self.spec.wants_prompt_logprobs and not self.num_output_tokens

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Returns the token ids that end this sequence: EOS, unless it is ignored, and the request's own."""
        return self._stop_token_ids

    @property
    def forbidden_token_ids(self) -> list[int]:
        """Returns the tokens that would complete a word that the output may not contain."""
        if self._bad_words is None:
            return []
        return list(self._bad_words.forbidden(self.token_ids, self.num_prompt_tokens))

    def finish_reason_with(self, token_id: int) -> FinishReason | None:
        """Returns why the sequence would end if `token_id` came next; None when it would go on."""
        sampling = self.spec.sampling
        if token_id in self._stop_token_ids and self.num_output_tokens >= sampling.min_tokens:
            return FinishReason.STOP
        if (
            sampling.grammar and token_id in self.spec.eos_token_ids
        ):  # before min_tokens only where nothing else may come
            return FinishReason.STOP
        if len(self.token_ids) + 1 >= self._max_num_tokens:
            return FinishReason.LENGTH
        return None

    def append(self, token_id: int) -> FinishReason | None:
        """Appends one sampled token; returns the reason if the sequence ends with it."""
        reason = self.finish_reason_with(token_id)
        self.token_ids.append(token_id)
        self.token_mask = None
        self.is_mask_late = False
        return reason

    def block_hashes(self, block_size: int) -> list[bytes]:
        """Returns hashes of the full blocks of `token_ids`, extended as tokens come."""
        done = len(self._block_hashes)
        if (done + 1) * block_size <= len(self.token_ids):
            parent = self._block_hashes[-1] if done else None
            tail = self.token_ids[done * block_size :]
            self._block_hashes += block_hashes(tail, block_size, self.spec.cache_salt, parent)
        return self._block_hashes

    def drop_choice(self, choice: int) -> None:
        """Forgets a choice that it has yet to fork; another one stays."""
        choices = tuple(other for other in self.spec.choices if other != choice)
        self.spec = msgspec.structs.replace(self.spec, choices=choices)
        self.choice = choices[0]

    def fork(self, choice: int) -> "Sequence":
        """Returns another choice with the same tokens; the pool's owner shares its blocks."""
        sibling = Sequence(
            msgspec.structs.replace(self.spec, choices=(choice,)), choice, self._max_num_tokens
        )
        sibling.priority = self.priority
        sibling.token_ids = list(self.token_ids)
        sibling.num_computed_tokens = self.num_computed_tokens
        sibling.num_cached_tokens = self.num_cached_tokens
        sibling._block_hashes = list(self._block_hashes)
        return sibling

    def __repr__(self) -> str:
        return f"Sequence({self.transfer}/{self.choice}, {self.num_computed_tokens}/{self.num_tokens} tokens)"


def has_penalties(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )
