"""The two models as plain functions of their public tensors: one head-splitting, one softmax, one loop over experts.

Shapes: B batch, L positions, D width, H heads, K head width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu, softmax

Tensors = Mapping[str, Tensor]


def dense_logits(tensors: Tensors, config: Any, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Logits [B, L, V] of a dense model."""
    x = tensors["model.transformer.wte.weight"][ids_BL]
    for i in range(config.n_layers):
        block = {name.split(f"blocks.{i}.")[1]: t for name, t in tensors.items() if f"blocks.{i}." in name}
        h = rms_norm(x, block["attn_norm.weight"], config.rms_norm_eps)
        q, k, v = (
            split_heads(linear(h, block[f"{name}_proj.weight"], block.get(f"{name}_proj.bias")), heads)
            for name, heads in (("q", config.n_heads), ("k", config.n_kv_heads), ("v", config.n_kv_heads))
        )
        q, k = rotary(q, config.rope_theta), rotary(k, config.rope_theta)
        x = x + linear(attention(q, k, v, mask_BL), block["attn_out.weight"])
        h = rms_norm(x, block["ff_norm.weight"], config.rms_norm_eps)
        gated = silu(linear(h, block["ff_proj.weight"])) * linear(h, block["up_proj.weight"])
        x = x + linear(gated, block["ff_out.weight"])
    x = rms_norm(x, tensors["model.transformer.ln_f.weight"], config.rms_norm_eps)
    head = "wte" if config.weight_tying else "ff_out"
    return linear(x, tensors[f"model.transformer.{head}.weight"])


def moe_logits(tensors: Tensors, config: Any, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Logits [B, L, V] of a mixture-of-experts model; `tensors` has the experts one by one."""
    x = tensors["model.embed_tokens.weight"][ids_BL]
    for i in range(config.num_hidden_layers):
        layer = {name.split(f"layers.{i}.")[1]: t for name, t in tensors.items() if f"layers.{i}." in name}
        h = rms_norm(x, layer["input_layernorm.weight"], config.rms_norm_eps)
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        q, k, v = (
            split_heads(linear(h, layer[f"self_attn.{name}_proj.weight"]), heads)
            for name, heads in (("q", queries), ("k", keys), ("v", keys))
        )
        if config.qk_layernorm:
            q = rms_norm(q, layer["self_attn.q_norm.weight"], config.rms_norm_eps)
            k = rms_norm(k, layer["self_attn.k_norm.weight"], config.rms_norm_eps)
        q, k = rotary(q, config.rope_theta), rotary(k, config.rope_theta)
        x = x + linear(attention(q, k, v, mask_BL), layer["self_attn.o_proj.weight"])
        h = rms_norm(x, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        x = x + mixture(h.flatten(0, 1), layer, config).view_as(x)
    x = rms_norm(x, tensors["model.norm.weight"], config.rms_norm_eps)
    return linear(x, tensors["lm_head.weight"])


def mixture(x_TD: Tensor, layer: Tensors, config: Any) -> Tensor:
    """Every expert on the tokens that chose it, one expert after the other."""
    chances_TE = softmax(linear(x_TD, layer["mlp.gate.weight"]).float(), dim=-1)
    best_Tk, chosen_Tk = chances_TE.topk(config.num_experts_per_tok, dim=-1)
    if config.norm_topk_prob:
        best_Tk = best_Tk / best_Tk.sum(-1, keepdim=True)
    out = torch.zeros_like(x_TD)
    for expert in range(config.num_experts):
        token, place = (chosen_Tk == expert).nonzero(as_tuple=True)
        gate, up, down = (layer[f"mlp.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        h = x_TD[token]
        y = linear(silu(linear(h, gate)) * linear(h, up), down)
        out = out.index_add(0, token, (y * best_Tk[token, place, None]).to(out.dtype))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over its root mean square, in fp32."""
    y = x.float()
    return weight * (y / (y.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def split_heads(x_BLD: Tensor, heads: int) -> Tensor:
    """[B, heads, L, K]."""
    B, L, D = x_BLD.shape
    return x_BLD.view(B, L, heads, D // heads).transpose(1, 2)


def rotary(x_BHLK: Tensor, theta: float) -> Tensor:
    """Each pair (i, i + K/2) turned by position * theta^(-2i/K), in fp32."""
    L, K = x_BHLK.shape[-2:]
    angle_LK = torch.arange(L)[:, None] * theta ** (-torch.arange(0, K, 2) / K)
    cos, sin = angle_LK.cos(), angle_LK.sin()
    first, second = x_BHLK.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHLK.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask_BL: Tensor | None) -> Tensor:
    """[B, L, H * K]: every position sees every real position."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if mask_BL is not None:
        scores = scores.masked_fill(mask_BL[:, None, None, :] == 0, -torch.inf)
    return (softmax(scores.float(), dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
