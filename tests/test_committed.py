"""The policies and results in the repository: complete, of the settings that the code has, and able to play."""

from dataclasses import replace

import numpy as np
import pytest

from adbook import ADPolicy, checkpoints, metrics, results
from adbook.experiments import RESULTS, as_agent, completed, describe, evaluate, profile
from adbook.tasks import FAMILIES

FOUND = [name for name in FAMILIES if (RESULTS / f"{name}-laptop.json").is_file()]
SHOWN = [name for name in FOUND if "weights" in results.load_result(f"{name}-laptop")]


def published(name):
    """Settings of every policy behind a family's result."""
    result = results.load_result(f"{name}-laptop")
    once = [agent for agent in result["weights"] if len(result["returns"]["test"][agent]) == 1]
    runs = results.with_seeds(list(result["weights"]), result["seeds"], once)
    return result, [replace(as_agent(profile("laptop", name), agent), seed=seed) for agent, seed in runs]


@pytest.mark.parametrize("name", SHOWN)
def test_every_policy_behind_a_result_is_in_the_repository_with_its_card(name):
    result, policies = published(name)
    for settings in policies:
        folder = checkpoints.published_at(settings)
        assert checkpoints.is_published(settings), f"{folder.name} is of other settings than the code has"
        assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
        scores = results.load_references(result).score(np.array(result["returns"]["test"][settings.agent]))
        last = metrics.iqm(scores[None, result["seeds"].index(settings.seed), :, -5:].mean(-1))
        assert f"**{last:.2f}** in the last five" in (folder / "README.md").read_text()
    assert results.as_written(completed(result["settings"])) == results.as_written(describe(profile("laptop", name)))


@pytest.mark.parametrize("name", SHOWN)
def test_a_policy_from_the_repository_plays_as_its_result_says(name):
    """On another processor sums are rounded otherwise, and a rollout soon differs: so its mean, in two episodes."""
    result, (settings, *_) = published(name)
    policy = ADPolicy.from_pretrained(checkpoints.published_at(settings))
    ends = results.load_references(result)
    played = ends.score(evaluate(settings, policy, episodes=2).returns)
    committed = ends.score(np.array(result["returns"]["test"][settings.agent][0])[:, :2])
    error = np.abs((played - committed).mean(0))
    spread = committed.std(0) / len(committed) ** 0.5  # of a mean over so many tasks
    assert (error <= 4 * spread).all()
