"""Applies requests' edits to their logits on a GPU: the host lists them for all rows of a step, a few
operations carry them out.

Edits and their order are those of `Penalties.apply`; results are equal, bit for bit."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from ...kernels.triton.token_mask import mask_tokens
from ..penalties import Penalties, is_adjusted, penalised, restriction, strengths_of
from ..sequence import Sequence
from .packet import Array


def list_edits(
    penalties: Penalties, rows: Iterable[tuple[int, Sequence]], vocab_size: int
) -> dict[str, Array]:
    """The arrays that `apply_edits` wants on the device, without those that no row needs. Each row is there
    once.

    A place is `row * vocab_size + token id`:
    biased int64 [B]: places, biases float32 [B]: added there;
    seen int64 [S]: places, counts float32 [S] and owners int32 [S]: whose `strengths` float32 [P, 3];
    banned int64 [E]: places;
    masked int32 [M]: rows, masks uint8 [M, ceil(V / 8)].
    """
    lists: dict[str, list[Array]] = defaultdict(list)
    for row, seq in rows:
        if not is_adjusted(seq):
            continue
        start = row * vocab_size
        if bias := penalties.bias(seq):
            token_ids, values = bias
            lists["biased"].append(start + token_ids)
            lists["biases"].append(values)
        if seen := penalties.seen(seq):
            lists["seen"].append(start + seen.ids)
            lists["counts"].append(seen.counts)
            lists["owners"].append(np.full(len(seen.ids), len(lists["strengths"]), dtype=np.int32))
            lists["strengths"].append(strengths_of(seq.spec.sampling)[None])
        endings, bits = restriction(seq, vocab_size)
        if endings:
            lists["banned"].append(start + np.array(endings, dtype=np.int64))
        if bits is not None:
            lists["masked"].append(np.array([row], dtype=np.int32))
            lists["masks"].append(bits[None])
    return {name: np.concatenate(arrays) for name, arrays in lists.items()}


def apply_edits(logits: torch.Tensor, there: Mapping[str, torch.Tensor]) -> None:
    """Adjusts float32 logits [R, V] in place by the arrays of `list_edits`."""
    flat = logits.view(-1)
    if "biased" in there:
        places = there["biased"]
        flat.index_copy_(0, places, flat.index_select(0, places) + there["biases"])
    if "seen" in there:
        places = there["seen"]
        strengths = there["strengths"].t().index_select(1, there["owners"])
        flat.index_copy_(
            0, places, penalised(flat.index_select(0, places), there["counts"], strengths, torch.where)
        )
    if "banned" in there:
        flat.index_fill_(0, there["banned"], -torch.inf)
    if "masked" in there:
        mask_tokens(logits, there["masked"], there["masks"])
