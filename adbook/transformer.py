"""A causal transformer with the interface of `adbook.mamba.Mamba`, in parallel form and in one-step form.

Pre-norm blocks of attention and a GELU network (Vaswani et al. 2017, arXiv 1706.03762; Radford et al. 2019, "GPT-2",
section 2.3), rotary positions (Su et al. 2021, arXiv 2104.09864, section 3.2) and a sliding window: in every layer a
token attends to itself and to the `context` - 1 tokens before it (Beltagy et al. 2020, arXiv 2004.05150, section 3).
`forward` and `step` cut the window in the same way, so they agree at any length, and the one-step form needs a cache
of `context` tokens only.  As the window slides layer by layer, information can travel n_layers × (context - 1) tokens.
Training on sequences of at most W tokens never shows that; `adbook.controls.Rereading` plays without it.

| symbol | code       | meaning                                        | default |
|--------|------------|------------------------------------------------|---------|
| B      | `batch`    | sequences side by side                         |         |
| L      | `length`   | steps (tokens) of a sequence                   |         |
| E      | `d_model`  | model width; tokens are (B, L, E)              | 64      |
| H      | `n_heads`  | attention heads                                | 4       |
| P      | `d_head`   | width of a head, E / H                         | 16      |
| W      | `context`  | tokens in the window                           | 400     |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adbook.checks import check_whole, is_number
from adbook.mamba import check_tokens

_ROTARY_BASE = 10_000.0  # the slowest pair of a head turns once in about 2π × this many tokens


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a `Transformer`.

    Raises:
        ValueError: on creation, if a size is not positive or the heads do not divide the width evenly.
    """

    d_model: int = 64  # E, width of a token
    n_layers: int = 4  # blocks
    n_heads: int = 4  # H; d_model / n_heads must be even, for rotary positions
    context: int = 400  # W, tokens that a token attends to in each layer, itself included
    mlp: float = 4.0  # hidden width of the network after the attention, in multiples of d_model

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("d_model", "n_layers", "n_heads", "context"):
            check_whole(name, getattr(self, name))
        if not is_number(self.mlp) or not (self.hidden >= 1 and self.hidden == self.mlp * self.d_model):
            raise ValueError(f"mlp={self.mlp!r} times d_model ({self.d_model}) must be a whole number of at least 1")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model={self.d_model} must be a multiple of 2 × n_heads ({2 * self.n_heads}), so that rotary "
                "positions can turn pairs of numbers"
            )

    @property
    def d_head(self) -> int:
        """P, the width of a head."""
        return self.d_model // self.n_heads

    @property
    def hidden(self) -> int:
        """Hidden width of the network after the attention."""
        return round(self.mlp * self.d_model)


class LayerCache:
    """Keys and values of the last W tokens, (B, H, W, P) each; token t is kept in slot t modulo W.

    Attention does not depend on the order of the slots, because a key carries its position in its rotation.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        """Start with empty slots."""
        self.keys, self.values = keys, values

    def put(self, position: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrite the oldest slot with (B, H, 1, P) and return the filled ones."""
        window = self.keys.shape[2]
        slot = position % window
        self.keys[:, :, slot] = key[:, :, 0]
        self.values[:, :, slot] = value[:, :, 0]
        filled = min(position + 1, window)
        return self.keys[:, :, :filled], self.values[:, :, :filled]

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Take the last W of the first tokens' (B, H, L, P)."""
        length, window = keys.shape[2], self.keys.shape[2]
        places = torch.arange(max(0, length - window), length, device=keys.device)
        for cache, new in ((self.keys, keys), (self.values, values)):
            cache[:, :, places % window] = new[:, :, places]


class TransformerState:
    """What `Transformer.step` carries: the position of the next token and a cache for each layer."""

    def __init__(self, position: int, caches: tuple[LayerCache, ...]):
        """Join a position (tokens seen so far) and the caches of the layers."""
        self.position, self.caches = position, caches


class Attention(nn.Module):
    """Causal multi-head attention over a sliding window, with rotary positions."""

    def __init__(self, config: TransformerConfig):
        """Make the projections, with torch's initialisation."""
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, tokens: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        """Map tokens (B, L, E) to (B, L, E); `mask` (L, L) is the window, None for plain causal attention.

        Keys and values are put into `cache`, if there is one.
        """
        q, k, v = self._heads(tokens)  # (B, H, L, P)
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        if cache is not None:
            cache.fill(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.proj(y.transpose(1, 2).flatten(2))

    def step(self, token: Tensor, rotation: tuple[Tensor, Tensor], position: int, cache: LayerCache) -> Tensor:
        """Map a token (B, E) to (B, E), after putting its key and value into the cache."""
        q, k, v = self._heads(token.unsqueeze(1))  # (B, H, 1, P)
        keys, values = cache.put(position, _rotate(k, rotation), v)
        y = F.scaled_dot_product_attention(_rotate(q, rotation), keys, values)  # (B, H, 1, P)
        return self.proj(y.flatten(1))

    def _heads(self, tokens: Tensor) -> tuple[Tensor, ...]:
        heads = self.qkv(tokens).unflatten(-1, (3, self.config.n_heads, -1))  # (B, L, 3, H, P)
        return heads.permute(2, 0, 3, 1, 4).unbind(0)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig):
        """Make a block."""
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.attention = Attention(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.d_model, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.d_model),
        )

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        """Map x (B, L, E) to (B, L, E), and put keys and values into `cache`, if there is one."""
        x = x + self.attention(self.norm1(x), rotation, mask, cache)
        return x + self.mlp(self.norm2(x))

    def step(self, x: Tensor, rotation: tuple[Tensor, Tensor], position: int, cache: LayerCache) -> Tensor:
        """Map x (B, E) to (B, E)."""
        x = x + self.attention.step(self.norm1(x), rotation, position, cache)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A stack of pre-norm blocks with a final norm, without embedding and head.

    Weights that write to the residual stream are divided by √(2 n_layers), as in GPT-2 (its section 2.3).
    """

    def __init__(self, config: TransformerConfig):
        """Make the stack with fresh weights, from torch's global generator as all of `torch.nn` does."""
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_f = nn.LayerNorm(config.d_model)
        with torch.no_grad():
            for layer in self.layers:
                for linear in (layer.attention.proj, layer.mlp[-1]):
                    linear.weight /= math.sqrt(2 * config.n_layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, L, E) to (B, L, E); position t sees positions up to t, in each layer the last W of them."""
        return self._read(tokens, [None] * len(self.layers))

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> tuple[Tensor, TransformerState]:
        """Read tokens (B, L, E) without gradients: the outputs of `forward`, and the state that L steps lead to."""
        state = self.init_state(len(tokens))
        return self._read(tokens, state.caches), TransformerState(tokens.shape[1], state.caches)

    def _read(self, tokens: Tensor, caches: Sequence[LayerCache | None]) -> Tensor:
        check_tokens(tokens, self.config.d_model)
        length, window = tokens.shape[1], self.config.context
        rotation = _rotation(torch.arange(length, device=tokens.device), self.config.d_head, tokens)
        mask = None
        if length > window:
            age = torch.arange(length, device=tokens.device)[:, None] - torch.arange(length, device=tokens.device)
            mask = (age >= 0) & (age < window)  # (L, L), True where attention is allowed
        for layer, cache in zip(self.layers, caches, strict=True):
            tokens = layer(tokens, rotation, mask, cache)
        return self.norm_f(tokens)

    def init_state(self, batch: int) -> TransformerState:
        """The state before the first token of `batch` sequences."""
        config, like = self.config, self.norm_f.weight
        shape = (batch, config.n_heads, config.context, config.d_head)
        return TransformerState(0, tuple(LayerCache(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.layers))

    @torch.no_grad()
    def step(self, token: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        """One step, without gradients: token (B, E) and the state before it to output (B, E) and the new state.

        Repeating it gives what `forward` gives.  The caches are updated in place: do not use the old state again.
        """
        batch = len(state.caches[0].keys)
        if len(token) != batch:
            raise ValueError(f"the state is one of {batch} sequences and got {len(token)} tokens; use init_state anew")
        rotation = _rotation(torch.tensor([state.position]), self.config.d_head, token)
        for layer, cache in zip(self.layers, state.caches, strict=True):
            token = layer.step(token, rotation, state.position, cache)
        return self.norm_f(token), TransformerState(state.position + 1, state.caches)


def _rotation(positions: Tensor, d_head: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, (L, P / 2) each, in the dtype and on the device of `like`.

    The angles are computed in float64: in float32 they would be off by 0.01 after 100,000 steps of a rollout.
    """
    rates = _ROTARY_BASE ** -(torch.arange(d_head // 2, dtype=torch.float64, device=positions.device) / (d_head // 2))
    angles = positions[:, None] * rates
    return angles.cos().to(like), angles.sin().to(like)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x_i, x_{i + P/2}) of every head (B, H, L, P) by the angles of their positions."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
