"""YAML to plain values that remember the line they came from."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

Path = tuple[str | int, ...]
Fault = tuple[Path, str]

_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + name for name in ("str", "int", "float", "bool", "null")}
_KNOWN = _SCALARS | {_TAG + "map", _TAG + "seq"}
_DEEPEST = 20
_MOST = 10_000
_LARGEST = 2**63 - 1


class _Loader(yaml.SafeLoader):
    """Safe loader in which ``1e-7`` is a number, as everybody who writes one means it, and a date is a text."""


_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)
for _resolvers in _Loader.yaml_implicit_resolvers.values():
    _resolvers[:] = [pair for pair in _resolvers if pair[0] in _SCALARS]


class YamlError(Exception):
    """A file that is not YAML, or not the YAML that a spec can be: line and message."""

    def __init__(self, line: int, message: str) -> None:
        self.line = line
        super().__init__(message)


def parse(text: str) -> tuple[Any, dict[Path, int], list[Fault]]:
    """Parse one YAML document.

    Args:
        text: The document.

    Returns:
        The plain value, the line (from 1) of every key and item by path, and the faults of keys: (path, message).

    Raises:
        YamlError: If the text is not YAML, or holds what a spec has no use for: tags, cycles, great depth or size.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(line, f"not YAML: the character {chr(int(error.character))!r} is not allowed") from None
    try:
        return _Tree(loader).read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ": ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(mark.line + 1 if mark else 1, f"not YAML: {said}") from None
    except RecursionError:
        raise YamlError(loader.line + 1, f"nested too deeply; a spec has at most {_DEEPEST} levels") from None
    finally:
        loader.dispose()


class _Tree:
    """One walk through a document."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        self._lines: dict[Path, int] = {}
        self._faults: list[Fault] = []
        self._count = 0

    def read(self) -> tuple[Any, dict[Path, int], list[Fault]]:
        node = self._loader.get_single_node()
        value = None if node is None else self._plain(node, ())
        return value, self._lines, self._faults

    def _plain(self, node: yaml.Node, path: Path) -> Any:
        line = node.start_mark.line + 1
        self._lines.setdefault(path, line)
        self._count += 1
        if node.tag not in _KNOWN:
            raise YamlError(line, f"the tag {node.tag.replace(_TAG, '!!')} means nothing in a spec")
        if len(path) > _DEEPEST:
            raise YamlError(line, f"nested too deeply; a spec has at most {_DEEPEST} levels")
        if self._count > _MOST:
            raise YamlError(line, f"too large; a spec holds at most {_MOST:,} values")
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(child, (*path, index)) for index, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError(line, "a key must be a word, not a list or a mapping")
            key = str(key_node.value)
            if key in mapping:
                self._faults.append(((*path, key), f"key stands twice (first on line {self._lines[(*path, key)]})"))
            self._lines[(*path, key)] = line
            mapping[key] = self._plain(child, (*path, key))
        return mapping

    def _scalar(self, node: yaml.Node) -> Any:
        """Return a scalar's value; what only looks like a number, or is out of all measure, stays a text."""
        try:
            value = self._loader.construct_object(node)
        except (ValueError, KeyError, IndexError):
            return node.value
        return node.value if isinstance(value, int) and abs(value) > _LARGEST else value


def show(value: object) -> str:
    """Write a value as it may stand in YAML, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
    return text if len(text) <= 80 else f"{text[:77]}..."
