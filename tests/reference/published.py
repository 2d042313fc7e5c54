"""The published LLaDA sampler in batched torch: the baseline of benchmarks/sampling.py, and a third twin of the loop.

Shapes: B rows of one length, L positions, V vocabulary.

Each step is a forward of the whole canvas with the logits of every position, a softmax in fp64 over the whole vocabulary at
every position, and a topk for each row in a Python loop; every step of the schedule is taken. Rows of unequal length are
padded on the left and hidden by an attention mask, or run one by one.

Source: LLaDA, arXiv:2502.09992, Algorithms 4 and 5, and the published generate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Logits = Callable[[Tensor, Tensor | None], Tensor]
"""From ids [B, L] and an attention mask [B, L] (None without padding) to logits [B, L, V]."""
Uniform = Callable[[int, Sequence[int]], Tensor]
"""From the step and a shape, [B, L, V] for tokens and [B, L] for random remasking, to fp64 numbers in (0, 1)."""


class Published(NamedTuple):
    canvases: list[Tensor]
    """int64 [length] a row, without padding."""
    nfe: int
    """Forwards; with guidance a step counts two."""


def drawn(step: int, shape: Sequence[int]) -> Tensor:
    """Noise of torch's own generator."""
    return torch.rand(tuple(shape), dtype=torch.float64)


def transfer_counts(mask_BL: Tensor, steps: int) -> Tensor:
    """int64 [B, steps]: each row's masks shared over the steps, the first ones taking what is left over."""
    masks_B1 = mask_BL.sum(dim=1, keepdim=True)
    base, over = masks_B1 // steps, masks_B1 % steps
    return base + (torch.arange(steps, device=mask_BL.device)[None] < over).long()


@torch.no_grad()
def fill(
    logits_of: Logits,
    x_BL: Tensor,
    start: int,
    *,
    mask_token_id: int,
    steps: int,
    block_length: int,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    attention_mask: Tensor | None = None,
    uniform: Uniform = drawn,
    max_forwards: int | None = None,
) -> tuple[Tensor, int]:
    """Fills the masks at `start` and after it, block by block of positions.

    Args:
        logits_of: the network.
        x_BL: int64 [B, L], given tokens and masks.
        start: the first position of the first block.
        mask_token_id: of the mask.
        steps: a multiple of the number of blocks.
        block_length: divides L - start.
        temperature: of the tokens' draw.
        cfg_scale: of guidance.
        remasking: `low_confidence` or `random`.
        attention_mask: [B, L], zero at padding.
        uniform: where noise comes from.
        max_forwards: stop there, with masks left over (a benchmark's sample of the steps).

    Returns:
        The canvases [B, L], and the number of forwards.

    Raises:
        ValueError: lengths or steps that do not divide.
    """
    blocks, rest = divmod(x_BL.shape[1] - start, block_length)
    if rest or steps % blocks:
        raise ValueError(
            f"{x_BL.shape[1] - start} positions, block_length={block_length}, steps={steps}: do not divide"
        )
    x_BL, given_BL, step, forwards = x_BL.clone(), x_BL != mask_token_id, 0, 0
    for block in range(blocks):
        begin, end = start + block * block_length, start + (block + 1) * block_length
        counts_BS = transfer_counts(x_BL[:, begin:end] == mask_token_id, steps // blocks)
        for i in range(steps // blocks):
            if max_forwards is not None and forwards >= max_forwards:
                return x_BL, forwards
            mask_BL = x_BL == mask_token_id
            if cfg_scale > 0:
                both = torch.cat([x_BL, x_BL.masked_fill(given_BL, mask_token_id)])
                mask_both = None if attention_mask is None else attention_mask.repeat(2, 1)
                logits, un = logits_of(both, mask_both).chunk(2)
                logits = un + (cfg_scale + 1) * (logits - un)
            else:
                logits = logits_of(x_BL, attention_mask)
            forwards += 2 if cfg_scale > 0 else 1
            noised = logits
            if temperature > 0:
                noise = (-uniform(step, logits.shape).log()) ** temperature
                noised = logits.double().exp() / noise
            x0_BL = noised.argmax(dim=-1)
            if remasking == "low_confidence":
                p = torch.softmax(logits.double(), dim=-1)
                x0_p = p.gather(-1, x0_BL[..., None])[..., 0]
            else:
                x0_p = uniform(step, x0_BL.shape)
            x0_p[:, end:] = -torch.inf
            x0_BL = torch.where(mask_BL, x0_BL, x_BL)
            confidence_BL = torch.where(mask_BL, x0_p, -torch.inf)
            transfer_BL = torch.zeros_like(mask_BL)
            for row in range(len(x_BL)):
                best = confidence_BL[row].topk(int(counts_BS[row, i])).indices
                transfer_BL[row, best] = True
            x_BL[transfer_BL] = x0_BL[transfer_BL]
            step += 1
    return x_BL, forwards


def published_generate(
    logits_of: Logits,
    prompts: Sequence[Tensor],
    *,
    mask_token_id: int,
    gen_length: int,
    at_once: int = 1,
    **options: object,
) -> Published:
    """Writes `gen_length` tokens after each prompt, `at_once` rows at a time.

    Args:
        logits_of: the network.
        prompts: int64 [length] each; within a batch the shorter ones are padded on the left.
        mask_token_id: of the mask.
        gen_length: masks after each prompt.
        at_once: rows of a batch.
        **options: of `fill`.
    """
    canvases: list[Tensor] = []
    nfe = 0
    for first in range(0, len(prompts), at_once):
        batch = prompts[first : first + at_once]
        longest = max(map(len, batch))
        x_BL = torch.full((len(batch), longest + gen_length), mask_token_id, device=batch[0].device)
        real_BL = torch.ones_like(x_BL, dtype=torch.bool)
        for row, prompt in enumerate(batch):
            x_BL[row, longest - len(prompt) : longest] = prompt
            x_BL[row, : longest - len(prompt)] = 0 if mask_token_id else 1  # any token but the mask: nothing sees it
            real_BL[row, : longest - len(prompt)] = False
        mask = None if len(set(map(len, batch))) == 1 else real_BL
        done_BL, forwards = fill(
            logits_of, x_BL, longest, mask_token_id=mask_token_id, attention_mask=mask, **options  # type: ignore[arg-type]
        )  # fmt: skip
        canvases += [row[keep] for row, keep in zip(done_BL, real_BL, strict=True)]
        nfe += forwards
    return Published(canvases, nfe)
