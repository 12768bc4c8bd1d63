# ruff: noqa: D102 - a stand-in for an oracle, whose methods are known
"""The data set: what is kept of a history, what half precision costs, and files that are not what they should be."""

import io
import json
import re
import zipfile
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_histories import ARRAYS, make_history

import adbook
from adbook import source_scores
from adbook.__main__ import main
from adbook.datasets import BEST, HISTORIES, SPLITS, data_path, load_histories, read_packed, thinned, write_packed
from adbook.histories import HistoryFileError, LearningHistory
from adbook.recipes import RECIPES, Recipe, follow, oracle_config, recipe
from adbook.sources import PPOConfig, source_name
from adbook.tasks import FAMILIES


def noisy(lengths=(3, 1, 2, 4), seed=0) -> LearningHistory:
    """A history of random numbers that chains as a real one does."""
    toy, rng = make_history(lengths), np.random.default_rng(seed)
    fields = {name: getattr(toy, name) for name in ARRAYS}
    ends = toy.terminated | toy.truncated
    for name in ("observations", "actions", "rewards"):
        fields[name] = rng.normal(0, 3, fields[name].shape).astype(np.float32)
    fields["next_observations"] = np.roll(fields["observations"], -1, 0)
    fields["next_observations"][ends] = rng.normal(0, 3, (len(lengths), 3)).astype(np.float32)
    return LearningHistory(**fields, metadata={"task": "toy", "seed": seed, "config": {"γ": 0.98}})


def test_what_is_packed_comes_back_in_half_precision(tmp_path):
    given = [noisy(), noisy((1, 1), seed=1), noisy((5,) * 7, seed=2)]
    path = write_packed(tmp_path / "new" / "three.npz", given, {"date": "today"})
    loaded = read_packed(path)
    assert len(loaded) == 3
    for one, two in zip(given, loaded, strict=True):
        assert two.metadata == one.metadata
        assert two.episodes == one.episodes
        for name in ARRAYS:
            expected = getattr(one, name)
            if expected.dtype == np.float32:
                np.testing.assert_array_equal(getattr(two, name), expected.astype(np.float16).astype(np.float32))
            else:
                np.testing.assert_array_equal(getattr(two, name), expected)
            assert getattr(two, name).dtype == expected.dtype
    assert [p.name for p in path.parent.iterdir()] == ["three.npz"]


def test_numpy_alone_opens_a_file(tmp_path):
    path = write_packed(tmp_path / "h.npz", [noisy()], {"commit": "abc"})
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(file["json"].tobytes())
        planes = file["rewards"]  # (bytes of a number, columns, steps)
    assert about["made"] == {"commit": "abc"}
    rewards = np.ascontiguousarray(planes[:, 0].T).view("<f2")[:, 0]
    np.testing.assert_array_equal(rewards, noisy().rewards.astype(np.float16))


def test_a_file_is_smaller_than_half_precision_alone(tmp_path):
    """Walks, as joints make them, compress; their bytes lie side by side for it."""
    rng = np.random.default_rng(0)
    history = noisy((50,) * 40)
    walk = np.sin(rng.normal(0, 0.1, history.observations.shape).cumsum(0)).astype(np.float32)
    following = np.roll(walk, -1, 0)
    fields = {name: getattr(history, name) for name in ARRAYS} | {"observations": walk, "next_observations": following}
    size = write_packed(tmp_path / "h.npz", [LearningHistory(**fields, metadata={})]).stat().st_size
    assert size < 0.95 * 2 * 2000 * (3 + 2 + 1)


@pytest.mark.parametrize(("total", "wanted", "every"), [(12, 12, 1), (12, 5, 3), (12, 1, 12), (12, 50, 1)])
def test_thinning_keeps_the_first_and_spans_the_run(total, wanted, every):
    history = make_history((3,) * total)
    kept = thinned(history, wanted)
    assert kept.metadata["every"] == every
    assert kept.observations[0, 0] == 0
    assert len(kept.episodes) <= max(wanted, 1)
    assert kept.metadata["source_returns"] == history.episode_returns.tolist()
    assert kept.metadata["source_lengths"] == [3] * total
    assert "source_returns" not in history.metadata


def test_streams_can_be_thinned_with_phases_of_their_own():
    kept = thinned(make_history(), 4, phase=0.5)
    assert kept.observations[[e.start for e in kept.episodes], 0].tolist() == [1, 4, 7, 10]


def test_values_too_large_for_half_precision_are_refused(tmp_path):
    history = noisy()
    history.rewards[2] = 1e5
    with pytest.raises(ValueError, match="rewards reach 100000, too large for half precision"):
        write_packed(tmp_path / "h.npz", [history])
    with pytest.raises(ValueError, match="nothing to write"):
        write_packed(tmp_path / "h.npz", [])
    for many in ((2**16,), (1,) * 2**16):
        with pytest.raises(ValueError, match=r"65536 steps in an episode, or episodes in a history, are too many"):
            write_packed(tmp_path / "h.npz", [noisy(many)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [{"lengths": [3, 1, 2]}, {"lengths": [3, 1, 2, 5]}, {"episodes": [3]}, {"lengths": []}, {"rewards": []}]
)
def test_a_file_whose_counts_do_not_add_up_is_refused_by_name(tmp_path, change):
    path = write_packed(tmp_path / "h.npz", [noisy()])
    with np.load(path) as file:
        arrays = dict(file) | {name: np.array(values, np.uint16) for name, values in change.items()}
    np.savez(path, **arrays)
    with pytest.raises(HistoryFileError, match=r"h\.npz is truncated, damaged or not a file of learning histories"):
        read_packed(path)


@pytest.mark.parametrize("kept", [0, 7, 300, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, kept):
    path = write_packed(tmp_path / "cut.npz", [noisy()])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(HistoryFileError, match=r"cut\.npz is truncated, damaged or not a file of learning histories"):
        read_packed(path)


def test_a_flipped_byte_is_noticed(tmp_path):
    """The zip's checksums see it, wherever in the arrays it is."""
    path = write_packed(tmp_path / "h.npz", [noisy((50,) * 8)])
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        entry = opened.getinfo("observations.npy")
    data[entry.header_offset + 30 + len("observations.npy") + entry.compress_size // 2] ^= 0x10
    path.write_bytes(bytes(data))
    with pytest.raises(HistoryFileError, match="truncated, damaged"):
        read_packed(path)


def test_foreign_files_and_other_schemas_are_refused(tmp_path):
    path = tmp_path / "f.npz"
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(HistoryFileError, match=r"f\.npz is truncated, damaged or not a file of learning histories"):
        read_packed(path)
    write_packed(path, [noisy()])
    with np.load(path) as file:
        arrays = dict(file)
    for changes, message in (({"schema": 99}, "schema version 99, this version reads 1"), ({"kind": "x"}, "holds 'x'")):
        about = json.loads(arrays["json"].tobytes()) | changes
        np.savez(path, **arrays | {"json": np.frombuffer(json.dumps(about).encode(), np.uint8)})
        with pytest.raises(HistoryFileError, match=message):
            read_packed(path)


def test_no_pickle_is_loaded(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, json=np.array([{"a": 1}], dtype=object))
    with pytest.raises(HistoryFileError, match="truncated, damaged"):
        read_packed(path)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"family": "ant-dri"}, "unknown task family 'ant-dri' .did you mean 'ant-dir'"),
        ({"family": "ant-dir", "source": "sacc"}, "unknown source 'sacc' .did you mean 'sac'.*ppo, sac, droq"),
        ({"family": "ant-dir", "split": "ood"}, "unknown split 'ood'; choose one of train, test"),
    ],
)
def test_unknown_requests_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        load_histories(**request_)


def test_a_file_under_another_name_is_not_believed(tmp_path):
    path = data_path("ant-dir", "sac", "train", tmp_path)
    path.parent.mkdir()
    path.write_bytes(data_path("reacher-goal", "droq", "test").read_bytes())
    with pytest.raises(HistoryFileError, match=r"sac-train\.npz holds histories of reacher-goal droq test; fetch"):
        load_histories("ant-dir", source="sac", folder=tmp_path)


def test_what_is_not_there_is_told_with_what_is(tmp_path):
    write_packed(data_path("ant-dir", "ppo", "train", tmp_path), [noisy()])
    with pytest.raises(FileNotFoundError, match=r"sac on ant-dir .train.*there are: ppo-train\. .*adbook\.record"):
        load_histories("ant-dir", source="sac", folder=tmp_path)


def test_every_family_has_recipes_that_fit_it():
    assert set(RECIPES) == set(BEST) == set(FAMILIES)
    for name, recipes in RECIPES.items():
        kind = adbook.family(name)
        assert BEST[name] in recipes
        assert oracle_config(name).normalize
        for source, chosen in recipes.items():
            assert source_name(chosen.config).lower() == source
            assert chosen.streams <= chosen.config.streams
            assert chosen.train <= len(kind.train_tasks)
            assert chosen.test <= len(kind.test_tasks)
            assert chosen.config.steps_each // kind.horizon >= 20
            assert recipe(name, source.upper()) is chosen
    with pytest.raises(ValueError, match=r"unknown source for ant-dir 'sax'.*choose one of"):
        recipe("ant-dir", "sax")


@pytest.fixture
def small(monkeypatch, threads):
    """A recipe that is followed in seconds, and no other."""
    tiny = PPOConfig(steps=800, n_envs=2, streams=2, n_steps=50, batch_size=50, n_epochs=1)
    chosen = Recipe(tiny, train=2, test=1, streams=2, episodes=3)
    for name in FAMILIES:
        monkeypatch.setitem(RECIPES, name, {"ppo": chosen} if name == "reacher-goal" else {})
    return chosen


def test_following_a_recipe_records_and_packs(tmp_path, small):
    where = {"folder": tmp_path / "runs", "into": tmp_path / "set", "n_jobs": 1}
    assert follow("reacher-goal", tasks=1, **where) is None
    assert not (tmp_path / "set").exists()
    for split in SPLITS:
        follow("reacher-goal", None, split, made={"commit": "abc"}, **where)
    histories = adbook.load_histories("reacher-goal", folder=tmp_path / "set")
    assert [(h.metadata["task"]["index"], h.metadata["stream"]) for h in histories] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [len(h.episodes) for h in histories] == [3, 3, 3, 3]  # one in three of eight, from episodes 0 and 1 on
    assert all(len(h.metadata["source_returns"]) == 8 for h in histories)
    tested = adbook.load_histories("reacher-goal", source="PPO", split="test", folder=tmp_path / "set")
    assert follow("reacher-goal", "PPO", "test", **where) == data_path("reacher-goal", "ppo", "test", tmp_path / "set")
    assert {h.metadata["task"]["split"] for h in tested} == {"test"}
    with pytest.raises(ValueError, match=r"tasks=3 must be from 1 to 2, this recipe.s tasks of the split .train"):
        follow("reacher-goal", tasks=3, **where)
    with pytest.raises(ValueError, match="unknown split 'ood'"):
        follow("reacher-goal", split="ood", **where)


def test_the_command_refuses_before_any_run_what_it_cannot_do(small, monkeypatch, capsys):
    monkeypatch.setattr("adbook.recipes.follow", None)
    ask = ["histories", "--family", "reacher-goal", "--source", "PPO"]
    for wrong, told in (
        (["--split", "train", "tets"], "'tets' .did you mean 'test'"),
        (["--tasks", "2"], "from 1 to 1, .*split 'test'"),
    ):
        assert main([*ask, *wrong]) == 2
        assert re.search(told, capsys.readouterr().err)


def test_curves_of_runs_whose_episodes_end_early_share_their_steps():
    """Two environments, 12 steps of each: episodes of 2, 2, 8 steps, and one of 12."""
    about = {"config": {"steps": 24, "n_envs": 2}}
    one = replace(noisy(), metadata=about | {"source_returns": [1.0, 3.0, 5.0], "source_lengths": [2, 2, 8]})
    two = replace(noisy(), metadata=about | {"source_returns": [7.0], "source_lengths": [12]})
    steps, curves = source_scores.source_curves([one, two], points=6)
    assert steps.tolist() == [4, 8, 12, 16, 20, 24]
    assert curves.tolist() == [[1, 3, 3, 3, 3, 5], [7] * 6]
    assert source_scores.source_curves([one], points=3)[1].tolist() == [
        [2, 3, 5]
    ]  # 8, 16, 24: the mean of two, the one before, the last


def test_without_histories_there_is_nothing_to_score(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no histories in .*python -m adbook histories"):
        source_scores.source_scores(folder=tmp_path)


def test_a_card_without_its_marks_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing\n")
    with pytest.raises(ValueError, match="has lost the marks of its table"):
        source_scores.update_card({"families": {}}, tmp_path)


class Reach(torch.nn.Module):
    """An oracle by hand: pulls the fingertip towards the goal with the transposed Jacobian, and damps."""

    family = "reacher-goal"

    def show(self, tasks):
        self.goals = torch.tensor([task.goal for task in tasks])
        return self

    def init_state(self, n):
        pass

    def act(self, observation, reward, start, state, **_):
        tip, elbow = observation[:, 6:8], 0.1 * observation[:, [0, 2]]
        arms, pull = torch.stack((tip, tip - elbow), 1), (self.goals - tip)[:, None]  # (n, joints, 2), (n, 1, 2)
        torque = arms[..., 0] * pull[..., 1] - arms[..., 1] * pull[..., 0]
        return (50 * torque - 0.1 * observation[:, 4:6]).clamp(-1, 1), None


def test_sources_are_scored_between_random_actions_and_the_oracle(tmp_path, small, monkeypatch):
    monkeypatch.setattr(source_scores.Oracle, "load", lambda name: Reach())
    (tmp_path / "README.md").write_text("before\n" + "\n".join(source_scores._CARD_MARKS) + "\nafter\n")
    where = {"folder": tmp_path / "runs", "into": tmp_path, "n_jobs": 1}
    for split in SPLITS:
        follow("reacher-goal", None, split, **where)
    scores = source_scores.source_scores(episodes=4, folder=tmp_path)["families"]["reacher-goal"]
    train = scores["sources"]["ppo"]["train"]
    histories = load_histories("reacher-goal", folder=tmp_path)
    runs = source_scores.source_returns(histories)
    for one, two in zip(runs, source_scores.source_returns(histories[::-1]), strict=True):  # tasks, in whatever order
        assert sorted(map(tuple, one)) == sorted(map(tuple, two))
    assert [[len(stream) for stream in streams] for streams in runs] == [[8, 8]] * 2  # tasks, streams, episodes
    expected = [
        np.mean([stream[-1] for stream in streams]) for streams in runs
    ]  # the last tenth of eight episodes is one
    np.testing.assert_allclose(train["end"], expected)
    bounds = scores["random"]["train"], scores["oracle"]["train"]
    np.testing.assert_allclose(train["score"], (expected - bounds[0]) / (bounds[1] - bounds[0]), rtol=1e-5)
    assert (bounds[1] > bounds[0]).all()
    for _ in range(2):  # what stands between the marks is replaced
        source_scores.update_card({"families": {"reacher-goal": scores}}, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("before\n")
    assert card.endswith("\nafter\n")
    assert card.count("| reacher-goal | ppo | train | 2 | 4 | 12 |") == 1


FILES = sorted(HISTORIES.glob("*/*.npz"))


def test_the_data_set_has_what_its_recipes_say_and_nothing_else():
    assert set(FILES) == {data_path(f, source, split) for f in RECIPES for source in RECIPES[f] for split in SPLITS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_committed_file_is_what_its_recipe_says(path):
    name, (source, split) = path.parent.name, path.stem.split("-")
    chosen, kind = recipe(name, source), adbook.family(name)
    histories = load_histories(name, source=source, split=split)
    tasks = getattr(kind, f"{split}_tasks")[: getattr(chosen, split)]
    assert len(histories) == len(tasks) * chosen.streams
    for i, history in enumerate(histories):
        about = history.metadata
        assert about["task"] == asdict(tasks[i // chosen.streams]) | {"goal": list(tasks[i // chosen.streams].goal)}
        defaults = json.loads(json.dumps(asdict(type(chosen.config)())))  # of settings that came later than the file
        assert defaults | about["config"] == json.loads(json.dumps(asdict(chosen.config)))
        assert history.observations.shape[1:] == (kind.observation_size,)
        assert np.abs(history.actions).max() <= kind.action_scale
        lengths = np.array([e.stop - e.start for e in history.episodes])
        assert (lengths <= kind.horizon).all()
        assert (lengths[history.truncated[history.terminated | history.truncated]] == kind.horizon).all()
        kept = np.arange(about["phase"], len(about["source_returns"]), about["every"])
        assert len(kept) == len(history.episodes) <= chosen.episodes
        # each reward is rounded to 11 bits, each return in the metadata to 2 decimals
        rounding = 2**-11 * np.array([np.abs(history.rewards[e]).sum() for e in history.episodes]) + 0.0051
        assert (np.abs(history.episode_returns - np.array(about["source_returns"])[kept]) <= rounding).all()
    improved = [
        np.mean(h.metadata["source_returns"][-9:]) > np.mean(h.metadata["source_returns"][:9]) for h in histories
    ]
    assert np.mean(improved) > 0.95


def test_a_stored_reward_is_near_what_its_stored_step_gives():
    """The card has this number."""
    for history in adbook.load_histories("reacher-goal"):
        away = np.linalg.norm(history.next_observations[:, 6:8] - history.metadata["task"]["goal"], axis=1)
        np.testing.assert_allclose(history.rewards, -away - 0.1 * (history.actions**2).sum(1), rtol=0, atol=0.0004)


CARD = (HISTORIES / "README.md").read_text()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_card_tells_the_sizes_of_a_family(name):
    kind = adbook.family(name)
    sizes = kind.horizon, kind.observation_size, kind.action_size, f"{kind.action_scale:g}"
    assert f"| {name} | {' | '.join(map(str, sizes))} |" in CARD


def test_the_code_of_the_card_runs():
    """All of it, but with one update."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", CARD, re.DOTALL))
    assert code.count("TrainingConfig()") == 1
    exec(code.replace("TrainingConfig()", "TrainingConfig(updates=1, warmup=0, batch_size=2)"), {})


def test_the_data_set_is_small_enough_for_a_clone():
    for name in FAMILIES:
        assert sum(path.stat().st_size for path in (HISTORIES / name).glob("*")) <= 16e6


def test_minari_reads_a_committed_history(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    history = adbook.load_histories("reacher-goal")[3]
    history.to_minari("reacher-goal/ppo-v0")
    dataset = minari.load_dataset("reacher-goal/ppo-v0")
    kept = f"stream 3, every {history.metadata['every']}, phase {history.metadata['phase']}"
    assert dataset.storage.metadata["description"].endswith(f"reacher-goal/train-000, seed 0, {kept}.")
    returns = [episode.rewards.sum() for episode in dataset.iterate_episodes()]
    np.testing.assert_allclose(returns, history.episode_returns, rtol=1e-6)
