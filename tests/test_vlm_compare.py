"""The comparison of the three architectures: what is counted, which runs are compared, and when the budget was equal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import learning_runs
import pytest
import torch
from test_toy_runs import run_here

from llmcore_hf import cli, registry
from llmcore_hf.config import Config
from llmcore_hf.data import shapes
from llmcore_hf.learning import brief, evidence
from llmcore_hf.run_dir import validate_summary
from llmcore_hf.vlm import compare, costs, tiny
from llmcore_hf.vlm.compare import MODULES, PARTS, Contestant
from llmcore_hf.vlm.costs import CONNECTOR, LANGUAGE_MODEL, TOWER, Counted
from llmcore_hf.vlm.evaluation import encode_prompts

pytestmark = pytest.mark.usefixtures("one_thread")


def questions(n: int) -> list[dict[str, Any]]:
    return [
        {
            "images": [image],
            "prompt": [{"role": "user", "content": shapes.QUESTIONS["color"]}],
            "completion": [{"role": "assistant", "content": triple[0]}],
        }
        for image, triple in shapes.pictures("test", n)
    ]


# ---------------------------------------------------------------- what is counted


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any, Any]]:
    """Module -> (model, a second one with the same weights, processor), not trained."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    found = {}
    for name in MODULES:
        registry.get(name).load()
        path = tiny.ensure(f"tiny-{name}")
        model, start = (AutoModelForImageTextToText.from_pretrained(path) for _ in range(2))
        processor = AutoProcessor.from_pretrained(path)
        processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
        found[name] = model, start, processor
    return found


@pytest.mark.parametrize("name", MODULES)
def test_operations_are_those_of_the_formula(models, name: str) -> None:
    """Linear layers: 2 per weight and position; attention of the language model: 4 T T D per layer."""
    model, _, processor = models[name]
    inputs = encode_prompts(processor, questions(1))
    before = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    flops = costs.flops_of(model, inputs, PARTS[name])
    assert [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")] == before
    text, n = model.config.get_text_config(), inputs["input_ids"].shape[1]
    linear = dict.fromkeys((TOWER, CONNECTOR, LANGUAGE_MODEL), 0)
    for where, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            linear[PARTS[name].of(where)] += module.weight.numel()
    attention = text.num_hidden_layers * 4 * n * n * text.num_attention_heads * text.head_dim
    assert flops[LANGUAGE_MODEL] == 2 * n * linear[LANGUAGE_MODEL] + attention
    patches = tiny.N_PATCHES + 1
    tower = 2 * patches * linear[TOWER] + 2 * 4 * patches**2 * tiny.WIDTH + 2 * tiny.N_PATCHES * 3 * 8 * 8 * tiny.WIDTH
    assert flops[TOWER] == tower
    if name == "llava":
        assert flops[CONNECTOR] == 2 * tiny.N_PATCHES * linear[CONNECTOR]


def test_tokens_of_an_image_and_what_they_take_in_the_cache(models) -> None:
    batch = questions(1)
    inputs = {name: encode_prompts(models[name][2], batch) for name in MODULES}
    tokens = {name: costs.visual_tokens(models[name][0], inputs[name]["input_ids"][0]) for name in MODULES}
    assert tokens == {"llava": tiny.N_PATCHES, "blip2": tiny.N_QUERIES, "flamingo": tiny.N_QUERIES}
    lengths = {name: inputs[name]["input_ids"].shape[1] for name in MODULES}
    assert lengths["llava"] > lengths["blip2"] > lengths["flamingo"]
    with torch.no_grad():
        cache = models["llava"][0].eval()(**inputs["llava"], use_cache=True).past_key_values
    real = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert costs.cache_bytes(models["llava"][0], lengths["llava"]) == real


@pytest.mark.parametrize("name", MODULES)
def test_trained_is_what_has_changed_and_activations_are_kept_for_that_alone(models, name: str) -> None:
    model, start, processor = models[name]
    changed = next(n for n, _ in model.named_parameters() if PARTS[name].of(n) == CONNECTOR)
    parameter = model.get_parameter(changed)
    with torch.no_grad():
        parameter.add_(1e-3)
    assert costs.changed(model, start) == {changed}
    counted = costs.count(model, start, processor, questions(4), PARTS[name])
    assert counted.trained == {TOWER: 0, CONNECTOR: parameter.numel(), LANGUAGE_MODEL: 0}
    assert sum(counted.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert counted.training_bytes == counted.weight_bytes + 12 * parameter.numel()
    batch = costs.training_batch(processor, questions(4))
    everything = costs.activation_bytes(model, batch, {n for n, _ in model.named_parameters()})
    assert 0 == costs.activation_bytes(model, batch, set()) < 4 * counted.activation_bytes < everything
    twice = costs.activation_bytes(model, costs.training_batch(processor, questions(8)), {changed})
    assert twice == pytest.approx(8 * counted.activation_bytes, rel=0.1)
    with torch.no_grad():
        parameter.copy_(start.get_parameter(changed))


# ---------------------------------------------------------------- what is said of budgets


UNEQUAL = {"llava": 20480, "blip2": 30080, "flamingo": 25600}  # of the three toys


def compared_toys(root: Path) -> Path:
    """The recorded comparison as it would be of the runs that the three toys leave."""

    def change(summary: dict[str, Any]) -> None:
        summary["comparison"] |= {"source": compare.FOUND, "equal_budget": False}
        summary["comparison"]["table"]["training_rows"] = UNEQUAL
        for check in summary["checks"]:
            if check["id"] == "vlm.equal_budget":
                check |= {"status": "skip", "observed": UNEQUAL}

    return learning_runs.place("vlm", root, change)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_brief_of_runs_with_budgets_of_their_own_says_so(tmp_path: Path, language: str) -> None:
    source = brief.require("vlm", language)
    equal = brief.markdown(source, learning_runs.recorded("vlm"), language)
    unequal = brief.markdown(source, evidence.read(compared_toys(tmp_path), "vlm"), language)
    false_now = {"zh": ("各训 ", "预算相同，"), "en": ("With equal budgets,", "training rows each")}
    for words in false_now[language]:
        assert words in equal and words not in unequal, words
    numbers = set(re.findall(r"[0-9][0-9,]*", unequal))
    assert {f"{n:,}" for n in UNEQUAL.values()} <= numbers or set(map(str, UNEQUAL.values())) <= numbers
    assert {"zh": "准确率不能互相比。", "en": "accuracies don't compare."}[language] in unequal
    for words in {"zh": ("这里预算相等", "每个只训了"), "en": ("here budgets are equal", "Each had")}[language]:
        assert words not in equal + unequal


@pytest.mark.parametrize("equal", [True, False])
def test_the_figure_says_when_budgets_were_not_equal(monkeypatch, equal: bool) -> None:
    from llmcore_hf.vlm import pictures

    summary = json.loads((learning_runs.RUNS / "vlm" / "summary.json").read_text(encoding="utf-8"))
    block = summary["comparison"] | {"equal_budget": equal}
    if not equal:
        block["table"] |= {"training_rows": UNEQUAL}
    contestants = [
        SimpleNamespace(name=name, title=registry.get(name).load().LESSON.title, history=[], rows_per_step=64)
        for name in MODULES
    ]
    monkeypatch.setattr(pictures, "png", lambda figure: figure)
    title = compare.draw(contestants, block).get_suptitle()
    assert ("NOT equal" in title) is not equal
    assert equal or all(f"{n:,}" in title for n in UNEQUAL.values())


# ---------------------------------------------------------------- which runs


def place(folder: Path, module: str, **fields: Any) -> Path:
    """What a finished run leaves, as far as the choice of runs looks at it."""
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"module": module, "status": "ok", "eval": {"n": {}}, **fields}))
    for name in ("config.json", "resolved_config.yaml", "log_history.jsonl"):
        (folder / name).write_text("{}")
    return folder


def test_the_latest_runs_are_taken_when_all_three_have_ended(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare.latest_runs() == {}
    assert "output/llava/latest: there is no finished run" in capsys.readouterr().out
    for module in MODULES:
        place(Path("output", module, "one"), module)
        Path("output", module, "latest").symlink_to("one")
    assert {m: path.name for m, path in compare.latest_runs().items()} == dict.fromkeys(MODULES, "one")
    Path("output/blip2/one/config.json").unlink()
    assert compare.latest_runs() == {}
    assert "output/blip2/latest: it left no whole model (LoRA runs" in capsys.readouterr().out


BAD_RUNS: dict[str, tuple[list[str], str]] = {
    "missing": (["llava", "blip2", "nowhere"], "--runs nowhere: there is no finished run"),
    "another module": (["llava", "blip2", "dpo"], "--runs dpo: it is a run of `dpo`, not of llava, blip2, flamingo"),
    "two of one": (["llava", "blip2", "blip2"], "--runs must name one run each of llava, blip2, flamingo"),
    "one left out": (["llava", "blip2"], "--runs must name one run each of llava, blip2, flamingo, not: llava, blip2"),
    "not ended": (["llava", "blip2", "stopped"], "it has not come to its end (status interrupted)"),
    "damaged": (["llava", "blip2", "damaged"], "--runs damaged: its summary.json is damaged"),
    "a list": (["llava", "blip2", "list"], "--runs list: its summary.json is damaged"),
    "in part": (["llava", "blip2", "part"], "--runs part: it lacks resolved_config.yaml"),
}


@pytest.mark.parametrize("kind", BAD_RUNS)
def test_runs_that_cannot_be_compared_are_named(tmp_path: Path, monkeypatch, capsys, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    for module in ("llava", "blip2", "flamingo", "dpo"):
        place(Path(module), module)
    place(Path("stopped"), "flamingo", status="interrupted")
    (place(Path("damaged"), "flamingo") / "summary.json").write_text("{")
    (place(Path("list"), "flamingo") / "summary.json").write_text("[]")
    (place(Path("part"), "flamingo") / "resolved_config.yaml").unlink()
    names, message = BAD_RUNS[kind]
    assert cli.main(["--module", "vlm", "--runs", *names, "--output_dir", "run"]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err + captured.out
    assert json.loads(Path("run/summary.json").read_text())["status"] == "failed"


def config(**values: Any) -> Config:
    return Config("vlm", False, {"runs": None, "seed": 1, **dict.fromkeys(("budget", *MODULES)), **values}, {}, ())


def test_the_budget_is_the_same_for_all() -> None:
    budget = {"dataset_name": "toy-shapes", "max_steps": 3}
    models = {name: {"model_name_or_path": f"tiny-{name}"} for name in MODULES}
    assert compare.check(config(budget=budget, **models)) == []
    more = {**models, "llava": {**models["llava"], "max_steps": 9}, "blip2": {"stage1_step": 2}}
    problems = " ".join(compare.check(config(budget=budget, **more)))
    assert "stage llava: `max_steps` is set for all three by `budget`" in problems
    assert "stage blip2: unknown key `stage1_step` (did you mean `stage1_steps`?)" in problems
    wrong = {**budget, "learning_rat": 1.0, "max_steps": "many", "output_dir": "x"}
    problems = " ".join(compare.check(config(budget=wrong, **models)))
    assert "stage flamingo: unknown key `learning_rat` (did you mean `learning_rate`?)" in problems
    assert "max_steps" in problems and "stage blip2: `output_dir` is set by the stages themselves" in problems
    assert "--budget is missing" in compare.check(config())[0]
    assert compare.check(config(runs=["a", "b", "c"])) == []


# ---------------------------------------------------------------- what is said of them


def contestant(name: str, steps: int, right: int, reported: float | None = None, tower: int = 0) -> Contestant:
    scores = [1.0] * right + [0.0] * (100 - right)
    measured = {
        "vqa_accuracy": scores,
        "vqa_accuracy/shuffled": [0.0] * 75 + [1.0] * 25,
        "vqa_accuracy/blank": [0.0] * 100,
    }
    after = {metric: sum(values) / 100 for metric, values in measured.items()}
    if reported is not None:
        after["vqa_accuracy"] = reported
    parts = {TOWER: tower, CONNECTOR: 20, LANGUAGE_MODEL: 0}
    flops = {TOWER: 1, CONNECTOR: 2, LANGUAGE_MODEL: 3}
    counted = Counted({TOWER: 10, CONNECTOR: 20, LANGUAGE_MODEL: 30}, parts, flops, 8, 20, 240, 100, 1000.0)
    found = Contestant(name, name, Path(name), {"eval": {"after": after}}, {}, None, None, None, None)  # type: ignore[arg-type]
    found.scores, found.counted, found.speed = measured, counted, {"training": 100.0, "generation": 50.0}
    found.trained_on = steps, 64  # type: ignore[attr-defined]
    return found


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Contestant, "steps", property(lambda self: self.trained_on[0]))
    monkeypatch.setattr(Contestant, "rows_per_step", property(lambda self: self.trained_on[1]))


def statuses(contestants: list[Contestant], source: str) -> dict[str, str]:
    checks = compare.comparison_checks(contestants, compare.comparison(contestants, source))
    return {check.id.removeprefix("vlm."): check.status(toy=True) for check in checks}


def test_the_table_and_the_checks_say_what_was_measured(counts) -> None:
    three = [contestant("llava", 5, 90), contestant("blip2", 5, 60), contestant("flamingo", 5, 28)]
    block = compare.comparison(three, compare.TRAINED_HERE)
    assert block["equal_budget"] and block["table"]["training_rows"] == dict.fromkeys(MODULES, 320)
    assert block["table"]["parameters_frozen"]["llava"] == 40
    assert block["table"]["above_blind"]["llava"] == pytest.approx(0.65), "against the better baseline"
    low, high = block["table"]["vqa_accuracy/ci95"]["llava"]
    assert low < 0.9 < high
    difference = block["differences"]["llava - blip2"]
    assert difference["vqa_accuracy"] == pytest.approx(0.3) and difference["ci95"][0] > 0.15
    found = statuses(three, compare.TRAINED_HERE)
    assert found.pop("flamingo_sees") == "fail", "0.28 against 0.25 is no sight"
    assert set(found.values()) == {"pass"}
    text = compare.as_markdown(block)
    assert (
        "| trained in this run | LLaVA | BLIP-2 | Flamingo |" in text
        and "| vqa_accuracy | 0.900 | 0.600 | 0.280 |" in text
    )
    assert "Budget (training rows): equal." in text


def test_unequal_budgets_other_answers_and_trained_towers_are_noticed(counts) -> None:
    unequal = [contestant("llava", 5, 90), contestant("blip2", 6, 90), contestant("flamingo", 5, 90)]
    assert statuses(unequal, compare.TRAINED_HERE)["equal_budget"] == "fail"
    assert statuses(unequal, compare.FOUND)["equal_budget"] == "skip"
    assert "NOT equal" in compare.as_markdown(compare.comparison(unequal, compare.FOUND))
    other = [
        contestant("llava", 5, 90),
        contestant("blip2", 5, 90, reported=0.5),
        contestant("flamingo", 5, 90, tower=3),
    ]
    found = statuses(other, compare.TRAINED_HERE)
    assert found["same_answers_as_in_the_runs"] == found["vision_towers_frozen"] == "fail"


# ---------------------------------------------------------------- a whole run, very short


@pytest.mark.slow
def test_a_short_training_of_all_three_and_its_resume(monkeypatch, tmp_path: Path) -> None:
    """Mechanics alone: six steps teach nothing, so learning checks may warn. A stage that has ended is not run again."""
    few = {
        "max_train_samples": 64,
        "max_eval_samples": 8,
        "max_generation_samples": 8,
        "per_device_eval_batch_size": 100,
    }
    budget = {
        "dataset_name": "toy-shapes",
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "max_new_tokens": 8,
        **few,
    }
    options = {"budget": {**budget, "eval_strategy": "steps", "eval_steps": 3}}
    options |= {name: {"model_name_or_path": f"tiny-{name}"} for name in MODULES}
    (tmp_path / "short.json").write_text(json.dumps(options))
    command = ("--module", "vlm", "--config", str(tmp_path / "short.json"))
    code, summary = run_here(monkeypatch, tmp_path, *command)
    assert code == 0, summary["error"]
    validate_summary(summary)
    block = summary["comparison"]
    assert block["source"] == "trained in this run" and block["equal_budget"]
    assert block["table"]["training_rows"] == dict.fromkeys(MODULES, 48)
    assert {"comparison.md", "training_curves.png", *MODULES} <= set(summary["artifacts"])
    weights = {name: (tmp_path / "run" / name / "model.safetensors").stat().st_mtime_ns for name in MODULES}
    (tmp_path / "run" / "flamingo" / "summary.json").unlink()  # as if it had been killed in the last one
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"status": "interrupted"}))
    code, again = run_here(monkeypatch, tmp_path, *command, "--resume_from_checkpoint", "last")
    assert code == 0, again["error"]
    now = {name: (tmp_path / "run" / name / "model.safetensors").stat().st_mtime_ns for name in MODULES}
    assert {name for name in MODULES if now[name] != weights[name]} == {"flamingo"}
    assert again["eval"] == summary["eval"]
    accuracies = {row: values for row, values in again["comparison"]["table"].items() if "per_second" not in row}
    assert accuracies == {row: values for row, values in block["table"].items() if "per_second" not in row}
