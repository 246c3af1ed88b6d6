# mypy: ignore-errors
"""Prints which error of litellm and of LangChain a conversation raises that is too long for the model.

Runs in the clients' environment: overflow.py BASE_URL"""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is downloaded

import litellm
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI, OpenAI

base_url = sys.argv[1]
LONG = "a b c " * 200
litellm.num_retries = 0


def raised(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except Exception as error:
        return error
    return None


options = {"base_url": base_url, "api_key": "none", "model": "tiny", "max_retries": 0}
messages = [{"role": "user", "content": LONG}]
of_litellm = raised(
    litellm.completion, model="openai/tiny", messages=messages, base_url=base_url, api_key="none"
)
chat = raised(ChatOpenAI(**options).invoke, LONG)
streamed = raised(lambda: list(ChatOpenAI(**options).stream(LONG)))
text = raised(OpenAI(**options).invoke, LONG)
print(
    json.dumps(
        {
            "litellm": isinstance(of_litellm, litellm.ContextWindowExceededError),
            "langchain chat": isinstance(chat, ContextOverflowError),
            "langchain stream": isinstance(streamed, ContextOverflowError),
            "langchain text": text is not None and "maximum context length is 256 tokens" in str(text),
        }
    )
)
