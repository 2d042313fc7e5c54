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
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.sampling.config import SamplingConfig
from dllm.sampling.network import Network, Reuse
from dllm.sampling.packing import Blocks, pack, pack_with_shadow
from dllm.sampling.policies import POLICIES
from dllm.sampling.proposals import Keys, Proposals, Question, chance, propose
from dllm.sampling.rows import Request, Rows, Size, SpecialTokens, compacted, rows_of, scheduled, size_of
from dllm.sampling.statistics import Statistics
from dllm.sampling.trace import StepEvent


class Finished(NamedTuple):
    """A row that has left its batch."""

    name: Hashable
    canvas: Tensor
    """int64 [length], on the CPU."""
    steps: int
    failed: bool
    """The model gave something that is no number; the canvas is what it was before."""


class Progress(NamedTuple):
    """How far a row is."""

    name: Hashable
    start: int
    """Places of the blocks that are complete."""
    done: bool


LAG = 2
"""Steps after which the host reads which rows are done, where it must not wait for the device."""


def alike(config: SamplingConfig) -> SamplingConfig:
    """What rows of one batch must have in common; the rest is each row's own."""
    return dataclasses.replace(
        config,
        gen_length=1,
        steps=None,
        block_length=None,
        temperature=float(config.temperature > 0),
        cfg_scale=float(config.cfg_scale > 0),
        cfg_keep_tokens=(),
        seed=0,
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
        self.branches = 2 if config.cfg_scale > 0 else 1
        self.rows: Rows | None = None
        self.names: list[Hashable] = []
        self.requests: list[Request] = []
        self._sizes: list[Size] = []  # of each row: what the host knows without asking the device
        self.nfe = 0
        self._ends = torch.tensor(tokens.ends, dtype=torch.int64, device=device)
        self._needs = self.policy.needs
        # a policy that decides by itself would wait for ever for a place whose candidate is the mask
        mask = () if config.policy == "fixed" else (tokens.mask,)
        self._never = mask + (tuple(tokens.eos) if config.suppress_eos else ())
        self._asked = frozenset(
            ({"second"} if config.remasking == "margin" else set())
            | ({"entropy"} if "entropy" in self._needs or config.remasking == "entropy" else set())
            | ({"distribution"} if "change" in self._needs else set())
        )
        self._before: tuple[Tensor, Tensor] | None = None  # log p [R, M, V] and where it is known [R, M]: for "change"

    def __len__(self) -> int:
        return len(self.names)

    def add(self, requests: Sequence[Request], names: Sequence[Hashable]) -> None:
        """Rows join; they take part from the next step on.

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
            shadow = self._width if "verified" in self._needs else 0
            self.reuse.admit(len(self.rows) * self.branches, self.rows.ids_RL.shape[1] + shadow)

    @property
    def _width(self) -> int:
        """W."""
        return max(size.width for size in self._sizes)

    def look(self) -> list[Progress]:
        """How far the rows are; without waiting for the device, how far they were some steps ago. Once after each step."""
        if self.rows is None:
            return []
        names, state_2R, event = list(self.names), torch.stack([self.rows.start_R, self.rows.done_R.long()]), None
        if not self.waits:
            if state_2R.device.type == "cuda":
                state_2R = state_2R.to("cpu", non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._looks.append((names, state_2R, event))
            if len(self._looks) <= LAG:
                return []
            names, state_2R, event = self._looks.popleft()
            if event is not None:
                event.synchronize()
        here = set(self.names)
        found = zip(names, *state_2R.tolist(), strict=True)
        return [Progress(name, start, bool(done)) for name, start, done in found if name in here]

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
        canvases, steps, failed = ids_RL.cpu(), rows.step_R[index].tolist(), rows.failed_R[index].tolist()
        gone = [
            Finished(self.names[row], canvases[i, : len(self.requests[row].canvas)].clone(), steps[i], failed[i])
            for i, row in enumerate(leaving)
        ]
        stay = compacted(len(rows), leaving)
        self.names = [self.names[row] for row in stay]
        self.requests = [self.requests[row] for row in stay]
        self._sizes = [self._sizes[row] for row in stay]
        if not stay:
            self.rows = self._before = None
            self._looks.clear()
        else:
            length, places = (max(column) for column in list(zip(*self._sizes, strict=True))[:2])
            index = torch.tensor(stay, device=self.device)
            self.rows = rows.kept(index, length, places)
            if self._before is not None:
                log_p_RMV, known_RM = self._remembered(rows, self._before[0].shape[2])
                self._before = (log_p_RMV[index, :places], known_RM[index, :places])
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
        W = self._width
        offset_RW = rows.start_R[:, None] + torch.arange(W, device=self.device)
        valid_RW = offset_RW < rows.end_R[:, None]
        offset_RW = offset_RW.clamp(max=rows.place_RM.shape[1] - 1)
        place_RW = rows.place_RM.gather(1, offset_RW)
        open_RW = valid_RW & rows.open_RL.gather(1, place_RW)
        statistics, probability_RW = self._statistics(rows, place_RW, valid_RW, open_RW, offset_RW)
        self.nfe += self.branches

        count_R, last_R = scheduled(rows)
        memory_RW = rows.memory_RM.gather(1, offset_RW)
        decision = self.policy.decide(statistics, memory_RW, count_R, **self.options)
        M = rows.place_RM.shape[1]
        rows.memory_RM = _scattered(rows.memory_RM, torch.where(valid_RW, offset_RW, M), decision.memory_RW)
        rows.failed_R |= (open_RW & ~probability_RW.isfinite()).any(1)
        active_R1 = ~rows.done_R[:, None]
        # a model may propose the mask itself: as in the published sampler, such a place uses up its turn and stays open
        commit_RW = decision.commit_RW & open_RW & active_R1 & (statistics.token_RW != self.tokens.mask)
        changed_RW = commit_RW
        token_RW = statistics.token_RW
        if decision.remask_RW is not None:
            back_RW = decision.remask_RW & statistics.committed_RW & active_R1
            token_RW = torch.where(back_RW, self.tokens.mask, token_RW)
            changed_RW = commit_RW | back_RW
        self._write(rows, place_RW, valid_RW, changed_RW, token_RW)
        event = self._event(place_RW, changed_RW, token_RW, probability_RW) if self.watch else None
        self._advance(rows, place_RW, valid_RW, last_R if self.config.policy == "fixed" else None)
        return event

    def _statistics(
        self, rows: Rows, place_RW: Tensor, valid_RW: Tensor, open_RW: Tensor, offset_RW: Tensor
    ) -> tuple[Statistics, Tensor]:
        """The forward, and what it says of the current blocks; the candidates' probabilities [R, W] beside it."""
        committed_RW = valid_RW & ~open_RW
        asked_RW = valid_RW if "verified" in self._needs else open_RW
        if self.waits:
            row_N, w_N = asked_RW.nonzero(as_tuple=True)
        else:
            place_N = torch.arange(asked_RW.numel(), device=self.device)
            row_N, w_N = place_N // asked_RW.shape[1], place_N % asked_RW.shape[1]
        position_N = place_RW[row_N, w_N]
        keys = Keys(rows.seed_R[row_N], rows.request_R[row_N], position_N, rows.step_R[row_N])
        question = Question(
            keys,
            self._never,
            rows.temperature_R[row_N] if self.config.temperature > 0 else None,
            rows.guidance_R[row_N] if self.branches == 2 else None,
            self._asked,
            rows.ids_RL[row_N, position_N] if "verified" in self._needs else None,
        )
        blocks = Blocks(place_RW, valid_RW, open_RW)
        if "verified" in self._needs:
            work = pack_with_shadow(
                rows, blocks, row_N, w_N, branches=self.branches, mask=self.tokens.mask, reuse=self.reuse
            )
        else:
            lengths_P = [size.length for size in self._sizes for _ in range(self.branches)]
            work = pack(
                rows,
                blocks,
                (row_N, w_N),
                lengths_P,
                branches=self.branches,
                mask=self.tokens.mask,
                reuse=self.reuse,
                waits=self.waits,
            )
        found = self.network(work, lambda head, hidden_MD: propose(head, hidden_MD, question))

        def spread(values_N: Tensor, fill: float = 0) -> Tensor:
            return torch.full(open_RW.shape, fill, dtype=values_N.dtype, device=self.device).index_put(
                (row_N, w_N), values_N
            )

        confidence_N = found.probability_N
        if self.config.remasking == "random":
            confidence_N = chance(keys)
        elif self.config.remasking == "margin":
            assert found.second_N is not None
            confidence_N = found.best_N - found.second_N
        elif self.config.remasking == "entropy":
            assert found.entropy_N is not None
            confidence_N = -found.entropy_N
        if self.config.eos_last:
            # below every other, their own order kept; an entropy is at most the log of the vocabulary
            lower = 64 if self.config.remasking == "entropy" else 2
            confidence_N = confidence_N - lower * torch.isin(found.token_N, self._ends)
        statistics = Statistics(
            position_RW=place_RW,
            open_RW=open_RW,
            committed_RW=committed_RW,
            token_RW=spread(found.token_N),
            confidence_RW=spread(confidence_N, -torch.inf).masked_fill(~open_RW, -torch.inf),
            entropy_RW=None if found.entropy_N is None else spread(found.entropy_N),
            change_RW=self._change(rows, found, (row_N, w_N), offset_RW, valid_RW, spread),
            verified_RW=None if found.given_N is None else spread(found.given_N) * committed_RW,
        )
        return statistics, spread(found.probability_N)

    def _change(
        self,
        rows: Rows,
        found: Proposals,
        asked: tuple[Tensor, Tensor],
        offset_RW: Tensor,
        valid_RW: Tensor,
        spread: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        """KL(p_t || p_t-1) of each asked place, whose distribution is kept for the next step."""
        if found.log_p_NV is None:
            return None
        row_N, w_N = asked
        log_p_RMV, known_RM = self._remembered(rows, found.log_p_NV.shape[1])
        offset_N = offset_RW[row_N, w_N]
        p_NV = found.log_p_NV.exp()
        gap_NV = torch.where(p_NV > 0, p_NV * (found.log_p_NV - log_p_RMV[row_N, offset_N]), 0)
        change_N = torch.where(known_RM[row_N, offset_N], gap_NV.sum(1).clamp(min=0), torch.inf)
        log_p_RMV[row_N, offset_N] = found.log_p_NV
        # beyond a block narrower than W are places of the next, whose first step is still to come
        column_RW = torch.where(valid_RW, offset_RW, known_RM.shape[1])
        self._before = (log_p_RMV, _scattered(known_RM, column_RW, torch.ones_like(valid_RW)))
        return spread(change_N)

    def _remembered(self, rows: Rows, V: int) -> tuple[Tensor, Tensor]:
        """What `_before` holds, with room for rows that have joined since: copied only if there was none."""
        R, M = len(rows), rows.place_RM.shape[1]
        log_p_RMV, known_RM = self._before or (
            torch.zeros(0, M, V, device=self.device),
            torch.zeros(0, M, dtype=torch.bool, device=self.device),
        )
        if known_RM.shape == (R, M):
            return log_p_RMV, known_RM
        more_rows, more_places = R - len(known_RM), M - known_RM.shape[1]
        return (
            torch.nn.functional.pad(log_p_RMV, (0, 0, 0, more_places, 0, more_rows)),
            torch.nn.functional.pad(known_RM, (0, more_places, 0, more_rows)),
        )

    def _write(self, rows: Rows, place_RW: Tensor, valid_RW: Tensor, changed_RW: Tensor, token_RW: Tensor) -> None:
        """Commits into the canvases; a place beyond the row's own block writes nothing."""
        back_RW = changed_RW & (token_RW == self.tokens.mask)
        target_RW = torch.where(valid_RW, place_RW, rows.ids_RL.shape[1])
        token_RW = torch.where(changed_RW, token_RW, rows.ids_RL.gather(1, place_RW))
        open_RW = (rows.open_RL.gather(1, place_RW) & ~changed_RW) | back_RW
        rows.ids_RL = _scattered(rows.ids_RL, target_RW, token_RW)
        rows.open_RL = _scattered(rows.open_RL, target_RW, open_RW)
        rows.changed_RL = _scattered(torch.zeros_like(rows.open_RL), target_RW, changed_RW)

    def _advance(self, rows: Rows, place_RW: Tensor, valid_RW: Tensor, last_R: Tensor | None) -> None:
        """Steps are counted; rows whose block is complete go on to the next, or are done."""
        active_R = ~rows.done_R
        complete_R = ~(valid_RW & rows.open_RL.gather(1, place_RW)).any(1)
        if last_R is not None:  # also with a place left open, where the mask itself was proposed
            complete_R = complete_R | last_R
        next_R = active_R & complete_R
        rows.step_R = rows.step_R + active_R
        rows.block_step_R = torch.where(next_R, 0, rows.block_step_R + active_R)
        rows.block_R = rows.block_R + next_R
        rows.start_R = torch.where(next_R, rows.end_R, rows.start_R)
        rows.end_R = torch.where(next_R, torch.minimum(rows.end_R + rows.width_R, rows.places_R), rows.end_R)
        if self.config.early_stop and len(self._ends):
            place = torch.arange(rows.place_RM.shape[1], device=self.device)
            open_RM = rows.open_RL.gather(1, rows.place_RM) & (place < rows.places_R[:, None])
            final_RM = ~open_RM & (place < rows.places_R[:, None])
            if self.policy.revocable:
                final_RM = final_RM & (place < rows.start_R[:, None])
            ends_RM = final_RM & torch.isin(rows.ids_RL.gather(1, rows.place_RM), self._ends)
            unsure_RM = ~final_RM & (place < rows.places_R[:, None])
            far = rows.place_RM.shape[1]
            first_end_R = torch.where(ends_RM, place, far).amin(1)
            first_unsure_R = torch.where(unsure_RM, place, far).amin(1)
            rows.over_R = rows.over_R | (first_end_R < first_unsure_R) & (first_end_R < far)

    def _event(self, place_RW: Tensor, changed_RW: Tensor, token_RW: Tensor, probability_RW: Tensor) -> StepEvent:
        row_M, w_M = changed_RW.nonzero(as_tuple=True)
        values = (row_M, place_RW[row_M, w_M], token_RW[row_M, w_M], probability_RW[row_M, w_M])
        return StepEvent(0, *(value.cpu() for value in values))


def _scattered(old_RC: Tensor, column_RW: Tensor, new_RW: Tensor) -> Tensor:
    """A copy with new values at the columns; column C is beyond the end, and what is written there is left out."""
    return torch.nn.functional.pad(old_RC, (0, 1)).scatter(1, column_RW, new_RW)[:, :-1]
