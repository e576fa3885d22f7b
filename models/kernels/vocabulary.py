"""Entropy, log-probability and arg-max of next-token distributions, straight from hidden states.

The [T, V] logits of a long reading are never held at once. On a GPU, Triton kernels go through the
vocabulary in tiles; elsewhere the plain form works through blocks of tokens, and where gradients
are wanted it computes a block's logits a second time instead of keeping them. A single block is
computed exactly as one would write it down.
Shapes: T = tokens, D = model width, V = vocabulary; a leading ... is any number of axes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from imprint.models.kernels import interpreting, uses_triton
from imprint.models.sampling import token_entropy

_BLOCK_ELEMENTS = 1 << 24  # logits held at once: 64 MiB in float32


def token_logprobs(
    hidden: Tensor, weight_VD: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probability in nats of the token `targets[...]` after `hidden[..., D]`: [...].

    Logits are divided by `temperature`. Float32 at least; differentiable in `hidden` and the
    weight, once.
    """
    if _runs_on_triton(hidden, weight_VD):
        flat_TD, flat_T = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        found_T = triton_token_logprobs(flat_TD, weight_VD, flat_T, temperature)
        return found_T.view(targets.shape)
    size = block_tokens(weight_VD.shape[0])
    if targets.numel() <= size:
        return plain_token_logprobs(hidden, weight_VD, targets, temperature)
    blocks_TD = torch.split(hidden.reshape(-1, hidden.shape[-1]), size)
    pairs = zip(blocks_TD, torch.split(targets.reshape(-1), size), strict=True)
    found = [_recomputed(plain_token_logprobs, h, weight_VD, t, temperature) for h, t in pairs]
    return torch.cat(found).view(targets.shape)


@torch.no_grad()
def token_entropies(hidden: Tensor, weight_VD: Tensor) -> Tensor:
    """Entropy in nats of the distribution after `hidden[..., D]`: [...], float32 at least."""
    if _runs_on_triton(hidden, weight_VD):
        found_T = triton_token_entropies(hidden.reshape(-1, hidden.shape[-1]), weight_VD)
        return found_T.view(hidden.shape[:-1])
    return _by_blocks(hidden, weight_VD, token_entropy)


@torch.no_grad()
def most_likely_tokens(hidden: Tensor, weight_VD: Tensor) -> Tensor:
    """The most likely token after `hidden[..., D]`, the first of equals: [...], int64."""
    if _runs_on_triton(hidden, weight_VD):
        found_T = triton_most_likely_tokens(hidden.reshape(-1, hidden.shape[-1]), weight_VD)
        return found_T.view(hidden.shape[:-1])
    return _by_blocks(hidden, weight_VD, lambda logits: logits.argmax(-1))


def plain_token_logprobs(
    hidden: Tensor, weight_VD: Tensor, targets: Tensor, temperature: float
) -> Tensor:
    """`token_logprobs` in plain torch and at once, with all logits in memory."""
    logits = vocabulary_logits(hidden, weight_VD)
    if temperature != 1.0:
        logits = logits / temperature
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def triton_token_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float
) -> Tensor:
    """`token_logprobs` in Triton: [T], float32; differentiable in both inputs."""
    out_T: Tensor = _TokenLogprobs.apply(hidden_TD, weight_VD, targets_T, temperature)  # type: ignore[no-untyped-call]
    return out_T


def triton_token_entropies(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    """`token_entropies` in Triton: [T], float32."""
    from imprint.models.kernels import triton_vocabulary

    return triton_vocabulary.statistics(*_plain(hidden_TD, weight_VD), None, 1.0).entropy_T


def triton_most_likely_tokens(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    """`most_likely_tokens` in Triton: [T], int64."""
    from imprint.models.kernels import triton_vocabulary

    return triton_vocabulary.statistics(*_plain(hidden_TD, weight_VD), None, 1.0).best_T


def vocabulary_logits(hidden: Tensor, weight_VD: Tensor) -> Tensor:
    """Logits [..., V] in float32 at least."""
    logits = F.linear(hidden, weight_VD)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def block_tokens(vocabulary: int) -> int:
    """Tokens whose logits are held at once."""
    return max(1, _BLOCK_ELEMENTS // vocabulary)


def _by_blocks(hidden: Tensor, weight_VD: Tensor, of_logits: Callable[[Tensor], Tensor]) -> Tensor:
    size = block_tokens(weight_VD.shape[0])
    if hidden.shape[:-1].numel() <= size:
        return of_logits(vocabulary_logits(hidden, weight_VD))
    blocks = torch.split(hidden.reshape(-1, hidden.shape[-1]), size)
    found = [of_logits(vocabulary_logits(block_TD, weight_VD)) for block_TD in blocks]
    return torch.cat(found).view(hidden.shape[:-1])


def _recomputed(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    out: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out


def _runs_on_triton(hidden: Tensor, weight_VD: Tensor) -> bool:
    served = hidden.dtype == weight_VD.dtype != torch.float64 and hidden.numel() > 0
    return served and uses_triton(hidden.device)


def _plain(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs as the kernels take them."""
    if interpreting():  # its products of bfloat16 are wrong; on a GPU nothing is converted
        hidden_TD, weight_VD = hidden_TD.float(), weight_VD.float()
    return hidden_TD.contiguous(), weight_VD.contiguous()


class _TokenLogprobs(torch.autograd.Function):
    """`token_logprobs` in Triton; keeps one number a token and computes the logits again."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        temperature: float,
    ) -> Tensor:
        from imprint.models.kernels import triton_vocabulary

        found = triton_vocabulary.statistics(
            *_plain(hidden_TD, weight_VD), targets_T.contiguous(), temperature
        )
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, found.top_T, found.log_mass_T)
        ctx.temperature = temperature  # type: ignore[attr-defined]
        return found.chosen_T - found.top_T - found.log_mass_T

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_T: Tensor
    ) -> tuple[Tensor | None, ...]:
        from imprint.models.kernels import triton_vocabulary

        hidden_TD, weight_VD, *per_token = ctx.saved_tensors  # type: ignore[attr-defined]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        temperature: float = ctx.temperature  # type: ignore[attr-defined]
        plain_TD, plain_VD = _plain(hidden_TD, weight_VD)
        size = block_tokens(weight_VD.shape[0])
        grads_hidden: list[Tensor] = []
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        per_token = [tensor.contiguous() for tensor in (*per_token, grad_T)]
        for start in range(0, len(plain_TD), size):
            block_TD, *of_block = (t[start : start + size] for t in (plain_TD, *per_token))
            targets_T, top_T, log_mass_T, chosen_grad_T = of_block
            grad_TV = triton_vocabulary.logit_grads(
                block_TD, plain_VD, targets_T, top_T, log_mass_T, chosen_grad_T, temperature
            )
            if wants_hidden:
                grads_hidden.append(grad_TV @ plain_VD)
            if grad_VD is not None:
                grad_VD += grad_TV.mT @ block_TD
        return (
            torch.cat(grads_hidden).to(hidden_TD.dtype) if wants_hidden else None,
            None if grad_VD is None else grad_VD.to(weight_VD.dtype),
            None,
            None,
        )
