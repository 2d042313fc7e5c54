"""Makes a LLaDA checkpoint of an autoregressive one: the same weights, seen from both sides, and a mask token.

What changes is the attention mask alone: a Llama block and LLaDA's dense block are one computation but for it. So a source's
tensors are renamed and nothing about them is altered, and with the causal mask put back the logits are the source's.

Source: autoregressive weights are a good start for a diffusion model, Gong et al., arXiv:2410.17891; Ye et al., arXiv:2508.15487.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dllm.data.maps import marks_answers
from dllm.errors import CheckpointError
from dllm.pipelines.llada.adaptable import BIASED
from dllm.pipelines.llada.adapted_tokenizer import MaskToken, choose_ends, choose_mask
from dllm.pipelines.llada.autoregressive import (
    find_source,
    read_config,
    read_tokenizer,
    read_weights,
)
from dllm.pipelines.llada.checkpoint_files import check_free, check_shard_size, written_whole
from dllm.pipelines.llada.loading import dtype_named
from dllm.pipelines.llada.models.configuration_llada import LLaDAConfig
from dllm.pipelines.llada.models.modeling_llada import LLaDAModelLM
from dllm.pipelines.llada.tokenizer import CHAT_TEMPLATE, load_tokenizer, prepare_tokenizer

ROWS_MULTIPLE = 64
"""A table that grows, grows to a multiple of it: matrix products are fastest on such sizes."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What was made."""

    folder: Path
    model_type: str
    """Of the source."""
    parameters: int
    rows: int
    """Of the embedding."""
    mask: MaskToken
    eos: str
    """End of document."""
    eot: str | None
    """End of turn, where it is another token."""
    chat_template: str
    """marked: the source's, with what the assistant says marked, there or here; source: as it was, without marks; llada: LLaDA's,
    whose markers are in the vocabulary; none."""


def adapt(
    source: str | Path,
    output_dir: str | Path,
    *,
    gguf_file: str | None = None,
    mask_token: str = "auto",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    say: Callable[[str], None] | None = None,
) -> Adaptation:
    """Writes the LLaDA checkpoint of an autoregressive one of the Llama family.

    The tensors are the source's, renamed. The mask takes a token that the vocabulary has spare, or one more row. A row that was
    never trained, reserved or new, starts at the mean of the others: reserved rows are often zeros, which the first norm would
    blow up, and a mean row is what the model can expect of a token that it knows nothing of (and its logit, the mean of all
    logits, is never the largest).

    Bos, end of document, end of turn, padding and the chat template are carried over; see
    `dllm.pipelines.llada.adapted_tokenizer.choose_ends`.

    The folder appears under its name once it is whole; until then it is `NAME.partial`.

    Args:
        source: a folder, a hub id, or a GGUF file; of model type llama, mistral or qwen2.
        output_dir: a folder that does not exist or is empty.
        gguf_file: which GGUF file of the folder or hub id.
        mask_token: "auto", "reserved", "append" or a token of the vocabulary; see
            `dllm.pipelines.llada.adapted_tokenizer.choose_mask`.
        dtype: of the written weights; "auto" keeps the one that most are stored in, and gives fp32 of a GGUF file.
        max_shard_size: such as "5GB"; a model that is larger becomes several files and an index.
        say: is told what the source is, before its weights are read.

    Raises:
        OptionError: the output folder is not empty or cannot be written, or a dtype, shard size or mask token that does not
            exist.
        CheckpointError: the source cannot be read, or has what LLaDA's dense block has not; before its weights are read.
        MissingExtraError: a GGUF file without the package `gguf`.
    """
    output = Path(output_dir)
    check_free(output)
    check_shard_size(max_shard_size)
    kind = None if dtype == "auto" else dtype_named(dtype)
    place = find_source(source, gguf_file)
    theirs = read_config(place)
    tokenizer = read_tokenizer(place)
    carried, known = choose_ends(tokenizer), len(tokenizer)
    mask = choose_mask(tokenizer, mask_token)
    prepare_tokenizer(tokenizer, str(source))
    template = carried
    if carried != "marked" and marks_answers(tokenizer):
        template = "llada" if tokenizer.chat_template == CHAT_TEMPLATE else "marked"
    config = adapted_config(theirs, tokenizer)
    config.adapted_from = {
        "source": str(source),
        **({"gguf_file": place.gguf_file} if place.gguf_file else {}),
        "model_type": theirs.model_type,
        "mask_token": {"token": mask.token, "how": mask.how},
    }
    if say is not None:
        say(
            f"{source}: {theirs.model_type}, {theirs.num_hidden_layers} layers of width {theirs.hidden_size}, "
            f"{theirs.vocab_size:,} rows of embedding"
        )
    model = adapted_model(read_weights(place, theirs, kind), config, mask, known)
    with written_whole(output, model) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(partial)
        _check_written(partial, tokenizer)
    if template == "source":
        warnings.warn(
            f"The source's chat template could not be marked, and is written as it was: what the assistant says cannot be told "
            f"from the rest. Before dllm sft, put {{% generation %}} and {{% endgeneration %}} around it in "
            f"{output / 'chat_template.jinja'}.",
            stacklevel=2,
        )
    if template == "llada" and carried == "source":
        warnings.warn(
            "The source's chat template could not be marked for fine-tuning: LLaDA's, with the same markers, takes its place.",
            stacklevel=2,
        )
    return Adaptation(
        folder=output,
        model_type=theirs.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        rows=int(config.embedding_size or 0),
        mask=mask,
        eos=tokenizer.eos_token,
        eot=getattr(tokenizer, "eot_token", None),
        chat_template=template,
    )


def adapted_config(theirs: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> LLaDAConfig:
    """The same sizes in LLaDA's keys.

    Args:
        theirs: of `read_config`.
        tokenizer: with its mask.
    """
    rows = theirs.vocab_size
    if len(tokenizer) > rows:
        rows = -(-len(tokenizer) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return LLaDAConfig(
        vocab_size=len(tokenizer),
        embedding_size=rows,
        d_model=theirs.hidden_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        mlp_hidden_size=theirs.intermediate_size,
        max_sequence_length=theirs.max_position_embeddings,
        rope_theta=theirs.rope_parameters["rope_theta"],
        rms_norm_eps=theirs.rms_norm_eps,
        weight_tying=theirs.tie_word_embeddings,
        include_qkv_bias=theirs.model_type in BIASED,
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def adapted_model(weights: dict[str, Tensor], config: LLaDAConfig, mask: MaskToken, known: int) -> LLaDAModelLM:
    """The model of a source's tensors: they are taken as they are, and not copied, but for a table that grows.

    Args:
        weights: in LLaDA's names; emptied.
        config: of `adapted_config`.
        mask: its row starts at the mean if it was never trained.
        known: tokens of the source; the mean is over their rows.
    """
    for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
        if name not in weights:
            continue
        table = weights[name]
        mean = table[:known].mean(0, keepdim=True, dtype=torch.float32).to(table.dtype)
        if mask.untrained and mask.id < len(table):
            table[mask.id] = mean[0]
        if (more := int(config.embedding_size or 0) - len(table)) > 0:
            weights[name] = torch.cat([table, mean.expand(more, -1)])
    with torch.device("meta"):
        model = LLaDAModelLM(config)
    model.load_state_dict(weights, assign=True, strict=True)
    weights.clear()
    return model.eval()


def _check_written(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether what is loaded again has the same special tokens and reads the same ids."""
    again = load_tokenizer(folder)
    text = f"One, two 345\n\n  {tokenizer.mask_token}{tokenizer.eos_token} äß漢🎉"
    names = [
        name for name in ("mask", "bos", "eos", "pad", "eot") if getattr(tokenizer, f"{name}_token", None) is not None
    ]
    different = [n for n in names if getattr(again, f"{n}_token_id", None) != getattr(tokenizer, f"{n}_token_id")]
    ids, read = (each(text, add_special_tokens=False)["input_ids"] for each in (tokenizer, again))
    if different or ids != read:
        raise CheckpointError(
            f"The source's tokenizer ({type(tokenizer).__name__}) does not come back as it was written: it reads "
            f"{', '.join(f'another {name}_token' for name in different) or 'other ids'}. Adapt a source with a tokenizer.json."
        )
