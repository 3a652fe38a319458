"""Every recipe and launch configuration that is shipped can be used as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmcore_hf import config, registry, resources
from llmcore_hf.config import Config, Options
from llmcore_hf.errors import ConfigError

RECIPES = sorted(
    p.relative_to(resources.path("recipes"))
    for p in resources.path("recipes").rglob("*.yaml")
    if p.name != "brief.yaml"
)
TOYS = [p for p in RECIPES if p.name == "toy.yaml"]
TOY_VARIANTS = [p for p in RECIPES if p.name.startswith("toy-")]
REAL = [p for p in RECIPES if p not in TOYS + TOY_VARIANTS]
CHECKPOINTS = {"llava": "llava-hf/llava-1.5-7b-hf", "blip2": "Salesforce/blip2-opt-2.7b"}
QLORA = [p for p in REAL if "qlora" in p.stem]
ACCELERATE = sorted(p.name for p in resources.path("accelerate_configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.chdir(resources.path("recipes").parent)  # recipes name files from the root of the checkout


def full_path(recipe: Path) -> Path:
    return resources.path("recipes") / recipe


def document(recipe: Path) -> dict[str, Any]:
    return config.read_yaml(full_path(recipe))


def resolve(recipe: Path, *options: str) -> Config:
    module = registry.get(recipe.parent.name)
    request = config.read_request(["--module", module.name, "--config", str(full_path(recipe)), *options])
    return config.resolve(module, request)


def test_every_module_has_its_toy_recipe_and_every_recipe_its_module() -> None:
    modules = {module.name for module in registry.MODULES}
    assert {recipe.parent.name for recipe in TOYS} == modules
    assert {recipe.parent.name for recipe in RECIPES} == modules


@pytest.mark.parametrize("module", ["sft", "dpo", "reward", "ppo", "grpo"])
def test_there_are_recipes_for_a_real_checkpoint_full_lora_and_qlora(module: str) -> None:
    names = {recipe.name for recipe in REAL if recipe.parent.name == module}
    assert {f"qwen2.5-0.5b-instruct-{how}.yaml" for how in ("full", "lora", "qlora")} <= names


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_all_keys_of_a_recipe_are_known_and_all_values_have_their_type(recipe: Path) -> None:
    options = Options(registry.get(recipe.parent.name).load().argument_classes())
    problems: list[str] = []
    values = options.from_yaml(full_path(recipe), str(recipe), problems)
    written_options = {name: value for name, value in document(recipe).items() if name not in ("module", "toy")}
    assert not problems and set(values) == set(written_options)
    for name, written in written_options.items():
        assert type(values[name]) is type(written) or isinstance(values[name], float), (name, written)
        assert values[name] == written


@pytest.mark.parametrize("recipe", TOYS, ids=str)
def test_a_toy_recipe_resolves(recipe: Path) -> None:
    module = registry.get(recipe.parent.name)
    resolved = config.resolve(module, config.read_request(["--module", module.name, "--toy"]))
    assert resolved.toy and set(document(recipe)) == {n for n in resolved.values if "toy.yaml" in resolved.sources[n]}


@pytest.mark.parametrize("recipe", [r for r in TOYS if registry.get(r.parent.name).trains_on], ids=str)
def test_a_toy_recipe_needs_nothing_from_elsewhere(recipe: Path) -> None:
    from llmcore_hf.data.toy import TOY_DATASETS
    from llmcore_hf.models.tiny import TINY_MODELS
    from llmcore_hf.vlm.tiny import TINY_VLMS

    values, stages = document(recipe), registry.get(recipe.parent.name).stages
    assert values["model_name_or_path"] in [*TINY_MODELS, *TINY_VLMS]
    for part in [values[stage] for stage in stages] or [values]:
        assert part["dataset_name"] in TOY_DATASETS
        assert 0 < part["max_steps"] <= 500


@pytest.mark.parametrize("recipe", TOY_VARIANTS, ids=str)
def test_a_variant_of_a_toy_recipe_resolves_by_itself(recipe: Path) -> None:
    request = config.read_request(["--config", str(full_path(recipe))])
    resolved = config.resolve(registry.get(str(request.module)), request)
    assert resolved.module == recipe.parent.name and resolved.toy
    assert resolved.values["use_peft"] is ("lora" in recipe.stem)
    assert resolved.values["dataset_name"].startswith("toy-")


@pytest.mark.parametrize("recipe", [r for r in REAL if r not in QLORA], ids=str)
def test_a_recipe_for_a_real_checkpoint_resolves(recipe: Path) -> None:
    resolved = resolve(recipe)
    for name, written in document(recipe).items():
        assert any(getattr(part, name, None) == written for part in resolved.parts), name


@pytest.mark.parametrize("recipe", QLORA, ids=str)
def test_a_qlora_recipe_lacks_only_the_gpu(recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(recipe)
    [problem] = caught.value.problems
    assert "CUDA" in problem


@pytest.mark.parametrize("recipe", QLORA, ids=str)
def test_a_qlora_recipe_without_quantization_resolves_anywhere(recipe: Path) -> None:
    assert resolve(recipe, "--load_in_4bit", "false").values["use_peft"] is True


@pytest.mark.parametrize("recipe", REAL, ids=str)
def test_a_recipe_does_what_its_name_says(recipe: Path) -> None:
    values = document(recipe)
    how = recipe.stem.rpartition("-")[2]
    for part in [values[stage] for stage in registry.get(recipe.parent.name).stages] or [values]:
        assert part.get("use_peft", False) is (how in ("lora", "qlora"))
        assert part.get("load_in_4bit", False) is (how == "qlora")
    assert values["model_name_or_path"] == CHECKPOINTS.get(recipe.parent.name, "Qwen/Qwen2.5-0.5B-Instruct")


@pytest.mark.parametrize("recipe", REAL, ids=str)
def test_a_recipe_for_a_real_checkpoint_names_its_source_and_its_command(recipe: Path) -> None:
    text = full_path(recipe).read_text(encoding="utf-8")
    assert "# Source: " in text
    assert f"--module {recipe.parent.name} --config recipes/{recipe}" in text


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_leaves_it_to_the_user_where_a_run_writes_and_what_it_sends(recipe: Path) -> None:
    left_out = ("output_dir", "overwrite_output_dir", "hub_token", "push_to_hub", "report_to", "trust_remote_code")
    assert not set(left_out) & set(document(recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_is_named_in_the_readme_beside_it(recipe: Path) -> None:
    assert recipe.name in (full_path(recipe).parent / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- accelerate configurations


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_loads_its_configuration(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = resources.path(f"accelerate_configs/{name}")
    loaded = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert loaded.num_processes == written["num_processes"] and loaded.use_cpu == written["use_cpu"]


@pytest.mark.parametrize("name", ACCELERATE)
def test_a_configuration_leaves_the_precision_to_the_recipe(name: str) -> None:
    text = resources.path(f"accelerate_configs/{name}").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["mixed_precision"] == "no"  # not `False`, which bare `no` would be


@pytest.mark.parametrize(("name", "processes"), [("cpu_1", 1), ("cpu_2", 2)])
def test_the_cpu_configurations_are_for_a_cpu(name: str, processes: int) -> None:
    loaded = yaml.safe_load(resources.path(f"accelerate_configs/{name}.yaml").read_text(encoding="utf-8"))
    assert loaded["num_processes"] == processes and loaded["use_cpu"] is True


@pytest.mark.parametrize("name", ACCELERATE)
def test_a_configuration_says_how_it_is_used(name: str) -> None:
    text = resources.path(f"accelerate_configs/{name}").read_text(encoding="utf-8")
    assert f"accelerate launch --config_file accelerate_configs/{name}" in text
