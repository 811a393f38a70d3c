"""From one step of Python to compiled code: capture, split, compose, lower."""
