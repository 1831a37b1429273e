import pytest

from convmae.errors import UserError, check_choice, check_installed, check_positive, check_rate


def test_the_first_setting_below_one_is_named():
    check_positive(epochs=1, batch_size=256)
    with pytest.raises(UserError, match="batch_size is 0: it must be at least 1"):
        check_positive(epochs=1, batch_size=0, keep=-3)


def test_choices_are_named():
    check_choice("form", "fast", ("fast", "published"))
    with pytest.raises(UserError, match="form cannot be 'slow': choose one of fast, published"):
        check_choice("form", "slow", ("fast", "published"))


def test_rates_end_before_one():
    check_rate(drop_path=0, ema_decay=0.9999)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=f"drop_path is {wrong}: choose it from 0 to less than 1"):
            check_rate(ema_decay=0.5, drop_path=wrong)


def test_what_is_not_installed_is_named_with_its_extra():
    check_installed("hub", "reading needs torch", "torch", "rich")
    with pytest.raises(UserError, match=r"reading needs nothing\.at\.all: pip install 'convmae\[hub\]'"):
        check_installed("hub", "reading needs nothing.at.all", "torch", "nothing_at_all")
