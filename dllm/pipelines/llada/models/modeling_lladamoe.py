"""LLaDA-MoE: as dense LLaDA, with norms on queries and keys and a mixture of experts in place of the feed-forward network.

Shapes: B batch, L positions, D width, V vocabulary, E experts, k experts a token, K head width.
Source: Zhu et al., LLaDA-MoE, arXiv:2509.24389; tensor names are those of the public checkpoints. Their experts are separate
tensors; here each projection of all experts of a layer is one, merged at load and parted again at save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast

from dllm.layers.attention import AttentionPlan, rotary_attention
from dllm.layers.experts import Experts, TopKRouter, load_balancing_loss
from dllm.layers.norm import RMSNorm
from dllm.layers.trunk import encode
from dllm.pipelines.llada.models.configuration_lladamoe import LLaDAMoEConfig
from dllm.pipelines.llada.models.scoring import LLaDAOutput, Readout, score


@dataclass
class LLaDAMoEOutput(LLaDAOutput):
    """What `LLaDAMoEModelLM` gives."""

    router_logits: tuple[Tensor, ...] | None = None
    """[B * L, E] of every mixture, if asked for."""
    aux_loss: Tensor | None = None
    """The load-balancing loss before its coefficient; in training with a coefficient, or with router logits."""


class LLaDAMoEAttention(nn.Module):
    """Bidirectional attention with a norm on each head's queries and keys."""

    is_causal = False

    def __init__(self, config: LLaDAMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        if config.qk_layernorm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        return self.o_proj(rotary_attention(self, x_BLD, cos, sin, bias))


class LLaDAMoEDenseMLP(nn.Module):
    """The gated network of a layer that is no mixture."""

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.dense_intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.dense_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.dense_intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, None]:
        return self.down_proj(nn.functional.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD)), None


class LLaDAMoESparseMLP(nn.Module):
    """Each token's k experts, weighted by the router's probabilities."""

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__()
        width, count = config.hidden_size, config.num_experts
        self.gate = TopKRouter(width, count, config.num_experts_per_tok, bool(config.norm_topk_prob))
        self.experts = Experts(config, count, width, config.expert_intermediate_size)

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = x_BLD.flatten(0, 1)
        logits_TE, weight_Tk, expert_Tk = self.gate(x_TD)
        return self.experts(x_TD, expert_Tk, weight_Tk).view_as(x_BLD), logits_TE


class LLaDAMoEBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LLaDAMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LLaDAMoEAttention(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (LLaDAMoESparseMLP if config.has_experts(layer_idx) else LLaDAMoEDenseMLP)(config)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos, sin, bias)
        change_BLD, router_logits = self.mlp(self.post_attention_layernorm(x_BLD))
        x_BLD = x_BLD + change_BLD
        return x_BLD if router_logits is None else (x_BLD, router_logits)


class LLaDAMoEPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of a LLaDA-MoE model."""

    config_class = LLaDAMoEConfig
    config: LLaDAMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LLaDAMoEBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # transformers looks for the experts' decorator in this file; it stands in dllm/layers/experts.py
    _can_set_experts_implementation_cached_value = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Starts a model from nothing: a normal of `initializer_range`, norms at one."""
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding | TopKRouter):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)


class LLaDAMoEModel(LLaDAMoEPreTrainedModel):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDAMoEBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | AttentionPlan | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MoeModelOutputWithPast:
        """Hidden states after the last norm.

        Args:
            input_ids: see `dllm.layers.trunk.encode`, as the arguments below.
            attention_mask: [B, L], non-zero at real positions; None where there is no padding; or a plan.
            position_ids: int64 [B, L] or [1, L].
            document_ids: int64 [B, L]: several documents packed into a row see only themselves.
            inputs_embeds: [B, L, D] in place of `input_ids`.
            output_hidden_states: also return every block's input and the final states.
            return_dict: accepted for transformers' callers; a dict-like output is always returned.

        Returns:
            `last_hidden_state` [B, L, D], `router_logits`, and `hidden_states` if asked.
        """
        done = encode(
            self.config,
            self.embed_tokens,
            self.layers,
            self.norm,
            rotary_dim=self.config.head_dim,
            rope_theta=self.config.rope_theta,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        return MoeModelOutputWithPast(
            last_hidden_state=done.last, hidden_states=done.states, router_logits=done.router_logits or None
        )


class LLaDAMoEModelLM(LLaDAMoEPreTrainedModel):
    """The mask predictor p(x0 | xt): logits of every position's token, given all others."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config)
        self.model = LLaDAMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | AttentionPlan | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        targets: Tensor | None = None,
        target_weights: Tensor | None = None,
        readout: Readout | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
    ) -> LLaDAMoEOutput:
        """Logits, only where they are asked for, or the loss of those positions; and what keeps the experts' load even.

        Args:
            input_ids: int64 [B, L].
            attention_mask: see `LLaDAMoEModel.forward`.
            position_ids: see `LLaDAMoEModel.forward`.
            document_ids: see `LLaDAMoEModel.forward`.
            inputs_embeds: see `LLaDAMoEModel.forward`.
            logits_to_keep: which positions: see `dllm.layers.trunk.logits_at`.
            targets: see `LLaDAModelLM.forward`, as the next.
            target_weights: fp32 [N].
            readout: see `LLaDAModelLM.forward`.
            output_hidden_states: see `LLaDAMoEModel.forward`.
            output_router_logits: also return every router's logits; the configuration's value by default.
            return_dict: see `LLaDAMoEModel.forward`.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        aux = None
        if output.router_logits and (wanted or (self.training and self.config.router_aux_loss_coef)):
            real = None if isinstance(attention_mask, AttentionPlan) else attention_mask
            aux = load_balancing_loss(output.router_logits, self.config.num_experts_per_tok, real)
        return LLaDAMoEOutput(
            **score(self.lm_head, output.last_hidden_state, logits_to_keep, targets, target_weights, readout),
            hidden_states=output.hidden_states,
            router_logits=output.router_logits if wanted else None,
            aux_loss=aux,
        )


def _expert_tensors() -> list[WeightConverter]:
    """Public per-expert tensors <-> one stacked tensor a projection."""
    return [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


# by class and not by model type, which dense models share
for _name in ("LLaDAMoEModel", "LLaDAMoEModelLM"):
    register_checkpoint_conversion_mapping(_name, _expert_tensors(), overwrite=True)
AutoModel.register(LLaDAMoEConfig, LLaDAMoEModel, exist_ok=True)
AutoModelForMaskedLM.register(LLaDAMoEConfig, LLaDAMoEModelLM, exist_ok=True)
