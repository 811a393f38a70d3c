"""Which losses a step has, on which values, for which tokens, with which weights."""
