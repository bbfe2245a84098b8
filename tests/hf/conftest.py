"""``--support-table FILE`` writes the outcomes of the matrix (test_families.py, test_support.py) as a page.

``--shift-kept-index FILE`` moves one kept vision token of every prompt to its dropped neighbour, in the engine alone,
and writes which checks of the matrix noticed: a run of tests that are all to fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import adsc.methods.adsc
from adsc.evaluation.record import store
from adsc.planning import Plan

# Test of test_families.py → head of its column.
CHECKS = {
    "test_exact": "sdpa, 6 shapes of batch",
    "test_exact_in_eager": "eager",
    "test_exact_in_float64": "float64",
    "test_exact_with_a_video": "video",
    "test_greedy_decoding_on_the_cache": "decoding",
    "test_off_is_dense": "off = dense",
    "test_shifting_one_kept_index_fails": "shifted index fails",
}
REFUSALS = "test_refused_with_its_reason"
SIGNS = {"passed": "✓", "failed": "✗", "skipped": "○"}
Cells = dict[tuple[str, str], Counter]  # of each model type and test: how often it passed, failed or was skipped
CELLS = pytest.StashKey[Cells]()

HEAD = """# Supported models

Written by `make support`. Every number counts tests (`tests/hf/test_families.py`, `tests/hf/test_support.py`) that ran
with a small random model of the type and transformers {version}.

{types} model types are served: **{passed} checks passed, {failed} failed, {skipped} skipped**.
**{refused} types are refused**, each with one line that says why.

What a column says:

- *sdpa, eager, float64, video*: a reduced forward pass equals, at every kept position, a dense one in which the dropped
  tokens stay but are masked as keys (logits within 1e-5, in float64 1e-6; plain dense differs by 100 times that). The
  shapes of batch: one image with and without mask, several images, left and right padding with a row of text, and text
  of equal length beside an image.
- *decoding*: greedy tokens on the smaller cache are those of recomputing each step, and each layer pays for what its
  plan keeps, in bytes of storage; for a prompt alone, and in a padded batch.
- *off = dense*: text alone, a budget of 1 and a removed handle give bit-identical logits.
- *shifted index fails*: the first check fails as soon as one kept index is moved by one.

✓ passed, ✗ failed, ○ skipped, ⊘ refused, – not in these tests (videos: the type takes none). A
span, of which evenly spaced tokens stay, is an image, a frame of a video, or a tile where the inputs do not tell which
tiles are one image's.
"""
REFUSED_HEAD = """
## Refused

The lines are those of a type's default config, or of one as its checkpoints have it.
[What is refused and why](refused.md) says more. No class of the mapping needs remote code.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-table", metavar="FILE", type=Path, help="write the table of supported models")
    parser.addoption("--shift-kept-index", metavar="FILE", type=Path, help="write which checks notice a shifted index")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CELLS] = {}
    if config.getoption("--shift-kept-index"):
        right = adsc.methods.adsc.plan
        adsc.methods.adsc.plan = lambda *args, **kwargs: shifted(right(*args, **kwargs))


def shifted(plan: Plan) -> Plan:
    """The same with one kept vision token of the last stage exchanged for the one before it, which was dropped."""
    *stages, last = plan.stages
    for span, kept in zip(plan.layout.spans, last.spans, strict=True):
        places = np.searchsorted(span, kept)
        free = [place for place in places if place > 0 and place - 1 not in places]
        if free:
            other = np.where(last.kept == span[free[0]], span[free[0] - 1], last.kept)
            return replace(plan, stages=(*stages, replace(last, kept=np.sort(other))))
    return plan


def noticed(cells: Cells) -> dict[str, Any]:
    """Of each check: in how many cells it failed, as it should, and those where it did not."""
    checks = [check for check in CHECKS if check.startswith(("test_exact", "test_greedy"))]
    found = {(name, check): counts for (name, check), counts in cells.items() if check in checks}
    return {
        "transformers": transformers.__version__,
        "families": len({name for name, _ in found}),
        "cells": sum(counts.total() for counts in found.values()),
        "failed, as they should": {
            check: sum(counts["failed"] for (_, other), counts in found.items() if other == check) for check in checks
        },
        "not noticed": sorted(f"{name} {check}" for (name, check), counts in found.items() if counts["passed"]),
    }


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    check = getattr(item, "originalname", "")
    if check in (*CHECKS, REFUSALS) and (report.when == "call" or not report.passed):
        given = item.callspec.params
        name = given["name"] if check == REFUSALS else given["family"]
        item.config.stash[CELLS].setdefault((name, check), Counter())[report.outcome] += 1
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--support-table")
    if path is not None:
        path.write_text(page(session.config.stash[CELLS]))
    path = session.config.getoption("--shift-kept-index")
    if path is not None:
        figures = noticed(session.config.stash[CELLS])
        store(path, {"one kept index shifted": figures}, command="make mutation")
        session.exitstatus = 1 if figures["not noticed"] else 0


def page(cells: Cells) -> str:
    """The page, out of what ran."""
    from .test_support import NOTES, REFUSED, refusal, smallest
    from .tiny import TINY, model

    total = sum((counts for (_, check), counts in cells.items() if check in CHECKS), Counter())
    refused = sum(counts["passed"] for (_, check), counts in cells.items() if check == REFUSALS)
    notes = list(dict.fromkeys(NOTES[name] for name in sorted(NOTES)))
    lines = [
        HEAD.format(
            version=transformers.__version__,
            types=sum(name in CONFIG_MAPPING for name in TINY),
            passed=total["passed"],
            failed=total["failed"],
            skipped=total["skipped"],
            refused=refused,
        ),
        f"| model type | class | span | layers | {' | '.join(CHECKS.values())} |",
        f"|{'---|' * (4 + len(CHECKS))}",
    ]
    for name in sorted(TINY):
        note = f" [{1 + notes.index(NOTES[name])}]" if name in NOTES else ""
        marks = [cell(cells.get((name, check))) for check in CHECKS]
        network = model(name)
        facts = [f"{type(network).__name__}{note}", spans(TINY[name]), layers(network, TINY[name].axes)]
        lines.append(f"| `{name}` | {' | '.join([*facts, *marks])} |")
    lines += ["", *(f"[{1 + i}] {note}  " for i, note in enumerate(notes))]
    lines += [REFUSED_HEAD, "| model type | error line | test |", "|---|---|---|"]
    for name in sorted(REFUSED):
        mark = cell(cells.get((name, REFUSALS))).replace(SIGNS["passed"], "⊘")
        lines.append(f"| `{name}` | {refusal(smallest(name))} | {mark} |")
    return "\n".join([*lines, ""])


def cell(counts: Counter | None) -> str:
    return " ".join(f"{SIGNS[outcome]} {n}" for outcome, n in sorted((counts or {}).items())) or "–"


def spans(tiny) -> str:
    found = {"frame" if i.frames > 1 else "tile" if len(tiny.tokens(i)) > 1 else "image" for i in tiny.images}
    kinds = ["tile" if "tile" in found else min(found)]
    return ", ".join(dict.fromkeys([*kinds, *(["frame"] if tiny.video else [])]))


def layers(network, axes: int) -> str:
    from adsc.hf.decoders import whole_until, windows

    from .oracle import decoder_of

    text = decoder_of(network).config
    kinds = set(getattr(text, "layer_types", None) or [])
    words = ["full attention"] if None in windows(text) else []
    words += ["chunks"] if "chunked_attention" in kinds else ["sliding window"] if any(windows(text)) else []
    words += ["DeepStack"] if whole_until(network.config) else []
    words += ["experts"] if any(name.endswith(".experts") for name, _ in network.named_modules()) else []
    words += ["M-RoPE"] if axes > 1 else []
    return ", ".join(words)
