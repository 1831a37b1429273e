import pytest

from convmae.errors import UserError, check_choice, check_positive


def test_the_first_setting_below_one_is_named():
    check_positive(epochs=1, batch_size=256)
    with pytest.raises(UserError, match="batch_size is 0: it must be at least 1"):
        check_positive(epochs=1, batch_size=0, keep=-3)


def test_choices_are_named():
    check_choice("form", "fast", ("fast", "published"))
    with pytest.raises(UserError, match="form cannot be 'slow': choose one of fast, published"):
        check_choice("form", "slow", ("fast", "published"))
