"""Which process this is, how many there are, and launches that got fewer than they asked for."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmcore_hf import cli, distributed, environment
from llmcore_hf.distributed import check_launch, check_world_size
from llmcore_hf.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "accelerate_configs"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHER, *(name for name in os.environ if name.startswith("ACCELERATE_"))):
        monkeypatch.delenv(name, raising=False)


def launched(*argv: str) -> tuple[str, dict[str, str]]:
    """The launcher `accelerate launch *argv run.py` would use, and the environment it gives to one process."""
    launch = importlib.import_module("accelerate.commands.launch")
    used: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "default_config_file", "/nowhere.yaml")  # not what `accelerate config` left in the home
        for name in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher", "tpu_launcher"):
            patch.setattr(launch, name, lambda args, name=name: used.update(name=name, args=args))
        args = launch.launch_command_parser().parse_args([*argv, "run.py"])
        launch.launch_command(args)
    if used["name"] == "simple_launcher":
        _, env = launch.prepare_simple_launcher_cmd_env(used["args"])
        return used["name"], env
    return used["name"], launch.prepare_multi_gpu_env(used["args"])


def enter(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    for name, value in env.items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)


# ---------------------------------------------------------------- who am I


def test_a_process_that_nobody_launched_is_the_main_and_only_one() -> None:
    assert distributed.world_size() == 1 and distributed.is_main_process()


@pytest.mark.parametrize(("rank", "main"), [("0", True), ("1", False), ("7", False)])
def test_the_main_process_is_rank_0(monkeypatch: pytest.MonkeyPatch, rank: str, main: bool) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert distributed.is_main_process() is main and distributed.world_size() == 8


def test_rank_0_of_another_machine_is_not_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not distributed.is_main_process()


def test_alone_a_broadcast_gives_the_value_back() -> None:
    value = object()
    assert distributed.broadcast(value) is value


def test_a_broadcast_gives_the_main_processs_value(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.utils

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    asked: list[int] = []

    def share(box: list[Any], from_process: int) -> None:
        asked.append(from_process)
        box[0] = "from main"

    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", share)
    assert distributed.broadcast(None) == "from main" and asked == [0]


@pytest.mark.parametrize(
    ("env", "kind"),
    [
        ({}, "none"),
        ({"WORLD_SIZE": "2"}, "ddp"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "fsdp"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed"),
    ],
)
def test_the_summary_names_how_processes_work_together(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], kind: str
) -> None:
    enter(monkeypatch, env)
    assert environment.distributed_kind() == kind


# ---------------------------------------------------------------- asked for two, got one


@pytest.mark.parametrize(
    "argv", [["--cpu", "--num_processes", "2"], ["--cpu", "--num_processes", "4", "--mixed_precision", "no"]]
)
def test_a_launch_that_asked_for_two_and_got_one_is_refused(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    name, env = launched(*argv)
    assert name == "simple_launcher"  # that is: one process
    enter(monkeypatch, env)
    with pytest.raises(ConfigError, match="started one") as caught:
        check_launch()
    assert "cpu_2.yaml" in str(caught.value) and "torchrun" in str(caught.value)


def test_the_distributed_type_that_starts_one_process_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (CONFIGS / "cpu_2.yaml").read_text().replace("distributed_type: MULTI_GPU", "distributed_type: MULTI_CPU")
    (tmp_path / "multi_cpu.yaml").write_text(text)
    name, env = launched("--config_file", str(tmp_path / "multi_cpu.yaml"))
    assert name == "simple_launcher"
    enter(monkeypatch, env)
    with pytest.raises(ConfigError, match="started one"):
        check_launch()


@pytest.mark.parametrize(
    "argv",
    [["--config_file", str(CONFIGS / "cpu_1.yaml")], ["--cpu", "--num_processes", "1"], ["--num_processes", "1"]],
)
def test_a_launch_of_one_process_is_what_it_says(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    _, env = launched(*argv)
    enter(monkeypatch, env)
    check_launch()


def test_the_config_for_two_cpu_processes_starts_two(monkeypatch: pytest.MonkeyPatch) -> None:
    name, env = launched("--config_file", str(CONFIGS / "cpu_2.yaml"))
    assert name == "multi_gpu_launcher"  # it starts one process per `nproc_per_node`
    enter(monkeypatch, env | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"})
    check_launch()


def test_without_a_launcher_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launch()
    monkeypatch.setenv("MASTER_PORT", "29500")  # a leftover of something else
    check_launch()


def test_torchrun_is_no_mistaken_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"})
    check_launch()


def test_the_command_line_refuses_such_a_launch_before_it_reads_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    enter(monkeypatch, {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"})
    assert cli.main(["--module", "dpo", "--nonsense"]) == 2
    err = capsys.readouterr().err
    assert "started one" in err and "nonsense" not in err and not list(tmp_path.iterdir())
    assert cli.main(["--list"]) == 0


# ---------------------------------------------------------------- promised two, found one


def found(monkeypatch: pytest.MonkeyPatch, promised: int, processes: int) -> None:
    import accelerate

    monkeypatch.setenv("WORLD_SIZE", str(promised))
    monkeypatch.setattr(accelerate, "PartialState", lambda: SimpleNamespace(num_processes=processes))


def test_a_process_group_smaller_than_promised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, promised=2, processes=1)
    with pytest.raises(ConfigError, match=r"started 2 processes.* has 1"):
        check_world_size()


def test_a_process_group_as_large_as_promised_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, promised=2, processes=2)
    check_world_size()


def test_one_process_asks_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, promised=1, processes=5)
    check_world_size()


def test_a_run_checks_the_world_size_before_it_makes_a_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llmcore_hf.config import Config
    from llmcore_hf.registry import Module
    from llmcore_hf.run_dir import execute

    monkeypatch.chdir(tmp_path)
    found(monkeypatch, promised=2, processes=1)
    with pytest.raises(ConfigError, match="started 2 processes"):
        execute(Module("fake", 1, 1, "假", "Fake", "nothing"), Config("fake", False, {}, {}, parts=()), [])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_accelerate_launch_with_two_cpu_processes_that_are_one_ends_with_the_way_out(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    result = subprocess.run(
        [*command, str(ROOT / "run.py"), "--module", "dpo", "--nonsense"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0
    assert "cpu_2.yaml" in result.stderr and not list(tmp_path.iterdir())
