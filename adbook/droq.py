"""DroQ (arXiv 2110.02034) on stable-baselines3's SAC: regularised critics that stand twenty updates a step.

Each hidden layer of a critic is Linear → Dropout → LayerNorm → ReLU, the target critics keep their dropout, and the
policy is updated once after all critic updates of a step, from the mean of the critics.
"""

import torch
from stable_baselines3 import SAC
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import create_mlp, get_actor_critic_arch
from stable_baselines3.sac.policies import SACPolicy
from torch import Tensor, nn


class DroQPolicy(SACPolicy):
    """SAC's policy with critics of DroQ's layers."""

    def __init__(self, *args, dropout: float = 0.01, **kwargs):
        """Build it; `dropout` is the probability to drop a unit of a critic's hidden layer."""
        self.dropout = dropout
        super().__init__(*args, **kwargs)

    def make_critic(self, features_extractor: nn.Module | None = None) -> ContinuousCritic:
        """Return critics as SAC makes them, with dropout and normalisation between each hidden layer and its ReLU."""
        critic = super().make_critic(features_extractor)
        _, widths = get_actor_critic_arch(self.net_arch)
        regularised = [lambda width: nn.Dropout(self.dropout), nn.LayerNorm]
        for i in range(critic.n_critics):
            inputs = critic.q_networks[i][0].in_features
            layers = create_mlp(inputs, 1, widths, self.activation_fn, post_linear_modules=regularised)
            critic.q_networks[i] = nn.Sequential(*layers)
            critic.add_module(f"qf{i}", critic.q_networks[i])
        return critic.to(self.device)


class DroQ(SAC):
    """SAC whose critics take all the gradient steps of a training phase before the policy takes one.

    Arguments are SAC's, with "MlpPolicy"; `gradient_steps` counts critic updates, `policy_kwargs` may hold `dropout`.
    State-dependent exploration is not supported.
    """

    policy_aliases = {"MlpPolicy": DroQPolicy}  # noqa: RUF012 - as stable-baselines3 declares it

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """Update the critics `gradient_steps` times on fresh batches, then policy and temperature once, on the last."""
        self.policy.set_training_mode(True)
        self.critic_target.set_training_mode(True)
        optimizers = self.actor.optimizer, self.critic.optimizer, self.ent_coef_optimizer
        self._update_learning_rate([o for o in optimizers if o is not None])
        data = self.replay_buffer.sample(gradient_steps * batch_size, env=self._vec_normalize_env)
        with torch.no_grad():  # the policy stands still while the critics learn, so all its actions are drawn at once
            temperature = self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef.exp()
            actions, log_probability = self.actor.action_log_prob(data.next_observations)
        discounts = torch.full_like(data.rewards, self.gamma) if data.discounts is None else data.discounts
        rows = data.rewards, (1 - data.dones) * discounts, temperature * log_probability[:, None]
        parts = data.observations, data.actions, data.next_observations, actions, *rows
        for i, batch in enumerate(zip(*(part.split(batch_size) for part in parts), strict=True)):
            self._update_critics(*batch)
            if i % self.target_update_interval == 0:
                with torch.no_grad():
                    torch._foreach_lerp_(
                        list(self.critic_target.parameters()), list(self.critic.parameters()), self.tau
                    )
        self._update_policy(data.observations[-batch_size:], temperature)
        self._n_updates += gradient_steps

    def _update_critics(self, observations, actions, next_observations, next_actions, rewards, discounts, cost) -> None:
        with torch.no_grad():
            following = torch.cat(self.critic_target(next_observations, next_actions), 1).amin(1, keepdim=True) - cost
            target = rewards + discounts * following  # (batch, 1)
        values = torch.cat(self.critic(observations, actions), 1)  # (batch, critics)
        loss = 0.5 * (values - target).square().mean(0).sum()
        self.critic.optimizer.zero_grad()
        loss.backward()
        self.critic.optimizer.step()

    def _update_policy(self, observations: Tensor, temperature: Tensor) -> None:
        actions, log_probability = self.actor.action_log_prob(observations)
        values = torch.cat(self.critic(observations, actions), 1).mean(1)
        loss = (temperature * log_probability - values).mean()
        self.actor.optimizer.zero_grad()
        loss.backward()
        self.actor.optimizer.step()
        if self.ent_coef_optimizer is not None:
            surplus = (log_probability + self.target_entropy).detach().mean()
            self.ent_coef_optimizer.zero_grad()
            (-self.log_ent_coef * surplus).sum().backward()
            self.ent_coef_optimizer.step()
