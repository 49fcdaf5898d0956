"""Objects as YAML that every reader reads alike."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9 _./:$()=+-]*")
"""Text that every reader of YAML takes for text without quotes, but for the words below."""
WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def as_yaml(objects: Sequence[Mapping[str, Any]], comment: str = "") -> str:
    """The objects as one YAML file, below `comment`."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    return head + "---\n".join(yaml.dump(one, Dumper=_Dumper, sort_keys=False, width=120) for one in objects)


class _Dumper(yaml.SafeDumper):
    """Lists stand in from their key, nothing is an alias, and text that looks like anything else stands in quotes."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    if "\n" in text:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
    style = None if PLAIN.fullmatch(text) and text.lower() not in WORDS else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
