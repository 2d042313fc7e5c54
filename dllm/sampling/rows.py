"""The state of the rows that are being denoised: everything a step reads or writes, as tensors on the device.

Shapes: R rows, L positions of the longest, M masks of the row with the most, W places of the widest block.

A row is a canvas of its own length. Its masks in reading order are its *places*; a block is a range of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.errors import NonFiniteError, OptionError
from dllm.sampling.config import SamplingConfig


class SpecialTokens(NamedTuple):
    """The ids that the loop has to know."""

    mask: int
    """Stands for "not known yet"."""
    eos: tuple[int, ...] = ()
    """Never candidates with `suppress_eos`; the first fills what an early stop leaves open."""
    ends: tuple[int, ...] = ()
    """End of text and end of turn: committed last with `eos_last`; an answer is over at the first of them."""
    delimiters: tuple[int, ...] = ()
    """Where block policy adablock ends a block, unless the settings say it."""


class Request(NamedTuple):
    """A canvas to be filled in."""

    canvas: Tensor
    """int64 [length], on the CPU."""
    masked: Tensor
    """bool [length]: where to write."""
    config: SamplingConfig
    number: int
    """Keys the noise, with the seed."""

    @property
    def most_places(self) -> int:
        """How many masks it may have in the end: those of the canvas; with length policy daedal up to `gen_length`."""
        places = int(self.masked.sum())
        return max(places, self.config.gen_length) if self.config.length_policy == "daedal" else places

    @property
    def most_positions(self) -> int:
        """How long the canvas may become."""
        return len(self.canvas) + self.most_places - int(self.masked.sum())

    def grown(self, count: int) -> Request:
        """The request with so many more masks at its end."""
        if not count:
            return self
        canvas = torch.cat([self.canvas, self.canvas[-1:].expand(count)])
        return self._replace(canvas=canvas, masked=torch.cat([self.masked, self.masked.new_ones(count)]))


class Finished(NamedTuple):
    """A row that has left its batch."""

    name: Hashable
    canvas: Tensor
    """int64 [length], on the CPU."""
    steps: int
    written: int
    """Masks that were filled; less than it had where an early stop left some open."""
    failed: bool
    """The model gave something that is no number; the canvas is what it was before."""

    @property
    def error(self) -> NonFiniteError | None:
        """What is wrong, if it failed."""
        if not self.failed:
            return None
        return NonFiniteError(
            f"The model's logits are not numbers (NaN or infinite) at step {self.steps}: its weights may be damaged, or too "
            f"large for their dtype (load it as bfloat16 or float32)."
        )


class Progress(NamedTuple):
    """How far a row is."""

    name: Hashable
    start: int
    """Places of the blocks that are complete."""
    written: int
    """Masks that are filled."""
    done: bool


@dataclass
class Rows:
    """R rows. A field's suffix says its shape."""

    ids_RL: Tensor
    """int64: the canvases; what pads them on the right is never read."""
    open_RL: Tensor
    """bool: to be written, not committed yet."""
    given_RL: Tensor
    """bool: hidden from guidance's unconditional branch."""
    changed_RL: Tensor
    """bool: committed, or taken back, at the row's last step."""
    length_R: Tensor
    """int64: positions of the canvas."""
    place_RM: Tensor
    """int64: positions of the places, in reading order; 0 beyond the row's own."""
    memory_RM: Tensor
    """fp32: what the policy remembers of each place."""
    places_R: Tensor
    """int64: how many places the row has."""
    most_R: Tensor
    """int64: how many it may have in the end."""
    width_R: Tensor
    """int64: places of a block."""
    window_R: Tensor
    """int64: places of a block's window, where block policy adablock looks for its end."""
    steps_R: Tensor
    """int64: steps for all blocks together, -1 for one a token."""
    start_R: Tensor
    """int64: the current block's first place."""
    end_R: Tensor
    """int64: one past its last place."""
    block_R: Tensor
    """int64: the current block's number."""
    block_step_R: Tensor
    """int64: steps taken in it."""
    step_R: Tensor
    """int64: steps taken in all."""
    growing_R: Tensor
    """bool: its length is still being found, before anything is committed."""
    moved_R: Tensor
    """bool: it became longer at its last step: nothing lies where it lay before."""
    over_R: Tensor
    """bool: stopped early."""
    failed_R: Tensor
    """bool: the model gave something that is no number."""
    request_R: Tensor
    """int64: keys the noise, as the seed."""
    seed_R: Tensor
    temperature_R: Tensor
    """fp64."""
    guidance_R: Tensor
    """fp32: cfg_scale."""

    def __len__(self) -> int:
        return len(self.length_R)

    @property
    def done_R(self) -> Tensor:
        """bool: nothing is left to do."""
        return (self.start_R >= self.places_R) | self.over_R | self.failed_R

    @property
    def real_RL(self) -> Tensor:
        """bool: positions of the row itself, not of its padding."""
        return torch.arange(self.ids_RL.shape[1], device=self.ids_RL.device) < self.length_R[:, None]

    def to(self, device: torch.device | str) -> Rows:
        """A copy there; Apple's GPUs have no fp64."""
        narrow = torch.device(device).type == "mps"

        def moved(value: Tensor) -> Tensor:
            return (value.float() if narrow and value.dtype == torch.float64 else value).to(device, non_blocking=True)

        return Rows(**{name: moved(value) for name, value in vars(self).items()})

    def kept(self, index_R: Tensor, length: int, places: int) -> Rows:
        """The rows of these numbers, cut to the positions and places that the longest of them has."""
        sizes = {"RL": length, "RM": places}
        return Rows(
            **{
                name: value[index_R] if name.endswith("_R") else value[index_R, : sizes[name[-2:]]]
                for name, value in vars(self).items()
            }
        )

    def joined(self, other: Rows) -> Rows:
        """These rows and then those, on one device."""
        return Rows(**{name: torch.cat(_padded(value, getattr(other, name))) for name, value in vars(self).items()})

    def lengthened(self, after_R: Tensor, count_R: Tensor, length: int, places: int) -> Rows:
        """Rows with more masks: behind one of its places each gets as many copies of it, and what follows moves.

        Args:
            after_R: int64 [R], the place, by its number among the row's places; it is open.
            count_R: int64 [R], how many masks are added; 0 leaves the row as it is.
            length: positions of the longest row then.
            places: places of the row with the most then.

        Returns:
            The rows; a current block that the place is in has become longer too, and the new places remember nothing.
        """
        device, after_R1, count_R1 = self.length_R.device, after_R[:, None], count_R[:, None]
        length_R, places_R = self.length_R + count_R, self.places_R + count_R
        position_R1 = self.place_RM.gather(1, after_R1)

        def origin(width: int, at_R1: Tensor) -> Tensor:
            """int64 [R, width]: what stood where, before."""
            new_W = torch.arange(width, device=device)
            return torch.where(new_W <= at_R1, new_W, torch.maximum(new_W - count_R1, at_R1))

        def moved(old_RC: Tensor, origin_RC: Tensor, count_R: Tensor) -> Tensor:
            inside_RC = torch.arange(origin_RC.shape[1], device=device) < count_R[:, None]
            return old_RC.gather(1, origin_RC.clamp(max=old_RC.shape[1] - 1)).masked_fill(~inside_RC, 0)

        origin_RL, origin_RM = origin(length, position_R1), origin(places, after_R1)
        new_M = torch.arange(places, device=device)
        shift_RM = (new_M - after_R1).clamp(min=0).minimum(count_R1)
        place_RM = moved(self.place_RM, origin_RM, places_R) + shift_RM
        copied_RM = (new_M > after_R1) & (new_M <= after_R1 + count_R1)
        inside_R = (self.start_R <= after_R) & (after_R < self.end_R)
        fields = {name: moved(value, origin_RL, length_R) for name, value in vars(self).items() if name.endswith("_RL")}
        return dataclasses.replace(
            self,
            **fields,
            length_R=length_R,
            places_R=places_R,
            place_RM=place_RM.masked_fill(new_M >= places_R[:, None], 0),
            memory_RM=moved(self.memory_RM, origin_RM, places_R).masked_fill(copied_RM, 0),
            end_R=self.end_R + count_R * inside_R,
            moved_R=self.moved_R | (count_R > 0),
        )


def _padded(one: Tensor, two: Tensor) -> list[Tensor]:
    if one.dim() == 1:
        return [one, two]
    columns = max(one.shape[1], two.shape[1])
    return [torch.nn.functional.pad(x, (0, columns - x.shape[1])) for x in (one, two)]


class Size(NamedTuple):
    """What the host knows of a row."""

    length: int
    """Positions of the canvas."""
    places: int
    """Masks, at least 1."""
    width: int
    """Places of its widest block, as far as `block_length` says."""
    window: int
    """Places among which block policy adablock looks for a block's end; 0 with another."""


def size_of(request: Request) -> Size:
    """The request's size in positions."""
    places, most, window = max(1, int(request.masked.sum())), max(1, request.most_places), 0
    if request.config.block_policy == "adablock":
        window = math.floor(request.config.block_options["delimiter_window"] * most)
    return Size(len(request.canvas), places, min(most, request.config.block_length or most), window)


def most_in_block(request: Request) -> int:
    """Places that a block of the request may have in the end."""
    size = size_of(request)
    return request.most_places if request.config.length_policy == "daedal" else max(size.width, size.window)


def rows_of(requests: Sequence[Request], mask_token_id: int) -> Rows:
    """The state of new rows, on the CPU.

    Raises:
        OptionError: fewer steps than blocks.
    """
    length_R = torch.tensor([len(request.canvas) for request in requests])
    masked_RL = _stacked([request.masked for request in requests], False)
    ids_RL = _stacked([request.canvas for request in requests], mask_token_id).masked_fill(masked_RL, mask_token_id)
    given_RL = _stacked([~request.masked for request in requests], False)
    places_R, sizes = masked_RL.sum(1), list(map(size_of, requests))
    width_R = torch.tensor([size.width for size in sizes])
    place_RM = masked_RL.long().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(places_R.max()))]
    for row, request in enumerate(requests):
        check_steps(request)
        for token in request.config.cfg_keep_tokens:
            given_RL[row] &= ids_RL[row] != token
    zero_R = torch.zeros_like(length_R)
    configs = [request.config for request in requests]
    return Rows(
        ids_RL=ids_RL,
        open_RL=masked_RL,
        given_RL=given_RL,
        changed_RL=torch.zeros_like(masked_RL),
        length_R=length_R,
        place_RM=place_RM,
        memory_RM=torch.zeros(place_RM.shape),
        places_R=places_R,
        most_R=torch.tensor([request.most_places for request in requests]),
        width_R=width_R,
        window_R=torch.tensor([size.window for size in sizes]),
        steps_R=torch.tensor([-1 if config.steps is None else config.steps for config in configs]),
        start_R=zero_R,
        end_R=torch.minimum(width_R, places_R),
        block_R=zero_R,
        block_step_R=zero_R,
        step_R=zero_R,
        growing_R=torch.tensor([config.length_policy == "daedal" for config in configs]),
        moved_R=torch.zeros_like(length_R, dtype=torch.bool),
        over_R=torch.zeros_like(length_R, dtype=torch.bool),
        failed_R=torch.zeros_like(length_R, dtype=torch.bool),
        request_R=torch.tensor([_int64(request.number) for request in requests]),
        seed_R=torch.tensor([_int64(config.seed) for config in configs]),
        temperature_R=torch.tensor([config.temperature for config in configs], dtype=torch.float64),
        guidance_R=torch.tensor([float(config.cfg_scale) for config in configs]),
    )


def compacted(rows: int, leaving: Collection[int]) -> list[int]:
    """The rows that stay, in the order that moves fewest: the last ones fill the holes of those that leave.

    What is kept of a row in a cache is large, and rows keep no order among themselves.

    Args:
        rows: how many there are.
        leaving: the numbers of those that leave.
    """
    away = set(leaving)
    count = rows - len(away)
    late = [row for row in range(count, rows) if row not in away]
    return [late.pop() if row in away else row for row in range(count)]


def check_steps(request: Request) -> None:
    """Raises OptionError where the request has fewer steps than blocks."""
    config, places = request.config, int(request.masked.sum())
    blocks = -(-places // size_of(request).width)
    if config.steps is not None and config.steps < blocks:
        raise OptionError(
            f"steps={config.steps} is fewer than the {blocks} blocks of block_length={config.block_length}: every block needs "
            f"a step. Raise steps to {blocks} or more, or raise block_length."
        )


def scheduled(rows: Rows) -> tuple[Tensor, Tensor]:
    """The fixed schedule: (tokens that each row commits now, whether its block's steps are then used up).

    `steps` are shared evenly over the blocks, the places of a block evenly over its steps, the first ones taking what is left
    over; a step that would commit nothing is left out.

    Returns:
        int64 [R], bool [R].
    """
    places_R = rows.end_R - rows.start_R
    blocks_R = (-(-rows.places_R // rows.width_R)).clamp(min=1)
    share_R = rows.steps_R // blocks_R + (rows.block_R < rows.steps_R % blocks_R).long()
    share_R = torch.where(rows.steps_R < 0, places_R, torch.minimum(share_R, places_R)).clamp(min=1)
    count_R = places_R // share_R + (rows.block_step_R < places_R % share_R).long()
    return count_R, rows.block_step_R + 1 >= share_R


def answered(rows: Rows, ends: Tensor, revocable: bool) -> Tensor:
    """bool [R]: everything up to a row's first end token is final, and there is one.

    Args:
        rows: their state.
        ends: int64, the end tokens.
        revocable: whether tokens of the current block may still become masks.
    """
    place_M = torch.arange(rows.place_RM.shape[1], device=rows.place_RM.device)
    own_RM = place_M < rows.places_R[:, None]
    final_RM = own_RM & ~rows.open_RL.gather(1, rows.place_RM)
    if revocable:
        final_RM = final_RM & (place_M < rows.start_R[:, None])
    ends_RM = final_RM & torch.isin(rows.ids_RL.gather(1, rows.place_RM), ends)
    far = rows.place_RM.shape[1]
    first_end_R = torch.where(ends_RM, place_M, far).amin(1)
    first_unsure_R = torch.where(own_RM & ~final_RM, place_M, far).amin(1)
    return (first_end_R < first_unsure_R) & (first_end_R < far)


def _stacked(values: Sequence[Tensor], fill: int | bool) -> Tensor:
    """[length] of each row -> [R, L], padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=fill)


def _int64(number: int) -> int:
    """A whole number of any size as a signed one of 64 bits, as the noise's keys take it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
