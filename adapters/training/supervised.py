"""The loss of a response after its prompt, back through the prompt in constant memory.

The prompt is read once without gradients, in segments whose states are kept, and once more, from
its end, with the gradient of the state after each. Limit: one prompt.
Shapes: T = tokens of the prompt, R = tokens of the response.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imprint.adapters.calls import run_calls
from imprint.adapters.reading import read_segments
from imprint.models import FastWeightModel


def supervised_step(
    model: FastWeightModel, prompt_T: Tensor, response_R: Tensor, *, segment_tokens: int
) -> float:
    """Add the gradient of the response's mean next-token loss to `.grad`; returns it in nats.

    The prompt has two tokens or more, the response one or more.
    """
    before_T, tail_R = prompt_T[:-1], torch.cat((prompt_T[-1:], response_R[:-1]))
    reading = run_calls(
        read_segments(model, before_T, segment_tokens=segment_tokens, entropy=False)
    )
    assert reading.states is not None
    leaf = reading.end.state.leaf()
    with torch.enable_grad():
        hidden_1RD, _ = model(tail_R.unsqueeze(0), leaf, keep_state=False)
        loss = -model.token_logprobs(hidden_1RD[0], response_R).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    segments = torch.split(before_T, segment_tokens)
    for index in range(len(segments) - 1, -1, -1):
        state_grads = leaf.grads()
        leaf = reading.states.slice(index, index + 1).leaf()
        with torch.enable_grad():
            _, end = model(segments[index].unsqueeze(0), leaf)
        _backward(end.tensors(), state_grads)
    return float(loss.detach())


def _backward(tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    pairs = [
        (tensor, grad)
        for tensor, grad in zip(tensors, grads, strict=True)
        if grad is not None and tensor.requires_grad
    ]
    if pairs:
        torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
