"""The model in the box: a small, really trained LLaVA, the scenes it was trained on and the questions it answers."""
