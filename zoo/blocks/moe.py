"""Mixture of experts: a router, routed experts, shared experts, balancing."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from zoo.blocks.balance import balance_loss, count_choices, valid_tokens, z_loss
from zoo.blocks.base import Block, Context, Linear
from zoo.blocks.experts import Experts
from zoo.blocks.mlp import MLP
from zoo.blocks.norm import Norm
from zoo.blocks.router import Routing, build_router
from zoo.spec.mlp import ActivationSpec, MLPSpec
from zoo.spec.moe import MoESpec


class MoE(Block):
    """Each token passes the experts that its router chooses, and the shared experts if there are any.

    `MoE(512, num_experts=8, top_k=2, d_expert=256)(x)` maps x [..., 512] to the same shape. In training mode it counts
    the choices, and records what balancing adds to the objective in the context that it is given.
    """

    describes = MoESpec
    spec: MoESpec
    tokens_per_expert: Tensor
    """[e] int64: choices that each expert received in training mode since the last zeroing, padding aside."""

    def __init__(self, d_model: int, spec: MoESpec | None = None, **options: Any) -> None:
        super().__init__(d_model, spec, **options)
        spec = self.spec
        activation = {name: getattr(spec, name) for name in ActivationSpec.model_fields}
        d_in, latent = spec.d_latent or d_model, spec.d_latent is not None
        self.router = build_router(spec.router, d_model, spec.num_experts, spec.top_k, self.norm_spec)
        self.latent_down = Linear(d_model, d_in) if latent else None
        self.experts = Experts(d_in, spec.num_experts, spec.d_expert, writes_residual=not latent, **activation)
        inner = self.norm_spec.replace(type="rms", bias=False)
        self.latent_norm = Norm(d_in, inner) if spec.latent_norm else None
        self.latent_up = Linear(d_in, d_model, writes_residual=True) if latent else None
        shared = MLPSpec(d_ffn=spec.d_shared, **activation) if spec.num_shared_experts else None
        self.shared = MLP(d_model, shared) if shared else None
        self.shared_gate = Linear(d_model, 1) if spec.shared_gate else None
        counts = torch.zeros(spec.num_experts, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    def init_weights(self, std: float, out_std: float) -> None:
        del std, out_std
        self.tokens_per_expert.zero_()

    def forward(self, x: Tensor, context: Context | None = None, router_input: Tensor | None = None) -> Tensor:
        """x [..., d_model]; the result has its shape.

        Args:
            router_input: what the router reads, of the shape of x; None: x.
        """
        tokens = x.reshape(-1, self.d_model)
        routing = self.router(tokens if router_input is None else router_input.reshape(-1, self.d_model))
        if self.training:
            self._watch(routing, x.shape[-2] if x.ndim > 1 else 1, context)
        y = self._routed(tokens, routing)
        if self.shared is not None:
            shared = self._shared(tokens, self.shared, context)
            wide = self.spec.combine == "fp32"
            y = (y.to(torch.float32) + shared.to(torch.float32)).to(y.dtype) if wide else y + shared
        return y.view(x.shape)

    @torch.no_grad()
    def update_bias(self) -> None:
        """Move the correction bias by one step towards the experts below the mean of `tokens_per_expert`.

        Does nothing when `balance.bias_update_rate` is 0 or the router is frozen. With several processes, sum their
        counts before.
        """
        rate, bias, load = self.spec.balance.bias_update_rate, self.router.correction_bias, self.tokens_per_expert
        if rate and bias is not None and self.router.weight.requires_grad:
            below_mean = torch.sign(load.sum() - load * load.numel())  # in whole numbers, so that even is exactly even
            bias.add_(below_mean, alpha=rate)

    def _routed(self, tokens: Tensor, routing: Routing) -> Tensor:
        """The combined output [t, d_model] of the chosen experts."""
        if self.latent_down is not None:
            tokens = self.latent_down(tokens)
        if self.router.weighs_input:
            weighted = tokens[:, None] * routing.weights[..., None].to(tokens.dtype)
            choices = rearrange(routing.indices, "t c -> (t c) 1")
            y = self.experts(rearrange(weighted, "t c d -> (t c) d"), None, choices)
            y = reduce(y, "(t c) d -> t d", "sum", c=self.spec.top_k)
        else:
            y = self.experts(tokens, routing.weights, routing.indices)
        if self.latent_norm is not None:
            y = self.latent_norm(y)
        return y if self.latent_up is None else self.latent_up(y)

    def _shared(self, tokens: Tensor, shared: MLP, context: Context | None) -> Tensor:
        y: Tensor = shared(tokens, context)
        return y if self.shared_gate is None else torch.sigmoid(self.shared_gate(tokens)) * y

    def _watch(self, routing: Routing, seq_len: int, context: Context | None) -> None:
        """Count the choices, and record the losses of balancing."""
        balance = self.spec.balance
        valid = valid_tokens(context, seq_len)
        routing = Routing(*(rearrange(part, "(r s) n -> r s n", s=seq_len) for part in routing))
        if context is None or not context.recomputing:
            self.tokens_per_expert += count_choices(routing.indices, self.spec.num_experts, valid).sum(0)
        if context is None:
            return
        # Recomputed like all else in a backward pass; the context keeps what the first pass records.
        if balance.aux_loss:
            loss = balance_loss(routing, balance.level, valid, context.peers)
            context.record("balance", loss, balance.aux_loss)
        if balance.z_loss:
            context.record("router_z", z_loss(routing, valid, context.peers), balance.z_loss)
