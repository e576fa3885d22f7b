"""Which stored tensor fills which parameter, spelling by spelling; what does not fit is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from imprint.models.names import EMBEDDINGS, LM_HEAD, LoadPlan, plan_load
from imprint.models.shards import ITEM_BYTES, StoredTensor

GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
A_LOG, D = "model.layers.0.attn.A_log", "model.layers.0.attn.D"
EXPECTED = {
    EMBEDDINGS: (11, 4),
    A_LOG: (2,),
    GATE: (6, 4),
    UP: (6, 4),
    LM_HEAD: (11, 4),
}


def plan(
    stored: dict[str, tuple[int, ...]], *, tied: bool = False, dtype: str = "BF16"
) -> LoadPlan:
    tensors = {
        name: StoredTensor(name=name, file=Path("x"), dtype=dtype, shape=shape, offset=0, nbytes=0)
        for name, shape in stored.items()
    }
    return plan_load(EXPECTED, tensors, tied=tied)


def test_plain_names() -> None:
    found = plan(EXPECTED)
    assert found.problems == ()
    assert {name: piece.source.name for name, piece in found.pieces.items()} == {
        name: name for name in EXPECTED
    }
    assert found.zeros == ()
    assert found.repeats == {}


def test_fused_mlp_is_two_pieces_of_one_tensor() -> None:
    found = plan({name: s for name, s in EXPECTED.items() if name != UP} | {GATE: (12, 4)})
    assert found.problems == ()
    gate, up = found.pieces[GATE], found.pieces[UP]
    assert gate.source is up.source
    assert (gate.first_row, gate.shape) == (0, (6, 4))
    assert (up.first_row, up.shape) == (6, (6, 4))


@pytest.mark.parametrize("gate", [(11, 4), (12, 5), (6, 4), (24,)])
def test_what_is_not_quite_a_fused_mlp(gate: tuple[int, ...]) -> None:
    problems = plan({n: s for n, s in EXPECTED.items() if n != UP} | {GATE: gate}).problems
    assert f"missing {UP} (6, 4)" in problems
    misshapen = f"{GATE} has shape {gate}, config.json implies (6, 4)"
    assert (misshapen in problems) == (gate != (6, 4))


def test_doubled_gate_beside_an_up_projection_is_misshapen() -> None:
    problems = plan({**EXPECTED, GATE: (12, 4)}).problems
    assert problems == (f"{GATE} has shape (12, 4), config.json implies (6, 4)",)


def test_unused_d_belongs_to_gated_layers_only() -> None:
    found = plan({**EXPECTED, D: (2,)})
    assert found.problems == ()
    assert [tensor.name for tensor in found.zeros] == [D]
    other = D.replace("0", "1")  # a layer that is not there
    assert plan({**EXPECTED, other: (2,)}).problems == (f"unexpected {other}",)


def test_tied_head_need_not_be_stored() -> None:
    without = {name: shape for name, shape in EXPECTED.items() if name != LM_HEAD}
    assert plan(without).problems == (f"missing {LM_HEAD} (11, 4)",)
    assert plan(without, tied=True).problems == ()
    assert LM_HEAD not in plan(without, tied=True).pieces


def test_tied_head_that_is_stored_must_repeat_the_embedding() -> None:
    found = plan(EXPECTED, tied=True)
    assert found.problems == ()
    assert {name: tensor.name for name, tensor in found.repeats.items()} == {EMBEDDINGS: LM_HEAD}
    problems = plan({**EXPECTED, LM_HEAD: (4, 11)}, tied=True).problems
    assert problems == (f"{LM_HEAD} has shape (4, 11), config.json implies (11, 4)",)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "BOOL"])
def test_types_that_are_not_read(dtype: str) -> None:
    problems = plan(EXPECTED, dtype=dtype).problems
    assert len(problems) == len(EXPECTED)
    assert f"{A_LOG} is stored as {dtype}; only F64, F32, F16, BF16 are read" in problems


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_types_that_are_read(dtype: str) -> None:
    assert plan(EXPECTED, dtype=dtype).problems == ()
