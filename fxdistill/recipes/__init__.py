"""Ways to train that need more than one call of ``wrap``, or more than one model's losses."""
