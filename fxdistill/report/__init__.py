"""What a distiller says about itself."""

from fxdistill.report.summary import summary

__all__ = ["summary"]
