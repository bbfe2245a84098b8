"""Attention-driven self-compression of vision tokens in multimodal LLMs."""
