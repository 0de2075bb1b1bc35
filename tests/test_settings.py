"""The settings module in isolation, on a schema for the tests."""

import dataclasses
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.settings import (
    ConfigError,
    Section,
    choose,
    find_nearest,
    format_nearest_multiples,
    from_dict,
    list_fields,
    list_types,
    option,
    parse,
    to_dict,
)

PETS = {"cat": 1, "dog": 2}


@dataclass(frozen=True)
class Inner(Section):
    section = "inner"

    count: int = option(3, "a count", low=1, high=9)
    share: float = option(0.5, "a share", above=0.0)
    limit: int | None = option(None, "maybe a limit", low=1)
    is_on: bool = option(False, "a switch")
    words: tuple[str, ...] = option((), "some words")
    sizes: tuple[int, ...] = option((), "some sizes")
    pet: str = option("cat", "a pet", table=f"{__name__}:PETS")


@dataclass(frozen=True)
class Outer(Section):
    name: str = option("x", "a name")
    inner: Inner = field(default_factory=Inner)


KINDS = list_types(Outer)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("inner.count", "5", 5),
        ("inner.count", "5e0", 5),
        ("inner.share", "2", 2.0),
        ("inner.share", "3e-4", 3e-4),
        ("inner.limit", "none", None),
        ("inner.limit", "None", None),
        ("inner.limit", "7", 7),
        ("inner.is_on", "true", True),
        ("inner.is_on", "Yes", True),
        ("inner.is_on", "0", False),
        ("inner.words", "", ()),
        ("inner.words", "one", ("one",)),
        ("inner.words", "one,two", ("one", "two")),
        ("inner.words", '["one, two", "\\n"]', ("one, two", "\n")),
        ("inner.sizes", "1,2", (1, 2)),
        ("inner.sizes", "[1, 2]", (1, 2)),
        ("name", "none", "none"),
        ("name", "a=b", "a=b"),
    ],
)
def test_text_is_parsed_as_the_type_of_the_field(key, text, value):
    leaf = key.split(".")[-1]
    config = Inner if "." in key else Outer
    found = getattr(config(**{leaf: parse(text, KINDS[key], key)}), leaf)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("inner.count", "many", "inner.count='many' is not a whole number."),
        ("inner.count", "", "inner.count='' is not a whole number."),
        ("inner.share", "half", "inner.share='half' is not a number."),
        ("inner.limit", "some", "inner.limit='some' is not a whole number."),
        ("inner.is_on", "on?", "inner.is_on='on?' is not a bool: use true or false."),
        ("inner.words", '["one"', "is not a JSON list"),
        ("inner.sizes", "1,x", "inner.sizes='x' is not a whole number."),
    ],
)
def test_text_of_another_type_is_rejected_by_key_and_value(key, text, expected):
    with pytest.raises(ConfigError) as error:
        parse(text, KINDS[key], key)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (dict(count=2.5), "inner.count=2.5 is not a whole number."),
        (dict(count=float("inf")), "inner.count=inf is not a whole number."),
        (dict(count=True), "inner.count=True is not a whole number."),
        (dict(count=None), "inner.count=None is not a whole number."),
        (dict(count="3"), "inner.count='3' is not a whole number."),
        (dict(share=False), "inner.share=False is not a number."),
        (dict(is_on=1), "inner.is_on=1 is not true or false."),
        (dict(words="one"), "inner.words='one' is not a list: for one value, write ['one']."),
        (dict(words=(1,)), "inner.words=1 is not a string."),
        (dict(pet=3), "inner.pet=3 is not a string."),
        (dict(count=0), "inner.count=0 must be at least 1 and at most 9."),
        (dict(count=10), "inner.count=10 must be at least 1 and at most 9."),
        (dict(share=0.0), "inner.share=0.0 must be more than 0.0."),
        (dict(share=float("nan")), "inner.share=nan must be a finite number."),
        (dict(share=float("inf")), "inner.share=inf must be a finite number."),
        (dict(limit=0), "inner.limit=0 must be at least 1."),
        (dict(pet="cot"), "inner.pet='cot' is not known. Did you mean 'cat'? Known: cat, dog."),
    ],
)
def test_an_invalid_value_is_rejected_when_the_section_is_constructed(values, expected):
    with pytest.raises(ConfigError) as error:
        Inner(**values)
    assert expected in str(error.value)


def test_a_whole_number_is_accepted_as_a_float_and_a_list_as_a_tuple():
    inner = Inner(share=2, sizes=[1, 2], count=4.0)
    assert [type(x) for x in (inner.share, inner.sizes, inner.count)] == [float, tuple, int]


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().count = 4


def test_choose_returns_the_row_of_the_table():
    assert choose(PETS, "dog", "pet") == 2


def test_a_name_in_another_case_is_nearer_than_one_that_begins_so():
    assert find_nearest("ADAM", ["adamw", "adam"]) == ["adam"]


def test_choose_without_a_near_name_lists_all_names():
    with pytest.raises(ConfigError, match=r"^pet='zzz' is not known\. Known: cat, dog\.$"):
        choose(PETS, "zzz", "pet")


def test_leaf_fields_are_listed_by_their_dotted_key():
    leaves = ["name", *(f"inner.{f.name}" for f in dataclasses.fields(Inner))]
    assert list(list_fields(Outer)) == list(list_types(Outer)) == leaves


@given(st.integers(1, 9), st.floats(0.1, 9), st.none() | st.integers(1), st.lists(st.text()))
def test_from_dict_inverts_to_dict(count, share, limit, words):
    outer = Outer(inner=Inner(count=count, share=share, limit=limit, words=words))
    assert from_dict(Outer, to_dict(outer)) == outer


def test_from_dict_rejects_an_unknown_key_by_its_dotted_name():
    with pytest.raises(ConfigError, match=r"'inner\.cuont'\. Did you mean inner\.count\?"):
        from_dict(Outer, {"inner": {"cuont": 1}})


@pytest.mark.parametrize("values", [3, None, [], "text", {"inner": 3}, {"inner": [1]}])
def test_from_dict_rejects_what_is_not_a_group_of_settings(values):
    with pytest.raises(ConfigError, match="group of settings"):
        from_dict(Outer, values)


@given(st.integers(1, 1000), st.integers(1, 50))
def test_nearest_multiples_are_multiples_and_nearest(value, divisor):
    multiples = [int(n) for n in format_nearest_multiples(value, divisor).split(" or ")]
    assert all(n > 0 and n % divisor == 0 and abs(n - value) < divisor for n in multiples)
