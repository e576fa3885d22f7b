"""Gated DeltaNet against a model written from its definition: one token, one head at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imprint.models.config import GatedDeltaNetConfig
from imprint.models.errors import CheckpointError
from imprint.models.gated_deltanet import GatedDeltaNet, GatedDeltaNetMixer
from imprint.models.registry import parse_config

SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "initializer_range": 0.4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "grouped_negeig": {"num_v_heads": 4, "expand_v": 0.5, "allow_neg_eigval": True},
    "no_gate_conv2": {"use_gate": False, "conv_size": 2, "expand_v": 1.0},
    "no_conv_tied": {"use_short_conv": False, "tie_word_embeddings": True},
}


def build(**options: Any) -> GatedDeltaNet:
    model = GatedDeltaNet(GatedDeltaNetConfig(**{**SIZES, **options})).double()
    model.reset_parameters(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()))
    return model


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def naive_mixer(config: GatedDeltaNetConfig, w: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    """The mixer of one layer over one sequence."""

    def projected(name: str, heads: int) -> Tensor:
        u_TD = x_TD @ w[f"{name}_proj.weight"].T
        if config.use_short_conv:
            taps = w[f"{name}_conv1d.weight"][:, 0].flip(-1)
            shifted = [F.pad(u_TD, (0, 0, j, 0))[: len(u_TD)] for j in range(config.conv_size)]
            u_TD = sum((taps[:, j] * shifted[j] for j in range(config.conv_size)), u_TD * 0)
        return F.silu(u_TD).unflatten(-1, (heads, -1))

    value_heads = config.num_v_heads or config.num_heads
    q, k, v = (
        projected(n, h)
        for n, h in zip("qkv", (config.num_heads,) * 2 + (value_heads,), strict=True)
    )
    beta_TH = (x_TD @ w["b_proj.weight"].T).sigmoid() * (1 + config.allow_neg_eigval)
    rate_H = w["A_log"].exp()
    decay_TH = (-rate_H * F.softplus(x_TD @ w["a_proj.weight"].T + w["dt_bias"])).exp()
    tokens = []
    state = [x_TD.new_zeros(q.shape[-1], v.shape[-1]) for _ in range(value_heads)]
    for t in range(len(x_TD)):
        heads = []
        for h in range(value_heads):
            key_head = h // (value_heads // config.num_heads)
            q_t, k_t = (
                u[t, key_head] / (u[t, key_head].square().sum() + 1e-6).sqrt() for u in (q, k)
            )
            faded = decay_TH[t, h] * state[h]
            state[h] = faded + beta_TH[t, h] * torch.outer(k_t, v[t, h] - k_t @ faded)
            o = norm(q_t @ state[h] * len(q_t) ** -0.5, w["o_norm.weight"], config.norm_eps)
            if config.use_gate:
                gate = (w["g_proj.weight"] @ x_TD[t]).unflatten(0, (value_heads, -1))[h]
                o = o * F.silu(gate)
            heads.append(o)
        tokens.append(w["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(tokens)


def naive_logits(model: GatedDeltaNet, tokens_T: Tensor) -> Tensor:
    config, weights = model.config, dict(model.named_parameters(remove_duplicate=False))
    x_TD = weights["model.embeddings.weight"][tokens_T]

    def rows(x: Tensor, name: str) -> Tensor:
        return torch.stack([norm(row, weights[name], config.norm_eps) for row in x])

    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        attn = f"{prefix}attn."
        own = {n[len(attn) :]: p for n, p in weights.items() if n.startswith(attn)}
        x_TD = x_TD + naive_mixer(config, own, rows(x_TD, f"{prefix}attn_norm.weight"))
        y_TD = rows(x_TD, f"{prefix}mlp_norm.weight")
        gate, up, down = (weights[f"{prefix}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        x_TD = x_TD + (F.silu(y_TD @ gate.T) * (y_TD @ up.T)) @ down.T
    return rows(x_TD, "model.norm.weight") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_definition_in_values_and_gradients(variant: str) -> None:
    model = build(**VARIANTS[variant])
    tokens_T = torch.randint(29, (37,), generator=torch.Generator().manual_seed(0))
    hidden, _ = model(tokens_T.unsqueeze(0))
    results = []
    for logits in (model.logits(hidden)[0], naive_logits(model, tokens_T)):
        model.zero_grad()
        F.cross_entropy(logits[:-1], tokens_T[1:]).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append((logits.detach(), grads))
    (logits, grads), (right, right_grads) = results
    torch.testing.assert_close(logits, right, rtol=1e-9, atol=1e-9)
    for name, grad in right_grads.items():
        assert grad is not None
        assert float(grad.norm()) > 0, name
        assert float((grads[name] - grad).norm()) < 1e-9 * float(grad.norm()), name


def test_fresh_rates_and_steps_lie_in_their_ranges() -> None:
    model = build(num_v_heads=64)
    for mixer in model.mixers:
        assert isinstance(mixer, GatedDeltaNetMixer)
        rates, steps = mixer.A_log.detach().exp(), F.softplus(mixer.dt_bias.detach())
        assert 0 < float(rates.min()) < 4 < 12 < float(rates.max()) <= 16
        assert 1e-3 * 0.999 <= float(steps.min()) < 2e-3 < 5e-2 < float(steps.max()) <= 0.1001


def test_rates_and_norms_stay_float32_when_the_rest_is_bfloat16() -> None:
    model = build()
    kept = {
        name.rpartition(".attn.")[2]
        for name in model.state_dict()
        if model.parameter_dtype(name, torch.bfloat16) == torch.float32
    }
    assert {"A_log", "dt_bias", "o_norm.weight", "model.norm.weight"} <= kept
    assert not {"q_proj.weight", "a_proj.weight", "q_conv1d.weight", "lm_head.weight"} & kept


@pytest.mark.parametrize("use_gate", [True, False])
def test_bfloat16_keeps_a_float32_state(use_gate: bool) -> None:
    model = build(use_gate=use_gate).float()
    tokens_BT = torch.randint(29, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right, _ = model(tokens_BT)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.to(model.parameter_dtype(name, torch.bfloat16))
        hidden, state = model(tokens_BT)
        step, state = model(tokens_BT[:, :1], state)
    assert hidden.dtype == step.dtype == torch.bfloat16
    assert all(layer["S"].dtype == torch.float32 for layer in state.layers)
    assert float((hidden.float() - right).norm() / right.norm()) < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_v_heads": 3}, "num_v_heads 3 is not a multiple of num_heads 2"),
        ({"num_v_heads": 0}, "num_value_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"expand_v": 0.3}, "expand_v 0.3 times head_dim 6 is not a whole number"),
        ({"output_gate_activation": "sigmoid"}, "output_gate_activation 'sigmoid' is not supp"),
        (
            {"hidden_act": "gelu"},
            'hidden_act .gelu. is not supported; it must be "swish" or "silu"',
        ),
        ({"attn": {"layers": [1]}}, "attn .* is not supported"),
        ({"use_gate": 1}, "use_gate must be true or false, got 1"),
    ],
)
def test_unusable_settings_are_named(changes: dict[str, Any], message: str) -> None:
    raw = {**SIZES, "model_type": "gated_deltanet", "output_gate_activation": "swish"}
    assert isinstance(parse_config(raw), GatedDeltaNetConfig)
    with pytest.raises(CheckpointError, match=message):
        parse_config({**raw, **changes})


def test_a_config_names_its_own_architecture() -> None:
    with pytest.raises(CheckpointError, match="model_type 'delta_net' is not that of"):
        dataclasses.replace(GatedDeltaNetConfig(**SIZES), model_type="delta_net")
    with pytest.raises(CheckpointError, match="model_type is missing"):
        parse_config(SIZES)
