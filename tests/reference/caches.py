"""Caches without buffers: one row, one dict a layer from position to (key, value), and the rules in words of sets.

Shapes: P positions that are computed, D width, G key/value heads, K head width.

The forward is written out over the model's own public tensors. Norms and rotations are in fp32, as the models define them, and by
the same formula, so that a run in fp64 differs by the rounding of fp64 alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from reference.models import mixture
from torch import Tensor
from torch.nn.functional import linear, silu

Kept = dict[int, dict[int, tuple[Tensor, Tensor]]]
"""layer -> position -> (key [G, K], value [G, K]); empty before a row's first pass."""
LogitsAt = dict[int, list[float]]
"""position -> logits."""


def positions(
    rule: str,
    *,
    length: int,
    block: Collection[int],
    open_places: Collection[int],
    just_committed: Collection[int],
    block_step: int,
    vicinity: int = 16,
    cache_refresh: int | None = None,
) -> list[int]:
    """What a rule computes at one step of one row; `block_step` 0 is the block's first."""
    everything = list(range(length))
    if not block:
        return []
    if rule == "delayed" and cache_refresh is None:
        cache_refresh = 8
    if rule == "none" or block_step == 0 or (cache_refresh and block_step % cache_refresh == 0):
        return everything
    if rule == "prefix":
        return [i for i in everything if i >= min(block)]
    if rule == "dual":
        return sorted(block)
    if rule == "vicinity":
        return [i for i in everything if any(abs(i - place) <= vicinity for place in block)]
    assert rule == "delayed"
    return sorted({*open_places, *just_committed})


def dense_states(
    tensors: Mapping[str, Tensor], config: Any, ids: list[int], computed: list[int], kept: Kept, shadows: list[int]
) -> Tensor:
    """[P, D] after the last norm, of a dense model; keys and values of `computed` are put into `kept`.

    A shadow is a mask in the place of a token, which nobody else sees; their states come after those of `computed`.
    """
    x = tensors["model.transformer.wte.weight"][shown(ids, computed, shadows, config)]
    for i in range(config.n_layers):
        block = {name.split(f"blocks.{i}.")[1]: t for name, t in tensors.items() if f"blocks.{i}." in name}
        h = rms_norm(x, block["attn_norm.weight"], config.rms_norm_eps)
        q, k, v = (linear(h, block[f"{name}_proj.weight"]) for name in "qkv")
        q, k, v = (y.view(len(x), -1, config.head_dim) for y in (q, k, v))
        mixed = attended(q, k, v, computed, shadows, kept.setdefault(i, {}), config.rope_theta)
        x = x + linear(mixed, block["attn_out.weight"])
        h = rms_norm(x, block["ff_norm.weight"], config.rms_norm_eps)
        gated = silu(linear(h, block["ff_proj.weight"])) * linear(h, block["up_proj.weight"])
        x = x + linear(gated, block["ff_out.weight"])
    return rms_norm(x, tensors["model.transformer.ln_f.weight"], config.rms_norm_eps)


def moe_states(
    tensors: Mapping[str, Tensor], config: Any, ids: list[int], computed: list[int], kept: Kept, shadows: list[int]
) -> Tensor:
    """[P, D] after the last norm, of a mixture of experts; `tensors` has the experts one by one. See `dense_states`."""
    x = tensors["model.embed_tokens.weight"][shown(ids, computed, shadows, config)]
    for i in range(config.num_hidden_layers):
        layer = {name.split(f"layers.{i}.")[1]: t for name, t in tensors.items() if f"layers.{i}." in name}
        h = rms_norm(x, layer["input_layernorm.weight"], config.rms_norm_eps)
        q, k, v = (linear(h, layer[f"self_attn.{name}_proj.weight"]) for name in "qkv")
        q, k, v = (y.view(len(x), -1, config.head_dim) for y in (q, k, v))
        if config.qk_layernorm:
            q = rms_norm(q, layer["self_attn.q_norm.weight"], config.rms_norm_eps)
            k = rms_norm(k, layer["self_attn.k_norm.weight"], config.rms_norm_eps)
        mixed = attended(q, k, v, computed, shadows, kept.setdefault(i, {}), config.rope_theta)
        x = x + linear(mixed, layer["self_attn.o_proj.weight"])
        h = rms_norm(x, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        x = x + mixture(h, layer, config)
    return rms_norm(x, tensors["model.norm.weight"], config.rms_norm_eps)


def shown(ids: list[int], computed: list[int], shadows: list[int], config: Any) -> Tensor:
    return torch.tensor([*(ids[place] for place in computed), *(config.mask_token_id for _ in shadows)])


def attended(
    q_PHK: Tensor,
    k_PGK: Tensor,
    v_PGK: Tensor,
    computed: list[int],
    shadows: list[int],
    kept: dict[int, tuple[Tensor, Tensor]],
    theta: float,
) -> Tensor:
    """[P, H * K]: what was computed replaces what was kept; then every query sees every position, a shadow itself in its
    place."""
    places = [*computed, *shadows]
    q_PHK, k_PGK = rotated(q_PHK, places, theta), rotated(k_PGK, places, theta)
    for i, place in enumerate(computed):
        kept[place] = (k_PGK[i], v_PGK[i])
    out = torch.empty_like(q_PHK)
    out[: len(computed)] = mixed(q_PHK[: len(computed)], kept)
    for i in range(len(computed), len(places)):
        out[i : i + 1] = mixed(q_PHK[i : i + 1], {**kept, places[i]: (k_PGK[i], v_PGK[i])})
    return out.flatten(1)


def mixed(q_PHK: Tensor, seen: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """[P, H, K], one head at a time."""
    key_LGK, value_LGK = (torch.stack(parts) for parts in zip(*seen.values(), strict=True))
    H, K = q_PHK.shape[1:]
    share = H // key_LGK.shape[1]
    out = torch.empty_like(q_PHK)
    for head in range(H):
        scores = q_PHK[:, head] @ key_LGK[:, head // share].T / K**0.5
        out[:, head] = torch.softmax(scores, dim=-1) @ value_LGK[:, head // share]
    return out


def rotated(x_PHK: Tensor, places: list[int], theta: float) -> Tensor:
    """Each pair (i, i + K/2) turned by position * theta^(-2i/K), in fp32."""
    K = x_PHK.shape[-1]
    frequency = 1.0 / theta ** (torch.arange(0, K, 2, dtype=torch.float32) / K)
    angle_P1k = torch.tensor(places, dtype=torch.float32)[:, None, None] * frequency
    first, second = x_PHK.float().chunk(2, dim=-1)
    turned = (
        first * angle_P1k.cos() - second * angle_P1k.sin(),
        second * angle_P1k.cos() + first * angle_P1k.sin(),
    )
    return torch.cat(turned, dim=-1).to(x_PHK.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over its root mean square, in fp32."""
    y = x.float()
    return weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class CachedModel:
    """A model that computes some positions of one row, from (ids of the whole row, which, what is kept, shadows)."""

    def __init__(self, model: Any) -> None:
        self.tensors, self.config = public_tensors(model), model.config
        self.forward = moe_states if hasattr(model.config, "num_experts") else dense_states
        self.head = model.get_output_embeddings().weight

    def states(self, ids: list[int], computed: list[int], kept: Kept, shadows: Sequence[int] = ()) -> Tensor:
        """[P, D] after the last norm."""
        return self.forward(self.tensors, self.config, ids, computed, kept, list(shadows))

    def __call__(
        self, ids: list[int], computed: list[int], kept: Kept, shadows: list[int]
    ) -> tuple[LogitsAt, LogitsAt]:
        """Logits of what was computed and of the shadows, by their positions, each number one that fp32 holds."""
        rows = linear(self.states(ids, computed, kept, shadows), self.head).float().tolist()
        return dict(zip(computed, rows, strict=False)), dict(zip(shadows, rows[len(computed) :], strict=True))


def public_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of a model by their public names: a mixture's experts one by one."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, last = name.rpartition(".experts.")
        if last == "gate_up_proj":
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                tensors[f"{stem}.experts.{expert}.gate_proj.weight"] = gate
                tensors[f"{stem}.experts.{expert}.up_proj.weight"] = up
        elif last == "down_proj":
            tensors |= {f"{stem}.experts.{expert}.down_proj.weight": part for expert, part in enumerate(tensor)}
        else:
            tensors[name] = tensor
    return tensors
