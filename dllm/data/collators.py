"""From rows to a batch: ids, what may be masked, and which sample each row is.

Shapes: B samples, L positions.

A batch has `input_ids` int64 [B, L], `maskable` bool [B, L] and `sample` int64 [B]. In training there is no attention mask:
pretraining rows are full, and in supervised fine-tuning the end-of-text padding is part of the text. Only where fine-tuning
is evaluated, and the rows differ in length, there is an `attention_mask` bool [B, L].

Packed rows hold D documents. There `sample` is int64 [D], `document` int64 [B, L] says which one a position is in (-1: none),
`position` int64 [B, L] where in it, and `row`, `step`, `place`, `of` (int64 [D]) where each document stands. Pretraining rows
whose documents must not see each other have `document_ids` int64 [B, L] alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm.diffusion.noise import Purpose, keyed_bits, keyed_uniform

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class PretrainingCollator:
    """Rows of equal length, everything maskable."""

    seed: int
    group: int
    """Samples of one optimiser step."""
    random_length: float = 0.01
    """The share of steps whose rows are cut to a length drawn from 1 .. L (LLaDA, arXiv:2502.09992, section 2.2)."""
    separator: int | None = None
    """The token that ends a document, where documents must not see each other; None where a row is one text."""

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        ids_BL = torch.tensor([row["input_ids"] for row in rows])
        samples_B = torch.tensor([row["sample"] for row in rows])
        step_B = samples_B // self.group
        # rows of one step agree, whatever rank or micro-batch they are in
        cut = keyed_uniform(self.seed, Purpose.CUT, step_B) < self.random_length
        if bool(cut.all()):
            ids_BL = ids_BL[:, : int(keyed_bits(self.seed, Purpose.CUT_LENGTH, step_B[0]) % ids_BL.shape[1]) + 1]
        batch = {"input_ids": ids_BL, "maskable": torch.ones_like(ids_BL, dtype=torch.bool), "sample": samples_B}
        if self.separator is not None:
            ends_BL = (ids_BL == self.separator).long()
            batch["document_ids"] = ends_BL.cumsum(1) - ends_BL  # a document's end belongs to it
        return batch


@dataclass(frozen=True, kw_only=True)
class SFTCollator:
    """One assistant turn of each conversation is the answer; what comes before it is the prompt, what comes after is cut.

    Rows are padded with end-of-text to the longest of the batch (to `pad_to` where the rows bring it: the longest of the
    whole step). That padding is attended to, and it is part of the answer in loss and length: it is how the model learns
    to end (LLaDA, arXiv:2502.09992, section 2.3 and GUIDELINES).

    Evaluation's rows stand for themselves: their answers end with their own end-of-turn, and padding is neither attended to
    nor maskable. A loss over padding would be one of mostly trivial tokens, as many as the longest row makes them.
    """

    seed: int
    eos_token_id: int
    evaluation: bool = False

    def answer(self, row: dict[str, Any], sample: int) -> tuple[int, int]:
        """(start, end) of the turn drawn for a sample: each of a conversation's turns is as likely."""
        draw = int(keyed_bits(self.seed, Purpose.TURN, sample)) % (len(row["turns"]) // 2)
        return row["turns"][2 * draw], row["turns"][2 * draw + 1]

    def length_of(self, row: dict[str, Any], sample: int) -> int:
        """Tokens of the row up to the end of its drawn answer."""
        return self.answer(row, sample)[1]

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        if "documents" in rows[0]:
            return self._packed(rows)
        answers = [self.answer(row, row["sample"]) for row in rows]
        longest = max(row.get("pad_to", end) for row, (_, end) in zip(rows, answers, strict=True))
        ids_BL = torch.full((len(rows), longest), self.eos_token_id)
        maskable_BL = torch.ones(len(rows), longest, dtype=torch.bool)
        for place, (row, (start, end)) in enumerate(zip(rows, answers, strict=True)):
            ids_BL[place, :end] = torch.tensor(row["input_ids"][:end])
            maskable_BL[place, :start] = False
        samples_B = torch.tensor([row["sample"] for row in rows])
        batch = {"input_ids": ids_BL, "maskable": maskable_BL, "sample": samples_B}
        if self.evaluation:
            real_BL = torch.arange(longest) < torch.tensor([end for _, end in answers])[:, None]
            batch["maskable"] = maskable_BL & real_BL
            if not bool(real_BL.all()):
                batch["attention_mask"] = real_BL
        return batch

    def _packed(self, rows: list[dict[str, Any]]) -> Batch:
        """Rows of `dllm.data.packing.PackedDataset`: every document is its drawn answer with what comes before it."""
        found = [(place, row, each) for place, row in enumerate(rows) for each in row["documents"]]
        answers = [self.answer(each, each["sample"]) for *_, each in found]
        lengths = [end + each["tail"] for (_, end), (*_, each) in zip(answers, found, strict=True)]
        used = [0] * len(rows)
        for (place, *_), length in zip(found, lengths, strict=True):
            used[place] += length
        ids_BL = torch.full((len(rows), max(used)), self.eos_token_id)
        maskable_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
        document_BL = torch.full_like(ids_BL, -1)
        position_BL = torch.zeros_like(ids_BL)
        filled, met, places = [0] * len(rows), [0] * len(rows), []
        for number, ((place, row, each), (start, end), length) in enumerate(zip(found, answers, lengths, strict=True)):
            begin = filled[place]
            ids_BL[place, begin : begin + end] = torch.tensor(each["input_ids"][:end])
            maskable_BL[place, begin + start : begin + length] = True
            document_BL[place, begin : begin + length] = number
            position_BL[place, begin : begin + length] = torch.arange(length)
            places.append(row["place"] + met[place])
            filled[place] += length
            met[place] += 1
        return {
            "input_ids": ids_BL,
            "maskable": maskable_BL,
            "document": document_BL,
            "position": position_BL,
            "sample": torch.tensor([each["sample"] for *_, each in found]),
            "row": torch.tensor([place for place, *_ in found]),
            "step": torch.tensor([row["step"] for _, row, _ in found]),
            "place": torch.tensor(places),
            "of": torch.tensor([row["of"] for _, row, _ in found]),
        }
