"""The benchmarks of sources: what is measured, and that DroQ's peer gets the same settings."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from stable_baselines3 import PPO

from adbook import bench_sources
from adbook.droq import DroQ
from adbook.recipes import RECIPES, Recipe
from adbook.sources import DroQConfig, PPOConfig
from adbook.vectors import simulator

pytestmark = pytest.mark.usefixtures("threads")


def test_speeds_are_told_beside_the_defaults_of_stable_baselines3(monkeypatch):
    tiny = {"ppo": PPOConfig(n_envs=2, streams=1, n_steps=50, batch_size=100), "droq": DroQConfig(updates=1)}
    monkeypatch.setattr(bench_sources, "RECIPES", {"reacher-goal": {s: Recipe(config) for s, config in tiny.items()}})
    monkeypatch.setattr(bench_sources, "STEPS", {"ppo": 100, "droq": 60})
    monkeypatch.setattr(bench_sources, "PEERS", {"ppo": (PPO, 100)})
    measured = bench_sources.bench_sources(rounds=1)
    assert measured["cores"] == 1
    reacher = measured["reacher-goal"]
    assert reacher["simulator"] == simulator("reacher-goal")
    ppo = reacher["ppo"]
    assert ppo["ratio"] == pytest.approx(ppo["steps_per_second"] / ppo["default_steps_per_second"])
    assert ppo["default_steps_per_second"] > 0
    assert reacher["droq"]["steps_per_second"] > 0
    assert set(reacher["droq"]) == {"steps_per_second"}  # stable-baselines3 has none


def test_droq_is_compared_with_a_peer_of_the_same_settings(monkeypatch):
    """Here the peer is our own DroQ on gymnasium, which takes sbx's names of the settings."""
    asked = {}

    def peer(policy, env, *, policy_delay, policy_kwargs, **options):
        asked.update(options, policy_delay=policy_delay, policy_kwargs=policy_kwargs)
        return DroQ("MlpPolicy", env, **options)

    monkeypatch.setitem(sys.modules, "sbx", SimpleNamespace(SAC=peer))
    small = DroQConfig(updates=3, learning_starts=350, batch_size=8, dropout=0.02)
    monkeypatch.setitem(RECIPES["half-cheetah-vel"], "droq", Recipe(small))
    result = bench_sources.bench_droq(seeds=(0, 1), steps=400)
    assert np.shape(result["returns"]) == np.shape(result["sbx_returns"]) == (2, 2)
    assert result["end"] == pytest.approx(np.mean([curve[-1] for curve in result["returns"]]))
    assert asked["policy_delay"] == asked["gradient_steps"] == 3
    assert asked["policy_kwargs"] == {"net_arch": [64, 64], "dropout_rate": 0.02, "layer_norm": True}
    ours = replace(small, steps=400).options(1)
    assert {key: value for key, value in asked.items() if not key.startswith("policy")} == {
        key: value for key, value in ours.items() if not key.startswith("policy")
    }


def test_a_missing_peer_is_asked_for_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "sbx", None)
    monkeypatch.setattr(bench_sources, "learn", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install sbx-rl==0\.28\.0"):
        bench_sources.bench_droq()
