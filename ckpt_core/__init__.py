"""Checkpoints of transformers models: stored, checked, converted and published."""
