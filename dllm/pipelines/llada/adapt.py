"""Makes a LLaDA checkpoint of an autoregressive one: the same weights, seen from both sides, and a mask token.

What changes is the attention mask alone: a Llama block and LLaDA's dense block are one computation but for it. So a source's
tensors are renamed and nothing about them is altered, and with the causal mask put back the logits are the source's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from dllm.errors import OptionError
from dllm.pipelines.llada.models.configuration_llada import LLaDAConfig
from dllm.pipelines.llada.models.modeling_llada import LLaDAModelLM
from dllm.pipelines.llada.tokenizer import MASK

PUBLIC_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
"""Llama's name of a tensor's module -> LLaDA's."""


def public_name(name: str) -> str:
    """The name of a tensor of a Llama checkpoint in a LLaDA one."""
    module, _, kind = name.rpartition(".")
    if block := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"model.transformer.blocks.{block[1]}.{BLOCK_NAMES[block[2]]}.{kind}"
    return f"{PUBLIC_NAMES[module]}.{kind}"


def adapt(source: str | Path, output_dir: str | Path, *, dtype: str = "auto") -> Path:
    """Writes the LLaDA checkpoint."""
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OptionError(f"{output} is not empty: name a folder that does not exist.")
    path = Path(source)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(source)}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    theirs = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.add_special_tokens({"mask_token": MASK})
    config = adapted_config(theirs.config, tokenizer)
    model = adapted_model(theirs.state_dict(), config)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return output


def adapted_config(theirs: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> LLaDAConfig:
    rows = max(theirs.vocab_size, -(-len(tokenizer) // 64) * 64)
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
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def adapted_model(weights: dict[str, Tensor], config: LLaDAConfig) -> LLaDAModelLM:
    mapped = {
        public_name(name): tensor
        for name, tensor in weights.items()
        if not (config.weight_tying and name == "lm_head.weight")
    }
    for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
        if name in mapped and len(mapped[name]) < config.embedding_size:
            table = mapped[name]
            mean = table.float().mean(0, keepdim=True).to(table.dtype)
            mapped[name] = torch.cat([table, mean.expand(config.embedding_size - len(table), -1)])
    with torch.device("meta"):
        model = LLaDAModelLM(config)
    model.load_state_dict(mapped, assign=True, strict=True)
    return model.eval()
