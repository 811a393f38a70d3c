"""Read models and captured graphs: each file answers one question of the report."""
