"""Turns a client's message into a validated `Request`: nothing reaches the router that a worker could not
carry out."""

import asyncio
import hashlib
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from ..core.config import LimitsSection
from ..core.errors import MISSING, InvalidRequest, NoWorkerAvailable, refuse
from ..core.request import DefaultSampling, Request, SamplingParams
from ..core.validation import max_prompt_tokens, request_problems
from ..proto import pdserve_pb2 as pb
from .auth.access import Caller
from .auth.cost import Charge
from .auth.keys import PRIORITIES
from .call_bounds import client_of, host_of
from .constraint import GrammarCheck, constraint_problems
from .in_turns import in_turns
from .offload.offload import Offload
from .sampling import only_scores, sampling_params, with_sampling
from .text.chat_template import TooCostly
from .text.encoding import bounded_ids
from .text.tokenizer import Tokenizer
from .tools.grammar import refusal, tool_grammar
from .tools.offer import OfferedTools
from .vetting import Fit

_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-[0-9a-f]{2}", re.ASCII
)
INLINE_CHARS = 4096  # longer prompts are encoded on a thread (`FairThreads`), so that other streams continue
THREAD_CHARS = 1 << 16  # and prompts longer than these in the intake process


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model's properties that clients may see."""

    name: str
    architecture: str
    dtype: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    default_sampling: DefaultSampling = field(default_factory=DefaultSampling)


class Intake:
    """Reads requests for one model."""

    def __init__(
        self, tokenizer: Tokenizer, model: ModelInfo, grammars: GrammarCheck, offload: Offload | None = None
    ) -> None:
        self.offload = offload or Offload(tokenizer, model.name, model.max_model_len)
        self._tokenizer = tokenizer
        self._model = model
        self._grammars = grammars

    async def request(
        self,
        message: pb.GenerateRequest,
        limits: LimitsSection,
        deadline_s: float | None,
        peer: str,
        traceparent: str | None = None,
        caller: Caller | None = None,
        fills: bool = False,
        charge: Charge | None = None,
    ) -> Request:
        """Returns the request that a vetted `message` asks for. `peer` is the connection it arrived on,
        `traceparent` the header of that name, `caller` the client that its key admitted, `charge` the account
        of that key. `fills`: without `max_tokens` it may use all the remaining room.

        Raises InvalidRequest or UnknownModel; QueueFull or NoWorkerAvailable if it cannot be processed now. A
        malformed `traceparent` is ignored, as its standard requires."""
        charge = charge or Charge.free()
        worked_for = client_of(caller, host_of(peer))
        request_id = message.request_id or uuid.uuid4().hex
        sampling = sampling_params(message.sampling, _seed_of(request_id), self._model.default_sampling)
        _check_resumption(message, sampling)
        priority = _priority(message, caller)
        try:
            offer = await self.offer(message.prompt, limits, worked_for)
            with charge.tokenizing():
                token_ids = await self.token_ids(message.prompt, limits, worked_for)
        except InvalidRequest as error:
            raise with_sampling([error], message.sampling, limits) from None
        # its tokens are charged, even if the request is refused below
        charge.settle_prompt(len(token_ids), asyncio.get_running_loop().time())
        takes_all = fills and not message.sampling.HasField("max_tokens")
        num_output = 1 if takes_all else sampling.max_tokens
        token_ids = truncated(token_ids, message.prompt, num_output, limits, self._model.max_model_len)
        if takes_all:
            room = min(limits.max_tokens, self._model.max_model_len - len(token_ids))
            sampling = msgspec.structs.replace(sampling, max_tokens=max(1, room))
        constraint = message.sampling.constraint if message.sampling.HasField("constraint") else None
        found = request_problems(
            token_ids, sampling, limits, self._model.max_model_len, self._model.vocab_size
        )
        if constraint is not None:
            found += constraint_problems(constraint, limits)
        refuse(found)
        if message.sampling.bad_words:
            words = await self._bad_words(message.sampling.bad_words, limits, worked_for)
            sampling = msgspec.structs.replace(sampling, bad_words=words)
        if constraint is not None or offer is not None:
            sampling = await self._constrained(sampling, constraint, offer, limits, worked_for)
        return Request(
            request_id=request_id if caller is None else caller.scoped(request_id),
            prompt_token_ids=token_ids,
            sampling=sampling,
            eos_token_ids=self._model.eos_token_ids,
            cache_salt=message.cache_salt,
            deadline_s=deadline_s,
            client=worked_for,
            turn=message.client_id or peer,
            priority=priority,
            weight=1.0 if caller is None else caller.weight,
            user=message.client_id,
            traceparent=checked_traceparent(traceparent),
            has_tools=offer is not None,
            only_scores=only_scores(message.sampling),
        )

    async def _bad_words(
        self, words: Sequence[str], limits: LimitsSection, client: str
    ) -> tuple[tuple[int, ...], ...]:
        """Returns the tokens of each word, at the beginning of a text and behind a space, as vLLM does."""
        found: dict[tuple[int, ...], None] = {}
        async for word in in_turns(words, every=8):
            alone = await self._encode(word.lstrip(), False, limits, client, fit=Fit.COUNTED)
            spaced = await self._encode(f" {word.lstrip()}", False, limits, client, fit=Fit.COUNTED)
            if not alone:
                continue  # the tokenizer drops all of it
            found[alone] = None
            if len(spaced) == len(alone) and spaced[0] != alone[0]:
                found[spaced] = None
        return tuple(found)

    async def _constrained(
        self,
        sampling: SamplingParams,
        message: pb.Constraint | None,
        offer: OfferedTools | None,
        limits: LimitsSection,
        client: str,
    ) -> SamplingParams:
        """Adds the grammar of the constraint, or of the tool calls."""
        if message is not None and offer is not None:
            raise InvalidRequest(
                "constraint", message.WhichOneof("kind"), "none beside tools, unless tool_choice is none"
            )
        what = "tools" if message is None else "constraint"
        if sampling.ignore_eos:
            raise InvalidRequest(
                "ignore_eos", True, f"false with {what}: an output is complete at an end-of-text token"
            )
        if not self._model.eos_token_ids:
            got = f"{len(offer.tools)} tool(s)" if message is None and offer is not None else "some"
            raise InvalidRequest(what, got, "none: the model has no end-of-text token")
        if offer is not None:
            grammar = await self._tool_grammar(offer, client)
        else:
            assert message is not None
            grammar = await self._grammars.grammar(message, client)
        return msgspec.structs.replace(sampling, grammar=grammar)

    async def _tool_grammar(self, offer: OfferedTools, client: str) -> str:
        form = self._tokenizer.templates.tool_format
        assert form is not None, "an offer without a format"
        arguments = offer, form, self._tokenizer.added_tokens, self._model.eos_token_ids
        grammar = await self.offload.threads.run(client, tool_grammar, *arguments)
        why = await self._grammars.why_not(grammar, client)
        if why is not None:
            raise refusal(offer, grammar, why)
        return grammar

    async def offer(self, prompt: pb.Prompt, limits: LimitsSection, client: str) -> OfferedTools | None:
        """Returns the tools of a conversation that the model may call; None if there are none. Raises
        InvalidRequest; QueueFull or NoWorkerAvailable if they are many."""
        offer = None
        if prompt.HasField("chat"):
            is_small = not prompt.chat.tools or prompt.chat.ByteSize() <= INLINE_CHARS
            if is_small:
                offer = OfferedTools.read(prompt.chat, limits)
            else:
                offer = await self.offload.threads.run(client, OfferedTools.read, prompt.chat, limits)
        if offer is not None and not self._tokenizer.templates.takes_tools:
            expected = "none, as the model's chat template has no place for them"
            raise InvalidRequest("tools", f"{len(offer.tools)} tool(s)", expected)
        if offer is not None and self._tokenizer.templates.tool_format is None:
            expected = "none, as it is not known how the model writes calls"
            raise InvalidRequest("tools", f"{len(offer.tools)} tool(s)", expected)
        return offer

    async def token_ids(
        self,
        prompt: pb.Prompt,
        limits: LimitsSection,
        client: str,
        fit: Fit = Fit.REQUEST,
    ) -> tuple[int, ...]:
        """Returns the tokens of a vetted prompt of any kind.

        `fit` holds for those that are not to be truncated. Raises InvalidRequest; for long prompts and
        conversations, QueueFull or NoWorkerAvailable."""
        fit = Fit.TRUNCATED if prompt.HasField("truncate_tokens") else fit
        match prompt.WhichOneof("kind"):
            case "text":
                add = prompt.add_special_tokens if prompt.HasField("add_special_tokens") else True
                return await self._encode(prompt.text, add, limits, client, fit)
            case "chat":
                return await self._encode_chat(prompt.chat, limits, client, fit)
            case "token_ids":
                return tuple(prompt.token_ids.ids)
        raise InvalidRequest("prompt", MISSING, "one of text, chat or token_ids")

    async def _encode(
        self, text: str, add_special_tokens: bool, limits: LimitsSection, client: str, fit: Fit
    ) -> tuple[int, ...]:
        if len(text) > THREAD_CHARS or self._tokenizer.may_stall:
            return await self.offload.encode(text, add_special_tokens, limits, client, fit)
        arguments = self._tokenizer, text, add_special_tokens, self.offload.bounds(limits), fit
        if len(text) <= INLINE_CHARS:
            return bounded_ids(*arguments)
        return await self.offload.threads.run(client, bounded_ids, *arguments)

    async def _encode_chat(
        self, chat: pb.Chat, limits: LimitsSection, client: str, fit: Fit
    ) -> tuple[int, ...]:
        """Short conversations have a process of their own, where they do not wait for large ones."""
        if chat.ByteSize() > THREAD_CHARS:
            return await self.offload.encode_chat(chat, limits, client, fit)
        try:
            text = await self.offload.render(chat, limits, client)
        except (TooCostly, NoWorkerAvailable):  # for a turn there; or that process does not start
            return await self.offload.encode_chat(chat, limits, client, fit)
        return await self._encode(text, False, limits, client, fit)


def truncated(
    token_ids: tuple[int, ...], prompt: pb.Prompt, num_output_tokens: int, limits: LimitsSection, max_len: int
) -> tuple[int, ...]:
    """Returns the end of a vetted prompt whose client allows that, the whole of others."""
    if not prompt.HasField("truncate_tokens"):
        return token_ids
    count = prompt.truncate_tokens
    if count == -1:
        count = max(1, min(max_prompt_tokens(limits, max_len), max_len - num_output_tokens))
    return token_ids[-count:]


def checked_traceparent(header: str | None) -> str:
    """Returns the header, or "" if W3C Trace Context does not allow it."""
    match = _TRACEPARENT.fullmatch(header or "")
    return "" if match is None or match["trace"] == "0" * 32 or match["span"] == "0" * 16 else match[0]


def shown_id(request: Request) -> str:
    """Returns a request's id as its client knows it."""
    kind, _, name = request.client.partition(":")
    return request.request_id.removeprefix(f"{name}/") if kind == "key" else request.request_id


def _seed_of(request_id: str) -> int:
    """A client that reconnects for the rest of its stream only needs to name its request."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")


def _priority(message: pb.GenerateRequest, caller: Caller | None) -> int:
    least = 0 if caller is None else caller.min_priority
    if not message.HasField("priority"):
        return max(0, least)
    if message.priority not in PRIORITIES:
        raise InvalidRequest("priority", message.priority, f"{PRIORITIES[0]} to {PRIORITIES[-1]}")
    if caller is not None and message.priority < least:
        raise InvalidRequest("priority", message.priority, f"{least} or more, as the key allows")
    return message.priority


def _check_resumption(message: pb.GenerateRequest, sampling: SamplingParams) -> None:
    if not message.resume_from:
        return
    if not message.request_id:
        raise InvalidRequest("request_id", MISSING, "the name of the request to resume")
    if len(message.resume_from) != sampling.n:
        raise InvalidRequest(
            "resume_from", list(message.resume_from), f"one index for each of the {sampling.n} choices"
        )
    for choice, index in enumerate(message.resume_from):
        most = 0 if only_scores(message.sampling) else sampling.max_tokens
        if not 0 <= index <= most:
            raise InvalidRequest(f"resume_from[{choice}]", index, f"0 to {most}")
