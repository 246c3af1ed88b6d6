"""A client that uses the `openai` package: `python examples/openai_client.py http://127.0.0.1:8000/v1`.

With `api_keys` in cluster.yaml, put the key into the environment variable OPENAI_API_KEY.
"""

import os
import sys

import openai


def main(base_url: str) -> None:
    client = openai.OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    model = client.models.list().data[0].id
    whole = client.completions.create(model=model, prompt="The with statement", max_tokens=16, temperature=0)
    print("whole:", repr(whole.choices[0].text))
    stream = client.completions.create(
        model=model, prompt="The with statement", max_tokens=16, temperature=0, stream=True
    )
    print("stream:", repr("".join(chunk.choices[0].text for chunk in stream if chunk.choices)))
    try:
        client.completions.create(model=model, prompt="The with statement", max_tokens=-1)
    except openai.BadRequestError as error:
        print("refused:", error.body["message"] if isinstance(error.body, dict) else error)


if __name__ == "__main__":
    main(*sys.argv[1:])
