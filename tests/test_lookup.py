"""What is absent becomes a reason; what is wrong stays an error."""

import pytest

from lib.record.lookup import AssetError, AssetUnavailable, load_or_reason


def refuse(error):
    raise error


def test_what_is_there_is_given_without_a_reason():
    assert load_or_reason(divmod, 7, 2) == ((3, 1), "")


def test_what_is_absent_is_given_as_its_reason():
    assert load_or_reason(refuse, AssetUnavailable("no network: bring the file")) == (
        None,
        "no network: bring the file",
    )


@pytest.mark.parametrize("error", [AssetError("SHA-256 differs"), OSError("disk"), KeyError("column")])
def test_what_is_wrong_stays_an_error(error):
    with pytest.raises(type(error)):
        load_or_reason(refuse, error)
