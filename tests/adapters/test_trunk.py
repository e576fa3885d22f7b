"""The test of record: the trunk's gradient is the literal loop's, parameter by parameter."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.adapters.branches import query_step
from imprint.adapters.calls import run_calls
from imprint.adapters.config import RefineConfig
from imprint.adapters.policy import StepResult
from imprint.adapters.reading import read_segments
from imprint.adapters.step_benchmark import load_oracle
from imprint.adapters.trunk import trunk_step
from imprint.models import (
    DeltaNetConfig,
    FastWeightModel,
    GatedDeltaNetConfig,
    LactConfig,
    LoraDelta,
    ModelConfig,
    build_model,
)

TOLERANCE = 1e-9
BASE = {
    "positions": 4,
    "rollout_length": 3,
    "group_size": 4,
    "cue_tokens": 4,
    "lambda_rl": 0.7,
    "lambda_ntp": 1.0,
    "segment_tokens": 16,
    "lora_rank": 3,
    "branches": "continue",
    "selection": "entropy",
    "reward": "expected_exact",
    "min_entropy": 0.0,
}
SIZES: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}
CONFIGS: dict[str, ModelConfig] = {
    "delta_net": DeltaNetConfig(**SIZES, num_heads=2),
    "gated_deltanet": GatedDeltaNetConfig(**SIZES, num_heads=1, num_v_heads=2, head_dim=16),
    # chunks so short that momentum matters within the shortest document
    "lact_swiglu": LactConfig(
        **SIZES,
        initializer_range=0.02,
        num_attn_heads=4,
        num_lact_heads=2,
        lact_chunk_size=4,
        window_size=6,
        w0_w2_low_rank=4,
    ),
}


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    return load_oracle()


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> FastWeightModel:
    model = build_model(CONFIGS[request.param])
    model.reset_parameters(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "conv" not in name:
                parameter.mul_(8)  # confident enough that rollouts and rewards differ
    return model.double().requires_grad_(False)


def random_delta(model: FastWeightModel, num: int = 1, seed: int = 1) -> LoraDelta:
    """A delta whose B is not zero, so that A has a gradient too."""
    delta = LoraDelta.init(model.lora_targets(), 3, seed=seed, num=num, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for tensor in delta.b.values():
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return delta.requires_grad_()


def document(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 23, (length,), generator=torch.Generator().manual_seed(seed))


def oracle_branches(oracle: ModuleType, result: StepResult, question: int = 0) -> list[Any]:
    assert result.rollouts_QNGK is not None
    assert result.advantages_QNG is not None
    rollouts, advantages = result.rollouts_QNGK[question], result.advantages_QNG[question]
    return [
        oracle.Branch(
            int(position),
            bool(result.recall_N[i]),
            rollouts[i, g].tolist(),
            float(advantages[i, g]),
        )
        for i, position in enumerate(result.positions_QN[question])
        for g in range(rollouts.shape[1])
    ]


def settings_of(oracle: ModuleType, config: RefineConfig) -> Any:
    return oracle.Settings(
        config.lambda_rl, config.lambda_ntp, config.cue_tokens, config.scope, config.rollout_length
    )


def take_grads(parameters: list[Tensor]) -> list[Tensor]:
    grads = []
    for parameter in parameters:
        assert parameter.grad is not None
        grads.append(parameter.grad)
        parameter.grad = None
    return grads


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert theirs.norm() > 0
        assert float((mine - theirs).norm() / theirs.norm()) < TOLERANCE


def check_trunk(
    oracle: ModuleType,
    model: FastWeightModel,
    length: int,
    full: bool = False,
    **overrides: Any,
) -> StepResult:
    positions = overrides.pop("places", None)
    config = RefineConfig.from_dict({**BASE, "scope": "lora", **overrides})
    tokens_T = document(length)
    delta = None if full else random_delta(model)
    parameters = list(model.parameters()) if delta is None else delta.parameters()
    for parameter in parameters:
        parameter.requires_grad_()
    chosen = None if positions is None else torch.tensor(positions)
    result: StepResult = run_calls(
        trunk_step(model, tokens_T, config, delta=delta, seed=3, step=0, positions_N=chosen)
    )
    mine = take_grads(parameters)
    branches = oracle_branches(oracle, result)
    assert any(branch.advantage != 0 for branch in branches)
    settings = settings_of(oracle, config)
    oracle.accumulate_gradients(model, tokens_T.tolist(), branches, settings, delta)
    assert_same(mine, take_grads(parameters))
    return result


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("full", [True, False], ids=["weights", "delta"])
@pytest.mark.parametrize(
    ("length", "places"),
    [
        (60, None),
        (64, [16, 32, 33, 61]),  # at segment edges, and just after one
        (50, [18, 20, 31, 40]),  # two and three in one segment
        (70, [1, 2, 15, 67]),  # the first positions there are, and the last
        (14, [3, 5, 9, 11]),  # a document shorter than a segment
    ],
    ids=["selected", "edges", "shared_segment", "ends", "short"],
)
def test_continue(
    oracle: ModuleType,
    model: FastWeightModel,
    group_size: int,
    full: bool,
    length: int,
    places: list[int] | None,
) -> None:
    check_trunk(oracle, model, length, full, places=places, group_size=group_size, advantage="grpo")


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("branches", ["recall", "mixed"])
def test_recall(oracle: ModuleType, model: FastWeightModel, group_size: int, branches: str) -> None:
    # the first cues are shorter than the others
    result = check_trunk(
        oracle, model, 50, places=[2, 18, 30, 45], group_size=group_size, branches=branches
    )
    assert bool(result.recall_N.any())


def test_policy_loss_alone(oracle: ModuleType, model: FastWeightModel) -> None:
    check_trunk(oracle, model, 60, full=False, places=[5, 20], lambda_ntp=0.0, positions=2)


@pytest.mark.parametrize("reward", ["exact", "cosine", "hybrid"])
def test_rewards(oracle: ModuleType, model: FastWeightModel, reward: str) -> None:
    check_trunk(oracle, model, 60, reward=reward, group_size=8)


def test_next_token_loss_alone(oracle: ModuleType, model: FastWeightModel) -> None:
    config = RefineConfig.from_dict({**BASE, "scope": "lora", "lambda_rl": 0.0})
    tokens_T = document(37)
    delta = random_delta(model)
    result = run_calls(trunk_step(model, tokens_T, config, delta=delta, seed=3, step=0))
    mine = take_grads(delta.parameters())
    loss = oracle.next_token_loss(model, tokens_T.tolist(), delta)
    loss.backward()
    assert_same(mine, take_grads(delta.parameters()))
    assert float(result.ntp_loss_Q) == pytest.approx(float(loss.detach()))
    assert result.rewards_QNG is None


def test_segments_do_not_matter(model: FastWeightModel) -> None:
    grads = []
    for segment_tokens in (16, 24, 64):
        config = RefineConfig.from_dict({**BASE, "scope": "lora", "segment_tokens": segment_tokens})
        tokens_T = document(64)
        delta = random_delta(model)
        run_calls(trunk_step(model, tokens_T, config, delta=delta, seed=5, step=2))
        grads.append(take_grads(delta.parameters()))
    assert_same(grads[0], grads[2])
    assert_same(grads[1], grads[2])


@pytest.mark.parametrize("length", range(1, 12))
def test_tiny_documents(model: FastWeightModel, length: int) -> None:
    config = RefineConfig.from_dict({**BASE, "scope": "lora"})
    delta = random_delta(model)
    result = run_calls(trunk_step(model, document(length), config, delta=delta, seed=1, step=0))
    assert result.positions_QN.shape == (1, min(4, max(0, length - 3)))


def read_all(model: FastWeightModel, tokens_T: Tensor, config: RefineConfig) -> Any:
    return run_calls(read_segments(model, tokens_T, segment_tokens=config.segment_tokens))


@pytest.mark.parametrize(("group_size", "lambda_ntp"), [(4, 1.0), (1, 0.0)])
@pytest.mark.parametrize(
    ("segment_tokens", "branches"),
    [
        pytest.param(tokens, branches, id=f"{name}-{branches}")
        for name, tokens, kinds in (
            ("split", 16, ("recall", "continue", "mixed")),
            ("deltas", 64, ("mixed",)),
            ("at_once", 512, ("recall", "continue")),
        )
        for branches in kinds
    ],
)
def test_query_lora(
    oracle: ModuleType,
    model: FastWeightModel,
    branches: str,
    group_size: int,
    lambda_ntp: float,
    segment_tokens: int,
) -> None:
    config = RefineConfig.from_dict(
        {
            **BASE,
            "scope": "query_lora",
            "branches": branches,
            "group_size": group_size,
            "lambda_ntp": lambda_ntp,
            "segment_tokens": segment_tokens,
        }
    )
    tokens_T = document(70)
    delta = random_delta(model, num=2)
    positions_QN = torch.tensor([[2, 16, 33, 60], [4, 5, 36, 67]])
    reading = read_all(model, tokens_T, config)
    result = run_calls(
        query_step(
            model,
            tokens_T,
            positions_QN,
            config,
            delta=delta,
            end_state=reading.end.state,
            seeds=[1, 2],
            step=1,
            reading=reading,
        )
    )
    mine = take_grads(delta.parameters())
    for question in range(2):
        alone = delta.slice(question, question + 1).clone().detach().requires_grad_()
        listed = oracle_branches(oracle, result, question)
        settings = settings_of(oracle, config)
        oracle.accumulate_gradients(model, tokens_T.tolist(), listed, settings, alone)
        assert_same([g[question : question + 1] for g in mine], take_grads(alone.parameters()))


def test_query_lora_in_company_is_as_alone(model: FastWeightModel) -> None:
    config = RefineConfig.from_dict({**BASE, "scope": "query_lora", "branches": "recall"})
    tokens_T = document(70)
    positions_QN = torch.tensor([[5, 16, 33, 60], [6, 9, 36, 66]])
    end_state = read_all(model, tokens_T, config).end.state

    def run(rows: list[int], delta: LoraDelta) -> StepResult:
        step = query_step(
            model,
            tokens_T,
            positions_QN[rows],
            config,
            delta=delta,
            end_state=end_state,
            seeds=[7 + row for row in rows],
            step=0,
        )
        result: StepResult = run_calls(step)
        return result

    together = run([0, 1], random_delta(model, num=2))
    alone = run([1], random_delta(model, num=2).slice(1, 2).detach().requires_grad_())
    assert together.rollouts_QNGK is not None
    assert alone.rollouts_QNGK is not None
    assert torch.equal(together.rollouts_QNGK[1], alone.rollouts_QNGK[0])


def test_query_lora_refuses_what_it_cannot_do(model: FastWeightModel) -> None:
    config = RefineConfig.from_dict({**BASE, "scope": "query_lora"})
    tokens_T = document(30)
    end_state = read_all(model, tokens_T, config).end.state
    for positions in (torch.empty(1, 0, dtype=torch.long), torch.tensor([[5], [6]])):
        with pytest.raises(ValueError, match="positions"):
            run_calls(
                query_step(
                    model,
                    tokens_T,
                    positions,
                    config,
                    delta=random_delta(model),
                    end_state=end_state,
                    seeds=[0],
                    step=0,
                )
            )
    with pytest.raises(ValueError, match="reading"):
        run_calls(
            query_step(
                model,
                tokens_T,
                torch.tensor([[5]]),
                config,
                delta=random_delta(model),
                end_state=end_state,
                seeds=[0],
                step=0,
            )
        )


@pytest.mark.parametrize("scope", ["lora", "query_lora"])
def test_the_callers_gradient_mode_changes_nothing(model: FastWeightModel, scope: str) -> None:
    config = RefineConfig.from_dict({**BASE, "scope": scope, "branches": "mixed"})
    tokens_T = document(40)
    reading = read_all(model, tokens_T, config)

    def gradients(delta: LoraDelta) -> list[Tensor]:
        if scope == "lora":
            step = trunk_step(model, tokens_T, config, delta=delta, seed=3, step=0)
        else:
            step = query_step(
                model,
                tokens_T,
                torch.tensor([[5, 12, 25, 33]]),
                config,
                delta=delta,
                end_state=reading.end.state,
                seeds=[3],
                step=0,
                reading=reading,
            )
        enabled = torch.is_grad_enabled()
        modes: list[bool] = []
        run_calls(step, lambda _: modes.append(torch.is_grad_enabled()))
        assert set(modes) == {enabled}
        return take_grads(delta.parameters())

    expected = gradients(random_delta(model))
    delta = random_delta(model)
    with torch.no_grad():
        assert_same(gradients(delta), expected)
