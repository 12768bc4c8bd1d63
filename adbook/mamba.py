"""Mamba-1: the S6 block and a pre-norm residual stack of it, in parallel form and in one-step form.

Follows Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), section
3.4 and figure 3.  `MambaBlock` has the parameter names, shapes and initialisation of
`mamba_ssm/modules/mamba_simple.py` (mamba-ssm 2.3.2), so that weights move both ways.

| symbol | code         | meaning                                                               | default    |
|--------|--------------|-----------------------------------------------------------------------|------------|
| B      | `batch`      | sequences side by side                                                |            |
| L      | `length`     | steps (tokens) of a sequence                                          |            |
| E      | `d_model`    | model width; tokens are (B, L, E) (the paper's D)                     | 64         |
| D      | `d_inner`    | inner channels, `expand` × E (the paper's E D)                        | 128        |
| N      | `d_state`    | state size of a channel; the state is (B, D, N)                       | 16         |
| R      | `dt_rank`    | rank of the projection that gives Δ (section 3.6)                     | ⌈E / 16⌉   |
| K      | `d_conv`     | width of the causal depthwise convolution                             | 4          |
| Δ      | `delta`      | step size, (B, L, D), softplus of a projection of the input           |            |
| A      | `-exp(A_log)`| diagonal state matrix, (D, N), negative, so that states decay         |            |
| B, C   |              | input and output maps of the state, (B, L, N), projections of the input |          |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adbook.checks import check_positive, check_whole
from adbook.scan import numba_missing, selective_scan


@dataclass(frozen=True)
class MambaConfig:
    """Shape and initialisation of a `Mamba`.

    Raises:
        ValueError: on creation, if a size is not positive or the Δ range is empty.
    """

    d_model: int = 64  # E, width of a token
    n_layers: int = 4  # blocks
    d_state: int = 16  # N, state size of a channel
    d_conv: int = 4  # K, steps that the convolution sees
    expand: int = 2  # inner channels per model channel
    dt_rank: int | None = None  # R, rank of Δ's projection; None for ⌈d_model / 16⌉
    dt_min: float = 1e-3  # range of the initial Δ: a channel forgets over roughly 1 / Δ steps
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4  # least initial Δ

    def __post_init__(self) -> None:
        """Check the values."""
        names = ["d_model", "n_layers", "d_state", "d_conv", "expand"]
        for name in names if self.dt_rank is None else [*names, "dt_rank"]:
            check_whole(name, getattr(self, name))
        check_positive(self, ("dt_min", "dt_max", "dt_init_floor"))
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} must not be more than dt_max={self.dt_max}")

    @property
    def d_inner(self) -> int:
        """D, the number of inner channels."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """R, the rank of Δ's projection."""
        return math.ceil(self.d_model / 16) if self.dt_rank is None else self.dt_rank


class BlockState(NamedTuple):
    """What a block carries from step to step; its size does not depend on the number of steps."""

    conv: Tensor  # the last K inputs of the convolution, (B, D, K)
    ssm: Tensor  # the state h, (B, D, N)
    A: Tensor  # -exp(A_log), (D, N): a constant, computed once by init_state


class MambaBlock(nn.Module):
    """The Mamba-1 block (figure 3, right): convolution and selective scan, gated, between two projections."""

    def __init__(self, config: MambaConfig):
        """Make a block with the official initialisation, from torch's global generator as all of `torch.nn` does."""
        super().__init__()
        width, inner, n_state, rank = config.d_model, config.d_inner, config.d_state, config.rank
        self.config = config
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)  # x, then the gate z
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner, padding=config.d_conv - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * n_state, bias=False)  # Δ before its projection, B, C
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, n_state + 1, dtype=torch.float32).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self._init_delta()

    def _init_delta(self) -> None:
        """Let softplus(dt_proj.bias) be log-uniform in [dt_min, dt_max] (section 3.6)."""
        config = self.config
        nn.init.uniform_(self.dt_proj.weight, -(config.rank**-0.5), config.rank**-0.5)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        delta = torch.exp(torch.rand(config.d_inner) * (high - low) + low).clamp(min=config.dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, L, E) to (B, L, E); position t sees positions up to t."""
        check_tokens(tokens, self.config.d_model)
        if _fusible(tokens, self.A_log):
            from adbook import mamba_numba  # imported on use: numba takes a second to load

            return mamba_numba.layer(tokens, self)
        return self.out_proj(self.inner(self.in_proj(tokens)))

    def inner(self, xz: Tensor, scan: Callable[..., Tensor] = selective_scan) -> Tensor:
        """What lies between the projections, from xz (B, L, 2 D) to (B, L, D), with any scan of that interface."""
        x, z = xz.transpose(1, 2).chunk(2, 1)  # (B, D, L)
        x = F.silu(self.conv1d(x)[..., : xz.shape[1]])
        delta, B, C = self._split(self.x_proj(x.transpose(1, 2)))
        delta = F.linear(delta, self.dt_proj.weight)  # (B, L, D); its bias is added inside the scan
        delta, B, C = (y.transpose(1, 2) for y in (delta, B, C))
        A = -torch.exp(self.A_log)
        y = scan(x, delta, A, B, C, self.D, z, self.dt_proj.bias, delta_softplus=True)
        return y.transpose(1, 2)

    def prefill(self, tokens: Tensor) -> tuple[Tensor, BlockState]:
        """Outputs (B, L, E) for tokens (B, L, E), as `forward`, and the state after them, as L times `step`."""
        after: list[Tensor] = []

        def scan(*inputs: Tensor, **options: bool) -> Tensor:
            y, state = selective_scan(*inputs, **options, return_last_state=True)
            after.append(state)
            return y

        xz = self.in_proj(tokens)
        y = self.out_proj(self.inner(xz, scan))
        width = self.config.d_conv
        conv = F.pad(xz[:, -width:, : self.config.d_inner], (0, 0, max(0, width - tokens.shape[1]), 0))  # (B, K, D)
        return y, self.init_state(0)._replace(conv=conv.transpose(1, 2), ssm=after[0])

    def _split(self, projected: Tensor) -> tuple[Tensor, ...]:
        return projected.split([self.config.rank, self.config.d_state, self.config.d_state], -1)

    def init_state(self, batch: int) -> BlockState:
        """The state before the first step of `batch` sequences."""
        config = self.config
        rows = (self.D.new_zeros(batch, n, config.d_inner) for n in (config.d_conv, config.d_state))
        A = -torch.exp(self.A_log).T.contiguous()
        # Transposed views: the channels lie side by side in memory, as the compiled step wants them.
        return BlockState(*(x.transpose(1, 2) for x in rows), A.T)

    def step(self, token: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """One step: token (B, E) and the state before it to output (B, E) and a new state."""
        fitting = (len(token), self.config.d_inner, self.config.d_state)
        if tuple(state.ssm.shape) != fitting or state.conv.shape[2] != self.config.d_conv:
            raise ValueError(
                f"the state has shapes {tuple(state.ssm.shape)} and {tuple(state.conv.shape)}; {len(token)} tokens of "
                f"this model need {fitting} and {(*fitting[:2], self.config.d_conv)}: use init_state({len(token)})"
            )
        xz = self.in_proj(token)  # (B, 2 D)
        if not torch.is_grad_enabled() and _fusible(xz, self.A_log):
            from adbook import mamba_numba

            y, conv, ssm = mamba_numba.step(xz, state.conv, state.ssm, state.A, self)
            return self.out_proj(y), BlockState(conv, ssm, state.A)
        x, z = xz.chunk(2, -1)  # (B, D)
        conv = torch.cat([state.conv[..., 1:], x.unsqueeze(-1)], -1)  # (B, D, K)
        x = F.silu((conv * self.conv1d.weight.squeeze(1)).sum(-1) + self.conv1d.bias)
        delta, B, C = self._split(self.x_proj(x))
        delta = F.softplus(self.dt_proj(delta))  # (B, D)
        decay = torch.exp(delta.unsqueeze(-1) * state.A)  # (B, D, N)
        ssm = torch.addcmul((delta * x).unsqueeze(-1) * B.unsqueeze(1), decay, state.ssm)
        y = torch.addcmul(torch.bmm(ssm, C.unsqueeze(-1)).squeeze(-1), self.D, x)
        return self.out_proj(y * F.silu(z)), BlockState(conv, ssm, state.A)


def check_tokens(tokens: Tensor, width: int) -> None:
    """Raise a ValueError unless tokens are (B, L, width) with at least one entry along each axis."""
    if tokens.dim() != 3 or 0 in tokens.shape or tokens.shape[2] != width:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; needed is (batch, length, {width}), nothing empty")


def _fusible(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled CPU path can be taken."""
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return on_cpu and numba_missing() is None


class _Residual(nn.Module):
    """x + mixer(norm(x)); on the compiled path in one function, which calls neither module's `forward`."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.mixer = MambaBlock(config)

    def forward(self, x: Tensor) -> Tensor:
        if _fusible(x, self.norm.weight):
            from adbook import mamba_numba

            return mamba_numba.layer(x, self.mixer, self.norm)
        return x + self.mixer(self.norm(x))

    def prefill(self, x: Tensor) -> tuple[Tensor, BlockState]:
        y, state = self.mixer.prefill(self.norm(x))
        return x + y, state

    def step(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        y, state = self.mixer.step(self.norm(x), state)
        return x + y, state


class Mamba(nn.Module):
    """A pre-norm residual stack of Mamba blocks with a final norm, without embedding and head.

    Names and initialisation follow `MixerModel` in `mamba_ssm/models/mixer_seq_simple.py` (mamba-ssm 2.3.2): weights
    that write to the residual stream are divided by √n_layers, as in GPT-2, to keep its variance at any depth.
    """

    def __init__(self, config: MambaConfig):
        """Make the stack with fresh weights."""
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(_Residual(config) for _ in range(config.n_layers))
        self.norm_f = nn.RMSNorm(config.d_model, eps=1e-5)
        with torch.no_grad():
            for layer in self.layers:
                layer.mixer.out_proj.weight /= math.sqrt(config.n_layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, L, E) to (B, L, E); position t sees positions up to t.

        Raises:
            ValueError: the tokens have another width, or an axis is missing or empty.
        """
        check_tokens(tokens, self.config.d_model)
        for layer in self.layers:
            tokens = layer(tokens)
        if _fusible(tokens, self.norm_f.weight):
            from adbook import mamba_numba

            return mamba_numba.rms_norm(tokens, self.norm_f.weight, self.norm_f.eps)
        return self.norm_f(tokens)

    def prefill(self, tokens: Tensor) -> tuple[Tensor, tuple[BlockState, ...]]:
        """Read tokens (B, L, E) from an empty state: the outputs of `forward`, and the state that L steps lead to."""
        check_tokens(tokens, self.config.d_model)
        states = []
        for layer in self.layers:
            tokens, state = layer.prefill(tokens)
            states.append(state)
        return self.norm_f(tokens), tuple(states)

    def init_state(self, batch: int) -> tuple[BlockState, ...]:
        """The state before the first token of `batch` sequences; make a new one after changing the weights."""
        return tuple(layer.mixer.init_state(batch) for layer in self.layers)

    def step(self, token: Tensor, state: tuple[BlockState, ...]) -> tuple[Tensor, tuple[BlockState, ...]]:
        """One step: token (B, E) and the state before it to output (B, E) and a new state (the old one is kept).

        Repeating it gives what `forward` gives, at a time and memory that do not grow.
        """
        states = []
        for layer, before in zip(self.layers, state, strict=True):
            token, after = layer.step(token, before)
            states.append(after)
        return self.norm_f(token), tuple(states)
