"""The picture of the main table: what it shows is what the table says."""

from __future__ import annotations

import json

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from adsc import InputError
from adsc.report.picture import DENSE, REDUCED
from adsc.report.slope import GROUPS, compose, draw, read_rows

SHARES = {"1": 1.0, "1/3": 0.33, "2/9": 0.22, "1/9": 0.11}


def row(name, retained, value):
    mean = {"mean": value, "margin_95": 0.01, "questions": 100}
    goal = {"goal": {"of dense": 0.99, "reached": value >= 0.99}} if name == "adsc" else {}
    groups = dict.fromkeys(("overall", *GROUPS), mean)
    return {"name": name, "retained": retained, "share": SHARES[retained], "of dense": groups, **goal}


ROWS = [row("untrained", "1", 1.0), row("dense", "1", 1.0)]
ROWS += [row("untrained", r, v) for r, v in (("1/3", 0.9), ("2/9", 0.8), ("1/9", 0.6))]
ROWS += [row("adsc", r, v) for r, v in (("1/3", 0.995), ("2/9", 0.99), ("1/9", 0.98))]


def points(box, color):
    (found,) = [line for line in box.get_lines() if to_hex(line.get_color()) == color and len(line.get_xdata()) > 2
                and line.get_linestyle() == "-"]  # fmt: skip
    return dict(zip(found.get_xdata(), found.get_ydata(), strict=True))


def test_every_panel_shows_both_lines():
    figure = compose(ROWS)
    assert [box.get_title(loc="left") for box in figure.axes] == ["overall", *GROUPS]
    for box in figure.axes:
        assert points(box, DENSE) == pytest.approx({1.0: 100, 0.33: 90, 0.22: 80, 0.11: 60})
        assert points(box, REDUCED) == pytest.approx({0.33: 99.5, 0.22: 99, 0.11: 98})
        left, right = box.get_xlim()
        assert left > 1 > 0.11 > right  # fewer tokens to the right
        bottom, top = box.get_ylim()
        assert bottom < 59
        assert top > 100


def test_groups_that_are_not_there_get_no_panel():
    rows = [{**r, "of dense": {g: m for g, m in r["of dense"].items() if g != "difficult"}} for r in ROWS]
    assert len(compose(rows).axes) == len(GROUPS)


def test_it_is_written_and_wrong_input_told(tmp_path):
    table = tmp_path / "main.json"
    table.write_text(json.dumps({"rows": [*ROWS, {"name": "adsc", "retained": "1/9"}]}))
    draw(tmp_path / "slope.png", read_rows(table))
    with Image.open(tmp_path / "slope.png") as image:
        assert 1300 < image.width < 1500  # twice the 700 pixels of a page
    for text, said in (("{}", "no main table"), ('{"rows": []}', "no ratios")):
        table.write_text(text)
        with pytest.raises(InputError, match=said):
            read_rows(table)
    with pytest.raises(InputError, match="no main table"):
        read_rows(tmp_path / "absent.json")
