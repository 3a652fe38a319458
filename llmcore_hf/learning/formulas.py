"""The formulas of the cheat sheet, each kept once: memory, compute, attention, losses and metrics, as plain Python.

Sizes are bytes, compute is floating-point operations (a multiply-add counts as two), logarithms are natural. The pages
`learning/CHEATSHEET.md` and `.en.md` show these functions with their values; the tests hold them against models that are
really built, against the code that trains here, and against figures in the papers.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pvariance, stdev
from typing import Any

# ---------------------------------------------------------------- parameters


def llama_parameters(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    tied: bool = False,
    head_dim: int | None = None,
    qkv_bias: bool = False,
) -> int:
    """Parameters of a decoder of the Llama family: attention with grouped heads, gated MLP, RMS norms, no other biases.

    Source: Touvron et al. 2023, arXiv:2307.09288; `qkv_bias` for Qwen2 (arXiv:2407.10671).
    """
    d = head_dim or hidden // heads
    attention = 2 * hidden * heads * d + 2 * hidden * kv_heads * d + (heads + 2 * kv_heads) * d * qkv_bias
    per_layer = attention + 3 * hidden * intermediate + 2 * hidden
    return layers * per_layer + hidden + vocab * hidden * (1 if tied else 2)


def lora_parameters(d_in: int, d_out: int, r: int) -> int:
    """r (d_in + d_out): the matrices A (r, d_in) and B (d_out, r). Source: Hu et al. 2021, arXiv:2106.09685, section 4.1."""
    return r * (d_in + d_out)


# ---------------------------------------------------------------- memory


def weight_bytes(n: float, width: float = 2) -> float:
    """n parameters of `width` bytes each: 4 float32, 2 bfloat16, 1 int8."""
    return n * width


def nf4_bytes(n: float, block: int = 64, double_block: int = 256) -> float:
    """Weights in 4-bit NormalFloat with double quantization: 4 + 8 / 64 + 32 / (64 * 256) bits per parameter.

    Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.
    """
    return n * (4 + 8 / block + 32 / (block * double_block)) / 8


def adam_bytes(n: float) -> float:
    """Weights 2, gradients 2, and 12 of the optimizer (float32 copy, momentum, variance): 16 bytes per trained parameter.

    Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 3.1.
    """
    return (2 + 2 + 12) * n


def zero_bytes(n: float, ranks: int, stage: int) -> float:
    """What each of `ranks` holds. Stage 1 divides the optimizer's 12 bytes, 2 the gradients as well, 3 the weights, too.

    Source: Rajbhandari et al. 2020, section 5 and figure 1.
    """
    weights, gradients, optimizer = 2 * n, 2 * n, 12 * n
    return (
        weights / (ranks if stage >= 3 else 1)
        + gradients / (ranks if stage >= 2 else 1)
        + optimizer / (ranks if stage >= 1 else 1)
    )


def zero_traffic(n: float, stage: int) -> float:
    """Elements each rank sends per step: 2 n as plain data parallelism, and 3 n with stage 3.

    Source: Rajbhandari et al. 2020, section 7.
    """
    return (3 if stage == 3 else 2) * n


def lora_bytes(n: float, n_lora: float, width: float = 2) -> float:
    """A frozen base of `width` bytes per parameter, and 16 bytes for each parameter of the adapters."""
    return weight_bytes(n, width) + adam_bytes(n_lora)


def rlhf_bytes(n: float, trained: int, frozen: int) -> float:
    """Models of one size in memory: 16 bytes per parameter of those that are trained, 2 of those that are frozen."""
    return trained * adam_bytes(n) + frozen * weight_bytes(n)


def activation_bytes(
    s: int, b: int, h: int, a: int, layers: int = 1, t: int = 1, sequence: bool = False, recompute: str = "none"
) -> float:
    """Activations kept for the backward pass of transformer layers in 16 bit, of a GPT with dropout.

    Args:
        s: tokens; b: sequences of a micro-batch; h: hidden size; a: heads.
        t: tensor-parallel size; sequence: sequence parallelism as well.
        recompute: `none`, `selective` (attention only) or `full` (only the input of each layer is kept).

    Source: Korthikanti et al. 2022, arXiv:2205.05198, equations 1, 2, 4, 5 and section 5.
    """
    if recompute == "full":
        return 2 * s * b * h * layers
    attention = 0 if recompute == "selective" else 5 * a * s / h
    per_layer = (34 + attention) / t if sequence else 10 + (24 + attention) / t
    return s * b * h * per_layer * layers


# ---------------------------------------------------------------- attention


def kv_cache_bytes(layers: int, kv_heads: int, head_dim: int, tokens: int, batch: int = 1, width: float = 2) -> float:
    """A key and a value per layer, kv head and token. MHA: kv_heads = heads; MQA: 1; GQA: in between.

    Source: Shazeer 2019, arXiv:1911.02150 (MQA); Ainslie et al. 2023, arXiv:2305.13245 (GQA).
    """
    return 2 * layers * kv_heads * head_dim * tokens * batch * width


def mla_cache_bytes(layers: int, latent: int, rope_dim: int, tokens: int, batch: int = 1, width: float = 2) -> float:
    """A latent vector and one rotary key per layer and token, shared by all heads.

    Source: DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434, section 2.1 and table 1.
    """
    return layers * (latent + rope_dim) * tokens * batch * width


# ---------------------------------------------------------------- compute


def forward_flops(n: float, tokens: float) -> float:
    """2 n per token: a multiply and an add per weight. Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1."""
    return 2 * n * tokens


def training_flops(n: float, tokens: float, recompute: bool = False) -> float:
    """6 n per token: forward 2 n, backward 4 n; with full recomputation the forward pass a second time.

    Source: Kaplan et al. 2020, section 2.1; recomputation: Narayanan et al. 2021, arXiv:2104.04473, appendix.
    """
    return (8 if recompute else 6) * n * tokens


def attention_flops(layers: int, heads: int, head_dim: int, s: int) -> float:
    """Forward, per sequence: queries times keys and weights times values, 4 s^2 h per layer. A causal kernel skips half.

    Source: Narayanan et al. 2021, appendix.
    """
    return 4 * layers * s * s * heads * head_dim


def chinchilla_tokens(n: float) -> float:
    """About 20 tokens per parameter for the lowest loss of a given compute.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, table 3 (a fit of its approaches, rounded as is usual).
    """
    return 20 * n


def training_days(flops: float, gpus: int, peak: float, mfu: float) -> float:
    """Days on `gpus` accelerators of `peak` FLOP/s, of which the share `mfu` is used.

    Source of MFU: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B.
    """
    return flops / (gpus * peak * mfu) / 86400


def decode_tokens_per_second(n: float, bandwidth: float, cache: float = 0.0, width: float = 2) -> float:
    """Upper bound for one sequence: each new token reads all weights and its cache once.

    Source: Pope et al. 2022, arXiv:2211.05102, section 2.
    """
    return bandwidth / (weight_bytes(n, width) + cache)


def bubble_overhead(p: int, m: int) -> float:
    """(p - 1) / m: idle time of a pipeline of p stages and m micro-batches over the ideal time (GPipe and 1F1B).

    Source: Narayanan et al. 2021, section 2.2.
    """
    return (p - 1) / m


def bubble_share(p: int, m: int) -> float:
    """(p - 1) / (m + p - 1): the same idle time over the whole time."""
    return (p - 1) / (m + p - 1)


def all_reduce_bytes(size: float, ranks: int) -> float:
    """Bytes each rank sends in a ring: a reduce-scatter and an all-gather. Source: Patarasuk & Yuan 2009."""
    return 2 * (ranks - 1) / ranks * size


# ---------------------------------------------------------------- losses and advantages


def cross_entropy(probabilities: Sequence[float]) -> float:
    """Mean of - log p over the tokens that carry loss."""
    return -fmean(math.log(p) for p in probabilities)


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean loss per token."""
    return math.exp(fmean(losses))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def dpo_loss(chosen: float, ref_chosen: float, rejected: float, ref_rejected: float, beta: float = 0.1) -> float:
    """- log sigmoid(beta [(log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)]).

    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7.
    """
    return -math.log(sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))))


def reward_loss(chosen: float, rejected: float) -> float:
    """- log sigmoid(r_w - r_l), Bradley-Terry. Source: Ouyang et al. 2022, arXiv:2203.02155, equation 1."""
    return -math.log(sigmoid(chosen - rejected))


def ppo_objective(ratio: float, advantage: float, eps: float = 0.2) -> float:
    """min(r A, clip(r, 1 - eps, 1 + eps) A), which is maximized. Source: Schulman et al. 2017, arXiv:1707.06347, equation 7."""
    return min(ratio * advantage, min(max(ratio, 1 - eps), 1 + eps) * advantage)


def gae(
    rewards: Sequence[float], values: Sequence[float], last_value: float = 0.0, gamma: float = 0.99, lam: float = 0.95
) -> list[float]:
    """A_t = delta_t + gamma lam A_{t+1}, from the back.

    Args:
        last_value: V after the last step: 0 where the episode terminated, the critic's value where it was truncated.

    Source: Schulman et al. 2016, arXiv:1506.02438, equation 16.
    """
    advantages: list[float] = []
    following, next_value = 0.0, last_value
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        following = reward + gamma * next_value - value + gamma * lam * following
        advantages.insert(0, following)
        next_value = value
    return advantages


def group_advantages(rewards: Sequence[float], eps: float = 1e-4) -> list[float]:
    """GRPO: (r - mean) / (std + eps), with the unbiased standard deviation and the eps of TRL.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.
    """
    mean, scale = fmean(rewards), stdev(rewards) + eps
    return [(reward - mean) / scale for reward in rewards]


def rloo_advantages(rewards: Sequence[float]) -> list[float]:
    """r_i minus the mean of the others. Source: Ahmadian et al. 2024, arXiv:2402.14740, section 3."""
    total, n = math.fsum(rewards), len(rewards)
    return [reward - (total - reward) / (n - 1) for reward in rewards]


def cql_penalty(q: Sequence[float], action: int) -> float:
    """log sum exp Q - Q(action of the data). Source: Kumar et al. 2020, arXiv:2006.04779, equation 4."""
    top = max(q)
    return top + math.log(math.fsum(math.exp(value - top) for value in q)) - q[action]


def bcq_actions(probabilities: Sequence[float], tau: float = 0.3) -> list[int]:
    """Actions with pi_b(a) / max pi_b > tau. Source: Fujimoto et al. 2019, arXiv:1910.01708, algorithm 1."""
    return [action for action, p in enumerate(probabilities) if p / max(probabilities) > tau]


# ---------------------------------------------------------------- metrics


def kl_k1(p: float, ref: float) -> float:
    """log(pi / pi_ref) of one sampled token. Unbiased; single values may be negative. Source: Schulman 2020, "Approximating KL Divergence"."""
    return math.log(p / ref)


def kl_k2(p: float, ref: float) -> float:
    """Half the squared log-ratio: biased, low variance. Same source."""
    return math.log(p / ref) ** 2 / 2


def kl_k3(p: float, ref: float) -> float:
    """r - 1 - log r with r = pi_ref / pi: unbiased, never negative. Same source."""
    return ref / p - 1 - math.log(ref / p)


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    """KL(p || q) of two distributions, in nats."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def entropy(p: Sequence[float]) -> float:
    """In nats; log of their number for equally likely outcomes."""
    return -math.fsum(a * math.log(a) for a in p if a > 0)


def clip_fraction(ratios: Sequence[float], advantages: Sequence[float], eps: float = 0.2) -> float:
    """Share of tokens whose clipped term counts, so that they give no gradient."""
    pairs = zip(ratios, advantages, strict=True)
    return fmean((a > 0 and r > 1 + eps) or (a < 0 and r < 1 - eps) for r, a in pairs)


def explained_variance(values: Sequence[float], returns: Sequence[float]) -> float:
    """1 - Var(R - V) / Var(R): 1 a perfect critic, 0 one no better than a constant, below 0 a harmful one."""
    return 1 - pvariance([r - v for r, v in zip(returns, values, strict=True)]) / pvariance(returns)


def zero_std_share(p: float, g: int) -> float:
    """p^g + (1 - p)^g: groups of g answers that are all right or all wrong, when each is right with probability p."""
    return p**g + (1 - p) ** g


# ---------------------------------------------------------------- expressions

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}
_MORE: dict[str, Callable[..., Any]] = {
    "exp": math.exp, "log": math.log, "abs": abs, "max": max, "min": min, "mean": fmean, "sum": math.fsum
}  # fmt: skip


def evaluate(expression: str, given: Mapping[str, Any]) -> Any:
    """The value of an expression of the cheat sheet: arithmetic, lists, names in `given`, and the functions of this file.

    Raises:
        ValueError: it holds anything else.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=constant):
                return constant
            case ast.Name(id=name) if name in given:
                return given[name]
            case ast.List(elts=elements):
                return [value(element) for element in elements]
            case ast.Subscript(value=of, slice=index):
                return value(of)[value(index)]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(operand))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in FUNCTIONS:
                return FUNCTIONS[name](*map(value, args), **{k.arg: value(k.value) for k in keywords if k.arg})
        raise ValueError(f"`{ast.unparse(node)}` in `{expression}` is not allowed")

    return value(ast.parse(expression, mode="eval").body)


FORMULAS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        llama_parameters, lora_parameters, weight_bytes, nf4_bytes, adam_bytes, zero_bytes, zero_traffic, lora_bytes,
        rlhf_bytes, activation_bytes, kv_cache_bytes, mla_cache_bytes, forward_flops, training_flops, attention_flops,
        chinchilla_tokens, training_days, decode_tokens_per_second, bubble_overhead, bubble_share, all_reduce_bytes,
        cross_entropy, perplexity, sigmoid, dpo_loss, reward_loss, ppo_objective, gae, group_advantages, rloo_advantages,
        cql_penalty, bcq_actions, kl_k1, kl_k2, kl_k3, kl, entropy, clip_fraction, explained_variance, zero_std_share,
    )
}  # fmt: skip
FUNCTIONS = FORMULAS | _MORE
