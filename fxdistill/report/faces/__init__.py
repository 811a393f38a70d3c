"""The faces of a report: a terminal, and one HTML page."""
