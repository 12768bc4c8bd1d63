"""What the player stores and refuses, and the scene that it draws, without a page."""

import json
from dataclasses import replace

import numpy as np
import pytest
from player_cases import policy, recorded

import adbook
from adbook.insight import Watched
from adbook.mamba import MambaConfig
from adbook.player import RolloutPlayer
from adbook.recording import MOST_BYTES
from adbook.rollout import rollout
from adbook.scene import scene
from adbook.transformer import TransformerConfig


@pytest.mark.parametrize("name", sorted(adbook.FAMILIES))
def test_a_scene_is_plain_data_that_fits_the_model(name):
    described = scene(adbook.family(name))
    restored = json.loads(json.dumps(described))
    assert all(restored[part] == described[part] for part in ("bodies", "shapes", "used"))
    parents = [body["parent"] for body in described["bodies"]]
    assert all(parent < i for i, parent in enumerate(parents))  # so that one pass does
    assert {shape["role"] for shape in described["shapes"]} <= {"robot", "object", "frame"}
    assert all(0 <= q < described["coordinates"] for q in described["used"])


@pytest.mark.parametrize(("name", "body"), [("reacher-goal", "target"), ("pusher-goal", "goal")])
def test_a_goal_is_drawn_where_it_is_paid(name, body):
    family = adbook.family(name)
    env = family.make(family.test_tasks[0]).unwrapped
    env.reset(seed=0)
    view = scene(family)["view"]
    drawn = np.add(view["goal_origin"], env.goal)
    np.testing.assert_allclose(drawn, env.data.body(body).xpos[:2], atol=1e-9)
    env.close()


def _size(player):
    return sum(4 * len(x) // 3 for x in (player.frames, player.seen))


def test_the_books_own_recording_is_small():
    assert _size(RolloutPlayer(recorded(tasks=16, episodes=20))) < 120_000


def test_a_long_recording_keeps_fewer_frames_and_too_long_a_one_is_refused():
    rollout = recorded("half-cheetah-vel", tasks=1, episodes=2)

    def repeated(times):
        arrays = {
            name: np.repeat(getattr(rollout, name), times, axis=1) for name in ("returns", "rewards", "actions", "qpos")
        }
        noise = np.random.default_rng(0).normal(size=arrays["qpos"].shape)  # or it would be packed away
        return replace(rollout, **arrays | {"qpos": (arrays["qpos"] + noise).astype(np.float32)})

    player = RolloutPlayer(repeated(60))
    assert player.stride > 1
    assert _size(player) <= MOST_BYTES
    with pytest.raises(ValueError, match=r"of 210 kB are left for it beside the insight. Show fewer tasks or episodes"):
        RolloutPlayer(repeated(300))


def test_rollouts_that_do_not_fit_are_refused():
    first, longer = recorded(), recorded(episodes=4)
    with pytest.raises(ValueError, match="5 rollouts were given; the player shows one to four"):
        RolloutPlayer(dict.fromkeys("abcde", first))
    with pytest.raises(ValueError, match="0 rollouts"):
        RolloutPlayer({})
    with pytest.raises(ValueError, match=r"'a' and 'b' have .* play both for the same number of episodes"):
        RolloutPlayer({"a": first, "b": longer})
    with pytest.raises(ValueError, match="'a' and 'b' have different tasks"):
        RolloutPlayer({"a": first, "b": recorded(tasks=1)})
    with pytest.raises(ValueError, match="qpos has 4 coordinates and ant-dir's robot 15"):
        RolloutPlayer(replace(first, family="ant-dir"))
    with pytest.raises(ValueError, match="insight is given for 'other'"):
        RolloutPlayer({"a": first}, insight={"other": {}})


@pytest.mark.parametrize(("name", "value"), [("task", 2), ("episode", -1), ("step", 51)])
def test_a_position_out_of_range_is_refused(name, value):
    player = RolloutPlayer(recorded())
    with pytest.raises(ValueError, match=f"{name} is {value}; it must lie between 0 and"):
        setattr(player, name, value)


def test_a_reference_needs_one_return_a_task():
    with pytest.raises(ValueError, match=r"references\['source'\] has shape \(3,\); it must be \(2,\)"):
        RolloutPlayer(recorded(), references={"source": [-1, -2, -3]})


def test_what_cannot_be_drawn_is_refused():
    rollout = recorded()
    broken = rollout.qpos.copy()
    broken[1, 2, 7, 0] = np.inf
    with pytest.raises(ValueError, match=r"The rollout 'a' has no finite qpos .*task 1, episode 2, step 7"):
        RolloutPlayer({"a": replace(rollout, qpos=broken)})
    with pytest.raises(ValueError, match=r"references\['random'\] holds nan"):
        RolloutPlayer(rollout, references={"random": [np.nan, 1.0]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: {"mean 1": values["mean 1"]}, r"insight\['mamba'\] holds mean 1; give what Watched.insight"),
        (lambda values: {}, "give what Watched.insight returned"),
        (lambda values: values | {"std 1": values["std 1"][:, :1]}, r"\['std 1'\] has shape \(2, 1, 50\)"),
        (lambda values: values | {"change": np.array(1.0)}, r"\['change'\] has shape \(\); it must be \(2, 2, 50\)"),
    ],
)
def test_insight_that_no_watched_policy_gave_is_refused(change, message):
    family = adbook.family("reacher-goal")
    watched = Watched(policy(MambaConfig(d_model=8, n_layers=1)))
    seen = rollout(watched, family, family.test_tasks[:2], episodes=2)
    with pytest.raises(ValueError, match=message):
        RolloutPlayer(seen, insight={"mamba": change(watched.insight(seen))})


def test_insight_into_another_rollout_is_refused():
    family = adbook.family("reacher-goal")
    plain = policy(MambaConfig(d_model=8, n_layers=1)).eval()
    watched = Watched(plain)
    others = [rollout(plain, family, family.test_tasks[:n], episodes=k, seed=1) for n, k in ((2, 2), (1, 2), (2, 3))]
    with pytest.raises(ValueError, match="noted were"):
        watched.insight(others[0])  # before anything is noted
    seen = rollout(watched, family, family.test_tasks[:2], episodes=2)
    for other in others:
        with pytest.raises(ValueError, match="give the one watched last"):
            watched.insight(other)
    assert watched.insight(seen)["mean 1"].shape == (2, 2, 50)
    assert not plain.training


def test_a_transformers_state_has_no_change():
    family = adbook.family("reacher-goal")
    watched = Watched(policy(TransformerConfig(d_model=16, n_layers=1, n_heads=2, context=100)))
    seen = rollout(watched, family, family.test_tasks[:1], episodes=1)
    insight = watched.insight(seen)
    assert "change" not in insight
    player = RolloutPlayer({"transformer": seen}, insight={"transformer": insight})
    assert "change" not in player.insight["names"]


def test_the_saved_page_works_from_the_disk_alone(browser, tmp_path):
    path = RolloutPlayer(recorded(), references={"a </script><!--<script> b": [-1, -2]}).save_html(
        tmp_path / "new" / "page.html"
    )
    page, requests = browser.new_page(color_scheme="dark"), []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.get_by_role("status").filter(has_text="Episode 1 of 3, step 50 of 50").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("PageDown")
    page.get_by_role("status").filter(has_text="Episode 2 of 3, step 0 of 50").wait_for()
    assert page.title() == "RolloutPlayer(mamba: 2 tasks, 3 episodes, 50 steps)"
    page.close()
    assert requests == [path.as_uri()]
