"""YAML read as people mean it, and refused where it could do harm.

PyYAML scans and composes; the scalars are those of YAML 1.2's core schema (`1e-3` is a number,
`on` is a word, `1:30` and `2024-01-01` are text). What comes out are fresh dicts, lists and
plain values: nothing is shared between two uses of an alias, and no tag runs code.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.composer import ComposerError
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

from .errors import ConfigError

MAX_BYTES = 2**20
MAX_LEVELS = 64
MAX_VALUES = 20_000  # after aliases are written out; a ladder needs a few hundred

_CORE = "tag:yaml.org,2002:"
_MERGE = _CORE + "merge"


def read_yaml_file(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: the file cannot be read, or see `read_yaml`.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: is a directory, not a YAML file"]) from None
    except PermissionError:
        raise ConfigError([f"{path}: no permission to read it"]) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise ConfigError([f"{path}: cannot be read: {error}"]) from error
    return read_yaml(data, str(path))


def read_yaml(text: str | bytes, source: str) -> dict[str, Any]:
    """The mapping that a YAML text holds; keys at the top are strings.

    Args:
        text: UTF-8, or UTF-16 with a byte order mark; at most `MAX_BYTES`.
        source: what error messages call it, usually the file's name.

    Raises:
        ConfigError: every problem found, each as `source:line:column: what is wrong`.
    """
    root = _compose(text, source)
    if root is None:
        raise ConfigError([f"{source}: is empty; a config is a mapping such as `name: digits`"])
    builder = _Builder(source)
    if not isinstance(root, MappingNode):
        builder.refuse(root, f"expected a mapping (`key: value`), found {_describe(root)}")
    value = builder.value(root, top=True)
    if builder.errors:
        raise ConfigError(list(builder.errors))
    assert isinstance(value, dict)
    return value


def apply_overrides(config: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of `config` with every `a.b.2.c=value` set; later assignments win.

    A whole number indexes a list; mappings that are missing (or null) on the way are made. The
    value is a YAML scalar or flow collection: `1e-3`, `lsq`, `[1, 2]`, `{name: lsq}`.

    Raises:
        ConfigError: every assignment that cannot be made, each with its reason.
    """
    errors = []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        parts = path.strip().split(".")
        try:
            if not equals:
                raise _CannotSetError("expected KEY=VALUE, such as ladder.0.epochs=3")
            if not all(parts):
                raise _CannotSetError(f"the path {path!r} has an empty part")
            if len(parts) > MAX_LEVELS:
                raise _CannotSetError(f"the path has more than {MAX_LEVELS} parts")
            config = _with(config, parts, _read_value(text), done=())
        except _CannotSetError as error:
            errors.append(f"--set {assignment}: {error}")
        except ConfigError as error:
            errors.extend(f"--set {assignment}: {line}" for line in error.errors)
    if errors:
        raise ConfigError(errors)
    return dict(config)


def path_text(loc: Iterable[str | int]) -> str:
    """A place in a config as `--set` and error messages write it: `ladder.2.train.lr`."""
    return ".".join(map(str, loc))


class _Scalar(NamedTuple):
    """One of the plain types: how it is written, how it is read, and what it may begin with."""

    name: str
    pattern: str
    convert: Callable[[str], Any]
    first: str  # PyYAML tries the pattern only on text that begins with one of these


def _int(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(text: str) -> float:
    return float(re.sub(r"\.(?=[inIN])", "", text))  # .inf and .nan without their dot


# https://yaml.org/spec/1.2.2/#1032-tag-resolution; int before float, which also matches ints
_FLOAT = (
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_SCALARS = {
    _CORE + scalar.name: scalar
    for scalar in (
        _Scalar("null", "~|null|Null|NULL|", lambda text: None, "~nN"),
        _Scalar("bool", "true|True|TRUE|false|False|FALSE", lambda text: text[0] in "tT", "tTfF"),
        _Scalar("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", _int, "-+0123456789"),
        _Scalar("float", _FLOAT, _float, "-+.0123456789"),
        _Scalar("merge", "<<", str, "<"),  # as a value it is only text
        _Scalar("str", "(?s:.*)", str, ""),
    )
}
_TAGS = {
    ScalarNode: frozenset(_SCALARS),
    SequenceNode: frozenset({_CORE + "seq"}),
    MappingNode: frozenset({_CORE + "map"}),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's loader up to the nodes, with 1.2's scalars and bounds on depth and size."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - empty: none of YAML 1.1's types

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0
        self._num_values = 0
        self._extent: dict[Node, tuple[int, int]] = {}  # (values, levels), aliases written out

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        mark = self.peek_event().start_mark
        before = self._num_values
        self._level += 1
        self._check_bounds(self._level, self._num_values + 1, mark)
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        assert node is not None  # None stands only for an empty stream
        if is_alias:
            if node not in self._extent:
                raise ComposerError(None, None, "an alias stands inside what it names", mark)
            num_values, levels = self._extent[node]
            self._num_values += num_values
            self._check_bounds(self._level + levels - 1, self._num_values, mark)
        else:
            self._num_values += 1
            inner = max((self._extent[child][1] for child in _children(node)), default=0)
            self._extent[node] = (self._num_values - before, 1 + inner)
        self._level -= 1
        return node

    @staticmethod
    def _check_bounds(level: int, num_values: int, mark: yaml.Mark) -> None:
        if level > MAX_LEVELS:
            raise ComposerError(None, None, f"more than {MAX_LEVELS} levels deep", mark)
        if num_values > MAX_VALUES:
            problem = f"more than {MAX_VALUES:,} values, aliases written out"
            raise ComposerError(None, None, problem, mark)


for _tag, _scalar in _SCALARS.items():
    if _scalar.first:
        first = [
            *_scalar.first,
            *([""] if _scalar.name == "null" else []),
        ]  # no text at all is null
        _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_scalar.pattern})\Z"), first)


def _compose(text: str | bytes, source: str) -> Node | None:
    """The root node; None where the text holds nothing but comments."""
    text = _decode(text, source)
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        problem = f"not text: it holds the character U+{ord(text[error.position]):04X}"
        raise ConfigError([f"{source}:{line}:{column}: {problem}"]) from None
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError([_at(source, error.problem_mark, problem)]) from None
    except (ValueError, OverflowError) as error:
        # PyYAML lets these through for an escape such as "\UFFFFFFFF"
        mark = loader.get_mark() if loader else None
        raise ConfigError([_at(source, mark, f"cannot be read: {error}")]) from None


def _decode(text: str | bytes, source: str) -> str:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > MAX_BYTES:
        raise ConfigError([f"{source}: larger than {MAX_BYTES // 2**20} MiB; is it a config?"])
    if isinstance(text, str):
        return text.removeprefix("\ufeff")
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        problem = f"not UTF-8 text: byte 0x{data[error.start]:02x}"
        raise ConfigError([f"{source}:{line}:{column}: {problem}"]) from None


class _Builder:
    """Plain values from nodes; collects every problem on the way."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.errors: dict[str, None] = {}  # ordered, and once where an alias repeats a node

    def refuse(self, node: Node, problem: str) -> None:
        self.errors[_at(self.source, node.start_mark, problem)] = None

    def value(self, node: Node, *, top: bool = False) -> Any:
        if node.tag not in _TAGS[type(node)]:
            tag = node.tag.replace(_CORE, "!!", 1)
            self.refuse(node, f"the tag {_short(tag)} is refused: a config holds plain values only")
            return None
        if isinstance(node, MappingNode):
            return self._mapping(node, top=top)
        if isinstance(node, SequenceNode):
            return [self.value(child) for child in node.value]
        return self._scalar(node)

    def _scalar(self, node: Node) -> Any:
        name, pattern, convert, _ = _SCALARS[node.tag]
        if re.search("[\0\ud800-\udfff]", node.value):  # through escapes; files and SQL refuse it
            self.refuse(node, "text with a NUL or half a surrogate pair")
            return None
        if not re.fullmatch(pattern, node.value):  # only where a tag is written out: !!int abc
            self.refuse(node, f"{_short(node.value)} is no {name}")
            return None
        try:
            return convert(node.value)
        except ValueError:  # an int of thousands of digits
            self.refuse(node, f"a number of {len(node.value):,} digits")
            return None

    def _mapping(self, node: Node, *, top: bool = False) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        own: dict[Any, Any] = {}
        lines: dict[Any, int] = {}  # key -> line, from 0; a merge key counts as "<<"
        for key_node, value_node in node.value:
            key = self._key(key_node, top=top)
            if key is None:
                self.value(value_node)  # for its errors
                continue
            if key in lines:
                self.refuse(
                    key_node, f"the key {_short(key)} stands on line {lines[key] + 1} already"
                )
            lines.setdefault(key, key_node.start_mark.line)
            if key_node.tag == _MERGE:
                merged = self._merged(value_node)
            else:
                own[key] = self.value(value_node)
        return {**merged, **own}

    def _key(self, node: Node, *, top: bool) -> str | int | None:
        """A name, or below the top also a whole number; None where it is refused."""
        if not isinstance(node, ScalarNode):
            self.refuse(node, f"a key is a name, not {_describe(node)}")
            return None
        num_errors = len(self.errors)
        key = self.value(node)
        if isinstance(key, str) or (type(key) is int and not top):
            return key
        if len(self.errors) == num_errors:  # not refused already
            what = _describe(node)
            self.refuse(node, f"a key is a name, not {what}; put quotes around it if it is meant")
        return None

    def _merged(self, node: Node) -> dict[Any, Any]:
        """What `<<` brings in; of several mappings, the first one that has a key wins."""
        sources = node.value if isinstance(node, SequenceNode) else [node]
        merged: dict[Any, Any] = {}
        for source in sources:
            if isinstance(source, MappingNode):
                merged = {**self._mapping(source), **merged}
            else:
                self.refuse(source, f"`<<` takes mappings, not {_describe(source)}")
        return merged


class _CannotSetError(Exception):
    """Why one assignment of `--set` cannot be made."""


def _read_value(text: str) -> Any:
    """One scalar or flow collection, by the rules of `read_yaml`."""
    root = _compose(text, "value")
    if root is None:
        return None
    if isinstance(root, CollectionNode) and not root.flow_style:
        raise _CannotSetError("write a list as [a, b] and a mapping as {key: value}")
    builder = _Builder("value")
    value = builder.value(root)
    if builder.errors:
        raise ConfigError(list(builder.errors))
    return value


def _with(node: Any, parts: list[str], value: Any, *, done: tuple[str, ...]) -> Any:
    """A copy of `node` in which the place `parts` holds `value`; `done` is the way to `node`."""
    if not parts:
        return value
    part, rest = parts[0], parts[1:]
    here = path_text(done)
    if isinstance(node, list):
        if not re.fullmatch("[0-9]{1,9}", part):
            raise _CannotSetError(f"{here} is a list; {part!r} is no index of it")
        if int(part) >= len(node):
            known = f"its last index is {len(node) - 1}" if node else "it is empty"
            raise _CannotSetError(f"{here} has no index {int(part)}; {known}")
        items = list(node)
        items[int(part)] = _with(node[int(part)], rest, value, done=(*done, part))
        return items
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise _CannotSetError(f"{here} is {_short(node)}, which has nothing inside to set")
    is_number = part not in node and re.fullmatch("[0-9]{1,9}", part) and int(part) in node
    key = int(part) if is_number else part
    return {**node, key: _with(node.get(key), rest, value, done=(*done, part))}


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, SequenceNode) else []


def _describe(node: Node) -> str:
    if isinstance(node, ScalarNode):
        name = node.tag.removeprefix(_CORE)
        return "null" if name == "null" else f"the {name} {_short(node.value)}"
    return "a mapping" if isinstance(node, MappingNode) else "a list"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _at(source: str, mark: yaml.Mark | None, problem: str) -> str:
    if mark is None:
        return f"{source}: {problem}"
    return f"{source}:{mark.line + 1}:{mark.column + 1}: {problem}"
