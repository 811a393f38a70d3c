"""The command line: ``fxdistill report | modules | match``."""
