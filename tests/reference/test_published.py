"""The published loop in batched torch against the stored outputs of the published code, and against ours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from golden import cases
from reference.published import fill, published_generate, transfer_counts
from reference.sampler import shares
from torch import Tensor

from dllm.diffusion.noise import Purpose, keyed_uniform
from dllm.pipelines import llada
from dllm.pipelines.llada import LLaDAConfig, LLaDAModelLM

WHOLE: dict[str, Any] = {"early_stop": False}
"""The published loop takes every step of its schedule."""
MASK = 30


def network(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    return model(input_ids=ids, attention_mask=mask).logits


@cache
def golden_model(name: str) -> Any:
    return llada.load_model(str(cases.folder(name)))


@cache
def model() -> LLaDAModelLM:
    torch.manual_seed(0)
    shape = dict(d_model=32, n_layers=2, n_heads=4, mlp_hidden_size=64, max_sequence_length=64)
    made = LLaDAModelLM(
        LLaDAConfig(vocab_size=32, mask_token_id=MASK, eos_token_id=31, pad_token_id=31, **shape)
    ).eval()
    with torch.no_grad():  # logits far enough apart for any kernel
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4)
        made.get_output_embeddings().weight[MASK] = 0.0
    return made


def prompts_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, MASK, (length,), generator=generator) for length in lengths]


def lists(canvases: Sequence[Tensor]) -> list[list[int]]:
    return [canvas.tolist() for canvas in canvases]


def keyed(seed: int, first: int, prompt: int, step: int, shape: Sequence[int]) -> Tensor:
    """Our noise in the published loop's places: rows from request `first` on, each with a prompt of `prompt` tokens."""
    axes: list[Tensor] = [torch.arange(size) for size in shape]
    purpose = Purpose.TOKEN if len(shape) == 3 else Purpose.RANK
    row, position = axes[0] + first, axes[1]
    if len(shape) == 2:
        return keyed_uniform(seed, purpose, row[:, None], position[None], torch.tensor(step))
    key = (row[:, None, None], position[None, :, None], torch.tensor(step), axes[2][None, None])
    return keyed_uniform(seed, purpose, *key)


GOLDEN = [(name, case) for name in (*cases.DENSE, "llada_moe") for case in cases.sampling_settings(name)]


@pytest.mark.parametrize(
    ("name", "case", "at_once"),
    [(*case, 2) for case in GOLDEN] + [(cases.DENSE[1], "case6", 1), (cases.DENSE[1], "case7", 1)],
)
def test_its_tokens_are_those_of_the_published_code(name: str, case: str, at_once: int) -> None:
    prompts, canvases = cases.sampling_case(name, case)
    settings = cases.sampling_settings(name)[case]
    done = published_generate(
        partial(network, golden_model(name)), prompts, mask_token_id=250, at_once=at_once, **settings
    )
    assert lists(done.canvases) == lists(canvases)
    per_batch = settings["steps"] * (2 if settings["cfg_scale"] else 1)
    assert done.nfe == per_batch * len(prompts) // at_once


@pytest.mark.parametrize("lengths", [(5,), (7, 7, 7), (9, 2, 14, 1)], ids=["one row", "equal rows", "ragged rows"])
@pytest.mark.parametrize(
    "options",
    [
        dict(gen_length=12, block_length=12, steps=12),
        dict(gen_length=12, block_length=4, steps=12),
        dict(gen_length=24, block_length=8, steps=9),  # 3, 3, 2 tokens a step
        dict(gen_length=16, block_length=8, steps=8, cfg_scale=1.5),
    ],
    ids=["one block", "blocks", "few steps", "guidance"],
)
@pytest.mark.parametrize("at_once", [1, 8])
def test_ours_writes_the_same_tokens(lengths: Sequence[int], options: dict[str, Any], at_once: int) -> None:
    prompts = prompts_of(*lengths)
    theirs = published_generate(partial(network, model()), prompts, mask_token_id=MASK, at_once=at_once, **options)
    ours = llada.generate(model(), None, prompts, **options, **WHOLE)
    assert lists(theirs.canvases) == lists(ours.sequences)


@pytest.mark.parametrize("options", [dict(temperature=0.7), dict(temperature=1.3), dict(remasking="random")])
def test_with_our_noise_it_draws_the_same_tokens(options: dict[str, Any]) -> None:
    prompts = prompts_of(6, 6, 6)
    shape = dict(gen_length=16, block_length=8, steps=16)
    theirs = published_generate(
        partial(network, model()), prompts, mask_token_id=MASK, at_once=3, uniform=partial(keyed, 5, 0, 6), **shape, **options
    )  # fmt: skip
    ours = llada.generate(model(), None, prompts, seed=5, **shape, **options, **WHOLE)
    assert lists(theirs.canvases) == lists(ours.sequences)
    greedy = llada.generate(model(), None, prompts, **shape, **WHOLE)
    assert lists(greedy.sequences) != lists(ours.sequences)


def test_masks_between_given_tokens_are_filled_as_ours_fills_them_in_one_block() -> None:
    canvases = torch.stack(prompts_of(12, 12))
    canvases[0, 2:9] = MASK
    canvases[1, ::2] = MASK
    done, forwards = fill(partial(network, model()), canvases, 0, mask_token_id=MASK, steps=5, block_length=12)
    assert lists(list(done)) == lists(llada.infilling(model(), None, list(canvases), steps=5).sequences)
    assert forwards == 5


def test_own_noise_is_uniform_in_fp64_and_a_sample_of_the_steps_leaves_masks() -> None:
    (prompt,) = prompts_of(4)
    torch.manual_seed(1)
    options = dict(gen_length=8, block_length=8, steps=8, mask_token_id=MASK)
    one, two = (published_generate(partial(network, model()), [prompt], temperature=2.0, **options) for _ in range(2))
    assert lists(one.canvases) != lists(two.canvases)
    part = published_generate(partial(network, model()), [prompt], max_forwards=3, **options)
    assert part.nfe == 3
    assert int((part.canvases[0] == MASK).sum()) == 5


@pytest.mark.parametrize(("masks", "steps"), [(10, 4), (8, 8), (3, 5), (0, 2), (7, 1)])
def test_counts(masks: int, steps: int) -> None:
    mask_BL = torch.arange(12)[None] < masks
    assert transfer_counts(mask_BL, steps)[0].tolist() == shares(masks, steps)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="block_length=5, steps=8: do not divide"):
        fill(partial(network, model()), torch.full((1, 8), MASK), 0, mask_token_id=MASK, steps=8, block_length=5)
    with pytest.raises(ValueError, match="block_length=4, steps=3: do not divide"):
        fill(partial(network, model()), torch.full((1, 8), MASK), 0, mask_token_id=MASK, steps=3, block_length=4)
