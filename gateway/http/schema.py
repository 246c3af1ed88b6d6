"""The bodies of requests as OpenAPI describes them. Only types are checked here: `core.validation` checks
values.

Unknown fields are refused, as over gRPC; a null field counts as absent.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

TEXT_OR_IDS = "a text, token ids, a list of texts or a list of token id lists"
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        _IDS,
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": _IDS},
    ]
}

TokenIds = Annotated[list[int], FailFast()]
NO_ITEMS: Any = ()  # unlike a list, it is not copied for each body


def expected(what: str) -> PydanticCustomError:
    """Returns the error for a value that is not `what`."""
    return PydanticCustomError("expected", "expected {what}", {"what": what})


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and {int}.issuperset(map(type, value))


def _prompts(value: object) -> list[str | list[int]]:
    """Reads one or more prompts, each a text or token ids. Validates by hand, as a union would report every
    item that does not fit."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if _is_ids(value):
            return [value]
        if all(isinstance(item, str) for item in value) or all(map(_is_ids, value)):
            return value
    raise expected(TEXT_OR_IDS)


def _texts(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _text(value: object) -> object:
    """Returns the text of a message: as given, or joined from its parts, as in vLLM."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise expected("a text, or parts of type text")
        texts.append(part["text"])
    return "\n".join(texts)


_TEXT_PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    },
}
Prompts = Annotated[list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
Texts = Annotated[
    list[str],
    FailFast(),
    BeforeValidator(_texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
OptionalText = Annotated[
    str | None, BeforeValidator(_text), WithJsonSchema({"anyOf": [{"type": "string"}, _TEXT_PARTS]})
]


def _schema(value: object) -> dict[str, Any] | str:
    """Validates by hand, as a union would report each of its members that does not fit."""
    if isinstance(value, dict | str):
        return value
    raise expected("a JSON schema, as an object or as text")


JsonOrText = Annotated[
    dict[str, Any] | str,
    PlainValidator(_schema),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]}),
]
MAX_METADATA = 16
MAX_METADATA_CHARS = 64, 512  # of a name and of a value


def _metadata(value: object) -> dict[str, str]:
    """Checks OpenAI's limits, before anything else."""
    max_name, max_value = MAX_METADATA_CHARS
    if isinstance(value, dict) and len(value) <= MAX_METADATA:
        texts = all(isinstance(item, str) and len(item) <= max_value for item in value.values())
        if texts and all(len(name) <= max_name for name in value):
            return value
    raise expected(f"at most {MAX_METADATA} texts of {max_value} characters, with names of {max_name}")


_METADATA_SCHEMA = {
    "type": "object",
    "maxProperties": MAX_METADATA,
    "propertyNames": {"maxLength": MAX_METADATA_CHARS[0]},
    "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_CHARS[1]},
}
Metadata = Annotated[dict[str, str], PlainValidator(_metadata), WithJsonSchema(_METADATA_SCHEMA)]


class Body(BaseModel):
    """The fields that all bodies share."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return (
            {name: item for name, item in value.items() if item is not None}
            if isinstance(value, dict)
            else value
        )


class StreamOptions(Body):
    """The options of a stream."""

    include_usage: bool = False
    """A chunk with the usage of the whole request before the end."""
    continuous_usage_stats: bool = False
    """The usage so far in every chunk (as in vLLM)."""
    include_obfuscation: bool | None = None
    """Without effect: chunks are not padded."""


class JsonSchema(Body):
    """A JSON schema, with the fields that OpenAI's clients send with it."""

    name: str
    """Without effect, as are `description` and `strict`: the output always fits the schema."""
    description: str = ""
    strict: bool = True
    json_schema: dict[str, Any] = Field(alias="schema", default={})
    """Members of objects appear in the order of the schema."""


class ResponseFormat(Body):
    """The constraint on the text of each choice."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    """With type json_schema."""


class StructuredOutputs(Body):
    """The constraint on the text of each choice, as in vLLM: exactly one of these."""

    json_schema: JsonOrText | None = Field(alias="json", default=None)
    """JSON of this schema, given as an object or as text."""
    regex: str | None = None
    """A full match of this regular expression, in Rust's regex syntax."""
    choice: Annotated[list[str], FailFast()] = Field(default=NO_ITEMS)
    """One of these texts."""
    grammar: str | None = None
    """A text of this grammar, in Lark's syntax as llguidance extends it."""
    json_object: bool | None = None
    """True: any JSON object."""


class GenerationBody(Body):
    """The fields that completions and chat completions share. Those that OpenAI lacks are vLLM's."""

    model: str = ""
    """The name of the model, as /v1/models reports it; by default the served one."""
    max_tokens: int | None = None
    """The maximum of output tokens of each choice; 0 with `echo`: the prompt alone."""
    max_completion_tokens: int | None = None
    """Another name of `max_tokens`, and counts if both are given."""
    min_tokens: int | None = None
    """The number of output tokens before which nothing ends a choice."""
    temperature: float | None = None
    """Divides the logits; 0 always selects the most probable token."""
    top_p: float | None = None
    """Sample among the most probable tokens whose probabilities sum up to this."""
    top_k: int | None = None
    """Sample among this many most probable tokens only; 0 or -1: among all."""
    min_p: float | None = None
    """Sample among tokens that are at least this fraction as probable as the most probable one."""
    repetition_penalty: float | None = None
    """Divides the logits of tokens that prompt or output contain."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens that the output contains."""
    frequency_penalty: float | None = None
    """Subtracted from a token's logit once for each time that the output contains it."""
    seed: int | None = None
    """The same seed, prompt and parameters give the same output. Negative ones count as their two's
    complement of 64 bits."""
    n: int | None = None
    """How many choices to produce for each prompt."""
    stop: Texts = Field(default=NO_ITEMS)
    """A choice ends where its text would contain one of these; the text ends before it."""
    stop_token_ids: TokenIds = Field(default=NO_ITEMS)
    """A choice ends with the first of these tokens."""
    ignore_eos: bool = False
    """Continue after an end-of-text token."""
    stream: bool = False
    """Send the answer as server-sent events, as its tokens are produced."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    return_token_ids: bool = False
    """Report the token ids of prompt and output too."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    user: str = ""
    """The user that this request is for, at most 128 characters. Without keys it counts for this user when
    clients take turns under load, by default for its host; with keys, for its key."""
    priority: int | None = None
    """Under load, requests of a lower number are served before those of a higher one; not below the key's
    `min_priority`, which is 0 by default."""
    logit_bias: dict[str, float] | None = None
    """Added to the logits of these tokens: token id -> -100 to 100."""
    response_format: ResponseFormat | None = None
    """JSON, if requested; by default anything."""
    structured_outputs: StructuredOutputs | None = None
    """Other constraints; not together with a `response_format` of JSON."""
    bad_words: Annotated[list[str], FailFast()] = Field(default=NO_ITEMS)
    """Texts that the output does not contain, as the tokens that the tokenizer makes of them."""
    truncate_prompt_tokens: int | None = None
    """Keep only the last so many tokens of a longer prompt; -1: as many as leave room for the output."""
    guided_json: JsonOrText | None = None
    """`structured_outputs.json`, as are `guided_regex`, `guided_choice` and `guided_grammar` its others."""
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], FailFast()] = Field(default=NO_ITEMS)
    guided_grammar: str | None = None
    request_id: str = ""
    """The request's id, unless there is a header X-Request-Id."""
    metadata: Metadata | None = None
    """Without effect, as are `store`, `service_tier`, `safety_identifier`, `prompt_cache_key`,
    `prompt_cache_options`, `prompt_cache_retention` and `guided_decoding_backend`."""
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    guided_decoding_backend: str | None = None
    skip_special_tokens: Literal[True] = True
    """Only true, as `include_reasoning`; `use_beam_search`, `early_stopping`, `include_stop_str_in_output`
    and `return_tokens_as_token_ids` only false; `length_penalty` only 1."""
    spaces_between_special_tokens: bool | None = None
    """Without effect, as the text has no special tokens."""
    use_beam_search: Literal[False] = False
    early_stopping: Literal[False] = False
    include_stop_str_in_output: Literal[False] = False
    return_tokens_as_token_ids: Literal[False] = False
    include_reasoning: Literal[True] = True
    length_penalty: Annotated[float, Field(ge=1, le=1)] = 1.0


class CompletionRequest(GenerationBody):
    """Continue a text."""

    prompt: Prompts
    """A text, token ids, or several of either."""
    logprobs: int | None = None
    """Report the log probability of each token, and of this many most probable alternatives."""
    echo: bool = False
    """Begin the text of each choice with its prompt. With `logprobs` those of the prompt are included."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its special tokens to a text."""
    best_of: int | None = None
    """`n`, if given."""
    suffix: str = ""
    """Not served: empty, if given."""


class Usage(BaseModel):
    """The token usage of a request."""

    class PromptDetails(BaseModel):
        """The part of the prompt that was in a prefix cache."""

        cached_tokens: int

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ErrorResponse(BaseModel):
    """The reason why a request was refused or failed."""

    class Error(BaseModel):
        """OpenAI's error object."""

        message: str
        type: str
        param: str | None = Field(description="The field that is wrong.")
        code: str | None

    error: Error
