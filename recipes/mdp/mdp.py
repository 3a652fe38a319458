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

import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator
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
        found = env_problems(self.env_id)
        if not 0 <= self.gamma < 1:
            found.append(f"--gamma {self.gamma}: a discount factor is in [0, 1)")
        if not 0 < self.tolerance < math.inf:
            found.append(f"--tolerance {self.tolerance}: the largest error is a positive number")
        for name, least in {"horizon": 1, "episodes": 2, "n_states": 4}.items():
            if getattr(self, name) < least:
                found.append(f"--{name} {getattr(self, name)}: at least {least}")
        return found


def env_problems(env_id: str) -> list[str]:
    """Why `env_id` cannot be solved by dynamic programming: at most one sentence."""
    try:
        env = gym.make(env_id)
    except (gym.error.Error, ImportError, ValueError) as error:
        return [f"--env_id {env_id!r}: Gymnasium cannot make it ({' '.join(str(error).split())})"]
    spaces, tabular = (env.action_space, env.observation_space), gym.spaces.Discrete
    table, start = (getattr(env.unwrapped, name, None) for name in ("P", "initial_state_distrib"))
    env.close()
    if not isinstance(spaces[0], tabular):
        return [f"--env_id {env_id}: its actions are {spaces[0]}, a tabular lesson needs Discrete ones"]
    if not isinstance(spaces[1], tabular):
        return [f"--env_id {env_id}: its observations are {spaces[1]}, a tabular lesson needs Discrete ones"]
    if table is None or start is None:
        return [f"--env_id {env_id}: it has no `P` and `initial_state_distrib`, without which nothing can be computed"]
    return []


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
# 5. Methods: each is an endless sequence of (v, Lv)
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
    while True:
        backup, policy = greedy(action_values(mdp, values, gamma))
        work += 1
        yield Iterate(values, backup, work)
        low, high = residual_range(mdp, values, backup)
        transition, reward = follow(mdp, policy)
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
            break
    return values, used


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
            break
        rho, former = shadow @ residual, rho
        direction = residual + rho / former * alpha / omega * (direction - omega * image)
    return best, used, smallest <= target


# ---------------------------------------------------------------------------------------------------------------------
# 6. Solving: a method, and a bound at which to stop
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Solution:
    """Attributes:
    values: (S,), within `error_bound` of v* in every component.
    policy: (S,), greedy; its value is nowhere more than twice `error_bound` below v*.
    error_bound: at most the tolerance, unless `max_work` ended the search before.
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
        if rounding(mdp, backup, gamma) > tolerance / 2:
            least = 2 * rounding(mdp, backup, gamma)
            raise UserError(f"--tolerance {tolerance:g} is beyond float64 at gamma {gamma}: use {least:.1e} or more")
        plain = norm_bound(mdp, values, backup, gamma)
        correction, bound = span_bound(mdp, values, backup, gamma) if span else (0.0, plain)
        residual = float((backup - values).abs().max())
        trace.append({"work": work, "bellman_residual": residual, "norm_bound": plain, "error_bound": bound})
        if bound <= tolerance or work >= max_work:
            break
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
