"""Scenes: many small objects and two printed signs on a 128 x 128 image, drawn by Pillow from a seed.

A scene is data first (:func:`scene`, pure and cheap) and pixels second (:func:`render`), so that questions,
training targets and pictures all come from the same facts.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 128
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE  # 16 x 16 vision tokens
CELL = 16  # pixels; the grounding grid is 8 x 8

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 44),
    "green": (38, 150, 62),
    "blue": (44, 82, 214),
    "yellow": (236, 204, 40),
    "purple": (146, 56, 170),
    "orange": (242, 132, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
RADIUS = {"small": 6.0, "large": 10.0}
WORDS = [
    "BANK",
    "CAFE",
    "HOTEL",
    "TAXI",
    "OPEN",
    "EXIT",
    "PARK",
    "SHOP",
    "FOOD",
    "MILK",
    "NEWS",
    "TOUR",
    "SALE",
    "STOP",
    "LAMP",
    "FIRE",
    "GATE",
    "HILL",
    "LAKE",
    "MOON",
    "NORTH",
    "PORT",
    "ROAD",
    "TRAIN",
]
CHARACTERS = tuple("0123456789" + "".join(sorted(set("".join(WORDS)))))

CHAR_WIDTH = 8  # pixels from one printed character to the next, so that no patch holds two centres
SIGN_HEIGHT = 14
SPLIT_SEEDS = {"train": 10_000_000, "validation": 2_000_000, "test": 1_000_000}
"""First seed of each split; the ranges never meet (validation and test hold far fewer than a million scenes)."""

_DRAW = 4  # supersampling, so that a rotated shape of 12 pixels keeps its outline


@dataclass(frozen=True)
class Thing:
    """One object: what it is, where its centre lies (pixels) and how far it is turned (radians)."""

    color: str
    shape: str
    size: str
    x: int
    y: int
    radius: float
    angle: float

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column of the 8 x 8 grounding grid."""
        return self.y // CELL, self.x // CELL


@dataclass(frozen=True)
class Sign:
    """A printed word or number; ``x``, ``y`` is the top left corner of its plate."""

    text: str
    x: int
    y: int
    dark: bool

    @property
    def width(self) -> int:
        return CHAR_WIDTH * len(self.text) + 4

    def centers(self) -> list[tuple[int, int]]:
        """Centre of each character, in pixels."""
        return [
            (self.x + 2 + CHAR_WIDTH * i + CHAR_WIDTH // 2, self.y + SIGN_HEIGHT // 2) for i in range(len(self.text))
        ]


@dataclass(frozen=True)
class Scene:
    """Everything that is in one image."""

    seed: int
    background: tuple[str, tuple[int, int, int], tuple[int, int, int]]
    things: tuple[Thing, ...]
    number: Sign
    word: Sign


def scene(seed: int, most: int = 9) -> Scene:
    """The scene of a seed: 5 to 9 objects that may partly overlap, a number of three digits and a word.

    Each scene draws its objects from a few colours and a few shapes, so that counts above one are common. ``most``
    limits the number of objects, for easy scenes to begin a training with.
    """
    rng = random.Random(seed)
    kind = rng.choice(("plain", "vertical", "horizontal", "stripes", "checks"))
    level = rng.choice((45, 225))
    shades = [_tint(rng, level) for _ in range(2)]
    signs: list[Sign] = []
    for text in (f"{rng.randrange(1000):03d}", rng.choice(WORDS)):
        dark = rng.random() < 0.5
        while True:
            sign = Sign(text, 0, 0, dark)
            x = 2 * rng.randrange((IMAGE_SIZE - sign.width) // 2 + 1)
            y = 2 * rng.randrange((IMAGE_SIZE - SIGN_HEIGHT) // 2 + 1)
            sign = Sign(text, x, y, dark)
            if all(
                x >= s.x + s.width + 4 or s.x >= x + sign.width + 4 or abs(s.y - y) >= SIGN_HEIGHT + 4 for s in signs
            ):
                break
        signs.append(sign)
    colors = rng.sample(list(COLORS), rng.randint(3, 5))
    shapes = rng.sample(SHAPES, rng.randint(3, 5))
    wanted, things = min(rng.randint(5, 9), most), list[Thing]()
    for _ in range(400):
        if len(things) == wanted:
            break
        size = rng.choice(SIZES)
        radius = RADIUS[size] + rng.uniform(-0.7, 0.7)
        margin = math.ceil(radius) + 1
        x, y = rng.randint(margin, IMAGE_SIZE - 1 - margin), rng.randint(margin, IMAGE_SIZE - 1 - margin)
        thing = Thing(rng.choice(colors), rng.choice(shapes), size, x, y, radius, rng.uniform(0, 2 * math.pi))
        on_border = any(v % CELL < 2 or v % CELL >= CELL - 2 for v in (x, y))  # its cell would be a matter of taste
        if not on_border and not any(_covers(s, thing) for s in signs) and not any(_crowds(t, thing) for t in things):
            things.append(thing)
    return Scene(seed, (kind, shades[0], shades[1]), tuple(things), signs[0], signs[1])


def _tint(rng: random.Random, level: int) -> tuple[int, int, int]:
    red, green, blue = (level + rng.randint(-22, 22) for _ in range(3))
    return red, green, blue


def _covers(sign: Sign, thing: Thing) -> bool:
    dx = max(sign.x - thing.x, 0, thing.x - sign.x - sign.width)
    dy = max(sign.y - thing.y, 0, thing.y - sign.y - SIGN_HEIGHT)
    return math.hypot(dx, dy) < thing.radius + 1


def _crowds(one: Thing, other: Thing) -> bool:
    return math.hypot(one.x - other.x, one.y - other.y) < max(12.0, 0.8 * (one.radius + other.radius))


def render(scene: Scene) -> Image.Image:
    """Draw a scene: RGB, 128 x 128."""
    kind, first, second = scene.background
    side = IMAGE_SIZE * _DRAW
    image = Image.new("RGB", (side, side), first)
    draw = ImageDraw.Draw(image)
    if kind in ("vertical", "horizontal"):
        for i in range(0, side, 2 * _DRAW):
            mix = i / side
            color = tuple(round(a + (b - a) * mix) for a, b in zip(first, second, strict=True))
            draw.rectangle(
                (0, i, side, i + 2 * _DRAW) if kind == "vertical" else (i, 0, i + 2 * _DRAW, side), fill=color
            )
    elif kind in ("stripes", "checks"):
        step = 8 * _DRAW
        for row in range(0, side, step):
            for column in range(0, side, step if kind == "checks" else side):
                if (row // step + column // step) % 2:
                    draw.rectangle(
                        (column, row, column + (step if kind == "checks" else side) - 1, row + step - 1), fill=second
                    )
    for thing in scene.things:
        _draw_thing(draw, thing)
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    draw = ImageDraw.Draw(image)
    for sign in (scene.number, scene.word):
        ink, plate = ((250, 250, 250), (20, 20, 20)) if sign.dark else ((15, 15, 15), (245, 245, 245))
        draw.rectangle((sign.x, sign.y, sign.x + sign.width - 1, sign.y + SIGN_HEIGHT - 1), fill=plate)
        for character, (x, y) in zip(sign.text, sign.centers(), strict=True):
            draw.text((x, y), character, fill=ink, font=_font(), anchor="mm")
    return image


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=12)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, r, color = thing.x * _DRAW, thing.y * _DRAW, thing.radius * _DRAW, COLORS[thing.color]
    edge = tuple(round(v * 0.55) for v in color)
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color, outline=edge, width=3)
    elif thing.shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=color, width=round(0.42 * r))
    else:
        points = [
            (x + r * a * math.sin(t + thing.angle), y - r * a * math.cos(t + thing.angle))
            for a, t in _outline(thing.shape)
        ]
        draw.polygon(points, fill=color, outline=edge, width=3)


@lru_cache(maxsize=8)
def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in polar form: distance from the centre (1 = radius) and angle."""
    if shape == "square":
        return [(1.1, math.pi * (0.25 + 0.5 * i)) for i in range(4)]
    if shape == "triangle":
        return [(1.15, math.pi * 2 / 3 * i) for i in range(3)]
    if shape == "star":
        return [(1.15 if i % 2 == 0 else 0.48, math.pi / 5 * i) for i in range(10)]
    inner, outer = 0.3, 1.05  # cross: four arms, twelve corners
    corners = [(-inner, outer), (inner, outer), (inner, inner), (outer, inner), (outer, -inner), (inner, -inner)]
    corners += [(-a, -b) for a, b in corners]
    return [(math.hypot(a, b), math.atan2(a, b)) for a, b in corners]
