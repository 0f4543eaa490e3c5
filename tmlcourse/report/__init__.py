"""One call, one report: how far can this classifier be trusted, measured from eight sides, on one page."""

from .board import leaderboard
from .call import TrustReport, shares, side_by_side, trust_report
from .sections import Row, expected_calibration_error

__all__ = ["Row", "TrustReport", "expected_calibration_error", "leaderboard", "shares", "side_by_side", "trust_report"]
