"""Compile one step of Python: capture, split, compose and lower it."""
