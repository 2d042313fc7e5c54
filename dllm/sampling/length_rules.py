"""The rules of lengths at work: what they have to be shown, and what their answers do to the rows of a batch.

The rules themselves are pure functions in `dllm.sampling.lengths`. They are asked only at steps whose pass computes all that
they look at: with a cache that leaves places out, those are a block's first step and its refreshes.

Shapes: R rows, W places that are looked at (see `dllm.sampling.view`), L positions of the longest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dllm.sampling.config import SamplingConfig
from dllm.sampling.found import Found
from dllm.sampling.lengths import answer_known, block_lengths, expansion, growth
from dllm.sampling.rows import Rows, SpecialTokens
from dllm.sampling.view import View


class Ahead(NamedTuple):
    """Places that the rules want to see."""

    asked_RW: Tensor
    """bool: open ones, in the block or ahead of it."""
    tail_RW: Tensor
    """bool: the last places of the row."""
    tail_R: Tensor
    """bool: the pass computes all masks among them."""
    rest_RW: Tensor
    """bool: all masks from the block's start on."""
    rest_R: Tensor
    """bool: the pass computes all of them."""


class LengthRules:
    """Block policy, length policy and early answers of one batch.

    Args:
        config: what the batch's rows have in common.
        tokens: the special ids.
        device: where the rows are.
    """

    def __init__(self, config: SamplingConfig, tokens: SpecialTokens, device: torch.device) -> None:
        self.adablock = config.block_policy == "adablock"
        self.daedal = config.length_policy == "daedal"
        self.prophet = config.early_answer == "prophet"
        self.config, self.delimiters = config, config.delimiters or tokens.delimiters
        self.eos = torch.tensor(tokens.eos, dtype=torch.int64, device=device)
        self.watched = tokens.eos if self.daedal else ()
        self.needs = frozenset({"second"} if self.prophet else ())

    @property
    def any(self) -> bool:
        """Whether there is any such rule."""
        return self.adablock or self.wide

    @property
    def wide(self) -> bool:
        """Whether a step looks at all places of the rows."""
        return self.daedal or self.prophet

    def ahead(self, rows: Rows, view: View, compute_RL: Tensor | None) -> Ahead:
        """What has to be asked for; `compute_RL` are the positions that the pass computes, None for all."""
        offset_RW = view.offset_RW
        asked_RW = torch.zeros_like(view.open_RW)
        tail_RW = rest_RW = asked_RW
        if self.adablock:
            reach_R = rows.start_R + rows.window_R
            fresh_R = (rows.block_step_R == 0) & ~rows.done_R
            asked_RW = (
                view.open_RW & fresh_R[:, None] & (offset_RW >= rows.start_R[:, None]) & (offset_RW < reach_R[:, None])
            )
            # the block's end is still to be found: without a delimiter it is where it is now
        if self.daedal:
            tail_RW = view.own_RW & (offset_RW >= (rows.places_R - self.config.length_options["eos_window"])[:, None])
        if self.prophet:
            rest_RW = view.open_RW & (offset_RW >= rows.start_R[:, None])

        def seen(places_RW: Tensor) -> Tensor:
            if compute_RL is None:
                return torch.ones_like(rows.done_R)
            return (compute_RL.gather(1, view.place_RW) | ~places_RW).all(1)

        tail_R, rest_R = seen(tail_RW & view.open_RW), seen(rest_RW)
        asked_RW = asked_RW | (tail_RW & view.open_RW & tail_R[:, None]) | (rest_RW & rest_R[:, None])
        return Ahead(asked_RW, tail_RW, tail_R, rest_RW, rest_R)

    def ended(self, rows: Rows, view: View, found: Found) -> Tensor:
        """fp32 [R, W]: how sure it is of each place that the text has ended there; a committed token is sure."""
        assert found.watched_RW is not None
        committed_RW = torch.isin(rows.ids_RL.gather(1, view.place_RW), self.eos).float()
        return torch.where(view.open_RW, found.watched_RW, committed_RW)

    def growth(self, rows: Rows, view: View, ahead: Ahead, found: Found) -> Tensor:
        """int64 [R]: masks to add at the ends of rows whose length is still being found."""
        options = self.config.length_options
        more_R = growth(
            self.ended(rows, view, found),
            ahead.tail_RW,
            rows.most_R - rows.places_R,
            eos_threshold=options["eos_threshold"],
            expansion_factor=int(options["expansion_factor"]),
        )
        return more_R * (rows.growing_R & ~rows.done_R)

    def block_ends(self, rows: Rows, view: View, found: Found, fresh_R: Tensor, reach: int) -> Tensor:
        """int64 [R]: one past the last place of each block, found anew where it begins now."""
        column_RW, ahead_RW = view.columns_RW(rows.start_R, reach)
        length_R = block_lengths(
            found.token_RW.gather(1, column_RW),
            found.probability_RW.gather(1, column_RW),
            ahead_RW,
            rows.window_R,
            self.delimiters,
            delimiter_threshold=self.config.block_options["delimiter_threshold"],
            block_length=rows.width_R,
        )
        return torch.where(fresh_R, rows.start_R + length_R, rows.end_R)

    def known(self, rows: Rows, view: View, ahead: Ahead, found: Found) -> Tensor:
        """bool [R]: all that is left may be committed now."""
        assert found.gap_RW is not None
        committed_R = (view.own_RW & ~view.open_RW).sum(1)
        progress_R = committed_R.float() / rows.places_R.clamp(min=1)
        known_R = answer_known(found.gap_RW, ahead.rest_RW, progress_R, **self.config.early_answer_options)
        return known_R & ahead.rest_R

    def expansion(
        self, rows: Rows, view: View, ahead: Ahead, found: Found, ended_RW: Tensor, open_RW: Tensor, may_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(the place that becomes several by its number among the row's, how many are added); int64 [R] each.

        Args:
            rows: after this step's commits.
            view: as it was before them.
            ahead: see `ahead`.
            found: of this step.
            ended_RW: of `ended`, before the commits.
            open_RW: bool [R, W], masks of the block that were asked for and are left.
            may_R: bool [R], rows that take part.
        """
        options = self.config.length_options
        grown = expansion(
            found.probability_RW,
            open_RW,
            ended_RW,
            ahead.tail_RW,
            rows.most_R - rows.places_R,
            expand_threshold=options["expand_threshold"],
            expand_eos_threshold=options["expand_eos_threshold"],
            expansion_factor=int(options["expansion_factor"]),
        )
        count_R = grown.added_R * (may_R & ahead.tail_R)
        return (grown.at_RW * view.offset_RW).sum(1), count_R
