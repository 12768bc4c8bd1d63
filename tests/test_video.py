"""Videos of rollouts: what is in the file, what is in the picture, and what is refused."""

import gc
import os
import warnings
from dataclasses import replace

import imageio.v3 as imageio
import numpy as np
import pytest
from player_cases import recorded

import adbook
from adbook import video
from adbook.studio import Studio
from adbook.video import write_video

SMALL = {"width": 192, "height": 96, "progress": False}
CAPTION = 26  # rows of it, at this size
BLUE, VERMILLION = np.array([0, 114, 178]), np.array([213, 94, 0])  # the palette's mamba and transformer
GOAL = np.array([194, 65, 12])


@pytest.fixture(scope="module", autouse=True)
def graphics():
    """A renderer; where there is none, a skip that names the remedy (under CI a failure)."""
    try:
        Studio(adbook.family("reacher-goal"), 64, 64).close()
    except RuntimeError as error:
        pytest.skip(str(error))


def film(tmp_path, rollouts, name="film.mp4", **options):
    """The frames of a video, as floats, and what the file says of itself."""
    path = write_video(tmp_path / name, rollouts, **SMALL | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # imageio's reader leaves ffmpeg's pipes open
        frames, about = imageio.imread(path).astype(float), imageio.immeta(path)
        gc.collect()
    return frames, about


def test_a_film_has_a_frame_a_step_in_real_time(tmp_path):
    frames, about = film(tmp_path / "new", {"mamba": recorded(), "transformer": recorded(seed=3)}, episodes=[0])
    assert frames.shape == (51, 96, 2 * 192, 3)
    assert (about["codec"], about["fps"]) == ("h264", 50)  # Reacher's step takes 0.02 s
    assert about["duration"] == pytest.approx(51 / 50, abs=0.01)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["film.mp4"]


def test_the_picture_changes_over_time_and_between_agents(tmp_path):
    """Two agents of one colour: apart where their rollouts are, alike (but for compression) where they are not."""
    rollouts = {"mamba": recorded(), "gaussian": recorded(seed=3)}
    apart, _ = film(tmp_path, rollouts, episodes=[1], speed=10)
    alike, _ = film(tmp_path, dict.fromkeys(rollouts, recorded()), episodes=[1], speed=10)
    assert len(apart) == len(alike) == 6

    def difference(frames):
        pictures = frames[:, CAPTION:]
        return (np.abs(pictures[:, :, :192] - pictures[:, :, 192:]) > 40).any(-1).sum(axis=(1, 2))

    assert difference(alike).max() <= 2  # pixels
    assert difference(apart)[1:].min() > 20
    moved = (np.abs(np.diff(apart[:, CAPTION:], axis=0)) > 40).any(-1).sum(axis=(1, 2))
    assert moved.min() > 20


@pytest.mark.parametrize(
    ("name", "speed", "count", "fps"),
    [
        ("a.mp4", 2, 26, 50),  # every other step
        ("a.mp4", 3, 18, 50),  # one in three, and the last
        ("a.mp4", 0.5, 51, 25),
        ("a.mp4", 1.5, 26, 37.5),  # at 75 a second there would be too many
        ("a.gif", 1, 26, 25),
        ("a.GIF", 4, 8, 25),
        ("a.gif", 1.5, 18, 25),
    ],
)
def test_speed_is_kept_by_leaving_frames_out(tmp_path, name, speed, count, fps):
    frames, about = film(tmp_path, {"mamba": recorded()}, name, episodes=[2], speed=speed)
    assert frames.shape == (count, 96, 192, 3)
    shown = about["fps"] if "fps" in about else 1000 / about["duration"]
    assert shown == pytest.approx(fps)


def test_a_gif_whose_frames_take_no_whole_hundredths_lasts_as_long_all_the_same(tmp_path):
    path = write_video(tmp_path / "a.gif", {"mamba": recorded()}, episodes=[0], speed=1.1, **SMALL)
    durations = [imageio.immeta(path, index=i)["duration"] for i in range(18)]
    assert set(durations) == {50, 60}  # ms; three steps of 20 ms in 54.5 ms
    assert sum(durations) == pytest.approx(18 * 60 / 1.1, abs=5)


@pytest.mark.parametrize("name", adbook.FAMILIES)
def test_every_family_shows_a_robot_of_the_agents_colour_that_moves(tmp_path, name):
    rollouts = {"mamba": recorded(name), "transformer": recorded(name, seed=3)}
    frames, _ = film(tmp_path, rollouts, episodes=[1], speed=20)
    for half, color in ((frames[:, CAPTION:, :192], BLUE), (frames[:, CAPTION:, 192:], VERMILLION)):
        robot = of_color(half, color)  # (frames, rows, columns)
        assert robot.mean(axis=(1, 2)).min() > 0.002  # Reacher's two links fill 0.5 %, and may overlap
        assert robot.mean(axis=(1, 2)).max() < 0.3
        assert (robot[1:] ^ robot[:-1]).sum(axis=(1, 2)).min() > 10
        assert half[~robot].mean() > 180  # in a bright room


def of_color(pictures, color):
    """Whether pixels have a colour in some light, once the white in both is taken away: (..., rows, columns)."""
    pure = [x - x.min(axis=-1, keepdims=True) for x in (pictures.astype(float), color.astype(float))]
    size = np.linalg.norm(pure[0], axis=-1)
    return (size > 40) & (pure[0] @ pure[1] / np.linalg.norm(pure[1]) > 0.97 * size)


def place(picture):
    """Mean column and row of what has the goal's colour."""
    rows, columns = np.nonzero(of_color(picture, GOAL))
    assert len(rows) > 5
    return columns.mean(), rows.mean()


@pytest.mark.parametrize(
    ("name", "pose", "right", "far"),  # directions in the picture, as the camera stands at -90° and at 50°
    [("reacher-goal", [2.4, 0], (1, 0), (0, 1)), ("pusher-goal", [0] * 7 + [0.3, -0.3], (-0.77, 0.64), (-0.64, -0.77))],
)
def test_the_goal_is_shown_where_it_is(name, pose, right, far):
    studio, at = Studio(adbook.family(name), 192, 120), []
    for direction in (right, far):
        for way in (0.12, -0.12):  # m
            goal = way * np.array(direction)
            slides = goal if name == "reacher-goal" else goal[::-1]
            at.append(place(studio.picture(np.array([*pose, *slides]), goal, BLUE / 255)))
    studio.close()
    assert at[0][0] > at[1][0] + 10  # pixels
    assert at[2][1] < at[3][1] - 5  # rows count downwards


def test_ants_arrow_points_along_the_wanted_direction():
    qpos = recorded("ant-dir").qpos[0, 0, 0].astype(float)
    qpos[:2] = 7, -4  # the camera follows
    studio = Studio(adbook.family("ant-dir"), 160, 120)
    at = {angle: place(studio.picture(qpos, [np.radians(angle)], BLUE / 255)) for angle in (30, 120, 210, 300)}
    studio.close()
    # The camera stands at -60°: what points there comes nearer, and lower in the picture; to its right is 30°.
    assert at[300][1] > at[120][1] + 10
    assert at[30][0] > at[210][0] + 20  # pixels


@pytest.fixture
def captions(monkeypatch):
    """What is written, frame by frame, without any drawing."""
    written = []

    class Blank:
        def __init__(self, robots, width, height):
            self.blank = np.zeros((height, width, 3), np.uint8)

        def picture(self, qpos, goal, color):
            return self.blank

        def close(self):
            pass

    def caption(rows, color, width, size):
        written.append([*rows[0], *rows[1]])
        return np.zeros((round(3.2 * size), width, 3), np.uint8)

    monkeypatch.setattr(video, "Studio", Blank)
    monkeypatch.setattr(video, "_caption", caption)
    return written


def test_a_caption_counts_episodes_and_sums_rewards(tmp_path, captions):
    rollout = recorded()
    write_video(tmp_path / "a.mp4", {"mamba": rollout}, task=1, episodes=[2, 0], speed=25, **SMALL)  # 25 steps a frame
    sums = [rollout.rewards[1, 2, :25].sum(), rollout.returns[1, 2]]
    assert captions[:3] == [["mamba", "episode 3 of 3", f"return {x:.1f}", ""] for x in (0, *sums)]
    assert captions[3] == ["mamba", "episode 1 of 3", "return 0.0", ""]
    assert len(captions) == 6


def test_a_source_says_which_of_its_episodes_are_shown(tmp_path, captions):
    about = {"source": "PPO", "episodes": [[0, 9, 19], [0, 8, 16]], "of": [20, 17]}
    write_video(tmp_path / "a.mp4", {"source": replace(recorded(), metadata=about)}, task=1, speed=50, **SMALL)
    assert [row[1] for row in captions[::2]] == ["episode 1 of 17", "episode 9 of 17", "episode 17 of 17"]


def test_cheetahs_caption_has_both_velocities_and_knows_a_moved_goal(tmp_path, captions):
    rollout = recorded("half-cheetah-vel")
    moved = replace(rollout, metadata={"goals": [[1.0], [2.5], [0.5]]})
    write_video(tmp_path / "a.mp4", {"mamba": moved}, episodes=[1], speed=250, **SMALL)  # 100 steps a frame
    x = rollout.qpos[0, 1, :, 0].astype(float)
    now = [0, *((x[t] - x[t - 10]) / 0.5 for t in (100, 200))]  # over half a second
    assert [row[3] for row in captions] == [f"wanted 2.50, now {v:.2f} m/s" for v in now]


def test_an_ant_that_ended_early_waits_for_the_others(tmp_path, captions):
    rollout = recorded("ant-dir", episodes=4)
    lengths = rollout.lengths
    task, k = np.unravel_index(lengths.argmin(), lengths.shape)
    other = recorded("ant-dir", episodes=4, seed=3)
    last = int(max(lengths[task, k], other.lengths[task, k]))
    rollouts = {"mamba": rollout, "transformer": other}
    write_video(tmp_path / "a.mp4", rollouts, task=int(task), episodes=[int(k)], **SMALL)
    assert len(captions) == 2 * (last + 1)
    shorter = [row for row in captions if row[0] == ("mamba" if lengths[task, k] < last else "transformer")]
    end = int(min(lengths[task, k], other.lengths[task, k]))
    assert {row[3] for row in shorter[end + 1 :]} == {f"ended after {end * 0.05:.1f} s"}
    assert shorter[end][3].endswith("m/s along the arrow")
    assert len({row[2] for row in shorter[end:]}) == 1  # the return stays


def test_a_caption_stays_inside_its_panel_and_shortens_a_long_name():
    for width, name in ((192, "mamba"), (480, "a network with a name that is longer than the caption is wide")):
        size = max(8, width // 26)
        image = video._caption([(name, "episode 100 of 200"), ("return -123.4", "")], tuple(BLUE), width, size)
        assert image.shape == (round(3.2 * size), width, 3)
        assert (image[:, [0, -1]] == 255).all()
        assert (image[[0, -1]] == 255).all()
    blue = np.abs(image.astype(int) - BLUE).sum(-1) < 60
    ink = (image < 80).all(-1)
    assert blue.any()
    first_row = slice(0, round(1.6 * size))
    assert np.nonzero(blue[first_row])[1].max() < np.nonzero(ink[first_row])[1].min()  # the name ends before the number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a.avi"}, r"The suffix is '.avi'; let the file's name end in .mp4 or .gif"),
        ({"name": "a"}, r"The suffix is ''; let"),
        ({"task": 2}, "task is 2; it must lie between 0 and 1"),
        ({"task": -1}, "task is -1"),
        ({"episodes": [0, 3]}, "episodes holds 3; an index must lie between 0 and 2"),
        ({"episodes": []}, "no episode to film"),
        ({"speed": 0}, "speed is 0; it must lie between 0.01 and 1000"),
        ({"speed": float("nan")}, "speed is nan"),
        ({"width": 201}, "width is 201; in .mp4 it must be an even number from 192 to 4096 pixels"),
        ({"name": "a.gif", "height": 40}, "height is 40; in .gif it must be a whole number from 96 to 4096 pixels"),
        ({"rollouts": {}}, "0 rollouts were given"),
        ({"rollouts": dict.fromkeys("abcde", None)}, "5 rollouts were given"),
    ],
)
def test_what_cannot_be_filmed_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(video, "Studio", None)  # to call it would raise something else
    options = {"name": "a.mp4", "rollouts": {"mamba": recorded()}} | SMALL | options
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "new" / options.pop("name"), options.pop("rollouts"), **options)
    assert list(tmp_path.iterdir()) == []


def test_positions_of_another_robot_are_refused(tmp_path):
    with pytest.raises(ValueError, match="qpos has 4 coordinates and ant-dir's robot 15"):
        write_video(tmp_path / "a.mp4", {"mamba": replace(recorded(), family="ant-dir")}, **SMALL)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_an_interrupted_film_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, suffix):
    path, pictures = tmp_path / f"film{suffix}", []
    path.write_text("the film of before")

    def picture(studio, *rest, draw=Studio.picture):
        pictures.append(draw(studio, *rest))
        if len(pictures) == 5:
            raise KeyboardInterrupt
        return pictures[-1]

    monkeypatch.setattr(Studio, "picture", picture)
    with pytest.raises(KeyboardInterrupt):
        write_video(path, {"mamba": recorded()}, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "the film of before"


def test_studios_do_not_disturb_each_other():
    robots = [adbook.family(name) for name in ("reacher-goal", "ant-dir")]
    poses = [recorded(robot.name).qpos[0, 0, 0].astype(float) for robot in robots]
    first = Studio(robots[0], 96, 64)
    alone = first.picture(poses[0], (0, 0), BLUE / 255)
    second = Studio(robots[1], 64, 96)
    other = second.picture(poses[1], (0,), BLUE / 255)
    np.testing.assert_array_equal(first.picture(poses[0], (0, 0), BLUE / 255), alone)
    np.testing.assert_array_equal(second.picture(poses[1], (0,), BLUE / 255), other)
    second.close()
    del second
    gc.collect()
    np.testing.assert_array_equal(first.picture(poses[0], (0, 0), BLUE / 255), alone)
    first.close()


def test_a_display_that_cannot_be_used_is_passed_over(monkeypatch):
    monkeypatch.setenv("DISPLAY", ":93")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    studio = Studio(adbook.family("reacher-goal"), 64, 64)
    assert studio.picture(np.zeros(4), (0, 0), BLUE / 255).std() > 5
    studio.close()
    assert "MUJOCO_GL" not in os.environ


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gymnasium's half-made viewer
def test_without_graphics_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "none")
    with pytest.raises(RuntimeError, match=r"apt-get install libegl1 libopengl0 libgl1-mesa-dri.*MUJOCO_GL=osmesa"):
        write_video(tmp_path / "a.mp4", {"mamba": recorded()}, **SMALL)
    gc.collect()
    assert os.environ["MUJOCO_GL"] == "none"
    assert list(tmp_path.iterdir()) == []
