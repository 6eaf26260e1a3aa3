"""Mistakes in nested tables are reported by the user's own keys, with the nearest key of the very table that they are in."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, PositiveInt, model_validator

from gemel.config.base import Config
from gemel.config.errors import ConfigError


class Cat(Config):
    kind: Literal["cat"]
    lives: PositiveInt = 9


class Dog(Config):
    kind: Literal["dog"]
    tricks: dict[str, int] = Field(default={})


Animal = Annotated[Cat | Dog, Field(discriminator="kind")]


class House(Config):
    rooms: PositiveInt = 1
    pet: Animal | None = None
    guests: Annotated[tuple[Animal, ...], Field(min_length=1)] = (Cat(kind="cat"),)
    garden: House | None = None
    height_m: float = 3.0

    @model_validator(mode="after")
    def _room_for_all(self) -> House:
        if len(self.guests) > self.rooms:
            raise ValueError(f"{len(self.guests)} guests do not fit into {self.rooms} rooms; add rooms")
        return self


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"room": 2}, "House has no key 'room': did you mean 'rooms'?"),
        ({"xyz": 2}, "House has no key 'xyz': known keys: garden, guests, height_m, pet, rooms"),
        ({"pet": {"kind": "cat", "live": 2}}, "Cat has no key 'pet.live': did you mean 'lives'?"),
        ({"garden": {"pet": {"kind": "dog", "lives": 2}}}, "Dog has no key 'garden.pet.lives': known keys: kind, tricks"),
        ({"guests": [{"kind": "cat", "live": 2}]}, "Cat has no key 'guests.0.live': did you mean 'lives'?"),
        ({"pet": {"lives": 2}}, "pet has no kind; it is one of cat, dog"),
        ({"guests": [{"kind": "cart"}]}, "guests.0.kind = 'cart' is not known: did you mean 'cat'?"),
        ({"pet": {"kind": "fish"}}, "pet.kind = 'fish' is not known: it is one of cat, dog"),
        ({"pet": {"kind": "cat", "lives": 0}}, "House.pet.lives = 0: Input should be greater than 0"),
        ({"pet": {"kind": "dog", "tricks": {"cat": "x"}}}, "House.pet.tricks.cat = 'x': Input should be a valid integer"),
        ({"garden": 3}, "garden = 3 is no table; it has the keys rooms, pet, guests, garden, height_m"),
        ({"height_m": math.inf}, "House.height_m = inf: Input should be a finite number"),
        ({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "rooms": 0}, "House.rooms = 0: Input should be greater than 0; House has no key 'a'"),
        ({"guests": [{"kind": "cat"}] * 2}, "2 guests do not fit into 1 rooms; add rooms"),
        ({"garden": {"guests": [{"kind": "cat"}] * 2}}, "garden: 2 guests do not fit into 1 rooms; add rooms"),
        ({"room": 2, "pet": {}}, "pet has no kind; it is one of cat, dog; House has no key 'room': did you mean 'rooms'?"),
    ],
)
def test_mistakes_are_named_where_they_are(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        House.parse(values)
    assert str(error.value).startswith(says)


def test_many_mistakes_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"^(House has no key '.'[^;]+; ){4}and 2 more$"):
        House.parse(dict.fromkeys("uvwxyz", 1))


def test_what_is_missing_is_named() -> None:
    class Needs(Config):
        house: House
        number: int

    with pytest.raises(ConfigError, match=r"^number is missing$"):
        Needs.parse({"house": {}})


def test_nothing_is_lost_on_the_way_and_back() -> None:
    house = House.parse({"rooms": 3, "pet": {"kind": "dog", "tricks": {"sit": 1}}, "garden": {"rooms": 2}})
    assert House.parse(house.model_dump()) == house
