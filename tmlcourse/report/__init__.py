"""One call, one report: how far can this classifier be trusted, measured from eight sides, on one page."""

from .board import leaderboard
from .call import TrustReport, side_by_side, trust_report
from .sections import Row, expected_calibration_error

__all__ = ["Row", "TrustReport", "expected_calibration_error", "leaderboard", "side_by_side", "trust_report"]
