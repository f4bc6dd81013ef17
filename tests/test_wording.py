"""Rates in words: one form, no false zero, and no plus but before a change."""

import subprocess
import sys

import pytest

from lib import wording
from lib.record.paths import PROJECT_ROOT
from lib.stats import Rate


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.042, "4.2"), (0.0, "0.0"), (0.00004, "0.004"), (-0.0002, "-0.02"), (-0.1, "-10.0"), (1e-17, "0.0")],
)
def test_points_never_round_to_a_false_zero(share, text):
    assert wording.points(share) == text
    assert wording.percent(share) == f"{text} %"


def test_what_was_not_measured_is_no_rate():
    assert wording.percent(None) == "not measured"


def test_a_change_has_its_sign_and_its_interval_only_a_minus():
    assert [wording.signed_points(change) for change in (0.042, -0.102, 0.0, -1e-17)] == ["+4.2", "-10.2", "0.0", "0.0"]
    assert wording.interval(-0.102, 0.202) == "-10.2 to 20.2"
    assert wording.moved(1234, 4) == "+1,234 -4"


def test_a_rate_is_written_with_its_interval_and_n():
    rate = Rate.of_counts(143, 263)
    assert wording.rate_text(rate) == "54.4 % (95 % interval 48.3 to 60.3, n = 263)"
    assert wording.rate_text(rate, counted=True) == "143 of 263 = 54.4 % (48.3 to 60.3)"
    assert wording.rate_text(Rate.of_counts(1234, 1319), counted=True).startswith("1,234 of 1,319 = 93.6 % (")


def test_counts_have_their_thousands():
    assert wording.count(1, 1319) == "1 of 1,319"


def test_the_terminal_pays_nothing_for_it():
    code = "import sys, lib.wording; sys.exit(bool({'numpy', 'scipy', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT).returncode == 0
