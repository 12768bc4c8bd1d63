"""What the tests of the player share: recorded rollouts, a small policy, and a look at the page."""

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


def player_page(player, width, folder):
    """The player's own page, with what tests look at made visible to them."""
    page = player.save_html(folder / "player.html").read_text()
    hook = f"""document.getElementById("widget").style.width = "{width}px";
      const data = await decode(model).catch(() => null);
      window.test = {{ model, remove, listeners, kinematics, data }};
      </script>"""
    return page.replace("</script>", hook)


def place(page):
    """Task, episode and step, once what was asked for is drawn."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return tuple(page.evaluate("['task', 'episode', 'step'].map((name) => test.model.get(name))"))


def pictures(page, select="canvas"):
    """The canvases' pictures as text."""
    place(page)
    return page.evaluate(f"[...document.querySelectorAll('{select}')].map((c) => c.toDataURL())")


def said(page):
    """The text that stands for what is shown."""
    place(page)
    return page.get_by_role("status").inner_text()
