"""Which process this is, how many there are, and launches that got fewer than they asked for."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llmcore_hf import cli, distributed, environment, launch
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
        launch.launch_command(list(argv))
    return "\n".join(caught.value.problems)


def test_the_launcher_gets_the_shipped_file_and_the_module_gets_its_options() -> None:
    path = str(CONFIGS / "cpu_2.yaml")
    options = ["--module", "sft", "--toy", "--max_steps=3"]
    command = launch.launch_command(["--accelerate_config", "cpu_2", *options[:2], "--num_processes=4", *options[2:]])
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, "--num_processes", "4"]
    assert command == [*accelerate, "--module", "llmcore_hf", *options]


def test_the_command_is_one_that_accelerate_understands() -> None:
    module = importlib.import_module("accelerate.commands.launch")
    command = launch.launch_command(["--accelerate_config", "cpu_2", "--module", "sft", "--toy"])
    args = module.launch_command_parser().parse_args(command[3:])
    assert (args.training_script, args.module) == ("llmcore_hf", True)
    assert args.training_script_args == ["--module", "sft", "--toy"]


def test_a_file_of_ones_own_can_be_named(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text((CONFIGS / "cpu_2.yaml").read_text())
    assert str(mine) in launch.launch_command(["--accelerate_config", str(mine), "--module", "sft"])


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--module", "sft"], "--accelerate_config is missing: cpu_1, cpu_2"),
        (["--accelerate_config", "cpu_2"], "no --module"),
        (["--accelerate_config", "--module", "sft"], "--accelerate_config needs a value"),
        (["--accelerate_config", "zero", "--module", "sft"], "did you mean `zero"),
        (["--accelerate_config", "cpu_2", "--num_processes", "two", "--module", "sft"], "whole number"),
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
    launch.launch_command(argv)


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


def test_stage_3_is_for_the_modules_that_were_tried_with_it(monkeypatch: pytest.MonkeyPatch, without_gpu: None) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(distributed, "forbid_deepspeed_to_compile", lambda: None)
    enter(monkeypatch, STAGE_3)
    for module in ("sft", "dpo", "reward", "ppo", "grpo"):
        launch.launch_command(["--accelerate_config", "zero3", "--module", module])
        check_launch(module)
    launch.launch_command(["--accelerate_config", "zero3", "--config", "a file that names the module.yaml"])
    for argv in (["--module", "rlhf"], ["--module=rlhf"]):
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


SHORT = ["--max_steps", "4", "--logging_steps", "1", "--max_eval_samples", "21", "--max_generation_samples", "5"]


def start(
    folder: Path, module: str, name: str, batch_size: int, *before: str, **variables: str
) -> subprocess.Popen[str]:
    """A short run as an installed user starts it; `before` goes in front of `--module`, `variables` into the environment."""
    options = ["--module", module, "--toy", *SHORT, "--per_device_train_batch_size", str(batch_size)]
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
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    meet = ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--num_machines", "2"]
    config = ["launch", "--accelerate_config", "cpu_2", "--num_processes", "2", *meet]
    nodes = [start(tmp_path, "dpo", "two", 16, *config, "--machine_rank", rank) for rank in ("0", "1")]
    outputs = [node.communicate(timeout=400)[0] for node in nodes]
    assert_equal_runs(tmp_path / "two", alone("dpo"), outputs[0])
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["env"]["world_size"] == 2
    assert "training_curves.png" not in outputs[1]  # the second machine reports nothing


@pytest.mark.slow
@pytest.mark.parametrize(("module", "config"), [("sft", "zero2"), ("sft", "zero3"), ("dpo", "zero3")])
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
    assert job.returncode != 0 and "exitcode  : 3" in output and "rank      : 1" in output
    assert workers and not psutil.wait_procs(workers, timeout=10)[1]
    assert not (tmp_path / "two" / "model.safetensors").exists()
