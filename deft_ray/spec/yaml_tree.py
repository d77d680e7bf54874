"""YAML to plain values that remember the line they came from."""

from __future__ import annotations

import re
from typing import Any

import yaml

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Safe loader in which ``1e-7`` is a number, as everybody who writes one means it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
# The first matching resolver wins: plain whole numbers must stay whole.
for _resolvers in _Loader.yaml_implicit_resolvers.values():
    _resolvers.sort(key=lambda pair: pair[0] != "tag:yaml.org,2002:int")


class YamlFault(Exception):
    """A file that is not YAML, or not the YAML that a spec can be: line and message."""

    def __init__(self, line: int, message: str) -> None:
        self.line = line
        super().__init__(message)


def parse(text: str) -> tuple[Any, dict[Path, int], list[tuple[Path, str]]]:
    """Parse one YAML document.

    Args:
        text: The document.

    Returns:
        The plain value, the line (from 1) of every key and item by path, and the faults of keys: (path, message).

    Raises:
        YamlFault: If the text is not YAML.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Path, int] = {}
        faults: list[tuple[Path, str]] = []
        value = None if node is None else _plain(loader, node, (), lines, faults)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlFault(mark.line + 1 if mark else 1, f"not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise YamlFault(1, f"not YAML: {error}") from None
    finally:
        loader.dispose()
    return value, lines, faults


def _plain(
    loader: _Loader, node: yaml.Node, path: Path, lines: dict[Path, int], faults: list[tuple[Path, str]]
) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, child, (*path, index), lines, faults) for index, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, child in node.value:
            key = str(key_node.value)
            if key in mapping:
                faults.append(((*path, key), f"key stands twice (first on line {lines[(*path, key)]})"))
            lines[(*path, key)] = key_node.start_mark.line + 1
            mapping[key] = _plain(loader, child, (*path, key), lines, faults)
        return mapping
    return loader.construct_object(node)


def parse_scalar(text: str) -> Any:
    """Parse the value of ``--set key=value``: any YAML value on one line."""
    value, _, _ = parse(text)
    return value
