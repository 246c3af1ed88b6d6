"""A step's input tokens: those that the host knows, and those that only the device knows."""

import torch
import triton
import triton.language as tl

from .launch import Launch, cdiv

_BLOCK = 256


def take_drawn(places: torch.Tensor, otherwise: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Computes int64 [N]: `drawn[places[n]]`, or `otherwise[n]` where the place is negative. All are int64,
    of one dimension."""
    out = torch.empty_like(otherwise)
    if len(out):
        take_launch(places, otherwise, drawn, out).run()
    return out


def take_launch(
    places: torch.Tensor, otherwise: torch.Tensor, drawn: torch.Tensor, out: torch.Tensor
) -> Launch:
    arguments = {
        "places": places,
        "otherwise": otherwise,
        "drawn": drawn,
        "out": out,
        "num_tokens": len(out),
        "BLOCK": _BLOCK,
    }
    return Launch(_take_tokens, (cdiv(len(out), _BLOCK),), arguments, num_warps=1, num_stages=1)


@triton.jit(do_not_specialize=["num_tokens"])
def _take_tokens(
    places: tl.tensor,
    otherwise: tl.tensor,
    drawn: tl.tensor,
    out: tl.tensor,
    num_tokens: tl.tensor,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + n, mask=n < num_tokens, other=-1)
    known = tl.load(otherwise + n, mask=n < num_tokens, other=0)
    token = tl.load(drawn + place, mask=place >= 0, other=0)
    tl.store(out + n, tl.where(place >= 0, token, known), mask=n < num_tokens)
