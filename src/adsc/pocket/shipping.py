"""Put a trained adapter beside the model in the box, as it goes into the wheel.

    python -m adsc.pocket.shipping runs/pocket-elastic-0/adapter

The table of figures in its card is that of ``results/pocket/main.json``, where that is there (it is made by ``python -m
adsc.pocket.study table``). Another file may be named: ``{"row": {"column": figure, …}, …}``, or such a table under the
key ``card`` of something larger.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from adsc.errors import InputError
from adsc.pocket import ADAPTER_FOLDER, MODEL_FOLDER
from adsc.training.exporting import Figures, ship

NAME = "the model in the box"
FIGURES = Path("results/pocket/main.json")


def read_figures(path: Path) -> Figures:
    """A table of measured figures from a file of JSON.

    Raises
    ------
    InputError
        When there is none in it.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"figures {path} cannot be read: {str(error).splitlines()[0]}") from None
    values = values.get("card", values) if isinstance(values, dict) else None
    if not isinstance(values, dict) or not values or not all(isinstance(row, dict) for row in values.values()):
        raise InputError(f'figures {path} hold no table; write {{"row": {{"column": figure}}}}, or that under "card"')
    figures: Figures = values
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="result folder of adsc train")
    parser.add_argument("--figures", type=Path, metavar="FILE.json", help=f"for the card; default: {FIGURES} if there")
    parser.add_argument("--out", type=Path, default=ADAPTER_FOLDER, help="default: where adsc looks for it")
    given = parser.parse_args(arguments)
    try:
        file = given.figures or (FIGURES if FIGURES.is_file() else None)
        figures = read_figures(file) if file else None
        out = ship(given.folder, given.out, MODEL_FOLDER, name=NAME, figures=figures)
    except InputError as error:
        sys.exit(f"error: {error}")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB, {f'figures of {file}' if file else 'no figures yet'}")


if __name__ == "__main__":
    main()
