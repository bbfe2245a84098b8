"""The picture: what it shows is what the plan says, and nothing in it covers anything else."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import adsc
from adsc.report.picture import Bar, Exchange, compose, draw, faded
from adsc.report.tables import change, describe, layers, si, spark

PHOTO = Image.effect_noise((64, 48), 80).convert("RGB")
BARS = [
    Bar("prefill FLOPs", "3.42 GFLOP", "1.64 GFLOP", 0.479),
    Bar("LLM prefill FLOPs", "2.72 GFLOP", "936 MFLOP", 0.344),
    Bar("KV cache", "5.43 MB", "5.40 MB", 0.994),
    Bar("time to first token", "301.4 ms", "1184.9 ms", 3.9),
]
LONG = "The sign says $5 or $6, and a very loooooooooooooooooooooooooooooooong word; 日本. " * 9
SEVEN = ",".join(f"{layer}:1/2" for layer in range(1, 8))
STARS = [Exchange(f"where is the red star {i}?", "a1", "b2", "a1") for i in range(7)]
CASES = {  # schedule, spans, grids, questions
    "demo": ("3:1/2,6:1/2,9:1/2", [(2, 258)], [(16, 16)], STARS),
    "many stages": (SEVEN, [(0, 768)], [(24, 32)], [Exchange("?", "", "b")]),
    "no grid, long answers": ("4:1/3", [(2, 258), (260, 517)], [(32, 8), None], [Exchange(LONG, LONG, LONG[20:])]),
    "many images": ("4:1/3", [(16 * i, 16 * i + 16) for i in range(6)], [(4, 4)] * 6, [Exchange("?", "a", "b")]),
}


def row(case: str) -> tuple[adsc.Plan, list[Exchange]]:
    schedule, spans, grids, exchanges = CASES[case]
    return adsc.plan(spans, spans[-1][1] + 9, adsc.Schedule.parse(schedule), 12, grids=grids), exchanges


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("case", CASES)
def test_no_text_covers_another_or_leaves_the_picture(case: str) -> None:
    plan, exchanges = row(case)
    figure = compose([PHOTO] * len(plan.layout.spans), plan, exchanges, BARS, "8 of 9 right", describe(plan))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    texts = [text for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_visible()]
    assert len(boxes) > 20
    for name, box in boxes:
        assert box.x0 >= 0 <= box.y0, name
        assert box.x1 <= width, name
        assert box.y1 <= height, name
    for (name, box), (other_name, other) in combinations(boxes, 2):
        covered = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
        assert min(covered) <= 1, (name, other_name)


def test_dropped_patches_are_faded() -> None:
    kept = np.zeros((3, 4), dtype=bool)
    kept[1, 2] = True
    colors = Image.new("RGB", (64, 48), (200, 30, 30))
    shown = faded(colors, kept)
    size = shown.shape[0] // 3
    assert shown.shape == (3 * size, 4 * size, 3)
    centers = shown[size // 2 :: size, size // 2 :: size]
    assert (centers[kept] == (200, 30, 30)).all()
    assert (np.ptp(centers[~kept], axis=1) == 0).all()
    assert (centers[~kept] > 200).all()
    assert (faded(colors, np.ones((3, 4), dtype=bool)) == (200, 30, 30)).all()


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, exchanges = row("demo")
    path = tmp_path / "picture.png"
    draw(path, [PHOTO], plan, exchanges, BARS, "title", "subtitle")
    assert Image.open(path).format == "PNG"
    before = path.read_bytes()

    def save_half(figure: Figure, target: Path, **options: object) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", save_half)
    with pytest.raises(adsc.InputError, match="cannot be written: No space left"):
        draw(path, [PHOTO], plan, exchanges, BARS, "title", "subtitle")
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["picture.png"]


def test_figures_as_text() -> None:
    assert [si(n, "B") for n in (0, 999, 999.6, 1234, 5.43e6, 3.82e12)] == [
        "0 B", "999 B", "1 kB", "1.23 kB", "5.43 MB", "3.82 TB",
    ]  # fmt: skip
    assert [change(ratio) for ratio in (1, 0.433, 1.02)] == ["0 %", "−56.7 %", "+2.0 %"]
    assert spark([8, 4, 1, 0], 8) == "█▄▁▁"
    plan, _ = row("demo")
    assert describe(plan).startswith("120 of 256 vision tokens on average over 12 layers")
    assert "267 → 43" in layers([267] * 12, plan.tokens_per_layer()).plain
