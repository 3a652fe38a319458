"""The command line: what it prints, what it returns, and what it does not import before it is needed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import llmcore_hf
from llmcore_hf import cli, environment, registry, resources
from llmcore_hf.config import RunArguments
from llmcore_hf.errors import ConfigError, UserError
from llmcore_hf.registry import MODULES, Module

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "evaluate", "matplotlib", "numpy", "yaml")

Output = pytest.CaptureFixture[str]


@dataclass
class FakeArguments:
    seed: int = field(default=42, metadata={"help": "Seed of %d generators, 100%% repeatable."})
    learning_rate: float = 1e-3
    output_dir: str | None = None
    resume_from_checkpoint: str | None = None


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """The configs with which a module called `fake` was run."""
    runs: list[Any] = []
    code = types.ModuleType("fake_lesson", "A lesson in [nothing].")
    code.argument_classes = lambda: (RunArguments, FakeArguments)  # type: ignore[attr-defined]
    code.house_defaults = lambda explicit: {"learning_rate": 0.5}  # type: ignore[attr-defined]
    code.check = lambda config: []  # type: ignore[attr-defined]
    code.run = lambda config, run: runs.append(config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_lesson", code)
    monkeypatch.setattr(
        registry, "MODULES", (*MODULES, Module("fake", 1, 1, "假课", "Fake lesson", "fake_lesson", "ui"))
    )
    monkeypatch.setattr(environment, "device_name", lambda use_cpu=False: "cpu")
    recipe = tmp_path / "toy.yaml"
    recipe.write_text("seed: 7\n")
    shipped = resources.path
    monkeypatch.setattr(resources, "path", lambda name: recipe if name == "recipes/fake/toy.yaml" else shipped(name))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "argv", ["run.py"])
    yield runs


def nothing_was_left() -> bool:
    return not list(Path.cwd().iterdir())


# ---------------------------------------------------------------- commands and exit codes


def test_a_run_returns_0_and_says_where_the_evidence_is(ran: list[Any], capsys: Output) -> None:
    assert cli.main(["--module", "fake", "--toy"]) == 0
    assert ran[0].values["seed"] == 7
    assert "output/fake/" in capsys.readouterr().out
    assert Path("output/fake/latest/summary.json").exists()


def test_the_resolved_config_alone_repeats_a_run_in_a_new_directory(ran: list[Any]) -> None:
    assert cli.main(["--module", "fake", "--toy", "--learning_rate", "1e-5", "--output_dir", "first"]) == 0
    assert cli.main(["--config", "first/resolved_config.yaml"]) == 0
    assert ran[0].values | {"output_dir": None} == ran[1].values
    first = Path("first/resolved_config.yaml").resolve()
    assert Path("output/fake/latest/resolved_config.yaml").resolve() != first


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("mend this"), 1), (ConfigError(["mend this"]), 2), (KeyboardInterrupt(), 130)]
)
def test_an_error_before_the_run_begins_has_its_exit_code_and_no_traceback(
    ran: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Output, error: BaseException, code: int
) -> None:
    def check(config: Any) -> list[str]:
        raise error

    monkeypatch.setattr(sys.modules["fake_lesson"], "check", check)
    assert cli.main(["--module", "fake"]) == code
    out, err = capsys.readouterr()
    assert err.startswith("python run.py: ") and "Traceback" not in err and not out
    assert "mend this" in err or "interrupted" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--module", "fake", "--sead", "1"], ["unknown option `--sead`", "did you mean `--seed`?"]),
        (["--module", "fake", "--seed", "x", "--sead", "1"], ["2 problems", "--sead", "invalid int"]),
        (["--module", "fak", "--toy"], ["no module `fak`", "Did you mean `fake`?"]),
        (["--module", "DPO", "--toy"], ["no module `DPO`", "dpo"]),
        (["--module", "spft"], ["no module `spft`", "Did you mean `sft`?", "sft, dpo"]),
        (["--module", "zzz"], ["no module `zzz`", "sft, dpo"]),
        (["--module"], ["--module needs a value"]),
        (["--module", "--toy"], ["--module needs a value"]),
        (["--toy"], ["no --module", "--list"]),
        (["--modul", "fake", "--toy"], ["--modul`", "did you mean `--module`?"]),
        (["lst"], ["no --module"]),
        (["env", "--toy"], ["no --module"]),
        (["--list", "--toy"], ["--list stands alone"]),
        (["--module", "fake", "--config", "nothing.yaml"], ["there is no config file nothing.yaml"]),
        (["--module", "fake", "stray"], ["`stray` stands alone"]),
    ],
)
def test_wrong_options_return_2_and_nothing_is_begun(
    ran: list[Any], capsys: Output, argv: list[str], words: list[str]
) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert all(word in err for word in words), err
    assert not out and not ran and nothing_was_left()


def test_a_refused_output_directory_returns_2(ran: list[Any], capsys: Output) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("x")
    assert cli.main(["--module", "fake", "--output_dir", "out"]) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err and not ran


def test_no_argument_at_all_shows_the_usage_and_returns_2(capsys: Output) -> None:
    assert cli.main([]) == 2
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_top_level_help_shows_the_commands(capsys: Output, flag: str) -> None:
    assert cli.main([flag]) == 0
    out = capsys.readouterr().out
    assert all(
        word in out for word in ("--module", "--toy", "--config", "--list", "env", "accelerate launch", "latest")
    )
    assert "toy.yaml" in out  # the order of the layers


def test_version(capsys: Output) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llmcore_hf {llmcore_hf.__version__}\n"


@pytest.mark.parametrize(
    ("called", "shown"),
    [
        ("/x/run.py", "python run.py"),
        ("/x/llmcore_hf/__main__.py", "python -m llmcore_hf"),
        ("/bin/llmcore", "llmcore"),
    ],
)
def test_messages_name_the_command_that_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: Output, called: str, shown: str
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    cli.main(["--module", "nothing"])
    assert capsys.readouterr().err.startswith(f"{shown}: ")
    cli.main(["--help"])
    assert f"usage: {shown} --module NAME --toy" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "waits"), [("0", False), ("1", True)])
def test_errors_are_printed_by_the_main_process_before_the_others(
    monkeypatch: pytest.MonkeyPatch, capfd: Any, rank: str, waits: bool
) -> None:
    """A launcher ends the others when the main process ends, so they speak only of what is their own."""
    monkeypatch.setenv("RANK", rank)
    before: list[tuple[float, str]] = []
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: before.append((seconds, capfd.readouterr().err)))
    assert cli.main(["--module", "nothing"]) == 2
    [(seconds, said)] = before
    assert (seconds > 0) is waits and said == "" and "no module `nothing`" in capfd.readouterr().err


def test_telemetry_is_off_unless_the_user_asks_for_it(ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    cli.main(["--module", "fake"])
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    cli.main(["--module", "fake"])
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"


# ---------------------------------------------------------------- --list


def test_the_list_shows_every_module_with_all_columns(
    ran: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    for module in registry.MODULES:
        [cells] = [cells for cells in rows if cells[2:3] == [module.name]]
        extra = f"pip install 'llmcore-hf[{module.extra}]'" if module.extra else ""
        assert cells == [str(module.day), str(module.level), module.name, module.title_en, module.title_zh, extra]


def test_the_list_is_in_the_order_of_the_days(ran: list[Any], capsys: Output) -> None:
    cli.main(["--list"])
    out = capsys.readouterr().out
    assert out.index(" fake ") < out.index(" sft ") < out.index(" dpo ")


def test_the_list_is_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    cli.main(["--list"])
    out = capsys.readouterr().out
    assert all(f" {module.name} " in out for module in MODULES)


def test_rows_of_the_registry_are_complete_and_unique() -> None:
    names = [module.name for module in MODULES]
    assert len(set(names)) == len(names) and {"sft", "dpo"} <= set(names)
    for module in MODULES:
        assert 1 <= module.day <= 14 and 1 <= module.level <= 5
        assert module.title_en.isascii() and not module.title_zh.isascii()
        assert resources.path(f"recipes/{module.name}/toy.yaml").is_file()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_the_code_behind_a_row_offers_what_the_command_line_needs(module: Module) -> None:
    code = module.load()
    for name in ("argument_classes", "house_defaults", "check", "run"):
        assert callable(getattr(code, name))
    assert code.__doc__


# ---------------------------------------------------------------- --module X --help


@pytest.fixture(scope="module")
def module_help() -> dict[str, str]:
    """What `--module X --help` prints, by module."""
    texts = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        for module in MODULES:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert cli.main(["--module", module.name, "--help"]) == 0
            texts[module.name] = out.getvalue()
    return texts


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_the_help_of_a_module_shows_every_option(module: Module, module_help: dict[str, str]) -> None:
    from llmcore_hf.config import Options

    words = module_help[module.name].split()
    for name in Options(module.load().argument_classes()).fields:
        assert f"--{name}" in words


def test_the_help_of_a_module_is_grouped(module_help: dict[str, str]) -> None:
    lines = [line.strip() for line in module_help["dpo"].splitlines()]
    titles = ["RunArguments", "DataArguments", "GenerationArguments", "ModelArguments"]
    titles += ["DPOConfig (method)", "TrainingArguments"]
    places = [lines.index(title) for title in titles]
    assert places == sorted(places)

    def group_of(option: str) -> str:
        row = next(i for i, line in enumerate(lines) if line.startswith(f"{option} "))
        return next(line for line in reversed(lines[:row]) if line in titles)

    assert group_of("--beta") == "DPOConfig (method)"
    assert group_of("--lora_r") == "ModelArguments"
    assert group_of("--dataset_name") == "DataArguments"
    assert group_of("--weight_decay") == "TrainingArguments"


def entry(text: str, option: str) -> str:
    """The row of `option` in a help text, on one line."""
    rows = re.split(r"^ (?=--)", text, flags=re.MULTILINE)
    return " ".join(next(row for row in rows if row.startswith(f"--{option} ")).split()[1:])


def test_the_help_of_a_module_shows_defaults_and_where_they_differ(module_help: dict[str, str]) -> None:
    text = module_help["dpo"]
    assert "(default: 0.05)" in entry(text, "lora_dropout")
    assert "(default: 0.1) (toy: 0.1)" in entry(text, "beta")
    assert "(toy: 80)" in entry(text, "max_steps")
    assert "(default: True, defaults for this machine)" in entry(text, "disable_tqdm")
    assert "recipes/dpo/toy.yaml" in text


def test_the_help_of_a_module_names_types_and_choices(module_help: dict[str, str]) -> None:
    text = module_help["dpo"]
    assert entry(text, "learning_rate").startswith("float ")
    assert entry(text, "max_steps").startswith("int ")
    assert entry(text, "loss_type").startswith("list ")
    assert "One of: no, steps, epoch." in entry(text, "eval_strategy")


def test_the_help_names_the_tiny_checkpoints_and_the_toy_datasets(module_help: dict[str, str]) -> None:
    for module in MODULES:
        if not module.trains_on:  # a lesson has neither
            continue
        text = module_help[module.name]
        assert "tiny-gpt2" in entry(text, "model_name_or_path") and "tiny-qwen" in entry(text, "model_name_or_path")
        if module.trains_on:
            assert "toy-sort" in entry(text, "dataset_name") and "parquet" in entry(text, "dataset_name")


def test_help_text_is_printed_as_it_is_written(ran: list[Any], capsys: Output) -> None:
    assert cli.main(["--module", "fake", "--help"]) == 0
    out = capsys.readouterr().out
    assert "A lesson in [nothing]." in out  # no markup
    assert "100% repeatable" in out and "(default: 42) (toy: 7)" in out
    assert "(default: 0.5, defaults for this machine)" in out


def test_help_begins_nothing(ran: list[Any]) -> None:
    assert cli.main(["--module", "fake", "--toy", "--help", "--output_dir", "out"]) == 0
    assert not ran and nothing_was_left()


def test_help_for_the_module_that_a_config_names(ran: list[Any], capsys: Output) -> None:
    Path("mine.yaml").write_text("module: fake\n")
    assert cli.main(["--config", "mine.yaml", "--help"]) == 0
    assert "Fake lesson" in capsys.readouterr().out


# ---------------------------------------------------------------- env


def test_env_prints_versions_and_hardware(capsys: Output) -> None:
    assert cli.main(["env"]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert rows["llmcore_hf"].strip() == llmcore_hf.__version__
    assert rows["python"].strip() == sys.version.split()[0]
    assert {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "platform", "device", "memory"} <= set(
        rows
    )
    assert {"HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"} <= set(rows)


def test_env_prints_no_token(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    cli.main(["env"])
    assert "hf_secret" not in capsys.readouterr().out


def test_a_package_that_is_missing_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    assert environment.versions()["no-such-package"] is None and environment.versions()["torch"]


# ---------------------------------------------------------------- nothing heavy before it is needed

PROBE = """
import json, sys
from llmcore_hf.cli import main
code = main(json.loads(sys.argv.pop(1)))
print(json.dumps({"code": code, "modules": sorted(sys.modules)}), file=sys.stderr)
"""


def imported_by(*argv: str) -> tuple[int, set[str]]:
    """Exit code of a command and the modules in a fresh process after it."""
    command = [sys.executable, "-c", PROBE, json.dumps(argv)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    told = json.loads(result.stderr.splitlines()[-1])
    return told["code"], set(told["modules"])


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--list"], 0),
        (["--help"], 0),
        (["--version"], 0),
        ([], 2),
        (["--module", "spft", "--toy"], 2),
        (["--toy"], 2),
        (["--module", "spft", "--help"], 2),
    ],
)
def test_nothing_heavy_is_imported_for(argv: list[str], code: int) -> None:
    found, modules = imported_by(*argv)
    assert found == code
    assert not modules & (set(HEAVY) - {"yaml"})


def test_importing_the_package_imports_only_the_package() -> None:
    program = "import sys; before = set(sys.modules); import llmcore_hf; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) == {"llmcore_hf"}


HELP_PROBE = """
import contextlib, io, json, sys
from trl import DPOConfig, ModelConfig, ScriptArguments, TrlParser
config_classes = set(sys.modules)
from llmcore_hf.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main(["--module", "dpo", "--help"]) == 0
print(json.dumps(sorted(set(sys.modules) - config_classes)))
"""


def test_the_help_of_a_module_imports_its_config_classes_and_nothing_more() -> None:
    result = subprocess.run([sys.executable, "-c", HELP_PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
    added = set(json.loads(result.stdout.splitlines()[-1]))
    light = {*sys.stdlib_module_names, "llmcore_hf", "rich", "transformers", "trl"}
    assert {name.partition(".")[0] for name in added} <= light
    # of transformers and trl only what costs nothing beside the config class
    assert {name for name in added if name.startswith(("transformers", "trl"))} <= {"transformers.trainer_callback"}


# ---------------------------------------------------------------- one command under three names


def test_the_console_command_run_py_and_the_package_are_the_same_program(capsys: Output) -> None:
    [script] = entry_points(group="console_scripts", name="llmcore")
    assert script.load() is cli.entry_point
    code = [line for line in (ROOT / "run.py").read_text().splitlines() if line and not line.startswith(('"', "#"))]
    assert len(code) <= 6 and any("llmcore_hf.cli" in line for line in code)
    for command in (["run.py"], ["-m", "llmcore_hf"]):
        result = subprocess.run([sys.executable, *command, "--toy"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 2 and "no --module was given" in result.stderr


def test_the_entry_point_ends_the_process_with_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llmcore", "--module", "nothing"])
    with pytest.raises(SystemExit) as caught:
        cli.entry_point()
    assert caught.value.code == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("command", ["--list", "--version"])
def test_output_that_cannot_be_written_is_one_message(command: str) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, str(ROOT / "run.py"), command], stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert result.stderr.decode() == "python run.py: No space left on device\n"
