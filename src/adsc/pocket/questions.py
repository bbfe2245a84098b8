"""Questions about a scene, in seven tasks named after what they stand for.

Every question has one right answer that the image alone decides. Answers are balanced: the answer is drawn first and
a question with that answer is looked for, so that guessing from the words alone does not pay.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from adsc.pocket.scenes import COLORS, SHAPES, SIZES, WORDS, Scene, Thing

ROWS = "abcdefgh"


@dataclass(frozen=True)
class Question:
    """A question, its answer, the task it belongs to and the form of its wording (chance is counted per form)."""

    task: str
    form: str
    text: str
    answer: str


def name(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def cell_name(row: int, column: int) -> str:
    """A cell of the 8 x 8 grid as on a chess board seen from above: row ``a`` is the top, column ``1`` the left."""
    return f"{ROWS[row]}{column + 1}"


def _unique(scene: Scene) -> list[Thing]:
    """Objects that colour and shape alone tell from all others."""
    names = [name(t) for t in scene.things]
    return [t for t in scene.things if names.count(name(t)) == 1]


def _existence(rng: random.Random, scene: Scene) -> Question | None:
    names = {name(t) for t in scene.things}
    if rng.random() < 0.5:
        return Question("existence", "exists", f"is there a {rng.choice(sorted(names))}?", "yes")
    # The wrong pair is made of a colour and a shape that are both there, where such a pair exists.
    pairs = {f"{a.color} {b.shape}" for a in scene.things for b in scene.things} - names
    if not pairs or rng.random() < 0.3:
        pairs = {f"{c} {s}" for c in COLORS for s in SHAPES} - names
    return Question("existence", "exists", f"is there a {rng.choice(sorted(pairs))}?", "no")


def _attribute(rng: random.Random, scene: Scene) -> Question | None:
    form = rng.choice(("color", "shape", "size"))
    if form == "size":
        size = rng.choice(SIZES)
        fitting = [t for t in _unique(scene) if t.size == size]
        if not fitting:
            return None
        return Question("attribute", form, f"what size is the {name(rng.choice(fitting))}?", size)
    if form == "color":
        wanted = rng.choice(list(COLORS))
        known = [(t.size, t.shape) for t in scene.things]
        fitting = [t for t in scene.things if t.color == wanted and known.count((t.size, t.shape)) == 1]
        if not fitting:
            return None
        thing = rng.choice(fitting)
        return Question("attribute", form, f"what color is the {thing.size} {thing.shape}?", wanted)
    wanted = rng.choice(SHAPES)
    known = [(t.size, t.color) for t in scene.things]
    fitting = [t for t in scene.things if t.shape == wanted and known.count((t.size, t.color)) == 1]
    if not fitting:
        return None
    thing = rng.choice(fitting)
    return Question("attribute", form, f"what shape is the {thing.size} {thing.color} one?", wanted)


def _counting(rng: random.Random, scene: Scene) -> Question | None:
    wanted = rng.randrange(5)
    form = rng.choice(("color", "shape"))
    if form == "color":
        fitting = [f"{c} objects" for c in COLORS if sum(t.color == c for t in scene.things) == wanted]
    else:
        fitting = [
            f"{s}s" if s != "cross" else "crosses" for s in SHAPES if sum(t.shape == s for t in scene.things) == wanted
        ]
    return Question("counting", form, f"how many {rng.choice(fitting)} are there?", str(wanted)) if fitting else None


def _relation(rng: random.Random, scene: Scene) -> Question | None:
    things = _unique(scene)
    if len(things) < 2:
        return None
    one, other = rng.sample(things, 2)
    form = rng.choice(("left of", "above"))
    gap = one.x - other.x if form == "left of" else one.y - other.y
    if abs(gap) < 10:
        return None
    return Question("relation", form, f"is the {name(one)} {form} the {name(other)}?", "yes" if gap < 0 else "no")


def _comparison(rng: random.Random, scene: Scene) -> Question | None:
    form = rng.choice(("larger", "more"))
    wanted = rng.choice(("yes", "no"))
    if form == "larger":
        pairs = [(a, b) for a in _unique(scene) for b in _unique(scene) if a.size != b.size]
        fitting = [(a, b) for a, b in pairs if (a.size == "large") == (wanted == "yes")]
        if not fitting:
            return None
        one, other = rng.choice(fitting)
        return Question("comparison", form, f"is the {name(one)} larger than the {name(other)}?", wanted)
    counts = {c: sum(t.color == c for t in scene.things) for c in COLORS}
    present = [c for c in COLORS if counts[c]]
    fitting_colors = [
        (a, b)
        for a in present
        for b in present
        if counts[a] != counts[b] and (counts[a] > counts[b]) == (wanted == "yes")
    ]
    if not fitting_colors:
        return None
    first, second = rng.choice(fitting_colors)
    return Question("comparison", form, f"are there more {first} objects than {second} objects?", wanted)


def _reading(rng: random.Random, scene: Scene) -> Question | None:
    if rng.random() < 0.5:
        return Question("reading", "number", "what number is printed?", scene.number.text)
    return Question("reading", "word", "what word is printed?", scene.word.text.lower())


def _grounding(rng: random.Random, scene: Scene) -> Question | None:
    things = _unique(scene)
    if not things:
        return None
    thing = rng.choice(things)
    return Question("grounding", "cell", f"where is the {name(thing)}?", cell_name(*thing.cell))


TASKS: dict[str, Callable[[random.Random, Scene], Question | None]] = {
    "existence": _existence,
    "attribute": _attribute,
    "counting": _counting,
    "relation": _relation,
    "comparison": _comparison,
    "reading": _reading,
    "grounding": _grounding,
}


def questions(
    scene: Scene, count: int, seed: int | None = None, tasks: tuple[str, ...] = tuple(TASKS)
) -> list[Question]:
    """``count`` different questions about a scene, the tasks drawn evenly.

    Parameters
    ----------
    scene : Scene
    count : int
        How many; fewer come back when a scene has no more to ask (after 20 tries for each).
    seed : int, optional
        Seed of the draw; by default the scene's own.
    tasks : tuple of str
        The tasks to draw from, names of :data:`TASKS`.
    """
    rng = random.Random(f"questions {scene.seed if seed is None else seed}")
    found: dict[str, Question] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        question = TASKS[rng.choice(tasks)](rng, scene)
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())


def vocabulary() -> list[str]:
    """Every text the questions and answers can hold, for the tokenizer."""
    nouns = [*SHAPES, *(f"{s}s" for s in SHAPES), "crosses", *COLORS, *SIZES, *(w.lower() for w in WORDS)]
    wording = [
        "is there a ?", "what size color shape is the one?", "how many objects are there?",
        "is the left of above the?", "is the larger than the?", "are there more objects than objects?",
        "what number word is printed?", "where is the?", "yes no",
    ]  # fmt: skip
    return [*wording, *nouns, *ROWS, *"0123456789"]
