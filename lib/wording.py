"""Rates, changes and their intervals in words; imports almost nothing, for the terminal's progress.

The unit follows the rate. A minus is the hyphen that can be typed and searched for; a plus precedes a change only.
"""

from typing import Protocol


class Rate(Protocol):
    """As ``lib.stats.Rate``, whose module takes most of a second to import."""

    successes: int
    n: int
    low: float
    high: float
    share: float


def points(share: float) -> str:
    """A share or a difference of shares, times 100: one decimal, more where it would else be a false 0."""
    # What rounding leaves of a 0 is a 0.
    value = 100 * share if abs(share) > 1e-9 else 0.0
    shown = f"{value:,.1f}"
    return f"{value:.1g}" if value and not float(shown.replace(",", "")) else shown


def signed_points(difference: float) -> str:
    """A change of a share, times 100, with its sign; 0 has none."""
    return f"{'+' if difference > 1e-9 else ''}{points(difference)}"


def percent(share: float | None) -> str:
    """A share in [0, 1] with its unit; ``not measured`` for None."""
    return "not measured" if share is None else f"{points(share)} %"


def interval(low: float, high: float) -> str:
    """An interval of a share or of a change, times 100, as ``-10.2 to 20.2``: the unit precedes it."""
    return f"{points(low)} to {points(high)}"


def moved(gained: int, lost: int) -> str:
    """Rows that only the one run got right, and only the other, as ``+9 -4``."""
    return f"+{gained:,} -{lost:,}"


def count(successes: int, total: int) -> str:
    """What a rate was counted from, as ``1 of 1,319``."""
    return f"{successes:,} of {total:,}"


def rate_text(rate: Rate, *, counted: bool = False) -> str:
    """``54.4 % (95 % interval 48.3 to 60.3, n = 263)``; ``counted``: ``143 of 263 = 54.4 % (48.3 to 60.3)``."""
    share, between = percent(rate.share), interval(rate.low, rate.high)
    if counted:
        return f"{count(rate.successes, rate.n)} = {share} ({between})"
    return f"{share} (95 % interval {between}, n = {rate.n:,})"


def speed_text(num_rows: int = 0, num_tokens: int = 0, wall_s: float = 0.0) -> str:
    """What an evaluation cost, in words; rows that were already there cost nothing."""
    if num_rows == 0:
        return "Every row was already there: nothing was generated."
    speed = f"{num_rows / wall_s:.2f} rows/s, {num_tokens / wall_s:.0f} tokens/s"
    return f"{num_rows:,} rows and {num_tokens:,} tokens in {wall_s:.1f} s: {speed}."
