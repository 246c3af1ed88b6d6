"""`pdserve generate` and `pdserve chat`: their options. Their implementation is in generate.py, imported when
they run."""

import sys
from typing import Annotated

import typer

from .address import NO_ADDRESS, Address

Temperature = Annotated[float | None, typer.Option(help="0 takes the most probable token each time.")]
TopP = Annotated[float | None, typer.Option(help="Draw among the tokens that make up this probability.")]
TopK = Annotated[int | None, typer.Option(help="Draw among this many of the most probable tokens.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**64 - 1, metavar="N", help="The same seed gives the same output.")
]
MaxTokens = Annotated[int, typer.Option(help="Output tokens, at most.")]
System = Annotated[str | None, typer.Option(help="The system message of a conversation.")]


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.")],
    max_tokens: MaxTokens = 128,
    min_tokens: Annotated[int | None, typer.Option(help="Minimum number of tokens before the end.")] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Draw among tokens at least this fraction as probable as the best one."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: avoid tokens of prompt and output.")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Above 0: avoid tokens of the output.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Above 0: avoid tokens, frequent ones more.")
    ] = None,
    seed: Seed = None,
    n: Annotated[int | None, typer.Option("-n", "--n", help="Number of choices.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End where the text would contain this; may be repeated.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(min=0, help="End with this token; may be repeated.")
    ] = None,
    ignore_eos: Annotated[
        bool | None, typer.Option("--ignore-eos", help="Continue after an end-of-text token.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Number of alternatives to report per token; shown with --json.")
    ] = None,
    prompt_logprobs: Annotated[
        int | None, typer.Option(help="The same for the prompt's tokens; shown with --json.")
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(help="TOKEN=BIAS: favour a token, up to 100, or avoid it; may be repeated."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a user's message, to be answered.")] = False,
    system: System = None,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="PROMPT is a list of token ids.")] = False,
    model: Annotated[
        str, typer.Option(help="The name of the model; by default the one that is served.")
    ] = "",
    request_id: Annotated[str, typer.Option(help="The request's id, for explain; random by default.")] = "",
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds after which to give up.")] = None,
    timeline: Annotated[bool, typer.Option("--timeline", help="Show on stderr where the time went.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the request's id on stderr, for explain.")
    ] = False,
    address: Address = NO_ADDRESS,
) -> None:
    """Continue a prompt; the text is shown as it is generated."""
    from ..proto import pdserve_pb2 as pb
    from . import generate as command, last_request
    from .client import connect

    if chat and token_ids:
        raise typer.BadParameter("--chat and --token-ids exclude each other")
    if system is not None and not chat:
        raise typer.BadParameter("--system needs --chat")
    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = pb.SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        n=n,
        stop=stop,
        stop_token_ids=stop_token_id,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=command.logit_bias(logit_bias or []),
    )
    make_prompt = command.token_ids_prompt if token_ids else command.text_prompt
    message = command.chat_prompt(text, system) if chat else make_prompt(text)
    request = pb.GenerateRequest(model=model, prompt=message, sampling=sampling)
    request.request_id = request_id or last_request.new()
    if verbose:
        print(f"request {request.request_id}", file=sys.stderr, flush=True)
    with connect(address) as client:
        command.generate(client, request, timeline=timeline, as_json=as_json, timeout=timeout)


def chat(
    system: System = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    model: Annotated[
        str | None,
        typer.Option(help="Serve this model for the chat: a path, or smollm2, which is downloaded."),
    ] = None,
    address: Address = NO_ADDRESS,
) -> None:
    """Chat with the model; an empty line or Ctrl-D ends it."""
    from ..proto import pdserve_pb2 as pb
    from . import generate as command
    from .client import connect

    sampling = pb.SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    if model is None:
        with connect(address) as client:
            command.check_chat(client)
            command.chat(client, command.typed_lines("> "), system, sampling, command.write_out)
        return
    from .serve import private_config
    from .up import serving

    with serving(private_config(model)) as client:
        command.check_chat(client)
        command.chat(client, command.typed_lines("> "), system, sampling, command.write_out)
