"""What both doors do with a client's message, gRPC's or one that HTTP's JSON was translated to: check it, carry it out.

Whatever ends an answer (its end, an error, a client that went away, a deadline), closing `events` closes the router's stream,
and that frees all that workers hold for the request.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress

from google.protobuf.message import Message

from .. import __version__
from ..core.config import ClusterConfig
from ..core.errors import DuplicateRequest, NoWorkerAvailable, QueueFull
from ..core.request import Request
from ..core.validation import check_token_ids
from ..proto import pdserve_pb2 as pb
from ..telemetry.logs import REQUEST_ID
from .access import Access, Caller
from .answer import Answer
from .call_bounds import HeldBytes
from .constraint import GrammarCheck
from .frontend import Frontend
from .in_turns import in_turns
from .intake import Intake, ModelInfo, shown_id
from .offload.offload import Offload
from .tokenizer import Tokenizer
from .vetting import check_model, refuse_unknown_fields

INLINE_TOKENS = 4096  # so many are decoded on the loop
FLUSH_S = 5.0  # how long clients may take to read the rest of their answers when the cluster ends


class Shared:
    """What all services have in common: the configuration in force, who is let in, how many answers are being given."""

    def __init__(self, config: ClusterConfig, access: Access | None = None) -> None:
        self.config = config
        self.access = access
        self.held_bytes = HeldBytes(
            config.limits.max_held_bytes // 2
        )  # of both servers; the other half is for what is being received
        self._num_answers = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def answer(self) -> Iterator[None]:
        """Around giving an answer."""
        self._num_answers += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_answers -= 1
            if not self._num_answers:
                self._idle.set()

    async def answered(self) -> None:
        """Returns when all answers are out, or after a while: the router may be done with a request before its client."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), FLUSH_S)


class Serving:
    """One model, served."""

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
        """A message of gRPC, parsed and vetted, as `Offload.message` has it."""
        return await self.intake.offload.message(kind, data, self.shared.config.limits, client)

    async def request(
        self,
        message: pb.GenerateRequest,
        peer: str,
        *,
        deadline_s: float | None = None,
        traceparent: str | None = None,
        caller: Caller | None = None,
        fills: bool = False,
    ) -> Request:
        """The request that `message` asks for, as `Intake.request` has it. Raises InvalidRequest or UnknownModel."""
        limits = self.shared.config.limits
        request = await self.intake.request(message, limits, deadline_s, peer, traceparent, caller, fills)
        REQUEST_ID.set(request.request_id)
        return request

    async def events(
        self, request: Request, caller: Caller | None = None, resume_from: Sequence[int] = ()
    ) -> AsyncGenerator[pb.GenerateEvent, None]:
        """The messages of the answer. Raises QueueFull, DuplicateRequest, NoWorkerAvailable or RateLimited before the first."""
        answer = Answer(request, self.tokenizer, lambda choice: self.frontend.cancel(request.request_id, choice), resume_from)
        async with self._paid(request, caller, answer), aclosing(self.frontend.generate(request)) as events:
            async for event in events:
                for out in answer.handle(event):
                    yield out

    @asynccontextmanager
    async def _paid(self, request: Request, caller: Caller | None, answer: Answer) -> AsyncIterator[None]:
        """Around carrying a request out: it takes its tokens of its key's rate, and gives back what it did not use."""
        if self.shared.access is None:
            yield
            return
        loop = asyncio.get_running_loop()
        charge = self.shared.access.charge(caller, request, loop.time())
        has_begun = True
        try:
            yield
        except (QueueFull, DuplicateRequest, NoWorkerAvailable) as error:
            has_begun = False
            raise DuplicateRequest(shown_id(request)) if isinstance(error, DuplicateRequest) else error
        finally:
            charge.settle(answer.num_tokens, loop.time(), has_begun)

    async def tokenize(self, request: pb.TokenizeRequest, client: str, with_pieces: bool = True) -> pb.TokenizeResponse:
        limits = self.shared.config.limits
        await self.intake.vet(request, limits)
        offer = await self.intake.offer(request.prompt, limits)
        token_ids = await self.intake.token_ids(request.prompt, limits, client, offer, is_counted=True)
        if token_ids:
            check_token_ids("prompt.token_ids", token_ids, self.model.vocab_size)
        response = pb.TokenizeResponse(token_ids=token_ids, max_model_len=self.model.max_model_len)
        if with_pieces:
            async for token_id in in_turns(token_ids):
                response.pieces.append(self.tokenizer.piece(token_id))
        return response

    async def detokenize(self, request: pb.DetokenizeRequest, client: str) -> pb.DetokenizeResponse:
        await self.intake.vet(request, self.shared.config.limits)
        if request.token_ids:
            check_token_ids("token_ids", request.token_ids, self.model.vocab_size)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        return pb.DetokenizeResponse(text=await self.text(request.token_ids, skip, client))

    async def text(self, token_ids: Sequence[int], skip_special_tokens: bool, client: str) -> str:
        """The text of tokens, however many. Raises QueueFull or NoWorkerAvailable when they are many."""
        if len(token_ids) <= INLINE_TOKENS:
            return self.tokenizer.decode(token_ids, skip_special_tokens)
        return await self.intake.offload.decode(token_ids, skip_special_tokens, self.shared.config.limits, client)

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
            has_chat_template=self.tokenizer.has_chat_template,
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
        )
