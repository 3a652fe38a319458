"""Generalized advantage estimation: how much to trust the critic, and how much the rewards that really came.

A policy gradient multiplies grad log pi(a_t | s_t) by an estimate of the advantage A(s_t, a_t) = Q(s_t, a_t) - V(s_t).
With a critic V that is not exact there is a choice. The one-step residual

    delta_t = r_{t+1} + gamma V(s_{t+1}) - V(s_t)                                          Schulman et al. 2016, eq. 11

has a small spread and all of the critic's bias. The return minus V(s_t) has no bias and all of the spread of a whole
episode. GAE(gamma, lambda) averages over everything in between: the exponentially weighted mean of the n-step
advantages, which telescopes to a sum of residuals,

    A_t = (1 - lambda) (A_t^(1) + lambda A_t^(2) + lambda^2 A_t^(3) + ...)                  eq. 16, first line
        = sum_k (gamma lambda)^k delta_{t+k},                                               eq. 16, last line

and is computed from the back: A_t = delta_t + gamma lambda A_{t+1}. GAE(0) is delta_t (eq. 17), GAE(1) is the Monte Carlo
return minus V(s_t) (eq. 18). A_t + V(s_t) is the lambda-return of Sutton & Barto (2nd ed., eq. 12.2), which is why the
sum also serves as the critic's target. (John Schulman et al., "High-Dimensional Continuous Control Using Generalized
Advantage Estimation", ICLR 2016, arXiv:1506.02438.)

Where an episode ends, two questions have two different answers:

                                      terminated     truncated (time limit), or the batch ends
    bootstrap from V(s_{t+1})?        no, it is 0    yes, from the observation the action reached
    does A_{t+1} flow into A_t?       no             no

What the run shows:
1. On the 19-state random walk (Sutton & Barto, Example 7.1) with a critic that is known to be wrong, bias and spread of
   GAE for each lambda: exactly, by linear equations, and measured from sampled episodes.
2. What each mistake at an episode's end does to the advantages of the steps before it.
3. Return on CartPole for each lambda, over many seeds that train side by side, with 95 % confidence intervals.

How this differs from the papers and from common code: the walk is discounted (gamma < 1), as GAE is used; the book's is
not. The policy of the walk is fixed, so an "advantage" there is the lambda-return's deviation from the critic. CartPole
is trained with one gradient step per batch (A2C with Adam), not with TRPO as in the paper nor with PPO. `gae` takes the
value of the observation that each action *reached*, one per step; CleanRL takes the value of the next row instead and
treats truncation as termination, Stable-Baselines3 adds gamma V(final observation) to the reward. On the data of each
the results are the same to the last bit (row loop).
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from torch import Tensor

from llmcore_hf import lesson
from llmcore_hf.checks import Check
from llmcore_hf.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llmcore_hf.run_dir import RunDirectory


@dataclass
class Args(lesson.LessonArguments):
    lambdas: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0],
        metadata={"help": "Values of lambda to compare on the walk, ascending, each in [0, 1]."},
    )
    train_lambdas: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0],
        metadata={"help": "Values of lambda to train with, ascending, each in [0, 1]."},
    )
    gamma: float = field(default=0.99, metadata={"help": "Discount, in [0, 1)."})
    critic_scale: float = field(
        default=0.5, metadata={"help": "Critic of the walk = this times the exact values: 1 is perfect, 0 untrained."}
    )
    walk_episodes: int = field(
        default=50_000,
        metadata={"help": "Sampled episodes per starting state of the walk, rounded up to a multiple of 250."},
    )
    env_id: str = field(
        default="CartPole-v1",
        metadata={"help": "Gymnasium environment with discrete actions and a flat Box of observations."},
    )
    num_seeds: int = field(default=20, metadata={"help": "Independent training runs per lambda, 5 at least."})
    total_timesteps: int = field(default=200_000, metadata={"help": "Steps of the environment per training run."})
    num_envs: int = field(default=8, metadata={"help": "Parallel environments per training run."})
    num_steps: int = field(default=64, metadata={"help": "Steps per environment between two updates."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Adam's learning rate; it falls linearly to 0."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the two hidden layers of actor and critic."})
    ent_coef: float = field(default=0.01, metadata={"help": "Weight of the entropy bonus."})
    vf_coef: float = field(default=0.5, metadata={"help": "Weight of the critic's loss."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Gradients are clipped to this norm, run by run."})

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.gamma < 1:
            found.append(f"--gamma {self.gamma}: a discount is in [0, 1)")
        for name in ("lambdas", "train_lambdas"):
            lambdas = getattr(self, name)
            if not lambdas or not all(0 <= lam <= 1 for lam in lambdas):
                found.append(f"--{name} {_spaced(lambdas)}: give at least one number, each in [0, 1]")
            elif lambdas != sorted(set(lambdas)):
                found.append(f"--{name} {_spaced(lambdas)}: they must ascend, each given once")
        if not math.isfinite(self.critic_scale):
            found.append(f"--critic_scale {self.critic_scale}: must be a finite number")
        for name in ("num_envs", "num_steps", "hidden_size"):
            if getattr(self, name) < 1:
                found.append(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.walk_episodes < 2:
            found.append(f"--walk_episodes {self.walk_episodes}: a spread needs at least 2")
        if self.num_seeds < 5:
            found.append(f"--num_seeds {self.num_seeds}: a confidence interval needs at least 5 runs")
        if min(self.num_envs, self.num_steps) > 0 and self.total_timesteps < 10 * self.num_envs * self.num_steps:
            found.append(
                f"--total_timesteps {self.total_timesteps}: must allow 10 updates of --num_envs times --num_steps, "
                f"that is {10 * self.num_envs * self.num_steps}"
            )
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                found.append(f"--{name} {getattr(self, name)}: must be a finite number above 0")
        for name in ("ent_coef", "vf_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"--{name} {getattr(self, name)}: must be a finite number, 0 or more")
        return found + lesson.environment_problems(self.env_id)


def _spaced(numbers: list[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


# ---------------------------------------------------------------------------------------------------------------------
# The estimator
# ---------------------------------------------------------------------------------------------------------------------

# T = 2048, float32, one core; milliseconds, lower quartile of 25 calls:
#     environments                1      8     64    128    256   1024   4096
#     torch, row by row        39.7   40.0   40.6   41.0   41.5   45.6   60.5
#     numpy, row by row        1.50   1.52   1.66   1.79   2.07   8.64   28.8
#     backward_rows            2.78   1.24   1.34   1.48   1.77   4.17   13.9
#     backward_scan            0.12   0.16   0.63   1.17   2.13   7.57   25.6
FEW_ENVS = 128  # up to here the scan is faster
CHUNK = 2**16  # elements at a time, so that they stay in the cache between two passes


class Steps(NamedTuple):
    """T steps of N environments, each field (T, N)."""

    rewards: Tensor  # float32 or float64; what followed the action of step t
    values: Tensor  # V of the observation at step t
    next_values: Tensor  # V of the observation that the action *reached*; see `gae`
    terminated: Tensor  # bool, the environment reached a terminal state
    truncated: Tensor  # bool, the episode was cut short (time limit)


def td_residuals(steps: Steps, gamma: float) -> Tensor:
    """delta_t = r_{t+1} + gamma V(s_{t+1}) - V(s_t), where V of a terminal state is 0 whatever the critic says. # (T, N)"""
    following = torch.where(steps.terminated, 0.0, steps.next_values)
    return following.mul_(gamma).add_(steps.rewards).sub_(steps.values)


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Advantages A_t = delta_t + gamma lambda (1 - done_t) A_{t+1} of T steps in N environments.

    Args:
        rewards, values, next_values, terminated, truncated: the fields of `Steps`. next_values hold, at truncation, V of
            the final observation of the episode and not of the first one of the next; in the last row, V of the
            observation after the batch. They are ignored where `terminated`.
        gamma, lam: discount and lambda.

    Returns:
        (T, N), without gradient.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    steps = _checked(Steps(rewards, values, next_values, terminated, truncated))
    length, envs = rewards.shape
    few = envs <= FEW_ENVS or rewards.device.type != "cpu"
    backward = backward_scan if few else backward_rows
    advantages = _empty_like(steps.rewards)
    following = torch.zeros_like(steps.rewards[0])  # (N,) A_{t+1} of the last row; next_values bootstraps there
    rows = max(1, CHUNK // envs)
    for end in range(length, 0, -rows):
        part = slice(max(0, end - rows), end)
        backward(Steps(*(tensor[part] for tensor in steps)), gamma, lam, following, advantages[part])
        following = advantages[part][0]
    return advantages


def _empty_like(tensor: Tensor) -> Tensor:
    """Room for the result. On a CPU from numpy, which asks the system for huge pages: 32 MB in 2 ms and not in 35."""
    if tensor.device.type != "cpu":
        return torch.empty_like(tensor)
    return torch.from_numpy(np.empty(tensor.shape, tensor.numpy().dtype))


def _checked(steps: Steps) -> Steps:
    shapes = [tuple(tensor.shape) for tensor in steps]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(f"gae takes five tensors of one shape (T, N), not {', '.join(map(str, shapes))}")
    if {steps.terminated.dtype, steps.truncated.dtype} != {torch.bool}:
        raise ValueError(
            f"terminated and truncated must be bool, not {steps.terminated.dtype}, {steps.truncated.dtype}"
        )
    numbers = [tensor.dtype for tensor in steps[:3]]
    if len(set(numbers)) > 1 or numbers[0] not in (torch.float32, torch.float64):
        found = ", ".join(map(str, numbers))
        raise ValueError(f"rewards, values and next_values must all be float32 or all float64, not {found}")
    return Steps(*(tensor.detach() for tensor in steps))


def backward_rows(steps: Steps, gamma: float, lam: float, following: Tensor, out: Tensor) -> None:
    """A_t = delta_t + w_t A_{t+1}, row by row, as every reference does: (T, N) in CPU memory, `following` (N,) = A_T.

    numpy, because a call costs it a third of what it costs torch, and at two calls per row that is what counts.
    """
    deltas = out.numpy()
    np.multiply(steps.next_values.numpy(), gamma, out=deltas)
    np.copyto(deltas, 0, where=steps.terminated.numpy())
    deltas += steps.rewards.numpy()
    deltas -= steps.values.numpy()
    done = (steps.terminated | steps.truncated).numpy()
    weights = np.multiply(~done, deltas.dtype.type(gamma * lam))
    later = following.numpy()
    for row, weight in zip(deltas[::-1], weights[::-1], strict=True):
        np.multiply(weight, later, out=weight)
        np.add(row, weight, out=row)
        later = row


def backward_scan(steps: Steps, gamma: float, lam: float, following: Tensor, out: Tensor) -> None:
    """The same by doubling: after pass k each row holds the sum over its next 2^k rows. log2(T) passes. # (T, N)

    The sum over two neighbouring spans is sum_1 + (product of the weights of span 1) sum_2, which is associative: a
    parallel scan (Hillis & Steele 1986; Blelloch 1990). More arithmetic than the row loop, fewer calls, any device.
    """
    sums = td_residuals(steps, gamma)
    weights = (~(steps.terminated | steps.truncated)).to(sums.dtype).mul_(gamma * lam)
    sums[-1].addcmul_(weights[-1], following)
    span = 1
    while span < len(sums):
        longer = sums.clone()
        longer[:-span].addcmul_(weights[: len(sums) - span], sums[span:])
        sums, weights, span = longer, weights[:-span] * weights[span:], 2 * span
    out.copy_(sums)


# ---------------------------------------------------------------------------------------------------------------------
# The random walk: exact bias and spread, and the same by sampling
# ---------------------------------------------------------------------------------------------------------------------

# Sutton & Barto, Example 7.1: left or right with probability 1/2, -1 beyond the left end, +1 beyond the right one.
STATES = 19
# The longest sampled episode. About 2 in 1000 are longer: cut there, with gamma^500 = .0066 of the critic's error left.
HORIZON = 500
BATCH = 250  # episodes per state sampled at a time


@dataclass(frozen=True)
class Walk:
    """The walk with its critic. Index 0 of the last axis means a step to the left, 1 to the right."""

    transitions: Tensor  # (S, S) probabilities among non-terminal states
    values: Tensor  # (S,) exact
    critic: Tensor  # (S,) wrong on purpose
    gamma: float

    @classmethod
    def make(cls, gamma: float, critic_scale: float) -> Walk:
        transitions = torch.zeros(STATES, STATES, dtype=torch.float64)
        transitions.diagonal(1).fill_(0.5)
        transitions.diagonal(-1).fill_(0.5)
        rewards = torch.zeros(STATES, dtype=torch.float64)  # expected
        rewards[0], rewards[-1] = -0.5, 0.5
        values = torch.linalg.solve(torch.eye(STATES, dtype=torch.float64) - gamma * transitions, rewards)
        return cls(transitions, values, critic_scale * values, gamma)

    def outcomes(self) -> tuple[Tensor, Tensor]:
        """Per state and direction: reward - (S, 2) - and the critic's value of where it leads - (S, 2)."""
        rewards = torch.zeros(STATES, 2, dtype=torch.float64)
        rewards[0, 0], rewards[-1, 1] = -1.0, 1.0
        return rewards, _left_right(self.critic)


def _left_right(x: Tensor) -> Tensor:
    """x of the left and of the right neighbour, 0 beyond the ends: (S,) -> (S, 2)."""
    padded = torch.nn.functional.pad(x, (1, 1))
    return torch.stack([padded[:-2], padded[2:]], dim=1)


def exact_moments(walk: Walk, lam: float) -> tuple[Tensor, Tensor]:
    """Bias of the lambda-return A + critic as an estimate of v, and standard deviation of A, per starting state.

    A(s) = delta + c A(s') with c = gamma lambda and s' independent of what follows, so that both moments solve linear
    equations:  m = E[delta] + c P m   and   q = E[delta^2 + 2 c delta m(s')] + c^2 P q.

    Returns:
        (S,) bias and (S,) standard deviation, float64.
    """
    c = walk.gamma * lam
    rewards, reached = walk.outcomes()
    deltas = rewards + walk.gamma * reached - walk.critic[:, None]  # (S, 2)
    eye = torch.eye(STATES, dtype=torch.float64)
    mean = torch.linalg.solve(eye - c * walk.transitions, deltas.mean(1))
    squares = (deltas.square() + 2 * c * deltas * _left_right(mean)).mean(1)
    second = torch.linalg.solve(eye - c * c * walk.transitions, squares)
    return mean + walk.critic - walk.values, (second - mean.square()).clamp(min=0).sqrt()


def bias_formula(walk: Walk, lam: float) -> Tensor:
    """The same bias in closed form: the discounted error of the critic along the way. # (S,)

    gamma (1 - lambda) P (I - gamma lambda P)^{-1} (critic - v): each n-step return bootstraps once, from the critic.
    """
    system = torch.eye(STATES, dtype=torch.float64) - walk.gamma * lam * walk.transitions
    error = torch.linalg.solve(system, walk.critic - walk.values)
    return walk.gamma * (1 - lam) * walk.transitions @ error


def sample_episodes(walk: Walk, per_state: int, generator: torch.Generator) -> Steps:
    """`per_state` episodes from every state, side by side, (T, S * per_state).

    A column goes on after its episode has ended; nothing of that flows back past the end.
    """
    start = torch.arange(STATES).repeat_interleave(per_state)  # (N,)
    moves = 2 * torch.randint(0, 2, (HORIZON, len(start)), generator=generator, dtype=torch.int32) - 1
    positions = torch.cat([start[None], start + moves.cumsum(0)])  # (T + 1, N)
    values = walk.critic[positions.clamp(0, STATES - 1)]
    right, left = positions[1:] >= STATES, positions[1:] < 0  # (T, N)
    truncated = torch.zeros_like(right)
    truncated[-1] = True
    return Steps(right.double() - left.double(), values[:-1], values[1:], right | left, truncated)


@dataclass
class Measured:
    """Means of powers 1 to 4 of A_0 over sampled episodes, (4, lambdas, S)."""

    powers: Tensor
    episodes: int

    def mean(self) -> Tensor:
        return self.powers[0]

    def variance(self) -> Tensor:
        return self.powers[1] - self.powers[0].square()

    def standard_errors(self) -> tuple[Tensor, Tensor]:
        """Of the mean and of the variance, the latter (mu_4 - sigma^4 (n - 3) / (n - 1)) / n under the root."""
        m1, m2, m3, m4 = self.powers
        fourth = m4 - 4 * m3 * m1 + 6 * m2 * m1.square() - 3 * m1.pow(4)
        n, variance = self.episodes, self.variance()
        of_variance = ((fourth - variance.square() * (n - 3) / (n - 1)) / n).sqrt()
        return (variance / n).sqrt(), of_variance


def sample_moments(walk: Walk, lambdas: list[float], episodes: int, seed: int) -> Measured:
    """Moments of `gae` at the first step of at least `episodes` sampled episodes per state and lambda."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.arange(1, 5, dtype=torch.float64)[:, None, None]
    batches = -(-episodes // BATCH)
    total = torch.zeros(4, len(lambdas), STATES, dtype=torch.float64)
    for _ in range(batches):
        batch = sample_episodes(walk, BATCH, generator)
        for i, lam in enumerate(lambdas):
            first = gae(*batch, walk.gamma, lam)[0].view(STATES, BATCH)
            total[:, i] += first.pow(exponents).mean(2)
    return Measured(total / batches, batches * BATCH)


# ---------------------------------------------------------------------------------------------------------------------
# Where episodes end
# ---------------------------------------------------------------------------------------------------------------------


class WalkEnv(gym.Env):
    """The same walk as a Gymnasium environment: an observation is the state's number, the one action says nothing."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = gym.spaces.Discrete(STATES + 2, start=-1), gym.spaces.Discrete(1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = STATES // 2
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.state += 1 if self.np_random.random() < 0.5 else -1
        reward = float(self.state == STATES) - float(self.state == -1)
        return self.state, reward, reward != 0, False, {}


def reached_observations(observations: np.ndarray, infos: dict[str, Any]) -> np.ndarray:
    """What the actions reached, whichever way a vector environment resets itself. # (N, ...)

    With `AutoresetMode.NEXT_STEP` `step` returns it. With `SAME_STEP` `step` already returns the first observation of the
    next episode, and the one that was reached is `infos["final_obs"]`: to bootstrap from the former is a common mistake.
    """
    reached = observations.copy()
    for i in np.flatnonzero(infos.get("_final_obs", [])):
        reached[i] = infos["final_obs"][i]
    return reached


def record_walk(walk: Walk, mode: AutoresetMode, seed: int, envs: int = 8, steps: int = 400) -> tuple[Steps, Tensor]:
    """Steps of vectorized walks with a time limit of 60, and which of them are real, (T, N) bool.

    A step is not real where NEXT_STEP spent it on a reset: it is no transition, the action had no effect.
    """
    env = SyncVectorEnv([lambda: TimeLimit(WalkEnv(), 60)] * envs, autoreset_mode=mode)
    observations, _ = env.reset(seed=seed)
    resetting: np.ndarray = np.zeros(envs, dtype=bool)
    rows = []
    for _ in range(steps):
        following, rewards, terminated, truncated, infos = env.step(np.zeros(envs, dtype=np.int64))
        reached = reached_observations(following, infos)
        rows.append((rewards, observations, reached, terminated, truncated, ~resetting))
        observations = following
        resetting = (terminated | truncated) & (mode == AutoresetMode.NEXT_STEP)
    columns = [torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)]
    rewards, at, reached, terminated, truncated, real = columns
    values, next_values = (walk.critic[states.clamp(0, STATES - 1)] for states in (at, reached))
    return Steps(rewards, values, next_values, terminated, truncated), real


def finished_advantages(steps: Steps, real: Tensor, gamma: float, lam: float) -> list[Tensor]:
    """Per environment, the advantages of all real steps up to the end of its last finished episode."""
    advantages = gae(*steps, gamma, lam)
    done = steps.terminated | steps.truncated
    finished = []
    for advantage, ends, counts in zip(advantages.T, done.T, real.T, strict=True):
        stop = int(ends[counts].nonzero().max()) + 1
        finished.append(advantage[counts][:stop])
    return finished


def returns_to_go(steps: Steps, gamma: float) -> Tensor:
    """Discounted return of every step, each summed on its own; a cut episode adds the value it was cut at. # (T, N)"""
    ends = steps.terminated | steps.truncated
    ends[-1] = True  # of the batch
    returns = torch.empty_like(steps.rewards)
    for i in range(ends.shape[1]):
        start = 0
        for end in ends[:, i].nonzero()[:, 0].tolist():
            tail = 0.0 if steps.terminated[end, i] else steps.next_values[end, i]
            for t in range(start, end + 1):
                powers = gamma ** torch.arange(end - t + 2, dtype=torch.float64)
                returns[t, i] = powers[:-1] @ steps.rewards[t : end + 1, i] + powers[-1] * tail
            start = end + 1
    return returns


EPISODE = 12  # steps of each episode of the timeline
SURPRISE_AT = 2 * EPISODE + 5
TIMELINE_LAMBDA = 0.9


def timeline(gamma: float) -> Steps:
    """Three episodes with a reward of 1 per step and a critic that is exact, (T, 1).

    The first terminates after 12 steps, as the critic knows. The second would go on for ever and is truncated by a time
    limit. The third would terminate after 24 steps, the batch ends after 12; and it holds one reward nobody could
    foresee. So all residuals are 0 but that one.
    """
    remaining = torch.arange(2 * EPISODE, -1, -1, dtype=torch.float64)
    dying = (1 - gamma**remaining) / (1 - gamma)  # (2 * EPISODE + 1,)
    alive = torch.full((EPISODE + 1,), 1 / (1 - gamma), dtype=torch.float64)
    episodes = (dying[EPISODE:], alive, dying[: EPISODE + 1])  # values of all observations, the final one included
    rewards = torch.ones(3 * EPISODE, dtype=torch.float64)
    rewards[SURPRISE_AT] += surprise(gamma)
    terminated, truncated = torch.zeros(2, 3 * EPISODE, dtype=torch.bool)
    terminated[EPISODE - 1] = truncated[2 * EPISODE - 1] = True
    values = torch.cat([v[:-1] for v in episodes])
    next_values = torch.cat([v[1:] for v in episodes])
    columns = (rewards, values, next_values, terminated, truncated)
    return Steps(*(column[:, None] for column in columns))


def surprise(gamma: float) -> float:
    """The unforeseen reward: as much as living for ever is worth."""
    return 1 / (1 - gamma)


def timeline_advantages(gamma: float, lam: float) -> dict[str, Tensor]:
    """Advantages of the timeline done right, and with each of three common mistakes. # (T,) each"""
    right = timeline(gamma)
    nothing = torch.zeros_like(right.terminated)
    done = right.terminated | right.truncated
    following = torch.cat([right.values[1:], right.next_values[-1:]])  # of the next row, reset or not
    known = torch.where(right.terminated, 0.0, right.next_values)
    ways = {
        "right": right,
        "truncation treated as termination": right._replace(terminated=done),
        "bootstrap from the observation after the reset": right._replace(
            next_values=following, terminated=nothing, truncated=done
        ),
        "recursion not cut where an episode ends": right._replace(
            next_values=known, terminated=nothing, truncated=nothing
        ),
    }
    return {name: gae(*steps, gamma, lam)[:, 0] for name, steps in ways.items()}


# ---------------------------------------------------------------------------------------------------------------------
# CartPole: all training runs side by side
# ---------------------------------------------------------------------------------------------------------------------


def make_network(runs: int, sizes: list[int], last_gain: float, generator: torch.Generator) -> list[Tensor]:
    """Weights (R, in, out) and biases (R, 1, out) of R independent networks, layer by layer, orthogonal."""
    parameters = []
    for layer, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        gain = last_gain if layer == len(sizes) - 2 else math.sqrt(2)
        weights = torch.empty(runs, n_out, n_in)
        for weight in weights:
            torch.nn.init.orthogonal_(weight, gain, generator=generator)
        parameters += [weights.mT.contiguous().requires_grad_(), torch.zeros(runs, 1, n_out, requires_grad=True)]
    return parameters


def forward(parameters: list[Tensor], x: Tensor) -> Tensor:
    """R networks at once, tanh between layers: (R, B, in) -> (R, B, out)."""
    for layer in range(0, len(parameters), 2):
        x = torch.baddbmm(parameters[layer + 1], x if layer == 0 else x.tanh(), parameters[layer])
    return x


@dataclass
class Rollout:
    """`num_steps` steps of all R runs; T steps, E environments each."""

    observations: Tensor  # (R, T + 1, E, O)
    actions: Tensor  # (R, T, E)
    rewards: Tensor  # (T, R, E)
    terminated: Tensor  # (T, R, E)
    truncated: Tensor  # (T, R, E)
    real: Tensor  # (R, T, E) False where the step was spent on a reset


class Sampler:
    """Steps a vector environment of R * E copies and keeps count of returns.

    Its environments reset with `AutoresetMode.NEXT_STEP`: the step after the end of an episode is the reset. Row t + 1 then
    holds the observation that step t reached, so next_values are simply the values of the next row; the reset itself is
    no transition and is left out of the loss (`real`).
    """

    def __init__(self, env_id: str, runs: int, envs: int, seed: int) -> None:
        self.env = gym.make_vec(env_id, num_envs=runs * envs)
        mode = self.env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.NEXT_STEP:
            raise ConfigError([f"--env_id {env_id}: its vector environment resets with {mode}, not with NEXT_STEP"])
        self.shape = (runs, envs)
        self.observations, _ = self.env.reset(seed=seed)
        self.resetting: np.ndarray = np.zeros(runs * envs, dtype=bool)
        self.returns = np.zeros(runs * envs)
        self.latest = torch.full((runs,), math.nan)  # (R,) mean return of the episodes that finished last

    def collect(self, actor: list[Tensor], steps: int, generator: torch.Generator) -> Rollout:
        rows, finished = [], []
        for _ in range(steps):
            observations = torch.from_numpy(self.observations).float().view(*self.shape, -1)  # (R, E, O)
            probabilities = forward(actor, observations).softmax(-1).flatten(0, 1)  # (R * E, actions)
            actions = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            following, rewards, terminated, truncated, _ = self.env.step(actions.numpy())
            columns = (rewards.astype(np.float32), terminated, truncated, ~self.resetting)
            rows.append(
                (observations, actions.view(self.shape), *(torch.from_numpy(c).view(self.shape) for c in columns))
            )
            self.resetting = terminated | truncated
            self.returns += rewards
            finished.append(np.where(self.resetting, self.returns, math.nan))
            self.returns[self.resetting] = 0.0
            self.observations = following
        self._note(np.stack(finished))
        observations, actions, rewards, terminated, truncated, real = (torch.stack(c) for c in zip(*rows, strict=True))
        last = torch.from_numpy(self.observations).float().view(1, *self.shape, -1)
        observations = torch.cat([observations, last]).transpose(0, 1)
        return Rollout(observations, actions.transpose(0, 1), rewards, terminated, truncated, real.transpose(0, 1))

    def _note(self, finished: np.ndarray) -> None:
        """Update `latest`; `finished` is (T, R * E), NaN where no episode ended."""
        runs, envs = self.shape
        means = torch.from_numpy(finished).view(-1, runs, envs).transpose(0, 1).flatten(1).nanmean(1).float()
        self.latest = torch.where(means.isnan(), self.latest, means)


def rollout_advantages(rollout: Rollout, values: Tensor, lambdas: list[float], gamma: float) -> Tensor:
    """GAE of all runs, those with the same lambda together; values are (R, T + 1, E). # (R, T, E)"""
    by_step = values.transpose(0, 1)  # (T + 1, R, E)
    steps = (rollout.rewards, by_step[:-1], by_step[1:], rollout.terminated, rollout.truncated)
    groups = zip(*(tensor.chunk(len(lambdas), dim=1) for tensor in steps), strict=True)  # of (T, R / lambdas, E)
    advantages = []
    for lam, group in zip(lambdas, groups, strict=True):
        rewards, values, next_values, terminated, truncated = (tensor.flatten(1) for tensor in group)
        advantages.append(gae(rewards, values, next_values, terminated, truncated, gamma, lam).view_as(group[0]))
    return torch.cat(advantages, dim=1).transpose(0, 1)


def a2c_loss(
    actor: list[Tensor], critic: list[Tensor], rollout: Rollout, values: Tensor, advantages: Tensor, args: Args
) -> Tensor:
    """Sum over runs of: -log pi(a|s) A - ent_coef entropy + vf_coef (V - (A_gae + V_old))^2, mean over real steps.

    A is the advantage, shifted and scaled to mean 0 and standard deviation 1 within its run, as is usual in PPO: with it
    one learning rate serves all lambdas, whose advantages differ in size.
    """
    inputs = rollout.observations[:, :-1].flatten(1, 2)  # (R, T * E, O)
    real = rollout.real.flatten(1).float()  # (R, T * E)
    count = real.sum(1, keepdim=True)
    targets, advantages = (values[:, :-1] + advantages).flatten(1), advantages.flatten(1)
    centred = advantages - (advantages * real).sum(1, keepdim=True) / count
    scale = ((centred.square() * real).sum(1, keepdim=True) / count).sqrt() + 1e-8
    logprobs = forward(actor, inputs).log_softmax(-1)  # (R, T * E, actions)
    chosen = logprobs.gather(-1, rollout.actions.flatten(1)[..., None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    error = forward(critic, inputs)[..., 0] - targets
    loss = -chosen * centred / scale - args.ent_coef * entropy + args.vf_coef * error.square()
    return (loss * real / count).sum()


def clip_each_run(parameters: list[Tensor], max_norm: float) -> None:
    """Scale the gradients of each run to a norm of at most `max_norm`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = torch.stack([gradient.square().sum((1, 2)) for gradient in gradients])  # (parameters, R)
    scale = (max_norm / (squares.sum(0).sqrt() + 1e-8)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale[:, None, None])


def train(args: Args, run_dir: RunDirectory) -> tuple[Tensor, Tensor]:
    """Train `num_seeds` runs for every lambda side by side; what one run does never depends on another's data.

    Returns:
        (U,) steps of the environment so far, and (U, lambdas, seeds) mean return of the latest finished episodes.
    """
    runs = len(args.train_lambdas) * args.num_seeds
    generator = torch.Generator().manual_seed(args.seed)
    sampler = Sampler(args.env_id, runs, args.num_envs, args.seed)
    n_observed = sampler.env.single_observation_space.shape[0]
    hidden = [n_observed, args.hidden_size, args.hidden_size]
    actor = make_network(runs, [*hidden, int(sampler.env.single_action_space.n)], 0.01, generator)
    critic = make_network(runs, [*hidden, 1], 1.0, generator)
    optimizer = torch.optim.Adam(actor + critic, lr=args.learning_rate, eps=1e-5)
    updates = args.total_timesteps // (args.num_envs * args.num_steps)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / updates, total_iters=updates - 1)
    curve = []
    for update in range(updates):
        with torch.no_grad():
            rollout = sampler.collect(actor, args.num_steps, generator)
            values = forward(critic, rollout.observations.flatten(1, 2)).view(rollout.observations.shape[:3])
            advantages = rollout_advantages(rollout, values, args.train_lambdas, args.gamma)
        loss = a2c_loss(actor, critic, rollout, values, advantages, args)
        optimizer.zero_grad()
        loss.backward()
        clip_each_run(actor + critic, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        curve.append(sampler.latest.view(len(args.train_lambdas), args.num_seeds).clone())
        by_lambda = zip(args.train_lambdas, curve[-1].nanmean(1).tolist(), strict=True)
        row = {f"return/lambda_{lam:g}": mean for lam, mean in by_lambda}
        run_dir.log({"step": (update + 1) * args.num_envs * args.num_steps, **row})
    sampler.env.close()
    steps = torch.arange(1, updates + 1) * args.num_envs * args.num_steps
    return steps, torch.stack(curve)


def mean_interval(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the last axis and half the width of its 95 % confidence interval, for 5 or more samples.

    Student's t, whose quantile comes from its expansion around the normal one (Abramowitz & Stegun 26.7.5), right to
    .01 from 4 degrees of freedom on.
    """
    n = samples.shape[-1]
    z, v = 1.959964, n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return samples.mean(-1), t * samples.std(-1) / math.sqrt(n)


@dataclass
class Summary:
    """One number per training run, (lambdas, seeds)."""

    whole: Tensor  # mean over all updates: how fast it learned
    first: Tensor  # mean over the first tenth of the updates
    last: Tensor  # mean over the last tenth: how well it ended

    @classmethod
    def of(cls, curve: Tensor) -> Summary:
        tenth = max(1, len(curve) // 10)
        return cls(curve.nanmean(0), curve[:tenth].nanmean(0), curve[-tenth:].nanmean(0))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

BIAS, SPREAD, ERROR = "#d62728", "#1f77b4", "#333333"


def _subplots(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    return lesson.pyplot().subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )


def _colors(lambdas: list[float]) -> list[Any]:
    import matplotlib

    return list(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, len(lambdas))))


def draw_bias_and_spread(walk: Walk, lambdas: list[float], measured: Measured) -> Figure:
    """Left: exact bias, spread and error of one estimate with dots from samples. Right: the error of averages."""
    figure, axes = _subplots(1, 2, 12, 4.6)
    left, right = axes[0]
    first, last = _stretched([lambdas[0], lambdas[-1]]).tolist()
    places = np.linspace(first, last, 200)
    dense = (1.01 - 10**-places).clip(lambdas[0], lambdas[-1]).tolist()
    moments = [exact_moments(walk, lam) for lam in dense]
    bias = np.array([bias.square().mean().sqrt().item() for bias, _ in moments])
    spread = np.array([std.square().mean().sqrt().item() for _, std in moments])
    found = {
        BIAS: _rms_without_noise(walk, measured),
        SPREAD: measured.variance().mean(1).sqrt(),
    }
    for values, color, label in ((bias, BIAS, "bias"), (spread, SPREAD, "standard deviation")):
        left.plot(places, values, color=color, label=f"{label}, exact")
        left.plot(_stretched(lambdas), found[color], "o", color=color, label=f"{label}, sampled")
    left.plot(places, np.hypot(bias, spread), "--", color=ERROR, label="error of one estimate, exact")
    left.set_title("What does lambda trade? (RMS over the 19 states)")
    for count, style in ((1, "--"), (10, "-."), (100, "-")):
        error = np.hypot(bias, spread / math.sqrt(count))
        right.plot(places, error, style, color=ERROR, label=f"mean of {count}" if count > 1 else "one estimate")
        best = int(error.argmin())
        right.plot(places[best], error[best], "*", color="#ff7f0e", markersize=15)
        right.annotate(
            f"{dense[best]:.2f}", (places[best], error[best]), (0, -16), textcoords="offset points", ha="center"
        )
    right.plot([], [], "*", color="#ff7f0e", markersize=12, linestyle="", label="best lambda")
    right.set_title("More samples per update: which lambda is best?")
    for axis in (left, right):
        axis.set_xticks(_stretched(lambdas), [f"{lam:g}" for lam in lambdas])
        axis.set_xlabel("lambda (stretched towards 1)")
        axis.set_ylabel("units of return")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9)
    return figure


def _stretched(lambdas: list[float]) -> np.ndarray:
    """Where on the axis: equal ratios of 1 - lambda are about equally far apart."""
    return -np.log10(1.01 - np.array(lambdas))


def _rms_without_noise(walk: Walk, measured: Measured) -> Tensor:
    """RMS over states of the sampled bias; the variance of the sample mean, which would add to it, is taken off."""
    bias = measured.mean() + walk.critic - walk.values  # (lambdas, S)
    noise = measured.standard_errors()[0].square()
    return (bias.square() - noise).mean(1).clamp(min=0).sqrt()


def draw_weights(lambdas: list[float], gamma: float) -> Figure:
    """Left: weight of the n-step advantages in GAE. Right: weight of the residuals."""
    figure, axes = _subplots(1, 2, 12, 4.2)
    left, right = axes[0]
    n = np.arange(1, 41)
    for lam, color in zip(lambdas, _colors(lambdas), strict=True):
        weights = (1 - lam) * lam ** (n - 1.0)
        mean = "all rewards, no critic" if lam == 1 else f"mean n = {1 / (1 - lam):.3g}"
        left.plot(n[weights > 0], weights[weights > 0], ".-", color=color, label=f"{lam:g}  ({mean})")
        right.plot(n - 1, (gamma * lam) ** (n - 1.0), ".-", color=color, label=f"{lam:g}")
    left.set_title("How much of each n-step advantage is in GAE?")
    left.set_xlabel("n: steps of real reward before the critic takes over")
    left.set_ylabel("weight (1 - lambda) lambda^(n-1)")
    left.set_yscale("log")
    left.set_ylim(1e-4, 1.5)
    left.legend(title="lambda", fontsize=9)
    right.set_title(f"How far does a surprise reach back? (gamma = {gamma:g})")
    right.set_xlabel("k: steps from the action to the residual")
    right.set_ylabel("weight (gamma lambda)^k")
    right.legend(title="lambda", fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return figure


def draw_boundaries(advantages: dict[str, Tensor]) -> Figure:
    """The timeline's advantages: right on top, then with each mistake."""
    figure, axes = _subplots(len(advantages), 1, 11, 8.4, sharex=True, sharey=True)
    right = advantages["right"].numpy()
    steps = np.arange(len(right))
    for axis, (name, tensor) in zip(axes[:, 0], advantages.items(), strict=True):
        wrong = ~np.isclose(tensor.numpy(), right)
        axis.bar(steps, tensor.numpy(), color=np.where(wrong, BIAS, "#2ca02c"), width=0.8)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title("Done right" if name == "right" else f"Mistake: {name}", loc="left", fontsize=11)
        axis.set_ylabel("advantage")
        axis.margins(y=0.15)
        for end in (EPISODE, 2 * EPISODE):
            axis.axvline(end - 0.5, color="black", linestyle=":")
    top = axes[0, 0]
    labels = ("episode 1\nTERMINATED at its end", "episode 2\nTRUNCATED at its end", "episode 3\nthe batch ends")
    for i, label in enumerate(labels):
        place = ((i + 0.5) * EPISODE - 0.5, 0.06)
        top.text(*place, label, ha="center", va="bottom", fontweight="bold", transform=top.get_xaxis_transform())
    tip, place = (SURPRISE_AT + 0.4, right.max() * 0.8), (SURPRISE_AT + 1.5, right.max() * 0.8)
    top.annotate("a reward nobody\ncould foresee", tip, place, arrowprops={"arrowstyle": "->"}, va="center", fontsize=9)
    axes[-1, 0].set_xlabel(
        "step of the batch (the critic is exact: every advantage but those before the surprise is 0)"
    )
    return figure


def draw_returns(steps: Tensor, curve: Tensor, lambdas: list[float], env_id: str) -> Figure:
    """Left: return during training, in about 60 points, with 95 % intervals over seeds. Right: the same as one number per lambda."""
    figure, axes = _subplots(1, 2, 13, 5)
    left, right = axes[0]
    window = max(1, len(curve) // 60)
    smooth = torch.stack([part.nanmean(0) for part in curve.split(window)])
    steps = torch.stack([part[-1] for part in steps.split(window)])
    for i, (lam, color) in enumerate(zip(lambdas, _colors(lambdas), strict=True)):
        mean, half = mean_interval(smooth[:, i])
        left.plot(steps, mean, color=color, label=f"{lam:g}")
        left.fill_between(steps, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
    left.set_title(f"{env_id}: does lambda matter for learning?")
    left.set_xlabel("environment steps per training run")
    left.set_ylabel("return of the latest finished episodes")
    left.legend(title="lambda", fontsize=9, loc="upper left")
    summary = Summary.of(curve)
    rows = (
        (summary.whole, "mean over all of training", "o", "#7f7f7f", -0.1),
        (summary.last, "last tenth", "s", "black", 0.1),
    )
    for values, label, marker, color, shift in rows:
        mean, half = mean_interval(values)
        places = np.arange(len(lambdas)) + shift
        right.errorbar(places, mean, half, fmt=marker, color=color, capsize=4, label=label)
        for place, runs in zip(places, values, strict=True):
            right.plot([place + shift] * len(runs), runs, ".", color=color, alpha=0.25, markersize=4)
    right.set_xticks(range(len(lambdas)), [f"{lam:g}" for lam in lambdas])
    right.set_title(f"Mean and 95 % interval over {curve.shape[2]} seeds (dots: single runs)")
    right.set_xlabel("lambda")
    right.set_ylabel("return")
    right.legend(fontsize=9, loc="upper left")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def estimator_checks(walk: Walk, seed: int) -> list[Check]:
    """Identities of the estimator, on recorded steps with terminations and truncations."""
    steps, _ = record_walk(walk, AutoresetMode.SAME_STEP, seed)
    at_0 = (gae(*steps, walk.gamma, 0.0) - td_residuals(steps, walk.gamma)).abs().max().item()
    monte_carlo = returns_to_go(steps, walk.gamma) - steps.values
    at_1 = (gae(*steps, walk.gamma, 1.0) - monte_carlo).abs().max().item()
    by_scan, by_rows = torch.empty_like(steps.rewards), torch.empty_like(steps.rewards)
    for backward, out in ((backward_scan, by_scan), (backward_rows, by_rows)):
        backward(steps, walk.gamma, 0.9, torch.zeros_like(out[0]), out)
    ways = (by_scan - by_rows).abs().max().item()
    return [
        Check(
            "gae.lambda_0_is_the_td_residual",
            "invariant",
            at_0 == 0.0,
            {"largest_difference": at_0},
            "0: GAE(gamma, 0) = delta_t (eq. 17)",
            "lambda = 0 时 GAE 就是单步 TD 残差；不等说明递推在 lambda = 0 时仍带进了后面的步。",
            "With lambda = 0 GAE is the one-step residual; if not, later steps flow in although their weight is 0.",
        ),
        Check(
            "gae.lambda_1_is_monte_carlo_minus_v",
            "invariant",
            at_1 < 1e-12,
            {"largest_difference": at_1},
            "below 1e-12: GAE(gamma, 1) = return - V(s_t) (eq. 18), every return summed on its own",
            "lambda = 1 时各步的 V 前后相消，只剩回报减 V(s_t)；不等说明掩码、折扣或截断处的自举有误。",
            "With lambda = 1 the values cancel and leave the return minus V(s_t); if not, a mask, the discount or the "
            "bootstrap at a truncation is wrong.",
        ),
        Check(
            "gae.scan_equals_row_loop",
            "invariant",
            ways < 1e-12,
            {"largest_difference": ways},
            "below 1e-12 in float64",
            "并行扫描与逐行循环是同一个递推，只是加法次序不同。",
            "The parallel scan and the row loop are one recursion; only the order of additions differs.",
        ),
    ]


def boundary_checks(walk: Walk, advantages: dict[str, Tensor], lam: float, seed: int) -> list[Check]:
    """Terminated and truncated on the timeline against closed forms; both ways of resetting a vector environment."""
    expected = torch.zeros(3 * EPISODE, dtype=torch.float64)
    before = torch.arange(SURPRISE_AT - 2 * EPISODE, -1, -1, dtype=torch.float64)  # steps until the surprise
    expected[2 * EPISODE : SURPRISE_AT + 1] = surprise(walk.gamma) * (walk.gamma * lam) ** before
    errors = {name: (tensor - expected).abs().max().item() for name, tensor in advantages.items()}
    tolerance = 1e-12 / (1 - walk.gamma)  # the values are up to 1 / (1 - gamma)
    modes = [
        finished_advantages(*record_walk(walk, mode, seed), walk.gamma, lam)
        for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP)
    ]
    pairs = [(a, b[: len(a)]) for a, b in zip(*modes, strict=True)]
    apart = max((a - b).abs().max().item() for a, b in pairs)
    return [
        Check(
            "gae.terminated_and_truncated",
            "invariant",
            errors["right"] < tolerance,
            {f"largest_error, {name}": error for name, error in errors.items()},
            f"right: below {tolerance:.0e} (0 in episodes 1 and 2, {surprise(walk.gamma):g} (gamma lambda)^k before the surprise)",
            "critic 精确时，除意外奖励之前的几步外优势都应为 0：终止不自举，截断用最后观测的 V 自举，两者都切断递推。",
            "With an exact critic every advantage is 0 but those before the surprise: no bootstrap at termination, "
            "V of the final observation at truncation, and the recursion is cut at both.",
        ),
        Check(
            "gae.both_autoreset_modes_agree",
            "invariant",
            apart < 1e-12,
            {"largest_difference": apart, "steps_compared": sum(len(a) for a, _ in pairs)},
            "below 1e-12: the same episodes, recorded with NEXT_STEP and with SAME_STEP",
            "同样的回合，无论向量环境以哪种方式自动重置，优势必须相同；不同说明用了重置后的观测来自举，或把重置步当成了转移。",
            "The same episodes give the same advantages whichever way the vector environment resets; if not, the value "
            "of a reset observation was used, or a reset was taken for a transition.",
        ),
    ]


Z_BOUND = 5.0


def walk_checks(walk: Walk, lambdas: list[float], measured: Measured) -> list[Check]:
    """Sampled against exact moments, the closed form of the bias, and the trade."""
    moments = [exact_moments(walk, lam) for lam in lambdas]
    bias = torch.stack([bias for bias, _ in moments])  # (lambdas, S)
    std = torch.stack([std for _, std in moments])
    of_mean, of_variance = measured.standard_errors()
    z_mean = _largest_z(measured.mean() + walk.critic - walk.values - bias, of_mean)
    z_variance = _largest_z(measured.variance() - std.square(), of_variance)
    formula = torch.stack([bias_formula(walk, lam) for lam in lambdas])
    apart = (formula - bias).abs().max().item()
    rms_bias, rms_std = bias.square().mean(1).sqrt(), std.square().mean(1).sqrt()
    falls = bool((rms_bias.diff() <= 1e-12).all() and (rms_std.diff() > 0).all())
    return [
        Check(
            "gae.sampled_moments_are_exact",
            "invariant",
            z_mean < Z_BOUND and z_variance < Z_BOUND,
            {"z_of_means": z_mean, "z_of_variances": z_variance, "episodes_per_state": measured.episodes},
            f"{2 * bias.numel()} sampled means and variances within {Z_BOUND:g} standard errors of the linear equations",
            "gae 在采样回合上的均值与方差应与线性方程的精确解一致；偏离说明估计器或掩码有误。",
            "Mean and variance of `gae` over sampled episodes agree with the linear equations; if not, the estimator "
            "or a mask is wrong.",
        ),
        Check(
            "gae.bias_is_the_critics_error",
            "invariant",
            apart < 1e-12,
            {"largest_difference": apart, "rms_bias": dict(zip(map(str, lambdas), rms_bias.tolist(), strict=True))},
            "below 1e-12: gamma (1 - lambda) P (I - gamma lambda P)^-1 (critic - v)",
            "偏差只来自 critic 的误差，按 (1 - lambda) 加权；lambda = 1 时为 0。",
            "All bias comes from the critic's error, weighted with 1 - lambda; with lambda = 1 it is 0.",
        ),
        Check(
            "gae.bias_falls_and_spread_rises",
            "learning",
            falls,
            {"rms_bias": _rounded(rms_bias), "rms_standard_deviation": _rounded(rms_std)},
            "from one lambda to the next the RMS bias does not rise and the RMS standard deviation rises",
            "lambda 越大，偏差越小、方差越大，这就是 GAE 的取舍；不成立时看看 --critic_scale。",
            "The larger lambda, the smaller the bias and the larger the spread: that is the trade. If not, look at "
            "--critic_scale.",
        ),
    ]


def _largest_z(differences: Tensor, standard_errors: Tensor) -> float:
    """In standard errors; what never varies (gamma = 0 far from the ends) has none, and differs by rounding at most."""
    return torch.where(differences.abs() < 1e-12, 0.0, differences.abs() / standard_errors).max().item()


def training_check(summary: Summary, lambdas: list[float]) -> Check:
    """Did the lambda that ended best learn? Which one that is, the check leaves open."""
    gain, half = mean_interval(summary.last - summary.first)
    best = int(summary.last.mean(1).argmax())
    low = (gain - half)[best].item()
    return Check(
        "gae.return_rose",
        "learning",
        low > 0,
        {
            "lambda": lambdas[best],
            "return_last_tenth": summary.last[best].mean().item(),
            "gain": gain[best].item(),
            "gain_low": low,
        },
        "95 % interval over seeds of the gain, last tenth minus first tenth of training, lies above 0",
        "最好的 lambda 也没有让回报显著上升：检查优势的符号、学习率与训练步数。",
        "Even the best lambda did not clearly raise the return: look at the advantage's sign, the learning rate and the "
        "number of steps.",
    )


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def results(args: Args, walk: Walk, measured: Measured, summary: Summary) -> dict[str, Any]:
    """The two tables of the lesson, one row per lambda."""
    moments = [exact_moments(walk, lam) for lam in args.lambdas]
    bias, std = (torch.stack(column).square().mean(1).sqrt() for column in zip(*moments, strict=True))
    columns = {
        "lambda": torch.tensor(args.lambdas, dtype=torch.float64),
        "bias": bias,
        "bias_sampled": _rms_without_noise(walk, measured),
        "standard_deviation": std,
        "standard_deviation_sampled": measured.variance().mean(1).sqrt(),
        "error": torch.hypot(bias, std),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    trained = [
        {"lambda": lam, "whole": _interval(summary.whole[i]), "last_tenth": _interval(summary.last[i])}
        for i, lam in enumerate(args.train_lambdas)
    ]
    return {
        "walk": [dict(zip(columns, row, strict=True)) for row in rows],
        "training": {"env_id": args.env_id, "seeds": args.num_seeds, "return": trained},
    }


def _interval(runs: Tensor) -> dict[str, Any]:
    mean, half = mean_interval(runs)
    return {"mean": mean.item(), "ci95": [(mean - half).item(), (mean + half).item()], "lowest": runs.min().item()}


def run(args: Args, run_dir: RunDirectory) -> None:
    """Exact and sampled moments on the walk, the timeline of mistakes, training for each lambda, then the evidence."""
    walk = Walk.make(args.gamma, args.critic_scale)
    measured = sample_moments(walk, args.lambdas, args.walk_episodes, args.seed)
    advantages = timeline_advantages(args.gamma, TIMELINE_LAMBDA)
    run_dir.checks += estimator_checks(walk, args.seed)
    run_dir.checks += boundary_checks(walk, advantages, TIMELINE_LAMBDA, args.seed)
    run_dir.checks += walk_checks(walk, args.lambdas, measured)
    run_dir.write("bias_and_spread.png", lesson.png(draw_bias_and_spread(walk, args.lambdas, measured)))
    run_dir.write("weights.png", lesson.png(draw_weights(args.lambdas, args.gamma)))
    run_dir.write("boundaries.png", lesson.png(draw_boundaries(advantages)))

    steps, curve = train(args, run_dir)
    summary = Summary.of(curve)
    run_dir.checks.append(training_check(summary, args.train_lambdas))
    run_dir.write("training_curves.png", lesson.png(draw_returns(steps, curve, args.train_lambdas, args.env_id)))
    run_dir.write("results.json", json.dumps(results(args, walk, measured, summary), indent=2) + "\n")


if __name__ == "__main__":
    lesson.main(__file__)
