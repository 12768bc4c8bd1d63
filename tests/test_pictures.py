"""The README's pictures: those of the book, from the smoke book; the families' own need minutes of PPO."""

from PIL import Image

import adbook
from adbook import pictures
from adbook.__main__ import main


def test_pictures_of_the_book_are_of_the_player_and_the_curve_in_both_themes(browser, smoke_book, tmp_path):
    taken = {path.stem: Image.open(path) for path in pictures._of_the_book(browser, tmp_path, smoke_book.site)}
    assert sorted(taken) == ["curve-dark", "curve-light", "player-dark", "player-light"]
    for name in ("player", "curve"):
        light, dark = (taken[f"{name}-{theme}"].convert("L") for theme in ("light", "dark"))
        assert light.size == dark.size
        assert min(light.size) > 300
        brightness = [sum(i * n for i, n in enumerate(p.histogram())) / (p.width * p.height) for p in (light, dark)]
        assert brightness[0] > 200 > 80 > brightness[1]


def test_pictures_of_the_exhibit_are_of_a_network_that_has_begun_to_learn(browser, smoke_book, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_LEARNT", 1)
    taken = [path.name for path in pictures._of_the_exhibit(browser, tmp_path, smoke_book.site)]
    assert sorted(taken) == ["exhibit-dark.png", "exhibit-light.png", "exhibit.webp"]
    with Image.open(tmp_path / "exhibit.webp") as film:
        assert film.n_frames > 3
        first = film.convert("RGB").tobytes()
        film.seek(film.n_frames - 1)
        assert film.convert("RGB").tobytes() != first


def test_without_a_book_there_are_no_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "take_pictures", lambda take=pictures.take_pictures: take(tmp_path, tmp_path))
    assert main(["pictures"]) == 2
    assert "run `make book` first" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_family_has_a_step_at_which_it_is_taken():
    assert set(pictures._PLACES) == set(adbook.FAMILIES)
    assert all(0 < step < adbook.family(name).horizon for name, step in pictures._PLACES.items())
