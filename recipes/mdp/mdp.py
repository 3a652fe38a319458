"""Markov decision processes and dynamic programming: exact values, policies, and a bound on the error that is left.

A Markov decision process is the five-tuple (S, A, p, r, gamma): in state s action a leads to s' with reward r with
probability p(s', r | s, a) (Sutton & Barto, 2nd ed., section 3.1), and what comes k steps later counts gamma^k. Here it is
three tensors per outcome (`MDP`); everything the agent would have to learn elsewhere is known, so values are *computed*.

    v_pi(s) = sum_a pi(a|s) sum_{s',r} p(s',r|s,a) [r + gamma v_pi(s')]     Bellman equation              (3.14)
    v*(s)   = max_a sum_{s',r} p(s',r|s,a) [r + gamma v*(s')]               Bellman optimality equation   (3.19)

The right-hand sides are operators, (L_pi v)(s) and (L v)(s). Both are contractions: ||Lv - Lw|| <= gamma ||v - w|| in the
maximum norm. Four ways to the fixed point v* = L v*, all in this file:

1. value iteration, v <- L v (4.10);
2. policy iteration: solve the linear system v = L_pi v, let pi be greedy with respect to v, repeat (section 4.3);
3. modified policy iteration: as 2, with a few sweeps v <- L_pi v for the linear system (Puterman & Shin 1978; Puterman
   1994, section 6.5; section 4.6 of Sutton & Barto calls the family generalized policy iteration);
4. `mixed_policy_iteration`, the fast one behind `solve`: 3, and now and then a Krylov method on the linear system.

When to stop? The usual rule knows ||Lv - v|| <= d, hence ||Lv - v*|| <= gamma/(1-gamma) d. A far better one looks at the
smallest and largest component of Lv - v, l and u (MacQueen 1966; Porteus 1971; Puterman 1994, section 6.6):

    Lv + gamma/(1-gamma) l  <=  v_pi  <=  v*  <=  Lv + gamma/(1-gamma) u         (pi greedy with respect to v)

so Lv + gamma/(1-gamma) (l+u)/2 is wrong by at most gamma/(1-gamma) (u-l)/2: only the *span* u - l has to be small. Why it
holds: v + l <= Lv; applying L to both sides gives Lv + gamma l <= L^2 v, then L^2 v + gamma^2 l <= L^3 v, and so on; add
them up. Termination is a step to a further state whose value is 0 for ever: there Lv - v = 0, so 0 joins the components.

What the run shows: the published values of Examples 3.5, 3.8, 4.1, the gambler's problem and Jack's car rental; your
environment (`--env_id`) solved by all methods, and the greedy policy's return computed exactly and simulated in Gymnasium;
when each method is fast, on a fast-mixing and on a slow-mixing MDP.

How this differs from the textbook: sweeps are synchronous (two arrays), the book's are in place and state by state; the
book stops at a small change of v, which bounds nothing when gamma is near 1, this file at a bound; policy evaluation is a
linear solve where the book sweeps; tensors are action-major, (A, S), because a maximum over rows is a fast one. Undiscounted
problems (Example 4.1, gambler, CliffWalking's -13) have no contraction: they converge because every episode ends
(sections 3.4 and 4.4), and `solve_episodic` proves its result by the optimality equation instead of a bound.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from llmcore_hf import lesson
from llmcore_hf.checks import Check
from llmcore_hf.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmcore_hf.run_dir import RunDirectory

DTYPE = torch.float64
# PyTorch calls its CSR tensors beta; the one operation used here, matrix times vector, is tested.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


@dataclass
class Args(lesson.LessonArguments):
    env_id: str = field(
        default="FrozenLake8x8-v1",
        metadata={"help": "A Gymnasium environment with a transition table `P`; your own as `package:Name-v0`."},
    )
    gamma: float = field(default=0.999, metadata={"help": "Discount factor, in [0, 1)."})
    tolerance: float = field(default=1e-8, metadata={"help": "Largest error of a value, in the maximum norm."})
    horizon: int = field(
        default=1000, metadata={"help": "Steps per episode in an environment that has no time limit of its own."}
    )
    episodes: int = field(default=20_000, metadata={"help": "Episodes simulated per environment."})
    n_states: int = field(
        default=40_000,
        metadata={"help": "States of the MDPs on which the solvers are compared (a square number is kept)."},
    )

    def problems(self) -> list[str]:
        found = lesson.environment_problems(self.env_id, tabular=True)
        if not 0 <= self.gamma < 1:
            found.append(f"--gamma {self.gamma}: a discount factor is in [0, 1)")
        if not 0 < self.tolerance < math.inf:
            found.append(f"--tolerance {self.tolerance}: the largest error is a positive number")
        for name, least in {"horizon": 1, "episodes": 2, "n_states": 4}.items():
            if getattr(self, name) < least:
                found.append(f"--{name} {getattr(self, name)}: at least {least}")
        return found


# ---------------------------------------------------------------------------------------------------------------------
# 1. The five-tuple as tensors
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MDP:
    """(S, A, p, r): for every action and state, K outcomes; outcomes of probability 0 fill the rows up.

    Memory grows with A * S * K, so a single pair with very many successors makes all rows long.

    Attributes:
        next_state: (A, S, K) integers in [0, S).
        probability: (A, S, K); sums to 1 over the outcomes of an available action.
        reward: (A, S, K), of each outcome.
        terminated: (A, S, K) booleans: the episode ends with this outcome, and the value of `next_state` does not count.
        available: (A, S) booleans: may the action be taken there?
        start: (S,), distribution of the first state.

    Raises:
        UserError: the tensors describe no MDP; the message names the first state and action where they do not.
    """

    next_state: Tensor
    probability: Tensor
    reward: Tensor
    terminated: Tensor
    available: Tensor
    start: Tensor

    def __post_init__(self) -> None:
        mass = self.probability.sum(-1)  # (A, S)
        wrong = {
            "a probability is negative or not a number": ~(self.probability >= 0).all(-1),
            "probabilities do not sum to 1": self.available & ((mass - 1).abs() > 1e-6),
            "a next state does not exist": ((self.next_state < 0) | (self.next_state >= self.n_states)).any(-1),
            "a reward is not finite": ~torch.isfinite(self.reward).all(-1),
        }
        for problem, where in wrong.items():
            if where.any():
                action, state = where.nonzero()[0].tolist()
                raise UserError(f"not an MDP: {problem} (state {state}, action {action})")
        if not self.available.any(0).all():
            raise UserError(f"not an MDP: state {int((~self.available.any(0)).nonzero()[0])} has no action")
        if not (self.start >= 0).all() or abs(float(self.start.sum()) - 1) > 1e-6:
            raise UserError("not an MDP: the probabilities of the first states do not sum to 1")

    @property
    def n_states(self) -> int:
        return self.next_state.shape[1]

    @property
    def n_actions(self) -> int:
        return self.next_state.shape[0]

    @cached_property
    def expected_reward(self) -> Tensor:
        """r(s, a), equation (3.5): (A, S); minus infinity where the action is not available."""
        mean = (self.probability * self.reward).sum(-1)
        return torch.where(self.available, mean, -math.inf)

    @cached_property
    def continuing(self) -> Tensor:
        """(A, S, K) probability of each outcome after which the episode goes on."""
        return self.probability * ~self.terminated

    @cached_property
    def terminates(self) -> bool:
        """Can an episode end? If not, adding a constant to v adds gamma times the constant to Lv."""
        return bool((self.terminated & (self.probability > 0)).any())

    @cached_property
    def successors(self) -> Tensor:
        """`next_state` as 32-bit integers, the width that Intel MKL multiplies with; (A, S, K)."""
        return self.next_state.to(torch.int32).contiguous()

    @cached_property
    def transition(self) -> Tensor:
        """Sparse (A * S, S): row a * S + s holds where pair (s, a) goes on."""
        return _csr(self.successors, self.continuing, self.n_states)


def _csr(columns: Tensor, values: Tensor, width: int) -> Tensor:
    """CSR matrix whose rows all have K entries; columns and values are (..., K)."""
    rows = torch.arange(0, columns.numel() + 1, columns.shape[-1], dtype=columns.dtype)
    shape = (len(rows) - 1, width)
    return torch.sparse_csr_tensor(rows, columns.reshape(-1), values.reshape(-1), shape, check_invariants=False)


def from_outcomes(outcomes: Callable[[int, int], list[tuple]], n_states: int, n_actions: int, start: Tensor) -> MDP:
    """Tensors from lists: `outcomes(s, a)` is [(probability, next state, reward, terminated), ...], [] if unavailable.

    Returns:
        the MDP, K being the length of the longest list.
    """
    lists = [[outcomes(s, a) for s in range(n_states)] for a in range(n_actions)]
    longest = max((len(entry) for row in lists for entry in row), default=0)
    filler = (0.0, 0, 0.0, True)
    table = np.array([[entry + [filler] * (longest - len(entry)) for entry in row] for row in lists], dtype=np.float64)
    probability, next_state, reward, terminated = torch.from_numpy(table).unbind(-1)  # (A, S, K) each
    available = torch.tensor([[bool(entry) for entry in row] for row in lists])
    return MDP(next_state.long(), probability, reward, terminated.bool(), available, start)


def from_gymnasium(env: gym.Env) -> MDP:
    """The table of a toy-text environment: `P[s][a]` = [(probability, next state, reward, terminated), ...]."""
    inner: Any = env.unwrapped
    start = torch.as_tensor(np.asarray(inner.initial_state_distrib), dtype=DTYPE)
    n_states, n_actions = int(inner.observation_space.n), int(inner.action_space.n)
    return from_outcomes(lambda s, a: list(inner.P[s][a]), n_states, n_actions, start)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The MDPs of the book, and two to compare solvers on
# ---------------------------------------------------------------------------------------------------------------------

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # north, east, south, west, as (row, column)


def _move(state: int, action: int, rows: int, columns: int) -> tuple[int, bool]:
    """The cell that lies there, and whether the move would have left the grid (then the agent stays)."""
    row, column = state // columns + MOVES[action][0], state % columns + MOVES[action][1]
    inside = 0 <= row < rows and 0 <= column < columns
    return (row * columns + column if inside else state), not inside


def gridworld() -> MDP:
    """Example 3.5: 5 x 5, off the grid -1; every action in A = (0, 1) gives +10, in B = (0, 3) +5. Never ends."""

    def outcomes(state: int, action: int) -> list[tuple]:
        if state == 1:
            return [(1.0, 21, 10.0, False)]
        if state == 3:
            return [(1.0, 13, 5.0, False)]
        following, bumped = _move(state, action, 5, 5)
        return [(1.0, following, -1.0 if bumped else 0.0, False)]

    return from_outcomes(outcomes, 25, 4, torch.full((25,), 1 / 25, dtype=DTYPE))


def small_gridworld() -> MDP:
    """Example 4.1: 4 x 4, -1 per step until one of two corners is reached. Undiscounted.

    The corners are states like any other whose every action ends the episode at no cost, so that their value is 0.
    """

    def outcomes(state: int, action: int) -> list[tuple]:
        if state in (0, 15):
            return [(1.0, state, 0.0, True)]
        following, _ = _move(state, action, 4, 4)
        return [(1.0, following, -1.0, following in (0, 15))]

    start = torch.ones(16, dtype=DTYPE)
    start[[0, 15]] = 0
    return from_outcomes(outcomes, 16, 4, start / start.sum())


def gambler(p_heads: float = 0.4, goal: int = 100) -> MDP:
    """Example 4.3: state s is a capital of s, action a a stake of a + 1; reward 1 on reaching the goal. Undiscounted.

    The book also allows to stake nothing, which changes nothing and only makes policies that never end.
    States 0 and `goal` end the episode at once with reward 0; their value is 0.
    """

    def outcomes(capital: int, action: int) -> list[tuple]:
        stake = action + 1
        if capital in (0, goal):
            return [(1.0, capital, 0.0, True)]
        if stake > min(capital, goal - capital):
            return []
        up, down = capital + stake, capital - stake
        return [(p_heads, up, float(up == goal), up == goal), (1 - p_heads, down, 0.0, down == 0)]

    start = torch.zeros(goal + 1, dtype=DTYPE)
    start[goal // 2] = 1
    return from_outcomes(outcomes, goal + 1, goal // 2, start)


MAX_CARS, MAX_MOVED = 20, 5


def car_rental() -> MDP:
    """Example 4.2, Jack's car rental: state 21 * n1 + n2 (cars in the evening), action a moves a - 5 cars from 1 to 2.

    10 a rental, -2 per moved car; requests are Poisson(3) and (4), returns Poisson(3) and (2), gamma = 0.9. A car that
    is returned can be rented on the next day; cars beyond 20 leave. The sums over requests and returns are not cut
    anywhere: "n or more" is one event, since no more than n cars can be rented and no more than 20 kept.
    """
    (first, income1), (second, income2) = _location(3, 3), _location(4, 2)
    cars = torch.arange(MAX_CARS + 1)
    n1, n2 = (grid.reshape(-1) for grid in torch.meshgrid(cars, cars, indexing="ij"))  # (441,) each
    moved = torch.arange(-MAX_MOVED, MAX_MOVED + 1)[:, None]  # (11, 1)
    available = (moved <= n1) & (-moved <= n2)  # (11, 441)
    morning1, morning2 = (n1 - moved).clamp(0, MAX_CARS), (n2 + moved).clamp(0, MAX_CARS)  # (11, 441)
    joint = first[morning1][..., :, None] * second[morning2][..., None, :]  # (11, 441, 21, 21)
    probability = joint.flatten(-2)  # (11, 441, 441)
    reward = income1[morning1] + income2[morning2] - 2.0 * moved.abs()  # (11, 441), in expectation over the rentals
    n_states = len(n1)
    return MDP(
        next_state=torch.arange(n_states).expand_as(probability),
        probability=probability,
        reward=reward[..., None].expand_as(probability),
        terminated=torch.zeros(1, dtype=torch.bool).expand_as(probability),
        available=available,
        start=torch.full((n_states,), 1 / n_states, dtype=DTYPE),
    )


def _location(requests: float, returns: float) -> tuple[Tensor, Tensor]:
    """One location over one day: (21, 21) from cars in the morning to cars in the evening, (21,) expected income."""
    transition, income = torch.zeros(MAX_CARS + 1, MAX_CARS + 1, dtype=DTYPE), torch.zeros(MAX_CARS + 1, dtype=DTYPE)
    for cars in range(MAX_CARS + 1):
        for rented, p_rented in enumerate(_at_most(requests, cars)):
            income[cars] += 10 * rented * p_rented
            left = cars - rented
            for returned, p_returned in enumerate(_at_most(returns, MAX_CARS - left)):
                transition[cars, left + returned] += p_rented * p_returned
    return transition, income


def _at_most(mean: float, limit: int) -> list[float]:
    """Distribution of min(X, limit) for X ~ Poisson(mean), over 0 ... limit."""
    exactly = [math.exp(-mean) * mean**n / math.factorial(n) for n in range(limit)]
    return [*exactly, 1 - math.fsum(exactly)]


def random_mdp(n_states: int, n_actions: int, n_next: int, generator: torch.Generator) -> MDP:
    """Rewards and transitions to `n_next` random states: it forgets where it was within a few steps (fast mixing)."""
    shape = (n_actions, n_states, n_next)
    weight = torch.rand(shape, dtype=DTYPE, generator=generator)
    return MDP(
        next_state=torch.randint(n_states, shape, generator=generator),
        probability=weight / weight.sum(-1, keepdim=True),
        reward=torch.rand(n_actions, n_states, 1, dtype=DTYPE, generator=generator).expand(shape),
        terminated=torch.zeros(1, dtype=torch.bool).expand(shape),
        available=torch.ones(n_actions, n_states, dtype=torch.bool),
        start=torch.full((n_states,), 1 / n_states, dtype=DTYPE),
    )


def slippery_grid(side: int, generator: torch.Generator, slip: float = 0.2) -> MDP:
    """side x side cells with random costs and one free cell that is never left: news travels a cell a step (slow mixing).

    The agent goes where it wants with probability 1 - slip, and to either side of that with slip / 2.
    """
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    towards = [((row + dy).clamp(0, side - 1) * side + (column + dx).clamp(0, side - 1)) for dy, dx in MOVES]
    next_state = torch.stack([torch.stack([towards[(a + turn) % 4] for turn in (0, 1, 3)], -1) for a in range(4)])
    next_state[:, 0] = 0  # (4, S, 3)
    cost = torch.rand(side * side, dtype=DTYPE, generator=generator)
    cost[0] = 0
    shape = next_state.shape
    return MDP(
        next_state=next_state,
        probability=torch.tensor([1 - slip, slip / 2, slip / 2], dtype=DTYPE).expand(shape),
        reward=-cost[:, None].expand(shape),
        terminated=torch.zeros(1, dtype=torch.bool).expand(shape),
        available=torch.ones(shape[:2], dtype=torch.bool),
        start=torch.full((side * side,), 1 / side**2, dtype=DTYPE),
    )


# ---------------------------------------------------------------------------------------------------------------------
# 3. Bellman operators and policy evaluation
# ---------------------------------------------------------------------------------------------------------------------


def action_values(mdp: MDP, values: Tensor, gamma: float) -> Tensor:
    """q(s, a) = r(s, a) + gamma sum_s' p(s'|s, a) v(s'): (A, S), minus infinity where not available. `values` is (S,)."""
    flat = torch.addmv(mdp.expected_reward.view(-1), mdp.transition, values, alpha=gamma)
    return flat.view(mdp.n_actions, mdp.n_states)


def greedy(q: Tensor) -> tuple[Tensor, Tensor]:
    """(Lv, pi): the maximum over actions of q (A, S), and the first action that attains it; (S,) each.

    The same as `q.max(0)`, action by action over contiguous rows, which is several times faster.
    """
    best, policy = q[0].clone(), torch.zeros(q.shape[1], dtype=torch.long)
    for action in range(1, len(q)):
        policy.masked_fill_(q[action] > best, action)
        torch.maximum(best, q[action], out=best)
    return best, policy


def follow(mdp: MDP, policy: Tensor) -> tuple[Tensor, Tensor]:
    """P_pi, sparse (S, S), and r_pi, (S,), of a deterministic policy: (S,) integers."""
    rows = torch.arange(mdp.n_states).add(policy, alpha=mdp.n_states)
    columns, values = (x.view(-1, x.shape[-1]).index_select(0, rows) for x in (mdp.successors, mdp.continuing))
    return _csr(columns, values, mdp.n_states), mdp.expected_reward.view(-1).index_select(0, rows)


def uniform(mdp: MDP) -> Tensor:
    """The policy that takes each available action with the same probability: pi(a|s) as (A, S)."""
    return mdp.available.to(DTYPE) / mdp.available.sum(0)


def evaluate(mdp: MDP, policy: Tensor, gamma: float) -> Tensor:
    """v_pi, exactly: the linear system (I - gamma P_pi) v = r_pi, solved dense; O(S^3).

    Args:
        policy: (S,) integers, or probabilities pi(a|s) as (A, S).
        gamma: 1 is allowed when the policy ends every episode.
    """
    if policy.dim() == 1:
        policy = torch.nn.functional.one_hot(policy, mdp.n_actions).T.to(DTYPE)  # (A, S)
    reward = torch.where(policy > 0, policy * mdp.expected_reward, 0.0).sum(0)  # (S,)
    weight = policy[..., None] * mdp.continuing  # (A, S, K)
    state = torch.arange(mdp.n_states)[:, None].expand_as(weight)
    matrix = torch.eye(mdp.n_states, dtype=DTYPE)
    matrix.index_put_((state, mdp.next_state), -gamma * weight, accumulate=True)
    return torch.linalg.solve(matrix, reward)


# ---------------------------------------------------------------------------------------------------------------------
# 4. How wrong are the values?
# ---------------------------------------------------------------------------------------------------------------------


def residual_range(mdp: MDP, values: Tensor, backup: Tensor) -> tuple[float, float]:
    """(l, u), smallest and largest component of Lv - v; 0 is one of them where episodes end (module docstring)."""
    low, high = (float(x) for x in torch.aminmax(backup - values))
    return (min(low, 0.0), max(high, 0.0)) if mdp.terminates else (low, high)


def rounding(mdp: MDP, backup: Tensor, gamma: float) -> float:
    """How far float64 may lead the bounds astray: K + 3 roundings per component, each at most 2^-53 of its size."""
    outcomes = mdp.next_state.shape[-1]
    return (outcomes + 3) * 2.0**-53 * float(backup.abs().max()) / (1 - gamma)


def norm_bound(mdp: MDP, values: Tensor, backup: Tensor, gamma: float) -> float:
    """||Lv - v*|| <= gamma/(1-gamma) ||Lv - v||, the bound of the contraction."""
    low, high = residual_range(mdp, values, backup)
    return gamma / (1 - gamma) * max(high, -low) + rounding(mdp, backup, gamma)


def span_bound(mdp: MDP, values: Tensor, backup: Tensor, gamma: float) -> tuple[float, float]:
    """Correction c and error bound e: every component of v* lies within e of Lv + c (module docstring)."""
    low, high = residual_range(mdp, values, backup)
    scale = gamma / (1 - gamma)
    return scale * (low + high) / 2, scale * (high - low) / 2 + rounding(mdp, backup, gamma)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Methods: each is a sequence of (v, Lv); that of policy iteration ends, the others do not
# ---------------------------------------------------------------------------------------------------------------------


class Iterate(NamedTuple):
    values: Tensor  # v, (S,)
    backup: Tensor  # Lv, (S,)
    work: float  # spent so far, in full sweeps: backups of all S * A pairs
    policy: Tensor | None = None  # of which v is the exact value; policy iteration only


def value_iteration(mdp: MDP, gamma: float) -> Iterator[Iterate]:
    """v <- Lv from v = 0 (equation 4.10). Also for gamma = 1 when every episode ends."""
    values = torch.zeros(mdp.n_states, dtype=DTYPE)
    for sweep in itertools.count(1):
        backup = action_values(mdp, values, gamma).amax(0)
        yield Iterate(values, backup, sweep)
        values = backup


def policy_iteration(mdp: MDP, gamma: float, policy: Tensor | None = None) -> Iterator[Iterate]:
    """Exact evaluation, then improvement (section 4.3), from `policy` or the one greedy for immediate reward.

    An action is replaced only by one that is better by more than rounding, so a policy that is optimal stays: the
    book's loop has a bug here, it may switch for ever between equally good policies (its Exercise 4.4).
    """
    work = 0.0
    if policy is None:
        policy = greedy(mdp.expected_reward)[1]
    while True:
        values = evaluate(mdp, policy, gamma)
        q = action_values(mdp, values, gamma)
        best, improved = greedy(q)
        work += 1 + mdp.n_states**2 / (3 * mdp.n_actions * mdp.next_state.shape[-1])  # 2/3 S^3 operations, in sweeps
        yield Iterate(values, best, work, policy)
        better = best > q.gather(0, policy[None])[0] + 1e-11 * (1 + best.abs())
        if not better.any():
            return
        policy = torch.where(better, improved, policy)


def modified_policy_iteration(mdp: MDP, gamma: float, sweeps: int = 20) -> Iterator[Iterate]:
    """Improvement, then `sweeps` times v <- L_pi v, each a row per state where value iteration has A."""
    values, work = lower_solution(mdp, gamma), 0.0
    while True:
        backup, policy = greedy(action_values(mdp, values, gamma))
        work += 1
        yield Iterate(values, backup, work)
        transition, reward = follow(mdp, policy)
        values = backup
        for _ in range(sweeps):
            values = torch.addmv(reward, transition, values, alpha=gamma)
        work += sweeps / mdp.n_actions


def lower_solution(mdp: MDP, gamma: float) -> Tensor:
    """The largest constant v with v <= Lv, hence v <= v*: the start from which modified policy iteration only rises."""
    forever = mdp.expected_reward / (1 - gamma * mdp.continuing.sum(-1))  # (A, S): c <= r + gamma p c
    return forever.amax(0).min().expand(mdp.n_states)


FIRST_SOLVE = 200  # sweeps of one policy before the first linear solve: easy problems never see one


def mixed_policy_iteration(mdp: MDP, gamma: float) -> Iterator[Iterate]:
    """Policy iteration with two ways to evaluate, which share the work half and half; the method of `solve`.

    Sweeps are best while the policy still changes and where the chain forgets its state quickly. Where it forgets
    slowly they need log(1/error) / (1 - gamma) rounds, and a Krylov method on (I - gamma P_pi) v = r_pi about the square
    root of that. Which it is need not be known: every v here obeys v <= Lv ("lower solution"), both ways raise it towards
    v*, and so does the larger of two lower solutions. So one way never spoils the other, and the mixture costs at most
    about twice the better. A solve gets as much work as was spent since the last one, twice as much after a failure.
    """
    values, work = lower_solution(mdp, gamma), 0.0
    since, budget = 0, FIRST_SOLVE  # in sweeps of one policy
    former = torch.empty(0, dtype=torch.long)
    while True:
        backup, policy = greedy(action_values(mdp, values, gamma))
        work += 1
        yield Iterate(values, backup, work)
        low, high = residual_range(mdp, values, backup)
        if not torch.equal(policy, former):
            transition, reward = follow(mdp, policy)
            former = policy
        if since < budget:
            values, used = sweep_policy(mdp, transition, reward, backup, gamma, stop=0.1 * (high - low))
            since += used + mdp.n_actions
        else:
            guess = backup + gamma / (1 - gamma) * (low + high) / 2
            solved, used, done = bicgstab(transition, reward, guess, gamma, 0.01 * (high - low), budget)
            values = torch.maximum(backup, lowered(transition, reward, solved, gamma))
            since, budget = 0, max(used, FIRST_SOLVE) if done else 2 * budget
        work += used / mdp.n_actions


def sweep_policy(
    mdp: MDP, transition: Tensor, reward: Tensor, values: Tensor, gamma: float, stop: float, most: int = 20
) -> tuple[Tensor, int]:
    """v <- L_pi v until L_pi v - v spans at most `stop`, at most `most` times: (v, number of sweeps)."""
    for used in range(1, most + 1):
        former, values = values, torch.addmv(reward, transition, values, alpha=gamma)
        low, high = residual_range(mdp, former, values)
        if high - low <= stop:
            return values, used
    return values, most


def lowered(transition: Tensor, reward: Tensor, values: Tensor, gamma: float) -> Tensor:
    """v minus the constant that makes it a lower solution, v <= L_pi v <= Lv, whatever v is."""
    excess = float((torch.addmv(reward, transition, values, alpha=gamma) - values).min())
    return values + min(excess, 0.0) / (1 - gamma)


def bicgstab(
    transition: Tensor, reward: Tensor, values: Tensor, gamma: float, target: float, budget: int
) -> tuple[Tensor, int, bool]:
    """Solve (I - gamma P) v = r by the stabilised biconjugate gradient method (van der Vorst 1992).

    Args:
        values: (S,), the first guess.
        target: the largest component of the residual at which to stop.
        budget: products with P that may be used.

    Returns:
        the best v that was seen, the number of products, and whether it reached `target`.
    """

    def apply(x: Tensor) -> Tensor:
        return torch.addmv(x, transition, x, alpha=-gamma)

    residual = reward - apply(values)
    shadow, direction = residual.clone(), residual
    rho = shadow @ residual
    best, smallest = values, float(residual.abs().max())
    for used in range(3, budget + 2, 2):
        image = apply(direction)
        alpha = rho / (shadow @ image)
        half = residual - alpha * image
        image_half = apply(half)
        omega = (image_half @ half) / (image_half @ image_half)
        values = values + alpha * direction + omega * half
        residual = half - omega * image_half
        size = float(residual.abs().max())
        if size < smallest:
            best, smallest = values, size
        if smallest <= target or not math.isfinite(size):  # done, or broken down
            return best, used, smallest <= target
        rho, former = shadow @ residual, rho
        direction = residual + rho / former * alpha / omega * (direction - omega * image)
    return best, budget, False


# ---------------------------------------------------------------------------------------------------------------------
# 6. Solving: a method, and a bound at which to stop
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Solution:
    """Attributes:
    values: (S,), within `error_bound` of v* in every component.
    policy: (S,), greedy; its value is nowhere more than twice `error_bound` below v*.
    error_bound: at most the tolerance, unless `max_work` or the method itself ended the search before.
    work: in full sweeps.
    trace: one row per iterate: work, Bellman residual, and both bounds.
    """

    values: Tensor
    policy: Tensor
    error_bound: float
    work: float
    trace: list[dict[str, float]]


def certify(
    method: Iterator[Iterate],
    mdp: MDP,
    gamma: float,
    tolerance: float,
    *,
    span: bool = True,
    max_work: float = math.inf,
) -> Solution:
    """Follow a method until a bound on the error of its values is at most `tolerance`.

    Args:
        span: stop by the span bound, with the midpoint correction; otherwise by the norm bound, as is usual.
        max_work: give up after that many full sweeps.

    Raises:
        UserError: float64 cannot certify so small a tolerance at this gamma.
    """
    trace = []
    for values, backup, work, _ in method:
        plain = norm_bound(mdp, values, backup, gamma)
        correction, bound = span_bound(mdp, values, backup, gamma) if span else (0.0, plain)
        residual = float((backup - values).abs().max())
        trace.append({"work": work, "bellman_residual": residual, "norm_bound": plain, "error_bound": bound})
        if bound <= tolerance or work >= max_work:
            break
        noise = rounding(mdp, backup, gamma)
        if bound <= 4 * noise and noise > tolerance / 2:  # little more than rounding is left
            raise UserError(
                f"--tolerance {tolerance:g} is beyond float64 at gamma {gamma}: use {2.1 * noise:.1e} or more"
            )
    policy = greedy(action_values(mdp, values, gamma))[1]
    return Solution(backup + correction, policy, bound, work, trace)


def solve(mdp: MDP, gamma: float, tolerance: float) -> Solution:
    """v* to within `tolerance`, and a policy within twice that, whether the MDP mixes fast or slowly.

    Raises:
        UserError: float64 cannot certify so small a tolerance at this gamma.
    """
    return certify(mixed_policy_iteration(mdp, gamma), mdp, gamma, tolerance)


def solve_episodic(mdp: MDP, most_sweeps: int = 100_000) -> tuple[Tensor, Tensor, float]:
    """Undiscounted v* and policy of an MDP whose episodes end: value iteration finds a policy, a linear solve its value.

    Returns:
        v_pi (S,), pi (S,), and the largest component of |L v_pi - v_pi|: where it is 0, v_pi is v*.

    Raises:
        UserError: value iteration did not settle, because some episode need not end.
    """
    for values, backup, _, _ in itertools.islice(value_iteration(mdp, 1.0), most_sweeps):
        if float((backup - values).abs().max()) <= 1e-13 * (1 + float(backup.abs().max())):
            policy = greedy(action_values(mdp, values, 1.0))[1]
            exact = evaluate(mdp, policy, 1.0)
            residual = action_values(mdp, exact, 1.0).amax(0) - exact
            return exact, policy, float(residual.abs().max())
    raise UserError(
        f"undiscounted value iteration has not settled after {most_sweeps} sweeps: can an episode go on for ever?"
    )


# ---------------------------------------------------------------------------------------------------------------------
# 7. What a policy earns: exactly, and in Gymnasium
# ---------------------------------------------------------------------------------------------------------------------


def expected_return(mdp: MDP, policy: Tensor, horizon: int) -> float:
    """Undiscounted return of an episode of at most `horizon` steps: the state distribution, pushed forward.

    Args:
        policy: (S,) integers, or probabilities pi(a|s) as (A, S).
    """
    if policy.dim() == 1:
        policy = torch.nn.functional.one_hot(policy, mdp.n_actions).T.to(DTYPE)
    rows = torch.where(policy > 0, policy * mdp.expected_reward, 0.0)  # (A, S)
    chain = mdp.transition.to_sparse_coo().t()  # (S, A * S)
    where, total = mdp.start, 0.0
    for _ in range(horizon):
        total += float(where @ rows.sum(0))
        where = chain @ (policy * where).reshape(-1)  # (S,): mass that has not terminated
    return total


def return_moments(mdp: MDP, policy: Tensor, horizon: int) -> tuple[float, float]:
    """Mean and standard deviation of the same return, backwards: E[G] and E[G^2] with 0, 1, 2 ... steps to go.

    G = R + G' gives E[G^2] = E[R^2 + 2 R G' + G'^2], and G' = 0 after termination.
    """
    pick = policy[None, :, None].expand(1, -1, mdp.next_state.shape[-1])
    p, r, following, going = (
        x.gather(0, pick)[0] for x in (mdp.probability, mdp.reward, mdp.next_state, mdp.continuing)
    )  # (S, K)
    first = second = torch.zeros(mdp.n_states, dtype=DTYPE)
    for _ in range(horizon):
        later, later2 = first[following], second[following]
        first, second = (p * r + going * later).sum(-1), (p * r**2 + going * (2 * r * later + later2)).sum(-1)
    mean = float(mdp.start @ first)
    return mean, math.sqrt(max(float(mdp.start @ second) - mean**2, 0.0))


def best_return(mdp: MDP, horizon: int) -> float:
    """The best any policy can do in `horizon` steps, one that looks at the clock included: v <- Lv, `horizon` times."""
    sweeps = itertools.islice(value_iteration(mdp, 1.0), horizon)
    *_, last = sweeps
    return float(mdp.start @ last.backup)


def simulate(env_id: str, policy: Tensor, horizon: int, episodes: int, seed: int) -> np.ndarray:
    """Undiscounted returns, (episodes,), of the policy in Gymnasium's own environment."""
    env = gym.make(env_id, max_episode_steps=horizon, disable_env_checker=True)
    env.reset(seed=seed)
    action, returns = policy.tolist(), np.zeros(episodes)
    for episode in range(episodes):
        state, over = env.reset()[0], False
        while not over:
            state, reward, terminated, truncated, _ = env.step(action[state])
            returns[episode] += float(reward)
            over = terminated or truncated
    env.close()
    return returns


# ---------------------------------------------------------------------------------------------------------------------
# 8. The book's examples
# ---------------------------------------------------------------------------------------------------------------------

# Sutton & Barto, 2nd ed.: Figure 3.2 (v of the equiprobable policy), Figure 3.5 (v*), Figure 4.1 (k = infinity).
FIGURE_3_2 = (
    *((3.3, 8.8, 4.4, 5.3, 1.5), (1.5, 3.0, 2.3, 1.9, 0.5), (0.1, 0.7, 0.7, 0.4, -0.4)),
    *((-1.0, -0.4, -0.4, -0.6, -1.2), (-1.9, -1.3, -1.2, -1.4, -2.0)),
)
FIGURE_3_5 = (
    *((22.0, 24.4, 22.0, 19.4, 17.5), (19.8, 22.0, 19.8, 17.8, 16.0), (17.8, 19.8, 17.8, 16.0, 14.4)),
    *((16.0, 17.8, 16.0, 14.4, 13.0), (14.4, 16.0, 14.4, 13.0, 11.7)),
)
FIGURE_4_1 = ((0, -14, -20, -22), (-14, -18, -20, -20), (-20, -20, -18, -14), (-22, -20, -14, 0))


def run(args: Args, run_dir: RunDirectory) -> None:
    """The book's examples, then the toy-text environments, the solvers side by side, and last the chosen environment."""
    run_dir.checks += [*book_gridworlds(run_dir), *book_gambler(run_dir), *book_car_rental(run_dir)]
    table = [examine(env_id, gamma, TOY_TEXT_TOLERANCE, args) for env_id, gamma in TOY_TEXT]
    run_dir.write("toy_text.png", lesson.png(draw_toy_text()))
    solvers = compare_solvers(args)
    run_dir.write("solvers.png", lesson.png(draw_solvers(solvers, math.isqrt(args.n_states) ** 2)))
    run_dir.checks += [simulation_check(table), cliff_check(table), *solver_checks(solvers)]
    chosen = solve_environment(args, run_dir)
    speed = {name: {method: s.work for method, s in row.items()} for name, row in solvers.items()}
    results = {"environment": chosen, "toy_text": table, "full_sweeps_to_tolerance": speed}
    run_dir.write("results.json", json.dumps(results, indent=2) + "\n")


def published(name: str, values: Tensor, table: Any, digits: float, source: str) -> Check:
    """Do values (S,) agree with a printed table to the digits it has?"""
    worst = float((values - torch.tensor(table, dtype=DTYPE).view(-1)).abs().max())
    return Check(
        id=f"mdp.{name}",
        kind="invariant",
        passed=worst <= digits + 1e-9,
        observed=worst,
        expected=f"largest difference from {source} at most {digits:g}",
        why_zh=f"算出的状态价值应等于 {source} 里印出的数；不等说明转移、奖励或 Bellman 算子写错了。",
        why_en=f"The values are those printed in {source}; if not, transitions, rewards or the operator are wrong.",
    )


def book_gridworlds(run_dir: RunDirectory) -> list[Check]:
    """Examples 3.5, 3.8 (gamma = 0.9) and 4.1 (undiscounted)."""
    big, small = gridworld(), small_gridworld()
    random_big, best_big = evaluate(big, uniform(big), 0.9), solve(big, 0.9, 1e-9).values
    random_small = evaluate(small, uniform(small), 1.0)
    run_dir.write("gridworlds.png", lesson.png(draw_gridworlds(random_big, best_big, random_small)))
    return [
        published("example_3_5", random_big, FIGURE_3_2, 0.05, "Figure 3.2"),
        published("example_3_8", best_big, FIGURE_3_5, 0.05, "Figure 3.5"),
        published("example_4_1", random_small, FIGURE_4_1, 0.0, "Figure 4.1"),
    ]


def book_gambler(run_dir: RunDirectory, p_heads: float = 0.4) -> list[Check]:
    """Example 4.3 with p = 0.4, where bold play (stake all, or what is missing) is optimal: Dubins & Savage 1965."""
    mdp = gambler(p_heads)
    values, _, residual = solve_episodic(mdp)
    capital = torch.arange(101)
    bold = torch.minimum(capital, 100 - capital).clamp(min=1) - 1
    gap = float((values - evaluate(mdp, bold, 1.0)).abs().max())
    closed = torch.tensor([p_heads**2, p_heads, p_heads + (1 - p_heads) * p_heads], dtype=DTYPE)
    error = float((values[[25, 50, 75]] - closed).abs().max())
    run_dir.write("gambler.png", lesson.png(draw_gambler(mdp, values)))
    return [
        Check(
            id="mdp.gambler",
            kind="invariant",
            passed=max(gap, error, residual) <= 1e-9,
            observed={"v(25), v(50), v(75)": values[[25, 50, 75]].tolist(), "below bold play at most": gap},
            expected="p^2, p, p + (1-p)p, and the value of bold play at every capital, all within 1e-9",
            why_zh="p = 0.4 时大胆下注是最优的，价值有闭式解；不等说明下注集合、终止或奖励写错了。",
            why_en="For p = 0.4 bold play is optimal and has a closed form; otherwise stakes, rewards or ends are wrong.",
        )
    ]


def book_car_rental(run_dir: RunDirectory) -> list[Check]:
    """Example 4.2 by policy iteration from "move nothing", as in Figure 4.2."""
    mdp = car_rental()
    steps = list(policy_iteration(mdp, 0.9, torch.full((mdp.n_states,), MAX_MOVED)))
    policies, values = [step.policy for step in steps if step.policy is not None], [step.values for step in steps]
    moved = policies[-1] - MAX_MOVED
    losses = [float((former - later).max()) for former, later in itertools.pairwise(values)]
    run_dir.write("car_rental.png", lesson.png(draw_car_rental(policies, values[-1])))
    return [
        Check(
            id="mdp.car_rental",
            kind="invariant",
            passed=(len(policies), int(moved.min()), int(moved.max())) == (5, -4, 5),
            observed={"policies": len(policies), "moved": [int(moved.min()), int(moved.max())]},
            expected="5 policies, the last of which moves between -4 and 5 cars (Figure 4.2)",
            why_zh="策略迭代应像图 4.2 那样经过 pi_0 到 pi_4 就稳定；不同说明租还车的动态或改进步骤写错了。",
            why_en="Policy iteration goes through pi_0 ... pi_4 as in Figure 4.2; else dynamics or improvement are wrong.",
        ),
        Check(
            id="mdp.policy_improvement",
            kind="invariant",
            passed=max(losses) <= 1e-9,
            observed=max(losses),
            expected="no state loses value from one policy to the next (at most 1e-9)",
            why_zh="策略改进定理 (4.7)：贪心策略处处不差于原策略；若有状态变差，改进或评估写错了。",
            why_en="Policy improvement theorem (4.7): the greedy policy is nowhere worse; if it is, a step is wrong.",
        ),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# 9. Toy-text environments, and the one you choose
# ---------------------------------------------------------------------------------------------------------------------

TOY_TEXT = (
    *(("FrozenLake-v1", 0.99), ("FrozenLake8x8-v1", 0.99), ("FrozenLake8x8-v1", 0.999)),
    *(("Taxi-v4", 0.99), ("CliffWalking-v1", 0.99), ("CliffWalkingSlippery-v1", 0.99)),
)
TOY_TEXT_TOLERANCE = 1e-8  # of the table below, whatever --tolerance is
LARGEST_DENSE = 3000  # states up to which policy iteration with a dense solve takes part
LONGEST = 20_000  # sweeps after which a slow method is no longer followed


def time_limit(env: gym.Env, horizon: int) -> int:
    return (env.spec and env.spec.max_episode_steps) or horizon


def examine(env_id: str, gamma: float, tolerance: float, args: Args) -> dict[str, Any]:
    """What the greedy policy of v* earns within the time limit: exactly, two ways, and simulated; and what others earn."""
    env = gym.make(env_id)
    mdp, horizon = from_gymnasium(env), time_limit(env, args.horizon)
    solution = solve(mdp, gamma, tolerance)
    mean, deviation = return_moments(mdp, solution.policy, horizon)
    simulated = simulate(env_id, solution.policy, horizon, args.episodes, args.seed)
    return {
        "env_id": env_id,
        "gamma": gamma,
        "horizon": horizon,
        "value_at_start": float(mdp.start @ solution.values),
        "return": mean,
        "return_forwards": expected_return(mdp, solution.policy, horizon),
        "return_std": deviation,
        "simulated_return": float(simulated.mean()),
        "episodes": len(simulated),
        "best_return": best_return(mdp, horizon),
        "random_return": expected_return(mdp, uniform(mdp), horizon),
        "sweeps": solution.work,
    }


def simulation_check(table: list[dict[str, Any]], name: str = "toy_text_simulation") -> Check:
    """Exact returns against episodes in Gymnasium: five standard errors, from the exact standard deviation."""
    worst, passed = [], True
    for row in table:
        error, tiny = row["return_std"] / math.sqrt(row["episodes"]), 1e-9 * (1 + abs(row["return"]))
        passed &= abs(row["return"] - row["return_forwards"]) <= tiny
        passed &= abs(row["simulated_return"] - row["return"]) <= 5 * error + tiny
        worst.append(f"{row['env_id']} {row['simulated_return']:.4g} for {row['return']:.4g} +- {error:.2g}")
    return Check(
        id=f"mdp.{name}",
        kind="invariant",
        passed=passed,
        observed="; ".join(worst),
        expected="simulated mean within 5 standard errors of the exact return; forwards and backwards agree to 1e-9",
        why_zh="表格里的转移和环境真正走的一致，才可能算准回报；不一致说明表读错了，或把终止与时限弄混了。",
        why_en="The table describes what the environment does; if not, it was misread, or termination and time limit mixed up.",
    )


def cliff_check(table: list[dict[str, Any]]) -> Check:
    observed = next(row["return"] for row in table if row["env_id"] == "CliffWalking-v1")
    return Check(
        id="mdp.cliff_walking",
        kind="invariant",
        passed=abs(observed + 13) <= 1e-9,
        observed=observed,
        expected="-13: one step up, eleven right, one down",
        why_zh="CliffWalking 的最短路是 13 步，每步 -1；不等说明最优策略没有沿悬崖边走。",
        why_en="The shortest path has 13 steps of -1; otherwise the optimal policy does not walk along the edge.",
    )


def solve_environment(args: Args, run_dir: RunDirectory) -> dict[str, Any]:
    """All methods on `--env_id`: bounds, errors, and how early the policy is good although the values are not yet."""
    env = gym.make(args.env_id)
    mdp, horizon = from_gymnasium(env), time_limit(env, args.horizon)
    solutions = solve_by_all(mdp, args.gamma, args.tolerance)
    row = examine(args.env_id, args.gamma, args.tolerance, args)
    exact = solutions["mixed policy iteration"]
    curve = watch(mdp, args, exact.values, horizon)
    for point in curve:
        run_dir.log(point)
    run_dir.checks += [
        agreement_check(solutions),
        *bound_checks(curve, solutions["value iteration"], args),
        simulation_check([row], "simulation"),
        return_check(row),
    ]
    figure = draw_environment(env, mdp, solutions, curve, row, args)
    run_dir.write("training_curves.png", lesson.png(figure))
    return row


def solve_by_all(mdp: MDP, gamma: float, tolerance: float) -> dict[str, Solution]:
    """Each method by its name. The slow ones are followed for `LONGEST` sweeps at most; `solve` always arrives."""
    bounded = functools.partial(certify, mdp=mdp, gamma=gamma, tolerance=tolerance, max_work=LONGEST)
    found = {
        "value iteration": bounded(value_iteration(mdp, gamma), span=False),
        "value iteration, span": bounded(value_iteration(mdp, gamma)),
        "modified policy iteration": bounded(modified_policy_iteration(mdp, gamma)),
        "mixed policy iteration": solve(mdp, gamma, tolerance),
    }
    if mdp.n_states <= LARGEST_DENSE:
        found["policy iteration"] = certify(policy_iteration(mdp, gamma), mdp, gamma, tolerance)
    return found


def watch(mdp: MDP, args: Args, exact: Tensor, horizon: int) -> list[dict[str, Any]]:
    """Value iteration at about 60 sweeps, evenly spread in the logarithm: residual, bounds, error, return of the policy."""
    chosen = {round(LONGEST ** (i / 59)) for i in range(60)}
    rows = []
    for values, backup, sweep, _ in value_iteration(mdp, args.gamma):
        correction, bound = span_bound(mdp, values, backup, args.gamma)
        if sweep not in chosen and bound > args.tolerance:
            continue
        policy = greedy(action_values(mdp, values, args.gamma))[1]
        rows.append(
            {
                "step": int(sweep),
                "bellman_residual": float((backup - values).abs().max()),
                "norm_bound": norm_bound(mdp, values, backup, args.gamma),
                "norm_error": float((backup - exact).abs().max()),
                "span_bound": bound,
                "span_error": float((backup + correction - exact).abs().max()),
                "return": expected_return(mdp, policy, horizon),
            }
        )
        if bound <= args.tolerance or sweep >= LONGEST:
            break
    return rows


def agreement_check(solutions: dict[str, Solution]) -> Check:
    """Any two methods differ by no more than their two bounds allow."""
    ratios = {
        f"{one} / {other}": float((a.values - b.values).abs().max()) / (a.error_bound + b.error_bound)
        for (one, a), (other, b) in itertools.combinations(solutions.items(), 2)
    }
    worst = max(ratios, key=lambda pair: ratios[pair])
    return Check(
        id="mdp.methods_agree",
        kind="invariant",
        passed=ratios[worst] <= 1,
        observed={worst: ratios[worst]},
        expected="for every two methods: difference at most the sum of their error bounds (ratio at most 1)",
        why_zh="几种方法求的是同一个不动点，差距不能超过各自保证的误差之和；超过说明某个方法或误差界是错的。",
        why_en="All methods look for the same fixed point; if two differ by more than their bounds, one of them is wrong.",
    )


def bound_checks(curve: list[dict[str, Any]], plain: Solution, args: Args) -> list[Check]:
    """Along value iteration: errors stay below their bounds, and residuals shrink by gamma at least."""
    over = max(max(row["norm_error"] - row["norm_bound"], row["span_error"] - row["span_bound"]) for row in curve)
    residuals = [row["bellman_residual"] for row in plain.trace]
    noise = 1e-13 * (1 + float(plain.values.abs().max()))
    excess = max((later - args.gamma * former for former, later in itertools.pairwise(residuals)), default=0.0)
    return [
        Check(
            id="mdp.error_bounds_hold",
            kind="invariant",
            passed=over <= args.tolerance,
            observed=over,
            expected=f"error minus bound at most {args.tolerance:g}, the tolerance of the reference, at every sweep",
            why_zh="误差界必须真的盖住误差；盖不住说明界的推导用错了（例如有终止时忘了把 0 算进残差的范围）。",
            why_en="A bound covers the error; if not it is misapplied, say 0 forgotten in the range where episodes end.",
        ),
        Check(
            id="mdp.contraction",
            kind="invariant",
            passed=excess <= noise,
            observed=excess,
            expected=f"residual after a sweep at most gamma times the one before (+ {noise:.1e} for rounding)",
            why_zh="Bellman 最优算子是模为 gamma 的压缩映射；残差缩得慢说明折扣没有乘对。",
            why_en="The operator is a contraction of modulus gamma; a residual that shrinks less means a wrong discount.",
        ),
    ]


def return_check(row: dict[str, Any]) -> Check:
    return Check(
        id="mdp.return",
        kind="learning",
        passed=row["random_return"] < row["return"] <= row["best_return"] + 1e-9 * (1 + abs(row["best_return"])),
        observed={name: row[name] for name in ("random_return", "return", "best_return")},
        expected="random policy < greedy policy <= best policy that knows the time",
        why_zh="规划应比随机动作好；但折扣目标不看时限，所以可以略低于知道剩余步数的最优策略。",
        why_en="Planning beats random actions; it may stay below the best, since a discounted goal does not know the time limit.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# 10. Which solver, where
# ---------------------------------------------------------------------------------------------------------------------

SOLVER_GAMMAS = {"fast mixing": 0.99, "slow mixing": 0.999}
SOLVER_TOLERANCE = 1e-6


def compare_solvers(args: Args) -> dict[str, dict[str, Solution]]:
    """A random sparse MDP (5 actions, 10 successors) and a slippery grid, to the same certified error."""
    generator, side = torch.Generator().manual_seed(args.seed), math.isqrt(args.n_states)
    mdps = {
        "fast mixing": random_mdp(side**2, 5, 10, generator),
        "slow mixing": slippery_grid(side, generator),
    }
    found = {}
    for name, mdp in mdps.items():
        gamma = SOLVER_GAMMAS[name]
        methods = {
            "value iteration": (value_iteration(mdp, gamma), False),
            "value iteration, span": (value_iteration(mdp, gamma), True),
            "modified policy iteration": (modified_policy_iteration(mdp, gamma), True),
            "mixed policy iteration": (mixed_policy_iteration(mdp, gamma), True),
        }
        found[name] = {
            method: certify(steps, mdp, gamma, SOLVER_TOLERANCE, span=span, max_work=LONGEST)
            for method, (steps, span) in methods.items()
        }
    return found


def solver_checks(solvers: dict[str, dict[str, Solution]]) -> list[Check]:
    """Work of value iteration over work of `solve`: 175-185 and 3.2-9.6 on seeds 0 to 4 (900 and 2,500 states)."""
    checks = []
    for name, least in (("fast mixing", 50), ("slow mixing", 2)):
        works = {method: solution.work for method, solution in solvers[name].items()}
        ratio = works["value iteration"] / works["mixed policy iteration"]
        checks.append(
            Check(
                id=f"mdp.solver_{name.replace(' ', '_')}",
                kind="learning",
                passed=ratio >= least,
                observed={"ratio": ratio, **works},
                expected=f"value iteration with the norm bound needs at least {least} times the sweeps of `solve`",
                why_zh="span 停机和混合策略迭代应省掉大部分扫描；省不下来说明停机准则或线性求解没起作用。",
                why_en="Span stopping and mixed evaluation save most sweeps; if not, the stopping rule or the solve is broken.",
            )
        )
    return checks


# ---------------------------------------------------------------------------------------------------------------------
# 11. Pictures
# ---------------------------------------------------------------------------------------------------------------------

COLORS = {
    "value iteration": "#7f7f7f",
    "value iteration, span": "#1f77b4",
    "modified policy iteration": "#ff7f0e",
    "policy iteration": "#9467bd",
    "mixed policy iteration": "#d62728",
}


def best_actions(mdp: MDP, values: Tensor, gamma: float) -> Tensor:
    """(A, S) booleans: all actions that are greedy with respect to `values`, ties included."""
    q = action_values(mdp, values, gamma)
    return q >= q.amax(0) - 1e-6 * (1 + values.abs().max())


def directions(mdp: MDP, columns: int) -> list[tuple[float, float]]:
    """Per action the way it leads on a grid, (columns, rows): its mean displacement, rounded; (0, 0) if nowhere."""
    state = torch.arange(mdp.n_states)[:, None]
    step = torch.stack([mdp.next_state % columns - state % columns, mdp.next_state // columns - state // columns], -1)
    near = mdp.continuing * (step.abs().sum(-1) <= 1)  # jumps, such as back to the start, are no direction
    mean = (near[..., None] * step).sum((1, 2)) / near.sum((1, 2))[:, None].clamp(min=1e-12)  # (A, 2)
    size = mean.abs().amax(1, keepdim=True)
    return [(float(dx), float(dy)) for dx, dy in torch.where(size > 0.05, (mean / size).round(), 0.0)]


def idle_states(mdp: MDP) -> Tensor:
    """(S,) booleans: states in which nothing is ever decided, because no episode starts or goes on there."""
    visited = mdp.start > 0
    visited[mdp.next_state[mdp.continuing > 0]] = True
    ends = (mdp.continuing.sum(-1) == 0).all(0) & (mdp.expected_reward.amax(0) == 0)
    return ~visited | ends


def map_of(env: gym.Env) -> tuple[tuple[int, int], str] | None:
    """(rows, columns) and letters of the map whose cells are the states; None where there is no such map."""
    inner: Any = env.unwrapped
    desc = getattr(inner, "desc", None)
    shape = getattr(inner, "shape", None) if desc is None else desc.shape
    if shape is None or len(shape) != 2 or shape[0] * shape[1] != inner.observation_space.n:
        return None
    letters = "" if desc is None else "".join(cell.decode() for cell in desc.flatten())
    return (int(shape[0]), int(shape[1])), letters


@dataclass
class Grid:
    """What a map of values shows: values (S,), greedy actions (A, S) with the way each leads, and idle states (S,)."""

    shape: tuple[int, int]
    values: Tensor
    idle: Tensor
    best: Tensor | None = None
    ways: Sequence[tuple[float, float]] = tuple((float(dx), float(dy)) for dy, dx in MOVES)
    letters: str = ""
    digits: int = 2

    def draw(self, axis: Axes, title: str) -> None:
        """Numbers on a heat map; an arrow per greedy action, a dot for one that leads nowhere; idle states hatched."""
        axis.imshow(self.values.masked_fill(self.idle, math.nan).view(self.shape).numpy(), cmap="viridis")
        low, high = (float(x) for x in torch.aminmax(self.values[~self.idle]))
        lift, size = (0.0 if self.best is None else 0.25), (7 if max(self.shape) > 6 else 10)
        for state, value in enumerate(self.values.tolist()):
            y, x = divmod(state, self.shape[1])
            center: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size}
            if self.idle[state]:
                box: dict[str, Any] = {"facecolor": "#dddddd", "edgecolor": "#999999", "hatch": "///"}
                axis.add_patch(lesson.pyplot().Rectangle((x - 0.5, y - 0.5), 1, 1, **box))
                axis.text(x, y, self.letters[state : state + 1], weight="bold", **center)
                continue
            color = "black" if value - low > 0.6 * (high - low) else "white"
            axis.text(x, y - lift, f"{value:.{self.digits}f}", color=color, **center)
            for action in [] if self.best is None else self.best[:, state].nonzero().flatten().tolist():
                _arrow(axis, x, y + 0.15, self.ways[action], color)
        axis.set(xticks=range(self.shape[1]), yticks=range(self.shape[0]))
        axis.tick_params(labelsize=7, length=0)
        axis.set_title(title, fontsize=10)


def _arrow(axis: Axes, x: float, y: float, way: tuple[float, float], color: str) -> None:
    dx, dy = way
    if way == (0.0, 0.0):
        axis.plot(x, y, "o", color=color, markersize=5)
        return
    style = {"arrowstyle": "-|>,head_width=0.18,head_length=0.3", "color": color, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", xy=(x + 0.27 * dx, y + 0.27 * dy), xytext=(x, y), arrowprops=style)


def draw_gridworlds(random_big: Tensor, best_big: Tensor, random_small: Tensor) -> Figure:
    """Examples 3.5, 3.8 and 4.1: what a policy is worth, and what the best one is."""
    figure, axes = lesson.pyplot().subplots(1, 4, figsize=(16, 4.4), layout="constrained")
    big, small, corners = gridworld(), small_gridworld(), idle_states(small_gridworld())
    nowhere = torch.zeros(25, dtype=torch.bool)
    one = "Ex. 3.5: v of the random policy, gamma = 0.9\nA (top, 2nd) pays +10, B (top, 4th) +5"
    Grid((5, 5), random_big, nowhere, digits=1).draw(axes[0], one)
    two = "Ex. 3.8: v* and every optimal action\nA is worth 24.4, not 10: one comes back to it"
    Grid((5, 5), best_big, nowhere, best_actions(big, best_big, 0.9), digits=1).draw(axes[1], two)
    three = "Ex. 4.1: v of the random policy, undiscounted:\nminus the expected steps to a corner"
    Grid((4, 4), random_small, corners, digits=0).draw(axes[2], three)
    four = "Ex. 4.1: greedy for the values on the left:\none improvement step, and already optimal"
    Grid((4, 4), random_small, corners, best_actions(small, random_small, 1.0), digits=0).draw(axes[3], four)
    return figure


def draw_gambler(mdp: MDP, final: Tensor) -> Figure:
    """Example 4.3: sweeps of value iteration, and all stakes that are optimal."""
    figure, (left, right) = lesson.pyplot().subplots(1, 2, figsize=(12.4, 4.6), layout="constrained")
    capital = np.arange(1, 100)
    for step, color in zip(value_iteration(mdp, 1.0), ("#c6dbef", "#6baed6", "#2171b5"), strict=False):
        left.step(capital, step.backup[1:-1].numpy(), color=color, where="mid", label=f"after sweep {step.work}")
    left.plot(capital, final[1:-1].numpy(), color="#d62728", label="v* (probability of reaching 100)")
    left.set(xlabel="capital (dollars)", ylabel="value")
    left.set_title("Gambler's problem, p(heads) = 0.4: how do values spread from the goal?", fontsize=11)
    best = best_actions(mdp, final, 1.0)[:, 1:-1].numpy()  # (50, 99)
    stakes, where = best.nonzero()
    right.plot(where + 1, stakes + 1, ".", color="#9ecae1", markersize=5, label="every optimal stake")
    right.step(capital, best.argmax(0) + 1, color="#d62728", linewidth=1.2, where="mid", label="the smallest of them")
    right.set(xlabel="capital (dollars)", ylabel="stake (dollars)")
    right.set_title("Is the optimal policy unique? No, many stakes tie", fontsize=11)
    for axis in (left, right):
        axis.legend(fontsize=9, frameon=False, loc="upper left")
        axis.grid(alpha=0.25)
    return figure


def draw_car_rental(policies: list[Tensor], values: Tensor) -> Figure:
    """Example 4.2, as Figure 4.2: five policies in turn, and the value of the last."""
    plt, side = lesson.pyplot(), MAX_CARS + 1
    figure, axes = plt.subplots(2, 3, figsize=(12, 9), layout="constrained", sharex=True, sharey=True)
    levels = {"cmap": plt.get_cmap("RdBu_r", 2 * MAX_MOVED + 1), "vmin": -MAX_MOVED - 0.5, "vmax": MAX_MOVED + 0.5}
    for i, (axis, policy) in enumerate(zip(axes.flat[:5], policies, strict=False)):
        moved = (policy - MAX_MOVED).view(side, side).numpy()
        image = axis.imshow(moved, origin="lower", **levels)
        for level in np.unique(moved).tolist():
            cells = np.argwhere(moved == level)  # the label stands in the one nearest to their middle
            y, x = cells[np.linalg.norm(cells - cells.mean(0), axis=1).argmin()]
            axis.text(x, y, str(level), ha="center", va="center", color="white" if abs(level) > 3 else "black")
        note = " (start: move nothing)" if i == 0 else " (optimal)" if i == len(policies) - 1 else ""
        axis.set_title(f"pi_{i}{note}", fontsize=11)
    label = "cars moved overnight from location 1 to location 2"
    figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=40, ticks=range(-5, 6), label=label)
    last = axes.flat[5]
    table = values.view(side, side).numpy()
    last.imshow(table, origin="lower", cmap="viridis")
    last.clabel(last.contour(table, colors="white", linewidths=0.8), fontsize=9, fmt="%.0f")
    last.set_title(f"v* (dollars): {float(values[0]):.0f} to {float(values[-1]):.0f}", fontsize=11)
    for axis in axes[-1]:
        axis.set(xlabel="cars at location 2 in the evening", xticks=range(0, side, 5))
    for axis in axes[:, 0]:
        axis.set(ylabel="cars at location 1 in the evening", yticks=range(0, side, 5))
    figure.suptitle("Jack's car rental: on which policy does policy iteration settle?", fontsize=13, fontweight="bold")
    return figure


def draw_toy_text() -> Figure:
    """Optimal values and actions where slipping decides how near to danger one should walk; and a slice of Taxi."""
    figure = lesson.pyplot().figure(figsize=(14, 8.8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    axes = [*above.subplots(1, 3), *below.subplots(1, 2)]
    names = ("FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalking-v1", "CliffWalkingSlippery-v1")
    for axis, env_id in zip([*axes[:2], *axes[3:]], names, strict=True):
        env = gym.make(env_id)
        mdp = from_gymnasium(env)
        draw_values(axis, env, mdp, solve(mdp, 0.99, TOY_TEXT_TOLERANCE).values, 0.99, env_id)
    draw_taxi(axes[2])
    title = "What is each state worth, and where to go? gamma = 0.99; hatched: nothing to decide (hole, cliff, goal)"
    figure.suptitle(title, fontweight="bold")
    return figure


def draw_taxi(axis: Axes) -> None:
    """The 25 taxi positions with the passenger waiting at Y and the destination B, and the walls between them."""
    env: Any = gym.make("Taxi-v4").unwrapped
    mdp = from_gymnasium(env)
    values = solve(mdp, 0.99, TOY_TEXT_TOLERANCE).values
    states = torch.tensor([env.encode(row, column, 2, 3) for row in range(5) for column in range(5)])
    best = best_actions(mdp, values, 0.99)[:, states]
    ways = [(0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 0.0), (0.0, 0.0)]  # south, north, east, west, ...
    title = "Taxi-v4, passenger waiting at the dot\n(walls red; 25 of 500 states)"
    Grid((5, 5), values[states], torch.zeros(25, dtype=torch.bool), best, ways, digits=1).draw(axis, title)
    for row, column in itertools.product(range(5), range(4)):
        if env.desc[1 + row, 2 + 2 * column] == b"|":
            axis.plot([column + 0.5] * 2, [row - 0.5, row + 0.5], color="red", linewidth=3)


def draw_values(axis: Axes, env: gym.Env, mdp: MDP, values: Tensor, gamma: float, title: str) -> None:
    """v* on the map of the environment where it has one, otherwise sorted."""
    if (found := map_of(env)) is None:
        axis.plot(values.sort(descending=True).values.numpy(), color=COLORS["value iteration, span"])
        axis.set(xlabel="state, best first", ylabel="v*")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        return
    shape, letters = found
    best, digits = best_actions(mdp, values, gamma), 2 if float(values.abs().max()) < 2 else 0
    Grid(shape, values, idle_states(mdp), best, directions(mdp, shape[1]), letters, digits).draw(axis, title)


def draw_bounds(axis: Axes, solutions: dict[str, Solution], tolerance: float) -> None:
    """Certified error against work, both logarithmic."""
    for name, solution in solutions.items():
        points = [(row["work"], row["error_bound"]) for row in solution.trace if row["error_bound"] > 0]
        label = f"{name}: {solution.work:,.0f}" + ("" if solution.error_bound <= tolerance else " (not there)")
        marker = "o" if len(points) < 12 else ""
        axis.plot(*zip(*points, strict=True), color=COLORS[name], label=label, marker=marker, markersize=4)
    axis.axhline(tolerance, color="black", linestyle=":", linewidth=1)
    axis.set(xscale="log", yscale="log", ylabel="certified error of the values")
    axis.set_xlabel("work (full sweeps over all states and actions)")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8.5, title="sweeps to the dotted tolerance", title_fontsize=8.5, loc="lower left")


def draw_solvers(solvers: dict[str, dict[str, Solution]], n_states: int) -> Figure:
    """When is which method fast?"""
    figure, axes = lesson.pyplot().subplots(1, 2, figsize=(13.4, 5), layout="constrained")
    kinds = {"fast mixing": "random sparse MDP", "slow mixing": "slippery grid"}
    for axis, (name, solutions) in zip(axes, solvers.items(), strict=True):
        draw_bounds(axis, solutions, SOLVER_TOLERANCE)
        axis.set_title(f"{name}: {kinds[name]}, {n_states:,} states, gamma = {SOLVER_GAMMAS[name]}", fontsize=11)
    title = "Which method is fast where? The span bound pays where the chain mixes; the mixture needs no such luck"
    figure.suptitle(title, fontweight="bold")
    return figure


def draw_environment(
    env: gym.Env,
    mdp: MDP,
    solutions: dict[str, Solution],
    curve: list[dict[str, Any]],
    row: dict[str, Any],
    args: Args,
) -> Figure:
    """The main picture: values and actions, certified errors of all methods, return of the greedy policy on the way."""
    figure, (left, middle, right) = lesson.pyplot().subplots(1, 3, figsize=(17, 5.4), layout="constrained")
    title = "What is each state worth, and where to go?\n(hatched: nothing to decide)"
    draw_values(left, env, mdp, solutions["mixed policy iteration"].values, args.gamma, title)
    draw_bounds(middle, solutions, args.tolerance)
    middle.set_title("How much work until the error is certified?", fontsize=10)
    sweeps, returns = zip(*((point["step"], point["return"]) for point in curve), strict=True)
    right.plot(sweeps, returns, color="#1f77b4", marker="o", markersize=3, label="greedy policy after that sweep")
    right.axhline(
        row["best_return"], color="black", linestyle=":", label=f"best, knowing the time: {row['best_return']:.4g}"
    )
    right.axhline(
        row["random_return"], color="#d62728", linestyle=":", label=f"random policy: {row['random_return']:.4g}"
    )
    right.set(xscale="log", xlabel="sweep of value iteration", ylabel=f"expected return in {row['horizon']} steps")
    right.set_title("When is the policy good? Long before the values are", fontsize=10)
    right.grid(alpha=0.25)
    right.legend(fontsize=9, frameon=False)
    earned = f"return {row['return']:.4g}, simulated {row['simulated_return']:.4g}"
    figure.suptitle(f"{args.env_id}, gamma = {args.gamma}: {earned}", fontweight="bold")
    return figure


if __name__ == "__main__":
    lesson.main(__file__)
