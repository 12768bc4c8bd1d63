"""How MQL fits itself to a new task: first to what it has seen there, then to what it has seen before and looks alike.

| symbol | what it is                                                                             |
|--------|----------------------------------------------------------------------------------------|
| β      | propensity: how much likelier a transition is to be of the new task than of the old    |
| ESS    | normalised effective sample size of β, 1 where all are equal                           |
| λ      | 1 − ESS, how strongly the weights are drawn back to the meta-trained ones              |

ESS measures how unequal the weights of old transitions are, not how unlike the new ones they are. It is taken of the
weights that the loss uses: β, cut at its largest value and set to 0 below its smallest. Where all are 0, ESS is 0 and
λ is 1.
"""

import copy
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor, nn

from adbook.baselines.mql import MQL, Actor, Learner
from adbook.baselines.mql_replay import Batch, MQLConfig, Replay, no_past, remembered
from adbook.baselines.seen import Seen
from adbook.checks import check_positive, check_whole
from adbook.stored import load_module, save_module


@dataclass(frozen=True)
class AdaptationConfig:
    """Adaptation of MQL; the defaults are the published ones for Half-Cheetah-Vel."""

    steps: int = 200  # seen of the new task; then it adapts at the next start of an episode
    new_updates: int = 10  # on all of what was seen there
    old_updates: int = 100  # on the replay of meta-training, weighted by β
    old_batch: int = 1280
    learning_rate: float = 1e-3
    samples: int = 2000  # of the replay, that the propensity is fitted with
    l2: float = 0.025  # of its weights
    beta_max: float = 2.7
    beta_min: float = 0.1  # below it β counts as 0

    def __post_init__(self):
        """Refuse settings that cannot run, ValueError."""
        for name in ("steps", "old_batch", "samples"):
            check_whole(name, getattr(self, name))
        for name in ("new_updates", "old_updates"):
            check_whole(name, getattr(self, name), 0)
        check_positive(self, ("learning_rate", "beta_max"))
        check_positive(self, ("l2", "beta_min"), or_zero=True)
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min={self.beta_min} must be at most beta_max={self.beta_max}")


class Propensity(NamedTuple):
    """A logistic model that tells the new task's contexts (label 1) from the old ones' (label 0)."""

    weights: np.ndarray  # (memory + 1,), the last one is the bias
    scale: np.ndarray  # (2, memory), mean and standard deviation of the contexts

    def beta(self, contexts: np.ndarray) -> np.ndarray:
        """Odds that contexts (B, memory) are the new task's, (B,)."""
        return np.exp((_with_bias(contexts, self.scale) @ self.weights).clip(-20, 20))

    def counted(self, contexts: np.ndarray, config: AdaptationConfig) -> np.ndarray:
        """Weights of transitions in the loss, (B,): β, cut at `beta_max`, and 0 below `beta_min`."""
        beta = self.beta(contexts).clip(max=config.beta_max)
        return np.where(beta < config.beta_min, 0.0, beta)


def fit_propensity(new: np.ndarray, old: np.ndarray, l2: float = 0.025) -> Propensity:
    """Fit the logistic model to contexts (·, memory); each side counts one half, so β is 1 where both are alike."""
    scale = np.stack((np.concatenate((new, old)).mean(0), np.concatenate((new, old)).std(0) + 1e-6))
    inputs = np.concatenate([_with_bias(x, scale) for x in (new, old)])
    signs = np.repeat([1.0, -1.0], [len(new), len(old)])
    counts = np.repeat([0.5 / len(new), 0.5 / len(old)], [len(new), len(old)])

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (inputs @ w)
        slope = -counts * signs * expit(-margins)
        free = np.append(w[:-1], 0.0)  # the bias is not drawn to 0
        return counts @ np.logaddexp(0, -margins) + l2 / 2 * free @ free, slope @ inputs + l2 * free

    fitted = minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="L-BFGS-B")
    return Propensity(fitted.x, scale)


def _with_bias(contexts: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.concatenate(((contexts - scale[0]) / scale[1], np.ones((len(contexts), 1))), 1)


def effective_sample_size(beta: np.ndarray) -> float:
    """Normalised effective sample size (Σβ)² / (m Σβ²), from 1 / m to 1; 0 where all β are."""
    if not beta.any():
        return 0.0
    return float(beta.sum() ** 2 / (len(beta) * (beta**2).sum()))


def adapt(model: MQL, new: Replay, old: Replay, config: AdaptationConfig, seed: int = 0) -> Actor:
    """Return the actor after adaptation to what was seen on a new task; `model` stays as it is.

    Args:
        model: meta-trained.
        new: steps of the new task.
        old: the replay of meta-training.
        config: see there.
        seed: of batches and noise.

    Raises:
        ValueError: nothing was seen of the new task, or of the old ones.
    """
    for name, replay in {"new": new, "old": old}.items():
        check_whole(f"the number of steps in {name}", replay.steps)
    rng, fitted = np.random.default_rng(seed), copy.deepcopy(model)
    learner, whole = Learner(fitted, seed, config.learning_rate), new.at(np.arange(new.steps), np.zeros(new.steps, int))
    of_new, of_old = (contexts(model, batch) for batch in (whole, old.sample(config.samples, rng)))
    propensity = fit_propensity(of_new, of_old, config.l2)
    pull = 1 - effective_sample_size(propensity.counted(of_old, config))
    for _ in range(config.new_updates):
        learner.update(whole, anchor=model, pull=pull)
    for _ in range(config.old_updates):
        batch = old.sample(config.old_batch, rng)
        weights = torch.from_numpy(propensity.counted(contexts(model, batch), config)).float()
        learner.update(batch, weights, anchor=model, pull=pull)
    return fitted.actor.eval()


@torch.no_grad()
def contexts(model: MQL, batch: Batch) -> np.ndarray:
    """What the meta-trained actor's GRU makes of transitions and what came before them, (B, memory).

    The transition is among them, for its reward tells most of the task; the authors' code stops short of it.
    """
    return model.actor.context(batch.next_past).double().numpy()


class AdaptingState(NamedTuple):
    """What an `AdaptingMQL` carries from step to step."""

    actors: list[Actor]  # of each task
    past: Tensor  # (n, H, F)
    last: tuple[Tensor, Tensor] | None  # observations (n, O) and actions (n, A) of the step before
    waiting: Tensor  # (n,) bool, the tasks that have not adapted yet
    seen: Seen  # while any waits


class AdaptingMQL(nn.Module):
    """A meta-trained MQL at play; `adbook.rollout` plays it like any policy.

    After the first episodes of a task it adapts once, and plays on with what that gave. The adapted weights are part of
    the state: what was meta-trained stays as it is.
    """

    def __init__(self, model: MQL, old: Replay, adaptation: AdaptationConfig, seed: int = 0):
        """Wrap `model`; for the rest see `adapt`."""
        super().__init__()
        self.model, self.config, self.old = model, model.config, old
        self.adaptation, self.seed, self.about = adaptation, seed, {}

    def save(self, path: str | os.PathLike, about: dict[str, Any], *, half: bool = False) -> Path:
        """Write one safetensors file, the replay included; `half` keeps all but its counts of steps in 16 bits."""
        capacity, tasks = self.old.rewards.shape
        sizes = {"capacity": capacity, "steps": self.old.steps, "tasks": tasks}
        configs = {"config": asdict(self.config), "adaptation": asdict(self.adaptation)}
        names = [name for name in self.state_dict() if name != "old.since_start"] if half else []
        return save_module(path, self, {**configs, "replay": sizes, "seed": self.seed, "about": about}, half=names)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "AdaptingMQL":
        """Read what `save` wrote; what it was told is its attribute `about`.

        Raises:
            ValueError: the file is damaged or holds something else.
        """

        def make(described: dict[str, Any]) -> AdaptingMQL:
            config, sizes = MQLConfig(**described["config"]), described["replay"]
            old = Replay(sizes["tasks"], sizes.get("capacity", sizes["steps"]), config)  # first files: of full ones
            old.steps = sizes["steps"]
            agent = cls(MQL(config), old, AdaptationConfig(**described["adaptation"]), described["seed"])
            agent.about = described["about"]
            return agent

        return load_module(Path(path), cls, make)

    def init_state(self, n: int) -> AdaptingState:
        """Start `n` tasks."""
        seen = Seen.nothing(n, self.config.observation_size, self.config.action_size)
        waiting = torch.ones(n, dtype=torch.bool)
        return AdaptingState([self.model.actor] * n, no_past(n, self.config), None, waiting, seen)

    def act(
        self,
        observation: Tensor,
        reward: Tensor | None,
        start: Tensor,
        state: AdaptingState,
        *,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, AdaptingState]:
        """Return actions (n, A), and the state with what was seen; tasks that are due adapt first."""
        if state.last is not None:
            rewards = torch.zeros(len(start)) if reward is None else reward
            past = remembered(state.past, *state.last, rewards)
            past[start] = 0.0
            state = state._replace(past=past, seen=state.seen.rewarded(reward) if state.waiting.any() else state.seen)
            if state.seen.steps >= self.adaptation.steps:
                for i in (state.waiting & start).nonzero().flatten().tolist():
                    state = self._adapt(state, i)
        each = zip(state.actors, state.past, observation, strict=True)
        action = torch.cat([actor(past.unsqueeze(0), seen.unsqueeze(0)) for actor, past, seen in each])
        if not deterministic:
            noise = torch.randn(action.shape, generator=generator)
            action = action + self.config.exploration * self.config.action_scale * noise
        action = action.clamp(-self.config.action_scale, self.config.action_scale)
        seen = state.seen.acted(observation, action, start) if state.waiting.any() else state.seen
        return action, state._replace(last=(observation, action), seen=seen)

    def _adapt(self, state: AdaptingState, i: int) -> AdaptingState:
        """Adapt one task to all it has seen."""
        with torch.inference_mode(False), torch.enable_grad():  # a rollout infers
            actors = list(state.actors)
            actors[i] = adapt(self.model, as_replay(state.seen, i, self.config), self.old, self.adaptation, self.seed)
        return state._replace(actors=actors, waiting=state.waiting & (torch.arange(len(state.waiting)) != i))


def as_replay(seen: Seen, i: int, config: MQLConfig) -> Replay:
    """What was seen of task `i` up to the end of an episode, as all is when a task adapts.

    An episode's last step is kept if it was terminal, as fewer steps than the horizon tell; else nobody saw what came
    next.
    """
    replay = Replay(1, seen.steps, config)
    observations, actions, rewards = (x[i].unsqueeze(1) for x in seen[:3])  # (t, 1, …)
    for episode in seen.episodes(i):
        terminal = episode.stop - episode.start < config.horizon
        for t in range(episode.start, episode.stop - (not terminal)):
            row = {"observations": observations[t], "actions": actions[t], "rewards": rewards[t]}
            last = t == episode.stop - 1
            row |= {"next_observations": observations[t if last else t + 1], "terminated": torch.tensor(float(last))}
            replay.add(**row, since_start=torch.tensor(float(t - episode.start)))
    return replay
