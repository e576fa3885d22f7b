"""LaCT: the plain computation, and every way to cut a document into reads, gradients included."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.models.generate import decode, generate_greedy, prefill
from imprint.models.lact import LaCT, LactMixer
from imprint.models.lact_chunks import LactPlan, LactStepPlan
from imprint.models.lact_config import LactConfig
from imprint.models.lora import LoraDelta
from imprint.models.state import RecurrentState

VOCAB = 31


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def states_after(model: LaCT, lengths: Sequence[int]) -> RecurrentState:
    """A state whose rows have read different documents of these lengths."""
    with torch.no_grad():
        _, state = model(
            tokens(len(lengths), max(lengths), seed=3), lengths_B=torch.tensor(lengths)
        )
    return state


def loss_of(hidden: Tensor, state: RecurrentState) -> Tensor:
    """Weighs every element of everything differently."""
    draw, loss = torch.Generator().manual_seed(1), hidden.new_zeros(())
    for tensor in (hidden, *state.tensors()):
        if tensor.is_floating_point():
            weights = torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
            loss = loss + (tensor * weights).sum()
    return loss


def assert_same(got: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> None:
    for a, b in zip(got, right, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert a.shape == b.shape
            error, size = (a - b).detach().double().norm(), b.detach().double().norm()
            assert float(error) <= 1e-9 * max(1.0, float(size))


def test_equals_the_plain_computation(lact: LaCT, oracle: ModuleType) -> None:
    document = tokens(2, 29)
    hidden, _ = lact(document)
    logits = lact.logits(hidden)
    parameters = dict(lact.named_parameters())
    if lact.config.tie_word_embeddings:
        parameters["lm_head.weight"] = parameters["model.embeddings.weight"]
    right = oracle.logits(parameters, lact.config, document)
    torch.testing.assert_close(logits, right, rtol=1e-9, atol=1e-9)
    weights = torch.randn(right.shape, generator=torch.Generator().manual_seed(0)).double()
    grads = torch.autograd.grad((logits * weights).sum(), list(lact.parameters()))
    right_grads = torch.autograd.grad((right * weights).sum(), list(lact.parameters()))
    for name, grad, right_grad in zip(parameters, grads, right_grads, strict=False):
        assert float(right_grad.norm()) > 0, name
        assert float((grad - right_grad).norm()) < 1e-9 * float(right_grad.norm()), name


@pytest.mark.parametrize("lengths", [(21, 21), (5, 16)], ids=["together", "apart"])
def test_reading_in_pieces_equals_reading_at_once(lact: LaCT, lengths: tuple[int, int]) -> None:
    document, before = tokens(2, 70), states_after(lact, lengths)
    results = []
    for cuts in ((), (1,), (8,), (23,), (1, 2, 3), (7, 9, 40, 64, 69)):
        edges = (0, *cuts, 70)
        lact.zero_grad()
        start = before.leaf()
        state, hiddens = start, []
        for first, last in itertools.pairwise(edges):
            hidden, state = lact(document[:, first:last], state)
            hiddens.append(hidden)
        joined = torch.cat(hiddens, 1)
        loss_of(joined, state).backward()
        grads = [p.grad.clone() for p in lact.model.parameters() if p.grad is not None]
        results.append([joined, *state.tensors(), *start.grads(), *grads])
    assert len(results[0]) > 40
    for in_pieces in results[1:]:
        assert_same(in_pieces, results[0])


@pytest.mark.parametrize("num_tokens", [1, 5, 9, 30])
def test_rows_at_different_places_equal_single_rows(lact: LaCT, num_tokens: int) -> None:
    before, document = states_after(lact, (1, 7, 8, 21, 23)), tokens(5, num_tokens)
    lengths = torch.tensor([num_tokens, 0, num_tokens, 1, max(num_tokens - 2, 1)])
    results = []
    for alone in (True, False):
        start = before.leaf()
        if alone:
            rows = [
                lact(document[i : i + 1, :n], start.slice(i, i + 1))
                for i, n in enumerate(lengths.tolist())
                if n
            ]
            rows.insert(1, (rows[0][0][:, :0], start.slice(1, 2)))
            hidden = torch.cat([row for row, _ in rows], 1)
            state = RecurrentState.stack([row_state for _, row_state in rows])
        else:
            padded, state = lact(document, start, lengths_B=lengths)
            pieces = [padded[i : i + 1, :n] for i, n in enumerate(lengths.tolist())]
            hidden = torch.cat(pieces, 1)
        loss_of(hidden, state).backward()
        results.append([hidden, *state.tensors(), *start.grads()])
    assert_same(results[1], results[0])


def test_padding_changes_nothing(lact: LaCT) -> None:
    before, document, lengths = states_after(lact, (6, 13)), tokens(2, 20), torch.tensor([20, 6])
    other = document.clone()
    other[1, 6:] = (other[1, 6:] + 11) % VOCAB
    with torch.no_grad():
        hidden, state = lact(document, before, lengths_B=lengths)
        hidden_other, state_other = lact(other, before, lengths_B=lengths)
    assert all(
        torch.equal(a, b) for a, b in zip(state.tensors(), state_other.tensors(), strict=True)
    )
    assert torch.equal(hidden[1, :6], hidden_other[1, :6])


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 40])
def test_shared_rows_equal_forked_rows(lact: LaCT, num_tokens: int, ragged: bool) -> None:
    # no row, one row or both rows end a chunk; 3 * 40 tokens are too many to go uncopied
    for lengths in ((8, 9), (8, 15), (23, 31)):
        before, results = states_after(lact, lengths), []
        document = tokens(6, num_tokens)
        lengths_B = torch.tensor([1, num_tokens] * 3) if ragged else None
        for fork in (True, False):
            start = before.leaf()
            hidden, state = lact(document, start.fork(3) if fork else start, lengths_B=lengths_B)
            if lengths_B is not None:
                inside = torch.arange(num_tokens) < lengths_B.unsqueeze(1)
                hidden = hidden * inside.unsqueeze(-1)
            loss_of(hidden, state).backward()
            results.append([hidden, *state.tensors(), *start.grads()])
        assert_same(results[1], results[0])


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 40])
def test_rows_see_a_shared_window_also_where_no_state_is_kept(lact: LaCT, num_tokens: int) -> None:
    # rings that have gone round or have not; up to 5 tokens end no chunk of 8
    for lengths in ((1, 2), (8, 9), (18, 25)):
        before, results = states_after(lact, lengths), []
        for keep_state in (True, False):
            start = before.leaf()
            rows = start.fork(3) if keep_state else start
            hidden, state = lact(tokens(6, num_tokens), rows, keep_state=keep_state)
            assert bool(state.layers) == keep_state
            hidden.sin().sum().backward()
            results.append([hidden, *start.grads()])
        # what only a kept state passes on has a gradient of zero, or none
        pairs = [(a, b) for a, b in zip(*results, strict=True) if a is not None and b is not None]
        assert len(pairs) >= 5  # what is read, and the windows of two layers
        assert_same([b for _, b in pairs], [a for a, _ in pairs])


@pytest.mark.parametrize("read_before", [1, 7, 20])
@pytest.mark.parametrize(
    ("num_tokens", "stops"),
    [(1, [1]), (1, [1, 1]), (20, [1, 4, 12, 20]), (60, [3, 8, 11, 11, 27, 28, 59, 60])],
)
def test_stops_equal_separate_reads(
    lact: LaCT, num_tokens: int, stops: list[int], read_before: int
) -> None:
    document, before = tokens(1, num_tokens), states_after(lact, (read_before,))
    results = []
    for at_once in (True, False):
        start = before.leaf()
        if at_once:
            hidden, states = lact(document, start, stops=stops)
        else:
            state, hiddens, rows, first = start, [], [], 0
            for stop in stops:
                if stop > first:
                    hidden, state = lact(document[:, first:stop], state)
                    hiddens.append(hidden)
                rows.append(state)
                first = stop
            hidden, states = torch.cat(hiddens, 1), RecurrentState.stack(rows)
        assert states.batch_size == len(stops)
        loss_of(hidden, states).backward()
        results.append([hidden, *states.tensors(), *start.grads()])
    assert_same(results[1], results[0])


def test_decoding_equals_reading(lact: LaCT) -> None:
    document, before = tokens(3, 40), states_after(lact, (6, 8, 9))
    with torch.no_grad():
        hidden, right = lact(document, before)
        logits, state = prefill(lact, document[:, :7], before)
        got = [logits]
        for t in range(7, 40):
            kept = state.clone()
            logits, new = decode(lact, document[:, t], state)
            assert_same(state.tensors(), kept.tensors())
            state = new
            got.append(logits)
    assert_same([torch.stack(got, 1)], [lact.logits(hidden)[:, 6:]])
    assert_same(state.tensors(), right.tensors())


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], None], ids=["all", "some", "unnamed"])
def test_steps_in_place_equal_decoding_across_the_ends_of_chunks(
    lact: LaCT, rows: list[int] | None
) -> None:
    pool = states_after(lact, (6, 8, 9))
    others = [] if rows is None else [row for row in range(3) if row not in rows]
    left_alone = pool.select(others)
    document = tokens(3 if rows is None else len(rows), 20)
    state = pool.clone() if rows is None else pool.select(rows)
    index = None if rows is None else torch.tensor(rows)
    for t in range(20):
        logits, state = decode(lact, document[:, t], state)
        assert_same([lact.logits(lact.step_(document[:, t], pool, index))], [logits])
    own = pool if rows is None else pool.select(rows)
    assert_same(own.tensors(), state.tensors())
    assert_same(pool.select(others).tensors(), left_alone.tensors())


def test_where_rows_are_is_asked_once_for_all_layers(
    lact: LaCT, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Sequence[int]] = []
    plan, plan_step = LactMixer.plan, LactMixer.plan_step

    def counted(self: LactMixer, *args: Any) -> LactPlan:
        planned = plan(self, *args)
        places.append(planned.positions)
        return planned

    def counted_step(self: LactMixer, *args: Any) -> LactStepPlan:
        planned = plan_step(self, *args)
        assert planned.at.known is not None
        places.append(planned.at.known[1])
        return planned

    monkeypatch.setattr(LactMixer, "plan", counted)
    monkeypatch.setattr(LactMixer, "plan_step", counted_step)
    with torch.no_grad():
        _, pool = lact(tokens(3, 12), lengths_B=torch.tensor([5, 12, 1]))
    lact.step_(torch.tensor([1, 2]), pool, torch.tensor([2, 0]))
    assert places == [[0, 0, 0], [1, 5]]
    assert lact.config.num_hidden_layers == 2


def test_greedy_generation_follows_the_argmax(lact: LaCT) -> None:
    prompt = tokens(2, 6)
    new = generate_greedy(lact, prompt, None, num_tokens=9)
    with torch.no_grad():
        hidden, _ = lact(torch.cat((prompt, new), 1))
    assert torch.equal(lact.logits(hidden)[:, 5:14].argmax(-1), new)


def test_zeroed_rows_start_a_document(lact: LaCT, tmp_path: Path) -> None:
    start = lact.init_state(2)
    assert not any(tensor.any() for tensor in start.tensors())
    used = states_after(lact, (19, 25))
    used.zero_([1])
    assert_same(used.slice(1, 2).tensors(), start.slice(1, 2).tensors())
    with torch.no_grad():
        hidden, state = lact(tokens(2, 12), used)
        fresh, right = lact(tokens(2, 12)[1:])
    assert_same([hidden[1:], *state.slice(1, 2).tensors()], [fresh, *right.tensors()])
    state.save(tmp_path / "state.safetensors")
    loaded = RecurrentState.load(tmp_path / "state.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), loaded.tensors(), strict=True))
    assert [t.shape for t in loaded.tensors()] == [t.shape for t in start.tensors()]


def random_delta(model: LaCT, num: int) -> LoraDelta:
    delta = LoraDelta.init(model.lora_targets(), 2, seed=5, num=num, dtype=torch.float64)
    draw = torch.Generator().manual_seed(6)
    for tensor in delta.parameters():
        tensor.normal_(0, 0.2, generator=draw)
    return delta.requires_grad_()


def test_a_delta_is_a_change_of_the_weights(lact: LaCT) -> None:
    document, delta = tokens(2, 29), random_delta(lact, 1)
    targets = lact.lora_targets()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "lr_proj"):
        assert f"layers.1.attn.{name}" in targets
    hidden, _ = lact(document, delta=delta)
    merged = {name: p.detach().clone() for name, p in lact.named_parameters()}
    for target in targets:
        change = (delta.b[target][0] @ delta.a[target][0]).detach()
        module, _, part = target.rpartition(".")
        if part in ("q_proj", "k_proj", "v_proj"):
            weight = merged[f"model.{module}.qkv.weight"].chunk(3)["qkv".index(part[0])]
        else:
            layer = f"model.{target}" + (".0" if part == "momentum_proj" else "")
            weight = merged[f"{layer}.weight"]
        weight += change
    with torch.no_grad():
        right, _ = torch.func.functional_call(lact, merged, (document,))
    assert_same([hidden], [right])


def test_gradients_of_deltas_do_not_mix_and_do_not_depend_on_cuts(lact: LaCT) -> None:
    document, before = tokens(4, 30), states_after(lact, (3, 17))
    delta = random_delta(lact, 2)

    def gradients(rows: slice, used: LoraDelta, edges: Sequence[int]) -> list[Tensor]:
        state, hiddens = before.fork(2).select(list(range(4)[rows])), []
        for first, last in itertools.pairwise(edges):
            hidden, state = lact(document[rows, first:last], state, delta=used)
            hiddens.append(hidden)
        loss = torch.cat(hiddens, 1).sin().sum() + sum(
            t.sin().sum() for t in state.tensors() if t.is_floating_point()
        )
        return list(torch.autograd.grad(loss, used.parameters()))

    together = gradients(slice(0, 4), delta, (0, 30))
    assert all(float(grad.norm()) > 0 for grad in together)
    assert_same(gradients(slice(0, 4), delta, (0, 1, 13, 14, 30)), together)
    for i in range(2):
        alone = delta.slice(i, i + 1).detach().requires_grad_()
        mine = [grad[i : i + 1] for grad in together]
        assert_same(gradients(slice(2 * i, 2 * i + 2), alone, (0, 30)), mine)


@pytest.mark.parametrize("num_tokens", [1, 11])
def test_gradients_are_those_of_finite_differences(lact: LaCT, num_tokens: int) -> None:
    lact.requires_grad_(False)
    before, document = states_after(lact, (6,)), tokens(1, num_tokens)
    names = [name for name, t in before.layers[0].items() if t.is_floating_point() and t.numel()]

    def loss(*inputs: Tensor) -> Tensor:
        layers = [dict(layer) for layer in before.layers]
        layers[0] |= dict(zip(names, inputs, strict=True))
        hidden, state = lact(document, RecurrentState(tuple(layers)))
        return loss_of(hidden, state)

    inputs = [before.layers[0][name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True, atol=1e-6)


def test_state_stays_float32_under_bfloat16(build_lact: Callable[..., LaCT]) -> None:
    model, document = build_lact(w0_w2_low_rank=3), tokens(2, 40)
    with torch.no_grad():
        right, _ = model(document)
        for name, parameter in model.named_parameters():
            dtype = model.parameter_dtype(name, torch.bfloat16)
            assert (dtype == torch.float32) == ("norm" in name or ".attn.w" in name)
            parameter.data = parameter.data.to(dtype)
        hidden, state = model(document)
    assert hidden.dtype == torch.bfloat16
    assert state.layers[0]["fast_w0"].dtype == torch.float32
    assert state.layers[0]["window_k"].dtype == torch.bfloat16
    assert float((hidden - right).norm() / right.norm()) < 0.1


def test_orthogonalization_can_be_rounded_like_the_published_one(
    build_lact: Callable[..., LaCT],
) -> None:
    document, hiddens = tokens(2, 40), []
    with torch.no_grad():
        for rounded in (False, True):
            hidden, _ = build_lact(use_muon=True, muon_bfloat16=rounded)(document)
            hiddens.append(hidden)
    assert torch.equal(hiddens[0][:, :8], hiddens[1][:, :8])  # before the first step
    assert 1e-6 < float((hiddens[1] - hiddens[0]).norm() / hiddens[0].norm()) < 0.3


def test_parameters_of_the_public_config() -> None:
    config = LactConfig(
        hidden_size=1536, num_attn_heads=24, w0_w2_low_rank=32, rope_theta=1e6, use_muon=True
    )
    with torch.device("meta"):
        model = LaCT(config)
        state = model.init_state(1)
    assert len(model.state_dict()) == 507
    assert sum(p.numel() for p in model.parameters()) == 797_625_312
    assert set(dict(model.model.layers[0].attn.named_parameters())) == {
        "qkv.weight", "o_proj.weight", "w0.w_left", "w0.w_right", "w1", "w2.w_left", "w2.w_right",
        "lr_proj.weight", "lr_proj.bias", "qk_scale", "qk_offset", "ttt_scale_proj.weight",
        "ttt_scale_proj.bias", "ttt_norm.weight", "momentum_proj.0.weight", "momentum_proj.0.bias",
    }  # fmt: skip
    fast_weights = 3 * 4 * 384 * 384
    window = 2048 * (2 * 1536 + 16)
    assert state.nbytes == 24 * (4 * (2 * fast_weights + window) + 8)
