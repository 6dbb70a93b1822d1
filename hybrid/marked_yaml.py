"""YAML text as plain values that remember their lines, so that an error can name the line of a key.

Stricter than YAML: a key that a mapping holds twice is refused. Pure: text in, values out; may import only `errors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from hybrid.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MarkedYaml:
    """A document: its value, and the line of each key."""

    value: object
    _root: yaml.Node | None

    def line_of(self, key: tuple[int | str, ...]) -> int:
        """Return the line, from 1, of a key, or of the nearest thing around it that is written down."""
        line, node = 1, self._root
        for part in key:
            found: tuple[yaml.Node, yaml.Node] | None = None
            if isinstance(node, yaml.MappingNode):
                found = next((pair for pair in node.value if pair[0].value == part), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                found = (node.value[part], node.value[part])
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        return line


def read_yaml(text: str, *, what: str, where: str) -> MarkedYaml:
    """Return the document in a YAML text; an empty one has the value None.

    Args:
        what: is read, for errors: `job file`.
        where: it stands, for errors: the path.

    Raises:
        ConfigError: no YAML, or a key twice in one mapping; names the line.
    """
    loader: _NoDoubles | None = None
    try:
        loader = _NoDoubles(text)
        root = loader.get_single_node()
        return MarkedYaml(None if root is None else loader.construct_document(root), root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "no document"
        raise ConfigError(f"{what} is not YAML: {problem}", where=f"{where}{line}", fix="mend that line") from None
    except (ValueError, RecursionError) as error:
        # A date such as 2026-13-01, or lists nested a thousand deep.
        problem = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{what} is not YAML: {problem}", where=where, fix="mend that value") from None
    finally:
        if loader is not None:
            loader.dispose()


class _NoDoubles(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)
