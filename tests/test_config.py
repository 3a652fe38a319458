"""Strict options: layers, types, suggestions, everything wrong told at once, and a resolved config that repeats a run."""

from __future__ import annotations

import dataclasses
import enum
import os
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmcore_hf import config, registry, resources
from llmcore_hf.config import COMMAND_LINE, DEFAULTS, HOUSE, Config, Options, RunArguments
from llmcore_hf.errors import ConfigError, UserError
from llmcore_hf.registry import Module

TRAINERS = [module.name for module in registry.MODULES if module.trains_on]  # the others are lessons


class Strategy(enum.Enum):
    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"


@dataclass
class FakeArguments:
    """The kinds of options TRL's configs have, without torch."""

    learning_rate: float = 1e-3
    per_device_train_batch_size: int = 8
    max_steps: int = 10
    seed: int = 42
    bf16: bool = False
    shuffle: bool = True
    tf32: bool | None = None
    eval_strategy: Strategy | str = Strategy.NO
    scheduler: str = field(default="linear", metadata={"choices": ["linear", "cosine"]})
    run_name: str | None = None
    model_revision: str = "main"
    model_init_kwargs: dict | str | None = None
    lora_target_modules: list[str] | None = None
    loss_weights: list[float] = field(default_factory=list)
    report_to: str = "none"
    output_dir: str | None = None
    resume_from_checkpoint: str | None = None
    hub_token: str | None = None
    computed: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.bf16 and self.tf32:
            raise ValueError("bf16 and tf32\nexclude each other")


@dataclass
class MoreArguments:
    dataset_name: str | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        if self.max_samples == 0:
            raise ValueError("max_samples must not be 0")


HOUSE_VALUES = {"bf16": False, "tf32": False, "model_revision": "house"}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lesson(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Module:
    """A module `fake` whose toy recipe is `tmp_path/recipes/fake/toy.yaml`; tests run in `tmp_path`."""
    code = types.ModuleType("fake_lesson")
    code.argument_classes = lambda: (RunArguments, MoreArguments, FakeArguments)  # type: ignore[attr-defined]
    code.house_defaults = lambda explicit: dict(HOUSE_VALUES)  # type: ignore[attr-defined]
    code.check = lambda config: []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_lesson", code)
    module = Module("fake", 1, 1, "假", "Fake", "fake_lesson")
    monkeypatch.setattr(registry, "MODULES", (module,))
    shipped = resources.path
    monkeypatch.setattr(resources, "path", lambda name: tmp_path / name if "fake" in name else shipped(name))
    write("recipes/fake/toy.yaml", "max_steps: 5\nrun_name: toy\n")
    return module


def write(name: str, text: str | bytes) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return name


def resolve(*argv: str) -> Config:
    request = config.read_request(list(argv))
    assert request.module is not None
    return config.resolve(registry.get(request.module), request)


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(*argv)
    return caught.value.problems


def from_yaml(text: str | bytes) -> tuple[dict[str, Any], list[str]]:
    problems: list[str] = []
    values = Options((FakeArguments,)).from_yaml(Path(write("f.yaml", text)), "f.yaml", problems)
    return values, problems


def from_command_line(*tokens: str) -> tuple[dict[str, Any], list[str]]:
    problems: list[str] = []
    return Options((FakeArguments,)).from_command_line(list(tokens), problems), problems


def yaml_problem(text: str | bytes) -> str:
    values, problems = from_yaml(text)
    assert len(problems) == 1, (values, problems)
    assert not values
    return problems[0]


def line_problem(*tokens: str) -> str:
    values, problems = from_command_line(*tokens)
    assert len(problems) == 1, (values, problems)
    assert not values
    return problems[0]


# ---------------------------------------------------------------- layers


LAYERS = [
    ((), 10, DEFAULTS),
    (("--toy",), 5, "recipes/fake/toy.yaml"),
    (("--toy", "--config", "mine.yaml"), 7, "mine.yaml"),
    (("--config", "mine.yaml"), 7, "mine.yaml"),
    (("--toy", "--config", "mine.yaml", "--max_steps", "9"), 9, COMMAND_LINE),
    (("--toy", "--max_steps", "9"), 9, COMMAND_LINE),
    (("--max_steps", "9", "--toy", "--config", "mine.yaml"), 9, COMMAND_LINE),
]


@pytest.mark.parametrize(("argv", "value", "source"), LAYERS)
def test_each_layer_overrides_the_ones_before(lesson: Module, argv: tuple, value: int, source: str) -> None:
    write("mine.yaml", "max_steps: 7\n")
    resolved = resolve("--module", "fake", *argv)
    assert resolved.values["max_steps"] == value
    assert resolved.part(FakeArguments).max_steps == value
    assert resolved.sources["max_steps"] == source


@pytest.mark.parametrize("layer", ["toy", "file", "line"])
def test_house_defaults_stand_above_dataclass_defaults_and_below_everything_else(lesson: Module, layer: str) -> None:
    assert resolve("--module", "fake").values["model_revision"] == "house"
    assert resolve("--module", "fake").part(FakeArguments).model_revision == "house"
    write("recipes/fake/toy.yaml", "model_revision: mine\n" if layer == "toy" else "")
    write("mine.yaml", "model_revision: mine\n" if layer == "file" else "")
    options = ["--model_revision", "mine"] if layer == "line" else []
    resolved = resolve("--module", "fake", "--toy", "--config", "mine.yaml", *options)
    assert resolved.values["model_revision"] == "mine"
    assert resolved.part(FakeArguments).model_revision == "mine"


def test_a_layer_replaces_only_what_it_names(lesson: Module) -> None:
    write("mine.yaml", "run_name: null\n")
    values = resolve("--module", "fake", "--toy", "--config", "mine.yaml", "--seed", "1").values
    assert (values["max_steps"], values["run_name"], values["seed"]) == (5, None, 1)


def test_the_toy_recipe_is_not_read_without_toy(lesson: Module) -> None:
    write("recipes/fake/toy.yaml", "no such key: 1")
    assert resolve("--module", "fake").values["run_name"] is None


def test_house_defaults_see_what_the_user_asked_for(lesson: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(lesson.load(), "house_defaults", lambda explicit: seen.update(explicit) or {})
    resolve("--module", "fake", "--toy", "--seed", "3")
    assert seen == {"max_steps": 5, "run_name": "toy", "seed": 3}


def test_is_set_tells_a_users_value_from_a_default(lesson: Module) -> None:
    resolved = resolve("--module", "fake", "--toy", "--seed", "42")
    assert resolved.is_set("seed") and resolved.is_set("max_steps")
    assert not resolved.is_set("learning_rate") and not resolved.is_set("model_revision")


def test_the_last_of_a_repeated_option_counts(lesson: Module) -> None:
    assert resolve("--module", "fake", "--seed", "1", "--seed=2").values["seed"] == 2


def test_part_finds_the_dataclass_and_its_subclasses(lesson: Module) -> None:
    resolved = resolve("--module", "fake", "--max_samples", "3", "--overwrite_output_dir")
    assert resolved.part(MoreArguments).max_samples == 3
    assert resolved.part(RunArguments).overwrite_output_dir is True


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["--learning_rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--learning_rate=1e-4"], {"learning_rate": 1e-4}),
        (["--learning-rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--learning-rate=1e-4"], {"learning_rate": 1e-4}),
        (["--max-steps=-1"], {"max_steps": -1}),
        (["--max_steps", "-1"], {"max_steps": -1}),
        (["--bf16"], {"bf16": True}),
        (["--bf16", "true"], {"bf16": True}),
        (["--bf16=no"], {"bf16": False}),
        (["--no_shuffle"], {"shuffle": False}),
        (["--no-shuffle"], {"shuffle": False}),
        (["--shuffle", "false"], {"shuffle": False}),
        (["--tf32", "yes"], {"tf32": True}),
        (["--bf16", "--seed", "1"], {"bf16": True, "seed": 1}),
        (["--eval_strategy", "epoch"], {"eval_strategy": "epoch"}),
        (["--run_name=--odd=name"], {"run_name": "--odd=name"}),
        (["--run_name", ""], {"run_name": ""}),
        (["--run_name="], {"run_name": ""}),
        (["--lora_target_modules", "q", "k"], {"lora_target_modules": ["q", "k"]}),
        (["--loss_weights", "-1", "0.5"], {"loss_weights": [-1.0, 0.5]}),
    ],
)
def test_values_are_read_from_the_command_line(tokens: list[str], expected: dict[str, Any]) -> None:
    assert from_command_line(*tokens) == (expected, [])


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--learning_rat", "1"], ["--learning_rat", "did you mean `--learning_rate`?"]),
        (["--learning-rat=1"], ["--learning-rat", "did you mean `--learning_rate`?"]),
        (["--lr", "1"], ["did you mean `--learning_rate`?"]),
        (["--batch_size", "1"], ["did you mean `--per_device_train_batch_size`?"]),
        (["--confg", "mine.yaml"], ["unknown option `--confg`", "did you mean `--config`?"]),
        (["--modul", "sft"], ["unknown option `--modul`", "did you mean `--module`?"]),
        (["--zzzzzz", "1"], ["unknown option `--zzzzzz`", "--help"]),
        (["--computed", "1"], ["unknown option `--computed`"]),  # no option: `init=False`
        (["--no_bf16"], ["unknown option `--no_bf16`", "did you mean `--bf16`?"]),  # off already
        (["--no_max_steps"], ["unknown option `--no_max_steps`", "did you mean `--max_steps`?"]),
        (["--max_steps", "ten"], ["max_steps", "int", "'ten'"]),
        (["--max_steps", "1.5"], ["max_steps", "int", "'1.5'"]),
        (["--max_steps="], ["max_steps", "int"]),
        (["--max_steps"], ["max_steps", "expected one argument"]),
        (["--max_steps", "1", "2"], ["max_steps", "one value", "2"]),
        (["--learning_rate", "fast"], ["learning_rate", "float", "'fast'"]),
        (["--bf16", "perhaps"], ["bf16", "perhaps", "true/false"]),
        (["--loss_weights", "1", "x"], ["loss_weights", "float", "'x'"]),
        (["--lora_target_modules"], ["lora_target_modules", "at least one"]),
        (["--eval_strategy", "step"], ["eval_strategy", "'step'", "did you mean `steps`?"]),
        (["--eval_strategy=step"], ["eval_strategy", "did you mean `steps`?"]),
        (["--scheduler", "cosin"], ["scheduler", "did you mean `cosine`?"]),
        (["stray"], ["`stray`", "options begin with `--`"]),
        (["-s", "1"], ["`-s`", "options begin with `--`"]),
    ],
)
def test_what_is_wrong_on_the_command_line_is_named(tokens: list[str], words: list[str]) -> None:
    problem = line_problem(*tokens)
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    "prefix", ["--max", "--max_step", "--learn", "--learning", "--report", "--no_shuf", "--overwrite"]
)
def test_prefixes_of_an_option_are_refused(lesson: Module, prefix: str) -> None:
    [problem] = problems_of("--module", "fake", prefix, "1")
    assert f"unknown option `{prefix}`" in problem


@pytest.mark.parametrize("prefix", ["--mod", "--conf", "--to"])
def test_prefixes_of_the_request_options_are_refused(lesson: Module, prefix: str) -> None:
    [problem] = problems_of("--module", "fake", prefix, "fake")
    assert f"unknown option `{prefix}`" in problem


@pytest.mark.parametrize("given", ["--Learning_rate", "--max_step", "--bf_16", "--evalstrategy", "--run-nam", "--sead"])
def test_a_misspelt_option_gets_a_suggestion(given: str) -> None:
    assert "did you mean `--" in line_problem(given, "1")


def test_a_negative_number_is_a_value_and_a_word_with_a_dash_is_not() -> None:
    assert from_command_line("--run_name", "-5") == ({"run_name": "-5"}, [])
    assert "run_name" in line_problem("--run_name", "-x")


@pytest.mark.parametrize("option", ["--module", "--config"])
@pytest.mark.parametrize("after", [[], ["--toy"]])
def test_request_options_need_their_value(lesson: Module, option: str, after: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{option} needs a value"):
        config.read_request([option, *after])


def test_an_empty_config_value_is_refused(lesson: Module) -> None:
    assert any("--config" in problem for problem in problems_of("--module", "fake", "--config="))


def test_request_options_are_taken_out_in_both_spellings(lesson: Module) -> None:
    write("mine.yaml", "")
    spaced = config.read_request(["--module", "fake", "--config", "mine.yaml", "--toy", "--seed", "1"])
    joined = config.read_request(["--seed", "1", "--toy", "--config=mine.yaml", "--module=fake"])
    assert spaced == joined == config.Request("fake", True, "mine.yaml", ["--seed", "1"])


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: 1e-4", 1e-4),  # text to a YAML 1.1 reader
        ("learning_rate: '1e-4'", 1e-4),
        ("learning_rate: 1", 1.0),
        ("max_steps: '3'", 3),
        ("bf16: yes", True),
        ("bf16: 'no'", False),
        ("tf32: null", None),
        ("run_name: null", None),
        ("run_name: 'null'", "null"),
        ("run_name: 'no'", "no"),
        ("run_name: '1e-4'", "1e-4"),
        ("run_name: --odd=name", "--odd=name"),
        ("run_name: 排序", "排序"),
        ("eval_strategy: 'steps'", "steps"),
        ("lora_target_modules: [q, k]", ["q", "k"]),
        ("lora_target_modules: all-linear", ["all-linear"]),
        ("loss_weights: [-1, 5.0e-1]", [-1.0, 0.5]),
        ("loss_weights: [-1.0e-3]", [-1e-3]),
        ("lora_target_modules: [--odd, -x]", ["--odd", "-x"]),
        ("model_init_kwargs: {a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_yaml_values_get_the_type_of_their_option(text: str, expected: Any) -> None:
    values, problems = from_yaml(text)
    assert not problems
    [value] = values.values()
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1", ["unknown key `learning_rat`", "did you mean `learning_rate`?"]),
        ("learning-rate: 1", ["unknown key", "did you mean `learning_rate`?"]),
        ("no_shuffle: true", ["unknown key", "did you mean `shuffle`?"]),
        ("lr: 1", ["did you mean `learning_rate`?"]),
        ("max: 1", ["unknown key `max`"]),
        ("computed: 1", ["unknown key `computed`"]),
        ("config: other.yaml", ["unknown key `config`"]),
        ("1: 2", ["unknown key `1`"]),
        ("max_steps: ten", ["max_steps", "int", "'ten'"]),
        ("max_steps: 1.5", ["max_steps", "int"]),
        ("max_steps: true", ["max_steps", "int"]),
        ("max_steps: null", ["max_steps", "null"]),
        ("max_steps: [1, 2]", ["max_steps", "one value"]),
        ("max_steps: {a: 1}", ["max_steps", "mapping"]),
        ("learning_rate: true", ["learning_rate", "float"]),
        ("learning_rate: fast", ["learning_rate", "'fast'"]),
        ("bf16: 2", ["bf16", "true/false"]),
        ("bf16: null", ["bf16", "null"]),
        ("eval_strategy: no", ["eval_strategy", "False"]),  # bare `no` is False in YAML 1.1
        ("eval_strategy: step", ["eval_strategy", "did you mean `steps`?"]),
        ("scheduler: cosin", ["scheduler", "did you mean `cosine`?"]),
        ("loss_weights: [1, x]", ["loss_weights", "'x'"]),
        ("lora_target_modules: {a: b}", ["lora_target_modules", "list", "mapping"]),
        ("env: {CUDA_VISIBLE_DEVICES: 0}", ["env", "shell"]),
        ("env: null", ["env", "shell"]),
        ("seed: 1\nbf16: true\nseed: 2", ["seed", "twice", "line 3"]),
        ("model_init_kwargs:\n  a: 1\n  a: 2", ["`a`", "twice", "line 3"]),
        ("- seed", ["mapping", "list"]),
        ("seed", ["mapping", "str"]),
        ("seed: [1", ["not valid YAML"]),
        ("\tseed: 1", ["not valid YAML"]),
        ("seed: 1\n---\nseed: 2", ["not valid YAML"]),
        ("seed: !!python/object/apply:os.getpid []", ["not valid YAML"]),
        (b"run_name: \xff\xfe\xe9", ["cannot be read"]),
    ],
)
def test_what_is_wrong_in_a_yaml_file_is_named(text: str | bytes, words: list[str]) -> None:
    problem = yaml_problem(text)
    assert "f.yaml" in problem
    assert all(word in problem for word in words), problem


def test_an_env_block_sets_nothing(lesson: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMCORE_TEST", raising=False)
    write("mine.yaml", "env:\n  LLMCORE_TEST: '1'\n")
    problems_of("--module", "fake", "--config", "mine.yaml")
    assert "LLMCORE_TEST" not in os.environ


def test_an_empty_file_is_an_empty_layer() -> None:
    assert from_yaml("") == ({}, [])
    assert from_yaml("# nothing yet\n") == ({}, [])


def test_a_missing_file_and_a_folder_are_refused_by_name(lesson: Module, tmp_path: Path) -> None:
    assert "there is no config file nowhere.yaml" in problems_of("--module", "fake", "--config", "nowhere.yaml")[0]
    assert "cannot be read" in problems_of("--module", "fake", "--config", str(tmp_path))[0]


@pytest.mark.parametrize("word", ["no", "yes", "off", "true"])
def test_a_bare_yaml_word_that_means_a_boolean_does_not_become_the_text_false(word: str) -> None:
    assert "run_name" in yaml_problem(f"run_name: {word}")


@pytest.mark.parametrize("text", ["model_revision: 1.10", "model_revision: 0012345"])
def test_a_number_for_a_text_option_is_not_silently_rewritten(text: str) -> None:
    values, problems = from_yaml(text)
    assert problems or values["model_revision"] == text.partition(": ")[2]


@pytest.mark.parametrize("text", ["max_steps: [1]", "bf16: []", "bf16: [false]", "run_name: [a]"])
def test_a_list_for_a_single_value_is_refused(text: str) -> None:
    assert "one value" in yaml_problem(text)


@pytest.mark.parametrize("name", ["lora_target_modules", "loss_weights"])
def test_an_empty_list_is_a_list(name: str) -> None:
    assert from_yaml(f"{name}: []") == ({name: []}, [])


@pytest.mark.parametrize("text", ["lora_target_modules: [q, null]", "lora_target_modules: [q, yes]"])
def test_list_items_are_type_checked(text: str) -> None:
    assert "lora_target_modules" in yaml_problem(text)


@pytest.mark.parametrize("text", ["? [a]\n: 1", "? {a: 1}\n: 1"])
def test_a_key_that_is_no_text_is_a_problem_not_a_crash(text: str) -> None:
    assert "f.yaml" in yaml_problem(text)


# ---------------------------------------------------------------- everything at once


def test_all_problems_of_all_layers_stand_in_one_message(lesson: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesson.load(), "check", lambda config: ["impossible combination"])
    write("recipes/fake/toy.yaml", "max_step: 1\n")
    write("mine.yaml", "lr: 1\nmax_steps: ten\nenv: {}\nbf16: true\n")
    found = problems_of(
        *("--module", "fake", "--toy", "--config", "mine.yaml"),
        *("--sead", "1", "stray", "--tf32", "true", "--max_samples", "0", "--eval_strategy", "x"),
    )
    expected = [
        "recipes/fake/toy.yaml: unknown key `max_step`",
        "mine.yaml: unknown key `lr`",
        "mine.yaml: `max_steps`",
        "env",
        "--sead",
        "eval_strategy",
        "impossible combination",
        "max_samples must not be 0",
        "bf16 and tf32 exclude each other",
    ]
    assert all(any(words in problem for problem in found) for words in expected), found


def test_the_message_lists_every_problem_and_their_number(lesson: Module) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("--module", "fake", "--sead", "1", "--max_steps", "x")
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 problems in the options of `fake`:"
    assert len(lines) == 3 and all(line.startswith("  - ") for line in lines[1:])


@pytest.mark.parametrize(
    "text", [pytest.param("seed: [1", id="broken"), pytest.param("seed: 1\nseed: 2", id="twice"), None]
)
def test_an_unreadable_config_does_not_hide_a_wrong_option(lesson: Module, text: str | None) -> None:
    if text:
        write("mine.yaml", text)
    found = problems_of("--module", "fake", "--config", "mine.yaml", "--sead", "1")
    assert len(found) == 2 and "mine.yaml" in found[0] and "--sead" in found[1]


def test_the_same_problem_is_told_once(lesson: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesson.load(), "check", lambda config: ["max_samples must not be 0"])
    assert problems_of("--module", "fake", "--max_samples", "0") == ["max_samples must not be 0"]


def test_a_wrong_value_is_left_out_so_that_the_other_checks_can_be_made(lesson: Module) -> None:
    found = problems_of("--module", "fake", "--seed", "x", "--bf16", "--tf32", "true")
    assert len(found) == 2


def test_config_errors_are_user_errors_with_exit_code_2() -> None:
    error = ConfigError(["one", "two"])
    assert isinstance(error, UserError) and error.exit_code == 2 and error.problems == ["one", "two"]


# ---------------------------------------------------------------- a config that names its module


def test_a_config_may_name_its_module_and_ask_for_the_toy_recipe(lesson: Module) -> None:
    write("mine.yaml", "module: fake\ntoy: true\nseed: 1\n")
    resolved = resolve("--config", "mine.yaml")
    assert (resolved.module, resolved.toy, resolved.values["max_steps"], resolved.values["seed"]) == (
        "fake",
        True,
        5,
        1,
    )


def test_a_config_for_another_module_is_refused(lesson: Module) -> None:
    write("mine.yaml", "module: dpo\n")
    assert "`dpo`" in problems_of("--module", "fake", "--config", "mine.yaml")[0]


@pytest.mark.parametrize("value", ["'yes'", "1", "null", "[true]", "maybe"])
def test_toy_in_a_config_is_true_or_false(lesson: Module, value: str) -> None:
    write("mine.yaml", f"module: fake\ntoy: {value}\n")
    assert "toy" in problems_of("--config", "mine.yaml")[0]


# ---------------------------------------------------------------- resolved_config.yaml


def repeat(resolved: Config, *argv: str) -> Config:
    return resolve("--config", write("resolved_config.yaml", resolved.to_yaml()), *argv)


def same_values(first: Config, second: Config) -> bool:
    return {n: (type(v), v) for n, v in first.values.items()} == {n: (type(v), v) for n, v in second.values.items()}


def plain(resolved: Config) -> dict[str, Any]:
    """Values with the members of an enum as what stands behind them."""
    return {n: v.value if isinstance(v, enum.Enum) else v for n, v in resolved.values.items()}


def test_the_resolved_config_alone_repeats_the_run(lesson: Module) -> None:
    write("mine.yaml", "learning_rate: 1e-5\nmodel_init_kwargs: {a: {b: [1, null]}}\nlora_target_modules: [q, k]\n")
    first = resolve("--module", "fake", "--toy", "--config", "mine.yaml", "--eval_strategy", "steps", "--tf32", "true")
    second = repeat(first)
    assert plain(second) == plain(first)
    assert second.parts == first.parts and (second.module, second.toy) == ("fake", True)


def test_defaults_that_are_empty_come_back_empty(lesson: Module) -> None:
    second = repeat(resolve("--module", "fake", "--run_name="))
    assert second.values["loss_weights"] == [] and second.values["run_name"] == ""


def test_the_command_line_overrides_a_resolved_config(lesson: Module) -> None:
    first = resolve("--module", "fake", "--seed", "1", "--loss_weights", "1")
    assert repeat(first, "--seed", "2").values["seed"] == 2


def test_the_resolved_config_holds_even_when_recipe_and_house_defaults_change(lesson: Module) -> None:
    first = resolve("--module", "fake", "--toy", "--loss_weights", "1")
    text = first.to_yaml()
    write("recipes/fake/toy.yaml", "max_steps: 99\nlearning_rate: 1\n")
    lesson.load().house_defaults = lambda explicit: {"model_revision": "another machine"}  # type: ignore[attr-defined]
    second = resolve("--config", write("r.yaml", text))
    assert plain(second) == plain(first)


def test_the_resolved_config_says_where_each_value_came_from(lesson: Module) -> None:
    write("mine.yaml", "max_samples: 7\n")
    text = resolve("--module", "fake", "--toy", "--config", "mine.yaml", "--seed", "1").to_yaml()
    sections = {part.split("\n")[0]: yaml.safe_load(part.partition("\n")[2]) for part in text.split("\n# ")[1:]}
    assert sections[COMMAND_LINE] == {"seed": 1}
    assert sections["mine.yaml"] == {"max_samples": 7}
    assert sections["recipes/fake/toy.yaml"] == {"max_steps": 5, "run_name": "toy"}
    assert sections[HOUSE] == HOUSE_VALUES
    assert sections[DEFAULTS]["learning_rate"] == 1e-3


def test_every_option_stands_in_the_resolved_config_but_places_and_secrets(lesson: Module) -> None:
    resolved = resolve(
        "--module", "fake", "--output_dir", "out", "--resume_from_checkpoint", "last", "--hub_token", "x"
    )
    document = yaml.safe_load(resolved.to_yaml())
    left_out = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "hub_token"}
    assert set(document) == {"module", "toy", "explicit", *resolved.values} - left_out


def test_a_repeated_run_knows_what_was_chosen_and_what_was_left_at_its_default(lesson: Module) -> None:
    """A default that somebody chose is a decision, and one that nobody chose is none, in a repeated run as well."""
    first = resolve("--module", "fake", "--toy", "--bf16", "false", "--output_dir", "out")
    second = repeat(first)
    third = repeat(second, "--seed", "42")
    for resolved in (second, third):
        assert {n for n in resolved.values if resolved.is_set(n)} - {"output_dir", "seed"} == {
            *("max_steps", "run_name"),  # of the recipe
            "bf16",
        }
    assert third.is_set("seed") and not second.is_set("seed")


def test_what_was_chosen_is_a_list(lesson: Module) -> None:
    assert "`explicit` is a list" in problems_of("--config", write("r.yaml", "module: fake\nexplicit: 3\n"))[0]


@pytest.mark.parametrize("how", ["line", "file"])
def test_the_hub_token_is_used_but_never_written(lesson: Module, how: str) -> None:
    write("mine.yaml", "hub_token: hf_secret\n")
    given_as = ["--config", "mine.yaml"] if how == "file" else ["--hub_token", "hf_secret"]
    resolved = resolve("--module", "fake", *given_as)
    assert resolved.part(FakeArguments).hub_token == "hf_secret"
    assert "hf_secret" not in resolved.to_yaml() and "hub_token" not in resolved.to_yaml()


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "\xa0",
        "\x85",
        "no",
        "null",
        "none",
        "1e-4",
        "-1",
        "--x",
        "a=b",
        "~",
        "{",
        "[a]",
        "%",
        "a: b",
        "# c",
        " x ",
        "\n",
        "'",
        '"',
        "0x10",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "run_name": texts | st.none(),
            "learning_rate": st.floats(allow_nan=False),
            "max_steps": st.integers(-(2**40), 2**40),
            "bf16": st.booleans(),
            "tf32": st.none() | st.booleans(),
            "eval_strategy": st.sampled_from([member.value for member in Strategy]),
            "lora_target_modules": st.none() | st.lists(texts, max_size=3),
            "loss_weights": st.lists(st.floats(-1e9, 1e9), max_size=3),
            "model_init_kwargs": st.none() | st.dictionaries(texts, texts | st.integers() | st.none(), max_size=3),
        },
    )
)
def test_any_values_survive_the_way_through_a_yaml_file(values: dict[str, Any]) -> None:
    sources = dict.fromkeys(values, DEFAULTS)
    text = Config("fake", False, values, sources, parts=()).to_yaml()
    read, problems = from_yaml(text)
    assert not problems
    assert {n: v.value if isinstance(v, enum.Enum) else v for n, v in read.items()} == values


# ---------------------------------------------------------------- the real modules


@pytest.mark.parametrize("name", [module.name for module in registry.MODULES])
def test_a_resolved_config_of_a_real_module_repeats_it(name: str) -> None:
    first = resolve("--module", name, "--toy", "--seed", "7")
    second = repeat(first)
    assert plain(second) == plain(first)
    assert (second.module, second.toy) == (name, True)
    for one, other in zip(first.parts, second.parts, strict=True):
        assert one.__class__ is other.__class__
        assert comparable(one) == comparable(other)


def comparable(part: Any) -> dict[str, str]:
    """Everything in a dataclass but the moment it was made (`logging_dir` and the like carry a time stamp)."""
    return {f.name: repr(getattr(part, f.name, None)) for f in dataclasses.fields(part) if f.name != "logging_dir"}


@pytest.mark.parametrize("name", [module.name for module in registry.MODULES])
def test_every_option_of_a_real_module_can_be_given_both_ways(name: str) -> None:
    options = Options(registry.get(name).load().argument_classes())
    for option, f in options.fields.items():
        value = example(f, options.hints[option])
        problems: list[str] = []
        by_line = options.from_command_line([f"--{option}={value}"], problems)
        by_hyphen = options.from_command_line([f"--{option.replace('_', '-')}", str(value)], problems)
        file = Path(write("one.yaml", yaml.safe_dump({option: str(value)})))
        by_file = options.from_yaml(file, "one.yaml", problems)
        assert not problems and by_line == by_hyphen == by_file, (option, value, problems)


def example(f: dataclasses.Field, hint: Any) -> Any:
    if choices := config.choices_of(f, hint):
        return choices[0]
    if f.name == "debug":
        return "underflow_overflow"
    kinds = get_args(hint) or (hint,)
    if "dict" in str(hint):
        return "{}" if str in kinds else "none"
    if bool in kinds:
        return "true"
    if {int, float, list[int], list[float]} & set(kinds):
        return 1
    return "text" if str in kinds or list[str] in kinds else "none"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--model_name_or_path is missing", "--dataset_name is missing"]),
        (["--toy", "--fp16"], ["--fp16 needs a GPU"]),
        (["--toy", "--lora_r", "4"], ["--lora_r has no effect without --use_peft"]),
        (["--toy", "--use_peft", "--lora_r", "0"], ["--lora_r must be greater than 0"]),
        (["--toy", "--learning_rate", "-1"], ["--learning_rate must be greater than 0"]),
        (["--toy", "--learning_rate", "nan"], ["--learning_rate must be greater than 0"]),
        (["--toy", "--learning_rate", "inf"], ["--learning_rate"]),
        (["--toy", "--per_device_train_batch_size", "0"], ["--per_device_train_batch_size must be greater than 0"]),
        (["--toy", "--test_split_size", "1"], ["--test_split_size must lie between 0 and 1"]),
        (["--toy", "--max_generation_samples", "-1"], ["--max_generation_samples must not be negative"]),
        (["--toy", "--model_name_or_path", "./nothing"], ["./nothing: there is no such folder"]),
        (["--toy", "--dataset_name", "nothing.jsonl"], ["nothing.jsonl: there is no such file"]),
        (["--toy", "--dataset_streaming", "--max_steps", "-1"], ["--dataset_streaming needs --max_steps"]),
        (["--toy", "--dataset_streaming", "--max_eval_samples", "none"], ["--dataset_streaming needs --max_eval"]),
        (["--toy", "--dataset_streaming", "--dataloader_num_workers", "2"], ["--dataloader_num_workers must be 0"]),
        (["--toy", "--columns", "prompt"], ["--columns: `prompt` is not NAME=COLUMN"]),
        (["--toy", "--columns", "promt=q"], ["--columns: no format reads `promt`", "prompt"]),
        (["--toy", "--columns", "prompt=q,prompt=r"], ["--columns: `prompt` is given twice"]),
        (["--toy", "--on_bad_rows", "ignore"], ["ignore", "stop", "drop", "keep"]),
        (["--toy", "--load_in_4bit"], ["add --use_peft", "CUDA"]),
        (["--toy", "--load_best_model_at_end"], ["load_best_model_at_end"]),
        (["--toy", "--lr_scheduler_kwargs", "text"], ["lr_scheduler_kwargs"]),
        (["--toy", "--lr_scheduler_kwargs", '{"a":}'], ["lr_scheduler_kwargs"]),
        (["--toy", "--deepspeed", "nothing.json"], ["deepspeed"]),
        (["--toy", "--resume_from_checkpoint", "last", "--overwrite_output_dir"], ["--overwrite_output_dir"]),
    ],
)
def test_impossible_combinations_are_refused(
    argv: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_gpu(monkeypatch)
    found = " | ".join(problems_of("--module", "sft", *argv))
    assert all(word in found for word in words), found


@pytest.mark.parametrize("option", ["fsdp_config", "accelerator_config", "deepspeed", "lr_scheduler_kwargs"])
def test_a_json_file_that_does_not_exist_is_a_problem_not_a_crash(option: str) -> None:
    found = " | ".join(problems_of("--module", "sft", "--toy", "--fsdp", "full_shard", f"--{option}", "nothing.json"))
    assert option in found or "nothing.json" in found


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--beta", "0"], ["--beta must be greater than 0"]),
        (["--beta", "nan"], ["--beta must be greater than 0"]),
        (["--loss_type", "sigmoi"], ["sigmoi", "is not one of"]),
        (["--loss_type", "sigmoi"], ["did you mean `sigmoid`?"]),
        (["--loss_weights", "1"], ["loss_weights"]),
        (["--padding_free"], ["--padding_free"]),
        (["--sync_ref_model", "--use_peft"], ["--sync_ref_model", "--use_peft"]),
        (["--sync_ref_model", "--precompute_ref_log_probs"], ["--sync_ref_model", "--precompute_ref_log_probs"]),
        (["--loss_type", "exo_pair"], ["--label_smoothing"]),
        (["--precompute_ref_log_probs", "--dataset_streaming"], ["--precompute_ref_log_probs", "--dataset_streaming"]),
    ],
)
def test_impossible_combinations_of_dpo_are_refused(argv: list[str], words: list[str]) -> None:
    found = " | ".join(problems_of("--module", "dpo", "--toy", *argv))
    assert all(word in found for word in words), found


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("name", TRAINERS)
def test_lists_of_trackers_can_be_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = "transformers.integrations.get_available_reporting_integrations"
    monkeypatch.setattr(installed, lambda: ["tensorboard", "wandb"])
    write("mine.yaml", "report_to: [tensorboard, wandb]\n")
    assert resolve("--module", name, "--toy", "--config", "mine.yaml").values["report_to"] == ["tensorboard", "wandb"]


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["wandb"])
    with pytest.raises(ConfigError, match="--report_to tensorbord"):
        resolve("--module", "dpo", "--toy", "--report_to", "tensorbord")


def test_lora_options_reach_trls_model_config() -> None:
    from trl import ModelConfig

    argv = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]
    model_args = resolve("--module", "dpo", "--toy", *argv).part(ModelConfig)
    assert (model_args.use_peft, model_args.lora_r, model_args.lora_target_modules) == (True, 4, ["q_proj", "v_proj"])


@pytest.mark.parametrize("name", TRAINERS)
def test_defaults_that_hurt_on_a_cpu_are_off_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpu(monkeypatch)
    values = resolve("--module", name, "--toy").values
    names = ["bf16", "fp16", "activation_checkpointing", "gradient_checkpointing", "dataloader_pin_memory"]
    assert [values[n] for n in names] == [False] * 5 and values["use_cpu"] is True


@pytest.mark.parametrize("name", TRAINERS)
def test_defaults_that_help_on_a_gpu_are_on_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    on_gpu = registry.get(name).load().house_defaults({})
    assert on_gpu["bf16"] and on_gpu["activation_checkpointing"] and not on_gpu["use_cpu"]
    assert not registry.get(name).load().house_defaults({"use_cpu": True})["bf16"]
    assert "bf16" not in registry.get(name).load().house_defaults({"fp16": True})
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert registry.get(name).load().house_defaults({})["use_cpu"]


@pytest.mark.parametrize("name", TRAINERS)
def test_nothing_is_reported_to_anyone_by_default(name: str) -> None:
    resolved = resolve("--module", name, "--toy")
    assert resolved.values["report_to"] in ("none", [])
    assert resolved.values["push_to_hub"] is False


def test_a_repeated_run_decides_about_conversations_as_the_first_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """With conversations, `sft` turns on `assistant_only_loss` unless the user decided about it."""
    from llmcore_hf.alignment import sft

    splits = types.SimpleNamespace(train=types.SimpleNamespace(column_names=["messages"]))
    monkeypatch.setattr(sft.training, "prepare", lambda *args: types.SimpleNamespace(tokenizer=None))
    monkeypatch.setattr(sft.training, "require_chat_template", lambda *args: None)
    monkeypatch.setattr(sft.training, "load_splits", lambda *args: splits)
    monkeypatch.setattr(sft, "prompt_limit", lambda *args: None)
    trained: list[bool] = []

    def stop(config: Config, job: Any, splits: Any, args: Any) -> None:
        trained.append(args.assistant_only_loss)
        raise UserError("enough")

    monkeypatch.setattr(sft, "make_trainer", stop)
    run = types.SimpleNamespace(write=lambda name, text: None, path=Path())
    first = resolve("--module", "sft", "--toy")
    for resolved in (
        first,
        lambda: repeat(first),
        lambda: resolve("--module", "sft", "--toy", "--assistant_only_loss=no"),
    ):
        with pytest.raises(UserError, match="enough"):
            sft.run(resolved if isinstance(resolved, Config) else resolved(), run)  # type: ignore[arg-type]
    assert trained == [True, True, False]


def test_a_misspelt_built_in_name_is_refused_with_a_suggestion() -> None:
    argv = ["--module", "dpo", "--model_name_or_path", "tiny-gwen-base", "--dataset_name", "toy-sort-preferences"]
    with pytest.raises(ConfigError) as caught:
        resolve(*argv)
    assert "did you mean `tiny-qwen-base`?" in str(caught.value)
    assert "did you mean `toy-sort-preference`?" in str(caught.value)


@pytest.mark.parametrize("text", ["seed: 2024-13-45\n", "seed: " + "[" * 3000 + "]" * 3000 + "\n"])
def test_yaml_that_breaks_the_yaml_library_is_one_message(text: str) -> None:
    write("mine.yaml", text)
    with pytest.raises(ConfigError, match="not valid YAML"):
        resolve("--module", "dpo", "--toy", "--config", "mine.yaml")


@pytest.mark.parametrize(
    ("argv", "reason"),
    [(("--seed", "-1"), "--seed must lie"), (("--label_smoothing", "2"), "--label_smoothing must lie")],
)
def test_values_out_of_range_are_refused(argv: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve("--module", "dpo", "--toy", *argv)


def test_toy_takes_no_value_and_module_names_are_suggested_in_any_case() -> None:
    with pytest.raises(ConfigError, match="--toy takes no value"):
        resolve("--module", "dpo", "--toy=1")
    with pytest.raises(ConfigError, match="Did you mean `dpo`"):
        resolve("--module", "DPO", "--toy")
