"""The calls of one choice of a request with tools: from its text to the messages for the client."""

import hashlib
from array import array
from collections.abc import Sequence

from ...core.request import Request
from ...proto import pdserve_pb2 as pb
from ..text.detokenizer import TokenDecoder
from ..text.tokenizer import Tokenizer
from .formats import ToolFormat
from .parser import Arguments, CallBegins, CallEnds, Text, ToolEvent, ToolParser


class CallReader:
    """Extracts the calls from a choice's text."""

    def __init__(self, request: Request, tokenizer: Tokenizer, choice: int) -> None:
        form = tokenizer.templates.tool_format
        assert form is not None, f"{request.request_id}: tools without a format"
        self._parser = ToolParser(form, lambda index: call_id(request, form, choice, index))
        self.decoder: TokenDecoder = _ShowingMarkers(tokenizer, form)

    @property
    def has_called(self) -> bool:
        """Whether its calls are complete, if it ends here."""
        return self._parser.has_called

    def push(self, text: str, delta: pb.TokenDelta) -> str:
        """Returns the part of the choice's next text that is not in calls. Calls are added to `delta`."""
        return _report(self._parser.push(text), delta)

    def flush(self, delta: pb.TokenDelta) -> str:
        """Returns the remaining text at the end."""
        return _report(self._parser.flush(), delta)


class _ShowingMarkers:
    """A tokenizer that decodes the marker of a call as text, although it may be a special token, which have
    none."""

    def __init__(self, tokenizer: Tokenizer, form: ToolFormat) -> None:
        self._tokenizer = tokenizer
        self._marker_id = tokenizer.added_tokens.get(form.marker)

    def has_text(self, token_id: int) -> bool:
        return token_id == self._marker_id or self._tokenizer.has_text(token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)


def call_id(request: Request, form: ToolFormat, choice: int, index: int) -> str:
    """Returns the same id for a stream that resumes. The prompt counts too, as a client may reuse a request's
    id."""
    identity = (
        f"{request.request_id}\n{choice}\n{index}\n".encode() + array("Q", request.prompt_token_ids).tobytes()
    )
    digest = hashlib.blake2b(identity, digest_size=12).hexdigest()
    # Mistral's templates require nine letters or digits
    return digest[:9] if form is ToolFormat.MISTRAL else f"call_{digest}"


def _report(events: Sequence[ToolEvent], delta: pb.TokenDelta) -> str:
    said = ""
    for event in events:
        match event:
            case Text(text):
                said += text
            case CallBegins(index, id_, name):
                delta.tool_calls.add(index=index, id=id_, name=name)
            case Arguments(index, text):
                if not delta.tool_calls or delta.tool_calls[-1].index != index:
                    delta.tool_calls.add(index=index)
                delta.tool_calls[-1].arguments += text
            case CallEnds():
                pass  # the next one begins, or the choice ends
    return said
