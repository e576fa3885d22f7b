"""The delta-rule models: pieces equal the whole, ragged batches single rows, steps reading."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.models.config import DeltaNetConfig, GatedDeltaNetConfig
from imprint.models.deltanet import DeltaNet
from imprint.models.gated_deltanet import GatedDeltaNet
from imprint.models.generate import decode, generate_greedy, prefill
from imprint.models.registry import build_model
from imprint.models.state import RecurrentState

VOCAB = 31
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}
GATED = {**SIZES, "head_dim": 8}
VARIANTS: dict[str, DeltaNetConfig | GatedDeltaNetConfig] = {
    "plain": DeltaNetConfig(**SIZES),
    "gate_negeig": DeltaNetConfig(**SIZES, use_gate=True, allow_neg_eigval=True),
    "no_conv": DeltaNetConfig(**SIZES, use_short_conv=False),
    "no_beta_conv2": DeltaNetConfig(**SIZES, use_beta=False, conv_size=2),
    "wide_values_tied": DeltaNetConfig(
        **SIZES, expand_v=2.0, expand_k=0.5, tie_word_embeddings=True
    ),
    "gated": GatedDeltaNetConfig(**GATED),
    "gated_no_gate_negeig": GatedDeltaNetConfig(
        **GATED, use_gate=False, allow_neg_eigval=True, expand_v=1.0
    ),
    "gated_no_conv_tied": GatedDeltaNetConfig(
        **GATED, use_short_conv=False, tie_word_embeddings=True
    ),
    "gated_grouped_conv2": GatedDeltaNetConfig(**GATED, num_v_heads=6, expand_v=0.5, conv_size=2),
}
Model = DeltaNet | GatedDeltaNet


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Model:
    model = build_model(VARIANTS[request.param]).double().eval()
    assert isinstance(model, DeltaNet | GatedDeltaNet)
    model.reset_parameters(7)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_state(model: Model, batch: int) -> RecurrentState:
    generator = torch.Generator().manual_seed(3)
    state = model.init_state(batch)
    for tensor in state.tensors():
        tensor.normal_(generator=generator)
    return state


def loss_of(model: Model, hidden: Tensor, state: RecurrentState) -> Tensor:
    weight = torch.linspace(0.5, 1.5, hidden.shape[1], dtype=hidden.dtype).unsqueeze(-1)
    return (model.logits(hidden) * weight).log_softmax(-1)[..., 3].sum() + sum(
        (t * t.detach().cos()).sum() for t in state.tensors()
    )


def assert_same_state(got: RecurrentState, right: RecurrentState, tolerance: float = 1e-10) -> None:
    for a, b in zip(got.tensors(), right.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cuts", [(1,), (2,), (40,), (69,), (1, 2, 3), (7, 40, 41, 66)])
def test_reading_in_pieces_equals_reading_at_once(model: Model, cuts: tuple[int, ...]) -> None:
    document = tokens(2, 70)
    results = []
    for edges in ((0, 70), (0, *cuts, 70)):
        model.zero_grad()
        start = random_state(model, 2).leaf()
        state, hiddens = start, []
        for first, last in itertools.pairwise(edges):
            hidden, state = model(document[:, first:last], state)
            hiddens.append(hidden)
        loss_of(model, torch.cat(hiddens, 1), state).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append((torch.cat(hiddens, 1), state, grads, start.grads()))
    (hidden, state, grads, start), (hidden_cut, state_cut, grads_cut, start_cut) = results
    torch.testing.assert_close(hidden_cut, hidden, rtol=1e-10, atol=1e-10)
    assert_same_state(state_cut, state)
    for name, grad in grads.items():
        scale = float(grad.norm())
        assert scale > 0, name
        assert float((grads_cut[name] - grad).norm()) < 1e-10 * scale, name
    for grad_cut, grad in zip(start_cut, start, strict=True):
        torch.testing.assert_close(grad_cut, grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lengths", [(5, 1, 9), (70, 3, 2), (1, 1, 1)])
def test_ragged_batch_equals_single_rows(model: Model, lengths: tuple[int, ...]) -> None:
    longest, num = max(lengths), len(lengths)
    document, start = tokens(num, longest), random_state(model, num)
    leaf = start.leaf()
    hidden, state = model(document, leaf, lengths_B=torch.tensor(lengths))
    rows = [(model(document[i : i + 1, :n], start.slice(i, i + 1))) for i, n in enumerate(lengths)]
    for i, (n, (hidden_row, _)) in enumerate(zip(lengths, rows, strict=True)):
        torch.testing.assert_close(hidden[i : i + 1, :n], hidden_row, rtol=1e-10, atol=1e-10)
    right = RecurrentState.stack([row_state for _, row_state in rows])
    assert_same_state(state, right)

    sum((t.cos()).sum() for t in state.tensors()).backward()
    single = start.leaf()
    single_states = [
        model(document[i : i + 1, :n], single.slice(i, i + 1))[1] for i, n in enumerate(lengths)
    ]
    stacked = RecurrentState.stack(single_states)
    sum((t.cos()).sum() for t in stacked.tensors()).backward()
    for grad, right_grad in zip(leaf.grads(), single.grads(), strict=True):
        torch.testing.assert_close(grad, right_grad, rtol=1e-9, atol=1e-10)


def test_padding_changes_nothing(model: Model) -> None:
    document, lengths = tokens(2, 20), torch.tensor([20, 6])
    other = document.clone()
    other[1, 6:] = (other[1, 6:] + 11) % VOCAB
    with torch.no_grad():
        hidden, state = model(document, lengths_B=lengths)
        hidden_other, state_other = model(other, lengths_B=lengths)
    assert_same_state(state_other, state, 0.0)
    torch.testing.assert_close(hidden_other[1, :6], hidden[1, :6], rtol=0, atol=0)


def test_row_of_length_zero_keeps_its_state(model: Model) -> None:
    start = random_state(model, 2)
    with torch.no_grad():
        _, state = model(tokens(2, 5), start, lengths_B=torch.tensor([5, 0]))
    assert_same_state(state.slice(1, 2), start.slice(1, 2), 0.0)


def test_decoding_equals_reading(model: Model) -> None:
    document = tokens(3, 40)
    with torch.no_grad():
        hidden, right = model(document)
        logits, state = prefill(model, document[:, :7])
        got = [logits]
        for t in range(7, 40):
            logits, state = decode(model, document[:, t], state)
            got.append(logits)
        torch.testing.assert_close(
            torch.stack(got, 1), model.logits(hidden)[:, 6:], rtol=1e-10, atol=1e-10
        )
    assert_same_state(state, right)


def test_decoding_leaves_the_incoming_state_alone(model: Model) -> None:
    _, state = prefill(model, tokens(2, 9))
    before = state.clone()
    decode(model, tokens(2, 1)[:, 0], state)
    assert_same_state(state, before, 0.0)


def test_prefill_of_ragged_rows_gives_each_rows_last_logits(model: Model) -> None:
    document, lengths = tokens(2, 12), torch.tensor([12, 5])
    logits, _ = prefill(model, document, lengths_B=lengths)
    single, _ = prefill(model, document[1:, :5])
    torch.testing.assert_close(logits[1:], single, rtol=1e-10, atol=1e-10)


def test_greedy_generation_follows_the_argmax(model: Model) -> None:
    prompt = tokens(2, 6)
    new = generate_greedy(model, prompt, None, num_tokens=4)
    assert new.shape == (2, 4)
    with torch.no_grad():
        hidden, _ = model(torch.cat((prompt, new), 1))
        assert torch.equal(model.logits(hidden)[:, 5:9].argmax(-1), new)


def test_rows_do_not_see_each_other(model: Model) -> None:
    document = tokens(3, 33)
    with torch.no_grad():
        together, _ = model(document)
        alone, _ = model(document[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-10, atol=1e-10)


def test_init_state_is_zero_and_has_the_layout_of_the_config(model: Model) -> None:
    config, state = model.config, model.init_state(3)
    assert len(state.layers) == config.num_hidden_layers
    for layer in state.layers:
        assert layer["S"].shape == (3, config.num_value_heads, config.head_k_dim, config.head_v_dim)
        names = {"S", "conv_q", "conv_k", "conv_v"} if config.use_short_conv else {"S"}
        assert set(layer) == names
        if config.use_short_conv:
            assert layer["conv_v"].shape == (3, config.conv_size - 1, config.value_dim)
    assert not any(tensor.any() for tensor in state.tensors())


def test_state_stays_float32_under_bfloat16(tiny_model: DeltaNet) -> None:
    model = DeltaNet(tiny_model.config).to(torch.bfloat16)
    model.load_state_dict(tiny_model.state_dict())
    with torch.no_grad():
        hidden, state = model(tokens(1, 40))
        right, _ = tiny_model(tokens(1, 40))
    assert hidden.dtype == torch.bfloat16
    assert model.logits(hidden).dtype == torch.float32
    assert all(layer["S"].dtype == torch.float32 for layer in state.layers)
    assert float((hidden.float() - right).norm() / right.norm()) < 0.1


def test_lora_targets_are_the_projections(model: Model) -> None:
    targets, config = model.lora_targets(), model.config
    assert targets["layers.1.attn.v_proj"] == (config.hidden_size, config.value_dim)
    assert targets["layers.0.mlp.down_proj"] == (config.mlp_dim, config.hidden_size)
    assert ("layers.0.attn.b_proj" in targets) == config.use_beta
    assert ("layers.0.attn.g_proj" in targets) == config.use_gate


def test_same_seed_gives_the_same_weights(tiny_model: DeltaNet) -> None:
    first, second = DeltaNet(tiny_model.config), DeltaNet(tiny_model.config)
    first.reset_parameters(5)
    second.reset_parameters(5)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    second.reset_parameters(6)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
