"""A live player: put the goal where you like, run frozen networks, and watch them learn it as the kernel computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping

import numpy as np
import traitlets
from torch import nn

from adbook.insight import Watched
from adbook.play import Recorder, play
from adbook.player import RolloutPlayer
from adbook.policy import ADPolicy
from adbook.recording import recording
from adbook.rollout import Rollout
from adbook.tasks import Task, TaskFamily

MOST_EPISODES = 200  # between two calls of `forget`
_PERIOD = 1 / 30  # s between two pictures
_HOLD = 0.4  # s of rest after an episode, at real time
_NO_LIMIT = 2**24  # bytes of a recording: a kernel is at hand, nothing goes into a page


class LivePlayer(RolloutPlayer):
    """Runs one to four agents on a goal that the reader chooses, and shows them while they play.

    Every agent has an environment of its own with the same starts. A run plays `episodes` more episodes and can be
    stopped and resumed at any step; the agents' memories are kept until `forget`. A goal set in between holds from the
    next episode on; nobody is told. Without a kernel, in a built page, what was recorded can be watched.

    Args:
        agents: A policy, or several by name; an `ADPolicy` also shows what it sees.
        family: Whose robot and goals these are.
        goal: The first goal, in the family's unit; that of the first test task if not given.
        episodes: How many a run plays.
        pace: Times real time; 0 does not wait at all.
        seed: Of environments and actions; each `forget` takes the next one.

    Attributes:
        goal: The goal of the next episode; set it to move the goal.
        goals: The goals of the episodes so far.
        running: Whether the kernel plays; set it to start and stop.
        episodes: How many more episodes a run plays.
        pace: Times real time.
        follow: Whether the picture stays with what is played.
        trouble: Why the last run broke off, or nothing.
        rollouts: The finished episodes, by the agent's name.

    Raises:
        ValueError: No agent or more than four, a policy of another family's sizes, or a goal out of the family's range.
    """

    goal = traitlets.List(traitlets.Float()).tag(sync=True)
    goals = traitlets.List().tag(sync=True)
    limits = traitlets.List(traitlets.Float()).tag(sync=True)  # of a goal, or of its norm if it has two numbers
    running = traitlets.Bool(False).tag(sync=True)
    episodes = traitlets.Int(20).tag(sync=True)
    planned = traitlets.Int(0).tag(sync=True)  # episodes at the end of this run
    pace = traitlets.Float(2.0).tag(sync=True)
    follow = traitlets.Bool(True).tag(sync=True)
    trouble = traitlets.Unicode("").tag(sync=True)
    current_steps = traitlets.List(traitlets.Int()).tag(sync=True)  # (A,) of the episode being played; none between two
    current = traitlets.Bytes().tag(sync=True)  # by agent: qpos (t + 1, Q), rewards (t,), seen (t, names), float32

    def __init__(
        self,
        agents: nn.Module | Mapping[str, nn.Module],
        family: TaskFamily,
        *,
        goal: float | tuple[float, ...] | None = None,
        episodes: int = 20,
        pace: float = 2.0,
        seed: int = 0,
    ) -> None:
        """See the class."""
        agents = {"mamba": agents} if isinstance(agents, nn.Module) else dict(agents)
        self._agents = {
            name: Watched(agent) if isinstance(agent, ADPolicy) else agent for name, agent in agents.items()
        }
        self._family, self._seed = family, seed
        self._lock = threading.RLock()  # between what the page sends and what a run shows
        self._stop, self._thread, self._error = threading.Event(), None, None
        self._plays: dict[str, Iterator[Recorder]] = {}
        self._probe = family.make(family.test_tasks[0]).unwrapped  # knows which goals there are
        goal = self._checked(family.test_tasks[0].goal if goal is None else goal)
        if not agents:
            raise ValueError("0 agents were given; the player shows one to four.")
        self._start_over(goal)
        super().__init__(self._finished(), insight=self._insight(self._finished()))
        self.set_trait("limits", list(self._probe.goal_range))
        self.goal, self.episodes, self.pace = goal, episodes, pace
        self._show_current()
        self.on_msg(self._told)

    def run(self, episodes: int | None = None, *, wait: bool = False) -> None:
        """Play on, in the background.

        Args:
            episodes: Sets `episodes` first.
            wait: Return when the run is over; see `wait`.
        """
        if episodes is not None:
            self.episodes = episodes
        self.running = True
        if wait:
            self.wait()

    def stop(self) -> None:
        """Stop after the step that is being made; `run` goes on from there."""
        self.running = False
        self.wait()

    def wait(self) -> None:
        """Return when the run is over; what broke it off is raised here."""
        if self._thread not in (None, threading.current_thread()):
            self._thread.join()
        error, self._error = self._error, None
        if error:
            raise error

    def forget(self) -> None:
        """Stop, empty the agents' memories, and start afresh with the next seed; the recording is dropped."""
        self.running = False
        if self._thread:
            self._thread.join()
        self._seed += 1
        self._start_over(self.goal)
        with self._lock, self.hold_sync():
            self.trouble, self.follow = "", True
            self._show_recording()
            self._show_current()

    def close(self) -> None:
        """Stop, and take the player away."""
        self._stop.set()
        super().close()

    def set_state(self, sync_data: dict) -> None:
        """Take over what the page sends, not in the midst of what a run shows."""
        with self._lock:
            super().set_state(sync_data)

    def _told(self, _: RolloutPlayer, content: dict, buffers: list) -> None:
        if content.get("do") == "hello":  # a view asks whether there is a kernel
            self.send({"kernel": True})
        elif content.get("do") == "forget":
            self.forget()

    # the goal and the settings

    def _checked(self, goal: float | tuple[float, ...] | list[float]) -> list[float]:
        self._probe.goal = goal
        return self._probe.goal.tolist()

    @traitlets.validate("goal")
    def _allowed_goal(self, proposal: traitlets.Bunch) -> list[float]:
        return self._checked(proposal.value)

    @traitlets.validate("episodes", "pace")
    def _allowed_number(self, proposal: traitlets.Bunch) -> float:
        name, value = proposal.trait.name, proposal.value
        low, high = (1, MOST_EPISODES) if name == "episodes" else (0, 1000)
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; it must lie between {low} and {high}.")
        return value

    @traitlets.observe("goal")
    def _goal_moved(self, change: traitlets.Bunch) -> None:
        if not self.running:
            self._take_goal()

    def _take_goal(self) -> None:
        """Where nothing has been played yet, give the first episode the goal as it is now."""
        fresh = not any(record.t.any() or record.episode.any() for record in self._records.values())
        if fresh and self.goal != self._goals[0]:
            self._start_over(self.goal)
            self._show_current()

    # playing

    @traitlets.observe("running")
    def _switched(self, change: traitlets.Bunch) -> None:
        self._stop.set()
        if change.new:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._work, args=(self._stop, self._thread), daemon=True)
            self._thread.start()

    def _work(self, stop: threading.Event, previous: threading.Thread | None) -> None:
        if previous:
            previous.join()
        try:
            self.trouble, self._error = "", None
            self._play_on(stop)
        except Exception as error:  # it is told in the page, and raised where somebody waits
            self.trouble, self._error = f"The run broke off: {error}", error
        finally:
            if not stop.is_set():
                self.running = False

    def _play_on(self, stop: threading.Event) -> None:
        until = self._episode + self.episodes
        if until > MOST_EPISODES:
            raise ValueError(f"{until} episodes would be more than {MOST_EPISODES}, the most; forget first.")
        self._take_goal()
        self.planned = until
        due = shown = time.perf_counter()
        while not stop.is_set() and self._episode < until:
            over = self._step()
            now = time.perf_counter()
            if over:
                self._show_recording()
            elif now - shown > _PERIOD:
                self._show_current()
                shown = now
            due = max(due, now - _PERIOD) + self._seconds(over)  # what is late is not made up for
            stop.wait(max(0.0, due - time.perf_counter()))
        if self._episode < until:
            self._show_current()

    def _seconds(self, over: bool) -> float:
        """How long a step lasts, or the last one of an episode."""
        return (self.scene["dt"] + _HOLD * over) / self.pace if self.pace else 0.0

    @property
    def _episode(self) -> int:
        """How many episodes all agents have finished."""
        return min(int(record.episode[0]) for record in self._records.values())

    def _start_over(self, goal: list[float]) -> None:
        for steps in self._plays.values():
            steps.close()
        task = Task(self._family.name, tuple(goal), "sampled", 0)
        options = {"episodes": MOST_EPISODES, "seed": self._seed}
        self._plays = {name: play(agent, self._family, [task], **options) for name, agent in self._agents.items()}
        self._records = {name: next(steps) for name, steps in self._plays.items()}
        self._goals = [list(goal)]

    def _step(self) -> bool:
        """Make a step of every agent that is still in this episode; tell whether that ended it for all."""
        episode = self._episode
        if len(self._goals) == episode:  # it begins
            self._goals.append(self.goal)
            for record in self._records.values():
                record.envs[0].unwrapped.goal = self.goal
        for name, record in self._records.items():
            if record.episode[0] == episode:
                next(self._plays[name])
        return self._episode > episode

    # what the page is told

    def _finished(self) -> dict[str, Rollout]:
        about = {"seed": self._seed, "goals": self._goals[: self._episode]}
        return {name: Rollout.of(record, about) for name, record in self._records.items()}

    def _insight(self, rollouts: Mapping[str, Rollout]) -> dict[str, dict[str, np.ndarray]]:
        return {
            name: agent.insight(rollouts[name]) for name, agent in self._agents.items() if isinstance(agent, Watched)
        }

    def _show_recording(self) -> None:
        """Show the finished episodes."""
        rollouts = self._finished()
        data = recording(rollouts, self._insight(rollouts), self.scene, _NO_LIMIT)
        with self._lock, self.hold_sync():
            self.rollouts = rollouts
            for name, value in data.items():
                self.set_trait(name, value)
            self.goals, self.current_steps, self.current = list(self._goals), [], b""
            if self.follow:
                self.episode, self.step = max(self._episode - 1, 0), self.shape[3] if self._episode else 0

    def _show_current(self) -> None:
        """Show the episode that is being played, unless all agents are between two."""
        if all(record.over[0] for record in self._records.values()):
            return
        steps = [int(record.t[0]) for record in self._records.values()]
        current = b"".join(part.astype("<f4").tobytes() for name in self._records for part in self._played(name))
        with self._lock, self.hold_sync():
            self.goals, self.current_steps, self.current = list(self._goals), steps, current
            if self.follow:
                self.episode, self.step = self._episode, max(steps)

    def _played(self, name: str) -> Iterator[np.ndarray]:
        """One agent's coordinates, rewards, and what it saw, in the episode that is being played."""
        agent, record, episode = self._agents[name], self._records[name], self._episode
        t = int(record.t[0])
        yield record.qpos[0, episode, : t + 1][:, self.scene["used"]]
        yield record.rewards[0, episode, :t]
        if isinstance(agent, Watched) and t:
            noted = agent.noted(-t) | {"reward": record.rewards[:, episode, :t]}
            yield np.stack([noted[name][0] for name in self.insight["names"]], -1)

    def _episodes_shown(self) -> int:
        return self.shape[2] + bool(self.current_steps)
