"""Estimators of the policy gradient: all unbiased, some thousands of times noisier than others.

The objective is J(theta) = E[ sum_{t<H} gamma^t r_{t+1} ], and its gradient is (policy gradient theorem, Sutton & Barto,
2nd ed., section 13.2; REINFORCE, Williams 1992, section 13.3)

    grad J = E[ sum_t  Psi_t  grad log pi(a_t | s_t) ],

where Psi_t may be any of the following (Schulman et al. 2016, arXiv:1506.02438, eq. 1 and the list below it; here each of
them discounted to the start, as in the box of section 13.3). R = sum_k gamma^k r_{k+1}, G_t = sum_{k>=t} gamma^{k-t} r_{k+1}.

    return                 R
    reward-to-go (rtg)     gamma^t G_t                an action cannot change the rewards before it
    rtg - wrong V          gamma^t (G_t - W_t(s_t))   any function W of the state may be subtracted
    return - b*            R - b*                     the constant with the smallest variance, b* = E[|z|^2 R] / E[|z|^2],
                                                      z = sum_t grad log pi(a_t|s_t) (Greensmith et al. 2004)
    rtg - V                gamma^t (G_t - V_t(s_t))   the usual baseline (section 13.4, eq. 13.11)
    TD residual            gamma^t (r_{t+1} + gamma V_{t+1}(s_{t+1}) - V_t(s_t))
    Q - V                  gamma^t A_t(s_t, a_t)      the advantage: what is left to average out is the choice of the action
    wrong TD residual      gamma^t (r_{t+1} + gamma W_{t+1}(s_{t+1}) - W_t(s_t))   biased: a wrong critic is believed

A baseline costs nothing in expectation, because E_a[grad log pi(a|s)] = 0; sum_a pi(a|s) A(s, a) = 0 is the same statement.

The lesson takes the recycling robot (Sutton & Barto, Example 3.3) with a fixed policy, enumerates the gradient exactly, in
three ways, and then compares the estimators on the same sampled trajectories: their means with the exact gradient, the traces
of their covariances with one another, and both as the horizon grows. No learning curve could show this: what a run
of training reaches depends on its step size at least as much as on its estimator.

How this differs from the book: the task is cut at a horizon H, so that values depend on the time step, V_t and Q_t, and
all trajectories can be counted. The book leaves the robot's numbers open; ours are below. With a neural network V and Q
are estimated and none of this is exact; `critic_scale` is the model of such an error.

(R. J. Williams, Machine Learning 8, 1992; E. Greensmith, P. L. Bartlett, J. Baxter, JMLR 5, 2004.)
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcore_hf import lesson
from llmcore_hf.checks import Check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llmcore_hf.run_dir import RunDirectory


@dataclass
class Args(lesson.LessonArguments):
    horizon: int = field(default=20, metadata={"help": "Steps of a trajectory in the main comparison."})
    horizons: list[int] = field(
        default_factory=lambda: [5, 10, 20, 40, 80, 160],
        metadata={"help": "Horizons over which the growth of the variance is measured, ascending."},
    )
    enumerated_horizon: int = field(
        default=7, metadata={"help": "Horizon at which all trajectories are enumerated; at most 9 (about 60,000)."}
    )
    gamma: float = field(default=0.99, metadata={"help": "Discount, in [0, 1)."})
    num_trajectories: int = field(default=200_000, metadata={"help": "Sampled trajectories per horizon."})
    critic_scale: float = field(
        default=0.5, metadata={"help": "The wrong critic is this times the exact values; 1 would be right."}
    )

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.gamma < 1:
            found.append(f"--gamma {self.gamma}: a discount is in [0, 1)")
        if self.horizon < 2:
            found.append(f"--horizon {self.horizon}: must be at least 2, or there is nothing to go")
        if len(self.horizons) < 2 or min(self.horizons) < 2 or self.horizons != sorted(set(self.horizons)):
            given = " ".join(map(str, self.horizons))
            found.append(f"--horizons {given}: give two or more, ascending, each at least 2")
        if not 2 <= self.enumerated_horizon <= 9:
            found.append(f"--enumerated_horizon {self.enumerated_horizon}: must be from 2 to 9")
        if self.num_trajectories < 1000:
            found.append(f"--num_trajectories {self.num_trajectories}: must be at least 1000, or intervals say nothing")
        if not math.isfinite(self.critic_scale) or self.critic_scale == 1:
            found.append(f"--critic_scale {self.critic_scale}: must be a finite number other than 1")
        return found


# ---------------------------------------------------------------------------------------------------------------------
# The recycling robot (Sutton & Barto, Example 3.3)
# ---------------------------------------------------------------------------------------------------------------------

STATES, ACTIONS = ("high", "low"), ("search", "wait", "recharge")
ALPHA, BETA = 0.8, 0.6  # probability that the battery stays high, or low, during a search
R_SEARCH, R_WAIT, R_RESCUE = 2.0, 1.0, -3.0  # the last is the book's: somebody has to carry the robot home
AVAILABLE = torch.tensor([[True, True, False], [True, True, True]])  # (S, A)
LOGITS = torch.tensor([[0.5, 0.0, 0.0], [-0.5, 0.0, 0.5]], dtype=torch.float64)  # (S, A) theta, the fixed policy

TRANSITIONS = torch.tensor(  # (S, A, S'), rows of unavailable actions are 0
    [
        [[ALPHA, 1 - ALPHA], [1.0, 0.0], [0.0, 0.0]],
        [[1 - BETA, BETA], [0.0, 1.0], [1.0, 0.0]],
    ],
    dtype=torch.float64,
)
REWARDS = torch.tensor(  # (S, A, S')
    [
        [[R_SEARCH, R_SEARCH], [R_WAIT, R_WAIT], [0.0, 0.0]],
        [[R_RESCUE, R_SEARCH], [R_WAIT, R_WAIT], [0.0, 0.0]],
    ],
    dtype=torch.float64,
)
# The rows of theta sum to a constant direction: these three coordinates determine all others.
FREE = ((0, 0), (1, 0), (1, 2))  # (high, search), (low, search), (low, recharge)


def policy(logits: Tensor) -> Tensor:
    """pi(a|s), softmax over the available actions. # (S, A)"""
    return logits.masked_fill(~AVAILABLE, -math.inf).softmax(-1)


@dataclass
class Exact:
    """Everything about the policy that dynamic programming gives; H is the horizon."""

    values: Tensor  # (H + 1, S) V_t, 0 at the horizon
    q_values: Tensor  # (H, S, A)
    visits: Tensor  # (H, S) probability of being in s at step t
    pi: Tensor  # (S, A)
    discounts: Tensor  # (H,) gamma^t

    @property
    def advantages(self) -> Tensor:
        """A_t = Q_t - V_t. # (H, S, A)"""
        return self.q_values - self.values[:-1, :, None]

    def gradient(self, q_values: Tensor | None = None) -> Tensor:
        """sum_t gamma^t sum_s d_t(s) pi(a|s) (Q_t(s, a) - sum_a' pi Q_t): the policy gradient for a softmax table. # (S, A)

        With other `q_values`, those of a wrong critic, it is what an estimator that believes them has as its mean.
        """
        q_values = self.q_values if q_values is None else q_values
        centred = q_values - (self.pi * q_values).sum(-1, keepdim=True)
        return torch.einsum("t,ts,sa,tsa->sa", self.discounts, self.visits, self.pi, centred)


def backup(values: Tensor, gamma: float) -> Tensor:
    """sum_s' p(s'|s,a) (r + gamma V(s')) for V of the next step: (..., S) -> (..., S, A)."""
    return (TRANSITIONS * (REWARDS + gamma * values[..., None, None, :])).sum(-1)


def solve(logits: Tensor, horizon: int, gamma: float) -> Exact:
    """Values backward in time, visits forward; V from the averaged dynamics, not from Q. Keeps track of gradients."""
    pi = policy(logits)
    rewards = (pi * (TRANSITIONS * REWARDS).sum(-1)).sum(-1)  # (S,)
    moves = torch.einsum("sa,sax->sx", pi, TRANSITIONS)  # (S, S')
    values = [torch.zeros(len(STATES), dtype=torch.float64)]
    visits = [torch.tensor([1.0, 0.0], dtype=torch.float64)]  # the battery is high at the start
    for _ in range(horizon):
        values.insert(0, rewards + gamma * moves @ values[0])
        visits.append(visits[-1] @ moves)
    stacked = torch.stack(values)
    discounts = gamma ** torch.arange(horizon, dtype=torch.float64)
    return Exact(stacked, backup(stacked[1:], gamma), torch.stack(visits[:-1]), pi, discounts)


def gradient_by_autograd(horizon: int, gamma: float) -> Tensor:
    """Of J = V_0(high), differentiated through the recursion. # (S, A)"""
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(solve(logits, horizon, gamma).values[0, 0], logits)
    return gradient


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories and estimators
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Trajectories:
    states: Tensor  # (N, H + 1)
    actions: Tensor  # (N, H)
    rewards: Tensor  # (N, H)


def sample(pi: Tensor, horizon: int, count: int, generator: torch.Generator) -> Trajectories:
    """`count` trajectories that start with a full battery."""
    states, actions, rewards = [torch.zeros(count, dtype=torch.long)], [], []
    for _ in range(horizon):
        state = states[-1]
        action = torch.multinomial(pi[state], 1, generator=generator)[:, 0]
        following = torch.multinomial(TRANSITIONS[state, action], 1, generator=generator)[:, 0]
        actions.append(action)
        rewards.append(REWARDS[state, action, following])
        states.append(following)
    return Trajectories(torch.stack(states, 1), torch.stack(actions, 1), torch.stack(rewards, 1))


def enumerate_all(pi: Tensor, horizon: int) -> tuple[Trajectories, Tensor]:
    """Every trajectory that can happen, and its probability (N,)."""
    states = torch.zeros(1, 1, dtype=torch.long)
    actions, rewards = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.float64)
    probabilities = torch.ones(1, dtype=torch.float64)
    for _ in range(horizon):
        branches = pi[:, :, None] * TRANSITIONS  # (S, A, S') probability of each continuation
        parent, action, following = branches[states[:, -1]].nonzero(as_tuple=True)
        state = states[parent, -1]
        probabilities = probabilities[parent] * branches[state, action, following]
        rewards = torch.cat([rewards[parent], REWARDS[state, action, following][:, None]], 1)
        actions = torch.cat([actions[parent], action[:, None]], 1)
        states = torch.cat([states[parent], following[:, None]], 1)
    return Trajectories(states, actions, rewards), probabilities


UNBIASED = ("return", "reward-to-go", "rtg - wrong V", "return - b*", "rtg - V", "TD residual", "Q - V")
BIASED = "wrong TD residual"
ESTIMATORS = (*UNBIASED, BIASED)


def psi(paths: Trajectories, exact: Exact, baseline: float, critic: Tensor, gamma: float) -> dict[str, Tensor]:
    """Psi_t of every estimator for every trajectory, (N, H) each. `critic` is W_t, (H + 1, S); `baseline` is b*."""
    time = torch.arange(len(exact.discounts))
    state, following, rewards = paths.states[:, :-1], paths.states[:, 1:], paths.rewards
    discounts = exact.discounts
    to_go = (discounts * rewards).flip(1).cumsum(1).flip(1)  # gamma^t G_t
    whole = to_go[:, :1].expand_as(to_go)

    def residual(values: Tensor) -> Tensor:
        return discounts * (rewards + gamma * values[time + 1, following] - values[time, state])

    return {
        "return": whole,
        "reward-to-go": to_go,
        "rtg - wrong V": to_go - discounts * critic[time, state],
        "return - b*": whole - baseline,
        "rtg - V": to_go - discounts * exact.values[time, state],
        "TD residual": residual(exact.values),
        "Q - V": discounts * exact.advantages[time, state, paths.actions],
        BIASED: residual(critic),
    }


def scores(paths: Trajectories, pi: Tensor) -> tuple[Tensor, Tensor]:
    """grad log pi(a_t|s_t) = [s = s_t] (onehot(a_t) - pi(.|s_t)), as two factors: (N, H, S) and (N, H, A)."""
    state = paths.states[:, :-1]
    where = torch.nn.functional.one_hot(state, len(STATES)).double()
    return where, torch.nn.functional.one_hot(paths.actions, len(ACTIONS)).double() - pi[state]


def estimates(paths: Trajectories, weights: dict[str, Tensor], pi: Tensor) -> dict[str, Tensor]:
    """sum_t Psi_t grad log pi(a_t|s_t) of every trajectory. # (N, S, A) each"""
    where, what = scores(paths, pi)
    return {name: torch.einsum("nt,nts,nta->nsa", weight, where, what) for name, weight in weights.items()}


def best_constant(paths: Trajectories, pi: Tensor, discounts: Tensor, probabilities: Tensor | None = None) -> float:
    """b* = E[|z|^2 R] / E[|z|^2]; the mean is weighted with `probabilities` (N,) when they are given."""
    where, what = scores(paths, pi)
    squares = torch.einsum("nts,nta->nsa", where, what).square().sum((1, 2))  # (N,) |z|^2
    if probabilities is not None:
        squares = squares * probabilities
    returns = paths.rewards @ discounts  # (N,)
    return ((squares @ returns) / squares.sum()).item()


def all_estimates(args: Args, horizon: int, seed: int) -> tuple[Exact, dict[str, Tensor]]:
    """Every estimator on the same `num_trajectories` trajectories, (N, S, A) each.

    b* comes from as many others: a baseline that has seen the trajectory it is subtracted from is no longer independent
    of its actions, and a bias of the order of 1/N creeps in.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = solve(LOGITS, horizon, args.gamma)
    critic = args.critic_scale * exact.values
    size = max(1, 400_000 // horizon)  # trajectories at a time, to bound memory
    sizes = [min(size, args.num_trajectories - done) for done in range(0, args.num_trajectories, size)]
    pilots = [best_constant(sample(exact.pi, horizon, n, generator), exact.pi, exact.discounts) for n in sizes]
    baseline = sum(n * b for n, b in zip(sizes, pilots, strict=True)) / args.num_trajectories
    shape = (args.num_trajectories, len(STATES), len(ACTIONS))
    # filled in place: pieces kept among the temporaries would keep the heap from shrinking
    samples = {name: torch.empty(shape, dtype=torch.float64) for name in ESTIMATORS}
    done = 0
    for n in sizes:
        paths = sample(exact.pi, horizon, n, generator)
        for name, part in estimates(paths, psi(paths, exact, baseline, critic, args.gamma), exact.pi).items():
            samples[name][done : done + n] = part
        done += n
    return exact, samples


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Against:
    """Sampled estimates held against a gradient: are they right on average?"""

    z: float  # the largest deviation of a coordinate, in standard errors
    p: float  # probability of a joint deviation as large as this, if the mean were right

    @classmethod
    def of(cls, samples: Tensor, gradient: Tensor) -> Against:
        """Coordinate by coordinate, and Hotelling's T^2 with its chi^2 limit; samples are (N, S, A), gradient (S, A)."""
        rows, columns = zip(*FREE, strict=True)
        free = samples[:, rows, columns]  # (N, 3)
        apart = free.mean(0) - gradient[rows, columns]
        errors = free.std(0) / math.sqrt(len(free))
        t2 = len(free) * apart @ torch.linalg.solve(free.T.cov(), apart)
        half = torch.tensor(len(FREE) / 2, dtype=torch.float64)
        return cls((apart / errors).abs().max().item(), torch.special.gammaincc(half, t2 / 2).item())


def squared_deviations(samples: Tensor) -> Tensor:
    """|g_i - mean|^2 per trajectory; their mean is the trace of the covariance. (N, S, A) -> (N,)"""
    return (samples - samples.mean(0)).square().sum((1, 2))


def trace_interval(samples: Tensor) -> tuple[float, float]:
    """Trace of the covariance and half the width of its 95 % confidence interval."""
    squares = squared_deviations(samples)
    return squares.mean().item(), 1.96 * squares.std().item() / math.sqrt(len(squares))


def trace_ratio(samples: Tensor, others: Tensor) -> tuple[float, float]:
    """Trace of `samples` as a part of that of `others`, on the same trajectories, and half its 95 % interval (delta method)."""
    x, y = squared_deviations(samples), squared_deviations(others)
    ratio = x.mean() / y.mean()
    return ratio.item(), (1.96 * (x - ratio * y).std() / (math.sqrt(len(x)) * y.mean())).item()


def error_of_means(samples: Tensor, gradient: Tensor, count: int) -> float:
    """RMS distance from the gradient of the means of disjoint groups of `count` trajectories."""
    groups = len(samples) // count
    means = samples[: groups * count].view(groups, count, *gradient.shape).mean(1)
    return (means - gradient).square().sum((1, 2)).mean().sqrt().item()


def growth(horizons: list[int], traces: list[float]) -> float:
    """Exponent k of trace ~ H^k, least squares in the logarithms."""
    x, y = torch.tensor(horizons).double().log(), torch.tensor(traces).double().log()
    x = x - x.mean()
    return ((x @ y) / (x @ x)).item()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

COLORS = dict(
    zip(
        ESTIMATORS,
        ("#d62728", "#ff7f0e", "#bcbd22", "#8c564b", "#2ca02c", "#17becf", "#1f77b4", "#7f7f7f"),
        strict=True,
    )
)


def _subplots(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    return lesson.pyplot().subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )


def draw_variances(samples: dict[str, Tensor], gradient: Tensor) -> Figure:
    """Left: trace of the covariance of each estimator. Right: distance from the gradient against trajectories averaged."""
    figure, axes = _subplots(1, 2, 15, 5)
    left, right = axes[0]
    most = trace_interval(samples["return"])[0]
    for place, name in enumerate(ESTIMATORS):
        trace, half = trace_interval(samples[name])
        left.barh(
            place, trace, xerr=half, color=COLORS[name], hatch="//" if name == BIASED else None, edgecolor="white"
        )
        part = "" if name == "return" else f"   = return / {_short(most / trace)}"
        left.text(trace * 1.15, place, _short(trace) + part, va="center", fontsize=9)
    left.set_xscale("log")
    left.set_xlim(right=most * 20)
    left.set_yticks(range(len(ESTIMATORS)), [f"{name} (biased)" if name == BIASED else name for name in ESTIMATORS])
    left.invert_yaxis()
    left.set_xlabel("trace of the covariance of the estimate from one trajectory")
    left.set_title("How noisy is each estimator of the same gradient?")
    total = len(samples["return"])
    counts = [n for n in (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000) if n <= total // 20]
    for name in ESTIMATORS:
        errors = [error_of_means(samples[name], gradient, n) for n in counts]
        style = "s--" if name == BIASED else "o-"
        right.plot(counts, errors, style, color=COLORS[name], label=name, markersize=4)
    right.axhline(gradient.norm(), color="black", linestyle=":", linewidth=1, label="length of the gradient itself")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("trajectories averaged")
    right.set_ylabel("RMS distance from the exact gradient")
    right.set_title("Who gets there? (slope -1/2: unbiased)")
    right.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    right.grid(alpha=0.25, which="both")
    left.grid(alpha=0.25, axis="x")
    return figure


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


GROUP = 50  # trajectories behind each dot of the scatter


def draw_scatter(samples: dict[str, Tensor], gradient: Tensor) -> Figure:
    """Means of 50 trajectories around the exact gradient, in two of its coordinates. The second row looks closer."""
    figure, axes = _subplots(2, 4, 14, 7.4, sharex="row", sharey="row")
    x, y = (gradient[s, a].item() for s, a in FREE[:2])
    reach = {}  # half the width and height of a row of pictures: 3.2 standard deviations of its noisiest estimator
    for row, noisiest in ((0, "return"), (1, "rtg - V")):
        reach[row] = [3.2 * samples[noisiest][:, s, a].std().item() / math.sqrt(GROUP) for s, a in FREE[:2]]
    for place, (axis, name) in enumerate(zip(axes.flat, ESTIMATORS, strict=True)):
        _draw_cloud(axis, samples[name], gradient, name)
        width, height = reach[place // 4]
        axis.set_xlim(x - width, x + width)
        axis.set_ylim(y - height, y + height)
        if place < 4:
            width, height = reach[1]
            frame = [x - width, x + width, x + width, x - width, x - width]
            sides = [y - height, y - height, y + height, y + height, y - height]
            axis.plot(frame, sides, color="black", linewidth=1, label="frame of the row below")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    (s1, a1), (s2, a2) = FREE[:2]
    figure.supxlabel(f"dJ / d theta({STATES[s1]}, {ACTIONS[a1]})")
    figure.supylabel(f"dJ / d theta({STATES[s2]}, {ACTIONS[a2]})")
    closer = reach[0][0] / reach[1][0]
    figure.suptitle(f"Where do estimates from {GROUP} trajectories fall? (second row: {closer:.0f} times closer)")
    return figure


def _draw_cloud(axis: Any, samples: Tensor, gradient: Tensor, name: str) -> None:
    (s1, a1), (s2, a2) = FREE[:2]
    groups = min(400, len(samples) // GROUP)
    means = samples[: groups * GROUP].view(groups, GROUP, *gradient.shape).mean(1)
    mean = samples.mean(0)
    axis.plot(means[:, s1, a1], means[:, s2, a2], ".", color=COLORS[name], alpha=0.35, markersize=5)
    axis.plot(
        gradient[s1, a1], gradient[s2, a2], "+", color="black", markersize=16, markeredgewidth=2, label="exact gradient"
    )
    axis.plot(
        mean[s1, a1],
        mean[s2, a2],
        "o",
        markerfacecolor="none",
        color="black",
        markersize=9,
        label="mean of all trajectories",
    )
    axis.set_title(f"{name} (biased)" if name == BIASED else name, fontsize=11)
    axis.grid(alpha=0.25)


def draw_horizons(horizons: list[int], traces: dict[str, list[float]], lengths: list[float]) -> Figure:
    """Left: variance against the horizon. Right: trajectories needed until the error is a tenth of the gradient's length."""
    figure, axes = _subplots(1, 2, 13, 5)
    left, right = axes[0]
    for name in UNBIASED:
        label = f"{name}: H^{growth(horizons, traces[name]):.1f}"
        left.plot(horizons, traces[name], "o-", color=COLORS[name], label=label, markersize=4)
        needed = [100 * trace / length**2 for trace, length in zip(traces[name], lengths, strict=True)]
        right.plot(horizons, needed, "o-", color=COLORS[name], label=name, markersize=4)
    left.set_title("How does the variance grow with the horizon?")
    left.set_ylabel("trace of the covariance")
    right.set_title("What does that cost?")
    right.set_ylabel("trajectories for an error of 10 % of the gradient")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(horizons, list(map(str, horizons)))
        axis.minorticks_off()
        axis.set_xlabel("horizon H (steps)")
        axis.grid(alpha=0.25)
    left.legend(fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def exact_checks(args: Args) -> list[Check]:
    """No sampling: dynamic programming, automatic differentiation and the enumeration of all trajectories."""
    horizon = args.enumerated_horizon
    exact = solve(LOGITS, horizon, args.gamma)
    gradient = exact.gradient()
    paths, probabilities = enumerate_all(exact.pi, horizon)
    baseline = best_constant(paths, exact.pi, exact.discounts, probabilities)
    weights = psi(paths, exact, baseline, args.critic_scale * exact.values, args.gamma)
    found = estimates(paths, weights, exact.pi)
    means = {name: torch.einsum("n,nsa->sa", probabilities, samples) for name, samples in found.items()}
    apart = {name: (mean - gradient).abs().max().item() for name, mean in means.items()}
    long = solve(LOGITS, args.horizon, args.gamma).gradient()
    ways = {
        "autograd": (gradient_by_autograd(horizon, args.gamma) - gradient).abs().max().item(),
        "enumeration": apart["return"],
        f"autograd, horizon {args.horizon}": (gradient_by_autograd(args.horizon, args.gamma) - long).abs().max().item(),
    }
    believed = exact.gradient(backup(args.critic_scale * exact.values[1:], args.gamma))
    apart[BIASED] = (means[BIASED] - believed).abs().max().item()
    zero = (exact.pi * exact.advantages).sum(-1).abs().max().item()
    return [
        Check(
            "advantage.gradient_three_ways",
            "invariant",
            max(ways.values()) < TOLERANCE and abs(probabilities.sum().item() - 1) < TOLERANCE,
            {"trajectories": len(probabilities), "largest_difference": ways},
            f"below {TOLERANCE:.0e}: policy gradient theorem, autograd of J, and all trajectories weighted with their probability",
            "精确梯度用三种方法计算：策略梯度定理、对目标自动微分、枚举全部轨迹；不一致说明其中之一写错了。",
            "The exact gradient in three ways; if they differ, one of them is wrong and nothing below can be trusted.",
        ),
        Check(
            "advantage.advantage_averages_to_zero",
            "invariant",
            zero < TOLERANCE,
            {"largest_sum": zero},
            f"below {TOLERANCE:.0e}: sum_a pi(a|s) A_t(s, a) for every s and t",
            "A = Q - V 按策略平均为 0：优势只比较动作，不含状态本身的好坏；不为 0 说明 Q 与 V 不属于同一策略。",
            "A = Q - V averages to 0 under the policy: it compares actions and says nothing about how good the state is. If "
            "not, Q and V belong to different policies.",
        ),
        Check(
            "advantage.means_over_all_trajectories",
            "invariant",
            max(apart.values()) < TOLERANCE,
            {**apart, "bias_of_the_last": (believed - gradient).norm().item()},
            f"below {TOLERANCE:.0e}: {len(UNBIASED)} against the gradient, the last against the mean its critic implies",
            "在全部轨迹上取精确期望：前七种估计都等于真实梯度，包括用错误 critic 作基线；用错误 critic 自举则有偏，偏差可由动态规划算出。",
            "Averaged over all trajectories the first seven are the gradient, even with a wrong critic as the baseline; "
            "bootstrapping from a wrong critic is biased, by as much as dynamic programming says.",
        ),
        _baseline_check(found["return"], probabilities, scores(paths, exact.pi), baseline),
    ]


TOLERANCE = 1e-10


def _baseline_check(samples: Tensor, probabilities: Tensor, score: tuple[Tensor, Tensor], best: float) -> Check:
    """Is b* the minimum? trace(b) = trace(b*) + E|z|^2 (b - b*)^2, over all trajectories."""
    z = torch.einsum("nts,nta->nsa", *score)  # (N, S, A)
    curvature = (probabilities @ z.square().sum((1, 2))).item()

    def trace(baseline: float) -> float:
        shifted = samples - baseline * z
        mean = torch.einsum("n,nsa->sa", probabilities, shifted)
        return (probabilities @ (shifted - mean).square().sum((1, 2))).item()

    smallest = trace(best)
    apart = max(abs(trace(best + step) - smallest - curvature * step**2) for step in (-best, -1.0, 1.0))
    return Check(
        "advantage.best_constant_baseline",
        "invariant",
        apart < TOLERANCE * trace(0.0),
        {"b*": best, "trace_without": trace(0.0), "trace_with": smallest, "largest_deviation_from_parabola": apart},
        "the trace over all trajectories is a parabola in b with its minimum at b*",
        "常数基线的方差是 b 的抛物线，最低点为 b* = E[|z|^2 R]/E[|z|^2]，而不是平均回报；不符说明 b* 算错了。",
        "The variance is a parabola in the constant b, lowest at b* = E[|z|^2 R] / E[|z|^2], which is not the mean return; if "
        "not, b* is wrong.",
    )


Z_BOUND, P_BOUND = 4.0, 1e-5


def sampled_checks(args: Args, exact: Exact, samples: dict[str, Tensor]) -> list[Check]:
    """Means of the sampled estimates against the exact gradient, and one variance against the next."""
    gradient = exact.gradient()
    against = {name: Against.of(samples[name], gradient) for name in ESTIMATORS}
    z, p = max(against[name].z for name in UNBIASED), min(against[name].p for name in UNBIASED)
    wrong = backup(args.critic_scale * exact.values[1:], args.gamma)  # (H, S, A) what the wrong critic makes of Q
    own = Against.of(samples[BIASED], exact.gradient(wrong))
    chain = ("return", "reward-to-go", "rtg - V", "TD residual", "Q - V")
    ratios = {f"{b} / {a}": trace_ratio(samples[b], samples[a]) for a, b in itertools.pairwise(chain)}
    return [
        Check(
            "advantage.unbiased_in_samples",
            "invariant",
            z < Z_BOUND and p > P_BOUND,
            {"largest_z": z, "smallest_p": p, "z": {name: against[name].z for name in UNBIASED}},
            f"every coordinate within {Z_BOUND:g} standard errors of the exact gradient, jointly p > {P_BOUND:g}",
            "抽样均值与精确梯度之差应在标准误之内；超出说明采样、打分函数或 Psi 写错了。",
            "The means of the samples are the exact gradient within their standard errors; if not, the sampling, the score or "
            "Psi is wrong.",
        ),
        Check(
            "advantage.bias_is_detected",
            "learning",
            against[BIASED].p < P_BOUND and own.z < Z_BOUND and own.p > P_BOUND,
            {"p_against_gradient": against[BIASED].p, "p_against_own_mean": own.p, "z_against_own_mean": own.z},
            f"p < {P_BOUND:g} against the gradient; p > {P_BOUND:g} against the mean that the wrong critic implies",
            "用错误 critic 自举的估计，其均值偏离梯度，且正好偏到精确算出的位置；检不出说明样本太少。",
            "The estimator that believes a wrong critic misses the gradient, by just as much as dynamic programming says; if that "
            "goes unnoticed, there are too few trajectories.",
        ),
        Check(
            "advantage.variance_falls",
            "learning",
            all(ratio + half < 1 for ratio, half in ratios.values()),
            {name: {"ratio": ratio, "plus_minus": half} for name, (ratio, half) in ratios.items()},
            "95 % intervals of the ratios of the traces, each estimator over the one before it, lie below 1",
            "从总回报到 reward-to-go、减 V、TD 残差再到精确优势，每一步方差都显著下降。",
            "From the return to the reward-to-go, minus V, to the TD residual and to the exact advantage, every step lowers "
            "the variance for certain.",
        ),
    ]


def horizon_check(horizons: list[int], traces: dict[str, list[float]]) -> Check:
    exponents = {name: growth(horizons, traces[name]) for name in UNBIASED}
    return Check(
        "advantage.variance_grows_with_the_horizon",
        "learning",
        exponents["return"] > exponents["rtg - V"] > exponents["Q - V"],
        exponents,
        "exponent of trace ~ H^k: larger for the return than for reward-to-go minus V, and there larger than for Q - V",
        "步数越多，总回报的方差增长得越快；减去 V 后增长变慢，精确优势最慢。",
        "The longer the trajectory, the more a baseline is worth: the return's variance grows fastest, the advantage's slowest.",
    )


def measure_horizons(args: Args, run_dir: RunDirectory) -> tuple[dict[str, list[float]], list[float]]:
    """Trace of every estimator at every horizon, and the length of the gradient there; one logged row per horizon."""
    traces: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    lengths = []
    for horizon in args.horizons:
        exact, samples = all_estimates(args, horizon, args.seed + horizon)
        for name in ESTIMATORS:
            traces[name].append(trace_interval(samples[name])[0])
        lengths.append(exact.gradient().norm().item())
        row = {f"variance/{name}": traces[name][-1] for name in ESTIMATORS}
        run_dir.log({"step": horizon, "gradient_length": lengths[-1], **row})
    return traces, lengths


def table(samples: dict[str, Tensor], gradient: Tensor) -> list[dict[str, Any]]:
    """The lesson's table: one row per estimator."""
    rows = []
    for name in ESTIMATORS:
        against = Against.of(samples[name], gradient)
        (trace, trace_half), (ratio, ratio_half) = (
            trace_interval(samples[name]),
            trace_ratio(samples[name], samples["return"]),
        )
        numbers = {"trace": trace, "trace_plus_minus": trace_half, "ratio": ratio, "ratio_plus_minus": ratio_half}
        rows.append({"estimator": name, "largest_z": against.z, "p": against.p, **numbers})
    return rows


def run(args: Args, run_dir: RunDirectory) -> None:
    """Exact checks, then the estimators on the same trajectories, then the same at other horizons."""
    run_dir.checks += exact_checks(args)
    exact, samples = all_estimates(args, args.horizon, args.seed)
    gradient = exact.gradient()
    run_dir.checks += sampled_checks(args, exact, samples)
    run_dir.write("training_curves.png", lesson.png(draw_variances(samples, gradient)))
    run_dir.write("scatter.png", lesson.png(draw_scatter(samples, gradient)))
    results = {"horizon": args.horizon, "gradient": gradient.tolist(), "estimators": table(samples, gradient)}
    run_dir.write("results.json", json.dumps(results, indent=2) + "\n")

    traces, lengths = measure_horizons(args, run_dir)
    run_dir.checks.append(horizon_check(args.horizons, traces))
    run_dir.write("horizons.png", lesson.png(draw_horizons(args.horizons, traces, lengths)))


if __name__ == "__main__":
    lesson.main(__file__)
