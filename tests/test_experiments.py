import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adbook import checkpoints, experiments, results, vectors
from adbook.__main__ import main
from adbook.checkpoints import publish, published_policy, train_on_gpu, trained_policy
from adbook.experiments import AGENTS, PROFILES, References, as_agent, evaluate, profile, references, source_histories
from adbook.policy import ADPolicy
from adbook.recipes import recipe
from adbook.sources import PPOConfig
from adbook.tasks import FAMILIES
from adbook.training_cuda import train_side_by_side
from adbook.windows import WindowConfig


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Artefacts of this module's runs, in a folder apart from the reader's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "RUNS", tmp_path_factory.mktemp("runs"))
        yield experiments.RUNS


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_fits_reacher_goal(name):
    settings = profile(name)
    assert settings.policy.observation_size == 8
    assert settings.train_tasks == settings.family.train_tasks[: settings.n_tasks]


@pytest.mark.parametrize("name", ["laptop", "paper"])
@pytest.mark.parametrize("family", FAMILIES)
def test_windows_reach_to_the_end_of_the_best_source(name, family):
    settings = profile(name, family)
    episodes = settings.source.steps // settings.source.n_envs // settings.family.horizon
    if settings.window.every is None:  # it takes whatever there is
        assert settings.window.episodes < settings.kept < episodes
        return
    assert episodes - settings.window.episodes < settings.window.episodes * settings.window.every <= episodes
    assert settings.source == replace(recipe(family).config, streams=settings.source.streams)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_can_take_every_action_of_its_family(family):
    settings = profile("smoke", family)
    assert settings.policy.action_scale == settings.family.make(settings.test_tasks[0]).action_space.high[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "laptpo"}, "'laptpo'.*did you mean 'laptop'.*smoke, laptop, paper"),
        ({"family": "reacher"}, "'reacher'.*did you mean 'reacher-goal'.*ant-dir"),
        ({"layers": 3}, "unknown setting 'layers'.*backbone"),
        ({"seed": "one"}, "seed='one' must be a whole number from 0 to below"),
        ({"seed": -1}, "seed=-1 must"),
        ({"n_tasks": 129}, "n_tasks=129 must be from 1 to 128"),
        ({"n_test": 0}, "n_test=0 must be a whole number of at least 1"),
        ({"head": "mle"}, "'mle'.*gaussian, mse"),
        ({"return_to_go": "no"}, "return_to_go='no' must be True or False"),
        ({"source_seeds": 3}, "source_seeds=3 must be different seeds"),
        ({"window": WindowConfig(episodes=20, every=6)}, "20 episodes, one in 6, exceeds a history of 50 episodes"),
        ({"source": PPOConfig(steps=1600)}, "exceeds a history of 2 episodes; lower episodes or every, or raise"),
    ],
)
def test_a_bad_setting_is_refused_with_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        profile(**arguments)


def test_histories_are_recorded_once(runs, capsys):
    settings = profile("smoke")
    first = source_histories(settings, progress=False)
    again = source_histories(settings, progress=False)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"train histories: recorded {n} source runs, loaded {4 - n}" for n in (4, 0)]
    assert len(first) == settings.n_tasks * settings.source.streams
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)


def test_histories_can_be_thinned_out(runs):
    settings = profile("smoke")
    whole = source_histories(settings, progress=False)
    thin = replace(settings, kept=8)
    for history, kept in zip(whole, source_histories(thin, progress=False), strict=True):
        np.testing.assert_array_equal(kept.episode_returns, history.every(len(history.episodes) // 8).episode_returns)
    assert checkpoints._training_hash(settings) != checkpoints._training_hash(thin)
    with pytest.raises(ValueError, match=r"one in 2, exceeds a history of 3 episodes"):
        replace(settings, kept=3)
    with pytest.raises(ValueError, match="unknown split 'tests'"):
        source_histories(settings, "tests")


def test_a_policy_is_trained_once_and_another_setting_is_another_policy(runs, capsys):
    settings = profile("smoke")
    policy, log = trained_policy(settings, progress=False)
    loaded, same_log = trained_policy(settings, progress=False)
    assert "policy: loaded" in capsys.readouterr().out
    assert not list(runs.rglob("training.safetensors"))
    assert same_log == log
    for name, value in policy.state_dict().items():
        np.testing.assert_array_equal(value, loaded.state_dict()[name])
    other, _ = trained_policy(replace(settings, seed=1), progress=False)
    assert not np.array_equal(other.head.weight.detach(), policy.head.weight.detach())


def test_what_does_not_shape_the_weights_does_not_train_anew(runs):
    settings = profile("smoke")
    longer = replace(settings, episodes=9, n_test=1)
    assert checkpoints._training_hash(longer) == checkpoints._training_hash(settings)
    shorter = replace(settings, training=replace(settings.training, updates=5))
    assert checkpoints._training_hash(shorter) != checkpoints._training_hash(settings)
    named = {checkpoints._training_hash(as_agent(settings, agent)) for agent in AGENTS}
    assert len(named) == len(AGENTS)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("family", FAMILIES)
def test_agents_differ_in_their_weights_by_less_than_a_twentieth(name, family):
    settings = profile(name, family)
    with torch.device("meta"):
        models = {agent: ADPolicy(as_agent(settings, agent).policy) for agent in AGENTS}
    weights = {agent: sum(p.numel() for p in model.parameters()) for agent, model in models.items()}
    for agent in AGENTS:
        assert as_agent(settings, agent).agent == agent
        assert abs(weights[agent] / weights["mamba"] - 1) < 0.05
    attention = as_agent(settings, "transformer")
    assert attention.backbone.context == settings.window.episodes * settings.family.horizon
    assert (attention.window, attention.source) == (settings.window, settings.source)
    with pytest.raises(ValueError, match=r"'transfomer'.*did you mean 'transformer'"):
        as_agent(settings, "transfomer")
    with pytest.raises(ValueError, match="profile of the transformer cannot be made one of another agent"):
        as_agent(attention, "mamba")


def test_a_policy_is_published_in_half_its_size_and_stands_in_for_training(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path)
    settings = as_agent(profile("smoke"), "decision-transformer")
    trained, log = trained_policy(settings, progress=False)
    folder = publish(settings)
    assert folder == tmp_path / "reacher-goal-decision-transformer-smoke"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    policy, kept = published_policy(settings)
    for name, value in trained.state_dict().items():
        scale = value.abs().max().item()
        np.testing.assert_allclose(policy.state_dict()[name], value, rtol=0, atol=scale * 2**-11)  # of 16 bits
    np.testing.assert_array_equal(policy.wanted, trained.wanted)
    np.testing.assert_allclose(kept.losses, log.losses, atol=5e-5)
    publish(settings)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written  # is not written anew
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "nothing")
    monkeypatch.setattr(checkpoints, "train", None)  # would be called
    trained_policy(settings)
    assert capsys.readouterr().out.endswith("checkpoints/reacher-goal-decision-transformer-smoke\n")
    with pytest.raises(TypeError):
        trained_policy(settings, recompute=True, progress=False)
    assert not checkpoints.is_published(replace(settings, training=replace(settings.training, updates=5)))
    assert not checkpoints.is_published(replace(settings, seed=1))
    for simulator in vectors.SIMULATORS:  # whichever recorded the histories, and whichever is here
        monkeypatch.setattr(checkpoints.generation, "simulator", lambda name, simulator=simulator: simulator)
        assert checkpoints.is_published(settings)


def test_on_a_gpu_all_that_is_missing_is_trained_side_by_side(runs, monkeypatch, capsys):
    settings = profile("smoke")
    _, wanted = trained_policy(settings, progress=False), [replace(settings, seed=seed) for seed in (0, 11, 12)]
    wanted += [replace(as_agent(settings, "transformer"), seed=11)]
    given = []

    def on_cpu(trainings):
        given.extend(trainings)
        return train_side_by_side(trainings, device="cpu")

    monkeypatch.setattr(checkpoints, "train_side_by_side", on_cpu)
    train_on_gpu(wanted)
    assert [training.config.seed for training in given] == [11, 12, 11]  # the first was there
    assert [training.half for training in given] == [False, False, True]
    train_on_gpu(wanted)
    assert len(given) == 3
    with pytest.raises(ValueError, match="must be of the same data"):
        train_on_gpu([settings, replace(settings, n_tasks=3)])
    monkeypatch.setattr(checkpoints, "train", None)  # would be called
    for one in wanted:
        _, log = trained_policy(one)
        assert len(log.losses) == settings.training.updates


def test_references_put_the_source_at_one_and_random_at_zero(runs):
    settings = profile("smoke")
    ends = references(settings)
    assert ends.random.shape == ends.source.shape == (2,)
    # A source of 1,600 steps may still be worse than random, which has no score; the ends are checked on made ones.
    ends = replace(ends, random=np.array([-12.0, -10.0]), source=np.array([-2.0, -1.0]))
    np.testing.assert_allclose(ends.score(np.array([[-12.0, -2.0], [-5.5, -1.0]])), [[0, 1], [0.5, 1]])


def test_the_source_of_the_data_set_is_not_recorded_to_score_by(runs, monkeypatch):
    monkeypatch.setattr(experiments, "source_histories", None)
    settings = profile("laptop", "half-cheetah-vel", n_test=2)
    monkeypatch.setattr(experiments, "rollout", lambda *_, **__: SimpleNamespace(returns=np.full((2, 20), -400.0)))
    ends = references(settings)
    scored = results.load_result("sources")["families"]["half-cheetah-vel"]["sources"]["ppo"]["test"]
    np.testing.assert_allclose(ends.source, scored["end"][:2], atol=0.01)
    np.testing.assert_allclose(ends.start, scored["start"][:2], atol=0.01)


@pytest.mark.parametrize(
    ("family", "agent", "episodes"),
    [
        ("ant-dir", "transformer", 5),  # a window of six, rollouts of twenty
        ("half-cheetah-vel", "transformer", 0),  # a window as long as the rollouts
        ("ant-dir", "mamba", 0),
    ],
)
def test_what_is_reread_leaves_room_for_the_episode_that_is_played(family, agent, episodes):
    assert experiments.reread_episodes(as_agent(profile("laptop", family), agent)) == episodes


def test_the_card_of_attention_tells_what_rereading_gives(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path)
    settings = as_agent(profile("smoke"), "transformer")
    publish(settings)
    returns = {"transformer": np.full((1, 2, 6), -6.0), "transformer, reread": np.full((1, 2, 6), -4.0)}
    ends = {"random": [-10.0, -10.0], "source": [-2.0, -2.0]}
    result = {"seeds": [0], "returns": {"test": returns}, "references": {"test": ends}, "weights": {"transformer": 9}}
    text = " ".join(checkpoints.write_card(settings, result).read_text().split())
    assert "**0.50** in the last five of 6. With its last episodes read anew before each" in text
    assert "`adbook.controls.Rereading(policy, 1)`): 0.75. Limits" in text


def test_a_model_card_tells_data_training_and_the_scores_of_its_own_seed(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path)
    settings = profile("smoke", seed=1)
    publish(settings)
    returns = np.full((2, 2, 6), -6.0)  # seeds, tasks, episodes
    returns[1, :, -5:] = -3.0
    ends = {"random": [-10.0, -10.0], "source": [-2.0, -2.0]}
    result = {"seeds": [0, 1], "returns": {"test": {"mamba": returns}}, "references": {"test": ends}}
    card = checkpoints.write_card(settings, result | {"weights": {"mamba": 9753}})
    text = " ".join(card.read_text().split())
    assert card == tmp_path / "reacher-goal-mamba-smoke-seed1" / "README.md"
    for told in (
        "4 training tasks, 2 histories each of PPO, 1,600 environment",
        "2 whole episodes, one in 2 |",
    ):
        assert told in text
    for told in (
        "6 updates of 200 tokens",
        "9,753 weights",
        "0.50 in episode 1, **0.88** in the last five of 6",
        "0.69.",
    ):
        assert told in text


def test_evaluate_rolls_out_on_the_split_that_is_named(runs):
    settings = profile("smoke")
    policy, _ = trained_policy(settings, progress=False)
    played = evaluate(settings, policy, "ood", episodes=1)
    assert played.tasks == settings.ood_tasks
    assert played.returns.shape == (2, 1)


def test_ablations_change_one_factor_and_hold_the_profile_itself(runs):
    settings = profile("smoke")
    rows = results.variants(settings)
    for factor in {factor for factor, _, _ in rows}:
        values = [changes for name, _, changes in rows if name == factor]
        assert sum(replace(settings, **changes) == settings for changes in values) == 1
    strays = profile("laptop", "ant-dir")
    for factor, _, changes in results.variants(strays):
        assert replace(strays, **changes).window.strays == strays.window.strays, factor
    result = results.ablations(settings, updates=3, seeds=(0, 1))
    assert [row["factor"] for row in result["variants"]] == [factor for factor, _, _ in rows]
    returns = np.array([row["returns"] for row in result["variants"]])  # (variants, seeds, tasks, episodes)
    assert returns.shape == (len(rows), 2, settings.n_test, settings.episodes)
    assert np.isfinite(returns).all()
    assert (returns[:, 0] != returns[:, 1]).any(axis=(1, 2)).all()


def test_references_of_the_same_tasks_are_not_measured_again(monkeypatch):
    monkeypatch.setattr(results, "references", lambda settings, split: References(*np.full((3, 2), settings.n_test)))
    ends = {split: {"random": [1.0], "source": [2.0], "start": [1.5]} for split in ("test", "ood")}
    known = json.loads(json.dumps({"settings": experiments.describe(profile("smoke")), "references": ends}))
    assert results._references(profile("smoke", head="mse"), known=known) == ends
    others = results._references(profile("smoke", n_test=3), known=known)
    assert others["ood"]["random"].tolist() == [3, 3]


def test_a_result_survives_the_disk_and_a_missing_one_names_what_is_there(runs, tmp_path):
    result = results.in_context(profile("smoke"), seeds=(0, 1), once=("decision-transformer",))
    assert set(result["returns"]) == {"test", "ood"}  # Reacher-Goal is not in MACAW's split
    for method, returns in result["returns"]["test"].items():
        alone = method == "untrained" or "decision" in method
        assert np.shape(returns) == (1 if alone else 2, 2, 6), method
    others = (returns for method, returns in result["returns"]["test"].items() if method != "mamba")
    assert all(np.abs(np.array(other) - result["returns"]["test"]["mamba"]).max() > 1e-3 for other in others)
    first = np.array(result["returns"]["test"]["context shuffled"])[..., 0]
    np.testing.assert_array_equal(first, np.array(result["returns"]["test"]["mamba"])[..., 0])
    for agent in AGENTS:
        by_step = result["within"][agent].sum(-1)
        np.testing.assert_allclose(by_step, np.mean(result["returns"]["test"][agent], (0, 1)), rtol=1e-5)
    reread = {method for method in result["returns"]["ood"] if "reread" in method}  # their windows are shorter
    assert reread == {"transformer, reread", "decision-transformer, reread"}
    assert all(abs(n / result["weights"]["mamba"] - 1) < 0.05 for n in result["weights"].values())
    bounds = result["bounds"]["test"]
    assert (bounds["oracle"] > bounds["random"]).all()
    assert (bounds["oracle"] > bounds["misled"]).all()  # on Reacher-Goal the goal matters
    path = results.save_result("reacher-goal-smoke", result, tmp_path)
    loaded = results.load_result("reacher-goal-smoke", tmp_path)
    np.testing.assert_allclose(loaded["returns"]["ood"]["untrained"], result["returns"]["ood"]["untrained"], atol=5e-5)
    assert loaded["made"]["date"] == json.loads(path.read_text())["made"]["date"]
    with pytest.raises(FileNotFoundError, match=r"'ant-dir-paper'.*there: reacher-goal-smoke.*python -m adbook"):
        results.load_result("ant-dir-paper", tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"reacher-goal-smoke\.json is damaged .*make it again"):
        results.load_result("reacher-goal-smoke", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--agents", "transformer"], "lack mamba"),
        (["--once", "mamba", "transformer"], "mamba's controls are played with every seed"),
        (["--seeds", "0", "4", "--once", "transformr"], "unknown agent 'transformr'"),
        (["--seeds", "0", "4", "--once", "transformer"], "would lose transformer's other seeds; name them too"),
        (["--seeds", "0", "0"], "must be different whole numbers"),
        (["--agents", "mamba", "--seeds", "0", "1"], "would lose transformer, seed 4; name them too"),
    ],
)
def test_results_are_refused_before_any_training(arguments, message, runs, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "publish", None)  # would be called
    monkeypatch.setattr(experiments, "RESULTS", runs)
    there = {"seeds": [0, 4], "weights": {"mamba": 1, "transformer": 1}, "returns": {"test": {"transformer": [[], []]}}}
    results.save_result("reacher-goal-smoke", there, runs)
    assert main(["results", "--profile", "smoke", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ablations", "baselines"])
def test_no_command_replaces_a_result_by_one_of_fewer_seeds(command, runs, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "RESULTS", runs)
    results.save_result(f"{command}-reacher-goal-smoke", {"seeds": [0, 4]}, runs)
    assert main([command, "--profile", "smoke", "--seeds", "0"]) == 2
    assert "would lose seed 4; name them too" in capsys.readouterr().err
