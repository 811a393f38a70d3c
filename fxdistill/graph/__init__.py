"""Graphs as values: programs, the pipeline of passes, and what can be read from a graph."""
