"""Learning histories: what goes in comes out, whole episodes stay whole, and bad files are told from good ones."""

import os
import struct
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import adbook
from adbook import histories as module
from adbook.datasets import data_path
from adbook.generation import record
from adbook.histories import (
    SCHEMA,
    HistoryFileError,
    LearningHistory,
    read_histories,
    save_histories,
)
from adbook.sources import PPOConfig

ARRAYS = [field.name for field in fields(LearningHistory) if field.name != "metadata"]
TINY = PPOConfig(steps=100, n_envs=1, streams=1, n_steps=50, batch_size=50, n_epochs=1)


def make_history(lengths=(3,) * 12, number=0.0, **metadata) -> LearningHistory:
    """A history whose observation is (episode, step, number); the action and the reward repeat episode and step."""
    episode = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(length) for length in lengths])
    observations = np.stack((episode, step, np.full(len(step), number)), 1).astype(np.float32)
    last = step == np.repeat(lengths, lengths) - 1
    return LearningHistory(
        observations=observations,
        actions=observations[:, :2] / 100,
        rewards=(10 * episode + step).astype(np.float32),
        next_observations=observations + np.float32([0, 1, 0]),
        terminated=last & (episode % 2 == 1),
        truncated=last & (episode % 2 == 0),
        metadata={"task": "toy", **metadata},
    )


def assert_equal(one: LearningHistory, two: LearningHistory) -> None:
    for name in ARRAYS:
        left, right = getattr(one, name), getattr(two, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert one.metadata == two.metadata


def test_episodes_and_their_returns():
    history = make_history((3, 1, 2))
    assert history.episodes == (slice(0, 3), slice(3, 4), slice(4, 6))
    assert history.episode_returns.tolist() == [0 + 1 + 2, 10, 20 + 21]
    assert "3 episodes" in repr(history)
    assert "observations (6, 3)" in repr(history)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_every_keeps_whole_episodes_and_each_phase_its_own(k):
    history = make_history((3, 1, 2) * 4)
    seen = []
    for phase in range(k):
        kept = history.every(k, phase)
        numbers = [int(kept.observations[e.start, 0]) for e in kept.episodes]
        assert numbers == list(range(phase, 12, k))
        for number, episode in zip(numbers, kept.episodes, strict=True):
            for name in ARRAYS:
                original = getattr(history, name)[history.episodes[number]]
                np.testing.assert_array_equal(getattr(kept, name)[episode], original)
        seen += numbers
    assert sorted(seen) == list(range(12))


def test_thinning_twice_is_told_in_episodes_of_the_source():
    twice = make_history().every(2, 1).every(3, 1)
    assert (twice.metadata["every"], twice.metadata["phase"]) == (6, 3)
    assert_equal(twice, make_history().every(6, 3))


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 2, "phase": 2}, {"k": 2, "phase": -1}, {"k": 20, "phase": 15}])
def test_thinning_that_makes_no_sense_is_refused(wrong):
    k, phase = wrong["k"], wrong.get("phase", 0)
    with pytest.raises(ValueError, match=rf"every\(k={k}, phase={phase}\)"):
        make_history().every(**wrong)


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "next_observations"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_value_that_is_not_finite_is_refused_and_found(name, value):
    arrays = {n: getattr(make_history(), n).copy() for n in ARRAYS}
    arrays[name][7] = value
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity, first at step 7 of toy"):
        LearningHistory(**arrays, metadata={"task": "toy"})


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"rewards": slice(0, 4)}, "same number of steps.*'rewards': 4"),
        (dict.fromkeys(ARRAYS, slice(0, 0)), "at least one"),
        (dict.fromkeys(ARRAYS, slice(0, 5)), "last episode has not ended"),
    ],
)
def test_fields_that_do_not_fit_are_refused(cut, message):
    arrays = {name: getattr(make_history(), name)[cut.get(name, slice(None))] for name in ARRAYS}
    with pytest.raises(ValueError, match=message):
        LearningHistory(**arrays, metadata={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terminated": np.zeros(36, int)}, r"terminated is int64 .36,.; it must be an array of bool of shape .T,."),
        ({"rewards": np.zeros((36, 1))}, r"rewards is float64 .36, 1.; it must be an array of floats of shape .T,."),
        ({"actions": [[0.0]] * 36}, r"actions is list; it must be an array of floats of shape .T, size."),
        ({"next_observations": np.zeros((36, 2))}, r"observations .36, 3. and next_observations .36, 2. differ"),
        ({"metadata": None}, "metadata=None must be a dictionary"),
    ],
)
def test_fields_of_another_type_are_refused(change, message):
    fields = {name: getattr(make_history(), name) for name in ARRAYS} | {"metadata": {}}
    with pytest.raises(ValueError, match=message):
        LearningHistory(**fields | change)


def test_what_is_saved_is_loaded(tmp_path):
    """Also episodes of one step, several histories in a file, and metadata that holds more than ASCII."""
    given = [make_history((2, 1, 3, 1)), make_history(number=1.5, source="PPO", config={"γ": 0.98, "hidden": [64]})]
    path = save_histories(tmp_path / "new" / "two.safetensors", given)
    loaded = read_histories(path)
    assert len(loaded) == 2
    for one, two in zip(given, loaded, strict=True):
        assert_equal(one, two)
    assert [p.name for p in path.parent.iterdir()] == ["two.safetensors"]
    single = given[0].save(tmp_path / "one.safetensors")
    assert_equal(LearningHistory.load(single), given[0])
    with pytest.raises(HistoryFileError, match=r"holds 2 histories; read it with adbook.read_histories"):
        LearningHistory.load(path)


def test_a_file_stores_next_observations_only_at_the_ends(tmp_path):
    history = make_history((50,) * 4)
    path = history.save(tmp_path / "h.safetensors")
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    per_step = 4 * (3 + 2 + 1) + 2  # observation, action, reward in float32; two flags
    assert len(data) - header == 200 * per_step + 4 * (4 * 3)


def test_a_history_in_another_order_is_not_stored(tmp_path):
    history = make_history()
    history.next_observations[1] += 1
    with pytest.raises(ValueError, match="do not continue observations"):
        history.save(tmp_path / "h.safetensors")
    with pytest.raises(ValueError, match="nothing to save"):
        save_histories(tmp_path / "h.safetensors", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_refused_by_name_and_left_alone(tmp_path, kept):
    path = make_history().save(tmp_path / "cut.safetensors")
    damaged = path.read_bytes()[:kept]
    path.write_bytes(damaged)
    with pytest.raises(HistoryFileError, match=r"cut\.safetensors is truncated.*delete it and record it again"):
        read_histories(path)
    assert path.read_bytes() == damaged


def test_foreign_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"A_log": np.zeros(3, np.float32)}, path)
    with pytest.raises(HistoryFileError, match=r"weights\.safetensors is not a file of learning histories"):
        read_histories(path)
    path.write_text("episode,return\n1,-12.0\n" * 10)
    with pytest.raises(HistoryFileError, match=r"weights\.safetensors is truncated, damaged or not a history file"):
        read_histories(path)
    with pytest.raises(HistoryFileError, match=r"ppo-test\.npz is not a recording.*adbook\.load_histories"):
        read_histories(data_path("ant-dir", "ppo", "test"))
    with pytest.raises(FileNotFoundError, match=r"nowhere.*record them with"):
        read_histories(tmp_path / "nowhere")


def rewrite(path, arrays=None, **header) -> None:
    """Write a file again with other arrays or another header."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() | header
    save_file({**load_file(path), **(arrays or {})}, path, metadata=metadata)


def test_another_schema_names_both_versions(tmp_path):
    path = make_history().save(tmp_path / "old.safetensors")
    rewrite(path, schema="99")
    message = rf"old\.safetensors has schema version 99, this version reads {SCHEMA}; record"
    with pytest.raises(HistoryFileError, match=message):
        read_histories(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"json": "[{"},
        {"json": '[{"task": "toy"}, {"task": "two"}]'},
        {"json": "[null]"},
        {"json": "[]"},
        {"arrays": {"0/last_observations": np.zeros((1, 3), np.float32)}},
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(damage, tmp_path):
    path = make_history().save(tmp_path / "h.safetensors")
    rewrite(path, **damage)
    with pytest.raises(
        HistoryFileError, match=r"h\.safetensors (is truncated, damaged or|holds no history).*delete it"
    ):
        read_histories(path)


def test_nan_in_a_file_is_refused(tmp_path):
    path = make_history().save(tmp_path / "h.safetensors")
    rewards = load_file(path)["0/rewards"]
    rewards[4] = np.nan
    rewrite(path, {"0/rewards": rewards})
    with pytest.raises(ValueError, match="rewards holds NaN or infinity, first at step 4 of toy"):
        read_histories(path)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_a_trouble_of_the_machine_is_not_blamed_on_the_file(tmp_path, monkeypatch, error):
    """Else its message would say to delete a good file."""
    path = make_history().save(tmp_path / "h.safetensors")

    def troubled(*_, **__):
        raise error

    monkeypatch.setattr(module, "safe_open", troubled)
    with pytest.raises(type(error)):
        read_histories(path)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """So that a power cut cannot leave the name with nothing behind it."""
    path, synced = tmp_path / "h.safetensors", []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.fstat(number).st_size, path.exists())))
    make_history().save(path)
    assert synced == [(path.stat().st_size, False)]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = make_history().save(tmp_path / "h.safetensors")
    before = path.read_bytes()

    def interrupted(path, data):
        with path.open("wb") as file:
            file.write(data[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    for name in ("h.safetensors", "new.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            make_history(number=2.0).save(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["h.safetensors"]
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """One real history, on disk."""
    threads = torch.get_num_threads()
    family = adbook.family("reacher-goal")
    folder = tmp_path_factory.mktemp("histories")
    (path,) = record(family, family.test_tasks[:1], TINY, folder=folder, n_jobs=1, progress=False)
    torch.set_num_threads(threads)
    return path


def test_a_real_history_survives_the_disk(recorded, tmp_path):
    history = LearningHistory.load(recorded)
    assert history.observations.shape == (100, 8)
    assert len(history.episodes) == 2
    assert_equal(LearningHistory.load(history.save(tmp_path / "again.safetensors")), history)


def test_minari_reads_the_export(recorded, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    history = LearningHistory.load(recorded)
    for name in ("../../elsewhere/ppo-v0", "no version", None):
        with pytest.raises(ValueError, match="must be a name with a version"):
            history.to_minari(name)
    with pytest.raises(ValueError, match="metadata lack family_split, seed, source"):
        make_history().to_minari("reacher-goal/ppo-v0")
    assert list(tmp_path.iterdir()) == []
    history.to_minari("reacher-goal/ppo-v0")
    dataset = minari.load_dataset("reacher-goal/ppo-v0")
    assert dataset.total_steps == 100
    for episode, steps in zip(dataset.iterate_episodes(), history.episodes, strict=True):
        np.testing.assert_array_equal(episode.observations[:-1], history.observations[steps])
        np.testing.assert_array_equal(episode.observations[-1], history.next_observations[steps][-1])
        np.testing.assert_array_equal(episode.actions, history.actions[steps])
        np.testing.assert_array_equal(np.float32(episode.rewards), history.rewards[steps])
        np.testing.assert_array_equal(episode.truncations, history.truncated[steps])
    env = dataset.recover_environment()
    assert tuple(env.unwrapped.goal) == adbook.family("reacher-goal").test_tasks[0].goal
    taken = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=taken - 1))
    with pytest.raises(OSError, match=r"lacks space for \d+ kB; free some"):  # HDF5 would take the process down
        history.to_minari("reacher-goal/again-v0")
    assert [folder.name for folder in (tmp_path / "reacher-goal").iterdir() if folder.is_dir()] == ["ppo-v0"]
