"""What sampling gives back for many rows, also where some of them have no answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dllm.errors import NonFiniteError
from dllm.sampling.trace import Trace


@dataclass(frozen=True)
class SamplingResult:
    """What sampling gives back, one entry a row, in the order of the inputs."""

    sequences: list[Tensor]
    """int64 [length] each: prompt and answer, or the filled canvas; untrimmed."""
    texts: list[str]
    """The answer (generate: up to its first end token) or the whole filled text (infilling). Empty without a tokenizer."""
    nfe: int
    """Forwards of the network, those of guidance included."""
    steps: list[int]
    """Denoising steps of each row."""
    new_tokens: list[int]
    """Masks that were filled in each row; those that an early stop left open do not count."""
    trace: Trace | None = None
    """Every step, if it was asked for."""
    branches: int = 1
    """Forwards that a step counts: 2 with guidance."""
    exact: bool = True
    """Whether every step computed everything; a cache is an approximation, see docs/sampling.md."""

    @property
    def tokens_per_forward(self) -> float:
        """Tokens written a row and forward, the mean over rows: 1 is one at a time."""
        a_step = self.branches
        written = [
            tokens / (steps * a_step) for tokens, steps in zip(self.new_tokens, self.steps, strict=True) if steps
        ]
        return sum(written) / len(written) if written else 0.0

    def whole(self, failed: Mapping[int, NonFiniteError]) -> SamplingResult:
        """The result, if every row has an answer.

        Args:
            failed: the errors of the rows that have none.

        Raises:
            NonFiniteError: it names these rows, and has the others' answers in `result`.
        """
        if not failed:
            return self
        rows = sorted(failed)
        names = f"Row {rows[0]}" if len(rows) == 1 else f"Rows {', '.join(map(str, rows))}"
        others = len(self.sequences) - len(rows)
        kept = " The others have their answers, in this error's `result`." if others else ""
        error = NonFiniteError(f"{names} of {len(self.sequences)}: {failed[rows[0]]}{kept}")
        error.rows, error.result = tuple(rows), self
        raise error
