"""Serves a client's message for both servers, whether from gRPC or translated from HTTP's JSON: checks it and
carries it out.

However a response ends (completion, an error, a disconnected client, a deadline), closing `events` closes the
router's stream, and that frees all that workers hold for the request."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, contextmanager, suppress

from google.protobuf.message import Message
from msgspec import structs

from .. import __version__
from ..core.config import ClusterConfig
from ..core.errors import DuplicateRequest, NoWorkerAvailable, Overloaded
from ..core.held_bytes import HeldBytes
from ..core.request import Request
from ..core.validation import check_token_ids
from ..proto import pdserve_pb2 as pb
from ..telemetry.logs import REQUEST_ID
from .answer import ResponseEvents
from .auth.access import Access, Caller, cache_scope, scoped_salt
from .auth.cost import Charge, RequestPrice, prompt_price, request_price
from .auth.revocation import Revocation
from .call_bounds import client_of, host_of
from .constraint import GrammarCheck
from .frontend import Frontend
from .in_turns import in_turns
from .intake import Intake, ModelInfo, shown_id, truncated
from .offload.offload import Offload
from .text.tokenizer import Tokenizer
from .vetting import Fit, check_model, refuse_unknown_fields

INLINE_TOKENS = 4096  # up to this many tokens are decoded on the loop
FLUSH_S = 5.0  # how long clients may take to read the rest of their responses when the cluster ends


class Shared:
    """The state that all services share: the configuration in force, access, and the number of responses in
    progress."""

    def __init__(self, config: ClusterConfig, access: Access | None = None) -> None:
        self.config = config
        self.access = access
        # the other half: data that gRPC is receiving
        self.held_bytes = HeldBytes(config.limits.max_held_bytes // 2)
        self.held_answers = HeldBytes(config.limits.max_held_bytes // 2, "answers")
        self.revocation = Revocation(access)
        self._num_answers = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def answer(self) -> Iterator[None]:
        """Wraps a response in progress."""
        self._num_answers += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_answers -= 1
            if not self._num_answers:
                self._idle.set()

    async def answered(self) -> None:
        """Returns when all responses are sent, or after a timeout: the router may finish a request before its
        client has read it."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), FLUSH_S)


class Serving:
    """One served model."""

    def __init__(
        self,
        frontend: Frontend,
        shared: Shared,
        tokenizer: Tokenizer,
        model: ModelInfo,
        grammars: GrammarCheck,
        offload: Offload | None = None,
    ) -> None:
        self.frontend = frontend
        self.shared = shared
        self.tokenizer = tokenizer
        self.model = model
        self.intake = Intake(tokenizer, model, grammars, offload)

    async def message(self, kind: type[Message], data: bytes, client: str) -> Message:
        """Returns a gRPC message, parsed and vetted, as by `Offload.message`."""
        return await self.intake.offload.message(kind, data, self.shared.config.limits, client)

    async def request(
        self,
        message: pb.GenerateRequest,
        peer: str,
        charge: Charge,
        *,
        deadline_s: float | None = None,
        traceparent: str | None = None,
        caller: Caller | None = None,
        fills: bool = False,
    ) -> Request:
        """Returns the request that `message` asks for, as by `Intake.request`. Raises InvalidRequest or
        UnknownModel."""
        config = self.shared.config
        request = await self.intake.request(
            message, config.limits, deadline_s, peer, traceparent, caller, fills, charge=charge
        )
        max_output_tokens = request.sampling.n * request.sampling.max_tokens
        charge.settle_room(max_output_tokens, asyncio.get_running_loop().time())
        salt = scoped_salt(cache_scope(caller, config.kv.cache_sharing), request.cache_salt)
        request = structs.replace(request, cache_salt=salt)
        REQUEST_ID.set(request.request_id)
        return request

    async def events(
        self, request: Request, charge: Charge, resume_from: Sequence[int] = ()
    ) -> AsyncGenerator[pb.GenerateEvent, None]:
        """Yields the messages of the response. Raises Overloaded, DuplicateRequest or NoWorkerAvailable
        before the first."""
        answer = ResponseEvents(
            request,
            self.tokenizer,
            lambda choice: self.frontend.cancel(request.request_id, choice),
            resume_from,
        )
        async with self._paid(request, charge, answer), aclosing(self.frontend.generate(request)) as events:
            async for event in events:
                for out in answer.handle(event):
                    yield out
                    if out.HasField("prompt"):  # one event may bring many of them
                        await asyncio.sleep(0)

    def charged(
        self, messages: Sequence[pb.GenerateRequest], caller: Caller | None, fills: bool = False
    ) -> AbstractContextManager[list[Charge]]:
        """Wraps all work of one call, before any of it is tokenised: charges the key's rates, and refunds
        what was not used. Raises RateLimited."""
        limits, max_model_len = self.shared.config.limits, self.model.max_model_len
        return self._charged(
            [request_price(message, limits, max_model_len, fills) for message in messages], caller
        )

    @contextmanager
    def _charged(self, prices: Sequence[RequestPrice], caller: Caller | None) -> Iterator[list[Charge]]:
        loop, access = asyncio.get_running_loop(), self.shared.access
        charges = (
            [Charge.free() for _ in prices] if access is None else access.charge(caller, prices, loop.time())
        )
        try:
            yield charges
        finally:
            for charge in charges:
                charge.settle(0, loop.time(), has_begun=False)  # a no-op for settled accounts

    @asynccontextmanager
    async def _paid(self, request: Request, charge: Charge, answer: ResponseEvents) -> AsyncIterator[None]:
        """Wraps the execution of a request: tokens that it did not produce are refunded as soon as it
        ends."""
        loop = asyncio.get_running_loop()
        has_begun = True
        try:
            yield
        except (Overloaded, DuplicateRequest, NoWorkerAvailable) as error:
            has_begun = False
            is_scoped = isinstance(error, DuplicateRequest) and self.shared.access is not None
            raise DuplicateRequest(shown_id(request)) if is_scoped else error
        finally:
            charge.settle(answer.num_tokens, loop.time(), has_begun)

    async def tokenize(
        self, request: pb.TokenizeRequest, peer: str, caller: Caller | None = None, with_pieces: bool = True
    ) -> pb.TokenizeResponse:
        limits, client = self.shared.config.limits, client_of(caller, host_of(peer))
        await self.intake.offer(request.prompt, limits, client)  # refuses what a request could not have
        with self._charged([prompt_price(request.prompt)], caller) as (charge,):
            with charge.tokenizing():
                token_ids = await self.intake.token_ids(request.prompt, limits, client, fit=Fit.COUNTED)
            charge.settle_prompt(len(token_ids), asyncio.get_running_loop().time())
            token_ids = truncated(token_ids, request.prompt, 0, limits, self.model.max_model_len)
            if token_ids:
                check_token_ids("prompt.token_ids", token_ids, self.model.vocab_size)
            charge.settle(0, asyncio.get_running_loop().time())
        response = pb.TokenizeResponse(token_ids=token_ids, max_model_len=self.model.max_model_len)
        if with_pieces:
            async for token_id in in_turns(token_ids):
                response.pieces.append(self.tokenizer.piece(token_id))
        return response

    async def detokenize(
        self, request: pb.DetokenizeRequest, peer: str, caller: Caller | None = None
    ) -> pb.DetokenizeResponse:
        ids = request.token_ids
        if ids:
            check_token_ids("token_ids", ids, self.model.vocab_size)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        with self._charged([RequestPrice(num_prompt_tokens=len(ids), is_text=False)], caller) as (charge,):
            charge.settle(0, asyncio.get_running_loop().time())
        return pb.DetokenizeResponse(text=await self.text(ids, skip, client_of(caller, host_of(peer))))

    async def text(self, token_ids: Sequence[int], skip_special_tokens: bool, client: str) -> str:
        """Returns the text of any number of tokens. Raises QueueFull or NoWorkerAvailable if they are
        many."""
        if len(token_ids) <= INLINE_TOKENS:
            return self.tokenizer.decode(token_ids, skip_special_tokens)
        return await self.intake.offload.decode(
            token_ids, skip_special_tokens, self.shared.config.limits, client
        )

    def model_info(self, request: pb.GetModelInfoRequest) -> pb.ModelInfo:
        refuse_unknown_fields(request)
        check_model(request.model, self.model.name)
        model, limits = self.model, self.shared.config.limits
        return pb.ModelInfo(
            name=model.name,
            architecture=model.architecture,
            dtype=model.dtype,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            has_chat_template=self.tokenizer.templates.can_render,
            limits=pb.Limits(
                max_prompt_tokens=limits.max_prompt_tokens or model.max_model_len - 1,
                max_tokens=limits.max_tokens,
                max_n=limits.max_n,
                max_logprobs=limits.max_logprobs,
                max_stop_strings=limits.max_stop_strings,
                max_message_bytes=limits.max_message_bytes,
                max_logit_bias=limits.max_logit_bias,
                max_prompt_logprobs=limits.max_prompt_logprobs,
                max_constraint_bytes=limits.max_constraint_bytes,
                max_tools=limits.max_tools,
                max_tool_bytes=limits.max_tool_bytes,
            ),
            version=__version__,
            default_sampling=pb.SamplingParams(**model.default_sampling.stated),
        )
