# mypy: ignore-errors
"""Prints what lm-eval's local-completions makes of a server: log-likelihoods, rolling ones, and a generation.

Runs in the clients' environment, without a network: scoring.py URL TOKENIZER_DIRECTORY"""

import json
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

url, tokenizer = sys.argv[1:]
model = LocalCompletionsAPI(
    base_url=url,
    model="tiny",
    tokenizer=tokenizer,
    tokenizer_backend="huggingface",
    batch_size=2,
    max_length=255,
    max_retries=1,
)


def asks(kind, *arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


pairs = [("the quick", " brown fox"), ("def fib(n):", "\n    return n"), ("the lazy", " dog")]
settings = {"until": ["jumps"], "max_gen_toks": 20}
print(
    json.dumps(
        {
            "loglikelihood": model.loglikelihood(asks("loglikelihood", *pairs)),
            "rolling": model.loglikelihood_rolling(asks("loglikelihood_rolling", ("the lazy dog sleeps",))),
            "tokens": [
                [len(model.tok_encode(context)), len(model.tok_encode(context + more))]
                for context, more in pairs
            ],
            "generated": model.generate_until(asks("generate_until", ("hello", settings))),
        }
    )
)
