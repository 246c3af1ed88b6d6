"""A model with random weights that has to call a tool makes a call that fits, whatever its vocabulary and its
format."""

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import torch

from pdserve.core.messages import TokenOutput
from pdserve.core.request import FinishReason, Request, SamplingParams, SequenceSpec
from pdserve.gateway.answer import Collector, ResponseEvents
from pdserve.gateway.text.tokenizer import Tokenizer
from pdserve.gateway.tools.grammar import tool_grammar
from pdserve.gateway.tools.offer import OfferedTool
from pdserve.grammar.messages import GrammarSetup
from pdserve.proto import pdserve_pb2 as pb
from pdserve.router.events import EmitChoiceEnd, EmitTokens

from ..checkpoints import small_checkpoint
from ..gateway.tools.models import MODELS, eos_of, offer
from .joined import JoinedEngines

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Köln", "Aix"]},
        "days": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = (
    OfferedTool(name="get_weather", description="", parameters=PARAMETERS, is_strict=True),
    OfferedTool(name="stop", description="", parameters=None, is_strict=False),
)
SCHEMAS = {"get_weather": PARAMETERS, "stop": {"maxProperties": 0}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoints"), "llama-wide")


@pytest.fixture
def joined(checkpoint: Path, model: str) -> Iterator[JoinedEngines]:
    tokenizer = MODELS[model]()
    joined = JoinedEngines(
        checkpoint, budget=64, set_up=lambda: GrammarSetup(tokenizer.to_json(), 1000, (eos_of(tokenizer),))
    )
    yield joined
    joined.close()


@pytest.mark.parametrize("model", MODELS)
@torch.inference_mode()
def test_a_call_that_has_to_come_fits_its_schema(joined: JoinedEngines, model: str) -> None:
    tokenizer = MODELS[model]()
    assert tokenizer.templates.tool_format is not None
    offers = [
        offer(TOOLS, must_call=True, is_parallel=False),
        *(offer(TOOLS, is_parallel=False, chosen=[tool]) for tool in TOOLS),
    ]
    grammars = [
        tool_grammar(offered, tokenizer.templates.tool_format, tokenizer.added_tokens, [eos_of(tokenizer)])
        for offered in offers
    ]
    params = [
        SamplingParams(max_tokens=300, temperature=1.0, seed=7, grammar=grammar) for grammar in grammars
    ]
    specs = [joined.submit(range(20), sampling, eos=(eos_of(tokenizer),)) for sampling in params]
    joined.run()
    for spec, offered in zip(specs, offers, strict=True):
        choice = read(tokenizer, spec, joined.outputs_of(spec))
        (call,) = choice.tool_calls
        assert (choice.text, choice.finish_reason) == ("", pb.FINISH_REASON_TOOL_CALLS)
        assert call.name in [tool.name for tool in offered.callable]
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


def read(tokenizer: Tokenizer, spec: SequenceSpec, outputs: list[TokenOutput]) -> pb.Choice:
    """Returns the message that a client receives for a choice that ended by itself."""
    assert outputs[-1].finish_reason is FinishReason.STOP
    request = Request(
        request_id="r", prompt_token_ids=spec.prompt_token_ids, sampling=spec.sampling, has_tools=True
    )
    answer, collector = ResponseEvents(request, tokenizer, lambda choice: None), Collector()
    for event in (EmitTokens("r", 0, tuple(outputs)), EmitChoiceEnd("r", 0, FinishReason.STOP)):
        for out in answer.handle(event):
            collector.add(out)
    (choice,) = collector.response().choices
    return choice
