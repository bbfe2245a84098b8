"""The picture of several budgets: everything is in it, and nothing covers anything."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import adsc
from adsc.pocket.questions import TASKS
from adsc.pocket.splits import load
from adsc.report.budgets import Asked, Budget, Scene, compose, draw

SCHEDULES = {"1/3": "4:1/2,8:1/2,12:1/2,16:1/2", "2/9": "2:1/2,4:1/2,8:1/2,12:1/2", "1/9": "1:1/4,5:1/2,9:1/32"}
LONGEST = max((question for _, asked in load("test", 60) for question in asked), key=lambda each: len(each.text))


def scenes(said: str) -> list[Scene]:
    trained, untrained = ("triangle", "triangle", "no"), (said, "", said[:3])
    row = Asked(LONGEST.text, LONGEST.answer, "triangle", trained, untrained)
    rows = [row] * len(TASKS)
    image = Image.new("RGB", (128, 128), (200, 210, 220))
    return [(image, rows), (image, rows[:4]), (image, rows[:1])]


def budgets(count: int = 3, trained: int = 70, untrained: int = 31) -> list[Budget]:
    plans = [adsc.plan([(2, 258)], 266, adsc.Schedule.parse(text), 24, grids=[(16, 16)]) for text in SCHEDULES.values()]
    return [
        Budget(name, plan, 0.45, 0.35, trained, untrained)
        for name, plan in list(zip(SCHEDULES, plans, strict=True))[:count]
    ]


@pytest.mark.parametrize(("said", "right"), [("yes", 41), ("gggggggggggggggg", 0), ("$5 and\n$6", 74)])
def test_no_text_covers_another_or_leaves_the_picture(said: str, right: int) -> None:
    figure = compose(scenes(said), budgets(3, 74 - right, right), 74, 74, "74 of 74 right", "one adapter")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    texts = [text for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_visible()]
    assert len(boxes) > 60
    for name, box in boxes:
        assert box.x0 >= 0 <= box.y0, name
        assert box.x1 <= width, name
        assert box.y1 <= height, name
    for (name, box), (other_name, other) in combinations(boxes, 2):
        covered = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
        assert min(covered) <= 1, (name, other_name)


def test_it_says_what_was_counted() -> None:
    row = Asked("?", "a", "a", ("b", "b"), ("a", "a"))
    figure = compose([(image, [row]) for image, _ in scenes("")], budgets(2), 72, 75, "a title", "below it")
    said = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    for text, times in {"96 %": 1, "93 %": 2, "41 %": 2, "KV cache −65.0 %": 2, "prefill FLOPs −55.0 %": 2}.items():
        assert said.count(text) == times, text
    assert "Right answers to 75 questions" in said
    assert "The vision tokens that stay at 2/9, of the first image" in said


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    draw(path, scenes("no"), budgets(), 70, 74, "title", "subtitle")
    assert Image.open(path).width > 1000
    before = path.read_bytes()

    def save_half(figure: Figure, target: Path, **options: object) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", save_half)
    with pytest.raises(adsc.InputError, match="cannot be written: No space left"):
        draw(path, scenes("no"), budgets(), 70, 74, "title", "subtitle")
    assert path.read_bytes() == before
