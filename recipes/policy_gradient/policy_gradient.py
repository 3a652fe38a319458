"""REINFORCE on CartPole: learn a policy from whole episodes, with and without a baseline.

**Problem.** A policy pi(a|s, theta) is a network that gives action probabilities. Which change of theta makes the expected
return J(theta) larger? The environment cannot be differentiated. The policy gradient theorem says it need not be:

    grad J(theta) = E_pi[ sum_t  G_t            grad log pi(A_t|S_t, theta) ]     REINFORCE
    grad J(theta) = E_pi[ sum_t (G_t - b(S_t))  grad log pi(A_t|S_t, theta) ]     REINFORCE with baseline
    G_t = R_{t+1} + gamma R_{t+2} + gamma^2 R_{t+3} + ...                         the reward-to-go

(Williams 1992, Machine Learning 8, pages 229-256, "episodic REINFORCE"; Sutton & Barto, 2nd edition, section 13.3 with
the update 13.8, and section 13.4 with 13.10 and 13.11.) The baseline b may be any function that does not depend on the
action, because E_pi[ b(s) grad log pi(A|s) ] = b(s) grad sum_a pi(a|s) = b(s) grad 1 = 0: it leaves the expected gradient
where it is and only changes the spread. On CartPole every reward is +1, so without a baseline *every* action of an episode
is made more likely and only the differences between episodes teach anything.

**What the run shows.** Several independent runs of both variants, from the same initial weights: learning curves, entropy,
the variance of the gradient with and without baseline *on the same episodes*, and how much of the return the baseline
explains. Greedy evaluation before and after, on episodes of its own.

**Time limits.** CartPole-v1 ends an episode after 500 steps (`truncated`), although the pole has not fallen. REINFORCE has
no value to put in place of what is cut off. What it maximizes is therefore the return *within the limit*, G_t ends where
the episode ends, and this is exact for that objective. It also means that the return depends on the time that is left,
which the observation does not tell. The baseline gets the elapsed time as an extra input (any function of state *and*
time is a legitimate baseline; Pardo et al. 2018, arXiv:1712.00378); the policy does not. The lesson `actor_critic` takes
the other view: there the limit is no part of the task and the value of the last state stands for the rest.

**How the code differs from the book.**
1. The book updates once per step with a factor gamma^t. The factor is left out, as everybody does: with gamma < 1 the
   update is then not the gradient of the discounted return (Nota & Thomas 2020, arXiv:1906.07073). With gamma = 1 it is.
2. One Adam step per batch of complete episodes instead of a plain step per episode; the learning rate falls linearly to 0.
3. The baseline is fitted by least squares on the returns of a batch *after* the batch has been used for the policy, so that
   it is independent of the actions it is subtracted from.
4. All runs are trained at once: `Networks` holds one small network per run and computes them with batched matrix products.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from llmcore_hf import lesson
from llmcore_hf.checks import Check

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmcore_hf.run_dir import RunDirectory

BASELINE, NO_BASELINE, GREY = "#1f77b4", "#d62728", "#555555"


@dataclass
class Args(lesson.LessonArguments):
    """Options of the lesson. The defaults are the full recipe; `toy.yaml` is a shorter one."""

    env_id: str = field(
        default="CartPole-v1",
        metadata={"help": "A Gymnasium environment with discrete actions, a flat Box observation and a time limit."},
    )
    gamma: float = field(default=0.99, metadata={"help": "Discount, in [0, 1)."})
    learning_rate: float = field(default=0.01, metadata={"help": "Of the policy; falls linearly to 0."})
    value_learning_rate: float = field(default=0.01, metadata={"help": "Of the baseline; constant."})
    hidden_size: int = field(
        default=32, metadata={"help": "Tanh units of the hidden layer, policy and baseline alike."}
    )
    num_runs: int = field(default=10, metadata={"help": "Independent runs of each of the two variants."})
    num_iterations: int = field(default=150, metadata={"help": "Policy updates of each run."})
    num_episodes: int = field(default=8, metadata={"help": "Complete episodes per update; at least 2."})
    value_steps: int = field(default=10, metadata={"help": "Gradient steps of the baseline after each policy update."})
    eval_episodes: int = field(default=100, metadata={"help": "Episodes of each greedy evaluation, per run."})
    target_return: float | None = field(
        default=None,
        metadata={
            "help": "Greedy return that counts as learned; the environment's own `reward_threshold` when not given "
            "(475 for CartPole-v1)."
        },
    )

    def problems(self) -> list[str]:
        found = lesson.environment_problems(self.env_id, time_limit=True)
        if not 0 <= self.gamma < 1:
            found.append(f"--gamma {self.gamma}: a discount lies in [0, 1)")
        for name in ("learning_rate", "value_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                found.append(f"--{name} {getattr(self, name)}: a learning rate is a number greater than 0")
        for name in ("hidden_size", "num_runs", "num_iterations", "value_steps", "eval_episodes"):
            if getattr(self, name) < 1:
                found.append(f"--{name} {getattr(self, name)}: at least 1 is needed")
        if self.num_episodes < 2:
            found.append(f"--num_episodes {self.num_episodes}: at least 2 are needed, to measure a variance")
        if self.target_return is not None and not math.isfinite(self.target_return):
            found.append(f"--target_return {self.target_return}: a finite number is needed")
        return found


class Networks(nn.Module):
    """`R` independent networks, one per run, computed together: Linear - Tanh - Linear.

    Weights carry the run as first axis. The last layer starts at 0, so every policy starts exactly uniform and every
    value at 0.
    """

    def __init__(self, n_runs: int, n_in: int, n_hidden: int, n_out: int, generator: torch.Generator) -> None:
        super().__init__()
        hidden = torch.randn(n_runs, n_in, n_hidden, generator=generator) / math.sqrt(n_in)
        self.hidden_weight = nn.Parameter(hidden)  # (R, n_in, H)
        self.hidden_bias = nn.Parameter(torch.zeros(n_runs, 1, n_hidden))
        self.out_weight = nn.Parameter(torch.zeros(n_runs, n_hidden, n_out))
        self.out_bias = nn.Parameter(torch.zeros(n_runs, 1, n_out))

    def forward(self, x: Tensor) -> Tensor:
        """(R, ..., n_in) -> (R, ..., n_out)"""
        rows = x.flatten(1, -2)  # (R, batch, n_in)
        hidden = torch.baddbmm(self.hidden_bias, rows, self.hidden_weight).tanh()
        return torch.baddbmm(self.out_bias, hidden, self.out_weight).unflatten(1, x.shape[1:-1])


@dataclass
class Episodes:
    """N complete episodes of each of R runs; steps after the end of an episode are padding, where `mask` is False."""

    observations: Tensor  # (R, T, N, D)
    actions: Tensor  # (R, T, N)
    rewards: Tensor  # (R, T, N), 0 in the padding
    mask: Tensor  # (R, T, N)

    def returns(self) -> Tensor:
        """Undiscounted return of each episode. (R, N)"""
        return self.rewards.sum(1)

    def lengths(self) -> Tensor:
        """Steps of each episode. (R, N)"""
        return self.mask.sum(1)


@torch.no_grad()
def rollout(
    env: gymnasium.vector.VectorEnv, policy: Networks, generator: torch.Generator, greedy: bool = False
) -> Episodes:
    """Play exactly one episode in each of the R x N environments.

    Taking whichever episodes end first would favour short ones, and the gradient would be biased. A vector environment
    resets itself after an end; what it plays from then on is padding.
    """
    n_runs, first_action = len(policy.out_bias), int(env.single_action_space.start)
    observation, _ = env.reset()
    alive = torch.ones(n_runs, env.num_envs // n_runs, dtype=torch.bool)  # (R, N)
    steps = []
    while alive.any():
        x = torch.as_tensor(observation, dtype=torch.float32).unflatten(0, alive.shape)  # (R, N, D)
        action = choose(policy(x), generator, greedy)
        observation, reward, terminated, truncated, _ = env.step(action.flatten().numpy() + first_action)
        reward = torch.as_tensor(reward, dtype=torch.float32).view(alive.shape)
        steps.append((x, action, reward * alive, alive))
        alive = alive & ~torch.as_tensor(terminated | truncated).view(alive.shape)
    return Episodes(*(torch.stack(column, dim=1) for column in zip(*steps, strict=True)))


def choose(logits: Tensor, generator: torch.Generator, greedy: bool) -> Tensor:
    """The most likely action, or one drawn from the policy. (R, N, A) -> (R, N)"""
    if greedy:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(logits.shape[:-1])


def rewards_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """G_t = R_{t+1} + gamma G_{t+1}, computed from the end; rewards in the padding are 0. (R, T, N) -> (R, T, N)"""
    result, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + gamma * following
        result[:, t] = following
    return result


def log_probabilities(logits: Tensor, actions: Tensor) -> Tensor:
    """log pi(A_t|S_t). (R, T, N, A), (R, T, N) -> (R, T, N)"""
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def policy_loss(logprobs: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Its gradient is minus the policy gradient: sum over the steps of an episode, mean over episodes.

    Args:
        logprobs: log pi(A_t|S_t). (R, T, N)
        weights: G_t, or G_t - b(S_t); a constant for the gradient. (R, T, N)
        mask: False in the padding. (R, T, N)

    Returns:
        One loss per run. (R,)
    """
    return -(logprobs * weights.detach() * mask).sum(1).mean(1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real steps of each run. (R, T, N) -> (R,)"""
    return (x * mask).sum((1, 2)) / mask.sum((1, 2))


def entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean entropy of the policy in nats, between 0 and log A. (R, T, N, A) -> (R,)"""
    logprobs = logits.log_softmax(-1)
    return masked_mean(-(logprobs.exp() * logprobs).sum(-1), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var[G - V] / Var[G] over the real steps of each run: 1 is perfect, 0 as good as a constant. (R, T, N) -> (R,)

    Not a finite number when the returns do not vary; the log then says null.
    """

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)[:, None, None]) ** 2, mask)

    return 1 - variance(returns - values) / variance(returns)


class Agents:
    """2R policies, the first R with a baseline and the others without; run i starts from the same weights in both."""

    def __init__(self, args: Args, n_observations: int, n_actions: int, max_steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.args, self.max_steps = args, max_steps
        self.policy = Networks(2 * args.num_runs, n_observations, args.hidden_size, n_actions, generator)
        self.value = Networks(args.num_runs, n_observations + 1, args.hidden_size, 1, generator)
        with torch.no_grad():
            self.policy.hidden_weight[args.num_runs :] = self.policy.hidden_weight[: args.num_runs]
        # Adam works elementwise, so that runs do not influence each other.
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=args.learning_rate)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=args.value_learning_rate)

    def values(self, episodes: Episodes) -> Tensor:
        """Baseline b(s, t) of the first R runs. (R, T, N)

        The network works in units of 1 / (1 - gamma), the return of one reward per step forever.
        """
        x = episodes.observations[: self.args.num_runs]  # (R, T, N, D)
        elapsed = torch.arange(x.shape[1]) / self.max_steps
        x = torch.cat([x, elapsed.view(1, -1, 1, 1).expand(*x.shape[:-1], 1)], dim=-1)
        return self.value(x).squeeze(-1) / (1 - self.args.gamma)

    def update(self, episodes: Episodes) -> dict[str, Tensor]:
        """One policy update of all runs, then the fit of the baselines. What was measured before it: (2R,) or (R,)"""
        n, mask = self.args.num_runs, episodes.mask
        returns = rewards_to_go(episodes.rewards, self.args.gamma)  # (2R, T, N)
        values = self.values(episodes).detach()  # (R, T, N)
        weights = torch.cat([returns[:n] - values, returns[n:]])
        logits = self.policy(episodes.observations)  # (2R, T, N, A)
        loss = policy_loss(log_probabilities(logits, episodes.actions), weights, mask)
        measured = {
            "return": episodes.returns().mean(1),
            "episode_length": episodes.lengths().float().mean(1),
            "policy_loss": loss.detach(),
            "entropy": entropy(logits.detach(), mask),
            "explained_variance": explained_variance(values, returns[:n], mask[:n]),
            "gradient_variance": gradient_variance(self.policy, episodes, weights, slice(0, n)),
            "gradient_variance_without": gradient_variance(self.policy, episodes, returns, slice(0, n)),
        }
        self.policy_optimizer.zero_grad()
        loss.sum().backward()
        self.policy_optimizer.step()
        return {**measured, "value_loss": self.fit_values(episodes, returns[:n])}

    def fit_values(self, episodes: Episodes, returns: Tensor) -> Tensor:
        """Some steps of least squares towards the returns. The mean squared error before them: (R,)"""
        mask, errors = episodes.mask[: self.args.num_runs], []
        for _ in range(self.args.value_steps):
            error = masked_mean((self.values(episodes) - returns) ** 2, mask)  # (R,)
            errors.append(error.detach())
            self.value_optimizer.zero_grad()
            error.sum().backward()
            self.value_optimizer.step()
        return errors[0]


def episode_gradients(policy: Networks, episodes: Episodes, weights: Tensor, runs: slice) -> Tensor:
    """Policy gradient estimated from each single episode. (R, N, P)

    Every episode gets a copy of its run's network, so that one backward pass keeps the gradients apart.
    """
    n_episodes = episodes.mask.shape[2]
    copies = {
        name: weight.detach()[runs].repeat_interleave(n_episodes, dim=0).requires_grad_()
        for name, weight in policy.named_parameters()
    }

    def alone(x: Tensor) -> Tensor:
        """(R, T, N, ...) -> (R * N, T, 1, ...)"""
        return x[runs].transpose(1, 2).flatten(0, 1).unsqueeze(2)

    logits = torch.func.functional_call(policy, copies, (alone(episodes.observations),))
    logprobs = log_probabilities(logits, alone(episodes.actions))
    loss = policy_loss(logprobs, alone(weights), alone(episodes.mask)).sum()
    gradients = torch.autograd.grad(loss, list(copies.values()))
    return -torch.cat([g.flatten(1) for g in gradients], dim=1).unflatten(0, (-1, n_episodes))


def gradient_variance(policy: Networks, episodes: Episodes, weights: Tensor, runs: slice) -> Tensor:
    """Trace of the covariance of the gradient from one episode, estimated over the N of a batch. (R,)"""
    return episode_gradients(policy, episodes, weights, runs).var(dim=1).sum(-1)


def train(args: Args, agents: Agents, env: Any, generator: torch.Generator, run_dir: RunDirectory) -> dict[str, Tensor]:
    """All iterations, each logged as means over runs. Curves of every run: (iterations, 2R) or (iterations, R)"""
    rows = []
    for iteration in range(args.num_iterations):
        for group in agents.policy_optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - iteration / args.num_iterations)
        rows.append(agents.update(rollout(env, agents.policy, generator)))
        run_dir.log(log_row((iteration + 1) * args.num_episodes, rows[-1], args.num_runs))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def log_row(step: int, measured: dict[str, Tensor], n: int) -> dict[str, Any]:
    """A row of the log history: means over the `n` runs with baseline, and `no_baseline/...` over the others."""
    row: dict[str, Any] = {"step": step}
    for name, values in measured.items():
        row[name] = values[:n].mean().item()
        if len(values) > n:
            row[f"no_baseline/{name}"] = values[n:].mean().item()
    return row


# A world of two states that can be counted out: action 0 in state 0 and action 1 in state 1 end the episode, the other
# actions change the state, and a time limit ends it after three steps.
TINY_ENDS = ((True, False), (False, True))
TINY_REWARDS = ((1.0, 0.0), (2.0, -1.0))
TINY_STEPS = 3


def tiny_episodes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every sequence of actions in the tiny world, each as a run with one episode.

    Returns:
        states, actions, rewards, mask, all of shape (8, 3, 1). In the padding the state stays and the reward is 0.
    """
    rows = []
    for actions in itertools.product((0, 1), repeat=TINY_STEPS):
        state, alive = 0, True
        for action in actions:
            rows.append((state, action, TINY_REWARDS[state][action] * alive, alive))
            alive = alive and not TINY_ENDS[state][action]
            state = 1 - state if alive else state
    states, chosen, rewards, mask = (torch.tensor(column).view(-1, TINY_STEPS, 1) for column in zip(*rows, strict=True))
    return states, chosen, rewards.double(), mask


def exact_gradients(theta: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of the policy gradient theorem in the tiny world, without sampling.

    Args:
        theta: logits of a tabular policy, float64. (S, A) = (2, 2)
        baseline: b(s), any numbers. (S,)

    Returns:
        The gradient of J by central differences, and minus the expected gradient of `policy_loss`. (S, A) each
    """
    states, actions, rewards, mask = tiny_episodes()

    def logprobs(theta: Tensor) -> Tensor:
        return log_probabilities(theta[states], actions)  # (8, 3, 1)

    def probability(theta: Tensor) -> Tensor:  # actions in the padding are free: one half each
        return torch.where(mask, logprobs(theta).exp(), 0.5).prod(1).squeeze(1)  # (8,)

    def expected_return(theta: Tensor) -> float:
        return (probability(theta) * rewards.sum((1, 2))).sum().item()

    differences, h = torch.zeros_like(theta), 1e-5
    for i in range(theta.numel()):
        shift = torch.zeros_like(theta)
        shift.view(-1)[i] = h
        differences.view(-1)[i] = (expected_return(theta + shift) - expected_return(theta - shift)) / (2 * h)
    theta = theta.clone().requires_grad_()
    weights = rewards_to_go(rewards, gamma=1.0) - baseline[states]
    losses = policy_loss(logprobs(theta), weights, mask)  # (8,), one per sequence
    (gradient,) = torch.autograd.grad((probability(theta).detach() * losses).sum(), theta)
    return differences, -gradient


def theorem_checks() -> list[Check]:
    """The loss gives the gradient of the expected return, and a baseline does not change that: exact, by counting."""
    theta = torch.tensor([[0.3, -0.2], [-0.4, 0.5]], dtype=torch.float64)  # any policy will do
    baseline = torch.tensor([7.0, -13.0], dtype=torch.float64)
    exact, without = exact_gradients(theta, torch.zeros_like(baseline))
    _, subtracted = exact_gradients(theta, baseline)
    error = (exact - without).abs().max().item()
    shift = (subtracted - without).abs().max().item()
    return [
        Check(
            "policy_gradient.loss_gives_gradient_of_return",
            "invariant",
            error < 1e-8,
            {"largest_difference": error, "largest_component": exact.abs().max().item()},
            "expected gradient of the loss = finite differences of J (float64), within 1e-8",
            "在可穷举的小环境里，损失的期望梯度应等于期望回报的数值梯度；不等说明符号、掩码或 reward-to-go 写错了。",
            "In a world small enough to enumerate, the expected gradient of the loss is the gradient of the expected "
            "return; if not, the sign, the mask or the reward-to-go is wrong.",
        ),
        Check(
            "policy_gradient.baseline_keeps_the_gradient",
            "invariant",
            shift < 1e-12,
            shift,
            "a baseline of (7, -13) moves the expected gradient by 0, within 1e-12",
            "基线不依赖动作，期望梯度不变；变了说明基线依赖了动作，或填充步没有被掩掉。",
            "A baseline that does not depend on the action leaves the expected gradient alone; if it moves, it depends "
            "on the action or padding was counted.",
        ),
    ]


def returns_check(episodes: Episodes, gamma: float) -> Check:
    """The recursion from the end against the sum of the definition, in float64, on real episodes of the first run."""
    rewards = episodes.rewards[:1].double()
    fast = rewards_to_go(rewards, gamma)[0]  # (T, N)
    powers = gamma ** torch.arange(len(fast), dtype=torch.float64)
    sums = torch.stack([(powers[: len(fast) - t, None] * rewards[0, t:]).sum(0) for t in range(len(fast))])
    error = (fast - sums).abs().max().item()
    return Check(
        "policy_gradient.returns_match_definition",
        "invariant",
        error < 1e-9,
        error,
        "recursion = sum of gamma^k R_{t+k+1}, within 1e-9",
        "从后往前的递推应等于回报的定义式求和；不等说明折扣或步序写错了。",
        "The recursion from the end equals the sum that defines the return; if not, the discount or the index is wrong.",
    )


def entropy_check(curves: dict[str, Tensor], n_actions: int) -> Check:
    """Uniform at the start, and never out of range."""
    values, top = curves["entropy"], math.log(n_actions)
    observed = {"first": values[0].mean().item(), "smallest": values.min().item(), "largest": values.max().item()}
    starts_uniform = bool((values[0] - top).abs().max() < 1e-5)
    return Check(
        "policy_gradient.entropy_in_range",
        "invariant",
        starts_uniform and bool(values.min() >= 0) and bool(values.max() <= top + 1e-5),
        observed,
        f"starts at log {n_actions} = {top:.4f} and stays in [0, log {n_actions}]",
        "输出层为零，策略从均匀分布开始，熵为 log A，此后不会超出 [0, log A]；超出说明熵算错或填充步混入。",
        "The last layer starts at 0, so the policy starts uniform; entropy outside [0, log A] is computed wrongly.",
    )


def learning_checks(args: Args, curves: dict[str, Tensor], before: Tensor, after: Tensor) -> list[Check]:
    """Has the policy with baseline learned, and what did the baseline do? Judged over runs.

    Seen over seeds 42, 1, 2, 3, 4: worst greedy return 288 to 499 in the toy (bound 150) and 492 to 499 in the full recipe
    (475); smallest ratio of variances 4.1 to 8.9, and 131 to 344; explained variance of the last quarter 0.53 to 0.59, and
    0.97 to 0.98.
    """
    n, last = args.num_runs, slice(-max(1, args.num_iterations // 4), None)
    target = args.target_return if args.target_return is not None else reward_threshold(args.env_id)
    worst, explained = after[:n].min().item(), curves["explained_variance"]
    log_ratio = (curves["gradient_variance_without"] / curves["gradient_variance"]).log()[last].mean(0)  # (R,)
    ratio, smallest_ratio = log_ratio.mean().exp().item(), log_ratio.min().exp().item()
    return [
        Check(
            "policy_gradient.greedy_return_reached_target",
            "learning",
            None if target is None else worst >= target,
            {"before": before[:n].mean().item(), "after": after[:n].mean().item(), "worst_run": worst},
            "no target is known" if target is None else f"every run with baseline: at least {target:g}",
            "贪心策略在独立评估回合上的平均回报未达目标：检查学习率、梯度符号与每批回合数。",
            "The greedy return on separate episodes missed the target: look at the learning rate, the sign of the loss "
            "and the number of episodes per update.",
        ),
        Check(
            "policy_gradient.baseline_reduces_gradient_variance",
            "learning",
            smallest_ratio > 1,
            {"ratio": ratio, "smallest_over_runs": smallest_ratio},
            "in every run, over the last quarter: variance without baseline / with baseline > 1, on the same episodes",
            "同一批回合上，减去基线后的梯度方差应更小；没有变小说明基线没学到回报，或减错了时间步。",
            "On the same episodes the gradient varies less with the baseline; if not, the baseline has not learned the "
            "returns or is subtracted at the wrong step.",
        ),
        Check(
            "policy_gradient.explained_variance_rose",
            "learning",
            bool(explained[last].mean() > max(0.0, explained[0].mean().item())),
            {"first": explained[0].mean().item(), "last_quarter": explained[last].mean().item()},
            "mean of the last quarter is above the first value and above 0",
            "基线从 0 开始学习，对回报的解释方差应上升；不上升说明价值网络没有拟合到回报。",
            "The baseline starts at 0 and should come to explain the returns; if not, its fit does not work.",
        ),
    ]


def reward_threshold(env_id: str) -> float | None:
    """The return at which Gymnasium calls the environment solved; None when it does not say."""
    return gymnasium.spec(env_id).reward_threshold


def curves_figure(args: Args, curves: dict[str, Tensor], n_actions: int) -> Figure:
    """Return, gradient variance, entropy and explained variance, over episodes. Mean and range of the runs."""
    plt = lesson.pyplot()

    n = args.num_runs
    step = torch.arange(1, args.num_iterations + 1) * args.num_episodes
    figure, axes = plt.subplots(2, 2, figsize=(12.4, 8.2), layout="constrained", sharex=True)
    figure.suptitle(
        f"REINFORCE on {args.env_id}: {n} runs with and {n} without a baseline (line: mean, band: range of the runs)",
        fontweight="bold",
    )
    panel(axes[0, 0], "Does a baseline help to learn?", "return of an episode (policy sampled)")
    band(axes[0, 0], step, curves["return"][:, n:], NO_BASELINE, "without baseline")
    band(axes[0, 0], step, curves["return"][:, :n], BASELINE, "with baseline")
    if (solved := reward_threshold(args.env_id)) is not None:
        axes[0, 0].axhline(solved, color=GREY, linestyle=":", label=f"solved: {solved:g}")
    axes[0, 0].margins(y=0.15)
    panel(axes[0, 1], "How noisy is the gradient, on the same episodes?", "trace of the covariance (one episode)")
    band(axes[0, 1], step, curves["gradient_variance_without"], NO_BASELINE, r"weight $G_t$")
    band(axes[0, 1], step, curves["gradient_variance"], BASELINE, r"weight $G_t - b(S_t, t)$")
    axes[0, 1].set_yscale("log")
    panel(axes[1, 0], "Does the policy still explore?", "entropy (nats)")
    band(axes[1, 0], step, curves["entropy"][:, n:], NO_BASELINE, "without baseline")
    band(axes[1, 0], step, curves["entropy"][:, :n], BASELINE, "with baseline")
    axes[1, 0].axhline(math.log(n_actions), color=GREY, linestyle=":", label=f"uniform: log {n_actions}")
    axes[1, 0].set_ylim(0, 1.1 * math.log(n_actions))
    panel(axes[1, 1], "How much of the return does the baseline foresee?", "explained variance")
    band(axes[1, 1], step, curves["explained_variance"], BASELINE, "baseline")
    axes[1, 1].axhline(1, color=GREY, linestyle=":", label="perfect")
    axes[1, 1].set_ylim(-0.55, 1.1)
    for axis in axes.flat:
        axis.legend(frameon=False, fontsize=9)
    for axis in axes[1]:
        axis.set_xlabel("episodes of each run")
    return figure


def panel(axis: Axes, title: str, label: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_ylabel(label)
    axis.grid(alpha=0.25)


def band(axis: Axes, step: Tensor, runs: Tensor, color: str, label: str) -> None:
    """Mean of the runs as a line, their range as a band. runs: (iterations, R)"""
    axis.fill_between(step, runs.amin(1), runs.amax(1), color=color, alpha=0.15, linewidth=0)
    axis.plot(step, runs.mean(1), color=color, linewidth=1.8, label=label)


def policy_figure(before: Networks, after: Networks, start: Episodes, end: Episodes) -> Figure:
    """CartPole: probability of pushing right over pole angle and angular velocity, cart at rest in the middle.

    Dots are states that the policy visits in greedy episodes.
    """
    plt = lesson.pyplot()

    figure, axes = plt.subplots(1, 2, figsize=(11.6, 5.0), layout="constrained", sharey=True)
    figure.suptitle("When does the policy push the cart to the right? (first run with baseline)", fontweight="bold")
    angle, velocity = torch.meshgrid(torch.linspace(-0.21, 0.21, 121), torch.linspace(-2.5, 2.5, 121), indexing="xy")
    states = torch.stack([torch.zeros_like(angle), torch.zeros_like(angle), angle, velocity], dim=-1)  # (121, 121, 4)
    for axis, policy, episodes, when in ((axes[0], before, start, "Before"), (axes[1], after, end, "After")):
        with torch.no_grad():
            grid = states.expand(len(policy.out_bias), *states.shape)
            right = policy(grid).softmax(-1)[0, ..., 1]  # (121, 121)
        picture = axis.pcolormesh(
            angle.rad2deg().numpy(), velocity.numpy(), right.numpy(), cmap="RdBu_r", vmin=0, vmax=1, shading="gouraud"
        )
        seen = episodes.observations[0, :, :8][episodes.mask[0, :, :8]]  # (steps, D), of 8 episodes
        seen = seen[:: max(1, len(seen) // 400)]
        axis.scatter(
            seen[:, 2].rad2deg(), seen[:, 3], s=5, color="black", alpha=0.35, linewidths=0, label="states visited"
        )
        axis.legend(loc="lower right", fontsize=9, markerscale=2.5)
        length = episodes.lengths()[0].float().mean()
        axis.set_title(f"{when} training: greedy episodes last {length:.0f} steps", fontsize=11)
        axis.set_xlabel("pole angle (degrees, positive = leans right)")
        axis.set_xlim(-12, 12)
        axis.set_ylim(-2.5, 2.5)
    axes[0].set_ylabel("angular velocity of the pole (rad/s)")
    figure.colorbar(picture, ax=axes, label="probability of pushing right")
    return figure


def policy_file(args: Args, policy: Networks, eval_return: float) -> bytes:
    """Policy of the first run with baseline as safetensors, under the names of nn.Sequential(Linear, Tanh, Linear)."""
    from safetensors.torch import save

    tensors = {
        "0.weight": policy.hidden_weight[0].T,
        "0.bias": policy.hidden_bias[0, 0],
        "2.weight": policy.out_weight[0].T,
        "2.bias": policy.out_bias[0, 0],
    }
    facts = {
        "lesson": "policy_gradient",
        "env_id": args.env_id,
        "seed": args.seed,
        "gamma": args.gamma,
        "episodes": args.num_iterations * args.num_episodes,
        "eval_return": eval_return,
    }
    return save(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        metadata={name: str(value) for name, value in facts.items()},
    )


def run(args: Args, run_dir: RunDirectory) -> None:
    """Evaluate, train, evaluate again, check, and write the evidence."""
    n = args.num_runs
    # Streams of random numbers that have nothing to do with each other: evaluation never repeats a training episode.
    streams = [int(seed) for seed in np.random.SeedSequence(args.seed).generate_state(4)]
    env = gymnasium.make_vec(args.env_id, num_envs=2 * n * args.num_episodes)
    eval_env = gymnasium.make_vec(args.env_id, num_envs=2 * n * args.eval_episodes)
    env.reset(seed=streams[0])
    eval_env.reset(seed=streams[1])
    n_actions = int(env.single_action_space.n)
    max_steps = gymnasium.spec(args.env_id).max_episode_steps
    assert max_steps is not None  # `problems` has seen to it
    agents = Agents(args, env.single_observation_space.shape[0], n_actions, max_steps, seed=streams[2])
    generator = torch.Generator().manual_seed(streams[3])

    untrained = copy.deepcopy(agents.policy)
    start = rollout(eval_env, agents.policy, generator, greedy=True)
    before = start.returns().mean(1)  # (2R,)
    run_dir.log(log_row(0, {"eval_return": before}, n))
    curves = train(args, agents, env, generator, run_dir)
    end = rollout(eval_env, agents.policy, generator, greedy=True)
    after = end.returns().mean(1)
    run_dir.log(log_row(args.num_iterations * args.num_episodes, {"eval_return": after}, n))

    run_dir.checks += theorem_checks()
    run_dir.checks += [returns_check(end, args.gamma), entropy_check(curves, n_actions)]
    run_dir.checks += learning_checks(args, curves, before, after)
    run_dir.write("policy.safetensors", policy_file(args, agents.policy, after[0].item()))
    results = {
        "baseline": {"before": before[:n].tolist(), "after": after[:n].tolist()},
        "no_baseline": {"before": before[n:].tolist(), "after": after[n:].tolist()},
    }
    run_dir.write("results.json", json.dumps(results, indent=2) + "\n")
    run_dir.write("training_curves.png", lesson.png(curves_figure(args, curves, n_actions)))
    if args.env_id.startswith("CartPole"):
        figure = policy_figure(untrained, agents.policy, start, end)
        run_dir.write("policy_before_after.png", lesson.png(figure))
    env.close()
    eval_env.close()


if __name__ == "__main__":
    lesson.main(__file__)
