"""Mappings from student values to teacher values: writing, proposing, resolving, saving them."""
