"""Numbers as people read them, and the tables that show them dense beside reduced."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

from rich.table import Table
from rich.text import Text

from ..planning import Plan

REDUCED = "bold blue"


def side_by_side(*names: str) -> Table:
    """An empty table that ends in the columns dense and reduced."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in names:
        table.add_column(name)
    table.add_column("dense")
    table.add_column("reduced", style=REDUCED)
    return table


def add_cost(table: Table, name: str, dense: str, reduced: str, ratio: float) -> None:
    """A row of a table made with ``side_by_side("")``; a fourth column tells the change."""
    if len(table.columns) == 3:
        table.add_column("change", justify="right")
    table.add_row(name, dense, reduced, change(ratio))


def layers(dense: Sequence[int], reduced: Sequence[int]) -> Text:
    """Tokens in each layer as two rows of blocks, one block a layer, and their change."""
    lines = [("tokens in each layer\n", "bold")]
    for name, counts, style in (("dense", dense, "dim"), ("reduced", reduced, REDUCED)):
        ends = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} → {counts[-1]}"
        lines += [(f"  {name:9}", ""), (spark(counts, max(dense)), style), (f"  {ends}", style)]
        lines += [("\n", "")] if name == "dense" else [(f"   {change(sum(reduced) / sum(dense))}", "")]
    return Text.assemble(*lines, no_wrap=True)


def spark(counts: Sequence[int], top: int) -> str:
    """One block for each count, as high as it is of ``top``."""
    return "".join("▁▂▃▄▅▆▇█"[max(0, -(-8 * count // top) - 1)] for count in counts)


def change(ratio: float) -> str:
    """``0.4`` is ``−60.0 %``."""
    return "0 %" if ratio == 1 else f"{100 * (ratio - 1):+.1f} %".replace("-", "−")


def si(value: float, unit: str) -> str:
    """Three digits and a decimal prefix."""
    prefixes = iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while value >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}{unit}"


def verdict(said: str, truth: str) -> Text:
    """An answer with its mark."""
    return Text.assemble(("✓ ", "bold green") if said == truth else ("✗ ", "bold red"), said)


def describe(plan: Plan) -> str:
    """A reduction in one line."""
    runs = groupby(plan.schedule, key=itemgetter(1))
    steps = ", ".join(f"{keep} at layer {', '.join(str(layer) for layer, _ in run)}" for keep, run in runs)
    vision = plan.vision_tokens_per_layer()
    return (
        f"{sum(vision) / len(vision):.0f} of {vision[0]} vision tokens on average over {plan.num_layers} layers "
        f"({100 * float(plan.retained):.1f} %): keep {steps} (pattern {plan.pattern})"
    )
