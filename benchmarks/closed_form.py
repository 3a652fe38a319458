"""Do PPO, GRPO and DPO reach the optimum that theory says they have? `make closed-form`.

With completions of one token, the policy that maximizes E[r] - beta KL(pi || pi_ref) is known exactly:

    pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)

PPO and GRPO are given r; DPO is given preferences sampled from its Bradley-Terry model, P(y beats z) = sigmoid(r(y) - r(z)),
on every pair of tokens. All start from the same model. Other settings of PPO and GRPO stand beside them, each with the policy
at which its own expected gradient vanishes. Models and rewards differ from seed to seed.

Source: Rafailov et al., "Direct Preference Optimization" (2023), eq. 4, for pi*; docs/closed_form.md derives the other limits.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tables
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar as hide_datasets_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from llmcore_hf.curves import png, pyplot

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "closed_form.png"
WORDS = [*(f"t{i}" for i in range(6)), "<pad>", "<eos>"]  # the whole vocabulary; each word can be the completion
CONTEXTS = 4  # the prompts are the words t0 ... t3
MAX_REWARD = 7.0  # each prompt has its own order of the words, with rewards from 0 to this in equal steps
BETAS = (1.0, 1.5, 2.0)
FAR, NEAR = (
    0.3,
    0.05,
)  # total variation: at least this at the start (mean over prompts), at most that at the end (worst prompt)
TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


# ---------------------------------------------------------------- the problem and its solution


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(seed: int) -> Qwen3ForCausalLM:
    """A transformer of one layer whose predictions differ clearly between words and between prompts."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    ends = {"pad_token_id": WORDS.index("<pad>"), "eos_token_id": WORDS.index("<eos>"), "bos_token_id": None}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(WORDS), max_position_embeddings=8, **sizes, **heads, **ends))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model.eval()


@torch.no_grad()
def probabilities(model: Any) -> Tensor:
    """(C, V) probabilities of the next token after each prompt, in float64."""
    return model(input_ids=torch.arange(CONTEXTS).unsqueeze(1)).logits[:, -1].double().softmax(-1)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """(C,) half the L1 distance."""
    return 0.5 * (p - q).abs().sum(-1)


@dataclass
class Problem:
    """Rewards (C, V) and probabilities (C, V) of the reference, float64, and where methods come to rest on them."""

    seed: int
    beta: float
    rewards: Tensor = field(init=False)
    reference: Tensor = field(init=False)

    def __post_init__(self) -> None:
        ranks = torch.rand(CONTEXTS, len(WORDS), generator=torch.Generator().manual_seed(self.seed)).argsort(-1)
        self.rewards = ranks.double() * MAX_REWARD / (len(WORDS) - 1)
        self.reference = probabilities(make_model(self.seed))

    def reward(self, prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(self.rewards[WORDS.index(p), ids[0]]) for p, ids in zip(prompts, completion_ids, strict=True)]

    def tilted(self, beta: Tensor | float) -> Tensor:
        """pi_ref exp(r / beta) / Z; beta is a number or (C, 1)."""
        return (self.reference.log() + self.rewards / beta).softmax(-1)

    def optimum(self) -> Tensor:
        return self.tilted(self.beta)

    def of_small_groups(self, size: int) -> Tensor:
        """The mean of a group contains the completion itself, which shrinks the reward's gradient by 1 - 1 / size."""
        return self.tilted(self.beta * size / (size - 1))

    def of_scaled_groups(self, size: int) -> Tensor:
        """pi_ref exp(A / beta) / Z, with A(y) the mean of (r(y) - mean) / deviation over all groups that y can be in.

        The mean is exact, over the words of the `size - 1` others, drawn from this very policy: a fixed point.
        """
        others = torch.tensor(
            [
                [group.count(word) for word in range(len(WORDS))]
                for group in itertools.combinations_with_replacement(range(len(WORDS)), size - 1)
            ],
            dtype=torch.float64,
        )  # (K, V) how often each word is among them
        ways = (torch.lgamma(torch.tensor(float(size))) - torch.lgamma(others + 1).sum(1)).exp()  # (K,) orders of each
        r = self.rewards
        mean = ((r @ others.T).unsqueeze(2) + r.unsqueeze(1)) / size  # (C, K, V)
        squares = (r**2 @ others.T).unsqueeze(2) + (r**2).unsqueeze(1)
        deviation = ((squares - size * mean**2).clamp(min=0) / (size - 1)).sqrt()
        advantages = (r.unsqueeze(1) - mean) / (deviation + 1e-4)  # TRL's constant
        policy = self.reference
        for _ in range(2000):
            chances = ways * (policy.log() @ others.T).exp()  # (C, K)
            expected = (chances.unsqueeze(2) * advantages).sum(1)
            step = (self.reference.log() + expected / self.beta).log_softmax(-1)
            policy = (0.9 * policy.log() + 0.1 * step).softmax(-1)
        return policy

    def of_plain_k3(self) -> Tensor:
        """beta pi_ref / (lambda - r), lambda such that it sums to 1: the best policy under KL(pi_ref || pi) instead."""
        low = (self.rewards + self.beta * self.reference).amax(-1, keepdim=True)
        high = self.rewards.amax(-1, keepdim=True) + self.beta
        for _ in range(100):
            middle = (low + high) / 2
            too_much = (self.beta * self.reference / (middle - self.rewards)).sum(-1, keepdim=True) > 1
            low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
        return self.beta * self.reference / (high - self.rewards)


# ---------------------------------------------------------------- the methods

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
RATE = {"learning_rate": 1e-2, "lr_scheduler_type": "linear"}


def start(problem: Problem, folder: str) -> str:
    """Where the model lies that all methods start from; TRL's trainers load their reference from there."""
    path = str(Path(folder, "start"))
    make_model(problem.seed).save_pretrained(path)
    return path


def prompts(n: int) -> Dataset:
    return Dataset.from_dict({"prompt": [WORDS[i % CONTEXTS] for i in range(n)]})


def ppo(problem: Problem, folder: str, n_prompts: int = 256, max_steps: int = 300, **options: Any) -> Any:
    """The critic starts at 0, where every advantage is the whole reward: a warm-up lets it learn before the policy moves far."""
    from llmcore_hf.ppo import PPOConfig, PPOTrainer

    rate = {**RATE, "learning_rate": 5e-3, "warmup_steps": max_steps // 10}
    args = PPOConfig(
        folder, **QUIET, **rate, seed=problem.seed, max_steps=max_steps, max_completion_length=1, kl_coef=problem.beta,
        per_device_train_batch_size=n_prompts, local_rollout_forward_batch_size=n_prompts, num_ppo_epochs=2,
        truncated_completions="score", vf_coef=0.5, cliprange_value=100.0, **options,
    )  # fmt: skip
    return PPOTrainer(
        start(problem, folder), problem.reward, args, prompts(n_prompts), processing_class=make_tokenizer()
    )


def grpo(problem: Problem, folder: str, n_prompts: int = 512, max_steps: int = 250, **options: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        folder, **QUIET, **RATE, seed=problem.seed, max_steps=max_steps, max_completion_length=1, beta=problem.beta,
        per_device_train_batch_size=n_prompts, temperature=1.0, top_k=0, top_p=1.0, **options,
    )  # fmt: skip
    return GRPOTrainer(
        start(problem, folder), problem.reward, args, prompts(n_prompts), processing_class=make_tokenizer()
    )


def dpo(problem: Problem, folder: str, comparisons: int = 600, epochs: int = 4) -> Any:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        folder, **QUIET, seed=problem.seed, beta=problem.beta, num_train_epochs=epochs, per_device_train_batch_size=512,
        learning_rate=3e-3, lr_scheduler_type="cosine",
    )  # fmt: skip
    pairs = preferences(problem, comparisons)
    return DPOTrainer(start(problem, folder), args=args, train_dataset=pairs, processing_class=make_tokenizer())


def preferences(problem: Problem, comparisons: int) -> Dataset:
    """Every pair of words after every prompt, so many times, each winner drawn from the Bradley-Terry model of r.

    As conversations, because TRL appends an end token to plain text; `TEMPLATE` leaves one token each.
    """
    generator = torch.Generator().manual_seed(problem.seed)
    turns = {role: [[{"role": role, "content": word}] for word in WORDS] for role in ("user", "assistant")}
    rows: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": []}
    for x, (y, z) in itertools.product(range(CONTEXTS), itertools.combinations(range(len(WORDS)), 2)):
        p = torch.sigmoid(problem.rewards[x, y] - problem.rewards[x, z])
        for wins in (torch.rand(comparisons, generator=generator) < p).tolist():
            chosen, rejected = (y, z) if wins else (z, y)
            rows["prompt"].append(turns["user"][x])
            rows["chosen"].append(turns["assistant"][chosen])
            rows["rejected"].append(turns["assistant"][rejected])
    return Dataset.from_dict(rows)


@dataclass(frozen=True)
class Method:
    """A trainer with its settings, and where theory says it comes to rest."""

    make: Callable[..., Any]
    settings: dict[str, Any]
    words: str  # the settings, for the table
    limit: Callable[[Problem], Tensor] = Problem.optimum
    limit_words: str = "pi*"


EXACT_GRPO = {"scale_rewards": "none", "use_bias_correction_kl": True, "num_generations": 128}
METHODS = {
    "PPO": Method(ppo, {"whiten_advantages": False, "lam": 1.0}, "`whiten_advantages=False`"),
    "GRPO": Method(grpo, EXACT_GRPO, '`scale_rewards="none"`, `num_generations=128`'),
    "DPO": Method(dpo, {}, "defaults, 600 comparisons of each pair"),
}
SETTINGS = {
    "PPO, whitened": Method(ppo, {"whiten_advantages": True, "lam": 1.0}, "`whiten_advantages=True` (default)"),
    "GRPO, groups of 8": Method(
        grpo,
        {**EXACT_GRPO, "num_generations": 8},
        '`scale_rewards="none"`, `num_generations=8` (default)',
        partial(Problem.of_small_groups, size=8),
        "pi* of 8/7 beta",
    ),
    "GRPO, plain k3": Method(
        grpo,
        {**EXACT_GRPO, "use_bias_correction_kl": False},
        '`scale_rewards="none"`, `use_bias_correction_kl=False`',
        Problem.of_plain_k3,
        "beta pi_ref / (lambda - r)",
    ),
    "GRPO, defaults": Method(
        grpo,
        {},
        '`scale_rewards="group"`, `num_generations=8` (defaults)',
        partial(Problem.of_scaled_groups, size=8),
        "pi_ref exp(A / beta) / Z",
    ),
}


class Distance(TrainerCallback):
    """Total variation from a policy, mean over the prompts, as training goes on: `points` of (share done, distance)."""

    def __init__(self, target: Tensor) -> None:
        self.target, self.points = target, [(0.0, 0.0)]

    def measure(self, state: Any, model: Any) -> None:
        policy = getattr(model, "policy", model)
        share = state.global_step / state.max_steps
        self.points.append((share, float(total_variation(probabilities(policy), self.target).mean())))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.points.clear()
        self.measure(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % max(state.max_steps // 50, 1) == 0:
            self.measure(state, model)


@dataclass
class Result:
    """What one run reached: probabilities (C, V), and the distance from pi* on the way."""

    problem: Problem
    policy: Tensor
    points: list[tuple[float, float]]

    @property
    def before(self) -> float:
        """Mean over the prompts of the reference's distance from pi*."""
        return float(total_variation(self.problem.reference, self.problem.optimum()).mean())

    def after(self, limit: Tensor | None = None) -> float:
        """Distance of the trained policy from a limit, else from pi*, at the prompt where it is largest."""
        return float(total_variation(self.policy, self.problem.optimum() if limit is None else limit).max())


def run(method: Method, problem: Problem, **smaller: Any) -> Result:
    """Train one method on one problem; `smaller` replaces its sizes."""
    distance = Distance(problem.optimum())
    with tempfile.TemporaryDirectory() as folder:
        trainer = method.make(problem, folder, **method.settings, **smaller)
        trainer.add_callback(distance)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Result(problem, probabilities(getattr(trainer.model, "policy", trainer.model)), distance.points)


# ---------------------------------------------------------------- table and picture

Results = dict[str, list[Result]]  # of each method, one per beta and seed


def spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f} ({max(values):.3f})"


def main_table(results: Results, betas: list[float]) -> list[str]:
    heads = " | ".join(f"beta {beta}" for beta in betas)
    lines = [f"| | settings | {heads} |", "|---|---|" + "---|" * len(betas)]
    first = next(iter(results.values()))
    starts = [[r.before for r in first if r.problem.beta == beta] for beta in betas]
    lines.append(f"| at the start | | {' | '.join(f'{sum(s) / len(s):.3f} (least {min(s):.3f})' for s in starts)} |")
    for name, method in METHODS.items():
        ends = [spread([r.after() for r in results[name] if r.problem.beta == beta]) for beta in betas]
        lines.append(f"| {name} | {method.words} | {' | '.join(ends)} |")
    return lines


def settings_table(results: Results) -> list[str]:
    lines = [
        "| | settings | its limit | limit from pi* | trained from pi* | trained from its limit |",
        "|" + "---|" * 6,
    ]
    for name, method in SETTINGS.items():
        limits = [method.limit(r.problem) for r in results[name]]
        apart = [
            float(total_variation(q, r.problem.optimum()).max()) for q, r in zip(limits, results[name], strict=True)
        ]
        own = [r.after(q) for q, r in zip(limits, results[name], strict=True)]
        found = spread([r.after() for r in results[name]])
        lines.append(f"| {name} | {method.words} | {method.limit_words} | {spread(apart)} | {found} | {spread(own)} |")
    return lines


def table(results: Results, betas: list[float], seeds: list[int]) -> str:
    return "\n".join(
        [
            f"Measured on {tables.machine()}. Total variation from the optimum pi*: mean over {len(seeds)} seeds, in brackets",
            "the worst; of each run the prompt where it is largest (at the start, the mean over the prompts).",
            f"To reach: from at least {FAR} to at most {NEAR}, every seed.",
            "",
            *main_table(results, betas),
            "",
            "Other settings; mean over all seeds and betas, in brackets the worst.",
            "",
            *settings_table(results),
        ]
    )


COLORS = {"PPO": "#1f77b4", "GRPO": "#ff7f0e", "DPO": "#2ca02c"}


def picture(results: Results, beta: float, seed: int) -> bytes:
    """One problem: the policies at one prompt, the way there, and where other settings end."""
    of = {name: next(r for r in rs if (r.problem.seed, r.problem.beta) == (seed, beta)) for name, rs in results.items()}
    figure, axes = pyplot().subplots(1, 3, figsize=(15, 4.3), layout="constrained", width_ratios=(1.25, 1, 1.25))
    problem = of["PPO"].problem
    draw_policies(axes[0], problem, {name: of[name].policy for name in METHODS}, COLORS)
    axes[0].set_title(f"One prompt, beta {beta:g}: all three reach pi*")
    for name in METHODS:
        axes[1].plot(*zip(*of[name].points, strict=True), color=COLORS[name], label=name)
    axes[1].axhline(NEAR, color="black", lw=0.8, ls=":", label=f"to reach: {NEAR}")
    axes[1].set(yscale="log", xlabel="share of training done", ylabel="total variation from pi*, mean over prompts")
    axes[1].set_title("The way there")
    axes[1].legend()
    others = ("GRPO, plain k3", "GRPO, defaults")
    colors = dict(zip(others, ("#9467bd", "#d62728"), strict=True))
    draw_policies(axes[2], problem, {name: of[name].policy for name in others}, colors)
    bars = len(others) + 1
    for i, name in enumerate(others):
        limit = SETTINGS[name].limit(problem)[0][problem.rewards[0].argsort()]
        at = [x + (i + 1 - bars / 2 + 0.5) * 0.8 / bars for x in range(len(WORDS))]
        label = "their predicted limits" if i == 0 else None
        axes[2].scatter(at, limit, marker="_", s=90, color="black", lw=2, zorder=3, label=label)
    axes[2].set_title("Other settings end elsewhere, where theory says")
    axes[2].legend()
    return png(figure)


def draw_policies(axis: Any, problem: Problem, policies: dict[str, Tensor], colors: dict[str, str]) -> None:
    """Bars of pi_ref and the policies after the first prompt, words ordered by reward; steps of pi* across them."""
    order = problem.rewards[0].argsort()
    shown = {"pi_ref": problem.reference, **policies}
    width = 0.8 / len(shown)
    for i, (name, policy) in enumerate(shown.items()):
        at = [x + (i - len(shown) / 2 + 0.5) * width for x in range(len(WORDS))]
        axis.bar(at, policy[0][order], width, color=colors.get(name, "#bbbbbb"), label=name)
    optimum = problem.optimum()[0][order]
    axis.hlines(optimum, [x - 0.45 for x in range(len(WORDS))], [x + 0.45 for x in range(len(WORDS))],
                color="black", lw=1.2, ls="--", label="pi*")  # fmt: skip
    axis.set_xticks(
        range(len(WORDS)), [f"{WORDS[i]}\nr = {problem.rewards[0, i]:g}" for i in order.tolist()], fontsize=8
    )
    axis.set_ylabel("probability")
    axis.legend()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    seeds = parser.parse_args().seeds
    warnings.filterwarnings("ignore")
    hide_datasets_bars()
    disable_progress_bar()
    torch.set_num_threads(1)
    results: Results = {}
    for name, method in (METHODS | SETTINGS).items():
        for beta, seed in itertools.product(BETAS, seeds):
            results.setdefault(name, []).append(result := run(method, Problem(seed, beta)))
            print(f"{name}, beta {beta}, seed {seed}: {result.before:.3f} -> {result.after():.4f}", file=sys.stderr)
    tables.replace("closed-form", table(results, list(BETAS), seeds))
    PICTURE.write_bytes(picture(results, BETAS[0], seeds[0]))
    missed = [r for name in METHODS for r in results[name] if r.before < FAR or r.after() > NEAR]
    if missed:
        print(f"{len(missed)} runs did not reach the figure", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
