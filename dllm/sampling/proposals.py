"""What the model proposes for a mask: a candidate token, and how sure it is of it.

Shapes: N positions that may be committed now, V vocabulary, C columns of a chunk of it, D width.

Head and statistics run together, chunk by chunk of the vocabulary: maximum, argmax and log-sum-exp are kept up to date in
fp32, and the [N, V] logits never exist at once. Entropy, second best and all log-probabilities only where they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dllm.diffusion.noise import Purpose, keyed_gumbel, keyed_uniform
from dllm.diffusion.objective import is_plain
from dllm.layers.trunk import apply_head

COLUMNS = {"cpu": 2048, "other": 1 << 15}
"""Columns of a chunk: what stays in a CPU's cache; on a GPU few launches count more. The same for any number of positions, so
that sums have the same order in any company."""
CHUNK_ELEMENTS = 1 << 24
"""Logits that exist at once where a head can only be called as a whole."""


class Keys(NamedTuple):
    """What the noise of a position depends on: nothing about the batch that it is in."""

    seed_N: Tensor
    request_N: Tensor
    position_N: Tensor
    step_N: Tensor


class Question(NamedTuple):
    """What is asked of the model at N positions."""

    keys: Keys
    never: tuple[int, ...] = ()
    """Ids that must not be proposed; they take no probability either."""
    temperature_N: Tensor | None = None
    """fp64, above 0: candidates are drawn from softmax(logits / temperature) by Gumbel's trick. None: the argmax."""
    guidance_N: Tensor | None = None
    """fp32, cfg_scale: the states come twice, those of the conditional branch first. None: no guidance."""
    needs: frozenset[str] = frozenset()
    """Of "second", "entropy", "distribution"."""
    given_N: Tensor | None = None
    """int64: tokens whose probability is wanted too."""
    watched: tuple[int, ...] = ()
    """Ids whose probability, all together, is wanted too."""


class Proposals(NamedTuple):
    """The answers, each [N]."""

    token_N: Tensor
    """int64: the candidate."""
    probability_N: Tensor
    """fp32: that of the candidate in the *unnoised* softmax at temperature 1."""
    best_N: Tensor
    """fp32: the highest probability; of another token than the candidate where noise chose."""
    second_N: Tensor | None
    """fp32: the second highest probability."""
    entropy_N: Tensor | None
    """fp32: nats."""
    log_p_NV: Tensor | None
    """fp32 [N, V]: the whole distribution."""
    given_N: Tensor | None
    """fp32: the probability of the given token."""
    gap_N: Tensor | None
    """fp32: the highest logit less the second highest; with "second"."""
    watched_N: Tensor | None
    """fp32: the probability that it is one of the watched tokens."""


def guide(conditional: Tensor, unconditional: Tensor, cfg_scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: un + (s + 1)(cond - un).

    Source: LLaDA, arXiv:2502.09992, appendix A.2; Nie et al., arXiv:2410.18514, unsupervised guidance.
    """
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def chance(keys: Keys) -> Tensor:
    """Uniform numbers [N] that stand in for confidence where positions are committed in random order."""
    return keyed_uniform(keys.seed_N, Purpose.RANK, keys.request_N, keys.position_N, keys.step_N).float()


def propose(head: nn.Module, hidden_MD: Tensor, question: Question) -> Proposals:
    """A candidate for each position, and what is to be known of it.

    Args:
        head: a linear layer D -> V, or the embedding whose weight it shares: taken in chunks of the vocabulary. Any other
            module (quantised, adapted, sharded over devices) is called in chunks of positions.
        hidden_MD: the states after the last norm: M is N, or 2 N with guidance.
        question: what is asked.
    """
    N = len(question.keys.step_N)
    if is_plain(head) and "distribution" not in question.needs:
        columns = COLUMNS["cpu" if hidden_MD.device.type == "cpu" else "other"]
        return _reduce(_columns(head, hidden_MD, columns), question)
    vocabulary = getattr(head, "out_features", None) or getattr(head, "num_embeddings", None) or hidden_MD.shape[1]
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    branches = hidden_MD.split(N) if N else (hidden_MD,)
    parts = []
    for start in range(0, max(1, N), rows):
        here = slice(start, start + rows)
        logits_MV = apply_head(head, torch.cat([branch[here] for branch in branches]))
        parts.append(_reduce(iter([(0, logits_MV)]), _part(question, here)))
    return Proposals._make(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True))


def _part(question: Question, here: slice) -> Question:
    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[here]

    return question._replace(
        keys=Keys(*(key[here] for key in question.keys)),
        temperature_N=cut(question.temperature_N),
        guidance_N=cut(question.guidance_N),
        given_N=cut(question.given_N),
    )


def _columns(head: nn.Module, hidden_MD: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
    """(first column, logits [M, C]) of each chunk."""
    weight_VD: Tensor = head.weight  # type: ignore[assignment]
    for start in range(0, len(weight_VD), columns):
        yield start, nn.functional.linear(hidden_MD, weight_VD[start : start + columns])


def _reduce(chunks: Iterator[tuple[int, Tensor]], question: Question) -> Proposals:
    """One pass over the chunks of the vocabulary, whose logits [M, C] come in any float dtype."""
    keys, temperature_N, needs = question.keys, question.temperature_N, question.needs
    N, device = len(keys.step_N), keys.step_N.device
    lowest = torch.finfo(torch.float32).min  # in place of -inf, whose differences are no numbers
    top_N = torch.full((N,), lowest, device=device)
    second_N = torch.full((N,), -torch.inf, device=device)
    mass_N = torch.zeros(N, device=device)  # sum of exp(logit - top)
    slope_N = torch.zeros(N, device=device)  # sum of exp(logit - top) (logit - top)
    token_N = torch.zeros(N, dtype=torch.int64, device=device)
    chosen_N = torch.full((N,), -torch.inf, device=device)  # the candidate's logit
    given_N = torch.full((N,), -torch.inf, device=device)
    watched_wN = torch.full((len(question.watched), N), -torch.inf, device=device)
    value_N: Tensor | None = None  # the candidate's noised logit
    whole: list[Tensor] = []
    for start, logits_MC in chunks:
        logits_NC = logits_MC.float()
        if question.guidance_N is not None:
            conditional_NC, unconditional_NC = logits_NC.chunk(2)
            logits_NC = guide(conditional_NC, unconditional_NC, question.guidance_N[:, None])
        C = logits_NC.shape[1]
        never = [token - start for token in question.never if start <= token < start + C]
        if never:
            logits_NC = logits_NC.clone()
            for token in never:
                logits_NC[:, token].fill_(-torch.inf)
        best_N, place_N = logits_NC.max(1)
        new_top_N = torch.maximum(top_N, best_N)
        power_NC = (logits_NC - new_top_N[:, None]).exp_()
        scale_N = (top_N - new_top_N).exp_()
        if "entropy" in needs:
            moved_N = torch.where(mass_N > 0, (top_N - new_top_N) * mass_N, 0)
            slope_N = scale_N * (slope_N + moved_N) + torch.xlogy(power_NC, power_NC).sum(1)
        mass_N = scale_N * mass_N + power_NC.sum(1)
        if "second" in needs:
            two = torch.cat([torch.stack([top_N, second_N], 1), logits_NC.topk(min(2, C), dim=1).values], 1)
            second_N = two.topk(2, dim=1).values[:, 1]
        top_N = new_top_N
        if temperature_N is None:
            found_N, value_NC = best_N, logits_NC
        else:
            column = torch.arange(start, start + C, device=device)
            key = (keys.request_N[:, None], keys.position_N[:, None], keys.step_N[:, None], column[None])
            gumbel_NC = keyed_gumbel(keys.seed_N[:, None], Purpose.TOKEN, *key)
            value_NC = logits_NC.to(gumbel_NC.dtype) / temperature_N[:, None] + gumbel_NC
            found_N, place_N = value_NC.max(1)
        better_N = torch.ones_like(place_N, dtype=torch.bool) if value_N is None else found_N > value_N
        value_N = found_N if value_N is None else torch.where(better_N, found_N, value_N)
        token_N = torch.where(better_N, place_N + start, token_N)
        chosen_N = torch.where(better_N, logits_NC.gather(1, place_N[:, None])[:, 0], chosen_N)
        if question.given_N is not None:
            column_N = question.given_N - start
            inside_N = (column_N >= 0) & (column_N < C)
            here_N = logits_NC.gather(1, column_N.clamp(0, C - 1)[:, None])[:, 0]
            given_N = torch.where(inside_N, here_N, given_N)
        for w, token in enumerate(question.watched):
            if start <= token < start + C:
                watched_wN[w] = logits_NC[:, token - start]
        if "distribution" in needs:
            whole.append(logits_NC)

    def probability(logit_xN: Tensor) -> Tensor:
        """exp(logit - top) / mass: by the log-sum-exp, a large logit would lose the digits that tell 1 - 1e-6 from 1."""
        return (logit_xN - top_N).exp_() / mass_N

    return Proposals(
        token_N=token_N,
        probability_N=probability(chosen_N),
        best_N=1 / mass_N,
        second_N=probability(second_N) if "second" in needs else None,
        entropy_N=(mass_N.log() - slope_N / mass_N).clamp(min=0) if "entropy" in needs else None,
        log_p_NV=(torch.cat(whole, 1) - top_N[:, None]).sub_(mass_N.log()[:, None]) if whole else None,
        given_N=probability(given_N) if question.given_N is not None else None,
        gap_N=top_N - second_N if "second" in needs else None,
        watched_N=probability(watched_wN).sum(0) if question.watched else None,
    )
