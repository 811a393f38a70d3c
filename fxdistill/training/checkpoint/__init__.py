"""Checkpoints of a run: numbered folders of safetensors and JSON, written whole or not at all."""
