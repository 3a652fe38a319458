"""What a run leaves behind: its directory, its status and exit code, its summary, and who writes it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmcore_hf import config, distributed, environment, registry, resources
from llmcore_hf.checks import Check
from llmcore_hf.config import Config, RunArguments
from llmcore_hf.durability import mark_complete
from llmcore_hf.errors import ConfigError, UserError
from llmcore_hf.registry import Module
from llmcore_hf.run_dir import Diverged, RunDirectory, execute, finite, prepare_directory, summarize, validate_summary

REPOSITORY = Path(__file__).resolve().parent.parent
SCHEMA = json.loads(resources.path("schema/summary.schema.json").read_text(encoding="utf-8"))


@dataclass
class FakeArguments:
    seed: int = 42
    output_dir: str | None = None
    resume_from_checkpoint: str | None = None
    hub_token: str | None = None
    model: str | None = None
    rewards: list[str] | None = None
    asks: bool = False


Work = Callable[[Config, RunDirectory], None]


class Lesson:
    """A module whose `run` is `work`."""

    def __init__(self) -> None:
        self.module = Module("fake", 1, 1, "假", "Fake", "fake_lesson")
        self.work: Work = lambda config, run: None

    def config(self, *options: str, toy: bool = False) -> Config:
        return config.resolve(self.module, config.Request("fake", toy, None, list(options)))

    def execute(self, work: Work | None = None, *options: str, toy: bool = False) -> int:
        self.work = work or self.work
        return execute(self.module, self.config(*options, toy=toy), ["--module", "fake", *options])

    @property
    def latest(self) -> Path:
        return Path("output/fake/latest")

    @property
    def summary(self) -> dict[str, Any]:
        return read_summary(self.latest)


def read_summary(path: Path) -> dict[str, Any]:
    return json.loads((path / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture
def lesson(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Lesson]:
    fake = Lesson()
    code = types.ModuleType("fake_lesson")
    code.argument_classes = lambda: (RunArguments, FakeArguments)  # type: ignore[attr-defined]
    code.house_defaults = lambda explicit: {}  # type: ignore[attr-defined]
    code.check = lambda config: []  # type: ignore[attr-defined]
    code.only_asks = lambda config: config.values["asks"]  # type: ignore[attr-defined]
    code.run = lambda config, run: fake.work(config, run)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_lesson", code)
    monkeypatch.setattr(registry, "MODULES", (fake.module,))
    monkeypatch.setattr(environment, "device_name", lambda use_cpu=False: "cpu")
    recipe = tmp_path / "toy.yaml"
    recipe.write_text("seed: 7\n")
    shipped = resources.path
    monkeypatch.setattr(resources, "path", lambda name: recipe if name == "recipes/fake/toy.yaml" else shipped(name))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield fake


def check(kind: str, passed: bool | None) -> Check:
    return Check("fake.check", kind, passed, 0.5, "more", "为什么", "because")  # type: ignore[arg-type]


def adds(*checks: Check) -> Work:
    return lambda config, run: run.checks.extend(checks)


def raises(error: BaseException) -> Work:
    def work(config: Config, run: RunDirectory) -> None:
        raise error

    return work


# ---------------------------------------------------------------- status and exit code


def test_a_run_that_comes_to_its_end_is_ok(lesson: Lesson, capsys: pytest.CaptureFixture[str]) -> None:
    assert lesson.execute(adds(check("invariant", True), check("learning", True), check("learning", None))) == 0
    summary = lesson.summary
    assert (summary["status"], summary["error"]) == ("ok", None)
    assert [c["status"] for c in summary["checks"]] == ["pass", "pass", "skip"]
    out, err = capsys.readouterr()
    assert "ok:" in out and not err


@pytest.mark.parametrize(
    ("kind", "passed", "toy", "check_status", "status", "code"),
    [
        ("invariant", False, True, "fail", "failed", 1),
        ("invariant", False, False, "fail", "failed", 1),
        ("learning", False, True, "fail", "failed", 1),
        ("learning", False, False, "warn", "ok", 0),
        ("invariant", None, True, "skip", "ok", 0),
        ("learning", None, True, "skip", "ok", 0),
        ("learning", True, False, "pass", "ok", 0),
    ],
)
def test_a_failed_check_fails_the_run_unless_it_is_learning_on_a_users_data(
    lesson: Lesson, kind: str, passed: bool | None, toy: bool, check_status: str, status: str, code: int
) -> None:
    assert lesson.execute(adds(check(kind, passed)), toy=toy) == code
    assert lesson.summary["checks"][0]["status"] == check_status
    assert lesson.summary["status"] == status
    assert lesson.summary["toy"] is toy


def test_a_failed_check_is_named_and_explained(lesson: Lesson, capsys: pytest.CaptureFixture[str]) -> None:
    lesson.execute(adds(check("invariant", True), check("invariant", False)))
    assert lesson.summary["error"] == "checks failed: fake.check"
    out, err = capsys.readouterr()
    assert "FAIL" in out and "expected more" in out and "because" in out
    assert "checks failed: fake.check" in err


def test_a_warning_is_explained_too(lesson: Lesson, capsys: pytest.CaptureFixture[str]) -> None:
    lesson.execute(adds(check("learning", False)))
    out, err = capsys.readouterr()
    assert "warn" in out and "expected more" in out and not err


class Precise(UserError):
    exit_code = 3


@pytest.mark.parametrize(
    ("error", "status", "code", "message"),
    [
        (UserError("mend this"), "failed", 1, "mend this"),
        (Precise("mend that"), "failed", 3, "mend that"),
        (ConfigError(["wrong"]), "failed", 2, "wrong"),
        (Diverged("loss is nan"), "diverged", 1, "loss is nan"),
        (KeyboardInterrupt(), "interrupted", 130, "stopped by the user"),
        (ZeroDivisionError("by zero"), "failed", 1, "ZeroDivisionError: by zero"),
        (MemoryError("no more"), "failed", 1, "MemoryError"),
    ],
)
def test_what_ends_a_run_early_is_told_in_status_and_exit_code(
    lesson: Lesson, error: BaseException, status: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lesson.execute(raises(error)) == code
    assert lesson.summary["status"] == status
    assert message in lesson.summary["error"]
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_an_unexpected_error_leaves_its_traceback_in_a_file(lesson: Lesson, capsys: pytest.CaptureFixture[str]) -> None:
    lesson.execute(raises(ZeroDivisionError("by zero")))
    text = (lesson.latest / "traceback.txt").read_text()
    assert "Traceback" in text and "ZeroDivisionError: by zero" in text
    assert "traceback.txt" in lesson.summary["artifacts"]
    assert "traceback.txt" in capsys.readouterr().err


@pytest.mark.parametrize("error", [UserError("x"), Diverged("x"), KeyboardInterrupt()])
def test_an_expected_end_leaves_no_traceback(lesson: Lesson, error: BaseException) -> None:
    lesson.execute(raises(error))
    assert not (lesson.latest / "traceback.txt").exists()


def test_what_was_found_before_the_end_is_kept(lesson: Lesson) -> None:
    def work(config: Config, run: RunDirectory) -> None:
        run.checks.append(check("invariant", True))
        run.log({"step": 1, "loss": 2.0})
        run.summary["samples"] = [{"prompt": "p", "reference": None, "before": "b", "after": "a"}]
        raise Diverged("loss is nan")

    lesson.execute(work)
    summary = lesson.summary
    assert summary["checks"][0]["status"] == "pass"
    assert summary["metrics"]["loss"]["last"] == 2.0
    assert summary["samples"][0]["before"] == "b"


def test_the_status_is_interrupted_while_the_run_goes_on(lesson: Lesson) -> None:
    seen: list[dict[str, Any]] = []
    lesson.execute(lambda config, run: seen.append(read_summary(run.path)))
    assert seen[0]["status"] == "interrupted" and "not come to its end" in seen[0]["error"]


def test_a_run_that_is_killed_stays_interrupted(lesson: Lesson) -> None:
    with pytest.raises(SystemExit):
        lesson.execute(raises(SystemExit(0)))
    assert lesson.summary["status"] == "interrupted"


@pytest.mark.parametrize(
    ("work", "code"),
    [(None, 1), (Precise("mend that"), 3), (KeyboardInterrupt(), 130)],
    ids=["ok", "failed", "stopped"],
)
def test_a_summary_that_cannot_be_written_fails_the_run_without_hiding_how_it_ended(
    lesson: Lesson, monkeypatch: pytest.MonkeyPatch, work: BaseException | None, code: int
) -> None:
    def fills_the_disk(config: Config, run: RunDirectory) -> None:
        monkeypatch.setattr(run, "write_summary", lambda *args: raises(OSError(28, "No space left"))(config, run))
        if work:
            raise work

    assert lesson.execute(fills_the_disk) == code


def test_a_stop_while_the_summary_is_written_waits(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops_late(config: Config, run: RunDirectory) -> None:
        write = run.write_summary
        monkeypatch.setattr(run, "write_summary", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or write(*args))

    try:
        code = lesson.execute(stops_late)
    except KeyboardInterrupt:  # which would end all tests
        code = None
    assert (code, lesson.summary["status"]) == (0, "ok")


def test_the_resolved_config_is_written_before_the_work_begins(lesson: Lesson) -> None:
    seen: list[str] = []
    lesson.execute(lambda config, run: seen.append((run.path / "resolved_config.yaml").read_text()), "--seed", "9")
    assert yaml.safe_load(seen[0])["seed"] == 9
    assert seen[0] == (lesson.latest / "resolved_config.yaml").read_text()


def test_the_run_works_in_its_own_directory(lesson: Lesson) -> None:
    seen: list[str] = []
    lesson.execute(lambda config, run: seen.extend([config.part(FakeArguments).output_dir, str(run.path)]))
    assert seen[0] == seen[1] and Path(seen[0]).resolve() == lesson.latest.resolve()


def test_a_run_that_begins_with_the_latest_one_reads_that_one_and_not_itself(lesson: Lesson) -> None:
    lesson.execute(lambda config, run: run.write("weights", "trained"))
    first = lesson.latest.resolve().name
    seen: list[Any] = []

    def work(config: Config, run: RunDirectory) -> None:
        part = config.part(FakeArguments)
        seen.extend([part.model, part.rewards, (Path(str(part.model)) / "weights").read_text()])

    assert (
        lesson.execute(work, "--model", "output/fake/latest", "--rewards", "latest", "output/fake/latest/weights") == 0
    )
    assert seen == [f"output/fake/{first}", ["latest", f"output/fake/{first}/weights"], "trained"]
    resolved = yaml.safe_load((lesson.latest / "resolved_config.yaml").read_text())
    assert resolved["model"] == f"output/fake/{first}" and lesson.latest.resolve().name != first


def test_a_run_that_only_asks_leaves_latest_to_the_training_run(lesson: Lesson) -> None:
    lesson.execute()
    trained = lesson.latest.resolve()
    assert lesson.execute(None, "--asks", "true") == 0
    assert lesson.latest.resolve() == trained
    asked = list(Path("output/fake/asked").glob("*/summary.json"))
    assert len(asked) == 1 and read_summary(asked[0].parent)["status"] == "ok"
    assert len(list(Path("output/fake").glob("*/summary.json"))) == 2, "the run, and `latest`"


def test_a_module_that_fills_a_block_wrongly_does_not_end_as_ok(lesson: Lesson) -> None:
    def work(config: Config, run: RunDirectory) -> None:
        run.summary["eval"] = {"accuracy": 1.0}

    try:
        code = lesson.execute(work)
    except jsonschema.ValidationError:
        code = 1
    assert code != 0 and lesson.summary["status"] != "ok"


# ---------------------------------------------------------------- the summary


def test_the_summary_has_every_key_and_keeps_unknown_blocks_null(lesson: Lesson) -> None:
    lesson.execute(toy=True)
    summary = lesson.summary
    assert set(summary) == set(SCHEMA["required"]) == set(SCHEMA["properties"]) - {"comparison"}  # of `vlm` alone
    assert (summary["data"], summary["model"], summary["eval"], summary["resumed_from"]) == (None,) * 4
    assert (summary["schema_version"], summary["module"], summary["seed"]) == (1, "fake", 7)
    assert summary["run_id"] == lesson.latest.resolve().name
    assert summary["wall_seconds"] > 0 and summary["peak_rss_mb"] > 1
    assert summary["metrics"] == {} and summary["samples"] == []


def test_peak_memory_is_that_of_the_run_not_of_the_process_that_started_it() -> None:
    run = "from llmcore_hf.run_dir import peak_rss_mb; own = b'x' * 50_000_000; print(peak_rss_mb())"
    parent = f"import subprocess, sys; fat = b'x' * 400_000_000; subprocess.run([sys.executable, '-c', {run!r}])"
    done = subprocess.run([sys.executable, "-c", parent], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert 50 < float(done.stdout) < 250


def test_the_environment_is_described(lesson: Lesson) -> None:
    lesson.execute()
    env = lesson.summary["env"]
    assert env["versions"]["python"].startswith("3.") and env["versions"]["torch"] and env["versions"]["trl"]
    assert env["versions"]["llmcore_hf"]
    assert (env["device"], env["dtype"], env["world_size"], env["distributed"]) == ("cpu", "float32", 1, "none")


def test_artifacts_are_the_files_in_the_directory(lesson: Lesson) -> None:
    lesson.execute(lambda config, run: run.write("training_curves.png", b"png"))
    listed = lesson.summary["artifacts"]
    assert listed == sorted(listed) == sorted(p.name for p in lesson.latest.iterdir())
    assert {"summary.json", "resolved_config.yaml", "training_curves.png"} <= set(listed)


@pytest.mark.parametrize(
    "form", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"], ["--hub-token", "hf_secret"]]
)
def test_the_hub_token_is_in_no_file_and_not_on_the_screen(
    lesson: Lesson, form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lesson.execute(None, *form, "--seed", "3")
    assert "hf_secret" not in "".join(p.read_text() for p in lesson.latest.iterdir())
    assert "***" in lesson.summary["command"] and "--seed 3" in lesson.summary["command"]
    assert "hf_secret" not in "".join(capsys.readouterr())


def test_the_command_can_be_pasted(lesson: Lesson) -> None:
    lesson.execute(None, "--output_dir", "a b", "--seed", "1")
    assert read_summary(Path("a b"))["command"].endswith("--module fake --output_dir 'a b' --seed 1")


FULL: dict[str, Any] = {
    "schema_version": 1,
    "run_id": "r",
    "module": "fake",
    "status": "ok",
    "error": None,
    "toy": True,
    "command": "run.py",
    "seed": 1,
    "started_at": "2026-01-01T00:00:00+00:00",
    "wall_seconds": 1.0,
    "peak_rss_mb": 1.0,
    "resumed_from": None,
    "env": {
        "versions": {"torch": "2", "deepspeed": None},
        "platform": "p",
        "device": "cpu",
        "dtype": "float32",
        "world_size": 1,
        "distributed": "none",
        "git_commit": None,
    },
    "data": {
        "source": "toy",
        "format": "text",
        "n_train": 1,
        "n_eval": 1,
        "n_dropped": 0,
        "problems": {"duplicate": 2},
        "on_bad_rows": "keep",
        "fingerprint": "f",
        "truncated_fraction": 0.0,
        "trained_token_fraction": None,
    },
    "model": {
        "name_or_path": "m",
        "n_params": 1,
        "n_trainable": 1,
        "peft": None,
        "pad_token": "p",
        "eos_token": "e",
        "pad_is_eos": False,
    },
    "metrics": {"loss": {"first": 1.0, "last": 0.5, "best": 0.5, "best_step": 2, "higher_is_better": False}},
    "eval": {"before": {"a": 0.0}, "after": {"a": 1.0}, "delta": {"a": 1.0}, "ci95": {"a": [0.5, 1.0]}, "n": {"a": 3}},
    "checks": [check("invariant", True).as_dict(True)],
    "samples": [{"prompt": "p", "reference": None, "before": "b", "after": "a"}],
    "artifacts": ["summary.json"],
}


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all keys of all mappings in `FULL` that the schema asks for."""
    if path == ("data", "problems"):  # counts by kind: no kind is required
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if path[:1] not in (("metrics",), ("eval",)) or key in (*SCHEMA["properties"]["eval"]["required"], "best"):
                yield (*path, key)
            if key != "versions":
                yield from places(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from places(item, (*path, i))


def changed(path: tuple, change: Callable[[Any, Any], None]) -> dict[str, Any]:
    copy = json.loads(json.dumps(FULL))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return copy


def test_a_full_summary_is_valid() -> None:
    for summary in (FULL, FULL | dict.fromkeys(("data", "model", "eval"))):
        validate_summary(summary)
        assert not list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(summary))


def test_the_schema_itself_is_a_valid_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", list(places(FULL)), ids=lambda path: ".".join(map(str, path)))
def test_no_required_key_may_be_missing(path: tuple) -> None:
    with pytest.raises(jsonschema.ValidationError, match=f"'{path[-1]}' is a required property"):
        validate_summary(changed(path, lambda inner, key: inner.pop(key)))


WRONG = {
    ("schema_version",): 2,
    ("run_id",): "",
    ("status",): "done",
    ("error",): 1,
    ("toy",): "yes",
    ("seed",): None,
    ("wall_seconds",): None,
    ("resumed_from",): False,
    ("env", "world_size"): 0,
    ("env", "distributed"): "horovod",
    ("data", "n_train"): 0,
    ("data", "truncated_fraction"): 1.5,
    ("model", "n_params"): None,
    ("metrics", "loss"): 0.5,
    ("metrics", "loss", "best"): "0.5",
    ("eval", "before"): {"a": "x"},
    ("eval", "ci95"): {"a": [0.5]},
    ("eval", "n"): {"a": 0},
    ("checks", 0, "status"): "ok",
    ("checks", 0, "kind"): "other",
    ("checks", 0, "why_zh"): "",
    ("checks", 0, "why_en"): "",
    ("samples", 0, "after"): None,
    ("artifacts",): [1],
}


@pytest.mark.parametrize("path", WRONG, ids=lambda path: ".".join(map(str, path)))
def test_no_value_may_have_the_wrong_type(path: tuple) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_summary(changed(path, lambda inner, key: inner.__setitem__(key, WRONG[path])))


@pytest.mark.parametrize("path", [("extra",), ("eval", "extra"), ("checks", 0, "extra"), ("metrics", "loss", "extra")])
def test_no_unknown_key_is_accepted(path: tuple) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_summary(changed(path, lambda inner, key: inner.__setitem__(key, 1)))


def test_a_summary_that_breaks_the_schema_is_not_written(lesson: Lesson) -> None:
    def work(config: Config, run: RunDirectory) -> None:
        before = (run.path / "summary.json").read_text()
        run.summary["data"] = {"source": "incomplete"}
        with pytest.raises(jsonschema.ValidationError):
            run.write_summary("ok", None)
        assert (run.path / "summary.json").read_text() == before
        del run.summary["data"]

    assert lesson.execute(work) == 0


# ---------------------------------------------------------------- no NaN


def test_nan_and_infinity_become_null_at_any_depth() -> None:
    nan, inf = float("nan"), float("inf")
    given_value = {"a": nan, "b": [1, inf, {"c": -inf}], "d": (0.0, nan), "e": np.float64("nan"), "f": "nan"}
    expected = {"a": None, "b": [1, None, {"c": None}], "d": [0.0, None], "e": None, "f": "nan"}
    assert finite(given_value) == expected


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values)
def test_whatever_is_made_finite_can_be_written_as_json(value: Any) -> None:
    assert json.dumps(finite(value), allow_nan=False)  # raises where a NaN is left


def test_a_nan_never_reaches_the_files(lesson: Lesson) -> None:
    def work(config: Config, run: RunDirectory) -> None:
        run.log({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
        run.checks.append(dataclasses.replace(check("learning", False), observed={"x": float("nan")}))

    lesson.execute(work)
    for name in ("summary.json", "log_history.jsonl"):
        text = (lesson.latest / name).read_text()
        assert "NaN" not in text and "Infinity" not in text and "null" in text
    assert lesson.summary["checks"][0]["observed"] == {"x": None}
    assert json.loads((lesson.latest / "log_history.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": None}


# ---------------------------------------------------------------- log history and metrics


def test_rows_are_appended_at_once(lesson: Lesson) -> None:
    counts: list[int] = []

    def work(config: Config, run: RunDirectory) -> None:
        for step in range(3):
            run.log({"step": step, "loss": 1.0})
            counts.append(len((run.path / "log_history.jsonl").read_text().splitlines()))

    lesson.execute(work)
    assert counts == [1, 2, 3]


def test_metrics_have_first_last_and_best() -> None:
    history = [
        {"step": 0, "eval_loss": 3.0, "eval_runtime": 9.0},
        {"step": 1, "loss": 2.0, "rewards/accuracies": 0.5, "learning_rate": 0.1, "odd": 1.0},
        {"step": 2, "loss": 1.0, "rewards/accuracies": 0.9, "learning_rate": 0.1, "odd": 3.0},
        {"step": 3, "loss": 1.5, "rewards/accuracies": 0.7, "learning_rate": 0.1, "odd": 2.0, "text": "x"},
        {"step": 3, "train_runtime": 1.0, "train_loss": 1.5, "train_samples_per_second": 2.0, "total_flos": 1.0},
    ]
    metrics = summarize(history)
    assert metrics["loss"] == {"first": 2.0, "last": 1.5, "best": 1.0, "best_step": 2, "higher_is_better": False}
    assert metrics["rewards/accuracies"]["best"] == 0.9 and metrics["rewards/accuracies"]["best_step"] == 2
    assert metrics["eval_loss"]["higher_is_better"] is False and metrics["eval_loss"]["first"] == 3.0
    # of a metric without a known direction nobody can say which value is best
    assert metrics["odd"] == {"first": 1.0, "last": 2.0, "best": None, "best_step": None, "higher_is_better": None}
    assert set(metrics) == {"loss", "rewards/accuracies", "eval_loss", "odd"}


def test_unknown_values_are_passed_over_in_the_metrics() -> None:
    history = [{"step": 1, "loss": None}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": None}]
    assert summarize(history)["loss"] == {
        **{"first": 1.0, "last": 1.0, "best": 1.0, "best_step": 2},
        "higher_is_better": False,
    }
    assert summarize([{"step": 1, "loss": None}]) == {}


# ---------------------------------------------------------------- the directory


def test_each_run_gets_a_directory_of_its_own_and_latest_points_to_the_newest(lesson: Lesson) -> None:
    lesson.execute()
    first = lesson.latest.resolve()
    lesson.execute()
    second = lesson.latest.resolve()
    assert first != second and first.parent == second.parent == Path("output/fake").resolve()
    assert lesson.latest.is_symlink() and not Path(os.readlink(lesson.latest)).is_absolute()
    assert (first / "summary.json").exists() and (second / "summary.json").exists()
    assert {p.name for p in Path("output/fake").iterdir()} == {first.name, second.name, "latest"}


def test_latest_still_points_to_the_run_when_the_folder_is_moved(lesson: Lesson) -> None:
    lesson.execute()
    Path("output").rename("elsewhere")
    assert Path("elsewhere/fake/latest/summary.json").exists()


def test_latest_points_to_a_failed_run_too(lesson: Lesson) -> None:
    lesson.execute()
    lesson.execute(raises(UserError("x")))
    assert lesson.summary["status"] == "failed"


def test_an_explicit_directory_is_used_as_it_is(lesson: Lesson) -> None:
    assert lesson.execute(None, "--output_dir", "deep/er") == 0
    assert read_summary(Path("deep/er"))["run_id"] == "er"
    assert not Path("output").exists()


def test_an_empty_directory_is_fine(lesson: Lesson) -> None:
    Path("out").mkdir()
    assert lesson.execute(None, "--output_dir", "out") == 0


def test_home_is_expanded_in_an_explicit_directory(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    lesson.execute(None, "--output_dir", "~/run")
    assert Path("home/run/summary.json").exists() and not Path("~").exists()


def test_a_directory_that_is_not_empty_is_refused_with_the_ways_out(lesson: Lesson) -> None:
    lesson.execute(None, "--output_dir", "out")
    before = {p: p.read_bytes() for p in Path("out").iterdir()}
    ran: list[int] = []
    with pytest.raises(ConfigError) as caught:
        lesson.execute(lambda config, run: ran.append(1), "--output_dir", "out")
    message = str(caught.value)
    assert all(way in message for way in ("another name", "--overwrite_output_dir"))
    assert "--resume_from_checkpoint" not in message, "there is nothing to resume"
    assert not ran and {p: p.read_bytes() for p in Path("out").iterdir()} == before


def test_a_new_run_in_a_directory_with_a_checkpoint_is_told_how_to_continue(lesson: Lesson) -> None:
    lesson.execute(None, "--output_dir", "out")
    checkpoint(Path("out"))
    with pytest.raises(ConfigError) as caught:
        lesson.execute(None, "--output_dir", "out")
    command = re.search(r"`(.*)`", str(caught.value))
    assert command
    assert shlex.split(command.group(1))[-6:] == [
        *("--config", "out/resolved_config.yaml", "--output_dir", "out", "--resume_from_checkpoint", "last")
    ]


def test_overwrite_replaces_an_earlier_run_completely(lesson: Lesson) -> None:
    lesson.execute(lambda config, run: run.write("old.txt", "old"), "--output_dir", "out")
    assert lesson.execute(lambda config, run: None, "--output_dir", "out", "--overwrite_output_dir") == 0
    assert not Path("out/old.txt").exists() and Path("out/summary.json").exists()


def test_overwrite_deletes_nothing_but_run_directories(lesson: Lesson) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter1.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="was not made by a run"):
        lesson.execute(None, "--output_dir", "thesis", "--overwrite_output_dir")
    assert Path("thesis/chapter1.tex").read_text() == "years of work"


def test_overwrite_spares_a_folder_into_which_a_resolved_config_was_copied(lesson: Lesson) -> None:
    lesson.execute()
    Path("project").mkdir()
    Path("project/thesis.tex").write_text("years of work")
    Path("project/resolved_config.yaml").write_bytes((lesson.latest / "resolved_config.yaml").read_bytes())
    with pytest.raises(ConfigError):
        lesson.execute(None, "--output_dir", "project", "--overwrite_output_dir")
    assert Path("project/thesis.tex").exists()


def test_overwrite_of_an_empty_or_missing_directory_is_no_problem(lesson: Lesson) -> None:
    Path("empty").mkdir()
    assert lesson.execute(None, "--output_dir", "empty", "--overwrite_output_dir") == 0
    assert lesson.execute(None, "--output_dir", "missing", "--overwrite_output_dir") == 0


def test_an_output_directory_that_is_a_file_is_refused(lesson: Lesson) -> None:
    Path("out").write_text("a file")
    for extra in ([], ["--overwrite_output_dir"]):
        with pytest.raises(ConfigError, match="is a file"):
            lesson.execute(None, "--output_dir", "out", *extra)
    assert Path("out").read_text() == "a file"


def test_an_output_directory_below_a_file_is_refused(lesson: Lesson) -> None:
    Path("file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        lesson.execute(None, "--output_dir", "file/out")


def checkpoint(run: Path) -> None:
    (run / "checkpoint-5").mkdir(parents=True)
    (run / "checkpoint-5" / "trainer_state.json").write_text('{"global_step": 5}')
    mark_complete(run / "checkpoint-5", 5)


def test_resuming_continues_in_the_directory_that_is_named(lesson: Lesson) -> None:
    def fails(config: Config, run: RunDirectory) -> None:
        run.write("kept.txt", "kept")
        raise ZeroDivisionError

    seen: list[dict[str, Any]] = []
    assert lesson.execute(fails, "--output_dir", "out") == 1
    checkpoint(Path("out"))
    goes_on = ("--output_dir", "out", "--resume_from_checkpoint", "last")
    assert lesson.execute(lambda config, run: seen.append(read_summary(run.path)), *goes_on) == 0
    assert Path("out/kept.txt").exists() and not Path("out/traceback.txt").exists()
    assert seen[0]["error"].endswith("--output_dir out --resume_from_checkpoint last"), "killed again, it goes on again"


def test_resuming_without_a_directory_continues_the_latest_run(lesson: Lesson) -> None:
    lesson.execute()
    checkpoint(lesson.latest)
    path = prepare_directory(lesson.module, lesson.config("--resume_from_checkpoint", "last"))
    assert path == lesson.latest.resolve()


def test_resuming_from_a_checkpoint_continues_in_its_run(lesson: Lesson) -> None:
    checkpoint(Path("somewhere"))
    path = prepare_directory(lesson.module, lesson.config("--resume_from_checkpoint", "somewhere/checkpoint-5"))
    assert path == Path("somewhere").resolve()


def test_resuming_what_does_not_exist_is_refused(lesson: Lesson) -> None:
    with pytest.raises(ConfigError, match="no such checkpoint"):
        lesson.execute(None, "--resume_from_checkpoint", "nothing/checkpoint-5")
    assert not Path("output").exists()


# ---------------------------------------------------------------- whole or not at all


def bare_run(path: Path) -> RunDirectory:
    arguments = Config("fake", False, {"seed": 1}, {}, parts=())
    return RunDirectory(path, Module("fake", 1, 1, "假", "Fake", "fake_lesson"), arguments, [])


def test_a_write_leaves_no_scratch_file(tmp_path: Path) -> None:
    run = bare_run(tmp_path)
    run.write("a.txt", "排序")
    run.write("a.txt", b"bytes")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b"bytes"


# ---------------------------------------------------------------- only the main process writes and prints


def test_another_process_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    run = bare_run(tmp_path)
    run.write("a.txt", "x")
    run.log({"step": 1, "loss": 1.0})
    run.write_summary("ok", None)
    assert not list(tmp_path.iterdir())
    assert run.history == [{"step": 1, "loss": 1.0}]


def heard(links: dict[str, Any], path: Any) -> Callable[[Any], Any]:
    """What another process hears: first which options led through `latest`, then where the run is."""
    return lambda value: links if isinstance(value, dict) else path


def test_another_process_begins_with_the_model_that_the_main_one_found(
    lesson: Lesson, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("main").mkdir()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "broadcast", heard({"model": "output/fake/first"}, Path("main")))
    seen: list[Any] = []
    lesson.execute(lambda config, run: seen.append(config.part(FakeArguments).model), "--model", "output/fake/latest")
    assert seen == ["output/fake/first"]


@pytest.mark.parametrize("error", [None, UserError("x"), Diverged("x"), KeyboardInterrupt()])
def test_another_process_works_in_the_main_ones_directory_and_is_silent(
    lesson: Lesson, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: BaseException | None
) -> None:
    Path("main").mkdir()
    monkeypatch.setenv("RANK", "1")
    sent: list[Any] = []
    monkeypatch.setattr(distributed, "broadcast", lambda value: sent.append(value) or heard({}, Path("main"))(value))
    seen: list[Path] = []

    def work(config: Config, run: RunDirectory) -> None:
        seen.append(run.path)
        run.log({"step": 1, "loss": 1.0})
        if error:
            raise error

    lesson.execute(work)
    assert sent == [{}, None] and seen == [Path("main")]
    assert not list(Path("main").iterdir()) and not Path("output").exists()
    assert capfd.readouterr() == ("", "")


def test_the_exit_code_is_the_same_in_every_process(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("main").mkdir()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "broadcast", heard({}, Path("main")))
    assert lesson.execute(adds(check("invariant", False))) == 1
    assert lesson.execute(raises(UserError("x"))) == 1
    assert lesson.execute(raises(KeyboardInterrupt())) == 130


def test_an_unexpected_error_in_another_process_is_not_lost(
    lesson: Lesson, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The main process cannot know it, so its traceback goes to stderr."""
    Path("main").mkdir()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "broadcast", heard({}, Path("main")))
    assert lesson.execute(raises(ZeroDivisionError("by zero"))) == 1
    assert "ZeroDivisionError: by zero" in capsys.readouterr().err


def test_a_directory_the_main_process_refuses_stops_every_process(
    lesson: Lesson, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "broadcast", heard({}, ConfigError(["--output_dir is not empty"])))
    with pytest.raises(ConfigError, match="not empty"):
        lesson.execute()


# ---------------------------------------------------------------- the report


def test_the_report_shows_before_after_and_interval(lesson: Lesson, capsys: pytest.CaptureFixture[str]) -> None:
    def work(config: Config, run: RunDirectory) -> None:
        run.summary["eval"] = {
            "before": {"exact_match": 0.05, "perplexity": 9.0},
            "after": {"exact_match": 0.91, "perplexity": None},
            "delta": {"exact_match": 0.86, "perplexity": None},
            "ci95": {"exact_match": [0.8, 0.9]},
            "n": {"exact_match": 400, "perplexity": 400},
        }
        run.write("training_curves.png", b"png")

    assert lesson.execute(work) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "exact_match" in line)
    assert all(word in row for word in ("0.050", "0.910", "+0.860", "[+0.800, +0.900]", "400"))
    assert "summary.json" in out and "training_curves.png" in out
