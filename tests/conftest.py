"""What several test files are given."""

import pytest
from chromium import Chromium, find_chromium


@pytest.fixture(scope="module")
def chromium():
    """A browser without a network, one for the tests of a file."""
    if not find_chromium():
        pytest.skip("no chromium on this machine")
    with Chromium() as browser:
        browser.offline()
        yield browser
