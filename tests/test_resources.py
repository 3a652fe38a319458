"""Shipped files are found in a checkout and in an installed wheel alike."""

from __future__ import annotations

import importlib.util
import shutil
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import llmcore_hf
from llmcore_hf import resources

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ["recipes/sft/toy.yaml", "recipes/dpo/toy.yaml", "accelerate_configs/cpu_2.yaml", "learning/README.md"]


def as_installed(site_packages: Path) -> ModuleType:
    """`resources` as it would be imported from a wheel unpacked in `site_packages`."""
    package = site_packages / "llmcore_hf"
    for folder in ("recipes", "accelerate_configs", "learning"):
        shutil.copytree(ROOT / folder, package / "_resources" / folder)
    shutil.copytree(ROOT / "llmcore_hf" / "schema", package / "schema")
    shutil.copy(ROOT / "llmcore_hf" / "resources.py", package)
    spec = importlib.util.spec_from_file_location("installed_resources", package / "resources.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [*SHIPPED, "schema/summary.schema.json", "recipes"])
def test_a_checkout_and_a_wheel_find_the_same_files(name: str, tmp_path: Path) -> None:
    here, there = resources.path(name), as_installed(tmp_path).path(name)
    assert here.is_absolute() and here.exists()
    assert there.is_relative_to(tmp_path / "llmcore_hf")
    assert here.is_dir() or here.read_bytes() == there.read_bytes()


def test_a_wheel_does_not_look_into_what_lies_beside_it_in_site_packages(tmp_path: Path) -> None:
    installed = as_installed(tmp_path)
    (tmp_path / "recipes" / "other").mkdir(parents=True)
    (tmp_path / "recipes" / "other" / "toy.yaml").write_text("from another package")
    with pytest.raises(FileNotFoundError):
        installed.path("recipes/other/toy.yaml")


@pytest.mark.parametrize("name", ["recipes/nothing/toy.yaml", "schema/nothing.json", "nothing"])
def test_a_file_that_is_not_shipped_is_named_in_the_error(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        resources.path(name)


def test_the_place_does_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resources.path(SHIPPED[0])
    monkeypatch.chdir(tmp_path)
    assert resources.path(SHIPPED[0]) == before


def test_the_wheel_maps_every_shipped_folder_into_the_package() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["llmcore_hf"]
    mapped = wheel["force-include"]
    assert mapped == {folder: f"llmcore_hf/_resources/{folder}" for folder in mapped}
    assert {name.partition("/")[0] for name in SHIPPED} <= set(mapped)


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(llmcore_hf.__file__).parent / "py.typed").is_file()
