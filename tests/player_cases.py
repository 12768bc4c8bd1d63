"""What the tests of the player share: recorded rollouts, and a small policy."""

from functools import lru_cache

import torch

import adbook
from adbook.policy import ADPolicy, PolicyConfig
from adbook.rollout import RandomPolicy, rollout

EPISODES, STEPS = 3, 50  # of the recorded Reacher-Goal


@lru_cache
def recorded(name="reacher-goal", tasks=2, episodes=EPISODES, seed=1):
    family = adbook.family(name)
    policy = RandomPolicy(family.action_size, family.action_scale)
    return rollout(policy, family, family.test_tasks[:tasks], episodes=episodes, seed=seed)


def policy(backbone, **changes):
    torch.manual_seed(0)
    return ADPolicy(PolicyConfig(8, 2, backbone=backbone, **changes)).eval()
