"""What a run says about itself: nats per token by time, tokens a second, the share of the device's peak, memory, time left.

Shapes: B samples, L positions, N masked positions, Q = 4 quarters of [0, 1].

Sums stay on the device and are read where the log is written, so no step waits for them. They are sums over tokens, not
means of means: one process, several, and accumulated micro-batches say the same.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dllm.diffusion.schedule import time_of
from dllm.layers.experts import Experts

QUARTERS = ("t0_25", "t25_50", "t50_75", "t75_100")
"""Names of the quarters of t: the share masked, in per cent."""
COLUMNS = 2 * len(QUARTERS) + 2
"""What `row_sums` gives of a row."""
_WEIGHTED, _MASKABLE = COLUMNS - 2, COLUMNS - 1

PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "MI300X": 1307e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 products with fp32 sums, in floating-point operations a second, from the makers' data sheets.

A name that holds another stands before it."""


def row_sums(nll_N: Tensor, weight_BL: Tensor, masked_BL: Tensor, maskable_BL: Tensor) -> Tensor:
    """What each row adds to the metrics; sums of rows are again what `nll_metrics` reads.

    The quarter of a masked token follows from its weight 1 / p, so rows may be packed of several samples.

    Args:
        nll_N: nats at the masks, in row order.
        weight_BL: 1 / p at the masks.
        masked_BL: bool, N of them True.
        maskable_BL: bool.

    Returns:
        fp64 [B, 2Q + 2] (fp32 where the device has no fp64): nats by quarter, masked tokens by quarter, weighted nats,
        maskable tokens. No order of threads enters: the same batch gives the same bits.
    """
    dtype = torch.float32 if nll_N.device.type == "mps" else torch.float64
    # unlike indexing with a mask, this does not wait for the device
    nll_BL = torch.zeros_like(weight_BL).masked_scatter(masked_BL, nll_N.detach().to(weight_BL.dtype)).to(dtype)
    t_BL = time_of(1 / weight_BL.masked_fill(~masked_BL, 1.0))
    quarter_BL = (t_BL * len(QUARTERS)).long().clamp(0, len(QUARTERS) - 1)
    here = [masked_BL & (quarter_BL == q) for q in range(len(QUARTERS))]
    nats = [nll_BL.masked_fill(~inside_BL, 0.0).sum(1) for inside_BL in here]
    counts = [inside_BL.sum(1).to(dtype) for inside_BL in here]
    return torch.stack([*nats, *counts, (nll_BL * weight_BL).sum(1), maskable_BL.sum(1).to(dtype)], 1)


def nll_metrics(sums: Sequence[float], *, prefix: str = "", whole: bool = True) -> dict[str, float]:
    """The metrics of summed rows, in nats.

    Args:
        sums: [2Q + 2], of `row_sums`.
        prefix: stands before every name.
        whole: whether the times spanned [0, 1]; if not, there is no bound.

    Returns:
        nll: the evidence bound per token, sum of CE / p over maskable tokens; ppl: its exponential, no less than the
        perplexity; masked_nll: the mean cross-entropy of masked tokens; nll_t0_25 and so on: the same within a quarter of t.
        What nothing was counted of is left out.
    """
    quarters = len(QUARTERS)
    found: dict[str, float] = {}
    if whole and sums[_MASKABLE]:
        found["nll"] = sums[_WEIGHTED] / sums[_MASKABLE]
        found["ppl"] = math.exp(found["nll"]) if found["nll"] < 700 else math.inf
    masked = sum(sums[quarters : 2 * quarters])
    if masked:
        found["masked_nll"] = sum(sums[:quarters]) / masked
    for place, name in enumerate(QUARTERS):
        if sums[quarters + place]:
            found[f"nll_{name}"] = sums[place] / sums[quarters + place]
    return {f"{prefix}{name}": value for name, value in found.items()}


class Work(NamedTuple):
    """Floating-point operations of a training step (forward and backward; nothing that is computed anew)."""

    a_token: float
    """Of a position, attention's products and the head aside."""
    a_pair: float
    """Of a pair of positions that see each other."""
    a_mask: float
    """The head's, of a masked position: no other has logits."""


def work(model: nn.Module) -> Work:
    """Counts a model's operations: 6 for each weight that a token meets (4 if it is frozen), 12 D a layer and pair.

    Of a mixture's experts only those that a token is sent to count. Source: PaLM, arXiv:2204.02311, appendix B.
    """
    config: Any = model.config
    head = model.get_output_embeddings()  # type: ignore[operator]
    a_token = 0.0
    for module in model.modules():
        if isinstance(module, Experts):
            sizes = [math.prod(getattr(p, "ds_shape", p.shape)) for p in module.parameters()]
            share = config.num_experts_per_tok / module.num_experts
            trained = any(p.requires_grad for p in module.parameters())
            a_token += _per_weight(trained) * sum(sizes) * share
        elif isinstance(module, nn.Linear) and module is not head:
            # the sizes that the layer was made with: its weight may be packed into 4 bits, or lie on other devices
            a_token += _per_weight(module.weight.requires_grad) * module.in_features * module.out_features
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    a_head = _per_weight(head.weight.requires_grad) * config.vocab_size * config.hidden_size
    return Work(a_token, 12.0 * config.num_hidden_layers * width, float(a_head))


def _per_weight(trained: bool) -> int:
    return 6 if trained else 4


def peak_of(device: torch.device) -> float | None:
    """Dense bf16 operations a second of a device; None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held, in GiB: the device's, or on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (2**30 if sys.platform == "darwin" else 2**20)


class Meter:
    """Counts what happens between two lines of the log.

    Args:
        device: where the sums lie.
        work: of the model; None where MFU is not to be told.
        whole: whether the times of training span [0, 1].
    """

    def __init__(self, device: torch.device, work: Work | None, *, whole: bool) -> None:
        self.work, self.whole = work, whole
        self.peak = peak_of(device)
        self.device = device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(COLUMNS, dtype=dtype, device=device)
        self.positions = torch.zeros(2, dtype=dtype, device=device)  # positions, and pairs that attend to each other
        self.began: float | None = None
        """When the interval began, on the monotonic clock; what is left out moves it."""
        self.first: tuple[float, int] = (0.0, 0)
        self.tokens = 0
        """Positions of the last interval that was read."""

    def start(self, step: int) -> None:
        """Starts the clock, before the first forward; does nothing where it runs.

        Args:
            step: the steps done before this one.
        """
        if self.began is None:
            self.began = time.monotonic()
            self.first = (self.began, step)

    def add(self, rows: Tensor, inputs: dict[str, Tensor], step: int) -> None:
        """Adds a micro-batch.

        Args:
            rows: of `row_sums`.
            inputs: the batch; see `seen`.
            step: the steps done before this one.
        """
        self.start(step)
        self.sums += rows.sum(0)
        self.positions += torch.stack(seen(inputs)).to(self.positions.dtype)

    def vector(self) -> Tensor:
        """[2Q + 5], what is added up over ranks, and last the memory, of which the greatest counts."""
        memory = torch.tensor([peak_memory(self.device)], dtype=self.sums.dtype, device=self.device)
        return torch.cat([self.sums, self.positions, memory])

    def read(self, ranks: Tensor, step: int, steps: int) -> dict[str, float]:
        """The metrics since the last time, after which counting starts again.

        Args:
            ranks: [ranks, 2Q + 5], every rank's `vector`.
            step: steps done.
            steps: of the whole run.
        """
        totals = ranks[:, :-1].sum(0).tolist()
        now = time.monotonic()
        sums, (positions, pairs) = totals[:COLUMNS], totals[COLUMNS:]
        found = nll_metrics(sums, whole=self.whole)
        masked = sum(sums[len(QUARTERS) : 2 * len(QUARTERS)])
        if sums[_MASKABLE]:
            found["masked_fraction"] = masked / sums[_MASKABLE]
        seconds = 0.0 if self.began is None else now - self.began
        if seconds > 0:
            found["tokens_per_second"] = positions / seconds
            if self.work is not None and self.peak is not None:
                done = self.work.a_token * positions + self.work.a_pair * pairs + self.work.a_mask * masked
                found["mfu"] = done / seconds / (self.peak * len(ranks))
        found["peak_memory_gib"] = float(ranks[:, -1].max())
        start, first_step = self.first
        if self.began is not None and step > first_step:
            found["eta_seconds"] = (now - start) / (step - first_step) * (steps - step)
        self.sums.zero_()
        self.positions.zero_()
        self.began = now
        self.tokens = int(positions)
        return found

    def leave_out(self, since: float) -> None:
        """Takes the time from `since` until now (an evaluation, a save) out of the interval."""
        if self.began is not None:
            self.began += time.monotonic() - max(since, self.began)


def seen(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """How many positions of a batch hold text, and how many pairs of them attend to each other.

    Positions that an `attention_mask` [B, L] hides, and those of packed rows that are in no document (`document` -1), hold
    none; padding with end-of-text does, as it is learnt. Documents of one row (`document`, `document_ids`) do not see each other.

    Returns:
        Two int64 scalars.
    """
    ids_BL = inputs["input_ids"]
    rows, length = ids_BL.shape
    row_B1 = torch.arange(rows, device=ids_BL.device)[:, None]
    real_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    group_BL = row_B1.expand(rows, length)
    mask = inputs.get("attention_mask")
    if "document" in inputs:  # numbered through the batch
        group_BL, real_BL = inputs["document"].clamp(min=0), inputs["document"] >= 0
    elif "document_ids" in inputs:  # numbered from 0 in each row
        group_BL = row_B1 * (length + 1) + inputs["document_ids"]
    elif mask is not None and mask.shape == ids_BL.shape:
        real_BL = mask.bool()
    # unlike a count of occurrences with bincount, this does not wait for the device
    sizes = torch.zeros(rows * (length + 1), dtype=torch.int64, device=ids_BL.device)
    sizes.scatter_add_(0, group_BL.flatten(), real_BL.long().flatten())
    return real_BL.sum(), (sizes * sizes).sum()
