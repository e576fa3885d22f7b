"""Decoding in place on a pool equals decoding on copies, for every architecture."""

from __future__ import annotations

import copy

import pytest
import torch

from imprint.models import DeltaNetConfig, GatedDeltaNetConfig, LoraDelta, RecurrentState
from imprint.models.architecture import FastWeightModel
from imprint.models.generate import decode, prefill
from imprint.models.pool_decoder import GRAPH_SIZES, PoolDecoder, warm_up
from imprint.models.registry import build_model

ROWS = [3, 1, 4]
NUM_ROWS = 6


def read_pool(model: FastWeightModel) -> RecurrentState:
    """A pool whose rows have read different texts; row 0 is at a document's start."""
    generator = torch.Generator(model.device).manual_seed(2)
    size = (NUM_ROWS, 11)
    tokens = torch.randint(257, size, generator=generator, device=model.device)
    _, state = prefill(model, tokens)
    state.zero_([0])
    return state


def three_deltas(model: FastWeightModel, rank: int = 2) -> LoraDelta:
    delta = LoraDelta.init(
        model.lora_targets(), rank, seed=0, num=3, dtype=model.dtype, device=model.device
    )
    generator = torch.Generator(model.device).manual_seed(3)
    for tensor in delta.b.values():
        tensor.normal_(0.0, 0.3, generator=generator)
    return delta


@pytest.mark.parametrize("num_deltas", [0, 1, 3])
def test_steps_in_place_equal_steps_on_copies(
    any_model64: FastWeightModel, num_deltas: int
) -> None:
    model = any_model64
    pool = read_pool(model)
    delta = three_deltas(model).slice(0, num_deltas) if num_deltas else None
    copies, before = pool.select(ROWS), pool.clone()
    decoder = PoolDecoder(model, pool)
    for tokens in ([5, 6, 7], [8, 250, 0], [0, 1, 2]):
        expected, copies = decode(model, torch.tensor(tokens), copies, delta=delta)
        actual = decoder.decode(tokens, ROWS, delta)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(pool.select(ROWS).tensors(), copies.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    others = [row for row in range(NUM_ROWS) if row not in ROWS]
    for mine, theirs in zip(pool.tensors(), before.tensors(), strict=True):
        assert torch.equal(mine[others], theirs[others])


def test_a_step_of_a_whole_pool_needs_no_rows(any_model64: FastWeightModel) -> None:
    pool = read_pool(any_model64)
    tokens_B = torch.arange(NUM_ROWS)
    hidden_B1D, expected = any_model64(tokens_B.unsqueeze(1), pool)
    hidden_BD = any_model64.step_(tokens_B, pool)
    torch.testing.assert_close(hidden_BD, hidden_B1D[:, 0], rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(pool.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
OPTIONS = [
    DeltaNetConfig(**SIZES, num_heads=2, use_gate=True, allow_neg_eigval=True, conv_size=3),
    DeltaNetConfig(**SIZES, num_heads=2, use_beta=False, use_short_conv=False, expand_v=2.0),
    GatedDeltaNetConfig(**SIZES, num_heads=2, head_dim=8, use_gate=False, conv_size=1),
]


@pytest.mark.parametrize("config", OPTIONS)
def test_every_option_of_the_delta_rules_decodes_in_place(
    config: DeltaNetConfig | GatedDeltaNetConfig,
) -> None:
    model = build_model(config).double().requires_grad_(False)
    model.reset_parameters(4)
    tokens = torch.arange(14).view(2, 7)
    _, state = prefill(model, tokens)
    pool = state.clone()
    expected, state = decode(model, torch.tensor([9, 3]), state)
    actual = PoolDecoder(model, pool).decode([9, 3], [0, 1])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(pool.tensors(), state.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_padding_may_share_a_row(any_model64: FastWeightModel) -> None:
    """What graphs rely on: rows that nobody owns, several times in a batch, change no other."""
    model = any_model64
    pool = read_pool(model)
    expected, _ = decode(model, torch.tensor([5]), pool.select([2]))
    actual = PoolDecoder(model, pool).decode([5, 0, 0], [2, 0, 0])
    torch.testing.assert_close(actual[:1], expected, rtol=1e-10, atol=1e-10)


def test_every_architecture_warms_up(any_model64: FastWeightModel) -> None:
    before = [parameter.clone() for parameter in any_model64.parameters()]
    warm_up(any_model64)
    assert all(map(torch.equal, before, any_model64.parameters()))


@pytest.mark.parametrize("rows", [ROWS, [2]])
def test_a_step_in_its_two_parts(any_model64: FastWeightModel, rows: list[int]) -> None:
    """As graphs do it; LaCT ends chunks on the way."""
    model = any_model64
    pool = read_pool(model)
    twin, rows_B, delta = pool.clone(), torch.tensor(rows), three_deltas(model).slice(0, len(rows))
    for t in range(12):
        tokens_B = torch.arange(len(rows)) + 3 * t
        expected = model.step_(tokens_B, pool, rows_B, delta=delta)
        actual = model.advance_(tokens_B, twin, rows_B, delta=delta)
        model.end_(twin, rows_B)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        for mine, theirs in zip(twin.tensors(), pool.tensors(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
def test_graphs_equal_steps_on_copies(any_model64: FastWeightModel) -> None:
    model = copy.deepcopy(any_model64).float().to("cuda")
    pool = read_pool(model)
    copies = pool.select(ROWS)
    decoder = PoolDecoder(model, pool)
    nothing, deltas = None, three_deltas(model)
    other = deltas.scaled(-1.0)
    for tokens, delta in zip(
        ([5, 6, 7], [8, 9, 250], [3, 2, 1], [4, 4, 4], [1, 8, 1], [0, 2, 2]),
        (nothing, deltas, other, deltas, nothing, deltas),
        strict=True,
    ):
        tokens_B = torch.tensor(tokens, device="cuda")
        expected, copies = decode(model, tokens_B, copies, delta=delta)
        actual = decoder.decode(tokens, ROWS, delta)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
        decoder.forget()
    for mine, theirs in zip(pool.select(ROWS).tensors(), copies.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert list(GRAPH_SIZES) == sorted(GRAPH_SIZES)


def test_a_copy_that_breaks_off_leaves_nothing_to_the_deltas_it_replaced(
    any_model64: FastWeightModel,
) -> None:
    """What graphs read, without a graph."""
    model = any_model64
    decoder = PoolDecoder(model, read_pool(model))
    first, second = three_deltas(model), three_deltas(model)
    shape = (3, first.rank, tuple(first.a))
    decoder._hold(first, shape)
    torn = LoraDelta(second.a, {**second.b})
    torn.b[next(reversed(torn.b))] = torch.zeros(3, 1, 1, 1, dtype=model.dtype)  # fits nowhere
    torn.b[next(iter(torn.b))] = torn.b[next(iter(torn.b))] + 1
    with pytest.raises(RuntimeError):
        decoder._hold(torn, shape)
    held = decoder._hold(first, shape)
    for mine, theirs in zip(held.parameters(), first.parameters(), strict=True):
        assert torch.equal(mine, theirs)
