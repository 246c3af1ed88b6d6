"""A row's token is either the host's or the one that was drawn for it."""

import pytest
import torch

from pdserve.kernels.triton.drawn_tokens import take_drawn

from .support import DEVICE


@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_a_row_takes_its_drawn_token_or_the_hosts(count: int) -> None:
    drawn = torch.randint(1000, (40,))
    places = torch.randint(-1, 40, (count,))
    otherwise = torch.randint(1000, 2000, (count,))
    taken = take_drawn(places.to(DEVICE), otherwise.to(DEVICE), drawn.to(DEVICE)).tolist()
    assert taken == [
        known if place < 0 else drawn[place].item()
        for place, known in zip(places, otherwise.tolist(), strict=True)
    ]
