"""A live player: put the goal where you like, run frozen networks, and watch them learn it as the kernel computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import traitlets
from torch import nn

from adbook.insight import Watched
from adbook.play import checksum
from adbook.player import OutOfRangeError, RolloutPlayer
from adbook.policy import ADPolicy
from adbook.recording import recording
from adbook.session import Session
from adbook.tasks import TaskFamily

MOST_EPISODES = 200  # between two calls of `forget`
_PERIOD = 1 / 30  # s between two pictures
_HOLD = 0.4  # s of rest after an episode, at real time
_NO_LIMIT = 2**24  # bytes of a recording: a kernel is at hand, nothing goes into a page


class _Goal(traitlets.List):
    """A goal may be given as a number, a tuple or an array."""

    def validate(self, obj: Any, value: Any) -> list[float]:
        return super().validate(obj, np.atleast_1d(value).tolist())


class LivePlayer(RolloutPlayer):
    """Runs one to four agents on a goal that the reader chooses, and shows them while they play.

    Every agent has an environment of its own with the same starts. A run plays `episodes` more episodes and can be
    stopped and resumed at any step; the agents' memories are kept until `forget`. A goal set in between holds from the
    next episode on; nobody is told. Without a kernel, in a built page, what was recorded can be watched.

    A run has a thread of its own, which also calls what observes the traits that it sets. `run`, `stop` and `forget`
    are for one thread at a time. Until `close`, policies stay in evaluation mode.

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

    goal = _Goal(traitlets.Float()).tag(sync=True)
    goals = traitlets.List().tag(sync=True)
    limits = traitlets.List(traitlets.Float()).tag(sync=True)  # of a goal, or of its norm if it has two numbers
    running = traitlets.Bool(False).tag(sync=True)
    episodes = traitlets.Int(20).tag(sync=True)
    planned = traitlets.Int(0).tag(sync=True)  # episodes at the end of this run
    pace = traitlets.Float(2.0).tag(sync=True)
    follow = traitlets.Bool(True).tag(sync=True)
    trouble = traitlets.Unicode("").tag(sync=True)
    current_steps = traitlets.List(traitlets.Int()).tag(sync=True)  # (A,) of the episode being played; none between two
    current = traitlets.Bytes().tag(sync=True)  # of `Session.current`

    _session: Session | None = None
    _thread: threading.Thread | None = None
    _error: Exception | None = None  # of the last run, until somebody waits for it
    _broken = ""  # why there can be no further run before `forget`

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
        self._lock = threading.RLock()  # between what the page sends and what a run shows
        self._stop, self._in_message = threading.Event(), False
        agents = {"mamba": agents} if isinstance(agents, nn.Module) else dict(agents)
        if not 1 <= len(agents) <= 4:  # before environments are made for them
            raise ValueError(f"{len(agents)} agents were given; the player shows one to four.")
        self._agents = {name: _watched(agent) for name, agent in agents.items()}
        self._family, self._seed = family, seed
        self._probe = family.make(family.test_tasks[0]).unwrapped  # knows which goals there are
        goal = self._checked(family.test_tasks[0].goal if goal is None else goal)
        self._start_over(goal)
        rollouts = self._session.finished()
        super().__init__(rollouts, insight=self._session.insight(rollouts))
        self.goal, self.episodes, self.pace = goal, episodes, pace
        self._show(limits=list(self._probe.goal_range), **self._current())
        self.on_msg(self._told)

    def run(self, episodes: int | None = None, *, wait: bool = False) -> None:
        """Play on, in the background; while it plays, nothing more is begun.

        Args:
            episodes: Sets `episodes` first.
            wait: Wait for a run that has begun, then for this one; see `wait`.
        """
        if wait or not self.running:
            self._join()
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
        self._join()
        error, self._error = self._error, None
        if error:
            raise error

    def forget(self) -> None:
        """Stop, empty the agents' memories, and start afresh with the next seed; the recording is dropped.

        Raises:
            RuntimeError: It is called by what observes a run, in its thread.
        """
        if self._thread is threading.current_thread():
            raise RuntimeError("forget() was called in the thread of the run; set running = False, and forget later.")
        self.running = False
        self._join()
        self._seed, self._error, self._broken = self._seed + 1, None, ""
        self._start_over(self.goal)
        self._show(trouble="", follow=True, planned=0)
        self._show(**self._recording())
        self._show(**self._current())

    def close(self) -> None:
        """Stop, close the environments, and take the player away."""
        self._broken = "The player is closed; make another."
        if self.running:
            self.running = False
        self._join()
        if self._session and self._thread is not threading.current_thread():
            self._session.close()
        super().close()

    def set_state(self, sync_data: dict) -> None:
        """Take over what the page sends, not in the midst of what a run shows."""
        with self._lock:
            self._in_message = True
            try:
                super().set_state(sync_data)
            finally:
                self._in_message = False

    def _join(self) -> None:
        """Wait for the run's thread, unless this is it."""
        if self._thread in (None, threading.current_thread()):
            return
        held = self._in_message and self._lock.acquire(blocking=False)  # by what observes a message of the page
        if held:  # the run may want to show something before it ends
            self._lock.release()
            self._lock.release()
        self._thread.join()
        if held:
            self._lock.acquire()

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
        try:
            return self._checked(proposal.value)
        except ValueError as error:
            raise OutOfRangeError(str(error)) from error

    @traitlets.validate("episodes", "pace")
    def _allowed_number(self, proposal: traitlets.Bunch) -> float:
        name, value = proposal.trait.name, proposal.value
        low, high = (1, MOST_EPISODES) if name == "episodes" else (0, 1000)
        if not low <= value <= high:
            raise OutOfRangeError(f"{name} is {value}; it must lie between {low} and {high}.")
        return value

    @traitlets.observe("goal")
    def _goal_moved(self, change: traitlets.Bunch) -> None:
        if not self.running:
            self._take_goal()

    def _take_goal(self) -> None:
        """Where nothing has been played yet, give the first episode the goal as it is now."""
        if self._session.fresh and self.goal != self._session.goals[0]:
            self._start_over(self.goal)
            self._show(**self._current())

    def _start_over(self, goal: list[float]) -> None:
        if self._session:
            self._session.close()
        self._session = Session(self._agents, self._family, goal, MOST_EPISODES, self._seed)

    # playing

    @traitlets.observe("running")
    def _switched(self, change: traitlets.Bunch) -> None:
        self._stop.set()
        if change.new:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._work, args=(self._stop, self._thread), daemon=True)
            self._thread.start()

    def _work(self, stop: threading.Event, previous: threading.Thread | None) -> None:
        trouble = ""
        try:
            if previous:
                previous.join()
            self._error = None
            self._show(trouble="")
            self._play_on(stop)
        except Exception as error:  # it is told in the page, and raised where somebody waits
            trouble, self._error = f"The run broke off: {error}", error
        finally:
            self._show(trouble=trouble, **{} if stop.is_set() else {"running": False})

    def _play_on(self, stop: threading.Event) -> None:
        until = self._session.episode + self.episodes
        if self._broken:
            raise RuntimeError(self._broken)
        if until > MOST_EPISODES:
            raise ValueError(f"{until} episodes would be more than {MOST_EPISODES}, the most; forget first.")
        self._take_goal()
        self._show(planned=until)
        before = self._weights()
        try:
            self._play_until(until, stop)
        except Exception as error:
            self._broken = f"An agent broke off ({error}); forget first."
            raise
        if self._weights() != before:
            raise RuntimeError("A policy's parameters changed during the run; they must stay frozen.")

    def _play_until(self, until: int, stop: threading.Event) -> None:
        due = shown = time.perf_counter()
        while not stop.is_set() and self._session.episode < until:
            over = self._session.step(self.goal)
            now = time.perf_counter()
            if over:
                self._show(**self._recording())
            elif now - shown > _PERIOD:
                self._show(**self._current())
                shown = now
            due = max(due, now - _PERIOD) + self._seconds(over)  # what is late is not made up for
            stop.wait(max(0.0, due - time.perf_counter()))
        if self._session.episode < until:
            self._show(**self._current())

    def _seconds(self, over: bool) -> float:
        """How long a step lasts, or the last one of an episode."""
        return (self.scene["dt"] + _HOLD * over) / self.pace if self.pace else 0.0

    def _weights(self) -> list[str]:
        return [checksum(agent) for agent in self._agents.values()]

    # what the page is told

    def _show(self, **state: Any) -> None:
        """Set traits, the page's too, all at once."""
        with self._lock, self.hold_sync():
            for name, value in state.items():
                self.set_trait(name, value)

    def _recording(self) -> dict[str, Any]:
        """The finished episodes."""
        self.rollouts = self._session.finished()
        data = recording(self.rollouts, self._session.insight(self.rollouts), self.scene, _NO_LIMIT)
        state = data | {"goals": list(self._session.goals), "current_steps": [], "current": b""}
        last = self._session.episode - 1
        return state | self._place(max(last, 0), self.shape[3] if last >= 0 else 0)

    def _current(self) -> dict[str, Any]:
        """The episode that is being played; nothing between two, for then the recording is all there is."""
        steps, current = self._session.current(self.scene["used"], self.insight.get("names", []))
        if not steps:
            return {}
        state = {"goals": list(self._session.goals), "current_steps": steps, "current": current}
        return state | self._place(self._session.episode, max(steps))

    def _place(self, episode: int, step: int) -> dict[str, int]:
        """The newest place, for who follows it."""
        return {"episode": episode, "step": step} if self.follow else {}

    def _episodes_shown(self) -> int:
        return self.shape[2] + bool(self.current_steps)

    def _embedded(self) -> dict[str, Any]:
        with self._lock:
            return super()._embedded() | {"running": False, "planned": 0}


def _watched(agent: nn.Module) -> nn.Module:
    """A policy with its own notes, also where one is given several times."""
    if isinstance(agent, Watched):
        agent = agent.policy
    return Watched(agent) if isinstance(agent, ADPolicy) else agent
