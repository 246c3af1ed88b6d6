"""A GGUF file through one prefill and one decode worker: the conversation that transformers has with the
checkpoint that it was made from."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pdserve.embedded import MODEL_DIR
from pdserve.proto import pdserve_pb2 as pb

from ..gguf_files import write_gguf
from .harness import Clusters, text_of, tokens_of, workers_of

pytestmark = pytest.mark.cluster
NUM_TOKENS = 24


def test_a_conversation_with_a_gguf_file_equals_that_of_transformers(
    tmp_path: Path, clusters: Clusters
) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    messages = [{"role": "user", "content": "What does the with statement do?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    output = model.generate(prompt, max_new_tokens=NUM_TOKENS, do_sample=False)[0, prompt.shape[1] :]
    cluster = clusters.get(write_gguf(tmp_path / "model.gguf", model, tokenizer=MODEL_DIR))
    request = cluster.request("", temperature=0.0, max_tokens=NUM_TOKENS)
    message = pb.ChatMessage(role="user", content=messages[0]["content"])
    chat = pb.Chat(messages=[message])
    request.prompt.CopyFrom(pb.Prompt(chat=chat))
    events = cluster.stream(request)
    assert tokens_of(events) == output.tolist()
    assert text_of(events) == tokenizer.decode(output, skip_special_tokens=True)
    prefill, decode = workers_of(events)
    assert prefill != decode
