"""Dense LLaDA: a pre-norm transformer without a causal mask, in the tensor names of the public checkpoints.

Shapes: B batch, L positions, D width, V embedding rows, H query heads, G key/value heads, K head width.
Source: Nie et al., Large Language Diffusion Models, arXiv:2502.09992; the block is Llama's (RMSNorm, rotary positions,
gated SiLU) with full attention.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from dllm.layers.attention import AttentionPlan, rotary_attention
from dllm.layers.norm import RMSNorm
from dllm.layers.trunk import encode
from dllm.pipelines.llada.models.configuration_llada import LLaDAConfig
from dllm.pipelines.llada.models.scoring import LLaDAOutput, Readout, score


class LLaDABlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    is_causal = False

    def __init__(self, config: LLaDAConfig, layer_idx: int) -> None:
        super().__init__()
        d_model, kv_width, hidden = config.d_model, config.n_kv_heads * config.head_dim, config.mlp_hidden_size
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.attn_norm = RMSNorm(d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(d_model, d_model, bias=config.include_qkv_bias)
        self.k_proj = nn.Linear(d_model, kv_width, bias=config.include_qkv_bias)
        self.v_proj = nn.Linear(d_model, kv_width, bias=config.include_qkv_bias)
        self.attn_out = nn.Linear(d_model, d_model, bias=False)
        self.ff_norm = RMSNorm(d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(d_model, hidden, bias=False)
        self.up_proj = nn.Linear(d_model, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, d_model, bias=False)
        for linear in (self.attn_out, self.ff_out):  # for their start: transformers asks for each linear by itself
            linear.writes_in_layer = layer_idx  # type: ignore[assignment]

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None) -> Tensor:
        x_BLD = x_BLD + self.attn_out(rotary_attention(self, self.attn_norm(x_BLD), cos, sin, attention_mask))
        h = self.ff_norm(x_BLD)
        return x_BLD + self.ff_out(nn.functional.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of a LLaDA model: its configuration, how it starts, what it supports."""

    config_class = LLaDAConfig
    config: LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LLaDABlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Starts a model from nothing; weights that a checkpoint brings are left alone by `init`.

        `init_fn: mitchell` is the public models' start: 1 / sqrt(D) for what reads the residual stream, and
        1 / sqrt(2 * fan_in * (layer + 1)) for what writes to it. Any other value means a normal of `init_std`.
        """
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding):
            std = self.config.init_std
            if self.config.init_fn == "mitchell":
                layer = getattr(module, "writes_in_layer", None)
                std = self.config.d_model**-0.5 if layer is None else (2 * module.in_features * (layer + 1)) ** -0.5
            init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)


class LLaDAModel(LLaDAPreTrainedModel):
    """Embeddings, blocks and the last norm.

    The public names put the language-model head, `transformer.ff_out`, inside; `LLaDAModelLM` applies it. A model with
    tied embeddings has none.
    """

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config, i) for i in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)
        self.transformer = nn.ModuleDict(parts)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.config.embedding_size = len(value.weight)  # resized tables must load again
        self.transformer["wte"] = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | AttentionPlan | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput:
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
            `last_hidden_state` [B, L, D] and, if asked, `hidden_states`.
        """
        done = encode(
            self.config,
            self.transformer["wte"],
            self.transformer["blocks"],
            self.transformer["ln_f"],
            rotary_dim=self.config.head_dim,
            rope_theta=self.config.rope_theta,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        return BaseModelOutput(last_hidden_state=done.last, hidden_states=done.states)


class LLaDAModelLM(LLaDAPreTrainedModel):
    """The mask predictor p(x0 | xt): logits of every position's token, given all others."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer["wte" if self.config.weight_tying else "ff_out"]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.transformer["wte" if self.config.weight_tying else "ff_out"] = new_embeddings

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
        return_dict: bool | None = None,
    ) -> LLaDAOutput:
        """Logits, only where they are asked for, or the loss of those positions without their logits.

        Args:
            input_ids: int64 [B, L].
            attention_mask: see `LLaDAModel.forward`.
            position_ids: see `LLaDAModel.forward`.
            document_ids: see `LLaDAModel.forward`.
            inputs_embeds: see `LLaDAModel.forward`.
            logits_to_keep: which positions: see `dllm.layers.trunk.logits_at`.
            targets: int64 [N], the clean tokens at a boolean mask's positions: asks for the loss in place of logits.
            target_weights: fp32 [N], what each counts in the loss; 1 by default.
            readout: called as readout(head, states [N, D]) in place of the logits; what it gives is `output.readout`.
            output_hidden_states: see `LLaDAModel.forward`.
            return_dict: see `LLaDAModel.forward`.

        Returns:
            `logits` [B, L, V], [B, n, V], or [N, V] for a boolean mask; with targets `loss` and `nll` [N], see
            `dllm.diffusion.objective.head_loss`.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        head, hidden = self.get_output_embeddings(), output.last_hidden_state
        scores = score(head, hidden, logits_to_keep, targets, target_weights, readout)
        return LLaDAOutput(**scores, hidden_states=output.hidden_states)


AutoModel.register(LLaDAConfig, LLaDAModel, exist_ok=True)
AutoModelForMaskedLM.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
