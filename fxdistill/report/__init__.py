"""What a distiller says about itself."""

from fxdistill.report.data import Report
from fxdistill.report.summary import summary

__all__ = ["Report", "summary"]
