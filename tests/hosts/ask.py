"""A client on the head's host, of its HTTP server. Always asks the same, greedily, and prints the answers as JSON.

python -m tests.hosts.ask once               the first answer, however long nobody listens
python -m tests.hosts.ask until-stopped N    N clients ask until a line is read: all that were different
"""

import json
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from .network import BUSY_S

URL, TYPE = "http://127.0.0.1:8000/v1/completions", {"content-type": "application/json"}
BODY = {"prompt": "The with statement", "max_tokens": 400, "temperature": 0, "stream": True}


def ask() -> str:
    request = urllib.request.Request(URL, json.dumps(BODY).encode(), TYPE)
    with urllib.request.urlopen(request, timeout=BUSY_S) as answer:
        events = [line[6:] for line in answer if line.startswith(b"data: ")]
    if events.pop().strip() != b"[DONE]":
        raise EOFError("the stream was cut off")
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def ask_until_answered() -> str:
    while True:
        try:
            return ask()
        except OSError:
            time.sleep(0.1)


def ask_until_stopped(num_clients: int) -> list[str]:
    stopped = threading.Event()

    def answers() -> set[str]:
        texts = {ask()}
        while not stopped.is_set():
            texts.add(ask())
        return texts

    with ThreadPoolExecutor(num_clients) as pool:
        clients = [pool.submit(answers) for _ in range(num_clients)]
        sys.stdin.readline()
        stopped.set()
        return sorted(set[str]().union(*(client.result() for client in clients)))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["once"]:
            print(json.dumps(ask_until_answered()))
        case ["until-stopped", number]:
            print(json.dumps(ask_until_stopped(int(number))))
        case _:
            sys.exit(__doc__)
