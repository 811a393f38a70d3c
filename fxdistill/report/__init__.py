"""Reports on a distiller: what its step compares, costs and writes to."""

from fxdistill.report.faces.summary import summary
from fxdistill.report.report import Report

__all__ = ["Report", "summary"]
