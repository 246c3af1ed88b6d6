"""Prompts of all kinds: texts, conversations, token ids; and the reports about their tokens."""

import pytest

from pdserve.gateway import answer, intake
from pdserve.proto import pdserve_pb2 as pb
from tests.gateway.asking import Stub, ask, stream
from tests.gateway.support import EOS, ScriptedCluster


def prompt_of(events: list[pb.GenerateEvent]) -> list[pb.PromptDelta]:
    return [event.prompt for event in events if event.HasField("prompt")]


async def test_prompt_logprobs_precede_the_first_token_in_bounded_messages(
    generation: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "MAX_LOGPROBS_PER_MESSAGE", 12)
    request = pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=range(100, 111))))
    request.sampling.CopyFrom(pb.SamplingParams(max_tokens=3, n=2, prompt_logprobs=2))
    events = await stream(generation, request)
    assert [event.WhichOneof("event") for event in events[:4]] == ["prompt", "prompt", "prompt", "tokens"]
    deltas = prompt_of(events)
    assert [(delta.index, list(delta.token_ids)) for delta in deltas] == [
        (1, [101, 102, 103, 104]),
        (5, [105, 106, 107, 108]),
        (9, [109, 110]),
    ]
    assert [token.logprob for delta in deltas for token in delta.logprobs] == [
        -float(index) for index in range(1, 11)
    ]
    assert [(top.token_id, top.logprob) for top in deltas[2].logprobs[1].top] == [(0, 0.0), (1, -1.0)]
    assert all(not event.tokens.logprobs for event in events)
    whole = (await generation.Generate(request)).prompt
    assert (whole.index, list(whole.token_ids)) == (1, list(range(101, 111)))
    assert list(whole.logprobs) == [token for delta in deltas for token in delta.logprobs]


async def test_prompt_logprobs_are_not_repeated_when_a_stream_resumes(generation: Stub) -> None:
    request = ask("the quick brown fox", max_tokens=4, n=2, seed=1, prompt_logprobs=0)
    request.request_id = "mine"
    whole = await stream(generation, request)
    request.resume_from[:] = [0, 2]
    assert prompt_of(await stream(generation, request)) == prompt_of(whole) != []
    request.resume_from[:] = [1, 0]
    assert not prompt_of(await stream(generation, request))


async def test_a_prompt_of_one_token_has_no_logprobs(generation: Stub) -> None:
    request = pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[7])))
    request.sampling.CopyFrom(pb.SamplingParams(max_tokens=1, prompt_logprobs=3))
    assert not prompt_of(await stream(generation, request))
    assert not (await generation.Generate(request)).HasField("prompt")


async def test_a_conversation_goes_through_the_template_of_the_checkpoint(
    generation: Stub, cluster: ScriptedCluster
) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hello")])
    await stream(generation, pb.GenerateRequest(prompt=pb.Prompt(chat=chat)))
    prompt = cluster.tokenizer.decode(cluster.requests[0].prompt_token_ids)
    assert prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


async def test_token_ids_are_used_unchanged(generation: Stub, cluster: ScriptedCluster) -> None:
    await stream(generation, pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[5, 6, 7]))))
    assert cluster.requests[0].prompt_token_ids == (5, 6, 7)


async def test_tokenize_and_detokenize_are_each_others_way_back(generation: Stub) -> None:
    text = "the dog 🙂 sleeps"
    tokens = await generation.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text=text)))
    assert len(tokens.pieces) == len(tokens.token_ids)
    assert tokens.max_model_len == 256
    assert (await generation.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))).text == text
    special = pb.DetokenizeRequest(token_ids=[1], skip_special_tokens=False)
    assert (await generation.Detokenize(special)).text == EOS


async def test_model_info_reports_name_and_limits(generation: Stub) -> None:
    info = await generation.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.name, info.max_model_len, info.has_chat_template) == ("tiny", 256, True)
    assert (info.limits.max_tokens, info.limits.max_n, info.limits.max_prompt_tokens) == (200, 4, 255)


@pytest.mark.parametrize("on_loop", [0, 4096])
async def test_prompts_are_encoded_alike_on_the_loop_and_on_a_thread(
    generation: Stub, cluster: ScriptedCluster, monkeypatch: pytest.MonkeyPatch, on_loop: int
) -> None:
    monkeypatch.setattr(intake, "INLINE_CHARS", on_loop)
    text = "the quick brown fox " * 30
    tokens = await generation.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text=text)))
    assert tuple(tokens.token_ids) == cluster.tokenizer.encode(text)
