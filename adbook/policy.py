"""The algorithm-distillation policy: transitions to tokens, tokens through a sequence model, and out come actions.

One token a step. The token at step t is (s_{t-1}, a_{t-1}, r_{t-1}, s_t) and a flag that says whether s_t opens an
episode; from the tokens up to t the model predicts a_t (arXiv 2506.13892, section 5.2). At an episode's first step the
first three come from the last step of the episode before: the model sees across the border, as it must to learn across
episodes.

With `return_to_go` the token also holds the return that is still wanted in the episode: a Decision Transformer (Chen et
al. 2021, arXiv 2106.01345), with learning histories as its context.

| symbol | meaning                  | shape here        |
|--------|--------------------------|-------------------|
| B, L   | sequences, steps         |                   |
| O, A   | observation, action size |                   |
| s      | observation              | (B, L, O)         |
| a      | action                   | (B, L, A)         |
| r      | reward                   | (B, L)            |
| E      | model width              | tokens: (B, L, E) |
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from adbook.checks import check_known, check_positive, check_whole, is_number
from adbook.files import write_whole
from adbook.mamba import Mamba, MambaConfig
from adbook.transformer import Transformer, TransformerConfig

SCHEMA = 1  # of a saved policy; raise it when a stored field changes meaning
HEADS = ("gaussian", "mse")
_BACKBONES = {"mamba": (MambaConfig, Mamba), "transformer": (TransformerConfig, Transformer)}


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of an `ADPolicy`.

    Raises:
        ValueError: on creation, if the head is unknown or a size is not positive.
    """

    observation_size: int  # O
    action_size: int  # A
    action_scale: float = 1.0  # the largest action; the model works in units of it
    backbone: MambaConfig | TransformerConfig = field(default_factory=MambaConfig)
    head: str = "gaussian"  # "gaussian": mean and log σ, actions can be sampled; "mse": mean only, as in the paper
    embedding: int = 128  # hidden width of the network that makes a token
    log_std_min: float = -4.0  # bounds of log σ, in units of action_scale
    log_std_max: float = 1.0
    return_to_go: bool = False  # show the return that is still wanted in the episode, as a Decision Transformer does

    def __post_init__(self):
        """Check the values."""
        check_known("head", self.head, HEADS)
        for name in ("observation_size", "action_size", "embedding"):
            check_whole(name, getattr(self, name))
        check_positive(self, ("action_scale",))
        bounds = self.log_std_min, self.log_std_max
        if not (all(is_number(bound) or bound in (-math.inf, math.inf) for bound in bounds) and bounds[0] < bounds[1]):
            raise ValueError(f"log_std_min={self.log_std_min} must be less than log_std_max={self.log_std_max}")

    @property
    def backbone_name(self) -> str:
        """Which sequence model it is, "mamba" or "transformer"."""
        return next(name for name, (kind, _) in _BACKBONES.items() if isinstance(self.backbone, kind))


class PolicyState(NamedTuple):
    """What the policy carries from step to step; fixed in size, kept across episodes, dropped between tasks."""

    observation: Tensor  # of the step before, normalised, (n, O)
    action: Tensor  # of the step before, in units of action_scale, (n, A)
    known: Tensor  # (n, 1), 0 before the first step and 1 from then on
    to_go: Tensor  # (n, 1), return that is still wanted in the episode; 0 without `return_to_go`
    backbone: Any  # the sequence model's own state


class ADPolicy(nn.Module):
    """A sequence model that plays: it predicts the next action from all transitions so far."""

    def __init__(self, config: PolicyConfig):
        """Make an untrained policy; its normalisation is the identity until `set_statistics`."""
        super().__init__()
        self.config = config
        token = 2 * config.observation_size + config.action_size + 2 + config.return_to_go
        width = config.backbone.d_model
        self.embed = nn.Sequential(nn.Linear(token, config.embedding), nn.GELU(), nn.Linear(config.embedding, width))
        self.backbone = _BACKBONES[config.backbone_name][1](config.backbone)
        self.head = nn.Linear(width, config.action_size * (2 if config.head == "gaussian" else 1))
        nn.init.normal_(self.head.weight, std=0.01)  # start near mean 0 and σ of about exp(-0.5)
        nn.init.zeros_(self.head.bias)
        for name, size in (("observation", config.observation_size), ("reward", 1)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        for name, value in (("wanted", 0.0), ("return_std", 1.0)):
            self.register_buffer(name, torch.full((1,), value), persistent=config.return_to_go)

    def set_statistics(self, observations: Tensor, rewards: Tensor, returns: Tensor | None = None) -> None:
        """Take the normalisation from training data; it is saved with the weights.

        Args:
            observations: (…, O).
            rewards: (…).
            returns: (histories, episodes), NaN where a history has fewer; needed with `return_to_go`. What a policy
                wants at the start of an episode is the mean of the last tenths of the histories.
        """
        if self.config.return_to_go:
            ends = [one[~one.isnan()] for one in returns.double()]
            self.wanted.fill_(torch.stack([end[-max(1, len(end) // 10) :].mean() for end in ends]).mean())
            self.return_std.fill_(torch.cat(ends).std().clamp(min=1e-6))
        for name, data in (("observation", observations), ("reward", rewards.unsqueeze(-1))):
            data = data.flatten(0, -2).double()
            mean, std = data.mean(0), data.std(0)
            # What is constant but for the rounding of stored numbers is only centred: divided by its own spread, the
            # simulator's unrounded number would be a thousand spreads away from anything in the data.
            std = torch.where(std <= mean.abs() / 500, 1.0, std)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(std.clamp(min=1e-6))

    def forward(
        self, observations: Tensor, actions: Tensor, rewards: Tensor, starts: Tensor, to_go: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict the action of every step from the steps before it.

        Args:
            observations: s, (B, L, O).
            actions: a, (B, L, A).
            rewards: r, (B, L).
            starts: (B, L) bool, whether a step opens an episode.
            to_go: (B, L), sum of rewards from a step to its episode's end; needed with `return_to_go`.

        Returns:
            Mean and log σ of the action, (B, L, A) each, in units of `action_scale`; log σ is 0 for the "mse" head.
        """
        s = (observations - self.observation_mean) / self.observation_std
        before = torch.cat((s, actions / self.config.action_scale, self._reward(rewards.unsqueeze(-1))), -1)
        before = F.pad(before, (0, 0, 1, -1))  # the step before; zeros before the first
        tokens = torch.cat((before, s, starts.unsqueeze(-1).to(s.dtype)), -1)  # (B, L, 2 O + A + 2)
        if self.config.return_to_go:
            tokens = torch.cat((tokens, self._to_go(to_go.unsqueeze(-1))), -1)
        tokens = self.embed(tokens).to(s.dtype)  # of 32 bits also where products are made in 16
        return self._head(self.backbone(tokens))

    def loss(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood (or squared error) of the actions of a batch, in units of `action_scale`.

        Args:
            batch: as `adbook.windows.Windows.sample` gives it, as tensors.
            noise: (B, L, O) added to the observations that the model sees, in units of their standard deviation.
        """
        s = batch["observations"]
        if noise is not None:
            s = s + noise * self.observation_std
        to_go = returns_to_go(batch["rewards"], batch["starts"], batch["valid"]) if self.config.return_to_go else None
        mean, log_std = self(s, batch["actions"], batch["rewards"], batch["starts"], to_go)
        error = (batch["actions"] / self.config.action_scale - mean) ** 2
        if self.config.head == "gaussian":
            error = 0.5 * (error * torch.exp(-2 * log_std) + math.log(2 * math.pi)) + log_std
        return (error.mean(-1) * batch["imitated"]).sum() / batch["imitated"].sum()

    def init_state(self, n: int) -> PolicyState:
        """The state before the first step of `n` tasks."""
        zeros = self.observation_mean.new_zeros
        sizes = self.config.observation_size, self.config.action_size, 1, 1
        return PolicyState(*(zeros(n, size) for size in sizes), self.backbone.init_state(n))

    def act(
        self,
        observation: Tensor,
        reward: Tensor | None,
        start: Tensor,
        state: PolicyState,
        *,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, PolicyState]:
        """Choose the next action of `n` tasks.

        Args:
            observation: s_t, (n, O).
            reward: r_{t-1}, (n,), also across an episode's border; None withholds it: the model then sees the mean
                reward of its training data.
            start: (n,) bool, whether s_t opens an episode.
            state: from `init_state` or the last call.
            deterministic: take the mean instead of sampling.
            generator: for the sampling.

        Returns:
            The action (n, A), inside the action space, and the new state.
        """
        s = (observation - self.observation_mean) / self.observation_std
        r = torch.zeros_like(state.known) if reward is None else self._reward(reward.unsqueeze(-1)) * state.known
        token = torch.cat((state.observation, state.action, r, s, start.unsqueeze(-1).to(s.dtype)), -1)
        to_go = state.to_go
        if self.config.return_to_go:
            paid = self.reward_mean if reward is None else reward.unsqueeze(-1)
            to_go = torch.where(start.unsqueeze(-1), self.wanted, to_go - paid)
            token = torch.cat((token, self._to_go(to_go)), -1)
        hidden, backbone = self.backbone.step(self.embed(token), state.backbone)
        action, log_std = self._head(hidden)
        if self.config.head == "gaussian" and not deterministic:
            noise = torch.randn(action.shape, generator=generator, device=action.device)
            action = action + log_std.exp() * noise
        action = action.clamp(-1, 1)
        state = PolicyState(s, action, torch.ones_like(state.known), to_go, backbone)
        return action * self.config.action_scale, state

    def _reward(self, reward: Tensor) -> Tensor:
        return (reward - self.reward_mean) / self.reward_std

    def _to_go(self, to_go: Tensor) -> Tensor:
        return (to_go - self.wanted) / self.return_std

    def _head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.head == "mse":
            mean = self.head(hidden)
            return mean, torch.zeros_like(mean)
        mean, log_std = self.head(hidden).chunk(2, -1)
        return mean, (log_std - 0.5).clamp(self.config.log_std_min, self.config.log_std_max)

    def save_pretrained(
        self, path: str | os.PathLike, about: dict[str, Any] | None = None, *, half: bool = False
    ) -> Path:
        """Write `config.json` and `model.safetensors` into a folder, the layout of the Hugging Face Hub.

        Args:
            path: the folder; made if missing.
            about: what else to keep in `config.json` (data, training, machine, date).
            half: keep weights, but not the normalisation, in 16 bits; reading gives 32 again.
        """
        path = Path(path)
        described = {"schema": SCHEMA, "backbone": self.config.backbone_name, "config": asdict(self.config)}
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        if half:
            weights |= {name: weights[name].half() for name, _ in self.named_parameters()}
        config = json.dumps(described | {"about": about or {}}, indent=1)
        write_whole(path / "model.safetensors", lambda file: file.write_bytes(save(weights)))
        write_whole(path / "config.json", lambda file: file.write_text(config + "\n"))
        return path

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "ADPolicy":
        """Read a policy from a folder that `save_pretrained` wrote, or from a repository of the Hugging Face Hub.

        Raises:
            FileNotFoundError: there is no such folder, and it is not the name of a repository ("owner/name").
            ValueError: the files are of another schema, damaged, or do not fit each other.
        """
        folder = Path(path)
        if not folder.is_dir():
            folder = _from_hub(str(path))
        config = _read_config(folder / "config.json")
        policy = cls(config)
        try:
            policy.load_state_dict(load_file(folder / "model.safetensors"))
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"the weights in {folder} do not fit its config.json, or are damaged ({error}); train again or fetch "
                "both files anew"
            ) from error
        return policy.eval()


def returns_to_go(rewards: Tensor, starts: Tensor, valid: Tensor) -> Tensor:
    """Sum the rewards from every step to the end of its episode.

    Args:
        rewards: (B, L).
        starts: (B, L) bool, whether a step opens an episode; the last one ends with the valid steps.
        valid: (B, L) bool.

    Returns:
        (B, L), of the dtype of the rewards.
    """
    length = rewards.shape[1]
    left = (rewards * valid).double().flip(1).cumsum(1).flip(1)  # to the end of the window
    left = F.pad(left, (0, 1))
    opening = torch.where(starts, torch.arange(length, device=starts.device), length)
    following = F.pad(opening[:, 1:], (0, 1), value=length).flip(1).cummin(1).values.flip(1)  # start of the next one
    return (left[:, :-1] - left.gather(1, following)).to(rewards)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = ["config.json", "model.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"no policy at {name!r}: it is neither a folder with {' and '.join(files)} nor a repository that the "
            f"Hugging Face Hub gave ({type(error).__name__}); check the path, or train one"
        ) from error


def _read_config(path: Path) -> PolicyConfig:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; give a folder that save_pretrained wrote")
    try:
        described = json.loads(path.read_text())
        schema, backbone, config = described["schema"], described["backbone"], described["config"]
        if schema != SCHEMA:
            raise ValueError(f"{path} has schema version {schema}, this version reads {SCHEMA}; train the policy again")
        return PolicyConfig(**config | {"backbone": _BACKBONES[backbone][0](**config["backbone"])})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a policy ({error!r}); fetch or train it again") from error
