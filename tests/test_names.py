"""Registries, and errors that point to the nearest right name."""

from __future__ import annotations

import pytest

from dartprune.names import Registry, unknown


def test_the_nearest_name_is_offered_only_where_one_is_near():
    message = str(unknown("scorer", "magnitud", ["peak", "magnitude"]))
    assert message == "unknown scorer 'magnitud': did you mean 'magnitude'? known: magnitude, peak"
    assert str(unknown("scorer", "zzz", ["magnitude"])) == "unknown scorer 'zzz': known: magnitude"
    assert str(unknown("scorer", "zzz", [])) == "unknown scorer 'zzz': known: none"
    assert "\n" not in message


def test_names_that_are_no_text():
    assert "unknown scorer 3: " in str(unknown("scorer", 3, ["magnitude"]))
    assert "unknown scorer None: " in str(unknown("scorer", None, ["magnitude"]))


def test_a_registry_gives_back_what_it_was_given():
    registry: Registry[object] = Registry("thing")
    one, two = object(), object()
    assert registry.register("two", two) is two
    registry.register("one", one)
    assert registry.get("one") is one and registry.name_of(two) == "two"
    assert registry.names() == ["one", "two"]


def test_a_registry_refuses_what_it_does_not_know_and_what_it_has():
    registry: Registry[object] = Registry("thing")
    registry.register("one", 1)
    with pytest.raises(ValueError, match="thing 'one' is registered already: choose another name"):
        registry.register("one", 2)
    assert registry.get("one") == 1
    with pytest.raises(ValueError, match="unknown thing 'on': did you mean 'one'") as caught:
        registry.get("on")
    assert caught.value.__suppress_context__
    with pytest.raises(ValueError, match="2 is not a registered thing: register it first"):
        registry.name_of(2)


def test_registries_do_not_share_names():
    first: Registry[int] = Registry("first")
    second: Registry[int] = Registry("second")
    first.register("one", 1)
    assert second.names() == []


def test_a_value_is_found_by_identity_not_by_equality():
    registry: Registry[list[int]] = Registry("thing")
    a: list[int] = []
    b: list[int] = []
    registry.register("a", a)
    registry.register("b", b)
    assert registry.name_of(b) == "b"
