"""Keys, and a file of them."""

from pathlib import Path

from pdserve.gateway.auth.access import (
    Access,
    Caller,
    RequiredAccess,
)
from pdserve.gateway.auth.cost import RequestPrice
from pdserve.gateway.auth.keys import ApiKey, new_key

ALICE, BOB, PROM = new_key(), new_key(), new_key()


def shown(key: str) -> str:
    return f"Bearer {key}"


def write(path: Path, *keys: ApiKey) -> None:
    path.write_text("# who may come in\n\n" + "".join(f"{key.line}\n" for key in keys))
    path.chmod(0o600)


def price_of(num_prompt: int, max_tokens: int, n: int = 1) -> RequestPrice:
    return RequestPrice(num_prompt_tokens=num_prompt, num_choices=n, max_tokens=max_tokens)


def admitted(access: Access, need: RequiredAccess, key: str, now_s: float = 0.0) -> Caller:
    caller = access.admit(need, shown(key), now_s)
    assert caller is not None
    return caller
