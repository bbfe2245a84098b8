"""Teach a model to compress itself: recipes, curricula, self-distillation, on TRL, PEFT and accelerate."""
