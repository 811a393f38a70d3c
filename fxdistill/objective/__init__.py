"""The objective: which losses a step has, on which values and tokens, and with which weights."""
