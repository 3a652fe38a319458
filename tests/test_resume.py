"""A run that was killed or stopped ends as if it had not been: same weights, same log, same numbers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from llmcore_hf import cli, registry
from llmcore_hf.alignment import training
from llmcore_hf.alignment.checkpointing import NothingLeft, check_save_steps, save_period
from llmcore_hf.config import Config
from llmcore_hf.durability import MARKER, incompleteness, last_complete
from llmcore_hf.run_dir import RunDirectory

slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = ("--max_train_samples", "200", "--max_eval_samples", "20")
FEW = (*ROWS, "--max_generation_samples", "4")
CADENCE = ("--logging_steps", "2", "--eval_strategy", "steps", "--eval_steps", "4")
SAVES = ("--save_strategy", "steps", "--save_steps", "5")  # not a multiple of the logging steps
SHORT = ("--toy", "--max_steps", "14", *FEW, *CADENCE)  # two epochs of 7 steps
SCORING = ("--toy", "--max_steps", "14", *ROWS, *CADENCE)  # the same for a module that generates nothing
ONLINE = (  # two rollouts of PPO between two checkpoints; more than one epoch
    *("--toy", "--max_steps", "16", "--max_train_samples", "200", "--max_eval_samples", "20", *CADENCE),
    *("--save_strategy", "steps", "--save_steps", "8", "--per_device_eval_batch_size", "40"),
)
LORA = ("--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "1e-2")
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu_2.yaml"))

# The command line, killed right after the log row of a given step, in the middle of the next row.
KILLED = """
import os, signal, sys
from llmcore_hf import cli
from llmcore_hf.run_dir import RunDirectory

last_step, log = int(sys.argv[1]), RunDirectory.log

def deadly(self, row):
    log(self, row)
    if row["step"] >= last_step:
        if os.environ.get("RANK", "0") == "0":
            with open(self.path / "log_history.jsonl", "a") as file:
                file.write('{"step": 9, "lo')
        os.kill(os.getpid(), signal.SIGKILL)

RunDirectory.log = deadly
sys.exit(cli.main(sys.argv[2:]))
"""


KILLED_IN_PPO = (
    KILLED.replace("int(sys.argv[1])", "10")
    .replace("sys.argv[2:]", "sys.argv[1:]")
    .replace("if row", 'if self.module.name == "ppo" and row')
)


def run_here(*argv: str) -> tuple[int, dict[str, Any]]:
    code = cli.main([*argv, "--output_dir", "run"])
    return code, json.loads(Path("run/summary.json").read_text(encoding="utf-8"))


CLOCK = ("runtime", "per_second", "step_time", "eps")


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The log history without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "log_history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.split("/")[-1].endswith(CLOCK)} for row in rows]


def assert_same_end(run: Path, whole: Path) -> None:
    from safetensors.torch import load_file

    assert rows_of(run) == rows_of(whole)
    (weights,) = (path.name for path in whole.glob("*model.safetensors"))
    ours, expected = load_file(run / weights), load_file(whole / weights)
    assert ours.keys() == expected.keys() and all(ours[name].equal(expected[name]) for name in ours)
    first, second = (json.loads((path / "summary.json").read_text()) for path in (run, whole))
    for block in ("eval", "metrics", "data", "model", "samples", "checks", "status"):
        assert first[block] == second[block], block


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The uninterrupted run of a command."""
    done: dict[tuple[str, ...], Path] = {}

    def run(*command: str) -> Path:
        if command not in done:
            done[command] = tmp_path_factory.mktemp("whole") / "run"
            cli.main([*command, "--output_dir", str(done[command])])
        return done[command]

    return run


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- kill -9


@slow
@pytest.mark.parametrize("module", ["sft", "dpo", "reward", "ppo", "grpo"])
@pytest.mark.parametrize("options", [(), LORA], ids=["full", "lora"])
def test_a_killed_run_ends_like_the_uninterrupted_one(whole, module: str, options: tuple[str, ...]) -> None:
    online, offline = module in ("ppo", "grpo"), SCORING if module == "reward" else SHORT
    command = ("--module", module, *(ONLINE if online else (*offline, *SAVES)), *options)
    killed = subprocess.run([sys.executable, "-c", KILLED, "9", *command, "--output_dir", "run"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = json.loads(Path("run/summary.json").read_text())
    assert left["status"] == "interrupted" and "--resume_from_checkpoint last" in left["error"]
    _, summary = run_here(*command, "--resume_from_checkpoint", "last")
    assert summary["resumed_from"] == ("run/checkpoint-8" if online else "run/checkpoint-5")
    assert_same_end(Path("run"), whole(*command))


@slow
def test_two_killed_processes_end_like_uninterrupted_ones() -> None:
    command = ("--module", "sft", *SHORT, *SAVES, "--per_device_train_batch_size", "8")
    (Path.cwd() / "killed.py").write_text(KILLED)

    def launch(*argv: str) -> str:
        result = subprocess.run([sys.executable, *LAUNCH, *argv], capture_output=True, text=True, timeout=120)
        return result.stdout + result.stderr

    whole_log = launch(str(ROOT / "run.py"), *command, "--output_dir", "whole")
    assert Path("whole/model.safetensors").exists(), whole_log
    launch("killed.py", "9", *command, "--output_dir", "run")
    assert last_complete(Path("run"))[0] == Path("run/checkpoint-5")
    log = launch(str(ROOT / "run.py"), *command, "--output_dir", "run", "--resume_from_checkpoint", "last")
    assert "step 6/14" in log and "step 5/14" not in log, log
    assert_same_end(Path("run"), Path("whole"))


@slow
def test_a_killed_pipeline_goes_on_in_the_stage_it_was_in(monkeypatch, tmp_path: Path) -> None:
    """Killed in the PPO stage; the same end as without, and the earlier stages are not run again."""
    small = {"max_train_samples": 200, "max_eval_samples": 20, "per_device_eval_batch_size": 20, "logging_steps": 2}
    saves = {"save_strategy": "steps", "save_steps": 4}
    stages = {
        "sft": {"dataset_name": "toy-sort", "max_length": 64, "max_steps": 6, "max_generation_samples": 4},
        "reward": {"dataset_name": "toy-sort-preference", "max_length": 64, "max_steps": 6},
        "ppo": {
            **{"dataset_name": "toy-sort-prompt", "max_steps": 12, "max_completion_length": 8},
            **{"reward_funcs": ["exact_match"], "reward_weights": [1.0, 0.0]},
        },
    }
    config = {"model_name_or_path": "tiny-qwen-base", **{name: small | saves | own for name, own in stages.items()}}
    Path("small.json").write_text(json.dumps(config))  # JSON is YAML
    command = ("--module", "rlhf", "--config", str(tmp_path / "small.json"))
    Path("whole").mkdir()
    with monkeypatch.context() as context:  # the same name in another folder: stages name the directory before them
        context.chdir("whole")
        assert cli.main([*command, "--output_dir", "run"]) == 0
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_PPO, *command, "--output_dir", "run"], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = json.loads(Path("run/summary.json").read_text())
    assert left["status"] == "interrupted" and "--output_dir run --resume_from_checkpoint last" in left["error"]
    before = {path: path.stat().st_mtime_ns for stage in ("sft", "reward") for path in Path("run", stage).rglob("*")}
    assert cli.main([*command, "--output_dir", "run", "--resume_from_checkpoint", "last"]) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert json.loads(Path("run/ppo/summary.json").read_text())["resumed_from"] == "run/ppo/checkpoint-8"
    for stage in ("sft", "reward", "ppo"):
        assert_same_end(Path("run", stage), Path("whole", "run", stage))
    assert rows_of(Path("run")) == rows_of(Path("whole", "run"))
    assert cli.main([*command, "--output_dir", "run", "--resume_from_checkpoint", "last"]) == 2, "it has ended"


# ---------------------------------------------------------------- in this process: stops, broken checkpoints, limits


def ask_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """A signal while the row of `step` is logged."""
    log = RunDirectory.log

    def asking(self: RunDirectory, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] == step and "loss" in row:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RunDirectory, "log", asking)


@slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_with_the_command_it_names(monkeypatch, whole, capfd, number: int, code: int) -> None:
    """Without any `save_strategy`, and in the middle of an epoch."""
    command = ("--module", "dpo", *SHORT)
    with monkeypatch.context() as patch:
        ask_at(patch, 10, number)
        returned, summary = run_here(*command)
    assert (returned, summary["status"]) == (code, "interrupted")
    assert "Traceback" not in capfd.readouterr().err
    assert last_complete(Path("run"))[0] == Path("run/checkpoint-11")
    assert "model.safetensors" not in summary["artifacts"]

    named = re.search(r"after step 11; saved run/checkpoint-11; go on with: (.*)", summary["error"])
    assert named
    argv = shlex.split(named.group(1))
    cli.main(argv[argv.index("--config") :])
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["resumed_from"] == "run/checkpoint-11" and summary["status"] == "ok"
    resumed, expected = rows_of(Path("run")), rows_of(whole(*command))
    assert [row for row in resumed if row["step"] not in (11, 12)] == [r for r in expected if r["step"] != 12]
    mean = sum(row["loss"] for row in resumed if row["step"] in (11, 12) and "loss" in row) / 2  # the stop ends a row
    assert mean == pytest.approx(next(row["loss"] for row in expected if row["step"] == 12), rel=1e-6)
    assert summary["eval"] == json.loads((whole(*command) / "summary.json").read_text())["eval"]


@slow
def test_a_stop_after_the_last_step_only_evaluates_and_saves_when_resumed(monkeypatch, whole) -> None:
    """Asked for between the last step and its evaluation, where no further step would notice."""
    command = ("--module", "sft", *SHORT, "--eval_steps", "7")
    with monkeypatch.context() as patch:
        ask_at(patch, 14)
        assert run_here(*command)[0] == 130
    assert last_complete(Path("run"))[0] == Path("run/checkpoint-14")
    trained: list[int] = []
    monkeypatch.setattr(training.RunCallback, "on_step_end", lambda self, *args, **kw: trained.append(1))
    run_here(*command, "--resume_from_checkpoint", "last")
    assert not trained and Path("run/model.safetensors").exists()
    without_end = [row for row in rows_of(whole(*command)) if "total_flos" not in row]
    assert rows_of(Path("run")) == without_end


@slow
def test_a_half_written_checkpoint_is_passed_over_and_replaced(whole, capsys) -> None:
    command = ("--module", "sft", *SHORT, *SAVES)
    shutil.copytree(whole(*command), "run")
    torn = Path("run/checkpoint-10")
    (torn / MARKER).unlink()  # killed in the middle of a write
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    shutil.rmtree("run/checkpoint-14")
    (torn / "leftover").write_text("of the torn one")
    _, summary = run_here(*command, "--resume_from_checkpoint", "last")
    assert "checkpoint-10 is passed over: it has no complete.json" in capsys.readouterr().err
    assert summary["resumed_from"] == "run/checkpoint-5"
    assert incompleteness(torn) is None and not (torn / "leftover").exists()
    assert_same_end(Path("run"), whole(*command))


@slow
def test_the_limit_is_kept_and_the_old_checkpoint_goes_only_when_the_new_one_is_marked(monkeypatch) -> None:
    seen: list[list[str]] = []
    rotate = training.CheckpointCallback.on_save

    def watch(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen.append(sorted(p.name for p in self.run.path.glob("checkpoint-*") if incompleteness(p) is None))
        rotate(self, args, state, control, **kwargs)

    monkeypatch.setattr(training.CheckpointCallback, "on_save", watch)
    run_here("--module", "sft", *SHORT, *SAVES, "--save_total_limit", "1")
    assert seen == [[], ["checkpoint-5"], ["checkpoint-10"]]
    assert [p.name for p in Path("run").glob("checkpoint-*")] == ["checkpoint-14"]


@slow
@pytest.mark.parametrize(
    "options", [("--save_strategy", "epoch"), ("--save_strategy", "best", "--metric_for_best_model", "loss")]
)
def test_every_checkpoint_ends_a_log_row(options: tuple[str, ...]) -> None:
    """What is averaged between two rows is in no checkpoint, so a resumed run could not log it."""
    every = ("--eval_steps", "7", "--logging_steps", "4")
    run_here("--module", "sft", *SHORT, *every, *options)
    found = {json.loads((p / MARKER).read_text())["step"] for p in Path("run").glob("checkpoint-*")}
    assert 7 in found and found <= {row["step"] for row in rows_of(Path("run")) if "loss" in row}


@slow
def test_other_data_are_refused_and_other_options_are_told(whole, capsys) -> None:
    command = ("--module", "sft", *SHORT, *SAVES)
    shutil.copytree(whole(*command), "run")
    resume = ("--resume_from_checkpoint", "run/checkpoint-10")
    before = [path.name for path in sorted(Path("run").glob("checkpoint-*"))]
    code, summary = run_here(*command, *resume, "--max_train_samples", "190")
    assert code == 1 and "other data" in summary["error"] and "fingerprint" in summary["error"]
    assert [path.name for path in sorted(Path("run").glob("checkpoint-*"))] == before
    assert "Traceback" not in capsys.readouterr().err
    run_here(*command, *resume, "--max_train_samples", "200", "--learning_rate", "1e-3", "--logging_steps", "1")
    err = capsys.readouterr().err
    assert "--learning_rate 0.004 -> 0.001" in err and "logging_steps" not in err.partition("removed")[0]
    assert "checkpoint-14 is removed" in err


@slow
def test_an_sft_run_on_conversations_goes_on_with_the_command_it_names() -> None:
    """What the run decided by itself (loss on answers alone, prompts that are too long) is decided again, not as chosen."""
    turns = [
        [
            {"role": "user", "content": "word " * (200 if i == 3 else 1) + str(i)},
            {"role": "assistant", "content": str(i)},
        ]
        for i in range(40)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in turns))
    options = ("--max_steps", "4", "--max_length", "64", "--on_bad_rows", "drop", "--save_steps", "2", *FEW[4:])
    code, first = run_here(
        *("--module", "sft", "--model_name_or_path", "tiny-qwen", "--dataset_name", "rows.jsonl", *options)
    )
    assert code == 0 and first["data"]["problems"] == {"too_long": 1}
    goes_on = ("--config", "run/resolved_config.yaml", "--resume_from_checkpoint", "run/checkpoint-2")
    code, second = run_here(*goes_on)
    assert code == 0 and second["data"] == first["data"]
    statuses = [[(check["id"], check["status"]) for check in summary["checks"]] for summary in (first, second)]
    assert statuses[0] == statuses[1]


@slow
def test_a_damaged_checkpoint_is_named(whole) -> None:
    command = ("--module", "sft", *SHORT, *SAVES)
    shutil.copytree(whole(*command), "run")
    optimizer = Path("run/checkpoint-10/optimizer.pt")
    optimizer.write_bytes(b"\0" * optimizer.stat().st_size)
    code, summary = run_here(*command, "--resume_from_checkpoint", "run/checkpoint-10")
    assert code == 1 and "run/checkpoint-10 cannot be loaded" in summary["error"]
    assert "Go on from an earlier one" in summary["error"]


def test_a_run_directory_is_no_checkpoint(capsys) -> None:
    Path("run/checkpoint-2").mkdir(parents=True)
    assert cli.main(["--module", "sft", "--toy", "--resume_from_checkpoint", "run"]) == 2
    assert "--output_dir run --resume_from_checkpoint last" in capsys.readouterr().err
    assert cli.main(["--module", "sft", "--toy", "--resume_from_checkpoint", ""]) == 2
    assert "--resume_from_checkpoint is empty" in capsys.readouterr().err


@slow
def test_checkpoints_of_weights_alone_are_not_resumed(monkeypatch, capsys) -> None:
    command = ("--module", "sft", *SHORT, *SAVES, "--save_only_model")
    with monkeypatch.context() as patch:
        ask_at(patch, 10)
        run_here(*command)
    assert "--save_only_model" in str(incompleteness(Path("run/checkpoint-5")))
    assert last_complete(Path("run"))[0] == Path("run/checkpoint-11")  # a stop always leaves one to go on from
    shutil.rmtree("run/checkpoint-11")
    assert cli.main([*command, "--output_dir", "run", "--resume_from_checkpoint", "last"]) == 2
    assert "--save_only_model" in capsys.readouterr().err


@slow
@pytest.mark.parametrize("place", ["torch.save", "save_model"])
def test_a_disk_that_fills_up_leaves_nothing_half_written(monkeypatch, capsys, place: str) -> None:
    """In the second checkpoint, or in the final model."""
    import torch
    import transformers

    save, save_model = torch.save, transformers.Trainer.save_model

    def full(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-10" in str(file):
            Path(file).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        save(value, file, *args, **kwargs)

    def full_at_the_end(self: Any, output_dir: str, *args: Any, **kwargs: Any) -> None:
        save_model(self, output_dir, *args, **kwargs)
        if "checkpoint" not in str(output_dir):
            (Path(output_dir) / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    if place == "torch.save":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(transformers.Trainer, "save_model", full_at_the_end)
    code, summary = run_here("--module", "sft", *SHORT, *SAVES)
    assert code == 1 and summary["status"] == "failed" and "disk is full" in summary["error"]
    assert "Traceback" not in capsys.readouterr().err
    kept = ["checkpoint-5"] if place == "torch.save" else ["checkpoint-10", "checkpoint-14", "checkpoint-5"]
    assert sorted(p.name for p in Path("run").glob("checkpoint-*")) == kept
    assert sorted(p.name for p in Path("run").iterdir() if p.name not in kept) == [
        *("log_history.jsonl", "resolved_config.yaml", "summary.json")
    ]


@slow
def test_a_directory_that_is_deleted_is_not_brought_back_by_a_checkpoint(monkeypatch, capsys) -> None:
    log = RunDirectory.log

    def deleting(self: RunDirectory, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] == 8:
            shutil.rmtree(self.path)

    monkeypatch.setattr(RunDirectory, "log", deleting)
    options = ("--toy", "--max_steps", "14", *FEW, "--eval_strategy", "no", "--logging_steps", "8")
    assert (
        cli.main(["--module", "sft", *options, "--save_strategy", "steps", "--save_steps", "9", "--output_dir", "run"])
        == 1
    )
    assert not Path("run").exists()
    err = capsys.readouterr().err
    assert err.count("run is gone") == 1 and "Traceback" not in err


# ---------------------------------------------------------------- a trainer by hand: the end of a run


@pytest.fixture
def run() -> RunDirectory:
    Path("run").mkdir()
    return RunDirectory(Path("run"), registry.get("sft"), Config("sft", False, {}, {}, parts=()), [])


def trainer_by_hand(train: Callable[[], None] = lambda: None, **options: Any) -> Any:
    """As much of a Trainer as is used around its training, which is `train`."""

    def save_model(folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "model.safetensors").write_text("new")

    return SimpleNamespace(
        args=SimpleNamespace(**{"output_dir": "run", "save_total_limit": None, **options}),
        state=SimpleNamespace(global_step=4),
        accelerator=SimpleNamespace(wait_for_everyone=lambda: None, device="cpu", gather=lambda tensor: tensor),
        model=SimpleNamespace(parameters=list),
        is_in_train=True,
        add_callback=lambda callback: None,
        train=lambda resume_from_checkpoint: train(),
        evaluate=lambda: None,
        save_model=save_model,
    )


def test_a_stop_behind_the_last_look_at_it_saves_no_model(run: RunDirectory) -> None:
    with run.stop, pytest.raises(KeyboardInterrupt):
        training.train(trainer_by_hand(lambda: os.kill(os.getpid(), signal.SIGINT)), run)
    assert not list(Path("run").iterdir())


def test_the_evaluation_of_a_run_with_nothing_left_to_train_is_not_part_of_training(run: RunDirectory) -> None:
    """Or a stop during it would wait for a checkpoint that nobody writes."""

    def train() -> None:
        raise NothingLeft

    trainer, seen = trainer_by_hand(train), []
    trainer.evaluate = lambda: seen.append(trainer.is_in_train)
    training.train(trainer, run)
    assert seen == [False] and Path("run/model.safetensors").exists()


def test_what_a_killed_run_had_of_its_model_is_not_saved_with_the_new_one(run: RunDirectory) -> None:
    Path("run/.model").mkdir()
    Path("run/.model/adapter_model.safetensors").write_text("old")
    training.save(trainer_by_hand(), run)
    assert [path.name for path in Path("run").iterdir()] == ["model.safetensors"]


def test_a_directory_that_is_deleted_is_not_brought_back_by_the_model(run: RunDirectory) -> None:
    Path("run").rmdir()
    with pytest.raises(FileNotFoundError):
        training.save(trainer_by_hand(), run)
    assert not Path("run").exists()


def test_the_best_checkpoint_outlives_the_limit(run: RunDirectory) -> None:
    trainer = trainer_by_hand(save_total_limit=2, save_only_model=False, should_save=True)
    callback = training.CheckpointCallback(run, trainer)
    for step in (1, 2, 3):
        callback.folder(step).mkdir()
        state = SimpleNamespace(global_step=step, best_model_checkpoint="run/checkpoint-1")
        callback.on_save(trainer.args, state, SimpleNamespace())
    assert sorted(path.name for path in Path("run").iterdir()) == ["checkpoint-1", "checkpoint-3"]


# ---------------------------------------------------------------- real signals to real processes


def started(*command: str) -> subprocess.Popen[str]:
    """A run, in a session of its own, that is certainly in the middle of its training."""
    process = subprocess.Popen(
        [sys.executable, *command, "--max_steps", "100000", "--output_dir", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log, deadline = Path("run/log_history.jsonl"), time.monotonic() + 120
    while not (log.exists() and '"loss"' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    return process


TOY = (str(ROOT / "run.py"), "--module", "sft", "--toy", *FEW, "--logging_steps", "1")


@slow
def test_ctrl_c_saves_a_checkpoint_and_says_so_in_one_line() -> None:
    process = started(*TOY)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("stopping after this step") == 1 and "Traceback" not in err
    assert json.loads(Path("run/summary.json").read_text())["status"] == "interrupted"
    assert last_complete(Path("run"))[0]


@slow
def test_ctrl_c_reaches_the_processes_of_a_launcher_and_all_stop_at_one_step() -> None:
    process = started(*LAUNCH, *TOY)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does; the launcher passes it on
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    checkpoint = last_complete(Path("run"))[0]
    assert checkpoint, err
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["status"] == "interrupted" and f"saved {checkpoint}" in summary["error"]
    assert "accelerate launch" in summary["error"] and err.count("stopping after this step") == 1


# ---------------------------------------------------------------- buffered generations


GRPO = {
    "num_iterations": 1,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 8,
    "save_strategy": "steps",
    "save_steps": 5,
    "max_steps": 100,
}


@pytest.mark.parametrize(
    ("values", "period"),
    [
        ({}, 1),
        ({"gradient_accumulation_steps": 4}, 1),  # it generates once per optimizer step
        ({"steps_per_generation": 4}, 4),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 4}, 1),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, 2),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, 3),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 3}, 6),
        ({"num_iterations": 2}, 2),
        ({"generation_batch_size": 32}, 4),
    ],
)
def test_a_generation_buffer_decides_where_checkpoints_are_exact(values: dict[str, Any], period: int) -> None:
    """Counted out: the first optimizer step after which TRL generates anew."""
    options = {**GRPO, **values}
    assert save_period(options) == period
    per_generation = options["steps_per_generation"] or (options["generation_batch_size"] or 0) // 8
    generate_every = (per_generation or options["gradient_accumulation_steps"]) * options["num_iterations"]
    micro_steps = next(n for n in range(1, 999) if n * options["gradient_accumulation_steps"] % generate_every == 0)
    assert micro_steps == period
    assert save_period({"gradient_accumulation_steps": 4}) == 1  # sft and dpo buffer nothing
    assert save_period({"num_ppo_epochs": 3, "num_mini_batches": 2, "gradient_accumulation_steps": 4}) == 6


def test_trls_own_config_gives_the_same_period() -> None:
    from trl import GRPOConfig

    on_cpu = {"use_cpu": True, "bf16": False, "num_generations": 2, "output_dir": "x"}
    args = GRPOConfig(**on_cpu, per_device_train_batch_size=8, generation_batch_size=32, num_iterations=2)
    assert save_period(vars(args)) == 8


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"save_steps": 8}, None),
        ({"save_steps": 0.08}, None),  # a share of 100 steps
        ({"save_steps": 5}, "such as 4 or 8"),
        ({"save_steps": 3}, "such as 4"),
        ({"save_steps": 5, "save_strategy": "no"}, None),
        ({"save_strategy": "epoch"}, "--save_steps 4"),
    ],
)
def test_checkpoints_within_a_buffer_are_refused(values: dict[str, Any], says: str | None) -> None:
    problems = check_save_steps({**GRPO, "steps_per_generation": 4, **values})
    assert len(problems) == (says is not None)
    if says:
        assert says in problems[0] and "steps_per_generation * num_iterations" in problems[0]


def test_the_rule_is_checked_with_all_other_options() -> None:
    from llmcore_hf import config, registry

    options = ["--toy", "--save_strategy", "steps", "--save_steps", "5"]
    resolved = config.resolve(registry.get("dpo"), config.read_request(["--module", "dpo", *options]))
    assert training.check_options(resolved) == []
    resolved.values |= {"num_iterations": 2, "steps_per_generation": 2}
    assert ["such as 4 or 8" in problem for problem in training.check_options(resolved)] == [True]


def test_a_stop_waits_for_the_end_of_the_buffer() -> None:
    run: Any = SimpleNamespace(stop=SimpleNamespace(requested=True))
    args = SimpleNamespace(**GRPO | {"steps_per_generation": 4, "save_total_limit": None, "save_only_model": False})
    callback = training.CheckpointCallback(run, SimpleNamespace(args=args))  # type: ignore[arg-type]
    stopped = []
    for step in range(1, 5):
        control = SimpleNamespace(should_save=False, should_training_stop=False, should_evaluate=False)
        callback.on_step_end(args, SimpleNamespace(global_step=step), control)
        stopped.append(control.should_training_stop and control.should_save)
    assert stopped == [False, False, False, True]
    at_the_end = SimpleNamespace(should_save=True, should_evaluate=True)
    callback.on_epoch_end(args, SimpleNamespace(global_step=4), at_the_end)
    assert not (at_the_end.should_save or at_the_end.should_evaluate), "it has just been saved"


def test_the_trainers_own_handling_of_sigterm_is_refused(capsys) -> None:
    assert cli.main(["--module", "sft", "--toy", "--enable_jit_checkpoint"]) == 2
    assert "--enable_jit_checkpoint is not needed" in capsys.readouterr().err
