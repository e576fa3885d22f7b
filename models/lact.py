"""LaCT: layers that look back over a window, and write what is older to a fast SwiGLU, in chunks.

A chunk of tokens is first read with the fast weights as they are, then they take a step on it.
The published code re-reads the whole prefix for every token; here a state holds what a step still
needs, so a document can be left and entered at any token. The last tokens stay in rings, in which
decoding writes one token and moves none; keys as attention has turned them: a step, once a chunk,
turns them back.
Shapes: B = batch, P = state rows (P divides B), T = tokens, D = model width, C = tokens of a chunk,
H = fast heads, K = width of a head, R = rates of a token (3 H, and H more with momentum).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprint.models.architecture import Endings, FastWeightModel, LayerState, Mixer, Read
from imprint.models.attention import (
    Rotation,
    rotate,
    shared_window_attention,
    window_attention,
)
from imprint.models.kernels.lact import (
    FastWeights,
    read_fast_weights,
    unit_norm,
)
from imprint.models.kernels.lact_step import StepRows, attend_ring, read_rows
from imprint.models.lact_chunks import (
    LactPlan,
    LactStepPlan,
    Memory,
    activation_floats,
    closing_chunks,
    complete_chunks,
    faded_memory,
    join_rounds,
    plan_rounds,
    spread,
    spread_memory,
)
from imprint.models.lact_config import LactConfig
from imprint.models.layers import LowRankFastWeight, RMSNorm, in_whole_vectors
from imprint.models.lora import DeltaLinear, FusedDeltaLinear, LoraDelta
from imprint.models.ring import last_tokens, roll_up, rolling_up, unroll, unrolling

_BASE_RATE = math.log(math.expm1(1e-3))  # softplus of it is the learning rate of a zero projection
_SHORT = 64  # rows of a shared state may together read so many tokens, or a window, uncopied
_NORM_EPS = 1e-5  # of the norms inside the mixer, whatever config.norm_eps says


class LactMixer(Mixer):
    """Window attention and fast weights on shared projections, added."""

    def __init__(self, config: LactConfig, target: str) -> None:
        super().__init__()
        self.config = config
        hidden, heads = config.hidden_size, config.num_lact_heads
        width, inner, rank = config.fast_head_dim, config.fast_inner_dim, config.w0_w2_low_rank
        parts = [f"{target}.{name}_proj" for name in "qkv"]
        self.qkv = FusedDeltaLinear(hidden, 3 * hidden, parts, bias=config.qkv_bias)
        if config.attn_qk_norm:
            self.q_norm = RMSNorm(hidden, _NORM_EPS)
            self.k_norm = RMSNorm(hidden, _NORM_EPS)
        self.o_proj = DeltaLinear(hidden, hidden, f"{target}.o_proj")
        self.w0: nn.Parameter | LowRankFastWeight
        self.w2: nn.Parameter | LowRankFastWeight
        if rank > 0:
            self.w0 = LowRankFastWeight(heads, inner, width, rank)
            self.w2 = LowRankFastWeight(heads, inner, width, rank)
        else:
            self.w0 = nn.Parameter(torch.empty(heads, inner, width))
            self.w2 = nn.Parameter(torch.empty(heads, inner, width))
        self.w1 = nn.Parameter(torch.empty(heads, width, inner))
        self.lr_proj = DeltaLinear(hidden, 3 * heads, f"{target}.lr_proj", bias=True)
        self.qk_scale = nn.Parameter(torch.empty(hidden, 2))
        self.qk_offset = nn.Parameter(torch.empty(hidden, 2))
        if config.learnable_ttt_scale:
            self.ttt_scale_proj = DeltaLinear(hidden, heads, f"{target}.ttt_scale_proj", bias=True)
        self.ttt_norm = RMSNorm(width, _NORM_EPS)
        if config.use_momentum:
            self.momentum_proj = nn.ModuleList(
                [DeltaLinear(hidden, heads, f"{target}.momentum_proj", bias=True)]
            )

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Zeros. Until its first chunk is complete a row reads the weights of the parameters."""
        cfg = self.config
        wide = torch.promote_types(dtype, torch.float32)
        heads, width, inner = cfg.num_lact_heads, cfg.fast_head_dim, cfg.fast_inner_dim
        num_rates = (4 if cfg.use_momentum else 3) * heads
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "window_k": ((cfg.kept_tokens, cfg.hidden_size), dtype),
            "window_v": ((cfg.kept_tokens, cfg.hidden_size), dtype),
            "rates": ((cfg.kept_tokens, num_rates), wide),
        }
        for kind in ("fast", "momentum") if cfg.use_momentum else ("fast",):
            shapes[f"{kind}_w0"] = shapes[f"{kind}_w2"] = ((heads, inner, width), wide)
            shapes[f"{kind}_w1"] = ((heads, width, inner), wide)
        state = {
            name: torch.zeros(batch, *shape, device=device, dtype=kind)
            for name, (shape, kind) in shapes.items()
        }
        state["position"] = torch.zeros(batch, device=device, dtype=torch.long)
        return state

    def faded(self, state: LayerState, share: float) -> LayerState:
        """Weights that have not stepped are those of the start already."""
        return faded_memory(state, self.initial_weights(), share, self.config.lact_chunk_size)

    def plan(self, state: LayerState, shape: Sequence[int], read: Read) -> LactPlan:
        """Waits for the device: which rows step when is decided here, on the host."""
        batch, num_tokens = shape
        position_B = spread(state["position"], batch)
        lengths = [num_tokens] * batch if read.lengths_B is None else read.lengths_B.tolist()
        positions = position_B.tolist()
        places_BT = position_B.unsqueeze(1) + torch.arange(num_tokens, device=position_B.device)
        rounds = plan_rounds(positions, lengths, self.config.lact_chunk_size)
        num_read = lengths if read.stops is None else list(read.stops)
        new_positions = [positions[row % batch] + num for row, num in enumerate(num_read)]
        kept, device = self.config.kept_tokens, position_B.device
        parting = any(part.closing for part in rounds)
        shared = 1 if parting else batch // state["position"].shape[0]
        short = shared * num_tokens <= max(self.config.window_size, _SHORT)
        return LactPlan(
            positions,
            rounds,
            self._rotation(places_BT),
            unrolling(positions[::shared], kept, device),
            rolling_up(num_read, new_positions, kept, device),
            torch.tensor(new_positions, device=device),
            shares_windows=shared > 1 and short,
        )

    def plan_step(
        self, pool: LayerState, rows_B: Tensor | None, *, waits: bool = True
    ) -> LactStepPlan:
        at = StepRows.of(pool["position"], rows_B, self.config.kept_tokens, waits=waits)
        all_stepped = at.known is not None and min(at.known[1]) >= self.config.lact_chunk_size
        return LactStepPlan(at, self._rotation(at.places_B.unsqueeze(1)), all_stepped)

    def endings(self, pool: LayerState, rows_B: Tensor | None) -> Endings:
        return complete_chunks(pool["position"], rows_B, self.config.lact_chunk_size)

    def forward(
        self,
        x_BTD: Tensor,
        state: LayerState,
        delta: LoraDelta | None,
        read: Read,
    ) -> tuple[Tensor, LayerState]:
        batch, num_tokens, _ = x_BTD.shape
        plan: LactPlan = read.plan or self.plan(state, (batch, num_tokens), read)
        if any(part.closing for part in plan.rounds):  # these rows part ways
            state = {name: spread(tensor, batch) for name, tensor in state.items()}
        q_BTD, k_BTD, v_BTD, rates_BTR = self._project(x_BTD, delta)
        if read.writes is not None:
            num_rates = 3 * self.config.num_lact_heads
            read.writes.append(rates_BTR[..., :num_rates].detach().float().mean(-1))
        with torch.autocast(x_BTD.device.type, enabled=False):
            turned_k_BTD = self._turn(k_BTD, plan.rotation)
            new = {"window_k": turned_k_BTD, "window_v": v_BTD, "rates": rates_BTR}
            joined: dict[str, Tensor] = {}
            if read.keep_state or not plan.shares_windows:
                turn = plan.unrolling
                joined = {name: unroll(state[name], tensor, turn) for name, tensor in new.items()}
            seen_BTD = self._attend(self._turn(q_BTD, plan.rotation), state, new, joined, plan)
            q_BHTK = self._fast(q_BTD, 0, plan.rotation)
            o_BHTK, memories = self._remember(q_BHTK, state, joined, plan)
        if not read.keep_state:
            return self._mixed(x_BTD, seen_BTD, o_BHTK, delta), {}
        rows, turn = len(plan.new_positions), plan.rolling_up
        new_state = {name: roll_up(tensor, rows, turn) for name, tensor in joined.items()}
        new_state["position"] = plan.new_positions.clone()  # every layer's own
        if read.stops is None:
            new_state |= spread_memory(memories[-1:], batch)
        else:
            ends = [part.ends[0] for part in plan.rounds if part.closing]
            at_stops = [memories[sum(end <= stop for end in ends)] for stop in read.stops]
            new_state |= spread_memory(at_stops, len(read.stops))
        return self._mixed(x_BTD, seen_BTD, o_BHTK, delta), new_state

    def step_(
        self,
        x_BD: Tensor,
        pool: LayerState,
        rows_B: Tensor | None,
        delta: LoraDelta | None,
        plan: LactStepPlan | None = None,
    ) -> Tensor:
        plan = plan or self.plan_step(pool, rows_B)
        cfg, at, x_B1D = self.config, plan.at, x_BD.unsqueeze(1)
        q_B1D, k_B1D, v_B1D, rates_B1R = self._project(x_B1D, delta)
        with torch.autocast(x_BD.device.type, enabled=False):
            at.put(pool["window_k"], self._turn(k_B1D, plan.rotation)[:, 0])
            at.put(pool["window_v"], v_B1D[:, 0])
            at.put(pool["rates"], rates_B1R[:, 0])
            q_B1HK = torch.unflatten(self._turn(q_B1D, plan.rotation), -1, (cfg.num_attn_heads, -1))
            seen_BHK = attend_ring(
                q_B1HK[:, 0], pool["window_k"], pool["window_v"], cfg.window_size, at
            )
            weights = Memory.from_state(pool, ()).weights
            initial = None if plan.all_stepped else self.initial_weights()
            q_BHK = self._fast(q_B1D, 0, plan.rotation)[:, :, 0]
            o_BHK = read_rows(weights, initial, cfg.lact_chunk_size, q_BHK, at)
        pool["position"].index_add_(0, at.rows_B, torch.ones_like(at.places_B))
        seen_B1D = seen_BHK.flatten(1).unsqueeze(1)
        return self._mixed(x_B1D, seen_B1D, o_BHK.unsqueeze(2), delta)[:, 0]

    def initial_weights(self) -> FastWeights:
        """The fast weights of a document's start, one row, in float32 at least."""
        dtype = torch.promote_types(self.w1.dtype, torch.float32)
        starts = (
            w() if isinstance(w, LowRankFastWeight) else w for w in (self.w0, self.w1, self.w2)
        )
        return FastWeights(*(w.to(dtype).unsqueeze(0) for w in starts))

    def _project(self, x_BTD: Tensor, delta: LoraDelta | None) -> tuple[Tensor, ...]:
        """Queries, keys, values [B, T, D] and rates [B, T, R]."""
        q_BTD, k_BTD, v_BTD = self.qkv(x_BTD, delta).chunk(3, -1)
        if self.config.attn_qk_norm:
            q_BTD, k_BTD = self.q_norm(q_BTD), self.k_norm(k_BTD)
        return q_BTD, k_BTD, v_BTD, self._rates(x_BTD, delta)

    def _mixed(
        self, x_BTD: Tensor, seen_BTD: Tensor, o_BHTK: Tensor, delta: LoraDelta | None
    ) -> Tensor:
        """What the window and the fast weights say together: [B, T, D]."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            o_BTHK = self.ttt_norm(o_BHTK.transpose(1, 2))
        if self.config.learnable_ttt_scale:
            o_BTHK = o_BTHK * F.silu(self.ttt_scale_proj(x_BTD, delta)).unsqueeze(-1)
        mixed_BTD: Tensor = self.o_proj((seen_BTD + o_BTHK.flatten(-2)).to(x_BTD.dtype), delta)
        return mixed_BTD

    def _rates(self, x_BTD: Tensor, delta: LoraDelta | None) -> Tensor:
        """Learning rates of W0, W1, W2, head by head, then how much momentum stays: [B, T, R]."""
        projected = self.lr_proj(x_BTD, delta)
        dtype = torch.promote_types(projected.dtype, torch.float32)
        rates = in_whole_vectors(F.softplus, projected.to(dtype) + _BASE_RATE)
        if not self.config.use_momentum:
            return rates
        decay = in_whole_vectors(torch.sigmoid, self.momentum_proj[0](x_BTD, delta).to(dtype))
        return torch.cat((rates, decay), -1)

    def _rotation(self, positions_BT: Tensor) -> Rotation:
        cfg = self.config
        dtype = torch.promote_types(self.qkv.weight.dtype, torch.float32)
        return Rotation.of(positions_BT, cfg.attn_head_dim, cfg.rope_theta, dtype)

    def _turn(self, x_BTD: Tensor, rotation: Rotation) -> Tensor:
        x_BTHK = torch.unflatten(x_BTD, -1, (self.config.num_attn_heads, -1))
        return rotate(x_BTHK, rotation).flatten(-2)

    def _attend(
        self,
        q_BTD: Tensor,
        state: LayerState,
        new: dict[str, Tensor],
        joined: dict[str, Tensor],
        plan: LactPlan,
    ) -> Tensor:
        """Window attention of turned queries: [B, T, D]."""
        cfg = self.config
        surplus = cfg.kept_tokens - (cfg.window_size - 1)

        def heads(x_BSD: Tensor) -> Tensor:
            dtype = state["window_k"].dtype
            return torch.unflatten(x_BSD.to(dtype), -1, (cfg.num_attn_heads, -1)).transpose(1, 2)

        rings = ("window_k", "window_v")
        if plan.shares_windows:
            before = (torch.cat(plan.unrolling(state[name]), 1)[:, surplus:] for name in rings)
            k_PHLK, v_PHLK = map(heads, before)
            k_BHTK, v_BHTK = (heads(new[name]) for name in rings)
            own, num_before = (k_BHTK, v_BHTK), plan.positions[:: len(q_BTD) // len(k_PHLK)]
            o_BHTK = shared_window_attention(heads(q_BTD), (k_PHLK, v_PHLK), own, num_before)
        else:
            k_BHSK, v_BHSK = (heads(joined[name][:, surplus:]) for name in rings)
            o_BHTK = window_attention(heads(q_BTD), k_BHSK, v_BHSK, cfg.window_size, plan.positions)
        return o_BHTK.transpose(1, 2).flatten(-2)

    def _fast(self, x_BTD: Tensor, column: int, rotation: Rotation) -> Tensor:
        """Queries (column 0) or keys (1) of the fast weights: [B, H, T, K], float32 at least."""
        cfg = self.config
        x_BTD = x_BTD.to(rotation.cos.dtype) * self.qk_scale[:, column] + self.qk_offset[:, column]
        if cfg.qkv_silu:
            x_BTD = F.silu(x_BTD)
        x_BTD = unit_norm(torch.unflatten(x_BTD, -1, (cfg.num_lact_heads, -1))).flatten(-2)
        if not cfg.ttt_nope:
            x_BTD = self._turn(x_BTD, rotation)
        return torch.unflatten(x_BTD, -1, (cfg.num_lact_heads, -1)).transpose(1, 2)

    def _remember(
        self,
        q_BHTK: Tensor,
        state: LayerState,
        joined: dict[str, Tensor],
        plan: LactPlan,
    ) -> tuple[Tensor, list[Memory]]:
        """What the fast weights say, [B, H, T, K]; the memory before, and after every step."""
        initial, size = self.initial_weights(), self.config.lact_chunk_size
        num_rows, num_tokens = state["position"].shape[0], q_BHTK.shape[2]
        before = plan.positions[:: len(plan.positions) // num_rows]
        stepped = [position >= size for position in before]
        memory = Memory.from_state(state, stepped)
        memories, outs = [memory], []
        for part in plan.rounds:
            asked = q_BHTK[:, :, part.first : part.last]
            outs.append(read_fast_weights(memory.effective(initial), asked))
            if part.closing:
                firsts, chunks = closing_chunks(joined, num_tokens, part, plan.positions, size)
                moving = self._stepped(memory.select(part.closing), initial, chunks, firsts)
                memory = memory.replace(part.closing, moving)
                memories.append(memory)
        return join_rounds(outs, plan.rounds, num_tokens), memories

    def end_(self, pool: LayerState, endings: Endings) -> None:
        """The fast weights of these rows take a step on the chunk that is complete."""
        size = self.config.lact_chunk_size
        rows, ends = zip(*endings, strict=True)
        chunks = {
            name: last_tokens(pool[name], rows, ends, size)
            for name in ("window_k", "window_v", "rates")
        }
        index = torch.tensor(rows, device=pool["position"].device)
        fast = {name: w[index] for name, w in pool.items() if name not in (*chunks, "position")}
        memory = Memory.from_state(fast, [end > size for end in ends])
        with torch.autocast(index.device.type, enabled=False):
            firsts = [end - size for end in ends]
            stepped = self._stepped(memory, self.initial_weights(), chunks, firsts)
        for name, tensor in stepped.to_state().items():
            pool[name].index_copy_(0, index, tensor)

    def _stepped(
        self,
        memory: Memory,
        initial: FastWeights,
        chunks: dict[str, Tensor],
        firsts: Sequence[int],
    ) -> Memory:
        """The memory after its rows have taken a step on chunks that begin at these places."""
        cfg = self.config
        places_BC = torch.tensor(firsts).unsqueeze(1) + torch.arange(cfg.lact_chunk_size)
        rotation = self._rotation(places_BC.to(chunks["rates"].device))
        k_BHCK = self._fast(self._turn(chunks["window_k"], rotation.back()), 1, rotation)
        rounded = cfg.muon_bfloat16 or self.qkv.weight.dtype == torch.bfloat16
        muon_dtype = torch.bfloat16 if rounded else k_BHCK.dtype
        values_BCD, rates_BCR = chunks["window_v"], chunks["rates"]
        return memory.after_chunk(k_BHCK, values_BCD, rates_BCR, initial, cfg, muon_dtype)

    def reset_parameter(self, name: str, parameter: nn.Parameter, draw: torch.Generator) -> bool:
        """As the published code starts: fast weights by their widths, scales one, biases zero."""
        cfg = self.config
        scale = {
            "w0": cfg.fast_head_dim**-0.5,
            "w1": cfg.fast_inner_dim**-0.5,
            "w2": cfg.fast_head_dim**-0.5,
            "w_left": cfg.fw_init_gain * max(cfg.w0_w2_low_rank, 1) ** -0.5,
            "w_right": cfg.fw_init_gain * cfg.fast_head_dim**-0.5,
        }.get(name.rpartition(".")[2])
        if scale is not None:
            parameter.normal_(0.0, scale, generator=draw)
        elif name == "qk_scale":
            parameter.fill_(1.0)
        elif name == "qk_offset" or name.endswith(".bias"):
            parameter.zero_()
        else:
            return False
        return True


class LaCT(FastWeightModel):
    """Window attention and fast weights in every layer."""

    starts_from_state: ClassVar[bool] = False  # until its first step it reads its own weights
    state_layout: ClassVar[str] = "rings"
    rounds_rows_alike: ClassVar[bool] = False  # rows are grouped by where they are in their chunks

    def __init__(self, config: LactConfig) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(config, [LactMixer(config, f"layers.{i}.attn") for i in layers])

    def activation_floats(self, num_tokens: int) -> int:
        """As for all, with the window read from the state, and the steps that may fall in here."""
        assert isinstance(self.config, LactConfig)
        return activation_floats(self.config, num_tokens)

    def parameter_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """As for all, and what the fast weights start from stays in float32 like themselves."""
        is_start = ".attn.w" in name
        return super().parameter_dtype(
            name, torch.promote_types(dtype, torch.float32) if is_start else dtype
        )
