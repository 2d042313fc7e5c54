"""Small autoregressive checkpoints of random weights, as others publish them: safetensors folders and GGUF files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dllm.pipelines.llada.tokenizer import bpe_tokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=128,
    rope_theta=5000.0,
)


@cache
def _words() -> Tokenizer:
    """Byte-level BPE, trained here, without LLaDA's special tokens in its vocabulary."""
    trained = bpe_tokenizer(["the cat sat on the mat, and the dog ate 12 hats. " * 4], 290).backend_tokenizer
    text = trained.to_str()
    for name in ("startoftext", "endoftext", "mdm_mask", "start_header_id", "end_header_id", "eot_id"):
        text = text.replace(f"<|{name}|>", f"<|was_{name}|>")
    return Tokenizer.from_str(text)


def tokenizer(*special: str, template: str | None = None, **named: str) -> PreTrainedTokenizerBase:
    """The words, with more special tokens behind them: the named ones and `special`."""
    made = PreTrainedTokenizerFast(tokenizer_object=_words(), **named)
    made.add_special_tokens({"extra_special_tokens": list(special)}, replace_extra_special_tokens=False)
    made.chat_template = template
    return made


def chatml_tokenizer(*more: str, **named: str) -> PreTrainedTokenizerBase:
    """As tuned models have it: the end of a turn is its eos_token."""
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **named}
    return tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>", *more, template=CHATML, **special)


def model(model_type: str = "llama", rows: int = 300, **changes: Any) -> PreTrainedModel:
    """Random weights, biases among them, large enough that what is wrong in one of them shows in the logits."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        plain = {"mistral": {"sliding_window": None}}.get(model_type, {})
        config = AutoConfig.for_model(model_type, vocab_size=rows, **{**SIZES, **plain, **changes})
        made = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.normal_(std=0.3).add_(1.0 if "norm" in name else 0.0)
    return made.eval()


def save(folder: Path, of: PreTrainedModel, words: PreTrainedTokenizerBase, **options: Any) -> Path:
    of.save_pretrained(folder, **options)
    words.save_pretrained(folder)
    return folder


def write_gguf(
    path: Path,
    of: PreTrainedModel,
    words: PreTrainedTokenizerBase,
    kind: str = "F32",
    extra: dict[str, Any] | None = None,
    without: str | None = None,
) -> Path:
    """As llama.cpp's converter writes it: its names, and in Llama's queries and keys the rotary pairs side by side.

    Args:
        path: of the file.
        of: model type llama or qwen2.
        words: its tokenizer.
        kind: type of the matrices, such as Q8_0; vectors are F32.
        extra: more keys, and with a leading "tensor:" more tensors.
        without: the name of a tensor that is left out.
    """
    import gguf

    config = of.config
    architecture = config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    ids = sorted(words.get_vocab().items(), key=lambda entry: entry[1])
    added = set(map(str, words.added_tokens_decoder.values()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in ids])
    writer.add_token_types([3 if token in added else 1 for token, _ in ids])
    writer.add_token_merges([" ".join(pair) for pair in _merges(words)])
    for name in ("bos", "eos", "pad"):
        if (id_ := getattr(words, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(id_)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, tensor in of.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, suffix = name.rpartition(".")
        values = tensor.float().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        written = f"{names.get_name(module)}.{suffix}"
        if written != without:
            _add(writer, written, values, kind if values.ndim > 1 else "F32")
    for key, value in (extra or {}).items():
        if key.startswith("tensor:"):
            _add(writer, key.removeprefix("tensor:"), value, "F32")
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, values: np.ndarray, kind: str) -> None:
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)


def _merges(words: PreTrainedTokenizerBase) -> list[list[str]]:
    return json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
