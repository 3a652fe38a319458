"""Problems that no single row shows, and rows set aside by prompt, so that no held-out prompt is trained on."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import (
    GOOD,
    Row,
    assistant,
    good_rows,
    loaded_rows,
    problems_of,
    read,
    refusal,
    system,
    user,
    write_jsonl,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llmcore_hf.alignment import dpo, sft, training
from llmcore_hf.data import preparing
from llmcore_hf.data.auditing import ASKING_ROWS

PAIR, CHAT, TRIPLE, TEXT = "TRL prompt-completion", "OpenAI messages", "TRL preference", "TRL language modeling"
bounded = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ask(prompt: str, answer: str = "a") -> Row:
    return {"prompt": prompt, "completion": answer}


# --- duplicates ---------------------------------------------------------------------------------------------------


def test_a_duplicate_is_the_same_row_word_by_word(tmp_path: Path) -> None:
    rows = [ask("a"), ask("b"), ask("a", "other"), ask("a"), {**ask("b"), "id": 7}, ask("A"), ask("a")]
    _, found = problems_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [(p["line"], p["text"], p["remedy"]) for p in found] == [
        (4, "is the same as line 1", "remove one of them"),
        (5, "is the same as line 2", "remove one of them"),
        (7, "is the same as line 1", "remove one of them"),
    ]


def test_the_order_of_keys_makes_no_difference_and_a_role_does() -> None:
    one, other = {"role": "user", "content": "x"}, {"content": "x", "role": "user"}
    assert preparing._hash([one]) == preparing._hash([other])
    assert preparing._hash([one]) != preparing._hash([{**one, "role": "tool"}])
    assert preparing._hash("[]") != preparing._hash([])


def test_rows_with_problems_are_not_compared(tmp_path: Path) -> None:
    rows = [ask("a"), ask("b"), {"prompt": "c"}, {"prompt": "c"}, {"prompt": 3, "completion": "a"}]
    _, found = problems_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert {p["kind"] for p in found} == {"missing", "type"}


# --- leaks --------------------------------------------------------------------------------------------------------

LEAKS: dict[str, tuple[Row, Row, bool]] = {
    "another answer": (ask("x", "1"), ask("x", "2"), True),
    "another prompt": (ask("x"), ask("x "), False),
    "first question of a conversation": (
        {"messages": [user("x"), assistant("1"), user("y"), assistant("2")]},
        {"messages": [user("x"), assistant("3")]},
        True,
    ),
    "later question of a conversation": (
        {"messages": [user("x"), assistant("1")]},
        {"messages": [user("y"), assistant("1"), user("x"), assistant("1")]},
        False,
    ),
    "another system prompt": (
        {"messages": [system("s"), user("x"), assistant("1")]},
        {"messages": [user("x"), assistant("1")]},
        False,
    ),
    "the same text": ({"text": "x"}, {"text": "x"}, True),
}


@pytest.mark.parametrize("name", LEAKS)
@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_training_prompt_in_a_held_out_split_is_named(tmp_path: Path, name: str, split: str) -> None:
    trained, held_out, leaks = LEAKS[name]
    fmt = CHAT if "messages" in trained else TEXT if "text" in trained else PAIR
    write_jsonl(tmp_path / "data" / "train.jsonl", [GOOD[fmt](1), trained, GOOD[fmt](2)])
    write_jsonl(tmp_path / "data" / f"{split}.jsonl", [GOOD[fmt](0), held_out])
    if not leaks:
        assert not read(tmp_path / "data").report.total
        return
    _, (found,) = problems_of(tmp_path / "data")
    assert (found["kind"], found["split"], found["line"]) == ("leak", "train", 2)
    held_out_place = tmp_path / "data" / f"{split}.jsonl"
    assert f"{held_out_place}, line 2 of the held-out split `{split}`" in found["text"]
    dropped = read(tmp_path / "data", on_bad_rows="drop")
    assert len(dropped.train) == (2 if split == "test" else 1)  # without a test split, one more is set aside
    assert dropped.report.rows_dropped == 1


def test_a_prompt_may_stand_in_test_and_validation(tmp_path: Path) -> None:
    for split, i in (("train", 1), ("validation", 2), ("test", 2)):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", [GOOD[PAIR](i)])
    assert not read(tmp_path / "data").report.total


def test_a_held_out_row_with_a_problem_is_no_leak(tmp_path: Path) -> None:
    swapped = {**GOOD[TRIPLE](1), "score_chosen": 1, "score_rejected": 2}
    write_jsonl(tmp_path / "data" / "train.jsonl", good_rows(TRIPLE, 3))
    write_jsonl(tmp_path / "data" / "test.jsonl", [GOOD[TRIPLE](5), swapped])
    _, found = problems_of(tmp_path / "data", "preference")
    assert [(p["kind"], p["split"]) for p in found] == [("swapped", "test")]
    kept = read(tmp_path / "data", "preference", on_bad_rows="keep")  # evaluated after all
    assert kept.report.counts == {"swapped": 1, "leak": 1}


# --- rows set aside -----------------------------------------------------------------------------------------------


@bounded
@given(
    prompts=st.lists(st.integers(0, 12), min_size=2, max_size=40).filter(lambda found: len(set(found)) > 2),
    seed=st.integers(0, 5),
    share=st.floats(0.01, 0.99),
    chooses_best=st.booleans(),
)
def test_rows_with_the_same_prompt_never_land_on_two_sides(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[int], seed: int, share: float, chooses_best: bool
) -> None:
    rows = [ask(f"q{prompt}", f"a{i}") for i, prompt in enumerate(prompts)]
    path = write_jsonl(tmp_path_factory.mktemp("aside") / "rows.jsonl", rows)
    try:
        found = read(path, seed=seed, test_split_size=share, chooses_best=chooses_best)
    except Exception as error:
        assert chooses_best and "different prompt(s)" in str(error)  # one prompt is left to train on: nothing to spare
        return
    sides = [found.train, found.test, *([found.validation] if chooses_best else [])]
    asked = [{row["prompt"] for row in side} for side in sides]
    assert all(asked) and sum(map(len, asked)) == len(set.union(*asked))
    answers = [row["completion"] for side in sides for row in side]
    assert sorted(answers) == sorted(row["completion"] for row in rows)


def test_one_prompt_cannot_be_divided(tmp_path: Path) -> None:
    message = refusal(write_jsonl(tmp_path / "rows.jsonl", [ask("q", str(i)) for i in range(5)]))
    assert "5 row(s) with 1 different prompt(s)" in message and "two" in message


# --- swapped columns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "answers_ask", "prompts_ask", "suspected"),
    [
        (ASKING_ROWS, ASKING_ROWS, 0, True),
        (ASKING_ROWS - 1, ASKING_ROWS - 1, 0, False),  # too few to tell
        (20, 10, 0, True),
        (20, 9, 0, False),
        (20, 20, 11, False),
        (20, 0, 20, False),
    ],
)
@pytest.mark.parametrize("mark", ["?", "？ "])
def test_answers_that_ask_are_suspected(
    tmp_path: Path, n: int, answers_ask: int, prompts_ask: int, suspected: bool, mark: str
) -> None:
    rows = [ask(f"q{i}{mark * (i < prompts_ask)}", f"a{i}{mark * (i < answers_ask)}") for i in range(n)]
    chats = [{"messages": [user(row["prompt"]), assistant(row["completion"])]} for row in rows]
    for name, data in (("pairs.jsonl", rows), ("chats.jsonl", chats)):
        path = write_jsonl(tmp_path / name, data)
        if not suspected:
            assert not read(path).report.total
            continue
        message, (found,) = problems_of(path)
        assert (found["kind"], found["row"], found["line"]) == ("swapped", None, None)
        assert "--columns" in message and f"{answers_ask / n:.0%} of the answers" in message
        assert len(loaded_rows(read(path, on_bad_rows="keep"))) == n


def test_rows_that_cannot_be_read_do_not_hide_that_columns_are_swapped(tmp_path: Path) -> None:
    rows = [ask(f"q{i}", f"a{i}?") for i in range(ASKING_ROWS)]
    _, found = problems_of(write_jsonl(tmp_path / "rows.jsonl", [*rows, *[{"prompt": "x"}] * 2 * ASKING_ROWS]))
    assert [p["kind"] for p in found] == ["missing"] * 2 * ASKING_ROWS + ["swapped"]


def test_plain_text_and_preferences_that_ask_are_no_suspects(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"{i}?"} for i in range(20)])
    triples = [{"prompt": f"q{i}", "chosen": "a?", "rejected": "b?"} for i in range(20)]
    assert not read(texts).report.total
    assert not read(write_jsonl(tmp_path / "triples.jsonl", triples), "preference").report.total


# --- prompts that are too long ------------------------------------------------------------------------------------

job_of = cache(training.load_job)
LIMITS: dict[str, Any] = {"sft": sft.prompt_limit_of, "preference": dpo.prompt_limit_of}


@pytest.mark.parametrize("name", ["tiny-qwen", "tiny-gpt2"])
@pytest.mark.parametrize("fmt", [PAIR, CHAT, TRIPLE, "alpaca", "ShareGPT preference"])
def test_a_prompt_without_room_for_an_answer_is_named(tmp_path: Path, name: str, fmt: str) -> None:
    task = "preference" if fmt in (TRIPLE, "ShareGPT preference") else "sft"
    rows = good_rows(fmt, 4)
    rows[2] = json.loads(json.dumps(rows[2]).replace("2", "2 long " * 60))
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    limit = LIMITS[task](job_of(name), 100)
    message, (found,) = problems_of(path, task, limit=limit)
    assert (found["kind"], found["line"]) == ("too_long", 3)
    assert "--max_length 100" in found["text"] and "raise --max_length" in message
    assert len(loaded_rows(read(path, task, limit=limit, on_bad_rows="drop"))) == 3
    assert not read(path, task, limit=LIMITS[task](job_of(name), 10**4)).report.total


def test_a_row_with_another_problem_is_not_measured(tmp_path: Path) -> None:
    long = ask("long " * 60)
    path = write_jsonl(tmp_path / "rows.jsonl", [*good_rows(PAIR, 3), long, long, {"prompt": "long " * 60}])
    _, found = problems_of(path, limit=sft.prompt_limit_of(job_of("tiny-qwen"), 100))
    assert [(p["kind"], p["line"]) for p in found] == [("missing", 6), ("duplicate", 5), ("too_long", 4)]


@pytest.mark.parametrize("max_length", [None, 5])
def test_without_a_limit_the_context_is_one(max_length: int | None) -> None:
    job = job_of("tiny-qwen")
    limit = sft.prompt_limit_of(job, max_length)
    assert limit is not None and limit.max_length == (max_length or job.context)


words = st.text("ab 1排？é\n<|im_end|>😀", max_size=30)
tools = st.sampled_from(
    [None, [{"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "int"}}}}]]
)


@settings(deadline=None, max_examples=150)
@given(
    turns=st.lists(words.filter(str.strip), min_size=1, max_size=6),
    answer=words,
    with_system=st.booleans(),
    tools=tools,
    as_text=st.booleans(),
    name=st.sampled_from(["tiny-qwen", "tiny-gpt2"]),
)
def test_the_cheap_bound_never_misses_a_long_prompt(
    turns: list[str], answer: str, with_system: bool, tools: Any, as_text: bool, name: str
) -> None:
    """Whatever it lets pass without tokenization fits."""
    prompt: Any = turns[0]
    row: Row = {"prompt": prompt, "completion": answer}
    if not as_text:
        prompt = [system("s")] * with_system
        for i, turn in enumerate(turns[: len(turns) - 1 + len(turns) % 2]):
            prompt.append(assistant(turn) if i % 2 else user(turn))
        if prompt[-1]["role"] == "assistant":
            prompt.append(user("more"))
        row = {"prompt": prompt, "completion": [assistant(answer)], **({"tools": tools} if tools else {})}
    known = preparing._known_about(row)
    n_tokens = sft._encode(row, job_of(name)).n_prompt
    assume(n_tokens > 0)  # prompt and answer may begin with one token that spans both
    limit = sft.prompt_limit_of(job_of(name), n_tokens)  # one token less would do
    assert limit is not None and limit.problem(row)
    size, n_turns = (np.array([known[column]]) for column in (preparing.PROMPT_BYTES, preparing.PROMPT_TURNS))
    assert limit.may_be_too_long(size, n_turns)[0]


def test_the_cheap_bound_spares_most_rows_a_tokenization() -> None:
    limit = sft.prompt_limit_of(job_of("tiny-qwen"), 1024)
    assert limit is not None
    assert not limit.may_be_too_long(np.array([500, 900]), np.array([1, 3])).any()
    assert limit.may_be_too_long(np.array([1024, 4000]), np.array([0, 1])).all()
