"""The denoising loop. There is one: generation is infilling on a canvas whose tail is masked.

Shapes: R rows still running, L positions of the longest of them, N positions that may be committed, V vocabulary.

A row is a canvas of its own length: given tokens, and masks wherever they stand. Its masks, in reading order, are cut
into blocks of `block_length`; its steps are shared evenly over the blocks, and each step of a block commits its share of
the block's masks. Each step is one forward of the rows that still have masks; the head runs only at the masks of
the current blocks. Rows are padded on the right and hidden by the attention mask, so a row's tokens do not depend on
its company.

Source: LLaDA, arXiv:2502.09992, Algorithms 4 and 5 and the published sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dllm.diffusion.schedule import reveal_counts
from dllm.errors import OptionError
from dllm.sampling.config import SamplingConfig
from dllm.sampling.policies import most_confident
from dllm.sampling.proposals import Keys, chance, guide, propose
from dllm.sampling.trace import StepEvent, Trace


class Predictor(Protocol):
    """The network: logits [N, V] at the positions where `wanted` [R, L] is True, in row order."""

    def __call__(self, ids_RL: Tensor, attention_mask_RL: Tensor | None, wanted_RL: Tensor, /) -> Tensor: ...


class Denoised(NamedTuple):
    """What the loop gives back."""

    canvases: list[Tensor]
    """One int64 [length] a row, on the CPU. A mask is left only where the model proposed the mask token to the end."""
    nfe: int
    """Forwards of the network; with guidance each step counts two."""
    steps: list[int]
    """Steps each row took."""
    trace: Trace | None


class _Schedule(NamedTuple):
    """Who commits when. A row's steps with nothing to commit are left out: no forward is spent on them."""

    block_RL: Tensor
    """int64 [R, L]: the block of each mask, -1 elsewhere."""
    step_block_RS: Tensor
    """int64 [R, S]: the block that each step works on."""
    step_count_RS: Tensor
    """int64 [R, S]: how many tokens each step commits; 0 after a row's last step."""


def _schedule(masked_RL: Tensor, block_length: int | None, steps: int | None) -> _Schedule:
    """Blocks and step counts of every row, on the CPU: it is made once, before the first forward."""
    R = masked_RL.shape[0]
    masks_R = masked_RL.sum(1)
    width = block_length or max(1, int(masks_R.max()))
    block_RL = torch.where(masked_RL, (masked_RL.cumsum(1) - 1) // width, -1)
    plans: list[tuple[Tensor, Tensor]] = []
    for row in range(R):  # a row is a few dozen integers; this runs once a call, not once a step
        per_block = torch.bincount(block_RL[row][masked_RL[row]])
        if steps is not None and steps < len(per_block):
            raise OptionError(
                f"steps={steps} is fewer than the {len(per_block)} blocks of block_length={block_length}: every block needs "
                f"a step. Raise steps to {len(per_block)} or more, or raise block_length."
            )
        shares = per_block if steps is None else reveal_counts(torch.tensor([steps]), max(1, len(per_block)))[0]
        pairs = [
            (block, count)
            for block, masks in enumerate(per_block.tolist())
            for count in reveal_counts(torch.tensor([masks]), int(shares[block]))[0].tolist()
            if count
        ]
        plans.append((torch.tensor([b for b, _ in pairs]), torch.tensor([c for _, c in pairs])))
    longest = max(len(blocks) for blocks, _ in plans)
    step_block_RS = torch.zeros(R, longest, dtype=torch.int64)
    step_count_RS = torch.zeros(R, longest, dtype=torch.int64)
    for row, (blocks, counts) in enumerate(plans):
        step_block_RS[row, : len(blocks)] = blocks
        step_count_RS[row, : len(counts)] = counts
    return _Schedule(block_RL, step_block_RS, step_count_RS)


def _stack(canvases: Sequence[Tensor], fill: int) -> tuple[Tensor, Tensor]:
    """Rows of unequal length side by side: ids [R, L] padded on the right, and which of them are real [R, L]."""
    lengths = torch.tensor([len(canvas) for canvas in canvases])
    real_RL = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids_RL = torch.full(real_RL.shape, fill, dtype=torch.int64)
    ids_RL[real_RL] = torch.cat(list(canvases)).long()
    return ids_RL, real_RL


@torch.no_grad()  # not inference_mode: what comes back may be trained on, or changed in place
def denoise(
    predict: Predictor,
    canvases: Sequence[Tensor],
    config: SamplingConfig,
    *,
    mask_token_id: int,
    eos_token_ids: Sequence[int] = (),
    end_token_ids: Sequence[int] = (),
    masked: Sequence[Tensor] | None = None,
    requests: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    trace: bool = False,
    on_step: Callable[[StepEvent], None] | None = None,
) -> Denoised:
    """Fills every mask of every canvas.

    Args:
        predict: the network.
        canvases: one int64 [length] a row.
        config: the settings; `gen_length` plays no part here.
        mask_token_id: the token that stands for "not known yet".
        eos_token_ids: never candidates where `config.suppress_eos`.
        end_token_ids: end of text and end of turn, committed last where `config.eos_last`.
        masked: one bool [length] a row, where to write; by default wherever the mask token stands.
        requests: one integer a row that keys its noise; by default its place in the list.
        device: where the network lives.
        trace: keep every step.
        on_step: called after each step with what it committed (a live display, a stream).

    Returns:
        The filled canvases in the order given, the number of forwards and, if asked, the trace.

    Raises:
        OptionError: fewer steps than blocks, or `masked` or `requests` that do not fit the canvases.
    """
    if not canvases:
        return Denoised([], 0, [], Trace([]) if trace else None)
    if requests is not None and len(requests) != len(canvases):
        raise OptionError(
            f"requests has {len(requests)} numbers for {len(canvases)} rows: give one a row, or none at all."
        )
    if masked is not None and [len(row) for row in masked] != [len(row) for row in canvases]:
        raise OptionError(
            f"masked has rows of {[len(row) for row in masked]} positions for canvases of {[len(row) for row in canvases]}: "
            f"give one bool a token."
        )
    ids_RL, real_RL = _stack(canvases, mask_token_id)
    masked_RL = _stack(masked, 0)[0].bool() if masked is not None else (ids_RL == mask_token_id) & real_RL
    ids_RL = ids_RL.masked_fill(masked_RL, mask_token_id)
    schedule = _schedule(masked_RL, config.block_length, config.steps)
    log = Trace([ids_RL[row][real_RL[row]] for row in range(len(canvases))]) if trace else None

    given_RL = ~masked_RL
    for token in config.cfg_keep_tokens:
        given_RL &= ids_RL != token
    steps_R = (schedule.step_count_RS > 0).sum(1)
    running = (steps_R > 0).nonzero()[:, 0]  # rows leave as they finish
    request_R = torch.tensor(list(requests) if requests is not None else range(len(canvases)))
    result_RL = ids_RL.clone()

    # from here on everything a step touches lives on the device; the host knows the schedule and does not ask for it
    longest = max((len(canvases[row]) for row in running.tolist()), default=0)
    ids_RL, real_RL, masked_RL, given_RL, block_RL = (
        x[running, :longest].to(device) for x in (ids_RL, real_RL, masked_RL, given_RL, schedule.block_RL)
    )
    step_block_RS, step_count_RS = (x[running].to(device) for x in (schedule.step_block_RS, schedule.step_count_RS))
    request_R, last_step_R = request_R[running].to(device), steps_R[running]
    never = tuple(eos_token_ids) if config.suppress_eos else ()
    ends = torch.tensor(list(end_token_ids) if config.eos_last else [], dtype=torch.int64, device=device)
    nfe = 0
    for step in range(int(steps_R.max())):
        stay = last_step_R > step
        if not bool(stay.all()):  # known to the host: no wait for the device
            result_RL[running[~stay]] = _widen(ids_RL[(~stay).to(device)].cpu(), result_RL.shape[1])
            running, last_step_R, keep = running[stay], last_step_R[stay], stay.to(device)
            longest = max(len(canvases[row]) for row in running.tolist())
            ids_RL, real_RL, masked_RL, given_RL, block_RL = (
                x[keep, :longest] for x in (ids_RL, real_RL, masked_RL, given_RL, block_RL)
            )
            step_block_RS, step_count_RS, request_R = step_block_RS[keep], step_count_RS[keep], request_R[keep]

        open_RL = masked_RL & (block_RL == step_block_RS[:, step, None])
        uneven = len({len(canvases[row]) for row in running.tolist()}) > 1
        attention_mask = real_RL if uneven else None
        if config.cfg_scale > 0:
            both = torch.cat([ids_RL, ids_RL.masked_fill(given_RL, mask_token_id)])
            mask_both = None if attention_mask is None else attention_mask.repeat(2, 1)
            conditional_NV, unconditional_NV = predict(both, mask_both, open_RL.repeat(2, 1)).float().chunk(2)
            logits_NV = guide(conditional_NV, unconditional_NV, config.cfg_scale)
            nfe += 2
        else:
            logits_NV = predict(ids_RL, attention_mask, open_RL)
            nfe += 1

        row_N, position_N = open_RL.nonzero(as_tuple=True)
        keys = Keys(config.seed, request_R[row_N], position_N, torch.full_like(row_N, step))
        token_N, probability_N = propose(logits_NV, config.temperature, never, keys)
        confidence_N = chance(keys) if config.remasking == "random" else probability_N
        if config.eos_last:
            confidence_N = confidence_N - 2 * torch.isin(token_N, ends)  # below every other, their own order kept
        confidence_RL = torch.full(ids_RL.shape, -torch.inf, device=device).masked_scatter_(open_RL, confidence_N)
        commit_RL = most_confident(confidence_RL, open_RL, step_count_RS[:, step])
        proposed_RL = torch.empty_like(ids_RL).masked_scatter_(open_RL, token_N)
        # a model may propose the mask itself: as in the published sampler, such a position uses up its turn and stays open
        commit_RL &= proposed_RL != mask_token_id
        ids_RL = torch.where(commit_RL, proposed_RL, ids_RL)
        masked_RL = masked_RL & ~commit_RL

        if log is not None or on_step is not None:
            chosen_N = commit_RL[open_RL].cpu()
            rows, tokens = running[row_N.cpu()[chosen_N]], token_N.cpu()[chosen_N]
            event = StepEvent(step, rows, position_N.cpu()[chosen_N], tokens, probability_N.cpu()[chosen_N])
            if log is not None:
                log.events.append(event)
            if on_step is not None:
                on_step(event)
    result_RL[running] = _widen(ids_RL.cpu(), result_RL.shape[1])
    finished = [result_RL[row, : len(canvas)].clone() for row, canvas in enumerate(canvases)]
    return Denoised(finished, nfe, steps_R.tolist(), log)


def _widen(ids_RL: Tensor, length: int) -> Tensor:
    """Adds columns on the right; what is in them is never read."""
    return torch.nn.functional.pad(ids_RL, (0, length - ids_RL.shape[1]))
