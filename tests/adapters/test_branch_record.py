"""What is kept of a step: all of a small one, an even sample of a large one, and no more."""

import torch

from imprint.adapters.branch_record import MAX_STEPS, MAX_TOKENS, record_branches
from imprint.adapters.policy import StepResult


def result(num: int, group: int, length: int) -> StepResult:
    rollouts = torch.arange(num * group * length).view(1, num, group, length)
    return StepResult(
        positions_QN=torch.arange(10, 10 + num).view(1, num),
        recall_N=torch.ones(num, dtype=torch.bool),
        rollouts_QNGK=rollouts if group else None,
        rewards_QNG=rollouts[..., 0].double() if group else None,
        advantages_QNG=None,
        policy_loss_Q=torch.zeros(1),
        ntp_loss_Q=torch.zeros(1),
    )


def test_a_small_step_is_kept_whole() -> None:
    (record,) = record_branches(3, result(2, 2, 3))
    assert record == {
        "step": 3,
        "num_positions": 2,
        "positions": [10, 11],
        "rollouts": [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]],
        "rewards": [[0.0, 3.0], [6.0, 9.0]],
    }


def test_a_large_step_is_kept_in_part() -> None:
    (record,) = record_branches(1, result(1000, 4, 8))
    assert record["num_positions"] == 1000
    assert len(record["positions"]) == len(record["rollouts"]) == MAX_TOKENS // 32
    assert record["positions"][:2] == [10, 10 + 1000 * 32 // MAX_TOKENS]
    assert record["rollouts"][1][0][0] == (record["positions"][1] - 10) * 32


def test_a_position_of_many_rollouts_is_kept_in_part() -> None:
    (record,) = record_branches(1, result(1, 256, 128))
    assert len(record["rollouts"][0]) == len(record["rewards"][0]) == MAX_TOKENS // 128


def test_positions_are_kept_where_nothing_was_rolled_out() -> None:
    (record,) = record_branches(1, result(3, 0, 5))
    assert (record["positions"], record["rollouts"], record["rewards"]) == ([10, 11, 12], [], [])


def test_a_long_study_is_kept_in_part() -> None:
    assert len(record_branches(MAX_STEPS, result(1, 1, 1))) == 1
    assert record_branches(MAX_STEPS + 1, result(1, 1, 1)) == []
