"""The model in the box: a small, really trained LLaVA, the scenes it was trained on and the questions it answers."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
"""Checkpoint of the model in the box; loads like any other, with ``AutoModelForImageTextToText.from_pretrained``."""

ADAPTER_FOLDER = Path(__file__).parent / "adapter"
"""Its adapter, trained to compress vision tokens at every budget: ``adsc.load(ADAPTER_FOLDER, retained="1/9")``."""
