"""YAML means what people mean, and nothing else gets in."""

from __future__ import annotations

import math
import os
import pickle
import textwrap

import pytest
from bitladder.pipeline.errors import ConfigError, Interrupted, StageError, StoreError
from bitladder.pipeline.yaml_reader import (
    MAX_BYTES,
    MAX_LEVELS,
    MAX_VALUES,
    apply_overrides,
    path_text,
    read_yaml,
    read_yaml_file,
)
from hypothesis import given
from hypothesis import strategies as st


def errors_of(text: str | bytes) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "x.yaml")
    return caught.value.errors


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-2.5e+3", -2500.0),
        ("12", 12),
        ("+12", 12),
        ("-3", -3),
        ("012", 12),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("0b11", "0b11"),
        ("true", True),
        ("TRUE", True),
        ("False", False),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("'1e-3'", "1e-3"),
        ('"true"', "true"),
        ("!!str 1e-3", "1e-3"),
        ("!!float 3", 3.0),
        ("-", [None]),
        ("=", "="),
        ("<<", "<<"),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("1e400", math.inf),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(text, value):
    read = read_yaml(f"x:\n  {text}\n", "x.yaml")["x"]
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_float():
    assert math.isnan(read_yaml("x: .nan", "x.yaml")["x"])


def test_collections_nest():
    text = "a: {b: [1, {c: 2}]}\nd:\n  - e\n  - f: g\n"
    assert read_yaml(text, "x.yaml") == {"a": {"b": [1, {"c": 2}]}, "d": ["e", {"f": "g"}]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_in_its_encoding(encoding):
    assert read_yaml("name: Fußnote".encode(encoding), "x.yaml") == {"name": "Fußnote"}


def test_an_alias_gives_a_value_of_its_own():
    config = read_yaml("a: &x [1, 2]\nb: *x", "x.yaml")
    config["a"].append(3)
    assert config == {"a": [1, 2, 3], "b": [1, 2]}


def test_merge_keys_fill_in_what_is_not_said():
    text = """
        base: &base {lr: 0.1, epochs: 3}
        other: &other {lr: 0.2, clip: 1}
        one: {<<: *base, lr: 0.5}
        two: {lr: 0.5, <<: [*other, *base]}
        three: {<<: [*base, *other]}
    """
    config = read_yaml(textwrap.dedent(text), "x.yaml")
    assert config["one"] == {"lr": 0.5, "epochs": 3}
    assert config["two"] == {"lr": 0.5, "clip": 1, "epochs": 3}
    assert config["three"] == {"lr": 0.1, "epochs": 3, "clip": 1}


def test_a_whole_number_may_be_a_key_below_the_top():
    assert read_yaml("bits: {8: minmax, 4: lsq}", "x.yaml") == {"bits": {8: "minmax", 4: "lsq"}}


@pytest.mark.parametrize("text", ["", "  \n", "# only a comment\n", b"", b"\xef\xbb\xbf"])
def test_an_empty_text_is_refused(text):
    assert "is empty" in errors_of(text)[0]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("---\n", "x.yaml:2:1: expected a mapping (`key: value`), found null"),
        ("- 1\n", "x.yaml:1:1: expected a mapping (`key: value`), found a list"),
        ("lsq\n", "x.yaml:1:1: expected a mapping (`key: value`), found the str 'lsq'"),
        ("a: [1\nb: 2\n", "x.yaml:2:2: "),
        ("a: 1\n\tb: 2\n", "x.yaml:2:1: "),
        ("a: 1\n---\nb: 2\n", "x.yaml:2:1: expected a single document"),
        ("a: 1\n[1]: 2\n", "x.yaml:2:1: "),
        ("{[1]: 2}\n", "x.yaml:1:2: a key is a name, not a list"),
        ("{{x}: 2}\n", "x.yaml:1:2: a key is a name, not a mapping"),
        ("1: 2\n", "x.yaml:1:1: a key is a name, not the int '1'"),
        ("true: 2\n", "x.yaml:1:1: a key is a name, not the bool 'true'"),
        ("a: {~: 2}\n", "x.yaml:1:5: a key is a name, not null"),
        ("a: {1.5: 2}\n", "x.yaml:1:5: a key is a name, not the float '1.5'"),
        ("a: *b\n", "x.yaml:1:4: found undefined alias 'b'"),
        ("a: &a [*a]\n", "x.yaml:1:8: an alias stands inside what it names"),
        ("&a b: *a\nc: &c {<<: *c}\n", "x.yaml:2:12: an alias stands inside what it names"),
        ("a: {<<: 3}\n", "x.yaml:1:9: `<<` takes mappings, not the int '3'"),
        ("a: !!int b\n", "x.yaml:1:4: 'b' is no int"),
        ("a: !!bool yes\n", "x.yaml:1:4: 'yes' is no bool"),
        ("a: !!map b\n", "x.yaml:1:4: the tag '!!map' is refused"),
        ("a: !env HOME\n", "x.yaml:1:4: the tag '!env' is refused"),
        ('a: "\\0"\n', "x.yaml:1:4: text with a NUL"),
        ('a: "\\ud800"\n', "x.yaml:1:4: text with a NUL or half a surrogate pair"),
        ('a: "\\UFFFFFFFF"\n', "x.yaml:1:"),
        ("a: " + "9" * 5000, "x.yaml:1:4: a number of 5,000 digits"),
        ("a: 1\nb: \0\n", "x.yaml:2:4: not text: it holds the character U+0000"),
        (b"a: 1\nb: \xff\xff\n", "x.yaml:2:4: not UTF-8 text: byte 0xff"),
        ("a: 1".encode("utf-16-le"), "x.yaml:1:2: not text: it holds the character U+0000"),
        (b"PK\x03\x04\x14\x00", "x.yaml:1:3: not text: it holds the character U+0003"),
    ],
)
def test_what_is_refused_is_named_with_line_and_column(text, error):
    (message,) = errors_of(text)
    assert message.startswith(error)
    assert "\n" not in message


def test_all_duplicate_keys_are_listed_at_every_level():
    text = "a: 1\nb: {c: 1, c: 2}\na: 2\nd: [{<<: {e: 1}, <<: {e: 2}}]\na: 3\n"
    assert errors_of(text) == [
        "x.yaml:2:11: the key 'c' stands on line 2 already",
        "x.yaml:3:1: the key 'a' stands on line 1 already",
        "x.yaml:4:18: the key '<<' stands on line 4 already",
        "x.yaml:5:1: the key 'a' stands on line 1 already",
    ]


def test_a_tag_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    witness = tmp_path / "ran"
    text = f"a: !!python/object/apply:os.mkdir ['{witness}']\nb: !!python/name:os.system ''\n"
    messages = errors_of(text)
    assert "'!!python/object/apply:os.mkdir' is refused" in messages[0]
    assert "'!!python/name:os.system' is refused" in messages[1]
    assert not witness.exists()


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 5000 + "]" * 5000,
        "a: " + "{a: " * 5000 + "}" * 5000,
        "\n".join(" " * level + "a:" for level in range(1400)),
        "a:\n " + "- " * 5000,
        "a:\n " + "? " * 5000,
        "[" * 100_000,
    ],
)
def test_thousands_of_levels_are_refused(text):
    assert f"more than {MAX_LEVELS} levels deep" in errors_of(text)[0]


def test_levels_count_through_aliases():
    lines = ["a0: &a0 [1]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 100)]
    assert f"more than {MAX_LEVELS} levels deep" in errors_of("\n".join(lines))[0]


def test_the_deepest_that_is_allowed_loads():
    inner = MAX_LEVELS - 2  # the top mapping and the scalar are levels too
    value = read_yaml("a: " + "[" * inner + "1" + "]" * inner, "x.yaml")["a"]
    for _ in range(inner):
        (value,) = value
    assert value == 1


@pytest.mark.parametrize("form", ["[{}]", "{{<<: [{}]}}"], ids=["lists", "merges"])
def test_a_billion_laughs_are_refused(form):
    inner = "[1]" if form == "[{}]" else "{k: 1}"
    lines = [f"a0: &a0 {inner}"]
    lines += [f"a{i}: &a{i} " + form.format(", ".join([f"*a{i - 1}"] * 9)) for i in range(1, 12)]
    assert f"more than {MAX_VALUES:,} values" in errors_of("\n".join(lines))[0]


def test_a_text_of_more_than_a_mebibyte_is_refused():
    text = "a: 1\n#" + "x" * MAX_BYTES
    assert "larger than 1 MiB" in errors_of(text)[0]
    assert "larger than 1 MiB" in errors_of(text.encode())[0]


def assert_read_or_refused(text: str | bytes) -> None:
    errors = []
    try:
        value = read_yaml(text, "x.yaml")
    except ConfigError as error:
        errors = error.errors
    assert errors or isinstance(value, dict)
    assert all(line.startswith("x.yaml:") for line in errors)


@given(st.one_of(st.text(), st.binary()))
def test_any_text_is_read_or_refused(text):
    assert_read_or_refused(text)


pieces = [*"abn01.:-?,[]{}#&*!|>'\"%@\\ \n\t~<=+_", "a: ", "- ", "&a ", "*a", "!!int ", "<<: "]
pieces += ["\n  ", "---\n", "...\n", '"\\x', "%YAML ", "%TAG ! ", "true", "1e3", "\\U", "\x85"]


@given(st.lists(st.sampled_from(pieces), max_size=30).map("".join))
def test_any_mixture_of_yaml_signs_is_read_or_refused(text):
    assert_read_or_refused(text)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("lr: 1e-3\n")
    assert read_yaml_file(path) == {"lr": 1e-3}


def file_error(path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_yaml_file(path)
    (message,) = caught.value.errors
    return message


def test_a_file_that_cannot_be_opened_is_named_with_the_reason(tmp_path):
    assert file_error(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such file"
    assert "is a directory" in file_error(tmp_path)
    assert "cannot be read" in file_error("a\0b")
    assert "cannot be read" in file_error("a" * 5000)


@pytest.fixture
def unreadable(tmp_path):
    """A file without read permission; root, who may read anything, steps down meanwhile."""
    path = tmp_path / "x.yaml"
    path.touch(mode=0o000)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield path
    os.seteuid(user)


def test_a_file_without_permission_is_named(unreadable):
    assert file_error(unreadable) == f"{unreadable}: no permission to read it"


CONFIG = {"seed": 0, "data": {"name": "digits"}, "ladder": [{"bits": 8}, {"bits": 4}], "none": None}


@pytest.mark.parametrize(
    ("assignment", "place", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("data.name=mnist", ("data", "name"), "mnist"),
        ("ladder.1.bits=2", ("ladder", 1, "bits"), 2),
        ("ladder.0.train.lr=1e-3", ("ladder", 0, "train", "lr"), 1e-3),
        ("ladder.0.compile=on", ("ladder", 0, "compile"), "on"),
        ("ladder.0={bits: 1, clip: null}", ("ladder", 0), {"bits": 1, "clip": None}),
        ("ladder=[1,2]", ("ladder",), [1, 2]),
        ("none.x=1", ("none", "x"), 1),
        ("new.part.x='a=b'", ("new", "part", "x"), "a=b"),
        ("seed=", ("seed",), None),
    ],
)
def test_an_override_sets_one_place(assignment, place, value):
    config = apply_overrides(CONFIG, [assignment])
    for step in place:
        config = config[step]
    assert config == value


def test_overrides_leave_the_input_and_shared_parts_alone():
    shared = {"lr": 0.1}
    config = {"a": shared, "b": [shared]}
    assert apply_overrides(config, ["a.lr=1", "b.0.lr=2"]) == {"a": {"lr": 1}, "b": [{"lr": 2}]}
    assert config == {"a": {"lr": 0.1}, "b": [{"lr": 0.1}]}


def test_the_later_override_wins():
    assert apply_overrides({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


def test_an_override_reaches_a_key_that_is_a_number():
    assert apply_overrides({"bits": {8: "a"}}, ["bits.8=b"]) == {"bits": {8: "b"}}


@pytest.mark.parametrize(
    ("assignment", "reason"),
    [
        ("seed", "expected KEY=VALUE"),
        ("=3", "empty part"),
        ("data..name=3", "empty part"),
        ("seed.x=3", "seed is 0, which has nothing inside to set"),
        ("data.name.x=3", "data.name is 'digits'"),
        ("ladder.2.bits=3", "ladder has no index 2; its last index is 1"),
        ("ladder.-1.bits=3", "'-1' is no index"),
        ("ladder.bits=3", "ladder is a list; 'bits' is no index of it"),
        ("seed=[1", "value:1:3: "),
        ("seed=a: b", "write a list as [a, b] and a mapping as {key: value}"),
        ("seed=- 1", "write a list as [a, b]"),
        ("seed={a: 1, a: 2}", "the key 'a' stands on line 1 already"),
        ("seed=!!python/name:os.system", "is refused"),
        (".".join("a" * 5000) + "=1", "more than 64 parts"),
    ],
)
def test_a_bad_override_says_why(assignment, reason):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(CONFIG, [assignment])
    (message,) = caught.value.errors
    assert message.startswith(f"--set {assignment}: ")
    assert reason in message


def test_all_bad_overrides_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        apply_overrides(CONFIG, ["seed", "data.name=cifar10", "ladder.7=1"])
    assert [line.partition(": ")[0] for line in caught.value.errors] == [
        "--set seed",
        "--set ladder.7=1",
    ]


def test_a_place_is_written_as_set_takes_it():
    assert path_text(("ladder", 2, "train", "lr")) == "ladder.2.train.lr"


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (ConfigError(["one", "two"]), 2, "one\ntwo"),
        (StageError("w4a4", "loss is NaN", "lower lr"), 1, "stage 'w4a4' failed: loss is NaN\nlow"),
        (Interrupted(2), 130, "interrupted by SIGINT"),
        (Interrupted(15), 143, "interrupted by SIGTERM"),
        (StoreError("read-only"), 2, "read-only"),
        (StoreError("full", exit_code=1), 1, "full"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_keeps_its_message_and_code_between_processes(error, exit_code, message):
    copy = pickle.loads(pickle.dumps(error))
    assert copy.exit_code == error.exit_code == exit_code
    assert str(copy) == str(error)
    assert str(error).startswith(message)
