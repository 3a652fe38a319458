"""What the lessons on offline RL share besides the datasets: exact evaluation, several networks at once, pictures.

What makes CQL and BCQ what they are stands in their own files.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from llmcore_hf import offline_data
from llmcore_hf.curves import pyplot
from llmcore_hf.offline_data import DatasetArguments, OfflineDataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmcore_hf.run_dir import RunDirectory

HORIZON = 500  # steps after which a policy counts as never ending, where the environment has no limit of its own
BLUE, RED, GREY = "#1f77b4", "#d62728", "#7f7f7f"
CLONING = "behaviour cloning"
COLORS = {"DQN": RED, "Double DQN": RED, "Q-learning": RED, "CQL": BLUE, "BCQ": BLUE, CLONING: GREY}
GRID = (4, 12)
ARROWS = ((0, -1), (1, 0), (0, 1), (-1, 0))  # up, right, down, left, with the rows going down


@dataclass
class OfflineArguments(DatasetArguments):
    """Options that both lessons have."""

    tabular_gamma: float = field(default=0.99, metadata={"help": "Discount of the experiment with a table."})
    tabular_steps: int = field(default=10_000, metadata={"help": "Gradient steps of the table, each on all data."})
    n_safe: int = field(default=70, metadata={"help": "Episodes of CliffWalking along the upper wall (return -17)."})
    n_edge: int = field(default=30, metadata={"help": "Episodes of CliffWalking along the cliff (return -13)."})
    gamma: float = field(default=0.95, metadata={"help": "Discount of the experiment with networks."})
    max_steps: int = field(default=5000, metadata={"help": "Gradient steps of the networks."})
    n_seeds: int = field(
        default=10, metadata={"help": "Networks per method, trained at once; they differ in the seed."}
    )
    n_transitions: int = field(default=10_000, metadata={"help": "Transitions of the CartPole dataset."})
    epsilon: float = field(default=0.4, metadata={"help": "Share of random actions in the CartPole dataset."})
    batch_size: int = field(default=64, metadata={"help": "Transitions per gradient step and network."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of Adam."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the two hidden layers."})
    target_update_interval: int = field(
        default=10,
        metadata={
            "help": "Gradient steps between two copies to the target network. After n copies no value exceeds "
            "the sum of n + 1 rewards: too few copies look like conservatism."
        },
    )
    logging_steps: int = field(default=100, metadata={"help": "Gradient steps between two evaluations."})
    eval_episodes: int = field(default=10, metadata={"help": "Episodes per network and evaluation."})

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("gamma", "tabular_gamma"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"--{name} {getattr(self, name)}: a discount is in [0, 1)")
        if self.n_edge >= self.n_safe:
            found.append(f"--n_edge {self.n_edge}: it must be below --n_safe, or imitation would find the short path")
        if not 0 <= self.epsilon <= 1:
            found.append(f"--epsilon {self.epsilon}: a share is in [0, 1]")
        if not 0 < self.learning_rate < math.inf:
            found.append(f"--learning_rate {self.learning_rate}: it must be a finite number above 0")
        counts = ("n_safe", "n_edge", "max_steps", "n_seeds", "n_transitions", "batch_size")
        for name in (*counts, "hidden_size", "target_update_interval", "logging_steps", "eval_episodes"):
            if getattr(self, name) < 1:
                found.append(f"--{name} {getattr(self, name)}: it must be 1 or more")
        return found


class Batch(NamedTuple):
    """Transitions, for K networks at once or (without the K) for one table."""

    observations: Tensor  # (K, B, D) floats, or (B,) numbers of states
    actions: Tensor  # (K, B)
    rewards: Tensor  # (K, B)
    next_observations: Tensor  # (K, B, D), or (B,)
    terminals: Tensor  # (K, B), 1.0 where the next state has no value. Timeouts are no terminals: it has one.


class MLPs(nn.Module):
    """K networks with two hidden layers, computed together: their weights are stacked, one `baddbmm` per layer."""

    def __init__(self, n_networks: int, sizes: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in itertools.pairwise(sizes):
            for parameters, shape in ((self.weights, (n_networks, n_in, n_out)), (self.biases, (n_networks, 1, n_out))):
                uniform = torch.rand(shape, generator=generator) * 2 - 1
                parameters.append(nn.Parameter(uniform / math.sqrt(n_in)))  # as in nn.Linear

    def forward(self, x: Tensor) -> Tensor:  # (K, B, D) -> (K, B, A)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu() if i else x, weight)
        return x


@dataclass
class Curves:
    """How a training went: per method and evaluation, three arrays over the seeds. NaN where nothing is known."""

    steps: list[int] = field(default_factory=list)
    # what the method promises itself at the start
    q_start: dict[str, list[np.ndarray]] = field(default_factory=dict)
    value: dict[str, list[np.ndarray]] = field(default_factory=dict)  # discounted return its greedy policy really gets
    returns: dict[str, list[np.ndarray]] = field(default_factory=dict)  # the same, undiscounted

    def add(self, method: str, q_start: np.ndarray, value: np.ndarray, returns: np.ndarray) -> None:
        for series, numbers in ((self.q_start, q_start), (self.value, value), (self.returns, returns)):
            series.setdefault(method, []).append(numbers)


class TabularData(NamedTuple):
    """A dataset's different transitions (M of them) and how often it has each."""

    batch: Batch  # (M,)
    weights: Tensor  # (M,), each row's share among the rows of its state
    shares: Tensor  # (S, A), D(a|s); 0 where the data lack the action
    start: Tensor  # (S,), share of the episodes that begin there


def tabulate(dataset: OfflineDataset) -> TabularData:
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    rows = np.stack([getattr(dataset, name).astype(np.float64) for name in names], axis=1)
    unique, counts = np.unique(rows, axis=0, return_counts=True)  # (M, 5), (M,)
    columns = torch.from_numpy(unique).unbind(1)
    states, actions, rewards, following, terminals = columns
    batch = Batch(states.long(), actions.long(), rewards, following.long(), terminals)
    n_states = int(dataset.n_states or 0)
    visits = torch.zeros(n_states, dataset.n_actions, dtype=torch.float64)
    visits.index_put_((batch.observations, batch.actions), torch.from_numpy(counts).double(), accumulate=True)
    per_state = visits.sum(1)  # (S,)
    start = torch.from_numpy(np.bincount(dataset.starts, minlength=n_states) / len(dataset.starts))
    weights = torch.from_numpy(counts) / per_state[batch.observations]
    return TabularData(batch, weights, visits / per_state.clamp(min=1)[:, None], start)


class Model(NamedTuple):
    """An environment with numbered states, as tensors."""

    p: Tensor  # (S, A, S), probability to go on in s'; what is missing to 1 is the probability that the episode ends
    r: Tensor  # (S, A), expected reward
    horizon: int  # steps after which an episode is cut

    @classmethod
    def of(cls, env_id: str | None) -> Model | None:
        """The environment's own table; None when it has none (or there is no environment)."""
        with gym.make(env_id) if env_id else contextlib.nullcontext() as env:
            table = getattr(env.unwrapped, "P", None) if env else None
            if env is None or table is None:
                return None
            p = torch.zeros(env.observation_space.n, env.action_space.n, env.observation_space.n, dtype=torch.float64)
            r = torch.zeros(p.shape[:2], dtype=torch.float64)
            horizon = env.spec.max_episode_steps or HORIZON
        for s, a in np.ndindex(*r.shape):
            for probability, following, reward, terminated in table[s][a]:
                r[s, a] += probability * reward
                p[s, a, following] += probability * (not terminated)
        return cls(p, r, horizon)

    def of_policy(self, policy: Tensor) -> tuple[Tensor, Tensor]:
        """Transition matrix (S, S) and rewards (S,) of a deterministic policy (S,)."""
        states = torch.arange(len(policy))
        return self.p[states, policy], self.r[states, policy]

    def value(self, policy: Tensor, gamma: float) -> Tensor:
        """V of the policy, (S,): the solution of V = r + gamma * P V (Sutton & Barto, eq. 4.4)."""
        p, r = self.of_policy(policy)
        return torch.linalg.solve(torch.eye(len(policy), dtype=torch.float64) - gamma * p, r)

    def returns(self, policy: Tensor) -> Tensor:
        """Expected undiscounted return (S,) of an episode that is cut after `horizon` steps."""
        p, r = self.of_policy(policy)
        total = torch.zeros_like(r)
        for _ in range(self.horizon):
            total = r + p @ total
        return total


def largest_value(dataset: OfflineDataset, gamma: float) -> float:
    """No policy gets more: the largest reward in the data, at every step until an episode is cut."""
    limit = gym.spec(dataset.env_id).max_episode_steps if dataset.env_id else None
    return float(dataset.rewards.max()) * (1 - gamma ** (limit or math.inf)) / (1 - gamma)


def draw_grid(axis: Axes, data: TabularData) -> None:
    """Cells of CliffWalking: white with data, yellow where these differ, grey without data, dark for the cliff."""
    rows, columns = GRID
    for state in range(rows * columns):
        y, x = divmod(state, columns)
        cliff = y == rows - 1 and 0 < x < columns - 1
        visited = data.shares[state].sum() > 0 or state == rows * columns - 1
        fork = (data.shares[state] > 0).sum() > 1
        color = "#4a4a4a" if cliff else "#ffe9a8" if fork else "white" if visited else "#dddddd"
        edge = color if cliff else "#999999"
        axis.fill_between([x - 0.5, x + 0.5], y - 0.5, y + 0.5, facecolor=color, edgecolor=edge, linewidth=0.8)
    axis.text(
        (columns - 1) / 2, rows - 1, "cliff: -100 and back to S", color="white", ha="center", va="center", fontsize=10
    )
    axis.text(-0.4, rows - 0.55, "S", fontsize=9, fontweight="bold")
    axis.text(columns - 1, rows - 1, "G", ha="center", va="center", fontsize=12, fontweight="bold")
    axis.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal", xticks=[], yticks=[])


def draw_action(axis: Axes, state: int, action: int, color: str) -> None:
    y, x = divmod(state, GRID[1])
    dx, dy = ARROWS[action]
    axis.annotate(
        "",
        xy=(x + 0.33 * dx, y + 0.33 * dy),
        xytext=(x - 0.33 * dx, y - 0.33 * dy),
        arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.8, "mutation_scale": 13},
    )


def curves_figure(curves: Curves, title: str, dataset: OfflineDataset, largest: float | None) -> Figure:
    """Promised and true values over the training, and returns; a thin line per seed, a thick one for the median."""
    plt = pyplot()
    known = not np.isnan(list(curves.returns.values())).any()
    figure, axes = plt.subplots(1, 1 + known, figsize=(6.2 + 6.2 * known, 5.0), layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    draw_values(axes[0, 0], curves, largest, known)
    if known:
        draw_returns(axes[0, 1], curves, dataset.rewards.sum() / len(dataset.starts))
    for axis in axes.flat:
        axis.set_xlabel("gradient step")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=3)
    return figure


def draw_values(axis: Axes, curves: Curves, largest: float | None, known: bool) -> None:
    """Q(start) and, where `known`, the discounted return of the greedy policy.

    Cloning is left out: its outputs are no values.
    """
    shown = [] if largest is None else [np.array([largest])]
    for name in (name for name in curves.q_start if name != CLONING):
        shown.append(np.array(curves.q_start[name]))  # (L, seeds)
        draw_seeds(axis, curves.steps, shown[-1], COLORS[name], f"{name} promises")
        if known:
            shown.append(np.median(np.array(curves.value[name]), axis=1))  # (L,)
            axis.plot(curves.steps, shown[-1], ":", color=COLORS[name], linewidth=2, label=f"{name} gets")
    if largest is not None:
        axis.axhline(largest, color="black", linestyle="--", linewidth=1.2, label=f"no policy gets more: {largest:.1f}")
    numbers = np.concatenate([np.ravel(each) for each in shown])
    if np.abs(numbers).max() > 100:
        axis.set_yscale("log" if numbers.min() > 0 else "symlog")
    axis.set(title="Q at the start against the discounted return that follows", ylabel="discounted return")


def draw_returns(axis: Axes, curves: Curves, average: float) -> None:
    """Undiscounted returns of the greedy policies, and the `average` episode of the data."""
    for name, rows in curves.returns.items():
        draw_seeds(axis, curves.steps, np.array(rows), COLORS[name], name)
    axis.axhline(average, color="black", linestyle="--", linewidth=1.2, label=f"average in the data: {average:.3g}")
    if min(np.min(rows) for rows in curves.returns.values()) < -1000:
        axis.set_yscale("symlog")
    axis.set(title="Return of the greedy policy", ylabel="undiscounted return")


def draw_seeds(axis: Axes, steps: list[int], rows: np.ndarray, color: str, label: str) -> None:
    """`rows` (L, seeds)."""
    if rows.shape[1] > 1:
        axis.plot(steps, rows, color=color, linewidth=0.7, alpha=0.35)
    axis.plot(steps, np.median(rows, axis=1), color=color, linewidth=2.2, label=label)


def lesson_datasets(args: OfflineArguments, run_dir: RunDirectory) -> list[OfflineDataset]:
    cliff = offline_data.cliff_walking(args.n_safe, args.n_edge)
    cartpole = offline_data.cartpole(args.n_transitions, args.epsilon, args.seed)
    run_dir.write("cliffwalking.npz", cliff.to_bytes())
    run_dir.write("cartpole.npz", cartpole.to_bytes())
    return [cliff, cartpole]
