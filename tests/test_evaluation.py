"""Held-out evaluation against independent computations: by hand in float64, by plain `generate`, by TRL's trainers."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcore_hf.alignment import evaluation
from llmcore_hf.alignment.evaluation import Encoded, encode, generate, likelihoods
from llmcore_hf.data import toy
from llmcore_hf.models import tiny

OFF = {"report_to": "none", "use_cpu": True, "bf16": False, "activation_checkpointing": False, "disable_tqdm": True}
N = 24


pytestmark = pytest.mark.usefixtures("one_thread")


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def folder() -> str:
    return str(tiny.ensure("tiny-qwen-base"))


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[Encoded]:
    """Held-out answers in either order, conversations of other lengths, and a plain text."""
    pairs = toy.questions("test", N)
    sorted_rows = [encode(tokenizer, user(p), assistant(toy.ascending(d))) for p, d in pairs]
    sorted_rows += [encode(tokenizer, user(p), assistant(toy.descending(d))) for p, d in pairs]
    long = [encode(tokenizer, user("Sort: 31 " * k), assistant("把这些数字排好 13 " * (9 - k))) for k in (1, 8, 3)]
    mixed = sorted_rows + long + [encode(tokenizer, "", "Sort: 31"), encode(tokenizer, "2+2=", "4")]
    random.Random(0).shuffle(mixed)
    return mixed


def by_hand(model: Any, row: Encoded) -> float:
    """The definition: the sum of log softmax at the completion's tokens, one row at a time, no padding, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].double()  # (T, V)
    total = 0.0
    for position in range(max(row.n_prompt, 1), len(row.ids)):
        scores = logits[position - 1]
        total += float(scores[row.ids[position]] - torch.log(torch.exp(scores - scores.max()).sum()) - scores.max())
    return total


# --- likelihoods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_likelihoods_equal_the_definition(
    model: Any, rows: list[Encoded], accelerator: Accelerator, batch_size: int
) -> None:
    found = likelihoods(model, rows, 0, batch_size, accelerator)
    assert found.logprobs == pytest.approx([by_hand(model, row) for row in rows], rel=1e-4, abs=1e-4)
    assert found.n_tokens == [len(row.ids) - max(row.n_prompt, 1) for row in rows]


def test_likelihoods_do_not_depend_on_the_order_of_rows(
    model: Any, rows: list[Encoded], accelerator: Accelerator
) -> None:
    forwards = likelihoods(model, rows, 0, 7, accelerator)
    backwards = likelihoods(model, rows[::-1], 0, 7, accelerator)
    assert backwards.logprobs[::-1] == pytest.approx(forwards.logprobs, rel=1e-4, abs=1e-5)
    assert backwards.n_tokens[::-1] == forwards.n_tokens


def test_the_padding_token_does_not_matter(model: Any, rows: list[Encoded], accelerator: Accelerator) -> None:
    with_pad = likelihoods(model, rows, 0, 100, accelerator).logprobs
    with_other = likelihoods(model, rows, 42, 100, accelerator).logprobs
    assert with_other == pytest.approx(with_pad, rel=1e-4, abs=1e-5)


def test_all_completions_of_one_token_share_one_unit_of_probability(model: Any, accelerator: Accelerator) -> None:
    prompt = [5, 6, 7]
    every = [Encoded([*prompt, token], 3) for token in range(model.config.vocab_size)]
    found = likelihoods(model, every, 0, 512, accelerator).logprobs
    assert float(torch.tensor(found).double().exp().sum()) == pytest.approx(1.0, abs=1e-4)


def test_a_cut_off_row_counts_only_what_is_left(model: Any, rows: list[Encoded], accelerator: Accelerator) -> None:
    row = next(row for row in rows if row.n_prompt > 0 and row.n_completion > 3)
    cut = row.truncate(row.n_prompt + 2)
    found = likelihoods(model, [cut], 0, 1, accelerator)
    assert found.n_tokens == [2]
    assert found.logprobs == pytest.approx([by_hand(model, cut)], rel=1e-4)
    assert row.truncate(None) is row
    assert row.truncate(3) == Encoded(row.ids[:3], 3)


def test_dropout_is_off_while_evaluating(rows: list[Encoded], accelerator: Accelerator) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = GPT2LMHeadModel(config).train()
    found = likelihoods(model, rows[:5], 0, 5, accelerator).logprobs
    assert found == pytest.approx([by_hand(model.eval(), row) for row in rows[:5]], rel=1e-4)


# --- generated answers --------------------------------------------------------------------------------------------

PROMPTS = [user(p) for p, _ in toy.questions("test", 10)] + [user("Sort: 9081 " * 6), user("?"), user("排序：31，谢谢")]


def one_by_one(model: Any, tokenizer: Any, prompts: list, n: int) -> list[list[int]]:
    """Ids of the answers, each prompt alone, without padding."""
    found = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=n, do_sample=False)
        found.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_answers_equal_those_of_each_prompt_alone(
    model: Any, tokenizer: Any, accelerator: Accelerator, batch_size: int
) -> None:
    alone = one_by_one(model, tokenizer, PROMPTS, 8)
    found = generate(model, tokenizer, PROMPTS, 8, batch_size, accelerator)
    assert found.texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in alone]
    assert found.n_tokens == [len(ids) for ids in alone]
    assert found.terminated == [ids[-1] == tokenizer.eos_token_id for ids in alone]
    assert any(found.terminated)
    assert len(set(found.texts)) > 5  # different prompts, different answers: the order is tested


def test_absolute_positions_survive_the_padding(rows: list[Encoded], accelerator: Accelerator) -> None:
    """GPT-2 has a vector for each position, counted from the left; rotary positions would not show a shift."""
    folder = tiny.ensure("tiny-gpt2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(20)  # random weights hardly look at positions
    found = likelihoods(model, rows, 0, 100, accelerator).logprobs
    assert found == pytest.approx([by_hand(model, row) for row in rows], rel=1e-4, abs=1e-4)
    answers = generate(model, tokenizer, PROMPTS, 8, 100, accelerator)
    alone = one_by_one(model, tokenizer, PROMPTS, 8)
    assert answers.texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in alone]


def test_an_answer_that_hits_the_limit_has_not_ended(model: Any, tokenizer: Any, accelerator: Accelerator) -> None:
    found = generate(model, tokenizer, PROMPTS[:10], 2, 4, accelerator)
    assert found.terminated == [False] * 10
    assert found.n_tokens == [2] * 10


def test_an_answer_that_ends_exactly_at_the_limit_has_ended(
    model: Any, tokenizer: Any, accelerator: Accelerator
) -> None:
    found = generate(model, tokenizer, PROMPTS[:10], 5, 4, accelerator)  # four digits and the end of turn
    assert sum(found.terminated) >= 8
    assert set(found.n_tokens) == {5}


def test_plain_text_prompts(model: Any, tokenizer: Any, accelerator: Accelerator) -> None:
    prompts = ["Sort: 31", "Put these digits in order: 9081\n", "排序"]
    found = generate(model, tokenizer, prompts, 6, 3, accelerator)
    for prompt, text in zip(prompts, found.texts, strict=True):
        output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        start = len(tokenizer(prompt)["input_ids"])
        assert text == tokenizer.decode(output[0, start:], skip_special_tokens=True)


def test_sampling_defaults_of_a_checkpoint_are_overruled(folder: str, tokenizer: Any, accelerator: Accelerator) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    greedy = generate(model, tokenizer, PROMPTS, 8, 4, accelerator)
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.9)
    assert generate(model, tokenizer, PROMPTS, 8, 4, accelerator) == greedy


# --- side effects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_no_trace(
    model: Any, tokenizer: Any, rows: list[Encoded], accelerator: Accelerator, training: bool
) -> None:
    model.train(training)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    likelihoods(model, rows, 0, 8, accelerator)
    generate(model, tokenizer, PROMPTS, 4, 8, accelerator)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert all(module.training is training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    model.eval()


def test_the_mode_is_restored_after_an_error(model: Any) -> None:
    model.train()
    with pytest.raises(RuntimeError), evaluating_then_break(model):
        pass
    assert model.training
    model.eval()


def evaluating_then_break(model: Any) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def block():
        with evaluation.evaluating(model):
            assert not model.training and not torch.is_grad_enabled()
            yield
            raise RuntimeError("out of memory")

    return block()


# --- several processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [1, 7])
def test_rows_are_shared_out_and_gathered_in_order(
    model: Any, tokenizer: Any, rows: list[Encoded], accelerator: Accelerator, monkeypatch: Any, n_rows: int
) -> None:
    """Two processes played one after the other: each first shows its share, then both see all."""
    shares: list[list] = []

    def process(index: int) -> Any:
        of_two = {"process_index": index, "num_processes": 2, "parallelism_config": None}
        return SimpleNamespace(**of_two, device=accelerator.device, autocast=accelerator.autocast)

    def work(index: int) -> tuple[Any, Any]:
        found = likelihoods(model, rows[:n_rows], 0, 2, process(index))
        return found, generate(model, tokenizer, PROMPTS[:2], 6, 2, process(index))

    def record(share: list) -> list:
        shares.append(share)
        return [(i, (0.0, 0, False)) for i in range(2)] if len(shares) % 2 == 0 else share

    monkeypatch.setattr("accelerate.utils.gather_object", record)
    for index in (0, 1):
        work(index)
    likelihood_shares, answer_shares = shares[0::2], shares[1::2]
    # As many in each, or processes that hold one model in shards would wait for each other.
    assert len(likelihood_shares[0]) == len(likelihood_shares[1]) == (n_rows + 1) // 2

    alone = (
        likelihoods(model, rows[:n_rows], 0, 2, accelerator),
        generate(model, tokenizer, PROMPTS[:2], 6, 2, accelerator),
    )
    for index in (0, 1):
        joined = iter([likelihood_shares[0] + likelihood_shares[1], answer_shares[0] + answer_shares[1]])
        monkeypatch.setattr("accelerate.utils.gather_object", lambda share, joined=joined: next(joined))
        found, answers = work(index)
        assert found.logprobs == pytest.approx(alone[0].logprobs, rel=1e-4, abs=1e-5)
        assert answers == alone[1]


def test_processes_that_hold_slices_of_one_model_do_the_same_rows() -> None:
    from accelerate.parallelism_config import ParallelismConfig

    slices = ParallelismConfig(dp_shard_size=2, tp_size=2)

    def share(index: int, parallelism: Any) -> list[int]:
        process = SimpleNamespace(process_index=index, num_processes=4, parallelism_config=parallelism)
        return [number for batch in evaluation._batches(list(range(7)), 2, process) for number in batch]

    assert [share(i, slices) for i in range(4)] == [[0, 2, 4, 6]] * 2 + [[1, 3, 5, 0]] * 2
    assert [share(i, None) for i in range(4)] == [[0, 4], [1, 5], [2, 6], [3, 0]]


# --- tokenization -------------------------------------------------------------------------------------------------


def test_a_conversation_is_cut_where_the_answer_begins(tokenizer: Any) -> None:
    row = encode(tokenizer, user("Sort: 31"), assistant("13"))
    assert tokenizer.decode(row.ids[: row.n_prompt]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(row.ids[row.n_prompt :]) == "13<|im_end|>\n"
    assert row.n_completion == 4


def test_plain_text_gets_one_end_token(tokenizer: Any) -> None:
    for completion in ("4", "4<|im_end|>"):
        row = encode(tokenizer, "2+2=", completion)
        assert tokenizer.decode(row.ids[: row.n_prompt]) == "2+2="
        assert tokenizer.decode(row.ids[row.n_prompt :]) == "4<|im_end|>"


def test_tools_reach_the_template(tokenizer: Any) -> None:
    import copy

    with_tools = copy.deepcopy(tokenizer)
    with_tools.chat_template = "{%- if tools %}{{- tools | length }} tools\n{%- endif %}" + tiny.CHAT_TEMPLATE
    tools = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}]
    row = encode(with_tools, user("q"), assistant("a"), tools=tools)
    assert with_tools.decode(row.ids).startswith("1 tools")
    assert with_tools.decode(row.ids[row.n_prompt :]) == "a<|im_end|>\n"


# --- TRL's own numbers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> Any:
    return toy.toy_sort_preference()["test"].select(range(N))


@pytest.fixture(scope="module")
def trl_dpo(folder: str, tokenizer: Any, pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from trl import DPOConfig, DPOTrainer

    out = str(tmp_path_factory.mktemp("dpo"))
    args = DPOConfig(output_dir=out, per_device_eval_batch_size=N, max_length=64, **OFF)
    return DPOTrainer(folder, args=args, train_dataset=pairs, eval_dataset=pairs, processing_class=tokenizer)


def test_likelihoods_equal_those_of_trl_dpo(trl_dpo: Any, pairs: Any, tokenizer: Any) -> None:
    theirs = trl_dpo.evaluate()
    for side in ("chosen", "rejected"):
        rows = [encode(tokenizer, row["prompt"], row[side]) for row in pairs]
        ours = likelihoods(trl_dpo.model, rows, tokenizer.pad_token_id, 7, trl_dpo.accelerator).logprobs
        assert sum(ours) / N == pytest.approx(theirs[f"eval_logps/{side}"], rel=1e-4)


def test_ids_equal_those_trl_dpo_trains_on(trl_dpo: Any, pairs: Any, tokenizer: Any) -> None:
    for row, theirs in zip(pairs, trl_dpo.train_dataset, strict=True):
        for side in ("chosen", "rejected"):
            ours = encode(tokenizer, row["prompt"], row[side])
            assert ours.ids[: ours.n_prompt] == theirs["prompt_ids"]
            assert ours.ids[ours.n_prompt :] == theirs[f"{side}_ids"]


def test_perplexity_is_that_of_trl_sft(folder: str, tokenizer: Any, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    from llmcore_hf.metrics import Perplexity

    data = toy.toy_sort()["test"].select(range(N))  # all completions are equally long, so both pool alike
    args = SFTConfig(output_dir=str(tmp_path), per_device_eval_batch_size=N // 2, max_length=64, **OFF)
    trainer = SFTTrainer(folder, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    encoded = [encode(tokenizer, row["prompt"], row["completion"]) for row in data]
    found = likelihoods(trainer.model, encoded, tokenizer.pad_token_id, 7, trainer.accelerator)
    ours = Perplexity().compute(predictions=found.logprobs, references=found.n_tokens)
    assert ours["nll"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)


# --- before and after ---------------------------------------------------------------------------------------------


def test_compare_takes_means_and_intervals_of_rows() -> None:
    before, after = [0.0] * 40, [1.0] * 30 + [0.0] * 10
    block = evaluation.compare({"acc": before, "ppl": (9.0, 40)}, {"acc": after, "ppl": (4.0, 40)})
    assert block["before"] == {"acc": 0.0, "ppl": 9.0}
    assert block["after"] == {"acc": 0.75, "ppl": 4.0}
    assert block["delta"] == {"acc": 0.75, "ppl": -5.0}
    assert block["n"] == {"acc": 40, "ppl": 40}
    assert set(block["ci95"]) == {"acc"}
    low, high = block["ci95"]["acc"]
    assert 0.5 < low < 0.75 < high < 1.0
