"""Discrete batch-constrained Q-learning: only actions that somebody has tried may be chosen, and bootstrapped from.

Offline, Q-learning fails because max_a' Q(s', a') picks actions that the data lack, whose values nothing has ever
corrected (extrapolation error: Fujimoto et al. 2019, arXiv:1812.02900, section 3). BCQ learns beside Q a model G(a|s)
of who made the data, and leaves out the actions that G finds unlikely compared with the likeliest one:

    allowed(s) = { a : G(a|s) / max_b G(b|s) > tau }
    a'         = argmax over allowed(s') of Q(s', a')
    y          = r + gamma * (1 - terminal) * Q_target(s', a')
    policy     = argmax over allowed(s) of Q(s, a)
    loss       = Huber( Q(s, a) - y )  -  log G(a|s)  +  1e-2 * mean over actions of logits(s)^2

(Fujimoto, Conti, Ghavamzadeh, Pineau 2019, "Benchmarking Batch Deep Reinforcement Learning Algorithms",
arXiv:1910.01708, algorithm 1; the last term and the use of Q and Q_target for a' and its value, as in Double DQN, are
those of the authors' code.) tau = 0 allows everything, which is Q-learning; tau = 1 leaves the likeliest action,
which is behaviour cloning. The same filter stands in two places, and the lesson shows that both are needed: only in
the target, the policy still takes untried actions; only in the policy, Q is spoiled by the values it bootstraps from.

Two experiments. CliffWalking (a table, exact values): 70 walkers took the safe path, 30 the edge; no other action is
in the data. Q-learning never arrives, behaviour cloning walks the safe path, -17, BCQ the better of the two, -13, for
every tau between the ratio G/max G of untried actions, up to 0.014, and that of the rare action where the paths part,
0.425 (3/7 in the data; the penalty on the logits moves both). Its Q equals the true value of its policy: BCQ forbids,
it does not lower values as CQL does. CartPole (networks, several seeds at once): the values of Double DQN leave all
bounds, those of BCQ stay near the true ones.

Where the code differs from the paper. It writes ">= tau" for "> tau", so that tau = 1 keeps the likeliest action
instead of none. The table is trained on all data at once, each state weighted equally; G is a table too. Networks for
Q and G share nothing (the authors' small version; their Atari version shares the convolutions), and there is no
epsilon in evaluation. With CartPole behaviour cloning does as well as anything: that experiment shows overestimation,
not that offline RL beats imitation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore_hf import lesson, offline_data
from llmcore_hf.checks import Check
from llmcore_hf.offline_data import OfflineDataset
from llmcore_hf.offline_rl import (
    ARROWS,
    BLUE,
    GRID,
    HORIZON,
    RED,
    Batch,
    Curves,
    MLPs,
    Model,
    OfflineArguments,
    TabularData,
    curves_figure,
    draw_action,
    draw_grid,
    largest_value,
    lesson_datasets,
    tabulate,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmcore_hf.run_dir import RunDirectory

PENALTY = 1e-2  # weight of the squared logits of G, as in the authors' code


@dataclass
class Args(OfflineArguments):
    threshold: float = field(
        default=0.3, metadata={"help": "tau: an action is allowed when G(a|s) is at least this share of the largest G."}
    )
    thresholds: list[float] = field(
        default_factory=lambda: [0.001, 0.01, 0.1, 0.4, 0.5, 0.9],
        metadata={"help": "Further thresholds that the table is trained with, to show what tau does."},
    )

    def problems(self) -> list[str]:
        found = super().problems()
        for name, values in (("threshold", [self.threshold]), ("thresholds", self.thresholds)):
            if not all(0 < value < 1 for value in values):
                told = " ".join(map(str, values))
                found.append(
                    f"--{name} {told}: it is between 0 and 1; 0 (Q-learning) and 1 (imitation) run in any case"
                )
        if self.tabular_steps < 1000:
            found.append(f"--tabular_steps {self.tabular_steps}: the table needs 1000 steps to settle")
        return found


class Method(NamedTuple):
    """A threshold, and where it is used; the lesson leaves one of the two filters out to show what it is for."""

    name: str
    threshold: float
    in_target: bool = True
    in_policy: bool = True

    @property
    def policy_threshold(self) -> float:
        return self.threshold if self.in_policy else 0.0

    @property
    def target_threshold(self) -> float:
        return self.threshold if self.in_target else 0.0


CLONING = Method("behaviour cloning", 1.0)


# ------------------------------------------------------------------------------------------------ the algorithm


def allowed(logits: Tensor, threshold: Tensor | float) -> Tensor:
    """Which actions the filter lets pass: G(a|s) / max_b G(b|s) >= tau, with G = softmax(logits). (..., A) booleans."""
    return (logits - logits.amax(-1, keepdim=True)).exp() >= threshold


def best_allowed(q: Tensor, logits: Tensor, threshold: Tensor | float) -> Tensor:
    """The allowed action of the highest Q: (..., A) and (..., A) -> (...)."""
    return q.masked_fill(~allowed(logits, threshold), -math.inf).argmax(-1)


def td_target(next_q: Tensor, next_actions: Tensor, batch: Batch, gamma: float) -> Tensor:
    """y = r + gamma * (1 - terminal) * Q_target(s', a'): (K, B) from next_q (K, B, A) and next_actions (K, B)."""
    return batch.rewards + gamma * (1 - batch.terminals) * take(next_q, next_actions)


def take(values: Tensor, actions: Tensor) -> Tensor:
    """Of the values of all actions (..., A), those of the given ones (...)."""
    return values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def loss_terms(q: Tensor, logits: Tensor, actions: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of the loss for each transition.

    Args:
        q: (K, B, A), values of all actions.
        logits: (K, B, A), of G.
        actions: (K, B), the actions in the data.
        target: (K, B), without gradient.

    Returns:
        Three tensors (K, B): Huber loss of the TD error, negative log-likelihood of the action under G, mean squared logit.
    """
    td = F.smooth_l1_loss(take(q, actions), target, reduction="none")
    return td, -take(logits.log_softmax(-1), actions), logits.pow(2).mean(-1)


class Networks(nn.Module):
    """Q and G of K methods and seeds."""

    def __init__(self, n_networks: int, sizes: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.q, self.g = (MLPs(n_networks, sizes, generator) for _ in range(2))


def train_step(
    nets: Networks,
    target_q: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    threshold: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One gradient step of K networks; `threshold` is (K, 1, 1).

    Returns:
        Three tensors (K,): means of the TD term and of G's negative log-likelihood before the step, and how many actions
        the filter allowed on average.
    """
    with torch.no_grad():
        next_logits = nets.g(batch.next_observations)
        next_actions = best_allowed(nets.q(batch.next_observations), next_logits, threshold)
        target = td_target(target_q(batch.next_observations), next_actions, batch, gamma)
        n_allowed = allowed(next_logits, threshold).sum(-1).float().mean(-1)
    terms = loss_terms(nets.q(batch.observations), nets.g(batch.observations), batch.actions, target)
    td, nll, squares = (term.mean(-1) for term in terms)
    optimizer.zero_grad(set_to_none=True)
    (td + nll + PENALTY * squares).sum().backward()  # networks share nothing: each gets its own gradient
    optimizer.step()
    return td.detach(), nll.detach(), n_allowed


# ---------------------------------------------------------------------------------- experiment 1: a table, exact values


class Tables(NamedTuple):
    """What is learned about numbered states: Q of K methods (K, S, A), and one G for all, as logits (S, A)."""

    q: Tensor
    logits: Tensor


def fit_table(
    data: TabularData, methods: list[Method], steps: int, gamma: float, on_step: Callable[[int, Tables, Tensor], None]
) -> Tables:
    """Gradient descent from Q = 0 and a uniform G, with all data in each step of length 1.

    The Huber loss and the likelihood have at most curvature 1, so a step of 1 does not diverge. G does not depend on Q:
    all K methods have the same one. `on_step(step, tables, terms)` gets the tables before the step and the weighted
    means of the TD term (K,) and the likelihood (1,), as one tensor (K + 1,).
    """
    threshold = torch.tensor([method.target_threshold for method in methods], dtype=torch.float64).view(-1, 1, 1)
    batch, n_states = data.batch, data.shares.sum()
    actions = batch.actions.expand(len(methods), -1)  # (K, M)
    q = torch.zeros(len(methods), *data.shares.shape, dtype=torch.float64)
    logits = torch.zeros_like(q[0])
    for step in range(steps):
        next_q, next_logits = q[:, batch.next_observations], logits[batch.next_observations]
        target = td_target(next_q, best_allowed(next_q, next_logits, threshold), batch, gamma)  # (K, M)
        q.requires_grad_(), logits.requires_grad_()
        rows = q[:, batch.observations], logits[batch.observations].expand(len(methods), -1, -1)
        td, nll, squares = (data.weights * term for term in loss_terms(*rows, actions, target))  # (K, M)
        to_q, to_logits = torch.autograd.grad(td.sum() + (nll + PENALTY * squares)[0].sum(), (q, logits))
        q, logits = q.detach(), logits.detach()
        on_step(step, Tables(q, logits), torch.cat([td.detach().sum(1), nll[:1].detach().sum(1)]) / n_states)
        q, logits = q - to_q, logits - to_logits
    on_step(steps, Tables(q, logits), torch.full((len(methods) + 1,), math.nan))
    return Tables(q, logits)


def behaviour_error(logits: Tensor, data: TabularData) -> float:
    """How far G is from its optimum: the largest | G - D + 2 * PENALTY / A * logits | over the states in the data."""
    in_data = data.shares.sum(1) > 0
    pull = 2 * PENALTY / logits.shape[1] * logits
    return float((logits.softmax(-1) - data.shares + pull)[in_data].abs().max())


@dataclass
class Outcome:
    """What became of one method on a table. `value` and `returns` are NaN without the environment's table."""

    method: Method
    q: Tensor  # (S, A)
    greedy: Tensor  # (S,)
    n_unseen: int  # states in the data whose greedy action is not in the data
    q_start: float
    value: float
    returns: float

    def as_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("n_unseen", "q_start", "value", "returns")}
        known = {name: None if math.isnan(number) else number for name, number in numbers.items()}
        return {"method": self.method.name, "threshold": self.method.threshold, **known}


def judge(method: Method, q: Tensor, logits: Tensor, data: TabularData, model: Model | None, gamma: float) -> Outcome:
    """Compare what Q promises for the policy's action with what the policy gets, exactly."""
    greedy = best_allowed(q, logits, method.policy_threshold)
    n_unseen = int((take(data.shares, greedy)[data.shares.sum(1) > 0] == 0).sum())
    value, returns = (
        (float(data.start @ model.value(greedy, gamma)), float(data.start @ model.returns(greedy)))
        if model
        else (math.nan, math.nan)
    )
    return Outcome(method, q, greedy, n_unseen, float(data.start @ take(q, greedy)), value, returns)


def table_methods(args: Args) -> list[Method]:
    """Imitation, Q-learning, BCQ with every threshold in ascending order, and BCQ with one of its filters left out."""
    swept = [Method("BCQ", threshold) for threshold in sorted({args.threshold, *args.thresholds})]
    return [
        CLONING,
        Method("Q-learning", 0.0),
        *swept,
        Method("BCQ, filter in the target only", args.threshold, in_policy=False),
        Method("BCQ, filter in the policy only", args.threshold, in_target=False),
    ]


def tabular(
    args: Args, data: TabularData, model: Model | None, run_dir: RunDirectory
) -> tuple[list[Outcome], Tensor, Curves]:
    """Train the table with every method and log the run, Q-learning and BCQ also as curves; also returns G's logits."""
    methods = table_methods(args)
    shown = {"tabular/q_learning/": 1, "tabular/": methods.index(Method("BCQ", args.threshold))}
    curves, every = Curves(), max(1, args.tabular_steps // 40)

    def on_step(step: int, tables: Tables, terms: Tensor) -> None:
        if step % every and step != args.tabular_steps:
            return
        row: dict[str, Any] = {"step": step, "tabular/bc_loss": float(terms[-1])}
        curves.steps.append(step)
        for prefix, k in shown.items():
            now = judge(methods[k], tables.q[k], tables.logits, data, model, args.tabular_gamma)
            curves.add(methods[k].name, *(np.array([number]) for number in (now.q_start, now.value, now.returns)))
            numbers = {"td_loss": float(terms[k]), "q_start": now.q_start, "value": now.value, "return": now.returns}
            row |= {prefix + name: number for name, number in numbers.items()}
        run_dir.log(row)

    q, logits = fit_table(data, methods, args.tabular_steps, args.tabular_gamma, on_step)
    outcomes = [judge(m, q[k], logits, data, model, args.tabular_gamma) for k, m in enumerate(methods)]
    return outcomes, logits, curves


class Fork(NamedTuple):
    """The one state of the CliffWalking data with two actions, and what follows for the threshold."""

    state: int
    ratio: float  # D(rare|s) / D(frequent|s): a threshold above it forbids the rare action
    returns: tuple[float, float]  # undiscounted, of a whole episode that takes the rare action, the frequent one

    @classmethod
    def find(cls, data: TabularData, model: Model) -> Fork:
        state = int((data.shares > 0).sum(1).argmax())
        frequent, rare = data.shares[state].argsort(descending=True)[:2].tolist()
        policies = data.shares.argmax(-1).repeat(2, 1)  # (2, S)
        policies[:, state] = torch.tensor([rare, frequent])
        returns = [float(data.start @ model.returns(policy)) for policy in policies]
        return cls(state, float(data.shares[state, rare] / data.shares[state, frequent]), (returns[0], returns[1]))


def untried_ratios(logits: Tensor, data: TabularData) -> tuple[float, float]:
    """Lowest and highest G(a|s) / max_b G(b|s) of the actions that are not in the data, over the states that are."""
    ratios = (logits - logits.amax(-1, keepdim=True)).exp()
    untried = ratios[(data.shares == 0) & (data.shares.sum(1, keepdim=True) > 0)]
    return float(untried.min()), float(untried.max())


# ------------------------------------------------------------------------------- experiment 2: networks, several seeds


def methods_of(args: Args) -> list[Method]:
    return [Method("Double DQN", 0.0), Method("BCQ", args.threshold), CLONING]


def thresholds_of(args: Args) -> Tensor:
    """(K, 1, 1), each method `n_seeds` times in a row."""
    return (
        torch.tensor([method.threshold for method in methods_of(args)]).repeat_interleave(args.n_seeds).view(-1, 1, 1)
    )


def fit_networks(args: Args, dataset: OfflineDataset, on_step: Callable[[int, Networks, Tensor], None]) -> None:
    """Train all methods with all seeds at once; networks of one seed see the same batches, whatever the method.

    `on_step(step, nets, terms)` gets the means of what `train_step` returns since it was last called, (3, K).
    """
    threshold = thresholds_of(args)
    columns = Batch(
        torch.from_numpy(dataset.observations),
        torch.from_numpy(dataset.actions),
        torch.from_numpy(dataset.rewards),
        torch.from_numpy(dataset.next_observations),
        torch.from_numpy(dataset.terminals).float(),
    )
    generator = torch.Generator().manual_seed(args.seed)
    sizes = (dataset.observations.shape[1], args.hidden_size, args.hidden_size, dataset.n_actions)
    nets = Networks(len(threshold), sizes, generator)
    target_q = MLPs(len(threshold), sizes, generator)
    optimizer = torch.optim.Adam(nets.parameters(), lr=args.learning_rate)
    terms = []
    for step in range(1, args.max_steps + 1):
        if (step - 1) % args.target_update_interval == 0:
            target_q.load_state_dict(nets.q.state_dict())
        rows = torch.randint(len(dataset), (args.n_seeds, args.batch_size), generator=generator)  # (seeds, B)
        rows = rows.repeat(len(methods_of(args)), 1)  # (K, B)
        batch = Batch(*(column[rows] for column in columns))
        terms.append(torch.stack(train_step(nets, target_q, optimizer, batch, threshold, args.gamma)))
        if step % args.logging_steps == 0 or step == args.max_steps:
            on_step(step, nets, torch.stack(terms).mean(0))
            terms.clear()


@torch.no_grad()
def evaluate(nets: Networks, dataset: OfflineDataset, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Play the filtered greedy policies in the dataset's environment.

    Returns:
        Three tensors (K,), means over the episodes: Q of the chosen action at the start, the discounted return that
        followed, the return. The last two are NaN when the environment is not known; Q is then taken at the starts in
        the data.
    """
    threshold = thresholds_of(args)
    k, n = len(threshold), args.eval_episodes

    def act(observations: np.ndarray) -> tuple[Tensor, Tensor]:  # (K, n, D) -> actions (K, n), their Q (K, n)
        x = torch.from_numpy(observations).float()
        q = nets.q(x)
        actions = best_allowed(q, nets.g(x), threshold)
        return actions, take(q, actions)

    if dataset.env_id is None:
        unknown = torch.full((k,), math.nan)
        return act(np.broadcast_to(dataset.starts, (k, *dataset.starts.shape)).copy())[1].mean(1), unknown, unknown
    envs = gym.make_vec(dataset.env_id, num_envs=k * n)
    limit = (envs.spec.max_episode_steps if envs.spec else None) or HORIZON
    observations, _ = envs.reset(seed=args.seed)
    going_on: np.ndarray = np.ones(k * n, dtype=bool)
    value, returns, q_start = np.zeros(k * n), np.zeros(k * n), None
    for t in range(limit):
        actions, q = act(observations.reshape(k, n, -1))
        q_start = q.mean(1) if q_start is None else q_start
        observations, rewards, terminated, truncated, _ = envs.step(actions.flatten().numpy())
        returns += going_on * rewards
        value += going_on * rewards * args.gamma**t
        going_on &= ~(terminated | truncated)
        if not going_on.any():
            break
    envs.close()
    return q_start, *(torch.from_numpy(total.reshape(k, n).mean(1)) for total in (value, returns))


def train_networks(args: Args, dataset: OfflineDataset, run_dir: RunDirectory) -> Curves:
    """Train the networks and log the run: means over the seeds, BCQ under the plain names."""
    methods, curves = methods_of(args), Curves()
    prefixes = {"BCQ": "", "Double DQN": "dqn/", CLONING.name: "behaviour_cloning/"}

    def on_step(step: int, nets: Networks, terms: Tensor) -> None:
        found = (*terms, *evaluate(nets, dataset, args))
        names = ("td_loss", "bc_loss", "allowed_actions", "q_start", "value", "return")
        numbers = [each.view(len(methods), args.n_seeds).numpy() for each in found]  # 6 arrays (methods, seeds)
        row: dict[str, Any] = {"step": step}
        curves.steps.append(step)
        for k, method in enumerate(methods):
            curves.add(method.name, *(each[k] for each in numbers[3:]))
            means = zip(names, (float(each[k].mean()) for each in numbers), strict=True)
            row |= {prefixes[method.name] + name: mean for name, mean in means}
        run_dir.log(row)

    fit_networks(args, dataset, on_step)
    return curves


# --------------------------------------------------------------------------------------------------------------- checks


WHY = {
    "q_learning_leaves_the_data": (
        "没见过的动作保持初始值 0，而真实回报都是负的，max 于是总选没见过的动作，这就是外推误差。"
        "不成立说明 Q-learning 基线或数据有误。",
        "Actions nobody tried keep their initial 0 while true values are negative, so the maximum picks them: "
        "extrapolation error. If this fails, the Q-learning baseline or the data are wrong.",
    ),
    "behaviour_model": (
        "G 应满足 G - D + 2 * 1e-2 / A * logits = 0，即带 L2 惩罚的极大似然；惩罚使没见过的动作也有一点概率。"
        "不成立说明 G 的损失写错了。",
        "G has to be the penalised maximum-likelihood model of the data; the penalty leaves untried actions a little "
        "probability. If this fails, the loss of G is wrong.",
    ),
    "beats_imitation": (
        "多数轨迹走安全路线，BCQ 应从少数轨迹里学到更好的路，而且不用没见过的动作。失败时先看 tau。",
        "BCQ should get at least what imitation gets without taking untried actions; on the lesson's data it finds the "
        "shorter path that few took. If it fails, look at tau.",
    ),
    "threshold_where_it_imitates": (
        "tau 太小放进没见过的动作，太大只剩最常见的动作；G 的比值预先告诉我们边界在哪里，扫描结果应与它一致。",
        "A small tau lets untried actions in, a large one leaves the most frequent action alone. The ratios of G tell "
        "where, and the sweep must agree.",
    ),
    "values_are_true": (
        "BCQ 只禁止动作，不压低数值：过滤掉没见过的动作后，Q(start) 等于自己策略的真值。不等说明目标里的过滤有误。",
        "BCQ forbids actions and lowers no value: without untried actions Q(start) equals the true value of its policy. "
        "If it does not, the filter in the target is wrong.",
    ),
    "both_filters_are_needed": (
        "只在目标里过滤，策略仍选没见过的动作；只在策略里过滤，Q 已被没见过的动作污染。所以两处都要过滤。",
        "Filtered in the target alone, the policy takes untried actions; in the policy alone, Q is spoiled by them. So both "
        "places need the filter.",
    ),
    "dqn_overestimates": (
        "Double DQN 的 Q 超过任何策略可能得到的回报，因为自举不断放大被高估的动作；BCQ 的 Q 应留在真值附近。",
        "Q of Double DQN exceeds what any policy can get, because bootstrapping feeds on overestimated actions; Q of BCQ "
        "stays near it.",
    ),
    "q_start_near_true_value": (
        "把 Q 与自己的策略实测的折扣回报相比，相差很大说明 tau 太小，放进了不可靠的动作。",
        "Q compared with the discounted return its own policy gets: far apart means tau is too small.",
    ),
    "better_than_dqn": (
        "数据、网络、批次都相同，只差过滤。行为克隆在 CartPole 上同样好：这里展示的是高估，不是胜过模仿。",
        "Same data, networks and batches; only the filter differs. Behaviour cloning is as good on CartPole: this shows "
        "overestimation, not a win over imitation.",
    ),
    "enough_target_copies": (
        "目标网络复制次数太少时 Q 还没长到真值，看上去没有高估，其实只是没训练够。",
        "After few copies Q has not grown to its value yet: that looks free of overestimation and is only unfinished.",
    ),
}
INVARIANTS = ("q_learning_leaves_the_data", "behaviour_model")
ONLY_HERE = "made on the lesson's own data only"


def make_check(name: str, passed: bool | None, observed: Any, expected: str) -> Check:
    kind: Literal["invariant", "learning"] = "invariant" if name in INVARIANTS else "learning"
    return Check(f"bcq.{name}", kind, passed, observed, expected, *WHY[name])


def table_checks(outcomes: list[Outcome], model: Model | None, args: Args, fork: Fork | None) -> list[Check]:
    """What any dataset should show. `fork` is None when the data are not the lesson's own."""
    main, cloning = next(o for o in outcomes if o.method == Method("BCQ", args.threshold)), outcomes[0]
    expected = "return at least that of behaviour cloning, actions all in the data"
    passed = main.returns >= cloning.returns and main.n_unseen == 0
    if fork is not None:
        expected = f"the best return, {fork.returns[0]:g}, above behaviour cloning, actions all in the data"
        passed = passed and main.returns == fork.returns[0] > cloning.returns
    observed = {"BCQ": main.returns, CLONING.name: cloning.returns, "actions not in the data": main.n_unseen}
    return [make_check("beats_imitation", passed if model else None, observed, expected)]


def reference_checks(outcomes: list[Outcome], logits: Tensor, data: TabularData, fork: Fork | None) -> list[Check]:
    """What must come out on the lesson's own data, where paths part at one `fork`; skipped without one."""
    names = ("q_learning_leaves_the_data", "behaviour_model", "threshold_where_it_imitates", "values_are_true")
    if fork is None:
        return [make_check(name, None, None, ONLY_HERE) for name in (*names, "both_filters_are_needed")]
    n_states, error = int((data.shares.sum(1) > 0).sum()), behaviour_error(logits, data)
    naive, swept = outcomes[1], [o for o in outcomes if o.method.name == "BCQ"]
    low, high = untried_ratios(logits, data)
    ratio = float(logits[fork.state].sort(descending=True).values[:2].diff().exp())  # of the rare action, under G
    clean = [o for o in swept if o.method.threshold > high]
    expected = {o.method.threshold: fork.returns[0] if o.method.threshold <= ratio else fork.returns[1] for o in clean}
    return [
        make_check(
            names[0],
            naive.n_unseen == n_states and naive.value < naive.q_start - 1,
            naive.as_dict(),
            f"actions that are not in the data in all {n_states} states, and Q(start) above the true value",
        ),
        make_check(
            names[1],
            error < 1e-6 and abs(ratio - fork.ratio) < 0.02,
            {"error": error, "ratio where the paths part": ratio, "highest ratio of an untried action": high},
            f"error below 1e-6, ratio within 0.02 of the data's {fork.ratio:.4f}",
        ),
        make_check(
            names[2],
            all(o.returns == expected[o.method.threshold] and o.n_unseen == 0 for o in clean)
            and all(o.n_unseen == n_states for o in swept if o.method.threshold <= low)
            and all(o.n_unseen > 0 for o in swept if o.method.threshold <= high),
            {f"tau {o.method.threshold:g}": o.returns for o in swept},
            f"untried actions up to tau = {high:.4f}, {fork.returns[0]:g} up to {ratio:.4f}, {fork.returns[1]:g} above",
        ),
        make_check(
            names[3],
            all(abs(o.q_start - o.value) < 1e-3 for o in clean),
            {f"tau {o.method.threshold:g}": {"Q": o.q_start, "V": o.value} for o in clean},
            f"Q(start) within 0.001 of the true value of its own policy for every tau above {high:.4f}",
        ),
        filters_check(outcomes[-2], outcomes[-1]),
    ]


def filters_check(target_only: Outcome, policy_only: Outcome) -> Check:
    return make_check(
        "both_filters_are_needed",
        target_only.n_unseen > 0 and policy_only.q_start > policy_only.value + 1,
        {
            o.method.name: {"untried actions": o.n_unseen, "Q": o.q_start, "V": o.value}
            for o in (target_only, policy_only)
        },
        "untried actions without the filter in the policy, Q(start) too high without the filter in the target",
    )


def network_checks(curves: Curves, dataset: OfflineDataset, args: Args, reference: bool) -> list[Check]:
    """`reference`: the data are the lesson's own, whose measured spread set the bounds (README.md)."""
    known, largest = dataset.env_id is not None, largest_value(dataset, args.gamma)
    margin = 0.25 * abs(largest)
    q_start, value = curves.q_start["BCQ"][-1], curves.value["BCQ"][-1]  # (seeds,), in the end
    peaks = {name: np.max(curves.q_start[name], axis=0) for name in ("Double DQN", "BCQ")}  # (seeds,), ever
    overestimates = (peaks["Double DQN"] > 2 * largest).all() and (q_start < largest + margin).all()
    difference = float(np.abs(q_start - value).mean())
    values = {name: float(rows[-1].mean()) for name, rows in curves.value.items()}
    copies = -(-args.max_steps // args.target_update_interval) - 1  # after the first, which copies the start
    share = 1 - args.gamma ** (copies + 1)
    return [
        make_check(
            "dqn_overestimates",
            bool(overestimates) if reference else None,
            {
                "lowest peak of Double DQN": float(peaks["Double DQN"].min()),
                "BCQ in the end, highest": float(q_start.max()),
                "highest peak of BCQ": float(peaks["BCQ"].max()),
            },
            f"in every seed Q(start) of Double DQN at some time above {2 * largest:.2f}, twice what any policy can get, and "
            f"that of BCQ in the end below {largest + margin:.2f} (early, before G is learned, it may be above)"
            if reference
            else ONLY_HERE,
        ),
        make_check(
            "q_start_near_true_value",
            difference < margin if known else None,
            {"Q(start)": float(q_start.mean()), "true value": float(value.mean()), "mean difference": difference},
            f"mean over the seeds of the difference between Q(start) and the discounted return below {margin:.2f}",
        ),
        make_check(
            "better_than_dqn",
            values["BCQ"] > values["Double DQN"] + (margin if reference else 0) if known else None,
            values,
            "discounted return above that of Double DQN" + (f" by {margin:.2f}" if reference else ""),
        ),
        make_check(
            "enough_target_copies",
            share > 0.95,
            {"copies": copies, "share": share},
            "1 - gamma^(n + 1), the share of the largest value that n copies can reach, above 0.95",
        ),
    ]


# -------------------------------------------------------------------------------------------------------------- figures


def policies_figure(outcomes: list[Outcome], data: TabularData) -> Figure:
    """Greedy actions of each method on the grid of CliffWalking."""
    plt = lesson.pyplot()
    figure, axes = plt.subplots(len(outcomes), 1, figsize=(8.2, 2.75 * len(outcomes)), layout="constrained")
    figure.suptitle("Which action does each method take, and has anybody tried it?", fontsize=13, fontweight="bold")
    n_states = int((data.shares.sum(1) > 0).sum())
    for axis, outcome in zip(np.atleast_1d(axes), outcomes, strict=True):
        draw_grid(axis, data)
        for state in torch.nonzero(data.shares.sum(1) > 0).flatten().tolist():
            action = int(outcome.greedy[state])
            draw_action(axis, state, action, BLUE if data.shares[state, action] > 0 else RED)
        arrives = outcome.returns > -HORIZON
        ends = f"return {outcome.returns:g}" if arrives else "never reaches the goal"
        tau = f" (tau = {outcome.method.threshold:g})"
        unseen = f"{outcome.n_unseen} of {n_states} actions never tried"
        axis.set_title(f"{outcome.method.name}{tau}: {ends}, {unseen}", fontsize=11, color="black" if arrives else RED)
    handles = [
        plt.Line2D([], [], color=color, marker=">", linestyle="none", label=label)
        for color, label in ((BLUE, "greedy action, in the data"), (RED, "greedy action that nobody tried"))
    ]
    handles.append(
        plt.Rectangle((0, 0), 1, 1, facecolor="#ffe9a8", edgecolor="#999999", label="where the walkers part")
    )
    figure.legend(handles=handles, loc="outside lower center", ncol=3, fontsize=10, frameon=False)
    return figure


def filter_figure(logits: Tensor, data: TabularData, thresholds: list[float]) -> Figure:
    """The actions that each threshold allows, state by state on the grid."""
    plt = lesson.pyplot()
    figure, axes = plt.subplots(len(thresholds), 1, figsize=(8.2, 2.75 * len(thresholds)), layout="constrained")
    figure.suptitle("Which actions does the filter let pass?", fontsize=13, fontweight="bold")
    states = torch.nonzero(data.shares.sum(1) > 0).flatten().tolist()
    for axis, threshold in zip(np.atleast_1d(axes), thresholds, strict=True):
        draw_grid(axis, data)
        passed = allowed(logits, threshold)
        for state in states:
            for action in torch.nonzero(passed[state]).flatten().tolist():
                draw_allowed(axis, state, action, BLUE if data.shares[state, action] > 0 else RED)
        n_untried = int((passed & (data.shares == 0))[states].sum())
        name = {0.0: "Q-learning", 1.0: "behaviour cloning"}.get(threshold, "BCQ")
        kept = f"{int(passed[states].sum())} actions in {len(states)} states, {n_untried} of them never tried"
        axis.set_title(f"tau = {threshold:g} ({name}): {kept}", fontsize=11, color=RED if n_untried else "black")
    handles = [
        plt.Line2D([], [], color=color, marker=">", linestyle="none", label=label)
        for color, label in ((BLUE, "allowed, in the data"), (RED, "allowed, though nobody tried it"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncol=2, fontsize=10, frameon=False)
    return figure


def draw_allowed(axis: Axes, state: int, action: int, color: str) -> None:
    """A short arrow from near the centre of the cell, so that four fit."""
    y, x = divmod(state, GRID[1])
    dx, dy = ARROWS[action]
    axis.annotate(
        "",
        xy=(x + 0.42 * dx, y + 0.42 * dy),
        xytext=(x + 0.06 * dx, y + 0.06 * dy),
        arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.6, "mutation_scale": 10},
    )


def threshold_figure(outcomes: list[Outcome], logits: Tensor, data: TabularData, threshold: float) -> Figure:
    """Left: the ratio of every action in every state. Right: what Q promises and what its policy gets, by tau."""
    plt = lesson.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.4, 5.2), layout="constrained")
    figure.suptitle("Where must the threshold lie? (CliffWalking, exact values)", fontsize=13, fontweight="bold")
    states = torch.nonzero(data.shares.sum(1) > 0).flatten()
    ratios = (logits - logits.amax(-1, keepdim=True)).exp()[states]  # (27, A)
    rows = torch.arange(len(states)).unsqueeze(1).expand_as(ratios)
    for tried, color, label in ((True, BLUE, "in the data"), (False, RED, "never tried")):
        chosen = (data.shares[states] > 0) == tried
        left.plot(ratios[chosen], rows[chosen], "o", color=color, markersize=4, label=label)
    left.axvline(
        threshold, color="black", linestyle="--", linewidth=1.2, label=f"tau = {threshold:g}: to the right, allowed"
    )
    left.set(xscale="log", xlabel="G(a|s) / max G(.|s)", ylabel="states that are in the data, one row each", yticks=[])
    left.set_title("How likely is each action, next to the likeliest of its state?", fontsize=11)
    swept = sorted((o for o in outcomes if "filter" not in o.method.name), key=lambda o: o.method.threshold)
    places = range(len(swept))
    right.plot(places, [o.q_start for o in swept], "o-", color=BLUE, label="promised: Q(start) of its action")
    right.plot(places, [o.value for o in swept], "s--", color="black", label="true value of its policy")
    right.set_yscale("symlog", linthresh=10)
    right.set_xticks(places, [f"{o.method.threshold:g}" for o in swept])
    right.set(xlabel="tau (0: Q-learning, 1: behaviour cloning)", ylabel="discounted return from the start, log scale")
    right.set_title("The best path needs tau between untried and rare (above: returns)", fontsize=11, pad=20)
    draw_returns_by_threshold(right, swept)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=3)
    return figure


def draw_returns_by_threshold(axis: Axes, swept: list[Outcome]) -> None:
    """The undiscounted return over each threshold: green where it is the best of all."""
    best = max(o.returns for o in swept)
    for place, outcome in enumerate(swept):
        arrives = outcome.returns > -HORIZON
        color = "#d7efd7" if outcome.returns == best else "#eeeeee" if arrives else "#f8d7d7"
        axis.axvspan(place - 0.5, place + 0.5, color=color, zorder=0, linewidth=0)
        text = f"{outcome.returns:g}" if arrives else "lost"
        axis.text(place, 1.01, text, transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=9)
    axis.set_xlim(-0.5, len(swept) - 0.5)


# ------------------------------------------------------------------------------------------------------------- the run


def run(args: Args, run_dir: RunDirectory) -> None:
    """Both experiments on the lesson's data, or the one that fits the user's dataset."""
    users = offline_data.of_user(args)
    datasets = [users] if users else lesson_datasets(args, run_dir)
    run_dir.summary["data"] = offline_data.describe(datasets)
    for dataset in datasets:
        experiment = run_networks if dataset.n_states is None else run_table
        experiment(args, dataset, run_dir, users is None)


def run_table(args: Args, dataset: OfflineDataset, run_dir: RunDirectory, reference: bool) -> None:
    data, model = tabulate(dataset), Model.of(dataset.env_id)
    outcomes, logits, curves = tabular(args, data, model, run_dir)
    run_dir.write("table.json", json.dumps([outcome.as_dict() for outcome in outcomes], indent=2) + "\n")
    fork = Fork.find(data, model) if reference and model else None
    run_dir.checks += table_checks(outcomes, model, args, fork)
    run_dir.checks += reference_checks(outcomes, logits, data, fork)
    if fork is None:
        run_dir.write(
            "training_curves.png", lesson.png(curves_figure(curves, f"BCQ on {dataset.source}", dataset, None))
        )
        return
    shown = [*outcomes[:2], next(o for o in outcomes if o.method == Method("BCQ", args.threshold))]
    run_dir.write("policies.png", lesson.png(policies_figure(shown, data)))
    run_dir.write("filter.png", lesson.png(filter_figure(logits, data, [0.0, args.threshold, 1.0])))
    run_dir.write("threshold.png", lesson.png(threshold_figure(outcomes, logits, data, args.threshold)))


def run_networks(args: Args, dataset: OfflineDataset, run_dir: RunDirectory, reference: bool) -> None:
    curves = train_networks(args, dataset, run_dir)
    run_dir.checks += network_checks(curves, dataset, args, reference)
    largest = largest_value(dataset, args.gamma) if reference else None
    title = "CartPole, offline: how far from the truth are the values?" if reference else f"BCQ on {dataset.source}"
    run_dir.write("training_curves.png", lesson.png(curves_figure(curves, title, dataset, largest)))


if __name__ == "__main__":
    lesson.main(__file__)
