"""Which process this is, how many there are, and launches that got fewer than they asked for."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llmcore_hf import cli, config, distributed, environment, launch, meeting, registry, resume
from llmcore_hf.distributed import check_launch, check_world_size
from llmcore_hf.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "accelerate_configs"
LAUNCHER = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
    *("LLMCORE_HF_NUM_PROCESSES", "LLMCORE_HF_NUM_MACHINES", "LLMCORE_HF_JOIN_TIMEOUT", "TORCHELASTIC_RUN_ID"),
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHER, *(name for name in os.environ if name.startswith("ACCELERATE_"))):
        monkeypatch.setenv(name, "")  # so that what a launcher exports here ends with the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(meeting, "_met", [])


def launched(*argv: str) -> tuple[str, dict[str, str]]:
    """The launcher `accelerate launch *argv run.py` would use, and the environment it gives to one process."""
    module = importlib.import_module("accelerate.commands.launch")
    used: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "default_config_file", "/nowhere.yaml")  # not what `accelerate config` left in the home
        for name in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher", "tpu_launcher"):
            patch.setattr(module, name, lambda args, name=name: used.update(name=name, args=args))
        args = module.launch_command_parser().parse_args([*argv, "run.py"])
        module.launch_command(args)
    if used["name"] == "simple_launcher":
        _, env = module.prepare_simple_launcher_cmd_env(used["args"])
        return used["name"], env
    return used["name"], module.prepare_multi_gpu_env(used["args"])


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
        check_launch("sft")
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
        check_launch("sft")


@pytest.mark.parametrize(
    "argv",
    [["--config_file", str(CONFIGS / "cpu_1.yaml")], ["--cpu", "--num_processes", "1"], ["--num_processes", "1"]],
)
def test_a_launch_of_one_process_is_what_it_says(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    _, env = launched(*argv)
    enter(monkeypatch, env)
    check_launch("sft")


def test_the_config_for_two_cpu_processes_starts_two(monkeypatch: pytest.MonkeyPatch) -> None:
    name, env = launched("--config_file", str(CONFIGS / "cpu_2.yaml"))
    assert name == "multi_gpu_launcher"  # it starts one process per `nproc_per_node`
    enter(monkeypatch, env | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"})
    check_launch("sft")


def test_without_a_launcher_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launch("sft")
    monkeypatch.setenv("MASTER_PORT", "29500")  # a leftover of something else
    check_launch("sft")


def test_torchrun_is_no_mistaken_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"})
    check_launch("sft")


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


# ---------------------------------------------------------------- what a CPU cannot do


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_fsdp_on_a_cpu_is_refused_in_the_process_too(monkeypatch: pytest.MonkeyPatch, without_gpu: None) -> None:
    name, env = launched("--config_file", str(CONFIGS / "fsdp2.yaml"))
    assert name == "multi_gpu_launcher" and env["ACCELERATE_USE_FSDP"] == "true" and env["FSDP_VERSION"] == "2"
    enter(monkeypatch, env | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"})
    with pytest.raises(ConfigError, match="needs GPUs"):
        check_launch("sft")


def test_tensor_parallelism_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch, without_gpu: None) -> None:
    name, env = launched("--config_file", str(CONFIGS / "tp.yaml"))
    assert name == "multi_gpu_launcher" and env["PARALLELISM_CONFIG_TP_SIZE"] == "2"
    enter(monkeypatch, env | {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29500"})
    with pytest.raises(ConfigError, match="needs GPUs"):
        check_launch("sft")


def test_with_a_gpu_fsdp_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    enter(monkeypatch, {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2", "RANK": "0"})
    check_launch("sft")


def test_deepspeed_on_a_cpu_compiles_nothing(monkeypatch: pytest.MonkeyPatch, without_gpu: None) -> None:
    forbidden: list[bool] = []
    monkeypatch.setattr(distributed, "forbid_deepspeed_to_compile", lambda: forbidden.append(True))
    check_launch("sft")
    assert not forbidden
    enter(monkeypatch, {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2", "RANK": "0"})
    check_launch("sft")
    assert forbidden


# ---------------------------------------------------------------- llmcore launch


def problems_of(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        launch.read(list(argv))
    return "\n".join(caught.value.problems)


def arguments(*argv: str) -> list[str]:
    """What `accelerate launch` gets."""
    return launch.accelerate_arguments(launch.read(list(argv)))


def test_the_launcher_gets_the_shipped_file_and_the_module_gets_its_options() -> None:
    path = str(CONFIGS / "cpu_2.yaml")
    options = ["--module", "sft", "--toy", "--max_steps=3"]
    found = arguments("--accelerate_config", "cpu_2", *options[:2], "--num_processes=4", *options[2:])
    accelerate = ["--config_file", path, "--num_processes", "4", "--rdzv_conf", "timeout=300"]
    assert found == [*accelerate, "--module", "llmcore_hf", *options]


def test_the_command_is_one_that_accelerate_understands() -> None:
    module = importlib.import_module("accelerate.commands.launch")
    args = module.launch_command_parser().parse_args(
        arguments("--accelerate_config", "cpu_2", "--module", "sft", "--toy")
    )
    assert (args.training_script, args.module) == ("llmcore_hf", True)
    assert args.training_script_args == ["--module", "sft", "--toy"]


def test_a_file_of_ones_own_can_be_named(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text((CONFIGS / "cpu_2.yaml").read_text())
    assert str(mine) in arguments("--accelerate_config", str(mine), "--module", "sft")


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--module", "sft"], "--accelerate_config is missing: cpu_1, cpu_2"),
        (["--accelerate_config", "cpu_2"], "no --module"),
        (["--accelerate_config", "--module", "sft"], "--accelerate_config needs a value"),
        (["--accelerate_config", "zero", "--module", "sft"], "did you mean `zero"),
        (["--accelerate_config", "cpu_2", "--num_processes", "two", "--module", "sft"], "whole number"),
        (["--accelerate_config", "cpu_2", "--num_processes", "²", "--module", "sft"], "whole number"),
        (["--accelerate_config", "cpu_2", "--num_processes", "0", "--module", "sft"], "--num_processes is at least 1"),
        (["--accelerate_config", "cpu_2", "--join_timeout", "0", "--module", "sft"], "--join_timeout is at least 1"),
        (["--accelerate_config", "cpu_2", "--main_process_port", "99999", "--module", "sft"], "from 1 to 65535"),
        (["--accelerate_config", "cpu_2", "--module", "nosuch"], "there is no module `nosuch`"),
        (["--accelerate_config", "cpu_2", "--module", "mdp"], "`mdp` runs in one process"),
        (
            ["--accelerate_config", "cpu_2", "--module", "sft", "--config", "nowhere.yaml"],
            "no config file nowhere.yaml",
        ),
        (["--accelerate_config", "cpu_2", "--module", "sft", "--nonsense", "1"], "unknown option `--nonsense`"),
        (["--accelerate_config", "cpu_2", "--module", "sft", "--max_steps", "many"], "`max_steps`"),
        (["--accelerate_config", "fsdp2", "--module", "sft"], "fsdp2 needs GPUs"),
        (["--accelerate_config", "tp", "--module", "sft"], "tp needs GPUs"),
        (["--accelerate_config", "multinode", "--module", "sft"], "need --main_process_ip"),
        (
            ["--accelerate_config", "multinode", "--main_process_ip", "a", "--num_processes", "3", "--module", "sft"],
            "a multiple of --num_machines 2",
        ),
        (
            ["--accelerate_config", "multinode", "--main_process_ip", "a", "--machine_rank", "2", "--module", "sft"],
            "machines are 0 to 1",
        ),
    ],
)
def test_what_cannot_work_is_told_before_anything_starts(without_gpu: None, argv: list[str], problem: str) -> None:
    assert problem in problems_of(*argv)


def test_a_port_in_use_is_told_before_anything_starts() -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        argv = ["--accelerate_config", "cpu_2", "--main_process_port", str(port), "--module", "sft"]
        assert f"--main_process_port {port} is in use" in problems_of(*argv)
        launch.read(
            [*argv, *TWO_MACHINES, "--machine_rank", "1"]
        )  # the port is machine 0's, which may be this one as well
    launch.read(argv)


TWO_MACHINES = ["--num_machines", "2", "--main_process_ip", "127.0.0.1"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("num_processes: two", "mine.yaml: `num_processes` takes a whole number, not 'two'"),
        ("num_processes: true", "mine.yaml: `num_processes` takes a whole number, not True"),
        ("num_processes: -1", "mine.yaml: `num_processes` takes a whole number, not -1"),
    ],
)
def test_a_number_that_is_none_is_told_with_its_file(tmp_path: Path, line: str, problem: str) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text((CONFIGS / "cpu_2.yaml").read_text().replace("num_processes: 2", line))
    assert problem in problems_of("--accelerate_config", str(mine), "--module", "sft")


def test_the_port_of_another_machine_is_checked_for_its_range() -> None:
    argv = ["--accelerate_config", "cpu_2", *TWO_MACHINES, "--machine_rank", "1", "--module", "sft"]
    assert "from 1 to 65535" in problems_of(*argv, "--main_process_port", "70000")


def test_without_options_of_the_user_the_launcher_does_not_load_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.Module, "load", lambda module: pytest.fail("this takes seconds"))
    found = launch.read(["--accelerate_config", "cpu_2", "--module", "sft", "--toy"])
    assert found.module_argv == ["--module", "sft", "--toy"]


# ---------------------------------------------------------------- how a launch ends


@pytest.fixture
def own_signals() -> Iterator[None]:
    """torch's launcher takes over the signals of this process, and `llmcore launch` its log."""
    elastic = logging.getLogger("torch.distributed.elastic")
    handlers, propagate = list(elastic.handlers), elastic.propagate
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {kind: signal.getsignal(kind) for kind in kinds}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)
    elastic.handlers, elastic.propagate = handlers, propagate


@pytest.mark.parametrize(("name", "who"), [("cpu_1", "the process"), ("cpu_2", "process")])
def test_a_failure_ends_with_the_processs_own_message_and_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    own_signals: None,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    name: str,
    who: str,
) -> None:
    """Real processes of a module that is not there: they import nothing heavy."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asked = launch.Launch(CONFIGS / f"{name}.yaml", {}, {}, ["--module", "nosuch"])
    assert launch._run(asked) == 2
    err = capfd.readouterr().err
    assert err.count("there is no module `nosuch`") == 1 and f"{who}" in err and " ended with exit code 2" in err
    assert "Traceback" not in err and "ChildFailedError" not in err and len(err.splitlines()) < 6
    assert not [record for record in caplog.records if record.name.startswith("torch.distributed.elastic")]


def test_what_torch_calls_a_distributed_error_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, own_signals: None
) -> None:
    """Two launchers that are both machine 1 of 3: machine 0 meets both, and waits for what machine 2 says."""
    module = importlib.import_module("accelerate.commands.launch")
    monkeypatch.setattr(module, "launch_command", lambda args: raise_store_error())
    asked = launch.Launch(CONFIGS / "cpu_2.yaml", {}, {"num_machines": "3"}, [])
    with pytest.raises(UserError, match=r"launchers of 3 machines did not meet .* from 0 to 2"):
        launch._run(asked)


def raise_store_error() -> None:
    from torch.distributed import DistStoreError

    raise DistStoreError("wait timeout after 1000ms, keys: /torchelastic/assigned_ranks/0")


def test_a_process_that_a_signal_ended_is_told_as_a_shell_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch._tell_end("process 1", -signal.SIGKILL) == 137
    assert "process 1 was ended by SIGKILL" in capsys.readouterr().err


def test_a_file_that_accelerate_refuses_is_told_without_a_traceback(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text((CONFIGS / "cpu_1.yaml").read_text() + "no_such_key: 1\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: accelerate refuses it: .*no_such_key"):
        launch._run(launch.Launch(mine, {}, {}, ["--module", "nosuch"]))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("rank", "said", "problem"),
    [
        ("0", "machine 0 of 2 waits for the launchers", r"2 machines did not meet within 1 s .*1/2 clients joined"),
        ("1", "machine 1 of 2 looks for machine 0", "nobody listens at 127.0.0.1"),
    ],
)
def test_a_launcher_says_what_it_waits_for_and_gives_up(
    own_signals: None, capsys: pytest.CaptureFixture[str], rank: str, said: str, problem: str
) -> None:
    options = [*TWO_MACHINES, "--machine_rank", rank, "--main_process_port", free_port(), "--join_timeout", "1"]
    began = time.monotonic()
    with pytest.raises(UserError, match=problem) as caught:
        launch.main(["--accelerate_config", "cpu_2", *options, "--module", "sft", "--toy"], "llmcore")
    assert time.monotonic() - began < 30 and "--join_timeout" in str(caught.value)
    err = capsys.readouterr().err
    assert said in err and "1 s at most" in err


def test_what_was_asked_for_is_exported_and_nothing_older(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, {"LLMCORE_HF_NUM_MACHINES": "7"})
    launch._export(launch.read(["--accelerate_config", "cpu_2", "--num_processes", "4", "--module", "sft"]).settings)
    assert distributed.asked_for() == (4, 1) and meeting.join_timeout() == 300
    launch._export({"join_timeout": "20"})
    assert distributed.asked_for() == (None, None) and meeting.join_timeout() == 20


@pytest.mark.parametrize(("here", "there"), [(True, True), (False, True), (True, False)])
def test_a_checkpoint_that_another_machine_cannot_see_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: bool, there: bool
) -> None:
    """Process 1 is on a machine that does not share the folder, and has no more than its own random state there."""
    import accelerate.utils

    from llmcore_hf.config import Config
    from llmcore_hf.durability import mark_complete
    from llmcore_hf.run_dir import RunDirectory

    checkpoint = tmp_path / "runs" / "a" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "rng_state_1.pth").touch()
    (tmp_path / "runs" / "a" / "resolved_config.yaml").write_text("module: sft\n")
    if here:
        mark_complete(checkpoint, 2)
    enter(monkeypatch, {"WORLD_SIZE": "2", "RANK": "0"})
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine: [*mine, there])
    run = RunDirectory(tmp_path / "runs" / "a", registry.get("sft"), Config("sft", False, {}, {}, parts=()), [])
    if here and there:
        run.resume_from(checkpoint)
        return
    with pytest.raises(
        ConfigError, match=f"cannot be read whole by process {1 if here else 0}: .* folder that they share"
    ):
        run.resume_from(checkpoint)


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        ({"LLMCORE_HF_NUM_PROCESSES": "2"}, "llmcore launch [options of the launcher] --config"),
        ({}, "accelerate launch"),
    ],
)
def test_the_way_on_names_the_launcher_that_was_used(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], launcher: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/llmcore"])
    enter(monkeypatch, {"WORLD_SIZE": "2", **env})
    assert resume.command(Path("runs/a")).startswith(launcher)


def test_processes_that_were_asked_for_and_not_started_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, {"LLMCORE_HF_NUM_PROCESSES": "2"})
    with pytest.raises(ConfigError, match="2 processes were asked for, and accelerate started one"):
        check_launch("sft")
    enter(monkeypatch, {"LLMCORE_HF_NUM_PROCESSES": "1"})
    check_launch("sft")


# ---------------------------------------------------------------- processes meet


def process(monkeypatch: pytest.MonkeyPatch, rank: int, of: int, **variables: str) -> None:
    """This process as one of several."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "LLMCORE_HF_JOIN_TIMEOUT": "1"}
    enter(monkeypatch, {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(of), **place, **variables})


@pytest.mark.parametrize(
    ("rank", "problem"), [(0, "process 1 of 2 did not come within 1 s"), (1, "nobody listens at 127.0.0.1")]
)
def test_a_process_alone_says_whom_it_waits_for_and_gives_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, problem: str
) -> None:
    process(monkeypatch, rank, of=2)
    with pytest.raises(UserError, match=problem) as caught:
        meeting.meet()
    assert "LLMCORE_HF_JOIN_TIMEOUT" in str(caught.value)
    address = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    assert f"waiting for 1 other process at {address}, 1 s at most" in capsys.readouterr().err


def test_process_0_that_ends_while_the_others_wait_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore

    process(monkeypatch, 1, of=3, LLMCORE_HF_JOIN_TIMEOUT="60", TORCHELASTIC_RUN_ID="none")
    server = [TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), None, True, wait_for_workers=False)]
    threading.Timer(0.5, server.clear).start()
    with pytest.raises(UserError, match=r"lost process 0 at 127.0.0.1"):
        meeting.meet()


def others(monkeypatch: pytest.MonkeyPatch, *notes: tuple[int, int | None, int | None, int]) -> Any:
    """A store in which the processes `(rank, processes, machines, world size)` have been."""
    from torch.distributed import HashStore

    store = HashStore()
    for rank, processes, machines, size in notes:
        store.set(str(rank), json.dumps({"processes": processes, "machines": machines, "world_size": size}))
        store.add("read", 1)
    monkeypatch.setattr(meeting, "_open_store", lambda *args, **kwargs: store)
    return store


def test_processes_of_one_job_meet_once(monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch, 1, of=2, LLMCORE_HF_NUM_PROCESSES="2", LLMCORE_HF_NUM_MACHINES="1")
    store = others(monkeypatch, (0, 2, 1, 2))
    meeting.meet()
    assert json.loads(store.get("1")) == {"processes": 2, "machines": 1, "world_size": 2}
    monkeypatch.setattr(meeting, "_open_store", lambda *args, **kwargs: pytest.fail("it has met them"))
    meeting.meet()


def test_processes_that_torchrun_started_are_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch, 0, of=2)
    store = others(monkeypatch, (1, None, None, 2))
    meeting.meet()
    assert json.loads(store.get("0")) == {"processes": None, "machines": None, "world_size": 2}


@pytest.mark.parametrize(
    ("mine", "size", "notes", "parts"),
    [
        # two launchers, asked for 2 and 4 processes on 2 machines: 1 and 2 of them come
        (("2", "2"), 3, [(1, 4, 2, 3), (2, 4, 2, 3)], ["3 processes came", "0: 2 processes", "1, 2: 4 processes"]),
        # all were asked for the same, and fewer come (accelerate rounds down)
        (("3", "2"), 2, [(1, 3, 2, 2)], ["2 processes came", "0, 1: 3 processes on 2 machines"]),
        (("2", "2"), 2, [(1, 2, 1, 2)], ["0: 2 processes on 2 machines", "1: 2 processes on 1 machines"]),
        # by hand, with different world sizes: process 2 of the other job never comes
        (("", ""), 2, [(1, None, None, 3)], ["0: 2 processes", "1: 3 processes"]),
        (("", ""), 3, [(1, None, None, 2)], ["0: 3 processes", "1: 2 processes"]),
    ],
)
def test_processes_of_different_jobs_are_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
    mine: tuple[str, str],
    size: int,
    notes: list[tuple[int, int | None, int | None, int]],
    parts: list[str],
) -> None:
    process(monkeypatch, 0, size, LLMCORE_HF_NUM_PROCESSES=mine[0], LLMCORE_HF_NUM_MACHINES=mine[1])
    monkeypatch.setattr(meeting, "LINGER", 0.3)
    store = others(monkeypatch, *notes)
    with pytest.raises(ConfigError) as caught:
        meeting.meet()
    assert all(part in str(caught.value) for part in parts)
    assert store.add("read", 0) == len(notes) + 1  # it said so to whoever waits for it


def test_process_0_stays_until_the_others_know_why_the_job_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch, 0, of=2)
    monkeypatch.setattr(meeting, "LINGER", 60)
    store = others(monkeypatch, (1, None, None, 3))
    store.add("read", -1)  # it has not read them yet
    threading.Timer(1, lambda: store.add("read", 1)).start()
    began = time.monotonic()
    with pytest.raises(ConfigError):
        meeting.meet()
    assert 0.9 < time.monotonic() - began < 30


def test_a_run_meets_the_others_before_its_options_make_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with wrong options it ends before that, so that the others hear of it within their bound."""
    process(monkeypatch, 0, of=2)
    calls: list[str] = []
    monkeypatch.setattr(meeting, "meet", lambda: calls.append("meet"))
    monkeypatch.setattr(config.Options, "build", lambda self, values, problems: calls.append("build") or [])
    module = registry.get("sft")
    config.resolve(module, config.Request("sft", toy=True))
    assert calls == ["meet", "build"]
    with pytest.raises(ConfigError, match="nonsense"):
        config.resolve(module, config.Request("sft", toy=True, options=["--nonsense", "1"]))
    assert calls == ["meet", "build"]


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({"WORLD_SIZE": "two"}, "variable WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "variable RANK is 'one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but of 2 processes the last is 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"LLMCORE_HF_JOIN_TIMEOUT": "soon"}, "variable LLMCORE_HF_JOIN_TIMEOUT is 'soon'"),
    ],
)
def test_a_launchers_variables_that_are_wrong_are_named(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], problem: str
) -> None:
    if env != {"WORLD_SIZE": "2"}:
        process(monkeypatch, 0, of=2)
    enter(monkeypatch, env)
    with pytest.raises(ConfigError, match=problem):
        meeting.meet()


def test_a_broken_variable_ends_the_command_line_with_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(monkeypatch, {"WORLD_SIZE": "two", "RANK": "zero"})
    assert cli.main(["--module", "sft", "--toy"]) == 2
    assert "WORLD_SIZE is 'two'" in capsys.readouterr().err


def test_of_an_error_that_all_processes_have_the_main_one_speaks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []
    for rank, local_rank in (("0", "0"), ("4", "0"), ("1", "1")):
        enter(monkeypatch, {"RANK": rank, "LOCAL_RANK": local_rank})
        turns.append(distributed.turn_to_speak())
    assert turns[0] == 0 < turns[1] < turns[2]
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert cli.main(["--module", "nosuch"]) == 2 and slept == [turns[2]]


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_without_deepspeed_a_zero_configuration_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in problems_of("--accelerate_config", name, "--module", "sft")


STAGE_3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "WORLD_SIZE": "2",
    "RANK": "0",
}


def test_stage_3_is_for_the_modules_that_were_tried_with_it(
    monkeypatch: pytest.MonkeyPatch, without_gpu: None, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(distributed, "forbid_deepspeed_to_compile", lambda: None)
    enter(monkeypatch, STAGE_3)
    for module in ("sft", "dpo", "reward", "ppo", "grpo"):
        launch.read(["--accelerate_config", "zero3", "--module", module])
        check_launch(module)
    (tmp_path / "names_it.yaml").write_text("module: rlhf")
    for argv in (["--module", "rlhf"], ["--module=rlhf"], ["--config", str(tmp_path / "names_it.yaml")]):
        assert "ZeRO-3 is not supported with `rlhf`" in problems_of("--accelerate_config", "zero3", *argv)
    with pytest.raises(ConfigError, match="not supported with `rlhf`"):
        check_launch("rlhf")


def test_stage_3_that_would_save_no_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, without_gpu: None, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    mine = tmp_path / "mine.yaml"
    text = (CONFIGS / "zero3.yaml").read_text()
    mine.write_text(text.replace("zero3_save_16bit_model: true", "zero3_save_16bit_model: false"))
    assert "would save no model" in problems_of("--accelerate_config", str(mine), "--module", "sft")
    enter(monkeypatch, STAGE_3 | {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"})
    with pytest.raises(ConfigError, match="would save no model"):
        check_launch("sft")


@pytest.mark.parametrize("offloaded", ["optimizer", "param"])
def test_each_kind_of_offload_needs_a_gpu(without_gpu: None, offloaded: str) -> None:
    options = {f"offload_{what}_device": "cpu" if what == offloaded else "none" for what in ("optimizer", "param")}
    settings = {"zero_stage": 2, **options}
    assert any("mine offloads from a GPU" in text for text in launch._deepspeed_problems(settings, "mine", "sft"))


def test_without_a_gpu_there_is_nothing_to_offload(monkeypatch: pytest.MonkeyPatch, without_gpu: None) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "zero3_offload offloads from a GPU" in problems_of("--accelerate_config", "zero3_offload", "--module", "sft")
    enter(monkeypatch, STAGE_3 | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"})
    with pytest.raises(ConfigError, match="offloads from a GPU"):
        check_launch("sft")
    enter(monkeypatch, {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"})
    monkeypatch.setattr(distributed, "forbid_deepspeed_to_compile", lambda: None)
    check_launch("sft")


def test_the_help_of_launch_names_the_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("cpu_2", "zero2", "multinode", "--machine_rank"))
    assert cli.main(["launch"]) == 2


def test_the_slurm_script_is_bash_and_uses_options_there_are() -> None:
    script = CONFIGS / "multinode.slurm"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "--accelerate_config multinode" in text and all(option in text for option in launch.LAUNCH_OPTIONS)


SLURM = {
    # every "node" runs what `srun` was given, with a number of its own
    "srun": 'shift; for n in 1 0; do SLURM_NODEID=$n "$@"; done; echo "cores $SRUN_CPUS_PER_TASK"',
    "scontrol": "echo node7; echo node8",
    "llmcore": 'echo "$*"',
}


def test_the_slurm_script_starts_one_launcher_per_machine_for_one_job(tmp_path: Path) -> None:
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "40003", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    env = {**os.environ, **job, "SLURM_CPUS_PER_TASK": "32", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(CONFIGS / "multinode.slurm"), "--module", "sft", "--run_name", "two words"]
    *lines, cores = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert cores == "cores 32" and len(lines) == 2
    for line, rank in zip(lines, ("1", "0"), strict=True):
        meet = "--main_process_ip node7 --main_process_port 20003 --join_timeout 600"
        head = f"launch --accelerate_config multinode --num_machines 2 --num_processes 8 --machine_rank {rank} {meet}"
        assert line == f"{head} --module sft --run_name two words"


@pytest.mark.parametrize(
    ("name", "stage", "offload"),
    [("zero1", 1, "none"), ("zero2", 2, "none"), ("zero3", 3, "none"), ("zero3_offload", 3, "cpu")],
)
def test_deepspeed_configurations_become_what_their_names_say(name: str, stage: int, offload: str) -> None:
    pytest.importorskip("deepspeed")
    module = importlib.import_module("accelerate.commands.launch")
    argv = ["--config_file", str(CONFIGS / f"{name}.yaml"), "run.py"]
    args, *_ = module._validate_launch_command(module.launch_command_parser().parse_args(argv))
    assert args.use_deepspeed and args.zero_stage == stage
    assert args.offload_optimizer_device == args.offload_param_device == offload
    assert str(args.zero3_save_16bit_model).lower() == ("true" if stage == 3 else "none")


SHORT = ["--max_steps", "4", "--logging_steps", "1", "--max_eval_samples", "21"]
ANSWERS = ["--max_generation_samples", "5"]


def start(
    folder: Path, module: str, name: str, batch_size: int, *before: str, **variables: str
) -> subprocess.Popen[str]:
    """A short run as an installed user starts it; `before` goes in front of `--module`, `variables` into the environment."""
    answers = [] if module == "reward" else ANSWERS
    options = ["--module", module, "--toy", *SHORT, *answers, "--per_device_train_batch_size", str(batch_size)]
    command = [sys.executable, "-m", "llmcore_hf", *before, *options, "--output_dir", name]
    paths = [variables.pop("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a module in one process, made once."""
    folder = tmp_path_factory.mktemp("alone")

    def run_of(module: str) -> Path:
        if not (folder / module).exists():
            [output] = [start(folder, module, module, 32).communicate(timeout=400)[0]]
            assert (folder / module / "model.safetensors").exists(), output
        return folder / module

    return run_of


def assert_equal_runs(found: Path, expected: Path, output: str) -> None:
    """The same losses, scores and saved weights, to rounding."""
    from safetensors.torch import load_file

    assert (found / "model.safetensors").exists(), output
    losses, scores = [], []
    for run in (found, expected):
        rows = [json.loads(line) for line in (run / "log_history.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
        summary = json.loads((run / "summary.json").read_text())
        scores.append(
            {"n_params": summary["model"]["n_params"], **summary["eval"]["before"], **summary["eval"]["after"]}
        )
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[1]) == 4
    assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-4)
    weights = [load_file(run / "model.safetensors") for run in (found, expected)]
    # DeepSpeed's stages 1 and 2 have the head written beside the embedding that it is tied to.
    assert weights[0].keys() - weights[1].keys() <= {"lm_head.weight"}
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[1]) < 1e-5


@pytest.mark.slow
def test_two_launchers_are_one_job_that_equals_one_process(tmp_path: Path, alone: Callable[[str], Path]) -> None:
    """Two "machines" on loopback, one process each, over TCP. The global batch is that of the single process."""
    port = free_port()
    meet = ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--num_machines", "2"]
    config = ["launch", "--accelerate_config", "cpu_2", "--num_processes", "2", *meet]
    nodes = [start(tmp_path, "dpo", "two", 16, *config, "--machine_rank", rank) for rank in ("0", "1")]
    outputs = [node.communicate(timeout=400)[0] for node in nodes]
    assert_equal_runs(tmp_path / "two", alone("dpo"), outputs[0])
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["env"]["world_size"] == 2
    assert "training_curves.png" not in outputs[1]  # the second machine reports nothing


@pytest.mark.slow
@pytest.mark.parametrize(("module", "config"), [("sft", "zero2"), ("dpo", "zero3"), ("reward", "zero3")])
def test_sharded_over_two_processes_a_run_equals_one_process(
    tmp_path: Path, alone: Callable[[str], Path], module: str, config: str
) -> None:
    """On a machine without a compiler, and where a build that was killed left its lock: nothing is built."""
    pytest.importorskip("deepspeed")
    built = tmp_path / "extensions"
    (built / "deepspeed_shm_comm").mkdir(parents=True)
    (built / "deepspeed_shm_comm" / "lock").touch()
    machine = {"PATH": str(tmp_path / "empty"), "CXX": "/nowhere/g++", "TORCH_EXTENSIONS_DIR": str(built)}
    launcher = ["launch", "--accelerate_config", config]
    output = start(tmp_path, module, "two", 16, *launcher, **machine).communicate(timeout=400)[0]
    assert_equal_runs(tmp_path / "two", alone(module), output)
    env = json.loads((tmp_path / "two" / "summary.json").read_text())["env"]
    assert (env["world_size"], env["distributed"]) == (2, "deepspeed")
    assert [path.name for path in built.rglob("*")] == ["deepspeed_shm_comm", "lock"]


DIES = """
import os
import time
if os.environ.get("RANK") == "1":
    time.sleep(1)  # long enough to be seen
    os._exit(3)
"""


@pytest.mark.slow
def test_a_worker_that_dies_at_the_start_ends_the_job(tmp_path: Path) -> None:
    """Process 1 ends before it meets the other one, which would wait for it."""
    (tmp_path / "sitecustomize.py").write_text(DIES)
    began = time.monotonic()
    job = start(tmp_path, "sft", "two", 16, "launch", "--accelerate_config", "cpu_2", PYTHONPATH=str(tmp_path))
    workers: set[psutil.Process] = set()
    while job.poll() is None:
        assert time.monotonic() - began < 120, "the job did not end"
        with contextlib.suppress(psutil.NoSuchProcess):
            workers |= set(psutil.Process(job.pid).children(recursive=True))
        time.sleep(0.2)
    output = job.communicate()[0]
    assert job.returncode == 3 and "process 1 ended with exit code 3" in output and "Traceback" not in output
    assert workers and not psutil.wait_procs(workers, timeout=10)[1]
    assert not (tmp_path / "two" / "model.safetensors").exists()
