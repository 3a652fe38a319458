"""docs/multinode.md and its Chinese twin: their commands are ones the launcher takes, their links lead somewhere, and both say the same."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llmcore_hf import launch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in ("multinode.md", "multinode.zh-CN.md")}
ENGLISH, CHINESE = PAGES.values()


def commands(page: str) -> list[str]:
    """The lines of all shell blocks, without comments."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    return [
        " ".join(shlex.split(line, comments=True)) for line in text.splitlines() if shlex.split(line, comments=True)
    ]


def shape(page: str) -> list[str]:
    """What stands in both languages alike: the order of sections, table rows and steps, and everything in code type."""
    marks = [re.match(r"#+ |\| |\d\. |- |```", line) for line in page.splitlines()]
    return [mark[0] for mark in marks if mark]


def test_both_pages_have_the_same_commands_and_the_same_parts() -> None:
    assert commands(ENGLISH) == commands(CHINESE) and len(commands(ENGLISH)) >= 4
    assert shape(ENGLISH) == shape(CHINESE)


def test_both_pages_name_the_same_things() -> None:
    named = [
        set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))) for page in PAGES.values()
    ]
    assert {name.replace(".zh-CN", "") for name in named[0]} == {name.replace(".zh-CN", "") for name in named[1]}


@pytest.mark.parametrize("command", [line for line in commands(ENGLISH) if " launch " in line])
def test_every_command_is_one_that_the_launcher_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "port_is_free", lambda port: True)
    options = "dataset_name: x\nmodel_name_or_path: y\n"
    (tmp_path / "my.yaml").write_text(options)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "resolved_config.yaml").write_text("module: sft\n" + options)
    argv = shlex.split(command.replace("/shared", str(tmp_path)))
    asked = launch.read(argv[argv.index("launch") + 1 :])
    assert asked.n_machines == 2 and asked.settings["main_process_ip"]


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_the_pages_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGES[name])
    assert links and all((DOCS / link.partition("#")[0]).exists() for link in links if not link.startswith("http"))


def test_the_pages_are_found_from_where_one_looks() -> None:
    assert "(docs/multinode.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(docs/multinode.zh-CN.md)" in (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    for name in ("multinode.yaml", "multinode.slurm"):
        assert "docs/multinode.md" in (ROOT / "accelerate_configs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
def test_what_the_pages_name_is_there(page: str) -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "llmcore_hf").rglob("*.py"))
    tests = (ROOT / "tests" / "test_launch.py").read_text(encoding="utf-8")
    assert all(name in code for name in re.findall(r"LLMCORE_\w+", page))
    assert all(f"def {name}(" in tests for name in re.findall(r"\btest_(?!launch\b)\w+", page))
    assert all(option in page for option in launch.LAUNCH_OPTIONS)
    # of the messages that the table of failures quotes
    quoted = re.findall(r"^\| .*?\| `([^`]+)`", page, re.MULTILINE)
    known = re.sub(r"\s+", " ", code)
    assert len(quoted) >= 6
    for message in quoted:
        parts = [part.strip() for part in message.split("...") if part.strip()]
        assert all(part in known for part in parts), message
