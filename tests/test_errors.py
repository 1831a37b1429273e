import multiprocessing
from pathlib import Path

import pytest

from convmae.errors import (
    UserError,
    check_choice,
    check_installed,
    check_local,
    check_positive,
    check_rate,
    leave_if_started_again,
)


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


def test_addresses_are_no_paths_and_are_shown_as_they_were_given():
    for path in ("runs/a", "/a//b", Path("C:/Users"), "C:/Users", "a:b", "x/https:/y"):
        check_local("output", path)
    for address in ("https://a.b/c", "s3://bucket/run", "hf://user/name"):
        for given in (address, Path(address)):
            with pytest.raises(UserError, match=f"output cannot be {address}, .*: give a path on this machine"):
                check_local("output", given)


def test_only_a_process_that_is_being_started_is_left(monkeypatch):
    leave_if_started_again()
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(SystemExit):
        leave_if_started_again()
