"""Tokenizers built on the spot, and the scripted cluster of the gateway's tests."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer as Backend,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from pdserve.core.config import ClusterConfig
from pdserve.core.errors import InvalidRequest, PdserveError, QueueFull
from pdserve.core.messages import Leg, LegEnded, Role, TokenLogprobs, TokenOutput, TransferStats
from pdserve.core.request import FinishReason, Request, TransferId
from pdserve.core.status import ClusterStatus, WorkerState, WorkerStatus
from pdserve.gateway.constraint import grammar_of
from pdserve.gateway.frontend import StreamEvent
from pdserve.gateway.intake import ModelInfo
from pdserve.gateway.text.tokenizer import Tokenizer
from pdserve.gateway.text.tokenizer_loading.main import exported
from pdserve.proto import pdserve_pb2 as pb
from pdserve.router.events import ConsideredPlace, DispatchTimes, EmitChoiceEnd, EmitEnd, EmitTokens, Timeline
from pdserve.router.planner_desk import PlannerState

CORPUS = [
    "the quick brown fox jumps over the lazy dog and then the dog sleeps",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "Grüße aus Köln, ça va très bien, 你好世界 и привет 🙂",
] * 4
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EOS = "<|im_end|>"


class Built(Tokenizer):
    """A tokenizer, and the transformers one that it was made of."""

    def __init__(self, pretrained: PreTrainedTokenizerFast) -> None:
        super().__init__(exported(pretrained))
        self.pretrained = pretrained


@cache
def byte_level() -> Built:
    """GPT-2's kind: every byte is a letter of the vocabulary. With a chat template."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return Built(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, chat_template=TEMPLATE))


@cache
def sentencepiece_like() -> Built:
    """Llama 2's kind: spaces are letters, unknown text is spelled in bytes, a text begins with a space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += sorted({char for text in CORPUS for char in text if char.isascii() and char.isalpha()})
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("▁", "d"),
        ("▁d", "o"),
        ("▁do", "g"),
        ("a", "n"),
        ("▁", "an"),
    ]
    pieces += ["".join(merge) for merge in merges]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Built(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))


@cache
def metaspace() -> Built:
    """SentencePiece's unigram kind without bytes: text outside the vocabulary is unknown."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>")
    )
    return Built(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))


@cache
def metaspace_with_bytes() -> Built:
    """Gemma's and Mistral's kind: SentencePiece's letters for spaces, byte fallback, nothing stripped."""
    backend = Backend.from_str(sentencepiece_like()._backend.to_str())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Built(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))


@cache
def word_piece() -> Built:
    """BERT's kind: pieces of words, a space before each that does not continue a word, and a final
    clean-up."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]"]))
    return Built(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))


def model_info(tokenizer: Tokenizer) -> ModelInfo:
    return ModelInfo(
        name="tiny",
        architecture="LlamaForCausalLM",
        dtype="float32",
        max_model_len=256,
        vocab_size=500,
        eos_token_ids=tokenizer.encode(EOS, add_special_tokens=False),
    )


class Unchecked:
    """Implements GrammarCheck: accepts every grammar."""

    async def grammar(self, message: pb.Constraint, client: str) -> str:
        return grammar_of(message)

    async def why_not(self, grammar: str, client: str) -> str | None:
        return None


def timeline(request: Request) -> Timeline:
    """One request that took 100 ms: 10 in the queue, first token at 40, its KV 75 % hidden."""
    transfer = TransferId(request.request_id, 0)
    stats = TransferStats(
        num_bytes=4 << 20, num_chunks=4, duration_s=0.02, exposed_s=0.005, hidden_bytes=3 << 20
    )
    prefill = LegEnded(
        worker_id="prefill-0",
        incarnation=1,
        transfer=transfer,
        leg=Leg.PREFILL,
        num_cached_tokens=1,
        queue_s=0.001,
        compute_s=0.025,
        stats=stats,
    )
    dispatch = DispatchTimes(
        attempt=0,
        number=7,
        choices=tuple(range(request.sampling.n)),
        prefill_worker="prefill-0",
        decode_worker="decode-0",
        num_tokens=len(request.prompt_token_ids),
        expected_cached_tokens=0,
        expected_ttft_s=0.03,
        expected_queue_s=0.002,
        expected_transfer_s=0.004,
        expected_itl_s=0.01,
        considered=(
            place("prefill-0", "decode-0", cost_s=0.034),
            place("prefill-1", "decode-0", cost_s=0.05),
        ),
        queued_s=100.0,
        dispatched_s=100.01,
        first_token_s=100.04,
        ended_s=100.1,
        num_steps=7,
        prefill=prefill,
    )
    return Timeline(
        request_id=request.request_id,
        submitted_s=100.0,
        first_token_s=100.04,
        ended_s=100.1,
        dispatches=(dispatch,),
        finish_reasons=(FinishReason.LENGTH,),
        num_prompt_tokens=len(request.prompt_token_ids),
        num_output_tokens=(7,),
        client=request.client,
        user=request.user,
        traceparent=request.traceparent,
    )


def place(prefill_worker: str, decode_worker: str | None, **scores: Any) -> ConsideredPlace:
    """Returns the best possible placement, except for `scores`."""
    values = {"has_failed": False, "itl_excess_s": 0.0, "cost_s": 0.03, "load": 0.0, "ttft_s": 0.03} | scores
    return ConsideredPlace(prefill_worker=prefill_worker, decode_worker=decode_worker, **values)


class ScriptedCluster:
    """Answers every request with the tokens of `says`, one at a time; after `hold_after` tokens it waits for
    `say_on`."""

    def __init__(
        self, tokenizer: Tokenizer, says: str = "the quick brown fox jumps over the lazy dog"
    ) -> None:
        self.tokenizer = tokenizer
        self.token_ids = tokenizer.encode(says, add_special_tokens=False)
        self.eos_after: int | None = None
        self.num_extra_logprobs = 0  # makes messages big
        self.refusal: PdserveError | None = None
        self.refuses_once = False
        self.refused_ids: set[str] = set()
        self.ending: tuple[FinishReason, str | None] | None = None
        self.hold_after: int | None = None
        self.say_on = asyncio.Event()
        self.held = asyncio.Event()  # set by each request that waits
        self.num_held = 0
        self.num_said = 0  # steps
        self.go_on = asyncio.Event()  # with a drain
        self.requests: list[Request] = []
        self.closed: list[str] = []
        self.all_closed = asyncio.Event()
        self.stopped: list[tuple[str, int | None]] = []
        self.applied: list[ClusterConfig] = []
        self.drained: list[tuple[tuple[str, ...], bool]] = []
        self.planning = PlannerState()
        self.state = ClusterStatus(
            serving=True,
            shutting_down=False,
            num_queued_requests=2,
            num_running_requests=3,
            instances={Role.PREFILL: 1, Role.DECODE: 1},
            workers=(
                WorkerStatus(
                    worker_id="prefill-0",
                    role=Role.PREFILL,
                    state=WorkerState.READY,
                    node="host",
                    devices=("cpu:0",),
                    num_running=1,
                    num_free_blocks=90,
                    num_blocks=100,
                    tokens_per_s=1234.5,
                    age_s=3700.0,
                ),
                WorkerStatus(
                    worker_id="decode-0",
                    role=Role.DECODE,
                    state=WorkerState.STARTING,
                    phase="loading weights",
                    fraction=0.5,
                ),
            ),
            uptime_s=3700.0,
        )
        self.on_shutdown: Callable[[], None] = lambda: None
        self.on_watch: Callable[[], None] = lambda: None
        self.on_apply: Callable[[], None] = lambda: None
        self._changed = asyncio.Event()

    async def generate(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        try:
            if request.request_id in self.refused_ids:
                raise QueueFull(1, 1.0)
            if self.refusal is not None:
                refusal = self.refusal
                if self.refuses_once:
                    self.refusal = None
                raise refusal
            self.requests.append(request)
            for index in range(request.sampling.max_tokens):
                if index == self.hold_after:
                    self.num_held += 1
                    self.held.set()
                    await self.say_on.wait()
                self.num_said += 1
                for event in self._step(request, index):
                    yield event
            reason, error = self.ending or (None, None)
            yield EmitEnd(request.request_id, reason, error, timeline(request))
        finally:
            self.closed.append(request.request_id)
            self.all_closed.set()

    def _step(self, request: Request, index: int) -> list[StreamEvent]:
        """Returns token `index` of each choice."""
        events: list[StreamEvent] = []
        for choice in range(request.sampling.n):
            reason = FinishReason.LENGTH if index + 1 == request.sampling.max_tokens else None
            token_id = self.token_ids[index % len(self.token_ids)]
            if self.eos_after is not None and index >= self.eos_after:
                if index > self.eos_after:
                    continue
                token_id, reason = request.eos_token_ids[0], FinishReason.STOP
            wanted = request.sampling.logprobs
            output = TokenOutput(
                transfer=TransferId(request.request_id, 0),
                choice=choice,
                index=index,
                token_id=token_id,
                finish_reason=reason,
                logprob=None if wanted is None else -0.5,
                prompt_logprobs=self._prompt(request) if choice == index == 0 else (),
                top_logprobs=tuple(
                    (rank, -0.5 - rank) for rank in range((wanted or 0) + self.num_extra_logprobs)
                ),
            )
            events.append(EmitTokens(request.request_id, choice, (output,)))
            if reason is not None:
                events.append(EmitChoiceEnd(request.request_id, choice, reason))
        return events

    def _prompt(self, request: Request) -> tuple[TokenLogprobs, ...]:
        """Returns log probability -i for token i, and alternatives that count from 0."""
        count = request.sampling.prompt_logprobs
        if count is None:
            return ()
        top = tuple((rank, -float(rank)) for rank in range(count))
        return tuple(TokenLogprobs(-float(index), top) for index in range(1, len(request.prompt_token_ids)))

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        self.stopped.append((request_id, choice))

    def status(self) -> ClusterStatus:
        return self.state

    def change(self, **changes: object) -> None:
        self.state = replace(self.state, **changes)  # type: ignore[arg-type]
        self._changed.set()

    async def watch(self) -> AsyncGenerator[ClusterStatus, None]:
        seen = self.state
        yield seen
        self.on_watch()
        while not seen.shutting_down:
            while self.state is seen:
                self._changed.clear()
                await self._changed.wait()
            seen = self.state
            yield seen

    def metrics(self) -> bytes:
        return b"# TYPE pdserve_info gauge\npdserve_info 1.0\n"

    def explain(self, request_id: str) -> Timeline | None:
        return next(
            (timeline(request) for request in self.requests if request.request_id == request_id), None
        )

    def latest(self, max_requests: int, scope: str) -> list[Timeline]:
        found = [request for request in reversed(self.requests) if request.request_id.startswith(scope)]
        return [timeline(request) for request in found[:max_requests]]

    async def apply(self, config: ClusterConfig, dry_run: bool) -> None:
        if self.refusal is not None:
            raise self.refusal
        if not dry_run:
            self.applied.append(config)
            sizes = {role: pool.num_instances for role, pool in config.pools.items()}
            self.state = replace(self.state, instances=sizes)
            self.on_apply()

    def planner(self) -> PlannerState:
        return self.planning

    async def drain(self, worker_ids: Sequence[str], shutdown: bool) -> None:
        known = {worker.worker_id for worker in self.state.workers}
        for name in worker_ids:
            if name not in known:
                raise InvalidRequest("worker_ids", name, f"one of {', '.join(sorted(known))}")
        await self.go_on.wait()
        self.drained.append((tuple(worker_ids), shutdown))
        idle = tuple(replace(worker, num_running=0, num_waiting=0) for worker in self.state.workers)
        self.change(workers=idle, num_running_requests=0, shutting_down=shutdown)
        if shutdown:
            self.on_shutdown()
