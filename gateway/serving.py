"""What both doors do with a client's message, gRPC's or one that HTTP's JSON was translated to: check it, carry it out.

Whatever ends an answer (its end, an error, a client that went away, a deadline), closing `events` closes the router's stream,
and that frees all that workers hold for the request.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress

from .. import __version__
from ..core.config import ClusterConfig
from ..core.errors import InvalidRequest
from ..core.request import Request
from ..proto import pdserve_pb2 as pb
from .answer import Answer
from .frontend import Frontend
from .intake import Intake, ModelInfo, refuse_unknown_fields
from .tokenizer import Tokenizer

FLUSH_S = 5.0  # how long clients may take to read the rest of their answers when the cluster ends


class Shared:
    """What all services have in common: the configuration in force, and how many answers are being given."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
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

    def __init__(self, frontend: Frontend, shared: Shared, tokenizer: Tokenizer, model: ModelInfo) -> None:
        self.frontend = frontend
        self.shared = shared
        self.tokenizer = tokenizer
        self.model = model
        self.intake = Intake(tokenizer, model)

    async def request(
        self, message: pb.GenerateRequest, peer: str, deadline_s: float | None = None, *, fills: bool = False
    ) -> Request:
        """The request that `message` asks for. `fills`: without `max_tokens` it may use all the room that there is.

        Raises InvalidRequest or UnknownModel.
        """
        return await self.intake.request(message, self.shared.config.limits, deadline_s, peer, fills=fills)

    async def events(self, request: Request, resume_from: Sequence[int] = ()) -> AsyncGenerator[pb.GenerateEvent, None]:
        """The messages of the answer. Raises QueueFull, DuplicateRequest or NoWorkerAvailable before the first one."""
        answer = Answer(request, self.tokenizer, lambda choice: self.frontend.cancel(request.request_id, choice), resume_from)
        async with aclosing(self.frontend.generate(request)) as events:
            async for event in events:
                for out in answer.handle(event):
                    yield out

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        refuse_unknown_fields(request)
        self.intake.check_model(request.model)
        token_ids = await self.intake.token_ids(request.prompt)
        self._check_ids("prompt.token_ids", token_ids)
        pieces = [self.tokenizer.piece(token_id) for token_id in token_ids]
        return pb.TokenizeResponse(token_ids=token_ids, pieces=pieces, max_model_len=self.model.max_model_len)

    def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        refuse_unknown_fields(request)
        self.intake.check_model(request.model)
        self._check_ids("token_ids", request.token_ids)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        return pb.DetokenizeResponse(text=self.tokenizer.decode(request.token_ids, skip_special_tokens=skip))

    def model_info(self, request: pb.GetModelInfoRequest) -> pb.ModelInfo:
        refuse_unknown_fields(request)
        self.intake.check_model(request.model)
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
            ),
            version=__version__,
        )

    def _check_ids(self, field: str, token_ids: Sequence[int]) -> None:
        for index, token_id in enumerate(token_ids):
            if token_id >= self.model.vocab_size:
                raise InvalidRequest(f"{field}[{index}]", token_id, f"0 to {self.model.vocab_size - 1}")
