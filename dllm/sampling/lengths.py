"""How long things are: where a block ends, how long an answer is, when all of it may be written at once.

Pure functions of statistics, like the policies: each row decides by itself, and nothing is read back to the host.

| rule | question | answer |
|---|---|---|
| AdaBlock | where does the block end? | after the surest delimiter in a window, if it is sure enough |
| DAEDAL | is there room for the answer? | not while its tail is unsure that the text has ended: it gets more masks |
| DAEDAL | does a mask stand for more than a token? | the least sure one does if it is very unsure: it becomes several |
| Prophet | is the answer known? | yes, once the best logits are far above the second best: commit the rest |

Shapes: R rows, W places (at least 1), each row's in reading order and padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.sampling.policies import most_confident


class Expansion(NamedTuple):
    """Masks that are put beside one that is there."""

    at_RW: Tensor
    """bool [R, W]: the mask that becomes several; at most one a row."""
    added_R: Tensor
    """int64 [R]: how many there are beside it then; 0 where none is expanded."""


def block_lengths(
    token_RW: Tensor,
    confidence_RW: Tensor,
    ahead_RW: Tensor,
    window_R: Tensor,
    delimiters: Sequence[int],
    *,
    delimiter_threshold: float,
    block_length: int | Tensor,
) -> Tensor:
    """AdaBlock: a block ends after the surest delimiter of the window, if its confidence is at least `delimiter_threshold`.

    Otherwise it has `block_length` places. Either way it is no longer than what is ahead.

    Args:
        token_RW: int64 [R, W], the candidates of the places from the block's start on.
        confidence_RW: fp32 [R, W], their probabilities, 0 to 1.
        ahead_RW: bool [R, W], places that are there: from the block's start to the end of the answer.
        window_R: int64 [R], the first how many of them are looked at (the paper: a quarter of the answer's length).
        delimiters: ids of the tokens that end a step of the text; the paper's is a line break.
        delimiter_threshold: 0 to 1.
        block_length: places of a block that no delimiter ends; for all rows, or int64 [R].

    Returns:
        int64 [R]: places of the block; 0 for a row that has nothing ahead. Of equally sure delimiters the leftmost counts.

    Source: AdaBlock-dLLM, arXiv:2509.26432, Algorithm 1.
    """
    place_W = torch.arange(1, token_RW.shape[1] + 1, device=token_RW.device)
    ends_RW = torch.zeros_like(ahead_RW)
    for token in delimiters:
        ends_RW |= token_RW == token
    ends_RW &= ahead_RW & (place_W <= window_R[:, None])
    surest_RW = most_confident(confidence_RW, ends_RW, torch.ones_like(window_R))
    sure_RW = surest_RW & (confidence_RW >= delimiter_threshold)
    found_R = (sure_RW * place_W).sum(1)
    return torch.where(found_R > 0, found_R, block_length).minimum(ahead_RW.sum(1))


def growth(
    eos_probability_RW: Tensor, tail_RW: Tensor, room_R: Tensor, *, eos_threshold: float, expansion_factor: int
) -> Tensor:
    """DAEDAL, before denoising: an answer grows while its tail is not sure that the text has ended.

    Args:
        eos_probability_RW: fp32 [R, W], the probability of end-of-text.
        tail_RW: bool [R, W], the answer's last places (the paper: 32).
        room_R: int64 [R], by how many masks the answer may grow at most.
        eos_threshold: it grows while the mean probability is below this, 0 to 1.
        expansion_factor: masks that are added at a time.

    Returns:
        int64 [R]: masks to add at the end.

    Source: DAEDAL, arXiv:2508.00819, section 3.2 (initial length adjustment).
    """
    unsure_R = _mean(eos_probability_RW, tail_RW) < eos_threshold
    return room_R.clamp(min=0, max=expansion_factor) * unsure_R


def expansion(
    confidence_RW: Tensor,
    open_RW: Tensor,
    eos_probability_RW: Tensor,
    tail_RW: Tensor,
    room_R: Tensor,
    *,
    expand_threshold: float,
    expand_eos_threshold: float,
    expansion_factor: int,
) -> Expansion:
    """DAEDAL, during denoising: the least sure mask becomes several, if it is very unsure and the text has not surely ended.

    Args:
        confidence_RW: fp32 [R, W], finite where open.
        open_RW: bool [R, W], masks that are left after this step's commits.
        eos_probability_RW: fp32 [R, W], the probability of end-of-text.
        tail_RW: bool [R, W], the answer's last places.
        room_R: int64 [R], by how many masks the answer may grow at most.
        expand_threshold: a mask is very unsure whose confidence is below this, 0 to 1.
        expand_eos_threshold: the text has surely ended where the tail's mean probability is at least this, 0 to 1.
        expansion_factor: masks that one becomes.

    Returns:
        The mask (of equally unsure ones the leftmost), and how many are added beside it.

    Source: DAEDAL, arXiv:2508.00819, section 3.3 (iterative denoising and mask insertion).
    """
    added_R = room_R.clamp(min=0, max=expansion_factor - 1)
    least_RW = most_confident(-confidence_RW, open_RW, torch.ones_like(room_R))
    unsure_RW = least_RW & (confidence_RW < expand_threshold)
    goes_on_R = (_mean(eos_probability_RW, tail_RW) < expand_eos_threshold) & (added_R > 0)
    at_RW = unsure_RW & goes_on_R[:, None]
    return Expansion(at_RW, added_R * at_RW.any(1))


def answer_known(
    gap_RW: Tensor,
    answer_RW: Tensor,
    progress_R: Tensor,
    *,
    early_gap: float,
    middle_gap: float,
    late_gap: float,
) -> Tensor:
    """Prophet: all masks may be committed once the mean gap of the answer's logits is large enough for how far it has come.

    Args:
        gap_RW: fp32 [R, W], the best logit less the second best.
        answer_RW: bool [R, W], the places whose answer matters.
        progress_R: fp32 [R], the fraction of the masks that are committed, 0 to 1.
        early_gap: the least mean gap (in logits) in the first third.
        middle_gap: in the second third.
        late_gap: in the last.

    Returns:
        bool [R]; False for a row without such a place.

    Source: Prophet, arXiv:2508.19982, Algorithm 1.
    """
    least_R = torch.where(progress_R < 1 / 3, early_gap, torch.where(progress_R < 2 / 3, middle_gap, late_gap))
    return (_mean(gap_RW, answer_RW) >= least_R) & answer_RW.any(1)


def _mean(x_RW: Tensor, over_RW: Tensor) -> Tensor:
    """[R], 0 over nothing; in fp64, whose sums of fp32 numbers are the same in any order, and so in any width."""
    dtype = torch.float32 if x_RW.device.type == "mps" else torch.float64
    return x_RW.masked_fill(~over_RW, 0).to(dtype).sum(1) / over_RW.sum(1).clamp(min=1)
