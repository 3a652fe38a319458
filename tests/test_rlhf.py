"""The RLHF pipeline: options of its stages, what a stage hands to the next, how a cut-off run goes on, and what is measured."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmcore_hf.alignment import rlhf
from llmcore_hf.checks import Check
from llmcore_hf.config import Config
from llmcore_hf.durability import Interrupted, mark_complete
from llmcore_hf.errors import ConfigError, UserError
from llmcore_hf.models import tiny
from llmcore_hf.run_dir import Diverged


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def status_of(checks: list[Check]) -> dict[str, str]:
    return {check.id.split(".")[1]: check.status(toy=True) for check in checks}


# ---------------------------------------------------------------- options


def rlhf_config(**values: Any) -> Config:
    defaults = {"model_name_or_path": "tiny-qwen", "seed": 42, "sft": {}, "reward": {}, "ppo": {}}
    return Config("rlhf", False, {**defaults, **values}, {}, parts=())


def test_all_problems_of_all_stages_are_told_before_the_first_begins() -> None:
    options = {
        "sft": {"dataset_name": "toy-sort", "max_step": 3},
        "reward": {"dataset_name": "toy-sort-preference", "model_name_or_path": "x"},
        "ppo": {"dataset_name": "toy-sort-prompt", "reward_funcs": ["nothing"]},
    }
    problems = " ".join(rlhf.check(rlhf_config(**options)))
    assert "stage sft: unknown key `max_step` (did you mean `max_steps`?)" in problems
    assert "stage reward: `model_name_or_path` is set by the stages themselves" in problems
    assert "`nothing`: there is no such function" in problems
    assert "--model_name_or_path is missing" in " ".join(rlhf.check(rlhf_config(model_name_or_path=None)))


def resolved(*argv: str) -> Config:
    from llmcore_hf import config, registry

    return config.resolve(registry.get("rlhf"), config.read_request(["--module", "rlhf", *argv]))


def test_options_of_a_stage_are_laid_over_those_of_the_recipe() -> None:
    recipe = resolved("--toy").values
    changed = resolved("--toy", "--ppo", '{"kl_coef": 0.5, "max_eval_samples": 7}')
    assert changed.values["ppo"] == recipe["ppo"] | {"kl_coef": 0.5, "max_eval_samples": 7}
    assert (changed.values["sft"], changed.values["reward"]) == (recipe["sft"], recipe["reward"])
    stage = rlhf.stage_config("ppo", changed, Path("ppo"), "tiny-qwen", "tiny-qwen")
    assert (stage.values["kl_coef"], stage.values["vf_coef"]) == (0.5, recipe["ppo"]["vf_coef"])
    Path("ppo.json").write_text('{"kl_coef": 0.5, "max_eval_samples": 7}')
    assert resolved("--toy", "--ppo", "ppo.json").values["ppo"] == changed.values["ppo"]


def test_a_file_the_recipe_and_the_command_line_add_up_and_are_written_down() -> None:
    Path("mine.yaml").write_text("ppo:\n  kl_coef: 0.5\n  lam: 0.9\n")
    first = resolved("--toy", "--config", "mine.yaml", "--ppo", '{"lam": 0.8}')
    assert {name: first.values["ppo"][name] for name in ("kl_coef", "lam", "vf_coef")} == {
        "kl_coef": 0.5,
        "lam": 0.8,
        "vf_coef": 0.5,
    }
    Path("resolved.yaml").write_text(first.to_yaml())
    assert resolved("--config", "resolved.yaml").values["ppo"] == first.values["ppo"]


@pytest.mark.parametrize("text", ["[1]", "{", "nowhere.json", "list.json"])
def test_what_is_no_mapping_is_no_option_of_a_stage(text: str) -> None:
    Path("list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="`ppo` takes a JSON mapping or the name of an existing JSON file"):
        resolved("--toy", "--ppo", text)


def test_the_gold_reward_is_the_function_of_weight_0() -> None:
    options = {"reward_funcs": ["a", "mine.py:b"], "reward_weights": [1.0, 0.5, 0.0]}
    assert rlhf.gold_reward(rlhf_config(ppo=options)) == "b"
    assert rlhf.gold_reward(rlhf_config(ppo={"reward_funcs": ["a"], "reward_weights": [0.0, 1.0]})) is None
    assert rlhf.gold_reward(rlhf_config()) is None


@pytest.mark.parametrize(("curve", "status"), [([0.4, 0.9, 0.88], "pass"), ([0.4, 0.9, 0.6], "fail")])
def test_over_optimization_is_a_gold_reward_that_falls_back(curve: list[float], status: str) -> None:
    rows = [{"step": i, "ppo/eval_rewards/gold": value} for i, value in enumerate(curve)]
    block = {"ci95": {"rewards/gold": [0.1, 0.2]}, "delta": {"rewards/gold": 0.15}}
    assert status_of(rlhf.gold_checks(block, rows, "gold")) == {
        "gold_reward_rose": "pass",
        "no_over_optimization": status,
    }
    assert set(status_of(rlhf.gold_checks({"ci95": {}, "delta": {}}, [], None)).values()) == {"skip"}
    block["ci95"]["rewards/gold"] = [-0.1, 0.2]
    assert status_of(rlhf.gold_checks(block, rows, "gold"))["gold_reward_rose"] == "fail"


def test_steps_of_the_stages_follow_one_another(tmp_path: Path) -> None:
    for stage, steps in {"sft": [0, 5], "reward": [0, 2], "ppo": [4]}.items():
        (tmp_path / stage).mkdir()
        rows = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps)
        (tmp_path / stage / "log_history.jsonl").write_text(rows)
    rows = rlhf.merged_history(tmp_path)
    assert [row["step"] for row in rows] == [0, 5, 5, 7, 11]
    assert [next(name for name in row if name != "step") for row in rows] == [
        *["sft/loss"] * 2,
        *["reward/loss"] * 2,
        "ppo/loss",
    ]


def test_an_adapter_of_the_first_stage_is_merged_for_the_next(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = str(tiny.ensure("tiny-qwen"))
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    merged = rlhf.whole_model(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    found = AutoModelForCausalLM.from_pretrained(merged).eval()(ids).logits
    assert found.tolist()[0][0] == pytest.approx(adapted(ids).logits.tolist()[0][0], abs=1e-5)
    assert rlhf.whole_model(merged) == merged


# ---------------------------------------------------------------- one stage


def stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, requested: bool = False
) -> tuple[Any, list[Any]]:
    """A run of the pipeline, and the runs of stages that are carried out in it, which all end in the same way."""
    begun: list[Any] = []

    def carry_out(run: Any) -> int:
        begun.append(SimpleNamespace(path=run.path, checkpoint=run.checkpoint, files=sorted(run.path.iterdir())))
        (run.path / "summary.json").write_text(json.dumps({"status": ends, "error": "it went wrong"}))
        if requested:
            run.stop.signal = signal.SIGTERM
        return int(ends != "ok")

    monkeypatch.setattr("llmcore_hf.stages.carry_out", carry_out)
    run: Any = SimpleNamespace(path=tmp_path, command="the command", stop=SimpleNamespace(signal=None))
    return run, begun


def go(folder: Path, run: Any) -> None:
    rlhf.run_stage("sft", rlhf_config(), folder, run)


def ended(folder: Path, status: str, steps: int = 0) -> Path:
    """What a stage left behind that was started before, with a checkpoint after `steps`."""
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"status": status}))
    if steps:
        checkpoint = folder / f"checkpoint-{steps}"
        checkpoint.mkdir()
        (checkpoint / "weights").write_text("w")
        mark_complete(checkpoint, steps)
    return folder


def test_a_stage_that_has_ended_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run, begun = stages(tmp_path, monkeypatch, "ok")
    go(ended(tmp_path / "sft", "ok"), run)
    assert not begun and "stage sft: done before" in capsys.readouterr().out
    assert (tmp_path / "sft" / "summary.json").is_file()


def test_all_processes_wait_until_the_main_one_has_written_what_a_stage_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = stages(tmp_path, monkeypatch, "ok")
    met: list[list[str]] = []

    def broadcast(value: Any) -> Any:
        met.append(sorted(file.name for file in tmp_path.glob("sft/*")))
        return value

    monkeypatch.setattr("llmcore_hf.stages.distributed.broadcast", broadcast)
    go(tmp_path / "sft", run)
    assert met[-1] == ["summary.json"] and met[0] == []


@pytest.mark.parametrize("status", ["failed", "diverged", "interrupted"])
def test_a_stage_that_ended_otherwise_begins_anew_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    run, begun = stages(tmp_path, monkeypatch, "ok")
    go(ended(tmp_path / "sft", status), run)
    assert [(stage.path.name, stage.checkpoint, stage.files) for stage in begun] == [("sft", None, [])]


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_stage_with_a_checkpoint_goes_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    run, begun = stages(tmp_path, monkeypatch, "ok")
    go(ended(tmp_path / "sft", status, steps=4), run)
    assert begun[0].checkpoint == tmp_path / "sft" / "checkpoint-4" and begun[0].checkpoint.is_dir()
    assert {file.name for file in begun[0].files} == {"summary.json", "checkpoint-4"}


@pytest.mark.parametrize(("status", "kind"), [("failed", UserError), ("diverged", Diverged)])
def test_a_stage_that_fails_ends_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, kind: type[Exception]
) -> None:
    run, _ = stages(tmp_path, monkeypatch, status)
    with pytest.raises(kind, match=rf"stage sft {status}: it went wrong \(.*sft.summary\.json\)"):
        go(tmp_path / "sft", run)


@pytest.mark.parametrize("steps", [0, 4])
def test_a_stage_that_was_asked_to_stop_stops_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """It is no failure: the exit code is that of the signal, and the checkpoint to go on from is told."""
    run, _ = stages(tmp_path, monkeypatch, "interrupted", requested=True)
    with pytest.raises(Interrupted if steps else KeyboardInterrupt) as caught:
        go(ended(tmp_path / "sft", "interrupted", steps), run)
    assert run.stop.signal == signal.SIGTERM
    if steps:
        assert (caught.value.step, caught.value.checkpoint) == (4, tmp_path / "sft" / "checkpoint-4")


@pytest.mark.parametrize("adapter", [False, True])
def test_each_stage_starts_from_what_the_last_one_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: bool
) -> None:
    started: dict[str, tuple[str, str | None]] = {}

    def run_stage(stage: str, config: Config, folder: Path, run_dir: Any) -> None:
        started[stage] = (config.values["model_name_or_path"], config.values.get("reward_model_name_or_path"))
        assert (config.values["output_dir"], config.values["seed"]) == (str(folder), 7)
        folder.mkdir()
        if stage == "ppo":
            raise InterruptedError

    def whole_model(folder: Path) -> Path:
        assert folder == tmp_path / "sft"
        merged = folder / "merged" if adapter else folder
        merged.mkdir(exist_ok=True)
        return merged

    monkeypatch.setattr(rlhf, "run_stage", run_stage)
    monkeypatch.setattr(rlhf, "whole_model", whole_model)
    config = resolved("--toy", "--seed", "7")
    with pytest.raises(InterruptedError):
        rlhf.run(config, SimpleNamespace(path=tmp_path))  # type: ignore[arg-type]
    tuned = str(tmp_path / "sft" / "merged" if adapter else tmp_path / "sft")
    assert started == {"sft": ("tiny-qwen", None), "reward": (tuned, None), "ppo": (tuned, str(tmp_path / "reward"))}
