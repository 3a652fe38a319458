"""From options to checked dataclasses.

Values come in layers, each overriding the ones before; mappings of options (`RunArguments.MERGED`) key by key:

    dataclass defaults < house defaults < recipes/<module>/toy.yaml < --config file < command line

`TrlParser` knows the fields and how to read a value; this layer adds what it leaves out: every problem is
collected and reported at once, with a suggestion, before a model or a dataset loads. Unknown keys, wrong types,
duplicate keys, prefixes and an `env:` block are refused, in YAML and on the command line alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from llmcore_hf import distributed, meeting, resources
from llmcore_hf.errors import ConfigError
from llmcore_hf.registry import Module

T = TypeVar("T")

# Names people know from older releases or from other libraries.
RENAMED = {
    "batch_size": "per_device_train_batch_size",
    "dataset": "dataset_name",
    "epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "load_4bit": "load_in_4bit",
    "lora_rank": "lora_r",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "torch_dtype": "dtype",
    "tokenizer": "processing_class",
}
# Where a run writes and what it resumes is decided anew each time, so `resolved_config.yaml` leaves it out.
NOT_REPEATED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
SECRETS = ("hub_token",)
REQUEST_OPTIONS = ("module", "config", "toy")
EXPLICIT = "explicit"  # key of `resolved_config.yaml`: the options that anything but a default decided
COMMAND_LINE, DEFAULTS, HOUSE = "command line", "defaults", "defaults for this machine"


@dataclass
class RunArguments:
    """Options every module has.

    Attributes:
        MERGED: names of mappings that a later layer of options adds to and does not replace.
    """

    MERGED: ClassVar[tuple[str, ...]] = ()

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace what an earlier run left in `--output_dir`. Only a run directory is ever deleted."},
    )


@dataclass
class Request:
    """What the command line asks for, apart from the module's own options."""

    module: str | None = None
    toy: bool = False
    config: str | None = None
    options: list[str] = field(default_factory=list)


@dataclass
class Config:
    """Merged options of one run, and where each value came from.

    Attributes:
        values: option name -> value, defaults included.
        sources: option name -> the layer that set it (`COMMAND_LINE`, a file, `DEFAULTS`, ...).
        parts: the dataclass instances, in the order of the module's `argument_classes()`.
    """

    module: str
    toy: bool
    values: dict[str, Any]
    sources: dict[str, str]
    parts: tuple[Any, ...]

    def part(self, cls: type[T]) -> T:
        """The dataclass instance of type `cls`."""
        return next(part for part in self.parts if isinstance(part, cls))

    def is_set(self, name: str) -> bool:
        """Whether anything but a default decided the value of `name`."""
        return self.sources[name] not in (DEFAULTS, HOUSE)

    def to_yaml(self) -> str:
        """The text of `resolved_config.yaml`: `--config` with this file repeats the run."""
        lines = [
            "# Every option of this run. To repeat it in a new directory, pass this file to --config.",
            _to_yaml({"module": self.module, "toy": self.toy}),
            "# Those that were chosen; the others were left at their defaults.",
            _to_yaml({EXPLICIT: [n for n in self.values if self.is_set(n) and n not in NOT_REPEATED + SECRETS]}),
        ]
        files = [source for source in self.sources.values() if source not in (COMMAND_LINE, HOUSE, DEFAULTS)]
        for source in dict.fromkeys([COMMAND_LINE, *files, HOUSE, DEFAULTS]):
            names = [n for n, s in self.sources.items() if s == source and n not in NOT_REPEATED + SECRETS]
            if names:
                section = {name: plain(self.values[name]) for name in names}
                lines += ["", f"# {source}", _to_yaml(section)]
        return "\n".join(lines) + "\n"


def _to_yaml(section: dict[str, Any]) -> str:
    import yaml

    text = yaml.safe_dump(section, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != section:  # PyYAML loses some control characters unless it escapes
        text = yaml.safe_dump(section, sort_keys=False)
    return text.rstrip("\n")


def plain(value: Any) -> Any:
    """An option's value as YAML has it."""
    return value.value if isinstance(value, enum.Enum) else value


def read_request(argv: list[str]) -> Request:
    """Take `--module`, `--toy` and `--config` out of `argv`; the rest are options of the module.

    A config file may name its module and `toy: true` itself, as `resolved_config.yaml` does.

    Raises:
        ConfigError: one of them lacks its value, or names a different module than the config file.
    """
    request, problems, tokens = Request(), [], list(argv)
    while tokens:
        token = tokens.pop(0)
        name, has_value, value = token.partition("=")
        if name == "--toy":
            request.toy = True
            problems += ["--toy takes no value"] if has_value else []
        elif name in ("--module", "--config"):
            if not has_value and tokens and not tokens[0].startswith("--"):
                value = tokens.pop(0)
            if value:
                setattr(request, name[2:], value)
            else:
                problems.append(f"{name} needs a value")
        else:
            request.options.append(token)
    if request.config and not problems:
        try:
            document = read_yaml(Path(request.config))
        except ConfigError as error:
            # with a module, `resolve` reads the file again and tells its problems together with all others
            problems += [] if request.module else error.problems
            document = {}
        named, toy = document.get("module"), document.get("toy", False)
        if named and request.module and named != request.module:
            problems.append(f"--module {request.module}, but {request.config} is a config for `{named}`")
        request.module = request.module or (str(named) if named else None)
        if not isinstance(toy, bool):
            problems.append(f"{request.config}: `toy` is true or false, not {toy!r}")
        request.toy = request.toy or toy is True
    if request.module is None and not problems:
        problems.append("no --module was given; --list shows them")
        near = (t for t in request.options if difflib.get_close_matches(t.partition("=")[0], ["--module"], cutoff=0.7))
        problems += [f"unknown option `{token}` (did you mean `--module`?)" for token in near]
    if problems:
        raise ConfigError(problems)
    return request


def resolve(module: Module, request: Request) -> Config:
    """Merge all layers for `module` and build its dataclasses.

    Raises:
        ConfigError: with every unknown option, wrong value and impossible combination that was found.
    """
    options = Options(module.load().argument_classes())
    problems: list[str] = []
    return _merge(module, options, _layers(module, request, options, problems), request.toy, problems)


def check_names_and_kinds(module: Module, request: Request) -> None:
    """Look for what can be told without building anything: unknown options, and values that cannot be read.

    Raises:
        ConfigError: with every one that was found.
    """
    problems: list[str] = []
    _layers(module, request, Options(module.load().argument_classes()), problems)
    if problems:
        raise ConfigError(_unique(problems), f" of `{module.name}`")


def _layers(
    module: Module, request: Request, options: Options, problems: list[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Where values come from and which, the later over the earlier; what is wrong is appended to `problems`."""
    layers: list[tuple[str, dict[str, Any]]] = []
    if request.toy:
        recipe = f"recipes/{module.name}/toy.yaml"
        layers.append((recipe, options.from_yaml(resources.path(recipe), recipe, problems)))
    if request.config:
        layers += options.from_config_file(request.config, problems)
    layers.append((COMMAND_LINE, options.from_command_line(request.options, problems)))
    return layers


def resolve_mapping(module: Module, mapping: dict[str, Any], source: str, given: dict[str, Any], toy: bool) -> Config:
    """The config of a `module` that is a stage of another: options from `mapping`, over them the values `given`.

    Raises:
        ConfigError: as in `resolve`; the messages name the `source` of the mapping.
    """
    options = Options(module.load().argument_classes())
    problems = [f"{source}: `{name}` is set by the stages themselves" for name in sorted(mapping.keys() & given.keys())]
    return _merge(
        module, options, [(source, options.from_document(mapping, source, problems)), (source, given)], toy, problems
    )


def _merge(
    module: Module, options: Options, layers: list[tuple[str, dict[str, Any]]], toy: bool, problems: list[str]
) -> Config:
    """One config from layers, the later ones over the earlier; `problems` holds what was wrong with reading them."""
    code = module.load()
    explicit: dict[str, Any] = {}
    for _, layer in layers:
        explicit |= options.laid_over(explicit, layer)
    house = {name: value for name, value in code.house_defaults(explicit).items() if name not in explicit}

    values = {**options.defaults, **house, **explicit}
    sources = dict.fromkeys(options.defaults, DEFAULTS) | dict.fromkeys(house, HOUSE)
    for source, layer in layers:
        sources |= dict.fromkeys(layer, source)
    config = Config(module.name, toy, values, sources, parts=())
    problems += code.check(config)
    if values.get("resume_from_checkpoint") == "":
        problems.append("--resume_from_checkpoint is empty: give `last`, or the path of a checkpoint")
    if values.get("resume_from_checkpoint") and values.get("overwrite_output_dir"):
        problems.append("--overwrite_output_dir would delete what --resume_from_checkpoint continues: give one of them")
    if not problems:  # building TrainingArguments makes the process group, so whoever cannot go on ends before
        meeting.meet()
    if not problems or distributed.world_size() == 1:
        config.parts = tuple(options.build({**house, **explicit}, problems))
    if problems:
        raise ConfigError(_unique(problems), f" of `{module.name}`")
    return config


def _unique(problems: list[str]) -> list[str]:
    return list(dict.fromkeys(problems))


class _Refused(Exception):
    """What argparse would print before leaving the process."""


class Options:
    """The fields of several dataclasses as one flat table of options."""

    def __init__(self, classes: tuple[type, ...]) -> None:
        self.classes = classes
        self.hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
        self.fields = {f.name: f for cls in classes for f in dataclasses.fields(cls) if f.init}
        self.defaults = {name: _default(f) for name, f in self.fields.items()}
        self.merged = {name for cls in classes for name in getattr(cls, "MERGED", ())}
        self.parser = _make_parser(classes)

    def laid_over(self, below: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
        """The values of a layer; a mapping that is merged holds what is `below` it as well."""
        both = {name for name in self.merged if below.get(name) and layer.get(name)}
        return layer | {name: {**below[name], **layer[name]} for name in both}

    def from_command_line(self, tokens: list[str], problems: list[str]) -> dict[str, Any]:
        """Values of the options in `tokens`; what is wrong with them is appended to `problems`."""
        values: dict[str, Any] = {}
        for chunk in _chunks(tokens):
            flag = chunk[0].partition("=")[0]
            name = flag.removeprefix("--").replace("-", "_")
            positive = name.removeprefix("no_")
            if not flag.startswith("--"):
                problems.append(f"`{chunk[0]}` stands alone: options begin with `--`")
            elif name not in self.fields and not (positive in self.fields and self.defaults[positive] is True):
                problems.append(f"unknown option `{flag}`{self._suggestion(name, '--')}")
            else:
                self._read(name, positive if name not in self.fields else name, chunk, COMMAND_LINE, values, problems)
        return values

    def from_yaml(self, path: Path, shown: str, problems: list[str]) -> dict[str, Any]:
        """Values of a YAML file of options; what is wrong with them is appended to `problems`."""
        return self.from_document(_read_or_tell(path, problems), shown, problems)

    def from_document(self, document: dict[Any, Any], shown: str, problems: list[str]) -> dict[str, Any]:
        """Values of a mapping of options; what is wrong with them is appended to `problems`."""
        values: dict[str, Any] = {}
        for name, value in document.items():
            if name in ("module", "toy", EXPLICIT):
                continue
            if name == "env":
                problems.append(f"{shown}: an `env:` block is not accepted: set environment variables in the shell")
            elif name not in self.fields:
                problems.append(f"{shown}: unknown key `{name}`{self._suggestion(str(name))}")
            else:
                self._read_yaml(name, value, shown, values, problems)
        return values

    def from_config_file(self, name: str, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
        """The layers of a `--config` file. A resolved config says which of its values were left at their defaults."""
        document = _read_or_tell(Path(name), problems)
        values = self.from_document(document, name, problems)
        explicit = document.get(EXPLICIT, list(values))
        if not isinstance(explicit, list):
            problems.append(f"{name}: `{EXPLICIT}` is a list of options, not {explicit!r}")
            return []
        chosen = {option: value for option, value in values.items() if option in explicit}
        return [(DEFAULTS, {n: value for n, value in values.items() if n not in chosen}), (name, chosen)]

    def _read_yaml(self, name: str, value: Any, shown: str, values: dict[str, Any], problems: list[str]) -> None:
        """Read one value of a YAML file: check its kind here, and let the parser check what a text can say."""
        if self._is_default(name, value):
            values[name] = self.defaults[name]
        elif value is None and type(None) not in get_args(self.hints[name]):
            problems.append(f"{shown}: `{name}` may not be null")
        elif value is None or (isinstance(value, dict) and "dict" in str(self.hints[name])):
            values[name] = value
        elif problem := self._wrong_kind(name, value):
            problems.append(f"{shown}: `{name}` {problem}")
        elif isinstance(value, list) and (not value or self._is_text_list(name)):
            values[name] = value
        elif isinstance(value, list):
            items: list[dict[str, Any]] = [{} for _ in value]
            for item, read in zip(value, items, strict=True):  # one by one: `-1e-3` looks like an option
                self._read(name, name, [f"--{name}={item}"], shown, read, problems)
            if all(items):
                values[name] = [x for read in items for x in read[name]]
        else:
            self._read(name, name, [f"--{name}={value}"], shown, values, problems)

    def build(self, values: dict[str, Any], problems: list[str]) -> Iterator[Any]:
        """Instances of the dataclasses; what a `__post_init__` refuses is appended to `problems`."""
        for cls in self.classes:
            names = {f.name for f in dataclasses.fields(cls)}
            try:
                yield cls(**{name: value for name, value in values.items() if name in names})
            except ConfigError as error:
                problems += error.problems
            except Exception as error:  # whatever a library's `__post_init__` raises, the options are to blame
                problems.append(" ".join(str(error).split()))

    def _read(
        self, name: str, dest: str, tokens: list[str], source: str, values: dict[str, Any], problems: list[str]
    ) -> None:
        """Let the parser read one option, given as the tokens `--name value ...`."""
        where = "" if source == COMMAND_LINE else f"{source}: "
        try:
            namespace, extra = self.parser.parse_known_args(tokens)
        except _Refused as error:
            message = re.sub(r"^argument [^:]*: ", "", str(error))
            problems.append(f"{where}`{name}`: {message}{self._nearest_choice(dest, tokens)}")
            return
        if extra:
            problems.append(f"{where}`{name}` takes {self._takes(dest)}; left over: {' '.join(extra)}")
            return
        value = getattr(namespace, dest)
        if isinstance(value, str) and "dict" in str(self.hints[dest]):
            value = self._mapping(dest, value)
            if value is None:
                problems.append(f"{where}`{name}` takes a JSON mapping or the name of an existing JSON file")
                return
        values[dest] = value

    def _mapping(self, name: str, text: str) -> dict[str, Any] | str | None:
        """The mapping that a text is or, where it is to be merged, that the file of that name holds; None if there is none.

        The names of other files go to the libraries as they are.
        """
        file = Path(text).expanduser()
        try:
            if file.is_file():
                if name not in self.merged:
                    return text
                text = file.read_text(encoding="utf-8")
            found = json.loads(text)
        except (OSError, ValueError):  # also where the text is too long for the name of a file
            return None
        return found if isinstance(found, dict) else None

    def _wrong_kind(self, name: str, value: Any) -> str | None:
        """What is wrong with the kind of a YAML value; whether its text can be read, the parser says."""
        hint = self.hints[name]
        kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
        text_only = all(kind is str or isinstance(kind, enum.EnumMeta) or "list[str]" in str(kind) for kind in kinds)
        if isinstance(value, dict) or (isinstance(value, list) and "list" not in str(hint)):
            return f"takes {self._takes(name)}, not a {'mapping' if isinstance(value, dict) else 'list'}"
        for item in value if isinstance(value, list) else [value]:
            if item is None or isinstance(item, list) or (text_only and not isinstance(item, str)):
                return f"takes text, not {item!r}: put it in quotes" if text_only else f"may not hold {item!r}"
        return None

    def _is_text_list(self, name: str) -> bool:
        return list[str] in (self.hints[name], *get_args(self.hints[name]))

    def _is_default(self, name: str, value: Any) -> bool:
        """`resolved_config.yaml` repeats defaults, and some (an empty list) cannot be said on a command line."""
        default = plain(self.defaults[name])
        return type(value) is type(default) and value == default

    def _takes(self, name: str) -> str:
        kind = str(self.hints[name])
        return "a list" if "list" in kind else f"one value ({type_name(self.hints[name])})"

    def _suggestion(self, name: str, prefix: str = "") -> str:
        near = RENAMED.get(name)
        if near is None or near not in self.fields:
            names = [*self.fields, *(REQUEST_OPTIONS if prefix else ())]
            near = next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.6)), None)
        return f" (did you mean `{prefix}{near}`?)" if near else " (--help lists all options)"

    def _nearest_choice(self, name: str, tokens: list[str]) -> str:
        choices = [str(choice) for choice in choices_of(self.fields[name], self.hints[name])]
        given = tokens[0].partition("=")[2] or (tokens[1] if len(tokens) > 1 else "")
        near = difflib.get_close_matches(given, choices, n=1)
        return f" (did you mean `{near[0]}`?)" if near else ""


def _make_parser(classes: tuple[type, ...]) -> Any:
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> Any:
            raise _Refused(message)

    return Parser(classes, allow_abbrev=False, add_help=False)


def _default(f: dataclasses.Field) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def choices_of(f: dataclasses.Field, hint: Any) -> list[Any]:
    """The values an option is limited to; empty when it is not."""
    if f.metadata.get("choices"):
        return list(f.metadata["choices"])
    enums: list[Any] = [arg for arg in get_args(hint) if isinstance(arg, enum.EnumMeta)]
    return [member.value for kind in enums for member in kind]


def type_name(hint: Any) -> str:
    """A type as the help shows it: `float | None` -> `float`."""
    if isinstance(hint, enum.EnumMeta):
        return "str"
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    names = dict.fromkeys(type_name(arg) for arg in get_args(hint) if arg is not type(None))
    return "list" if "list" in str(hint) else " or ".join(names)


def _chunks(tokens: list[str]) -> Iterator[list[str]]:
    """Group `--name value value --other ...` by option."""
    chunk: list[str] = []
    for token in tokens:
        if token.startswith("--") and chunk:
            yield chunk
            chunk = []
        chunk.append(token)
    if chunk:
        yield chunk


def _read_or_tell(path: Path, problems: list[str]) -> dict[Any, Any]:
    """The mapping in a YAML file; when it cannot be read, the reason is appended to `problems`."""
    try:
        return read_yaml(path)
    except ConfigError as error:
        problems += error.problems
        return {}


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, broken, not a mapping, or has a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def no_duplicates(loader: Any, node: Any) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConfigError([f"{path}: `{key}` cannot be a key (line {key_node.start_mark.line + 1})"])
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError([f"{path}: key `{key}` stands twice (again in line {line})"])
            seen.add(key)
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, no_duplicates)
    try:
        with open(path, encoding="utf-8") as file:
            document = yaml.load(file, Loader)  # a SafeLoader: builds plain data only
    except FileNotFoundError:
        raise ConfigError([f"there is no config file {path}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last two from odd dates and deep nesting
        raise ConfigError([f"{path} is not valid YAML: {' '.join(str(error).split())}"]) from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError([f"{path} must be a mapping of options (`key: value`), not a {type(document).__name__}"])
    return document
