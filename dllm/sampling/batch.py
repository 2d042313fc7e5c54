"""Rows that take their denoising steps together: where tokens are proposed, chosen and committed.

Shapes: R rows, P rows of a pass (twice R with guidance), L positions of the longest, T tokens of a pass, W places of the
widest current block, M places with masks of the row with the most, N positions that are asked for.

A step is one forward of all rows, packed one after the other; the head runs at the masks of the current blocks alone; a
policy says which candidates are committed. Every row has its own block and its own step, and its noise is keyed by itself,
so its tokens do not depend on its company, and rows join and leave between any two steps.

Source: LLaDA, arXiv:2502.09992, Algorithms 4 and 5 and the published sampler.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from dllm.sampling.change import Distributions
from dllm.sampling.config import SamplingConfig
from dllm.sampling.found import Found, spread, sureness
from dllm.sampling.length_rules import LengthRules
from dllm.sampling.network import Network, Reuse
from dllm.sampling.packing import Shadows, pack, pack_with_shadow
from dllm.sampling.policies import POLICIES
from dllm.sampling.proposals import Keys, Question, propose
from dllm.sampling.rows import (
    Finished,
    Progress,
    Request,
    Rows,
    Size,
    SpecialTokens,
    answered,
    compacted,
    most_in_block,
    rows_of,
    scheduled,
    size_of,
)
from dllm.sampling.statistics import Statistics
from dllm.sampling.trace import StepEvent
from dllm.sampling.view import View, look

LAG = 2
"""Steps after which the host reads which rows are done, where it must not wait for the device."""


def alike(config: SamplingConfig) -> SamplingConfig:
    """What rows of one batch must have in common; the rest is each row's own."""
    # an option that was given and one that is its policy's by default are the same
    filled: dict[str, Any] = {**config.policy_options, **config.cache_options}
    own: dict[str, Any] = dict(steps=None, block_length=None, cfg_keep_tokens=(), seed=0)
    return dataclasses.replace(
        config,
        gen_length=int(config.length_options.get("initial_length", 1)),
        temperature=float(config.temperature > 0),
        cfg_scale=float(config.cfg_scale > 0),
        **filled,
        **own,
    )


class Batch:
    """Rows that take their steps together.

    Args:
        network: the mask predictor.
        config: what the rows have in common, see `alike`.
        tokens: the special ids.
        device: where the network lives.
        reuse: the cache, or None to compute everything.
        watch: whether `step` gives an event.
        waits: whether the host may wait for the device in a step, to leave out what need not be computed; by default on a CPU,
            which does not wait. Otherwise shapes do not depend on values: the head runs at all places of the blocks, rows are
            padded to the longest, and which rows are done is read `LAG` steps late (a cache still waits once a step).
    """

    def __init__(
        self,
        network: Network,
        config: SamplingConfig,
        tokens: SpecialTokens,
        device: torch.device | str,
        *,
        reuse: Reuse | None = None,
        watch: bool = False,
        waits: bool | None = None,
    ) -> None:
        self.network, self.config, self.tokens, self.device = network, config, tokens, torch.device(device)
        self.reuse, self.watch = reuse, watch
        self.waits = self.device.type == "cpu" if waits is None else waits
        self._looks: deque[tuple[list[Hashable], Tensor, torch.cuda.Event | None]] = deque()  # of the last steps
        self.policy = POLICIES[config.policy]
        self.options = config.policy_options
        self.branches = config.branches
        self.rows: Rows | None = None
        self.names: list[Hashable] = []
        self.requests: list[Request] = []
        self._sizes: list[Size] = []  # of each row: what the host knows without asking the device
        self.nfe = 0
        self._ends = torch.tensor(tokens.ends, dtype=torch.int64, device=device)
        self._needs = self.policy.needs
        self.rules = LengthRules(config, tokens, self.device)
        # a policy that decides by itself would wait for ever for a place whose candidate is the mask
        mask = () if config.policy == "fixed" else (tokens.mask,)
        self._never = mask + (tuple(tokens.eos) if config.suppress_eos else ())
        self._asked = frozenset(
            self.rules.needs
            | ({"second"} if config.remasking == "margin" else set())
            | ({"entropy"} if "entropy" in self._needs or config.remasking == "entropy" else set())
            | ({"distribution"} if "change" in self._needs else set())
        )
        self._before = Distributions()

    def __len__(self) -> int:
        return len(self.names)

    def add(self, requests: Sequence[Request], names: Sequence[Hashable], room: tuple[int, int] | None = None) -> None:
        """Rows join; they take part from the next step on.

        Args:
            requests: theirs.
            names: what they are called in what the batch tells.
            room: rows of a forward, and positions, that a cache makes room for; by default what these and the others need.

        Raises:
            OptionError: fewer steps than blocks.
        """
        if not requests:
            return
        new = rows_of(requests, self.tokens.mask).to(self.device)
        self.rows = new if self.rows is None else self.rows.joined(new)
        self.names += names
        self.requests += requests
        self._sizes += map(size_of, requests)
        if self.reuse is not None:
            shadow = max(map(most_in_block, self.requests)) if "verified" in self._needs else 0
            positions = max(request.most_positions for request in self.requests)
            self.reuse.admit(len(self.rows) * self.branches, positions + shadow, room)

    @property
    def _reach(self) -> int:
        """Places from a block's start on that a step may look at; as many as the widest block has, unless it grows."""
        return max(max(size.width, size.window) for size in self._sizes)

    def look(self) -> list[Progress]:
        """How far the rows are; without waiting for the device, how far they were some steps ago. Once after each step."""
        if self.rows is None:
            return []
        rows, names, event = self.rows, list(self.names), None
        state_3R = torch.stack([rows.start_R, rows.places_R - rows.open_RL.sum(1), rows.done_R.long()])
        if not self.waits:
            if state_3R.device.type == "cuda":
                state_3R = state_3R.to("cpu", non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._looks.append((names, state_3R, event))
            if len(self._looks) <= LAG:
                return []
            names, state_3R, event = self._looks.popleft()
            if event is not None:
                event.synchronize()
        here = set(self.names)
        found = zip(names, *state_3R.tolist(), strict=True)
        return [Progress(name, start, written, bool(done)) for name, start, written, done in found if name in here]

    def take_finished(self) -> list[Finished]:
        """The rows that are done leave; without waiting for the device, some steps after they are. Once after each step."""
        done = {row.name for row in self.look() if row.done}
        return self.remove([row for row, name in enumerate(self.names) if name in done])

    def remove(self, leaving: Sequence[int]) -> list[Finished]:
        """These rows leave, done or not."""
        rows = self.rows
        if rows is None or not leaving:
            return []
        index = torch.tensor(leaving, device=self.device)
        ids_RL, open_RL = rows.ids_RL[index], rows.open_RL[index]
        for end in (*self.tokens.eos, *self.tokens.ends)[:1]:  # what an early stop left open
            ids_RL = torch.where(open_RL & rows.over_R[index, None], end, ids_RL)
        written_R = rows.places_R[index] - open_RL.sum(1)
        told = zip(
            leaving,
            ids_RL.cpu(),
            rows.step_R[index].tolist(),
            written_R.tolist(),
            rows.failed_R[index].tolist(),
            strict=True,
        )
        gone = [
            Finished(self.names[row], ids_L[: len(self.requests[row].canvas)].clone(), *counts)
            for row, ids_L, *counts in told
        ]
        stay = compacted(len(rows), leaving)
        self.names = [self.names[row] for row in stay]
        self.requests = [self.requests[row] for row in stay]
        self._sizes = [self._sizes[row] for row in stay]
        if not stay:
            self.rows, self._before = None, Distributions()
            self._looks.clear()
        else:
            length, places = (max(column) for column in list(zip(*self._sizes, strict=True))[:2])
            index = torch.tensor(stay, device=self.device)
            self.rows = rows.kept(index, length, places)
            self._before.keep(index, rows.place_RM.shape, places)
        if self.reuse is not None:
            self.reuse.keep([row * self.branches + branch for row in stay for branch in range(self.branches)])
        return gone

    @torch.no_grad()  # not inference_mode: what comes back may be trained on, or changed in place
    def step(self) -> StepEvent | None:
        """One denoising step of every row; rows that are done do not change.

        Returns:
            What was committed, with each row by its place in the batch, if the batch is watched.
        """
        rows = self.rows
        assert rows is not None
        rules = self.rules
        reach = self._reach
        view = look(rows, None if rules.wide else reach)
        compute_RL = None if self.reuse is None else self.reuse.compute(rows, view.place_RW, view.block_RW)
        ahead = rules.ahead(rows, view, compute_RL) if rules.any else None
        found = self._propose(rows, view, compute_RL, None if ahead is None else ahead.asked_RW, reach)
        self.nfe += self.branches
        rows.failed_R |= (view.open_RW & found.asked_RW & ~found.probability_RW.isfinite()).any(1)
        rows.moved_R = torch.zeros_like(rows.moved_R)

        acting_R = active_R = ~rows.done_R
        grown_R = known_R = None
        if ahead is not None and rules.daedal:
            grown_R = rules.growth(rows, view, ahead, found) * active_R
            acting_R = active_R & (grown_R == 0)
            rows.growing_R = rows.growing_R & ~acting_R
        if rules.adablock:
            fresh_R = acting_R & (rows.block_step_R == 0)
            rows.end_R = rules.block_ends(rows, view, found, fresh_R, reach)
            view = view.blocks_of(rows)
        if ahead is not None and rules.prophet:
            known_R = acting_R & rules.known(rows, view, ahead, found)

        count_R, last_R = scheduled(rows)
        memory_RW = rows.memory_RM.gather(1, view.offset_RW)
        statistics = self._statistics(rows, view, found, acting_R)
        decision = self.policy.decide(statistics, memory_RW, count_R, **self.options)
        remembered_RW = view.block_RW & acting_R[:, None]
        M = rows.place_RM.shape[1]
        rows.memory_RM = _scattered(rows.memory_RM, torch.where(remembered_RW, view.offset_RW, M), decision.memory_RW)
        commit_RW = decision.commit_RW & statistics.open_RW
        if ahead is not None and known_R is not None:
            commit_RW = commit_RW | (known_R[:, None] & ahead.rest_RW)
        # a model may propose the mask itself: as in the published sampler, such a place uses up its turn and stays open
        commit_RW = commit_RW & acting_R[:, None] & (found.token_RW != self.tokens.mask)
        changed_RW, token_RW = commit_RW, found.token_RW
        if decision.remask_RW is not None:
            back_R = acting_R if known_R is None else acting_R & ~known_R
            back_RW = decision.remask_RW & statistics.committed_RW & back_R[:, None]
            token_RW = torch.where(back_RW, self.tokens.mask, token_RW)
            changed_RW = commit_RW | back_RW
        ended_RW = rules.ended(rows, view, found) if rules.daedal else None
        self._write(rows, view, changed_RW, token_RW)
        event = self._event(view.place_RW, changed_RW, token_RW, found.probability_RW) if self.watch else None
        next_R = self._advance(rows, view, active_R, acting_R, last_R if self.config.policy == "fixed" else None)
        if known_R is not None:  # what is still a mask was proposed to be one
            rows.start_R = torch.where(known_R, rows.places_R, rows.start_R)
        if ahead is not None and grown_R is not None and ended_RW is not None:
            left_RW = statistics.open_RW & ~commit_RW
            may_R = acting_R & ~next_R & ~rows.done_R
            after_R, count_R = rules.expansion(rows, view, ahead, found, ended_RW, left_RW, may_R)
            after_R = torch.where(grown_R > 0, rows.places_R - 1, after_R)
            event = self._lengthen(after_R, count_R + grown_R, event)
        return event

    def _propose(self, rows: Rows, view: View, compute_RL: Tensor | None, ahead_RW: Tensor | None, reach: int) -> Found:
        """The forward, and what it says of the places that are asked for."""
        shadowed = "verified" in self._needs
        asked_RW = view.block_RW if shadowed else view.block_RW & view.open_RW
        if ahead_RW is not None:
            asked_RW = asked_RW | ahead_RW
        if self.waits:
            row_N, w_N = asked_RW.nonzero(as_tuple=True)
        else:
            place_N = torch.arange(asked_RW.numel(), device=self.device)
            row_N, w_N = place_N // asked_RW.shape[1], place_N % asked_RW.shape[1]
        position_N = view.place_RW[row_N, w_N]
        keys = Keys(rows.seed_R[row_N], rows.request_R[row_N], position_N, rows.step_R[row_N])
        question = Question(
            keys,
            self._never,
            rows.temperature_R[row_N] if self.config.temperature > 0 else None,
            rows.guidance_R[row_N] if self.branches == 2 else None,
            self._asked,
            rows.ids_RL[row_N, position_N] if shadowed else None,
            self.rules.watched,
        )
        if compute_RL is not None and not self.waits:
            compute_RL = compute_RL.clone()  # rows that are done stay for some steps, and a pass of no token is none
            compute_RL[0, 0] |= ~compute_RL.any()
        options: Any = dict(branches=self.branches, mask=self.tokens.mask, reuse=self.reuse, waits=self.waits)
        if shadowed:
            width = int((rows.end_R - rows.start_R).max()) if self.rules.wide else reach
            block = look(rows, width)
            needed_RW = block.block_RW & ~block.open_RW
            committed_N = (view.block_RW & ~view.open_RW)[row_N, w_N]
            shadow_N = torch.where(committed_N, view.offset_RW[row_N, w_N] - rows.start_R[row_N], -1)
            shadows = Shadows(block.place_RW, needed_RW, shadow_N)
            work = pack_with_shadow(rows, row_N, position_N, shadows, compute_RL, **options)
        else:
            lengths_P = [size.length for size in self._sizes for _ in range(self.branches)]
            work = pack(rows, row_N, position_N, lengths_P, compute_RL, **options)
        found = self.network(work, lambda head, hidden_MD: propose(head, hidden_MD, question))
        return spread(found, sureness(found, keys, self.config, self._ends), asked_RW, row_N, w_N)

    def _statistics(self, rows: Rows, view: View, found: Found, acting_R: Tensor) -> Statistics:
        """What a policy may know of the current blocks."""
        open_RW, committed_RW = view.block_RW & view.open_RW, view.block_RW & ~view.open_RW
        change_RW = None
        if found.log_p_NV is not None:
            row_N, offset_N = found.row_N, view.offset_RW[found.row_N, found.w_N]
            counts_N = (open_RW & acting_R[:, None])[row_N, found.w_N]
            change_N = self._before.change(found.log_p_NV, row_N, offset_N, counts_N, rows.place_RM.shape)
            change_RW = found.laid(change_N)
        return Statistics(
            position_RW=view.place_RW,
            open_RW=open_RW,
            committed_RW=committed_RW,
            token_RW=found.token_RW,
            confidence_RW=found.confidence_RW.masked_fill(~open_RW, -torch.inf),
            entropy_RW=found.entropy_RW,
            change_RW=change_RW,
            verified_RW=None if found.given_RW is None else found.given_RW * committed_RW,
        )

    def _write(self, rows: Rows, view: View, changed_RW: Tensor, token_RW: Tensor) -> None:
        """Commits into the canvases; a place that is none of the row's writes nothing."""
        back_RW = changed_RW & (token_RW == self.tokens.mask)
        target_RW = torch.where(view.own_RW, view.place_RW, rows.ids_RL.shape[1])
        token_RW = torch.where(changed_RW, token_RW, rows.ids_RL.gather(1, view.place_RW))
        open_RW = (rows.open_RL.gather(1, view.place_RW) & ~changed_RW) | back_RW
        rows.ids_RL = _scattered(rows.ids_RL, target_RW, token_RW)
        rows.open_RL = _scattered(rows.open_RL, target_RW, open_RW)
        rows.changed_RL = _scattered(torch.zeros_like(rows.open_RL), target_RW, changed_RW)

    def _advance(self, rows: Rows, view: View, active_R: Tensor, acting_R: Tensor, last_R: Tensor | None) -> Tensor:
        """Steps are counted; rows whose block is complete go on to the next, or are done.

        Returns:
            bool [R]: those that go on.
        """
        complete_R = ~(view.block_RW & rows.open_RL.gather(1, view.place_RW)).any(1)
        if last_R is not None:  # also with a place left open, where the mask itself was proposed
            complete_R = complete_R | last_R
        next_R = acting_R & complete_R
        rows.step_R = rows.step_R + active_R
        rows.block_step_R = torch.where(next_R, 0, rows.block_step_R + acting_R)
        rows.block_R = rows.block_R + next_R
        rows.start_R = torch.where(next_R, rows.end_R, rows.start_R)
        rows.end_R = torch.where(next_R, torch.minimum(rows.end_R + rows.width_R, rows.places_R), rows.end_R)
        if self.config.early_stop and len(self._ends):
            rows.over_R = rows.over_R | answered(rows, self._ends, self.policy.revocable)
        return next_R

    def _lengthen(self, after_R: Tensor, count_R: Tensor, event: StepEvent | None) -> StepEvent | None:
        """Rows get more masks; the host waits for the device to know how many."""
        rows, counts = self.rows, count_R.tolist()
        assert rows is not None
        if not any(counts):
            return event
        if event is not None:
            row_G = count_R.nonzero()[:, 0]
            position_G = rows.place_RM[row_G, after_R[row_G]]
            grown = (value.cpu() for value in (row_G, position_G, count_R[row_G]))
            event = StepEvent(*event[:5], *grown)
        self.requests = [request.grown(count) for request, count in zip(self.requests, counts, strict=True)]
        self._sizes = list(map(size_of, self.requests))
        length, places = (max(column) for column in list(zip(*self._sizes, strict=True))[:2])
        self._before.insert(after_R, count_R, rows.place_RM.shape, places)
        self.rows = rows = rows.lengthened(after_R, count_R, length, places)
        first_end_R = torch.minimum(rows.start_R + rows.width_R, rows.places_R)
        rows.end_R = torch.where(rows.growing_R, first_end_R, rows.end_R)
        return event

    def _event(self, place_RW: Tensor, changed_RW: Tensor, token_RW: Tensor, probability_RW: Tensor) -> StepEvent:
        row_M, w_M = changed_RW.nonzero(as_tuple=True)
        values = (row_M, place_RW[row_M, w_M], token_RW[row_M, w_M], probability_RW[row_M, w_M])
        return StepEvent(0, *(value.cpu() for value in values))


def _scattered(old_RC: Tensor, column_RW: Tensor, new_RW: Tensor) -> Tensor:
    """A copy with new values at the columns; column C is beyond the end, and what is written there is left out."""
    return torch.nn.functional.pad(old_RC, (0, 1)).scatter(1, column_RW, new_RW)[:, :-1]
