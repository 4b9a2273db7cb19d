"""The YAML that is read and written here: YAML 1.2's core schema, so that every plain word means one thing, and nothing that grows.

No tag makes an object, no alias repeats more than MOST values in all or holds itself, and a word that YAML 1.1 programs read as something else
(`no`, `010`, `1_000`, `1:30`) is refused instead of guessed at.
"""

import re
from typing import Any

import yaml

from fashiondpo_pipeline.errors import Faults, UserError
from fashiondpo_pipeline.foreign import oddity, seen

MOST_LETTERS = 1 << 18  # of a text: what people write has a hundredth
MOST = 100_000  # values, those that aliases repeat counted each time
DEPTH = 32  # sections within sections
DIGITS = 100  # of a number

_CORE = "tag:yaml.org,2002:"
_MERGE = _CORE + "merge"
# YAML 1.2.2, section 10.3.2; what starts with 0 and is longer means 8 to some, and is refused below
_SCALARS = {
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"^(?:[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    "float": (re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+|\.[0-9]+[eE][-+]?[0-9]+)"
                         r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"), list("-+.0123456789")),
    "merge": (re.compile(r"^<<$"), ["<"]),
}
_MADE: dict[str, Any] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, 0),
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}


class Loader(yaml.SafeLoader):
    """Reads it, and holds its bounds."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - yaml's own way: YAML 1.1 is left out
    yaml_constructors: dict = {}  # type: ignore[misc]  # noqa: RUF012

    def __init__(self, text: str, faults: Faults):
        self.faults, self._deep = faults, 0
        self._sizes: dict[int, tuple[int, int]] = {}  # node -> how many values it is, how deep
        super().__init__(text)

    def compose_node(self, parent: Any, index: Any) -> Any:
        line, alias = self.peek_event().start_mark.line + 1, self.check_event(yaml.AliasEvent)  # type: ignore[no-untyped-call]
        self._deep += 1
        if self._deep > DEPTH:
            raise UserError(f"line {line}: this is nested more than {DEPTH} deep; flatten it")
        node: Any = super().compose_node(parent, index)
        self._deep -= 1
        if alias and id(node) not in self._sizes:
            raise UserError(f"line {line}: an anchor holds itself; write out what is meant")
        self._sizes.setdefault(id(node), self._size(node))
        size, depth = self._sizes[id(node)]
        if size > MOST or depth + self._deep > DEPTH:
            raise UserError(f"line {line}: this is more than {MOST:,} values or {DEPTH} deep once aliases are written out; make it smaller")
        return node

    def _size(self, node: yaml.Node) -> tuple[int, int]:
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        children = [child for one in inner for child in (one if isinstance(one, tuple) else (one,))]
        sizes = [self._sizes[id(child)] for child in children]
        return 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        line, tag = node.start_mark.line + 1, node.tag.removeprefix(_CORE)
        if isinstance(node, yaml.ScalarNode) and tag in ("str", *_MADE):
            return self._scalar(node.value, tag, line, plain=node.style is None)
        if tag != ("seq" if isinstance(node, yaml.SequenceNode) else "map" if isinstance(node, yaml.MappingNode) else None):
            shown = f"!!{tag}" if node.tag.startswith(_CORE) else node.tag
            raise UserError(f"line {line}: the tag {seen(shown)} is not read here; write the value without it")
        return super().construct_object(node, deep)

    def _scalar(self, text: str, tag: str, line: int, plain: bool) -> Any:
        if tag == "str":
            kind = _other_yaml.resolve(yaml.ScalarNode, text, (True, False)).removeprefix(_CORE) if plain else "str"
            if kind in ("bool", "int", "float"):
                wanted = "true or false" if kind == "bool" else "the number in plain decimal digits"
                self.faults.add(line, f"{seen(text)!r} is {'true or false' if kind == 'bool' else 'a number'} to some programs and something else "
                                      f"to others; write {wanted}, or put it in quotes")
            elif odd := oddity(text):
                self.faults.add(line, f"{seen(text)!r} holds {odd}; take it out")
            return text
        if not _SCALARS[tag][0].match(text):
            self.faults.add(line, f"{seen(text)!r} is no {tag}; write the value without !!{tag}")
        elif len(text) > DIGITS:
            self.faults.add(line, f"a number of {len(text):,} digits; write one of at most {DIGITS}")
        else:
            return _MADE[tag](text)
        return None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _MERGE:
                continue  # refused or merged below
            key = self.construct_object(key_node, deep=True)
            if key in names:
                raise UserError(f"line {key_node.start_mark.line + 1}: the key '{seen(str(key))}' is given twice; keep one of them")
            names.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes text that anybody's YAML would read as something else."""


for _kind, (_pattern, _first) in _SCALARS.items():
    Loader.add_implicit_resolver(_CORE + _kind, _pattern, _first)
    Dumper.add_implicit_resolver(_CORE + _kind, _pattern, _first)
Loader.add_constructor(_CORE + "seq", Loader.construct_yaml_seq)  # type: ignore[type-var]
Loader.add_constructor(_CORE + "map", Loader.construct_yaml_map)  # type: ignore[type-var]
_other_yaml = yaml.SafeLoader("")  # what YAML 1.1 takes a word for


def parse(text: str, where: str) -> Any:
    """The value of a YAML text: None, bool, int, float, str, list or dict. Raises UserError, in which `where` names the text."""
    if len(text) > MOST_LETTERS:
        raise UserError(f"{where}: longer than {MOST_LETTERS >> 10} KiB, which no configuration is; put tables into files")
    faults = Faults(where)
    try:
        found = Loader(text, faults).get_single_data()
    except UserError as problem:
        raise UserError(f"{where}: {problem}") from None
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        at = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        detail = getattr(problem, "problem", None) or str(problem).splitlines()[0]
        raise UserError(f"{where}:{at} is not YAML ({detail})") from problem
    except ValueError as problem:  # of a character beyond Unicode, written as its number
        raise UserError(f"{where}: is not YAML ({problem})") from problem
    faults.check()
    return found
