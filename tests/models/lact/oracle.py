"""LaCT once more, as plainly as can be: whole documents only, loops over rows, heads and chunks.

The steps of the fast weights come from autograd, the rotary positions from complex numbers; nothing
is shared with the package. For float64; everything is differentiable in the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x: Tensor, heads: int, theta: float) -> Tensor:
    """Rotary positions 0 ... T - 1 on x [T, D], cut into `heads`."""
    num_tokens, width = x.shape[0], x.shape[1] // heads
    first, second = x.view(num_tokens, heads, width).chunk(2, -1)
    frequency = theta ** -(torch.arange(0, width, 2, dtype=x.dtype) / width)
    angle = torch.arange(num_tokens, dtype=x.dtype)[:, None, None] * frequency
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1).flatten(1)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    rows = []
    for t in range(q.shape[0]):
        seen = slice(max(0, t - window + 1), t + 1)
        weight = (k[seen] @ q[t] * q.shape[1] ** -0.5).softmax(0)
        rows.append(weight @ v[seen])
    return torch.stack(rows)


def orthogonalized(x: Tensor) -> Tensor:
    x = x / (x.square().sum().sqrt() + 1e-7)
    for a, b, c in COEFFICIENTS:
        if x.shape[0] > x.shape[1]:
            gram = x.T @ x
            x = a * x + x @ (b * gram + c * gram @ gram)
        else:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def unit_rows(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True).sqrt() + 1e-5)


def fast(weights: list[Tensor], x: Tensor) -> Tensor:
    w0, w1, w2 = weights
    return (F.silu(x @ w0.T) * (x @ w2.T)) @ w1.T


def remember(
    weights: list[Tensor], q: Tensor, k: Tensor, v: Tensor, rates: Tensor, decay: Tensor, cfg: Any
) -> Tensor:
    """One fast head over a document: read a chunk, then step on it."""
    norms = [w.square().sum(-1, keepdim=True).sqrt() for w in weights]
    momentum = [torch.zeros_like(w) for w in weights]
    outs = []
    for first in range(0, q.shape[0], cfg.lact_chunk_size):
        chunk = slice(first, first + cfg.lact_chunk_size)
        outs.append(fast(weights, q[chunk]))
        said = (fast(weights, k[chunk]) * v[chunk]).sum(-1)
        for i, rate in enumerate(rates[chunk].unbind(-1)):
            (step,) = torch.autograd.grad((rate * said).sum(), weights[i], create_graph=True)
            momentum[i] = step + decay[chunk].mean() * momentum[i]
        steps = [orthogonalized(m) for m in momentum] if cfg.use_muon else momentum
        moved = zip(weights, steps, norms, strict=True)
        weights = [unit_rows(w + step) * norm for w, step, norm in moved]
    return torch.cat(outs)


def mix(p: Mapping[str, Tensor], cfg: Any, x: Tensor) -> Tensor:
    """The mixer on one row, x [T, D]."""
    fast_heads, attn_heads = cfg.num_lact_heads, cfg.num_attn_heads
    q, k, v = F.linear(x, p["qkv.weight"], p.get("qkv.bias")).chunk(3, -1)
    if cfg.attn_qk_norm:
        q, k = rms(q, p["q_norm.weight"], 1e-5), rms(k, p["k_norm.weight"], 1e-5)
    turned = [turn(y, attn_heads, cfg.rope_theta).chunk(attn_heads, -1) for y in (q, k)]
    heads = zip(*turned, v.chunk(attn_heads, -1), strict=True)
    seen = torch.cat([attend(*head, cfg.window_size) for head in heads], -1)

    def prepared(y: Tensor, column: int) -> Tensor:
        y = y * p["qk_scale"][:, column] + p["qk_offset"][:, column]
        y = F.silu(y) if cfg.qkv_silu else y
        y = torch.cat([unit_rows(part) for part in y.chunk(fast_heads, -1)], -1)
        return y if cfg.ttt_nope else turn(y, attn_heads, cfg.rope_theta)

    fq, fk = (prepared(y, i).chunk(fast_heads, -1) for i, y in enumerate((q, k)))
    fv = (F.silu(v) if cfg.qkv_silu and not cfg.no_v_silu else v).chunk(fast_heads, -1)
    raw = F.linear(x, p["lr_proj.weight"], p["lr_proj.bias"])
    rates = F.softplus(raw + torch.tensor(1e-3, dtype=x.dtype).expm1().log())
    decay = torch.zeros_like(x[:, :fast_heads])
    if cfg.use_momentum:
        decay = F.linear(x, p["momentum_proj.0.weight"], p["momentum_proj.0.bias"]).sigmoid()
    outs = []
    for h in range(fast_heads):
        if cfg.w0_w2_low_rank > 0:
            w0, w2 = (p[f"{n}.w_left"][h] @ p[f"{n}.w_right"][h] for n in ("w0", "w2"))
            half = 0.5 * torch.eye(*w0.shape, dtype=w0.dtype)
            weights = [w0 + half, p["w1"][h], w2 + half]
        else:
            weights = [p["w0"][h], p["w1"][h], p["w2"][h]]
        mine = slice(3 * h, 3 * h + 3)
        out = remember(weights, fq[h], fk[h], fv[h], rates[:, mine], decay[:, h], cfg)
        out = rms(out, p["ttt_norm.weight"], 1e-5)
        if cfg.learnable_ttt_scale:
            scale = F.linear(x, p["ttt_scale_proj.weight"], p["ttt_scale_proj.bias"])
            out = out * F.silu(scale[:, h : h + 1])
        outs.append(out)
    return F.linear(seen + torch.cat(outs, -1), p["o_proj.weight"])


def logits(parameters: Mapping[str, Tensor], cfg: Any, tokens_BT: Tensor) -> Tensor:
    """Vocabulary logits [B, T, V] of whole documents."""
    rows = []
    for tokens_T in tokens_BT:
        x = parameters["model.embeddings.weight"][tokens_T]
        for i in range(cfg.num_hidden_layers):
            start = f"model.layers.{i}."
            p = {n.removeprefix(start): w for n, w in parameters.items() if n.startswith(start)}
            attn = {n.removeprefix("attn."): w for n, w in p.items() if n.startswith("attn.")}
            x = x + mix(attn, cfg, rms(x, p["attn_norm.weight"], cfg.norm_eps))
            y = rms(x, p["mlp_norm.weight"], cfg.norm_eps)
            gate, up = (y @ p[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            x = x + (F.silu(gate) * up) @ p["mlp.down_proj.weight"].T
        x = rms(x, parameters["model.norm.weight"], cfg.norm_eps)
        rows.append(x @ parameters["lm_head.weight"].T)
    return torch.stack(rows)
