"""The cheat sheet: every formula against an independent source, and the two pages as they are written from it."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from llmcore_hf import cli
from llmcore_hf.learning import cheatsheet, formulas
from llmcore_hf.learning.formulas import FORMULAS, evaluate
from llmcore_hf.learning.texts import LANGUAGES
from llmcore_hf.ppo import advantages as ppo_advantages
from llmcore_hf.ppo import losses

pytestmark = pytest.mark.usefixtures("one_thread")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def close(value: float, expected: float, within: float = 1e-9) -> None:
    assert value == pytest.approx(expected, rel=within)


# ---------------------------------------------------------------- each formula, once

CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tiny_llama(kv_heads: int = 2, device: str = "cpu") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(
        **shape, num_key_value_heads=kv_heads, vocab_size=50, tie_word_embeddings=False, attn_implementation="eager"
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


@case
def llama_parameters() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    close(formulas.llama_parameters(3, 32, 48, 4, 2, 50), count(tiny_llama()))
    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    config = Qwen2Config(**shape, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)
    with torch.device("meta"):
        qwen = count(Qwen2ForCausalLM(config))  # Qwen2.5-0.5B
    close(formulas.llama_parameters(24, 896, 4864, 14, 2, 151936, tied=True, qkv_bias=True), qwen)
    close(formulas.llama_parameters(2, 8, 8, 2, 1, 5, head_dim=6), 2 * (4 * 8 * 12 - 2 * 8 * 6 + 8 * 24 + 16) + 8 + 80)


@case
def lora_parameters() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(24, 40, bias=False)), LoraConfig(r=3, target_modules=["0"]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    close(formulas.lora_parameters(24, 40, 3), trained)


@case
def weight_bytes() -> None:
    model = tiny_llama().bfloat16()
    close(formulas.weight_bytes(count(model)), sum(p.nbytes for p in model.parameters()))
    close(formulas.weight_bytes(count(model), 4), sum(p.nbytes for p in model.float().parameters()))


@case
def nf4_bytes() -> None:
    # QLoRA, section 3: double quantization brings the constants from 0.5 to 0.127 bits per parameter
    close(8 * formulas.nf4_bytes(1) - 4, 0.127, 1e-3)
    close(8 * formulas.nf4_bytes(2**20) / 2**20, 4.127, 1e-3)


@case
def adam_bytes() -> None:
    model, master = nn.Linear(30, 20).bfloat16(), nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(master.parameters())
    for parameter in master.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")
    weights = sum(p.nbytes for p in model.parameters())
    held = 2 * weights + sum(p.nbytes for p in master.parameters()) + moments  # weights, gradients, copy, moments
    close(formulas.adam_bytes(count(model)), held)


@case
def zero_bytes() -> None:
    # Rajbhandari et al. 2020, figure 1: 7.5B parameters, 64 ranks
    for stage, gigabytes in enumerate((120, 31.4, 16.6, 1.9)):
        close(formulas.zero_bytes(7.5e9, 64, stage) / 1e9, gigabytes, 0.02)
        close(formulas.zero_bytes(7.5e9, 1, stage), formulas.adam_bytes(7.5e9))


@case
def zero_traffic() -> None:
    # section 7: "no additional communication" up to stage 2, "at most 1.5x" with stage 3
    baseline = formulas.zero_traffic(1e9, 0)
    assert [formulas.zero_traffic(1e9, stage) / baseline for stage in (0, 1, 2, 3)] == [1, 1, 1, 1.5]
    close(formulas.all_reduce_bytes(1e9, 10**9), baseline, 1e-6)


@case
def lora_bytes() -> None:
    close(formulas.lora_bytes(7e9, 0), 14e9)
    close(formulas.lora_bytes(7e9, 1e6) - formulas.lora_bytes(7e9, 0), 16e6)


@case
def rlhf_bytes() -> None:
    # PPO's four models of one size: two with gradients and optimizer, two without
    close(formulas.rlhf_bytes(7e9, 2, 2), 2 * formulas.zero_bytes(7e9, 1, 0) + 2 * formulas.weight_bytes(7e9))


class GPTLayer(nn.Module):
    """A layer as Korthikanti et al. count it: dropout with masks of a byte, attention that is not fused."""

    def __init__(self, h: int, a: int) -> None:
        super().__init__()
        self.a, self.qkv, self.out = a, nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.norms, self.up, self.down = (
            nn.ModuleList([nn.LayerNorm(h), nn.LayerNorm(h)]),
            nn.Linear(h, 4 * h),
            nn.Linear(4 * h, h),
        )

    def forward(self, x: Tensor) -> Tensor:  # (b, s, h)
        b, s, h = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, s, 3, self.a, h // self.a).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * (h // self.a) ** -0.5
        context = torch.native_dropout(scores.softmax(-1), 0.1, True)[0] @ v
        x = x + torch.native_dropout(self.out(context.transpose(1, 2).reshape(b, s, h)), 0.1, True)[0]
        return x + torch.native_dropout(self.down(nn.functional.gelu(self.up(self.norms[1](x)))), 0.1, True)[0]


def kept_for_backward(layer: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd saves, without the parameters."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    total = sum(kept.values())
    del y
    return total


@case
def activation_bytes() -> None:
    for s, b, h, a in ((32, 2, 64, 4), (96, 1, 64, 8)):
        x = torch.randn(b, s, h, dtype=torch.bfloat16, requires_grad=True)
        measured = kept_for_backward(GPTLayer(h, a).bfloat16(), x)
        close(formulas.activation_bytes(s, b, h, a), measured, 0.01)  # the norms keep their statistics, too
    gpt3, mtnlg = {"s": 2048, "b": 1, "h": 12288, "a": 96}, {"s": 2048, "b": 1, "h": 20480, "a": 128}
    for shape, attention, saved in ((gpt3, 80, 0.70), (mtnlg, 64, 0.65)):  # section 5 of the paper
        per_unit = formulas.activation_bytes(**shape) / (shape["s"] * shape["b"] * shape["h"])
        close(per_unit - 34, attention)
        selective = formulas.activation_bytes(**shape, t=8, sequence=True, recompute="selective")
        close(1 - selective / formulas.activation_bytes(**shape, t=8, sequence=True), saved, 0.01)
    one, many = (formulas.activation_bytes(**gpt3, t=t) / formulas.activation_bytes(**gpt3) for t in (1, 10**9))
    close(one, 1)
    close(many, 10 / 114, 1e-6)  # what tensor parallelism alone does not divide
    close(formulas.activation_bytes(**gpt3, t=8, sequence=True), formulas.activation_bytes(**gpt3) / 8)
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    layer = GPTLayer(64, 4).bfloat16()
    from torch.utils.checkpoint import checkpoint

    class Recomputed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(layer, x, use_reentrant=True)

    y = Recomputed()(x)
    held = y.grad_fn.saved_tensors if hasattr(y.grad_fn, "saved_tensors") else ()
    close(formulas.activation_bytes(16, 2, 64, 4, recompute="full"), sum(t.nbytes for t in held))


@case
def kv_cache_bytes() -> None:
    for kv_heads in (4, 2, 1):  # MHA, GQA, MQA
        model = tiny_llama(kv_heads).bfloat16()
        cache = model(torch.zeros(2, 7, dtype=torch.long), use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        close(formulas.kv_cache_bytes(3, kv_heads, 8, tokens=7, batch=2), held)


@case
def mla_cache_bytes() -> None:
    # DeepSeek-V2, section 2.1.4: d_c = 4 d_h, d_R = d_h / 2, "equal to GQA with only 2.25 groups"
    close(formulas.mla_cache_bytes(60, 512, 64, 100), formulas.kv_cache_bytes(60, 1, 128, 100) * 2.25)


def counted(backward: bool) -> tuple[int, int, int]:
    """FLOPs that torch counts for a tiny model, its matrix parameters, and tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = tiny_llama(4), torch.zeros(2, 8, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss = model(ids, labels=ids).loss
        if backward:
            loss.backward()
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    return counter.get_total_flops(), matrices, ids.numel()


@case
def forward_flops() -> None:
    flops, n, tokens = counted(backward=False)
    close(formulas.forward_flops(n, tokens) + 2 * formulas.attention_flops(3, 4, 8, 8), flops, 0.002)


@case
def training_flops() -> None:
    flops, n, tokens = counted(backward=True)
    close(formulas.training_flops(n, tokens) + 3 * 2 * formulas.attention_flops(3, 4, 8, 8), flops, 0.002)
    close(formulas.training_flops(70e9, 1.4e12), 5.76e23, 0.03)  # Chinchilla's budget, Hoffmann et al. 2022
    close(formulas.training_flops(1, 1, recompute=True) / formulas.training_flops(1, 1), 8 / 6)


@case
def attention_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.randn(1, 4, 16, 8)
    with FlopCounterMode(display=False) as counter:
        (q @ q.transpose(-1, -2)).softmax(-1) @ q
    close(formulas.attention_flops(1, 4, 8, 16), counter.get_total_flops())


@case
def chinchilla_tokens() -> None:
    for n, tokens in ((1e9, 20.2e9), (10e9, 205.1e9), (67e9, 1.5e12), (175e9, 3.7e12)):  # table 3 of the paper
        close(formulas.chinchilla_tokens(n), tokens, 0.12)


@case
def training_days() -> None:
    # Llama 2 7B took 184320 GPU hours on A100 (Touvron et al. 2023, table 2): an MFU of about 40 %
    hours = 24 * formulas.training_days(formulas.training_flops(6.74e9, 2e12), 1, 312e12, 0.4)
    close(hours, 184320, 0.05)


@case
def decode_tokens_per_second() -> None:
    close(formulas.decode_tokens_per_second(1e9, 2e12), 1000)
    cache = formulas.kv_cache_bytes(80, 8, 128, 4096)
    seconds = 1 / formulas.decode_tokens_per_second(70e9, 2e12, cache)
    close(seconds, (140e9 + cache) / 2e12)


def pipeline_ticks(p: int, m: int) -> int:
    """Length of a GPipe schedule in which forward and backward take a tick each, built step by step."""
    done: dict[tuple[int, int], int] = {}
    for phase in (0, 1):
        stages = range(p) if phase == 0 else range(p - 1, -1, -1)
        start = max(done.values(), default=0)
        for micro in range(m):
            for place, stage in enumerate(stages):
                before = done.get((phase * p + place - 1, micro), start) if place else start
                own = done.get((phase * p + place, micro - 1), start)
                done[phase * p + place, micro] = max(before, own) + 1
                assert stage in range(p)
    return max(done.values())


@case
def bubble_overhead() -> None:
    for p, m in ((2, 4), (4, 8), (4, 1)):
        close(1 + formulas.bubble_overhead(p, m), pipeline_ticks(p, m) / (2 * m))


@case
def bubble_share() -> None:
    for p, m in ((2, 4), (4, 8), (4, 1)):
        ticks = pipeline_ticks(p, m)
        close(formulas.bubble_share(p, m), (ticks - 2 * m) / ticks)


@case
def all_reduce_bytes() -> None:
    ranks = 5
    parts = [[float(10 * rank + chunk) for chunk in range(ranks)] for rank in range(ranks)]
    sums = [math.fsum(column) for column in zip(*parts, strict=True)]
    sent = 0
    for phase in (0, 1):  # reduce-scatter, all-gather
        for step in range(ranks - 1):
            moves = [(rank, (rank + phase - step) % ranks, parts[rank][(rank + phase - step) % ranks]) for rank in range(ranks)]  # fmt: skip
            for rank, chunk, value in moves:
                to = (rank + 1) % ranks
                parts[to][chunk] = value if phase else parts[to][chunk] + value
            sent += 1
    assert all(part == sums for part in parts)
    close(formulas.all_reduce_bytes(ranks, ranks), sent)  # chunks of one byte


@case
def cross_entropy() -> None:
    logits, labels = torch.randn(6, 9, dtype=torch.float64), torch.tensor([0, 3, 8, 1, 1, 5])
    p = logits.softmax(-1).gather(1, labels[:, None])[:, 0].tolist()
    close(formulas.cross_entropy(p), nn.functional.cross_entropy(logits, labels).item())


@case
def perplexity() -> None:
    from llmcore_hf.metrics import Perplexity

    found = Perplexity().compute(predictions=[-0.4, -2.0], references=[4, 1])
    close(formulas.perplexity([0.1, 0.1, 0.1, 0.1, 2.0]), found["perplexity"])


@case
def sigmoid() -> None:
    close(formulas.sigmoid(0.3), torch.sigmoid(torch.tensor(0.3, dtype=torch.float64)).item())


@case
def dpo_loss() -> None:
    policy, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -7.0])
    margin = 0.1 * ((policy - reference)[0] - (policy - reference)[1])
    close(formulas.dpo_loss(-3, -5, -9, -7, 0.1), -nn.functional.logsigmoid(margin).item(), 1e-6)
    close(formulas.dpo_loss(-5, -5, -7, -7), math.log(2))


@case
def reward_loss() -> None:
    close(formulas.reward_loss(1.5, 0.2), -nn.functional.logsigmoid(torch.tensor(1.3)).item(), 1e-6)


RATIOS, SIGNS = [1.3, 0.7, 1.0, 1.3, 0.7, 1.1], [1.0, -1.0, 1.0, -1.0, 2.0, -2.0]


def policy_losses() -> tuple[Tensor, Tensor]:
    return losses.policy_loss(torch.tensor([RATIOS]).log(), torch.zeros(1, 6), torch.tensor([SIGNS]), 0.2)


@case
def ppo_objective() -> None:
    for ratio, sign, loss in zip(RATIOS, SIGNS, policy_losses()[0][0].tolist(), strict=True):
        close(formulas.ppo_objective(ratio, sign), -loss, 1e-6)


@case
def clip_fraction() -> None:
    close(formulas.clip_fraction(RATIOS, SIGNS), policy_losses()[1].double().mean().item())


@case
def gae() -> None:
    rewards, values = torch.randn(1, 6, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64)
    for last in (0.0, 1.7):
        bootstrap = torch.tensor([last], dtype=torch.float64)
        found = ppo_advantages.gae(rewards, values, torch.ones(1, 6), bootstrap, 0.99, 0.95)[0]
        assert formulas.gae(rewards[0].tolist(), values[0].tolist(), last) == pytest.approx(found.tolist())


@case
def group_advantages() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    found = (rewards - rewards.mean()) / (rewards.std() + 1e-4)  # as in trl.GRPOTrainer
    assert formulas.group_advantages(rewards.tolist()) == pytest.approx(found.tolist())


@case
def rloo_advantages() -> None:
    rewards = [1.0, 0.0, 0.5, 0.25]
    for i, advantage in enumerate(formulas.rloo_advantages(rewards)):
        others = rewards[:i] + rewards[i + 1 :]
        close(advantage, rewards[i] - sum(others) / 3)


@case
def cql_penalty() -> None:
    q = torch.tensor([1.0, -2.0, 300.0], dtype=torch.float64)
    close(formulas.cql_penalty(q.tolist(), 0), (torch.logsumexp(q, 0) - q[0]).item())
    close(formulas.cql_penalty([2.0, 2.0], 1), math.log(2))


@case
def bcq_actions() -> None:
    assert formulas.bcq_actions([0.6, 0.3, 0.1], 0.3) == [0, 1]
    assert formulas.bcq_actions([0.6, 0.3, 0.1], 0.0) == [0, 1, 2] and formulas.bcq_actions([0.6, 0.4], 0.9) == [0]


def logs(p: float, ref: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(p, dtype=torch.float64).log(), torch.tensor(ref, dtype=torch.float64).log()


@case
def kl_k1() -> None:
    close(formulas.kl_k1(0.4, 0.2), ppo_advantages.kl_k1(*logs(0.4, 0.2)).item())


@case
def kl_k2() -> None:
    close(formulas.kl_k2(0.4, 0.2), losses.approx_kl(*logs(0.4, 0.2)).item())


@case
def kl_k3() -> None:
    close(formulas.kl_k3(0.4, 0.2), ppo_advantages.kl_k3(*logs(0.4, 0.2)).item())
    p, ref = [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]
    for estimator in (formulas.kl_k1, formulas.kl_k3):  # unbiased: their expectation is the KL
        close(sum(a * estimator(a, b) for a, b in zip(p, ref, strict=True)), formulas.kl(p, ref))


@case
def kl() -> None:
    p, q = (torch.distributions.Categorical(torch.tensor(x, dtype=torch.float64)) for x in ([0.7, 0.3], [0.5, 0.5]))
    close(formulas.kl([0.7, 0.3], [0.5, 0.5]), torch.distributions.kl_divergence(p, q).item())


@case
def entropy() -> None:
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    close(formulas.entropy(p.tolist()), torch.distributions.Categorical(p).entropy().item())
    close(formulas.entropy([1 / 8] * 8), math.log(8))


@case
def explained_variance() -> None:
    values, returns = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, 4.5]])
    found = losses.explained_variance(values, returns, torch.ones(1, 3)).item()
    close(formulas.explained_variance(values[0].tolist(), returns[0].tolist()), found, 1e-6)


@case
def zero_std_share() -> None:
    p, g = 0.3, 4
    outcomes = itertools.product((0, 1), repeat=g)
    share = sum(math.prod(p if right else 1 - p for right in group) for group in outcomes if len(set(group)) == 1)
    close(formulas.zero_std_share(p, g), share)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_gives_what_an_independent_source_gives(name: str) -> None:
    torch.manual_seed(0)
    CASES[name]()


# ---------------------------------------------------------------- the pages


def expressions(value: Any = None) -> Iterator[str]:
    value = cheatsheet.load() if value is None else value
    if isinstance(value, dict):
        yield from (value[name] for name in ("compute", "right", "wrong") if isinstance(value.get(name), str))
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(item, dict | list):
            yield from expressions(item)


def test_every_formula_is_on_the_sheet() -> None:
    text = " ".join(expressions())
    unused = {name for name in FORMULAS if not re.search(rf"\b{name}\(", text)}
    assert unused == set()


def test_a_wrong_formula_gives_another_number() -> None:
    for row in cheatsheet.load()["wrong"]:
        right, wrong = cheatsheet.computed(row["right"]), cheatsheet.computed(row["wrong"])
        assert abs(right - wrong) > 0.05 * abs(right), row["ask"]["en"]
        assert cheatsheet.show(right, row["unit"]) != cheatsheet.show(wrong, row["unit"])
    assert len(cheatsheet.load()["wrong"]) >= 20


def test_the_expression_of_gradient_accumulation_is_what_torch_gives() -> None:
    per_token = [torch.ones(8).double(), torch.full((2,), 3.0).double()]
    (row,) = [row for row in cheatsheet.load()["wrong"] if "Trainer" in row["source"]]
    close(cheatsheet.computed(row["right"]), torch.cat(per_token).mean().item())
    close(cheatsheet.computed(row["wrong"]), torch.stack([part.mean() for part in per_token]).mean().item())


@pytest.mark.parametrize(
    "expression", ["__import__('os')", "x", "gae.__class__", "1 if 1 else 2", "open('a')", "'a' @ 1"]
)
def test_an_expression_can_do_nothing_but_compute(expression: str) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        evaluate(expression, {})


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_pages_of_the_repository_are_fresh(language: str) -> None:
    """After a change: `python scripts/cheatsheet.py --update`."""
    file = ROOT / "learning" / cheatsheet.PAGES[language]
    assert file.read_text(encoding="utf-8") == cheatsheet.page(language)


def test_the_pages_are_twins() -> None:
    zh, en = (cheatsheet.page(language).splitlines() for language in ("zh", "en"))
    assert len(zh) == len(en)
    tables = 0
    for left, right in zip(zh, en, strict=True):
        assert left.count("|") == right.count("|"), left
        if left.startswith("|"):
            tables += 1
            # 4000 万 is 40 million, and "two" is often a word in one language and a digit in the other
            numbers = [{n for n in NUMBER.findall(x) if len(n) > 1 and n not in ("4000", "40")} for x in (left, right)]
            assert numbers[0] == numbers[1], (left, right)
    assert tables > 70


def test_the_pages_show_the_values_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cheatsheet.page("en")
    monkeypatch.setitem(formulas.FUNCTIONS, "kl_k3", lambda p, ref: 1.2345)
    assert "1.234" in cheatsheet.page("en") and "1.234" not in before


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(1.4e10, "bytes", "14 GB"), (12, "bytes", "12 B"), (0.25, "share", "25.0%"), (1234.4, "number", "1,234"),
     (8.4e22, "flops", "8.4e+22 FLOPs"), (7.61, "days", "7.61 days")],
)  # fmt: skip
def test_values_are_shown_in_their_unit(value: float, unit: str, shown: str) -> None:
    assert cheatsheet.show(value, unit) == shown


def test_the_command_prints_and_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["cheatsheet", "--lang", "en"]) == 0
    assert capsys.readouterr().out == cheatsheet.page("en")
    assert cli.main(["cheatsheet", "--update", "--lang", "en"]) == 1
    assert "checkout" in capsys.readouterr().err
    (tmp_path / "learning").mkdir()
    assert cli.main(["cheatsheet", "--update"]) == 0
    assert (tmp_path / "learning" / "CHEATSHEET.en.md").read_text(encoding="utf-8") == cheatsheet.page("en")


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from llmcore_hf import cli; code = cli.main(['cheatsheet']);"
        "print(code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    said, seconds = done.stderr.rsplit(" ", 1)
    assert said == "0 []" and float(seconds) < 0.5
