"""What a distiller says about itself."""

from fxdistill.report.faces.summary import summary
from fxdistill.report.report import Report

__all__ = ["Report", "summary"]
