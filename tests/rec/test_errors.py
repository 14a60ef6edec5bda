"""How messages quote data, to the character, and which exceptions say that memory is missing."""

import pytest

from saml_rec.errors import (
    InputError,
    did_you_mean,
    escaped,
    is_out_of_memory,
    listed,
    memory_for,
    named,
    shortened,
    shown,
)


def test_the_nearest_name_unless_none_is_near():
    assert did_you_mean("dropot", ["dropout", "depth"]) == "; did you mean 'dropout'?"
    assert did_you_mean("dropot", ["depth"]) == ""
    assert did_you_mean("x" * 100, ["x" * 79]) == f"; did you mean '{'x' * 17}...{'x' * 18}'?"
    # A long name is compared by its first 80 characters, and is near to none that is much longer.
    assert did_you_mean("x" * 80 + "y" * 500, ["x" * 80]) != ""
    assert did_you_mean("ab", ["abababa"]) == ""


def test_a_value_is_shown_whole_or_cut_in_the_middle():
    assert shown("x" * 78) == f"'{'x' * 78}'"
    assert shown("x" * 79) == f"'{'x' * 37}...{'x' * 38}'"
    assert shown("ab" * 5, 8) == "'a...ab'"
    assert shown("ab" * 50, 9) == "'ab...ab'"
    assert shown(list(range(9)), 10) == "[0,..., 8]"
    assert shown(10**4299) == f"1{'0' * 37}...{'0' * 39}"
    assert shown(10**4301) == "a number of thousands of digits"
    # Of long text only both ends are looked at, and these are the ends that are shown.
    assert shown("ab" + "\n" * 10**6 + "cd", 20) == "'ab\\n\\n\\...\\n\\n\\ncd'"


@pytest.mark.parametrize("length", [159, 160, 161, 162, 500])
def test_both_ends_of_long_text_are_its_own(length):
    text = "".join(chr(97 + number % 26) for number in range(length))
    assert shown(text) == f"'{text[:37]}...{text[-38:]}'"


def test_text_without_quotes_and_names():
    assert shortened("ab" * 40) == "ab" * 40
    assert shortened("x" * 81) == "x" * 38 + "..." + "x" * 39
    assert shortened("abcdefgh", 6) == "a...gh"
    assert named("x" * 38) == f"'{'x' * 38}'"
    assert named("x" * 39) == f"'{'x' * 17}...{'x' * 18}'"


def test_characters_that_cannot_be_printed():
    assert escaped("größe 'a' b") == "größe 'a' b"
    assert escaped("é\t\x1b\u200b\udcff\\") == "é\\t\\x1b\\u200b\\udcff\\"


def test_names_are_listed_as_far_as_they_fit():
    assert listed([]) == ""
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(["a", "b", "c"], 2) == "'a', 'b' and 1 more"
    assert listed(["a"] * 2000, 1) == "'a' and 1,999 more"
    # The first one whatever its length; each takes two characters more than it has.
    assert listed(["a" * 30, "b"], most=10) == f"'{'a' * 30}' and 1 more"
    assert listed(["aaa", "bbb", "c"], most=14) == "'aaa', 'bbb' and 1 more"
    assert listed(["aaa", "bbb"], most=13) == "'aaa' and 1 more"
    assert len(listed([f"name{number}" for number in range(99)])) < 95


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc.cpp:1] DefaultCPUAllocator: not enough memory: you tried to allocate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("mmap: Cannot allocate memory"),
        RuntimeError("CUDA out of memory."),
        RuntimeError("std::bad_alloc"),
    ],
    ids=str,
)
def test_memory_that_is_missing(error):
    assert is_out_of_memory(error)
    reason = str(error) or "the system has none left"
    with pytest.raises(InputError) as raised:
        raise_in_block(error)
    assert str(raised.value) == f"not enough memory for a test: {shortened(reason)}"


@pytest.mark.parametrize("error", [RuntimeError("a defect"), ValueError("out of memory"), OSError("out of memory")])
def test_other_errors_stay_what_they_are(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as raised:
        raise_in_block(error)
    assert raised.value is error


def raise_in_block(error):
    with memory_for("a test"):
        raise error


def test_only_the_first_line_of_a_reason_is_shown():
    with pytest.raises(InputError, match=r"^not enough memory for a test: CUDA out of memory$"):
        raise_in_block(RuntimeError("CUDA out of memory\nTry less."))


def test_a_block_that_ends_well():
    with memory_for("a test"):
        pass
