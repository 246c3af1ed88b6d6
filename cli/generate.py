"""`pdserve generate` and `pdserve chat`: prompts in, text on stdout as it arrives."""

import sys
from collections.abc import Callable, Iterable, Iterator

from google.protobuf.json_format import MessageToJson

from ..proto import pdserve_pb2 as pb
from .client import Client, CommandFailed
from .coming_back import resuming_stream
from .terminal import show
from .timeline import timeline_lines

Write = Callable[[str], None]


def write_out(text: str) -> None:
    """Writes what a model says."""
    show(text, end="")


def text_prompt(text: str) -> pb.Prompt:
    return pb.Prompt(text=text)


def chat_prompt(text: str, system: str | None) -> pb.Prompt:
    messages = [pb.ChatMessage(role="system", content=system)] if system else []
    return pb.Prompt(chat=pb.Chat(messages=[*messages, pb.ChatMessage(role="user", content=text)]))


def token_ids_prompt(text: str) -> pb.Prompt:
    """Parses numbers separated by commas or spaces."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() and int(word) < 2**32 for word in words):
        raise CommandFailed(f"--token-ids: {text!r} is not valid, expected numbers such as 1,15,27")
    return pb.Prompt(token_ids=pb.TokenIds(ids=map(int, words)))


def logit_bias(texts: Iterable[str]) -> dict[int, float]:
    """Parses TOKEN=BIAS; the server validates the values."""
    biases = {}
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError as error:
            raise CommandFailed(
                f"--logit-bias: {text!r} is not valid, expected TOKEN=BIAS such as 15=-2.5"
            ) from error
        if not 0 <= int(token) < 2**32:
            raise CommandFailed(f"--logit-bias: {text!r} is not valid, expected a token id of 0 or more")
    return biases


def stream_text(events: Iterable[pb.GenerateEvent], write: Write) -> tuple[str, pb.RequestEnd]:
    """Write the text of a stream of one choice as it comes; returns it with the end of the stream."""
    pieces, end = [], pb.RequestEnd()
    has_begun = False
    try:
        for event in events:
            has_begun = True
            if event.HasField("tokens"):
                pieces.append(event.tokens.text)
                write(event.tokens.text)
            elif event.HasField("end"):
                end = event.end
    finally:
        if has_begun:  # else an error is all that there is to show
            write("\n")
    return "".join(pieces), end


def generate(
    client: Client, request: pb.GenerateRequest, timeline: bool, as_json: bool, timeout: float | None
) -> None:
    """Print the answer, and where its time went."""
    if as_json:
        response = client.generation.Generate(request, timeout=timeout)
        print(MessageToJson(response, preserving_proto_field_name=True, ensure_ascii=False))
        return
    if request.sampling.n > 1:
        end = _print_choices(client.generation.Generate(request, timeout=timeout))
    else:
        _, end = stream_text(resuming_stream(client, request, timeout), write_out)
    if timeline:
        print_timeline(end)


def _print_choices(response: pb.GenerateResponse) -> pb.RequestEnd:
    for index, choice in enumerate(response.choices):
        write_out(f"--- {index}\n{choice.text}\n")
    return pb.RequestEnd(request_id=response.request_id, usage=response.usage, timeline=response.timeline)


def print_timeline(end: pb.RequestEnd) -> None:
    """Prints to stderr, so that stdout carries only the answer."""
    print("", *timeline_lines(end), sep="\n", file=sys.stderr)


def chat(
    client: Client, lines: Iterator[str], system: str | None, sampling: pb.SamplingParams, write: Write
) -> None:
    """A conversation: each line of `lines` is answered with all that was said before."""
    messages = [pb.ChatMessage(role="system", content=system)] if system else []
    for line in lines:
        messages.append(pb.ChatMessage(role="user", content=line))
        request = pb.GenerateRequest(prompt=pb.Prompt(chat=pb.Chat(messages=messages)), sampling=sampling)
        text, _ = stream_text(resuming_stream(client, request), write)
        messages.append(pb.ChatMessage(role="assistant", content=text))


def check_chat(client: Client) -> None:
    """Raises CommandFailed where the model cannot talk, or grpc.RpcError where no server answers: before the
    first line is asked for."""
    info = client.generation.GetModelInfo(pb.GetModelInfoRequest())
    if not info.has_chat_template:
        raise CommandFailed(f"{info.name} has no chat template; use `pdserve generate`")


def typed_lines(prompt: str) -> Iterator[str]:
    """Lines typed or piped in, until end of input or an empty line; `prompt` is shown on a terminal only."""
    while True:
        try:
            line = input(prompt if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line
