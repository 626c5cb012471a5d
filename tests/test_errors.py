"""Errors of users are ValueErrors (and TypeErrors) of a class of their own."""

from __future__ import annotations

import pytest

from dartprune.errors import UserError, UserTypeError, check_output_file, make_output_folder, read_user_text


def test_both_are_what_python_callers_catch():
    assert issubclass(UserError, ValueError) and not issubclass(UserError, TypeError)
    assert issubclass(UserTypeError, UserError) and issubclass(UserTypeError, TypeError)


def test_checking_an_output_leaves_no_trace(tmp_path):
    new, old = tmp_path / "new.png", tmp_path / "old.png"
    old.write_text("kept")
    check_output_file(new)
    check_output_file(old)
    assert not new.exists() and old.read_text() == "kept"
    make_output_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing.txt: there is no such file"):
        read_user_text(tmp_path / "missing.txt")
    with pytest.raises(UserError, match=r"is a directory"):
        read_user_text(tmp_path)
    with pytest.raises(UserError, match=r"there is no folder"):
        check_output_file(tmp_path / "no" / "a.png")
    with pytest.raises(UserError, match=r"nothing can be written there"):
        check_output_file(tmp_path)
