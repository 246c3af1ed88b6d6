"""`pdserve generate` and `pdserve chat`: their options. Their implementation is in generate.py, imported when
they run."""

import sys
from typing import Annotated

import typer

from .address import NO_ADDRESS, Address

PROMPT, SAMPLING, LENGTH, OUTPUT = "Prompt", "Sampling", "Length and end", "Output"  # panels of options


def _seed(value: int | None) -> int | None:
    """Checks a bound that would be a line of digits in the help."""
    if value is not None and value >= 2**64:
        raise typer.BadParameter(f"got {value}, expected 0 to 2^64 - 1")
    return value


Temperature = Annotated[
    float | None,
    typer.Option(metavar="T", help="0 takes the most probable token each time.", rich_help_panel=SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="P", help="Draw among the tokens that make up this probability.", rich_help_panel=SAMPLING
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Draw among this many of the most probable tokens.", rich_help_panel=SAMPLING
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        callback=_seed,
        metavar="N",
        help="The same seed gives the same output.",
        rich_help_panel=SAMPLING,
    ),
]
MaxTokens = Annotated[int, typer.Option(metavar="N", help="Output tokens, at most.", rich_help_panel=LENGTH)]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="The system message of a conversation.", rich_help_panel=PROMPT),
]


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.")],
    chat: Annotated[
        bool,
        typer.Option("--chat", help="PROMPT is a user's message, to be answered.", rich_help_panel=PROMPT),
    ] = False,
    system: System = None,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="PROMPT is a list of token ids.", rich_help_panel=PROMPT)
    ] = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Draw among tokens at least this fraction as probable as the best one.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Above 1: avoid tokens of prompt and output.", rich_help_panel=SAMPLING
        ),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(metavar="X", help="Above 0: avoid tokens of the output.", rich_help_panel=SAMPLING),
    ] = None,
    frequency_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Above 0: avoid tokens, frequent ones more.", rich_help_panel=SAMPLING
        ),
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN=BIAS",
            help="Favour a token, up to 100, or avoid it; may be repeated.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    seed: Seed = None,
    n: Annotated[
        int | None,
        typer.Option("-n", "--n", metavar="N", help="Number of choices.", rich_help_panel=SAMPLING),
    ] = None,
    max_tokens: MaxTokens = 128,
    min_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Minimum number of tokens before the end.", rich_help_panel=LENGTH),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End where the text would contain this; may be repeated.",
            rich_help_panel=LENGTH,
        ),
    ] = None,
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(
            min=0, metavar="ID", help="End with this token; may be repeated.", rich_help_panel=LENGTH
        ),
    ] = None,
    ignore_eos: Annotated[
        bool | None,
        typer.Option("--ignore-eos", help="Continue after an end-of-text token.", rich_help_panel=LENGTH),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole answer as JSON.", rich_help_panel=OUTPUT)
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of alternatives to report per token; shown with --json.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    prompt_logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="The same for the prompt's tokens; shown with --json.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    timeline: Annotated[
        bool,
        typer.Option("--timeline", help="Show on stderr where the time went.", rich_help_panel=OUTPUT),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show the request's id on stderr, for explain.", rich_help_panel=OUTPUT
        ),
    ] = False,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="The name of the model; by default the one that is served.")
    ] = "",
    request_id: Annotated[
        str, typer.Option(metavar="ID", help="The request's id, for explain; random by default.")
    ] = "",
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="S", help="Seconds after which to give up.")
    ] = None,
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
    from .models import recommend
    from .serve import private_config
    from .up import serving

    recommend(model, sampling)
    with serving(private_config(model)) as client:
        command.check_chat(client)
        command.chat(client, command.typed_lines("> "), system, sampling, command.write_out)
