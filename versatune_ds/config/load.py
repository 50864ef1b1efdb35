"""Reading a run's settings: YAML file, dotted overrides, validation, and errors a person can act on.

`load_config("a.yaml", ["optimizer.lr=1e-5"])` gives a validated `Config`. Override values are YAML too.
Two traps of YAML 1.1 are closed: `3e-4` is a number, and only `true` and `false` are booleans (`on`, `no`
stay text). A key that stands twice is an error. Unknown keys are refused with the nearest known one.

What is not covered: the meaning of settings (`config/schema.py`).
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from versatune_ds.config.schema import Config, Origin
from versatune_ds.config.section import PREPARING, Section
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.files import write_text_atomic
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

Settings = typing.TypeVar("Settings", bound=BaseModel)


class StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 booleans and floats and without silently repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                mark = key_node.start_mark
                raise ConfigError(f"{mark.name}:{mark.line + 1}: the key {key!r} stands twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


REPLACED = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "timestamp")}
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.X,
    ),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Sequence[str] = (), *, to_train: bool = True) -> Config:
    """Read, override and validate the settings of a run.

    Args:
        path: YAML file with the sections of `Config`.
        overrides: `section.key=value` texts; the value is YAML; they win over the file.
        to_train: False: only data is prepared or shown; what could not be trained with is a warning.

    Raises:
        ConfigError: the file is missing or not YAML, or a setting is unknown or invalid.
    """
    try:
        config = load_settings(Config, path, overrides)
    except ConfigError as error:
        if to_train:
            raise
        config = load_settings(Config, path, overrides, PREPARING)
        log.warning("%s\nThe data can be prepared with that; `train` will refuse it", error)
    config._origin = Origin(("--config", str(path), *overrides))
    return config


def load_settings(
    model: type[Settings], path: str | Path, overrides: Sequence[str] = (), context: Any = None
) -> Settings:
    """`load_config` for any settings file, here and in `apps/study/config.py`."""
    path = Path(path)
    raw = read_yaml(path, "give a YAML file with --config (examples: configs/)")
    for override in overrides:
        apply_override(raw, override)
    return validate_settings(model, raw, str(path), context)


def read_yaml(path: Path, cure: str) -> dict[str, Any]:
    """A YAML file of keys and values as a plain dict.

    Args:
        cure: what to do when there is no such file, for the error text.

    Raises:
        ConfigError: it is missing, not YAML, or holds something else.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; {cure}")
    raw = _parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds {_kind(raw)}; settings are sections with keys")
    return raw


def validate_config(raw: dict[str, Any], origin: str) -> Config:
    """Validate a plain dict; ConfigError names every problem with its place, `origin` stands in front."""
    return validate_settings(Config, raw, origin)


def validate_settings(
    model: type[Settings], raw: dict[str, Any], origin: str, context: Any = None
) -> Settings:
    """`validate_config` for any settings; `context` of the validation: see `section.PREPARING`."""
    try:
        return model.model_validate(raw, context=context)
    except ValidationError as error:
        items = error.errors(include_url=False)
        found = [problem for item in items for problem in _problems(dict(item), model)]
        if context is None:
            found += _further_problems(model, raw, {item["loc"][0] for item in items if item["loc"]})
        problems = list(dict.fromkeys(found))
        text = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{origin}: {len(problems)} problem(s) in the settings\n{text}") from None


def _further_problems(model: type[BaseModel], raw: dict[str, Any], unsound: set[Any]) -> Iterator[str]:
    """Problems between the sections that are sound, which pydantic does not look at beside unsound ones."""
    if not unsound or not issubclass(model, Section):
        return
    values = {
        name: TypeAdapter[Any](cast(Any, info.annotation)).validate_python(raw[name])
        for name, info in model.model_fields.items()
        if name in raw and name not in unsound
    }
    for find in model.model_construct(**values).finders():
        with contextlib.suppress(AttributeError):  # a section is not there
            yield from find()


def write_resolved(config: Config, path: Path) -> None:
    """Write every setting, defaults included, as YAML that `load_config` reads back to an equal `Config`."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text_atomic(path, text)


def _parse_yaml(text: str, name: str) -> Any:
    loader = StrictLoader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    finally:
        loader.dispose()


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in plain sections; ConfigError where that cannot be done."""
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    node = raw
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part} is {_kind(child)}, which has no keys")
        node = child
    node[parts[-1]] = _parse_yaml(value, f"override {key}") if value.strip() else None


def _problems(item: dict[str, Any], root: type[BaseModel]) -> list[str]:
    # pydantic adds a part per member of a union, e.g. `list[...]`; only names and positions help a user
    parts = [p for p in item["loc"] if isinstance(p, int) or p.replace("_", "").isalnum()]
    place = ".".join(str(part) for part in parts)
    if item["type"] == "extra_forbidden":
        return [f"{place}: unknown key{_nearest(item['loc'], root)}"]
    if item["type"] == "missing":
        return [f"{place}: required, but not given"]
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return [f"{place}: {line}" if place else line for line in message.splitlines()]
    return [f"{place}: {message} (found {item['input']!r})"]


def _nearest(location: tuple[Any, ...], root: type[BaseModel]) -> str:
    """Hint for an unknown key: the nearest key of its section, else of any section, else the known keys."""
    model: type[BaseModel] | None = root
    for part in location[:-1]:
        if isinstance(part, str) and model is not None and part in model.model_fields:
            model = _section(model.model_fields[part].annotation)
    known = list(model.model_fields) if model is not None else []
    unknown = str(location[-1])
    near = difflib.get_close_matches(unknown, known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    elsewhere = [
        f"{section}.{field}"
        for section, info in root.model_fields.items()
        if (inner := _section(info.annotation)) is not None
        for field in inner.model_fields
        if field == unknown
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f" (known: {', '.join(known)})"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The settings section inside an annotation such as `Weights`, `list[Source]` or `list[X] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            if (section := _section(argument)) is not None:
                return section
    return None


def read_deepspeed(source: dict[str, Any] | Path) -> dict[str, Any]:
    """The section `deepspeed` of a run's settings, read from its file if it names one; a copy.

    Raises:
        ConfigError: no such file, or no JSON object in it.
    """
    if isinstance(source, dict):
        return copy.deepcopy(source)
    if not source.is_file():
        raise ConfigError(f"deepspeed: no file {source}; see configs/deepspeed/ for ready ones")
    try:
        value = json.loads(source.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: a DeepSpeed configuration is a JSON object")
    return value
