"""What a rejuvenation did, as data and as a table."""

from lightning_rejuv.report.report import RejuvenationReport

__all__ = ["RejuvenationReport"]
