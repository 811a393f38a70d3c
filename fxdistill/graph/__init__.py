"""Graphs as values: programs, the passes that run over them, and what can be read from one."""
