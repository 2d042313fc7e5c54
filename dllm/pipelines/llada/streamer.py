"""transformers' streamer of drafts, with a sign in place of each mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextDiffusionStreamer

SIGN = "_"
"""It is a token of its own in byte-level vocabularies."""


class DraftStreamer(TextDiffusionStreamer):
    """Prints the answer of `Engine.stream` in the terminal: blocks that are complete, and after them the draft in yellow.

    A mask of a draft is shown as `_`; a tokenizer that has no such token shows its mask token, as transformers' own streamer
    does.

    Args:
        tokenizer: of the model.
        **options: of transformers' TextDiffusionStreamer: `skip_prompt`, `sleep_time`, and what `decode` takes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        ids = tokenizer(SIGN, add_special_tokens=False)["input_ids"]
        self.mask = tokenizer.mask_token_id
        self.sign = ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else self.mask

    def put_draft(self, value: Tensor, **logits: Any) -> None:
        """Prints a draft, int64 [length], over the one before it."""
        super().put_draft(value.masked_fill(value == self.mask, self.sign), **logits)
