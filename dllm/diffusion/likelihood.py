"""How likely texts are to a mask predictor: a lower bound, by Monte Carlo.

Shapes: L positions, A of them the text (the answer to a prompt, or all), N samples of a text, R rows that go through the model
together (samples of one or several texts), M masks of those.

    log p(x0 | prompt)  >=  E_k E_S [ A / k  sum over i in S of  log p(x0^i | x0 without S) ]

with k uniform in 1 .. A, and S any k of the text's tokens. It is what a model that writes in a random order gives the text
on the mean over all orders, and it varies far less than the form with a mask probability in place of k.

The samples' k are stratified, as training's times are, and a text's masks follow from its number, its length and the seed
alone, not from its place or from what stands before it. So two prompts, or two models, are compared under the same masks.

Sources: LLaDA, arXiv:2502.09992, eq. 6 and Algorithm 3; the random order: Hoogeboom et al., arXiv:2110.02037, eq. 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm.diffusion.corruption import CorruptionPlan

MaskPredictor = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(int64 [R, L] tokens with masks, bool [R, L] where those are, int64 [M] what they hide, bool [R, L] what is no padding) ->
[M], -log p of the hidden in nats."""


class Text(NamedTuple):
    """A text whose likelihood is asked for."""

    ids_L: Tensor
    """int64 [L], the prompt and the text; all texts of a call on one device."""
    prompt_length: int = 0
    """How many of the first tokens are given, and never masked."""
    number: int = 0
    """Keys the masks, with the seed: texts of one corpus have different numbers, what is to be compared the same."""


def likelihood(
    predict: MaskPredictor,
    texts: Sequence[Text],
    mask_token_id: int,
    *,
    samples: int = 128,
    rows: int = 16,
    seed: int = 0,
) -> Tensor:
    """Bounds the likelihood of texts, each given what stands before it.

    Args:
        predict: the model.
        texts: of any mix of lengths.
        mask_token_id: what a masked token becomes; padding too.
        samples: N of each text. As many as it has tokens, or a multiple of it, take every k equally often. LLaDA's own is 128.
        rows: R at most. It changes the speed, and no result by more than rounding.
        seed: another seed, other masks.

    Returns:
        fp64 [texts, N] on the CPU: -log p(text | prompt) in nats, at most. The mean over N is the estimate; the spread of the N
        overstates its error, which stratification makes smaller.

    Raises:
        ValueError: a text without a token behind its prompt, or `samples` or `rows` less than 1.
    """
    if samples < 1 or rows < 1:
        raise ValueError(f"samples={samples}, rows={rows}: at least one of each is needed")
    xt, masked, hidden = [], [], []
    for text in texts:
        for xt_L, masked_L in zip(*_masked(text, mask_token_id, samples, seed), strict=True):
            xt.append(xt_L)
            masked.append(masked_L)
            hidden.append(text.ids_L[masked_L])
    nats = []
    for first in range(0, len(xt), rows):
        here = slice(first, first + rows)
        xt_RL = pad_sequence(xt[here], batch_first=True, padding_value=mask_token_id)
        masked_RL = pad_sequence(masked[here], batch_first=True)
        real_RL = pad_sequence([torch.ones_like(masked_L) for masked_L in masked[here]], batch_first=True)
        nll_M = predict(xt_RL, masked_RL, torch.cat(hidden[here]), real_RL).double()
        row_M = masked_RL.nonzero(as_tuple=True)[0]
        sum_R = torch.zeros(len(xt_RL), dtype=torch.float64, device=nll_M.device).index_add(0, row_M, nll_M)
        nats.append((sum_R / masked_RL.sum(1)).cpu())
    asked = torch.tensor([len(text.ids_L) - text.prompt_length for text in texts], dtype=torch.float64)
    return torch.cat([*nats, torch.zeros(0, dtype=torch.float64)]).view(-1, samples) * asked[:, None]


def _masked(text: Text, mask_token_id: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """The samples of a text, int64 [N, L], and where they are masked."""
    ids_L, given = text.ids_L, text.prompt_length
    if not 0 <= given < len(ids_L):
        raise ValueError(
            f"A text of {len(ids_L)} tokens with prompt_length={given}: at least one token behind it is needed"
        )
    plan = CorruptionPlan(group=samples, masking="exact", seed=seed)
    ids_NA = ids_L[given:].expand(samples, -1)
    numbers_N = text.number * samples + torch.arange(samples, device=ids_L.device)
    done = plan.corrupt(ids_NA, torch.ones_like(ids_NA, dtype=torch.bool), numbers_N, mask_token_id)
    xt_NL = torch.cat([ids_L[:given].expand(samples, -1), done.xt_BL], dim=1)
    return xt_NL, torch.nn.functional.pad(done.masked_BL, (given, 0))
