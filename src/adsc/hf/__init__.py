"""Engine for transformers: reduces the vision tokens inside the decoder of a live model."""
