"""What the exhibit is made of, in headless Chromium: its network against PyTorch, its robots against MuJoCo."""

import json

import numpy as np
import pytest
import torch
from player_cases import policy

import adbook
from adbook import exhibit, experiments
from adbook.checkpoints import CHECKPOINTS
from adbook.export import export
from adbook.files import write_whole
from adbook.mamba import MambaConfig

# An exported policy of the site and its robot; `play` gives mean returns by episode of some goals.
_PLAYED = """
  const { Policy } = await import("./network.js");
  const { Session } = await import("./session.js");
  const get = async (name, read) => (await fetch(`${family}/${name}`))[read]();
  const header = await get("policy.json", "json");
  const policy = new Policy(header, await get("weights.bin", "arrayBuffer"));
  const environment = family === "reacher-goal"
    ? new (await import("./reacher.js")).Reacher()
    : await (await import("./mujoco.js")).robot(family, await get("robot.xml", "text"));
  const play = (goals, episodes, before = () => {}) => {
    const all = goals.map((goal, i) => {
      const session = new Session(policy, environment, goal, i);
      for (let k = 0; k < episodes; k++) {
        before(session, k, goals[(i + 1) % goals.length]);
        while (!session.step());
      }
      return session.episodes.map(({ total }) => total);
    });
    return all[0].map((_, k) => all.reduce((sum, one) => sum + one[k], 0) / goals.length);
  };
"""


@pytest.fixture(scope="module")
def reacher():
    return adbook.family("reacher-goal")


def test_without_npm_the_arm_alone_is_staged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("PATH", str(tmp_path))
    exhibit.stage(tmp_path / "live")
    assert "apt-get install npm" in capsys.readouterr().out
    assert (tmp_path / "live" / "reacher-goal" / "weights.bin").is_file()
    assert not (tmp_path / "live" / "mujoco").exists()


def test_another_mujoco_than_the_one_that_was_tested_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(exhibit, "_packed", lambda folder: write_whole(folder / "a.tgz", lambda file: file.touch()))
    with pytest.raises(ValueError, match="has the check sum e3b0c442"):
        exhibit.stage(tmp_path / "live")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.fixture
def modules(browser, exhibit_site):
    """Runs JavaScript that may import the exhibit's modules."""
    page = browser.new_page()
    page.goto(f"{exhibit_site}/modules.html")
    yield lambda script, given=None: page.evaluate(script, given)
    page.close()


def _actions(modules, header, weights, steps):
    """What the page's network does in these steps, without sampling."""
    return modules(
        """async ([header, weights, steps]) => {
          const { Policy } = await import("./network.js");
          const policy = new Policy(header, new Uint8Array(weights).buffer);
          const state = policy.initState();
          return steps.map(([o, r, start]) => policy.act(o, r, start, state, null));
        }""",
        [header, list(weights), steps],
    )


def _exported(network, folder, family):
    written = export(network, folder, family, bits=32)
    return json.loads((written / "policy.json").read_text()), (written / "weights.bin").read_bytes()


def _step(network, state, seen, reward, start):
    """One step of the Python policy, and the same as the page is given it."""
    seen, fed = torch.tensor(seen, dtype=torch.float32), None if reward is None else torch.tensor([reward])
    with torch.inference_mode():
        action, state = network.act(seen[None], fed, torch.tensor([start]), state, deterministic=True)
    return action[0], state, [seen.tolist(), None if fed is None else fed.item(), start]


def test_the_network_is_pytorchs_over_a_thousand_steps(modules, reacher, tmp_path):
    trained = adbook.ADPolicy.from_pretrained(CHECKPOINTS / "reacher-goal-mamba")
    env = reacher.make(reacher.sample_tasks(1, np.random.default_rng(0))[0])
    state, reward, steps, actions = trained.init_state(1), 0.0, [], []
    for t in range(1000):
        if t % 50 == 0:
            observation, _ = env.reset(seed=t)
        fed = None if t in range(300, 350) else reward  # an episode with the reward withheld
        action, state, given = _step(trained, state, observation, fed, t % 50 == 0)
        steps.append(given)
        actions.append(action.tolist())
        observation, reward, *_ = env.step(action.numpy())
    env.close()
    assert np.ptp(actions, axis=0).min() > 1  # it moves
    # 4 layers in 32 bits, of sums over at most 128 products in another order; the state forgets rounding as all else
    theirs = _actions(modules, *_exported(trained, tmp_path, reacher), steps)
    np.testing.assert_allclose(theirs, actions, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{"head": "mse"}, {"embedding": 7}])
def test_every_shape_and_head_is_pytorchs(modules, reacher, tmp_path, changes):
    small = policy(MambaConfig(d_model=16, n_layers=1, d_state=8, d_conv=3, expand=3, dt_rank=5), **changes)
    small.set_statistics(torch.randn(50, 8), torch.randn(50))
    with torch.no_grad():
        small.head.weight.mul_(30)  # actions that differ
    generator, state, steps, actions = np.random.default_rng(1), small.init_state(1), [], []
    for t in range(20):
        action, state, given = _step(small, state, generator.normal(size=8), generator.normal(), t % 5 == 0)
        steps.append(given)
        actions.append(action.tolist())
    assert np.ptp(actions, axis=0).min() > 0.1
    theirs = _actions(modules, *_exported(small, tmp_path, reacher), steps)
    np.testing.assert_allclose(theirs, actions, rtol=0, atol=1e-5)


def test_the_arm_is_mujocos_at_both_limits_too(modules, reacher):
    generator, cases, elbows = np.random.default_rng(2), [], []
    forces = [generator.uniform(-1, 1, (50, 2)), np.tile([0.1, 1.3], (50, 1)), np.tile([-0.1, -1.0], (50, 1))]
    for i, actions in enumerate(forces):
        env = reacher.make(reacher.test_tasks[i]).unwrapped
        first, _ = env.reset(seed=i)
        start = {"q": env.data.qpos[:2].tolist(), "v": env.data.qvel[:2].tolist(), "tip": first[6:].tolist()}
        results = [env.step(np.clip(action, -1, 1))[:2] for action in actions]
        elbows.append(env.data.qpos[1])
        cases.append((start | {"goal": env.goal.tolist(), "actions": actions.tolist()}, results))
    assert elbows[2] < -3
    assert elbows[1] > 3
    theirs = modules(
        """async (cases) => {
          const { Reacher } = await import("./reacher.js");
          return cases.map(({ goal, actions, ...start }) => {
            const arm = Object.assign(new Reacher(), { goal, ...start });
            return actions.map((action) => Object.values(arm.step(action)));
          });
        }""",
        [case for case, _ in cases],
    )
    for played, (_, results) in zip(theirs, cases, strict=True):
        for (observation, reward), (expected, paid) in zip(played, results, strict=True):
            np.testing.assert_allclose(observation, expected, rtol=0, atol=1e-9)
            assert reward == pytest.approx(paid, abs=1e-9)


@pytest.mark.parametrize(("name", "steps"), [("half-cheetah-vel", 20), ("pusher-goal", 100)])
def test_the_robots_are_mujocos(modules, name, steps):
    family, generator, cases = adbook.family(name), np.random.default_rng(5), []
    for i in range(3):
        env = family.make(family.test_tasks[i]).unwrapped
        first, _ = env.reset(seed=i)
        state = {"qpos": env.data.qpos.tolist(), "qvel": env.data.qvel.tolist(), "goal": env.goal.tolist()}
        actions = 1.2 * generator.uniform(-family.action_scale, family.action_scale, (steps, family.action_size))
        results = [env.step(np.clip(action, -family.action_scale, family.action_scale))[:2] for action in actions]
        cases.append((state | {"actions": actions.tolist()}, first, results))
    theirs = modules(
        """async ([family, cases]) => {
          const { robot } = await import("./mujoco.js");
          const made = await robot(family, await (await fetch(`${family}/robot.xml`)).text());
          return cases.map(({ qpos, qvel, goal, actions }) => {
            made.goal = goal;
            return [made.set(qpos, qvel), actions.map((action) => Object.values(made.step(action)))];
          });
        }""",
        [name, [case for case, _, _ in cases]],
    )
    for (start, played), (_, first, results) in zip(theirs, cases, strict=True):
        np.testing.assert_allclose(start, first, rtol=0, atol=1e-12)
        for (observation, reward), (expected, paid) in zip(played, results, strict=True):
            # Another compiler's rounding, which contacts amplify: the cheetah's is tenfold every four steps or so.
            np.testing.assert_allclose(observation, expected, rtol=0, atol=1e-7)
            assert reward == pytest.approx(paid, abs=1e-7)


@pytest.mark.parametrize("name", ["reacher-goal", "pusher-goal", "half-cheetah-vel"])
def test_a_goal_moved_before_an_episodes_first_step_is_the_one_that_pays(modules, name):
    here, there = [task.goal for task in adbook.family(name).test_tasks[:2]]
    moved, fresh = modules(
        f"""async ([family, here, there]) => {{{_PLAYED}
          const moved = new Session(policy, environment, here, 0);
          moved.moveGoal(there);
          const first = Array.from({{ length: 5 }}, () => moved.step() || moved.reward);
          const fresh = new Session(policy, environment, here, 0); // as many numbers drawn
          fresh.goal = there;
          fresh.begin();
          return [first, Array.from({{ length: 5 }}, () => fresh.step() || fresh.reward)];
        }}""",
        [name, here, there],
    )
    assert moved == fresh


def test_random_numbers_are_those_of_their_names_and_of_their_seed(modules):
    draws = """async ([kind, seed]) => {
      const { normal, uniform } = await import("./random.js");
      const draw = kind === "normal" ? normal(uniform(seed)) : uniform(seed);
      return Array.from({ length: 20000 }, draw);
    }"""
    uniform, normal = (np.array(modules(draws, [kind, 7])) for kind in ("uniform", "normal"))
    error = 4 / np.sqrt(len(uniform))  # four standard errors of a mean with spread 1
    assert 0 <= uniform.min() < uniform.max() < 1
    for power, expected in ((1, 1 / 2), (2, 1 / 3), (3, 1 / 4)):
        assert np.mean(uniform**power) == pytest.approx(expected, abs=error)
    for power, expected, spread in ((1, 0, 1), (2, 1, 2**0.5), (4, 3, 96**0.5)):
        assert np.mean(normal**power) == pytest.approx(expected, abs=error * spread)
    assert abs(np.corrcoef(normal[1:], normal[:-1])[0, 1]) < error
    assert modules(draws, ["uniform", 7]) == uniform.tolist() != modules(draws, ["uniform", 8])


# What the sentences say


def test_on_reacher_goal_the_sentences_hold(modules, reacher):
    goals = [task.goal for task in reacher.sample_tasks(20, np.random.default_rng(4))]
    kept, withheld, later, moved, forgot, mean, mean_later = modules(
        f"""async ([family, goals]) => {{{_PLAYED}
          const some = goals.slice(10);
          return [
            play(some, 10),
            play(some, 10, (s) => {{ s.withheld = true; }}),
            play(some, 10, (s, k) => {{ s.withheld = k >= 5; }}),
            play(goals, 10, (s, k, other) => {{ if (k === 5) s.moveGoal(other); }}),
            play(goals, 10, (s, k, other) => {{ if (k === 5) {{ s.moveGoal(other); s.forget(); }} }}),
            play(some, 10, (s) => {{ s.deterministic = true; }}),
            play(some, 10, (s, k) => {{ s.deterministic = k >= 5; }}),
          ];
        }}""",
        ["reacher-goal", goals],
    )
    assert kept[9] > kept[0] + 5  # the returns rise
    assert withheld[9] < kept[9] - 3  # stay low
    assert later[9] < kept[9] - 2  # what it knew fades
    assert moved[5] < moved[4] - 3  # it keeps to what was paid before
    assert forgot[9] > moved[9] + 1  # and comes over slowly
    assert mean[1] > kept[1] + 1  # a fair place sooner
    assert mean[9] < kept[9] - 0.3  # and stays there
    assert mean_later[5] > kept[5]  # exploring only costs


def test_on_half_cheetah_vel_the_sentences_hold(modules):
    goals = [task.goal for task in adbook.family("half-cheetah-vel").sample_tasks(5, np.random.default_rng(4))]
    kept, withheld, mean = modules(
        f"""async ([family, goals]) => {{{_PLAYED}
          return [
            play(goals, 8, (s, k) => {{ s.withheld = k >= 6; }}),
            play(goals, 6, (s) => {{ s.withheld = true; }}),
            play(goals, 3, (s) => {{ s.deterministic = true; }}),
          ];
        }}""",
        ["half-cheetah-vel", goals],
    )
    assert kept[5] > kept[0] + 100  # the returns rise
    assert kept[7] > kept[5] - 50  # what it knows it keeps, even without rewards
    assert withheld[5] < kept[5] - 50  # stay low
    assert mean[2] < kept[2] - 100  # without random actions it hardly moves at first


def test_on_pusher_goal_the_sentences_hold(modules):
    goals = [task.goal for task in adbook.family("pusher-goal").sample_tasks(6, np.random.default_rng(4))]
    kept, withheld, moved, mean = modules(
        f"""async ([family, goals]) => {{{_PLAYED}
          return [
            play(goals, 8),
            play(goals, 8, (s) => {{ s.withheld = true; }}),
            play(goals, 8, (s, k, other) => {{ if (k === 6) s.moveGoal(other); }}),
            play(goals, 1, (s) => {{ s.deterministic = true; }}),
          ];
        }}""",
        ["pusher-goal", goals],
    )
    assert kept[7] > kept[0] + 10
    assert withheld[7] > withheld[0] + 10  # the returns rise all the same
    assert abs(moved[6] - moved[5]) < 8  # hardly change
    assert mean[0] > kept[0] + 8  # better from the start


@pytest.mark.parametrize(
    ("family", "event", "session", "says"),
    [
        ("reacher-goal", "newTask", {}, "climbs again"),
        ("reacher-goal", "newTask", {"withheld": True}, "stay low"),
        ("reacher-goal", "forgot", {"deterministic": True}, "fair place"),
        ("reacher-goal", "moved", {"withheld": True}, "nothing tells it so"),
        ("reacher-goal", "withheld", {"fresh": True}, "stay low"),
        ("reacher-goal", "withheld", {"fresh": False}, "fades"),
        ("half-cheetah-vel", "withheld", {"fresh": False}, "it runs on"),
        ("half-cheetah-vel", "mean", {"fresh": True}, "hardly moves"),
        ("pusher-goal", "forgot", {"withheld": True}, "rise all the same"),
        ("pusher-goal", "moved", {}, "hardly change"),
        ("pusher-goal", "paid", {}, "It is paid again"),
    ],
)
def test_the_sentence_is_that_of_what_is_going_on(modules, family, event, session, says):
    script = 'async (given) => (await import("./told.js")).sentence(...given)'
    assert says in modules(script, [event, family, session])
    ready = modules(script, ["ready", family, None])
    assert "frozen" in ready
