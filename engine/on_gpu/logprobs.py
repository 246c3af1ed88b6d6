"""Log probabilities of rows of logits that are on a GPU; `distribution.py` defines them."""

from dataclasses import dataclass

import torch

_NUM_ROWS = 32  # ranked at a time: ranking takes several times the rows' memory


@dataclass(frozen=True)
class Logprobs:
    """The log probabilities; NaN where the model overflowed."""

    chosen: torch.Tensor  # float64 [N]
    top_ids: torch.Tensor  # int64 [R, K], best first; of equal ones the lower id first
    top: torch.Tensor  # float64 [R, K]

    def to(self, device: str, non_blocking: bool = False) -> "Logprobs":
        there = (
            tensor.to(device, non_blocking=non_blocking) for tensor in (self.chosen, self.top_ids, self.top)
        )
        return Logprobs(*there)


def logprobs_of(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Logprobs:
    """Returns log probabilities from logits float32 [R, V]: those of token `token_ids[n]` in row `rows[n]`,
    both int64 [N], and of each row's best."""
    vocab_size = logits.shape[1]
    largest = logits.amax(dim=-1, keepdim=True)
    mass = (logits - largest).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64)
    normalisers = largest.double() + mass.log()  # [R, 1]
    chosen = logits.view(-1).index_select(0, rows * vocab_size + token_ids).double()
    chosen -= normalisers.view(-1).index_select(0, rows)
    num_top = min(num_top, vocab_size)
    top_ids = torch.cat([_best(part, num_top) for part in torch.split(logits, _NUM_ROWS)])
    return Logprobs(chosen, top_ids, logits.gather(1, top_ids).double() - normalisers)


def _best(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Returns ids int64 [R, count]. Logit and id become one number, as torch does not define the order of
    equal ones."""
    bits = logits.view(torch.int32)
    # as integers; both zeros are equal
    in_order = torch.where(logits == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    last = logits.shape[1] - 1
    back_to_front = torch.arange(last, -1, -1, device=logits.device)
    best = ((in_order.long() << 32) + back_to_front).topk(count, dim=-1).values
    return last - (best & 0xFFFFFFFF)
