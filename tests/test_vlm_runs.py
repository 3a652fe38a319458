"""The vision toys as a learner runs them: what they learn beyond the blind baseline, and what they leave behind."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from learning_runs import check_brief

from llmcore_hf.run_dir import validate_summary
from llmcore_hf.vlm import evaluation
from llmcore_hf.vlm.data import answer_of, question_of

pytestmark = pytest.mark.slow
MODULES = ["llava", "blip2", "flamingo"]


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory, llmcore: Run):
    """Run a toy once: (the process, its directory)."""
    done: dict[str, tuple[subprocess.CompletedProcess[str], Path]] = {}

    def run(module: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        if module not in done:
            folder = tmp_path_factory.mktemp(module)
            options = ("--module", module, "--toy", "--output_dir", "run")
            done[module] = llmcore(*options, cwd=folder, timeout=600, OMP_NUM_THREADS="1"), folder / "run"
        return done[module]

    return run


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES)
def test_a_toy_sees(toy_run, module: str) -> None:
    """Bounds: the figures the project promises. Measured, five seeds: llava at least .98, blip2 .88, flamingo .84."""
    result, run_dir = toy_run(module)
    assert result.returncode == 0, result.stderr
    summary = summary_of(run_dir)
    validate_summary(summary)
    after = summary["eval"]["after"]
    assert after["vqa_accuracy"] >= max(0.7, after["vqa_accuracy/shuffled"] + 0.4, after["vqa_accuracy/blank"] + 0.4)
    assert summary["eval"]["n"]["vqa_accuracy"] == 300 and after["caption_accuracy"] >= 0.3
    assert all(after["caption_accuracy"] >= after[f"caption_accuracy/{how}"] + 0.2 for how in evaluation.BLIND)
    assert after["hard/vqa_accuracy"] >= 0.4, "color-shape pairs never seen"
    assert all(check["status"] == "pass" for check in summary["checks"])
    assert summary["peak_rss_mb"] < 2000
    check_brief(module, run_dir)


@pytest.mark.parametrize("module", MODULES)
def test_a_toy_leaves_every_artifact(toy_run, module: str) -> None:
    run_dir = toy_run(module)[1]
    pictures = {"training_curves.png", "held_out.png", "attention.png"}
    saved = {
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    texts = {"summary.json", "log_history.jsonl", "resolved_config.yaml", "README.md", "config.json"}
    found = {path.name for path in run_dir.iterdir()}
    assert pictures | saved | texts <= found == set(summary_of(run_dir)["artifacts"])
    assert all((run_dir / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert not list(run_dir.rglob("*.bin")), "a pickle was left behind"


@pytest.mark.parametrize("module", MODULES)
def test_what_was_saved_answers_the_same(toy_run, module: str) -> None:
    from accelerate import Accelerator
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from llmcore_hf.data.reading import toy_dataset
    from llmcore_hf.vlm import flamingo_model  # noqa: F401  registers its class with the Auto classes

    run_dir = toy_run(module)[1]
    model, processor = AutoModelForImageTextToText.from_pretrained(run_dir), AutoProcessor.from_pretrained(run_dir)
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    rows = [*toy_dataset("toy-shapes")["test"].select(range(5))]
    answers = evaluation.generate(model.eval(), processor, rows, 12, 5, Accelerator(cpu=True))
    samples = summary_of(run_dir)["samples"]
    assert [sample["after"] for sample in samples] == answers.texts
    assert [(s["prompt"], s["reference"]) for s in samples] == [(question_of(row), answer_of(row)) for row in rows]


def test_the_comparison_takes_finished_runs(toy_run, llmcore: Run, tmp_path: Path) -> None:
    """Budgets of the toys differ, and it says so; accuracies are measured again on what was saved."""
    folders = {module: toy_run(module)[1] for module in MODULES}
    options = ("--module", "vlm", "--toy", "--runs", *map(str, folders.values()), "--output_dir", "run")
    result = llmcore(*options, cwd=tmp_path, timeout=600, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    summary = summary_of(tmp_path / "run")
    validate_summary(summary)
    block = summary["comparison"]
    assert (block["source"], block["equal_budget"]) == ("finished runs", False)
    assert block["runs"] == {module: str(folder) for module, folder in folders.items()}
    statuses = {check["id"]: check["status"] for check in summary["checks"]}
    assert statuses.pop("vlm.equal_budget") == "skip" and set(statuses.values()) == {"pass"}
    for module, folder in folders.items():
        after = summary_of(folder)["eval"]["after"]
        assert block["table"]["vqa_accuracy"][module] == after["vqa_accuracy"]
        assert 0 < block["table"]["parameters_trained"][module] < block["table"]["parameters"][module]
    assert (tmp_path / "run" / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "Budget (training rows): NOT equal" in result.stdout


def test_flamingo_learns_from_examples(toy_run) -> None:
    summary = summary_of(toy_run("flamingo")[1])
    after = summary["eval"]["after"]
    assert after["shots/0"] <= 0.45, "without examples nobody can know what is meant"
    assert max(after[f"shots/{n}"] for n in (1, 2, 4)) >= after["shots/0"] + 0.15
    for how in evaluation.BLIND:  # the blind, with the same examples
        assert all(after[f"shots/{n}"] >= after[f"shots/{n}/{how}"] + 0.3 for n in (1, 2, 4))
    check = {check["id"]: check for check in summary["checks"]}["flamingo.examples_help"]
    assert check["status"] == "pass" and check["observed"]["from"] > 0


def test_blip2_learns_all_three_objectives(toy_run) -> None:
    """Three seeds gave .78, .95 and .89 for matching with 40 steps fewer; half of the pairs are hard negatives."""
    after = summary_of(toy_run("blip2")[1])["eval"]["after"]
    assert after["stage1/itm_accuracy"] >= 0.7
    assert after["stage1/itc_accuracy"] >= 0.8 and after["stage1/itg_accuracy"] >= 0.8
    assert after["frozen_lm/vqa_accuracy"] >= 0.6


@torch.no_grad()
def test_blip2_leaves_a_retrieval_model_of_its_first_stage(toy_run) -> None:
    from transformers import AutoProcessor, Blip2ForImageTextRetrieval

    from llmcore_hf.data import shapes
    from llmcore_hf.vlm import tiny

    folder = toy_run("blip2")[1] / "stage1"
    model, processor = Blip2ForImageTextRetrieval.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    triples = shapes.split_triples()["test"]
    texts = [tiny.CLS + shapes.caption(triple) + processor.tokenizer.eos_token for triple in triples]
    pictures = shapes.pictures("test", len(triples), seed=1)
    inputs = processor(
        images=[p for p, _ in pictures], text=texts, padding=True, padding_side="right", return_tensors="pt"
    )
    best = model(**inputs, use_image_text_matching_head=False).logits_per_image.argmax(dim=1)
    assert (best == torch.arange(len(triples))).float().mean() >= 0.8
