"""Helpers for a training loop."""
