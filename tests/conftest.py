"""What several test files are given."""

import pytest
from chromium import Chromium, find_chromium

from lib.driver import kernel_server


@pytest.fixture(scope="module")
def chromium():
    """A browser without a network, one for the tests of a file."""
    if not find_chromium():
        pytest.skip("no chromium on this machine")
    with Chromium() as browser:
        browser.offline()
        yield browser


@pytest.fixture(scope="module")
def one_thread():
    """Threads of torch only wait for each other on the products of tiny models."""
    import torch  # most files need none

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def forked_kernels():
    """Kernels of this process are forked while the tests of a file run: real notebooks then start in half a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernel_server.SERVER_VARIABLE, "1")
        kernel_server.start()
        yield
        kernel_server.stop()
