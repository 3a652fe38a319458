"""Conservative Q-learning: learn from a fixed dataset without believing in actions nobody has tried.

Q-learning bootstraps from max_a Q(s', a). Online, an action that is valued too highly gets tried and corrected.
Offline nothing corrects it: where the data lack an action, its value is whatever initialisation or the network says,
the maximum picks the most optimistic such value, and the Bellman backup spreads it (extrapolation error: Fujimoto et
al. 2019, arXiv:1812.02900, section 3). CQL(H) adds a term that lowers the values of all actions softly and raises
those in the data:

    min_Q  alpha * E_{s~D} [ log sum_a exp Q(s, a)  -  E_{a~D(.|s)} Q(s, a) ]
           +  1/2 E_{(s,a,r,s')~D} [ ( Q(s, a) - y )^2 ]              (Kumar et al. 2020, arXiv:2006.04779, eq. 4)

    y = r + gamma * (1 - terminal) * max_a' Q_target(s', a')

The added term is - log softmax(Q)(a|s), the loss of behaviour cloning with Q as logits. So one formula holds all
three: alpha = 0 is Q-learning, alpha -> infinity is behaviour cloning, CQL lies between. With a table, setting the
gradient to zero gives what a fixed point must satisfy wherever the data have (s, a), with mu = softmax Q and D(a|s)
the data's shares:

    Q(s, a) = y(s, a) - alpha * ( mu(a|s) / D(a|s) - 1 )                        (as in the proof of their theorem 3.2)

An action is valued below its target where mu takes it more often than the data did, and above where less often.

Two experiments. CliffWalking (a table, exact values): 70 walkers took the safe path, 30 the edge; no other action is
in the data. Q-learning prefers an action nobody tried in every state and never arrives; behaviour cloning walks the
safe path, -17; CQL finds the better path of the two, -13, up to an alpha that the formula above predicts. CartPole
(networks, several seeds at once): the values of DQN leave all bounds, those of CQL stay near the true ones.

Where the code differs from the paper. The target is the maximum of a target network, as in the paper's experiments
with discrete actions, not the expectation under softmax Q that theorem 3.2 is about; so nothing promises Q <= V, and
large alphas break it (`conservatism.png`). The paper adds its term to QR-DQN on Atari frames, this file to a plain
DQN with the squared error of eq. 4. The table is trained on all data at once, each state weighted equally. With
CartPole behaviour cloning does as well as anything: that experiment shows overestimation, not that offline RL beats
imitation.
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
from torch import Tensor, nn

from llmcore_hf import lesson, offline_data
from llmcore_hf.checks import Check
from llmcore_hf.offline_data import OfflineDataset
from llmcore_hf.offline_rl import (
    BLUE,
    GREY,
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
    from matplotlib.figure import Figure

    from llmcore_hf.run_dir import RunDirectory


@dataclass
class Args(OfflineArguments):
    alpha: float = field(default=1.0, metadata={"help": "Weight of the conservative term."})
    alphas: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 1.0, 3.0, 5.0, 10.0],
        metadata={"help": "Further weights that the table is trained with, to show what alpha does."},
    )

    def problems(self) -> list[str]:
        found = super().problems()
        for name, values in (("alpha", [self.alpha]), ("alphas", self.alphas)):
            if not all(0 < value < math.inf for value in values):
                told = " ".join(map(str, values))
                found.append(f"--{name} {told}: it must be finite and above 0; Q-learning, alpha = 0, runs in any case")
        largest = max(value for value in (10.0, self.alpha, *self.alphas) if value < math.inf)  # not NaN either
        if self.tabular_steps < 100 * largest:
            found.append(
                f"--tabular_steps {self.tabular_steps}: with alpha up to {largest:g} the table needs "
                f"{100 * largest:.0f} steps to settle"
            )
        return found


class Method(NamedTuple):
    """One weighting of the two terms: td_weight * TD error + alpha * conservative term."""

    name: str
    td_weight: float
    alpha: float


CLONING = Method("behaviour cloning", 0.0, 1.0)


# ------------------------------------------------------------------------------------------------ the algorithm


def td_target(next_q: Tensor, batch: Batch, gamma: float) -> Tensor:
    """y = r + gamma * (1 - terminal) * max_a' Q_target(s', a'): (K, B) from next_q (K, B, A)."""
    return batch.rewards + gamma * (1 - batch.terminals) * next_q.max(-1).values


def loss_terms(q: Tensor, actions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both terms of eq. 4 for each transition: half the squared TD error, and log sum exp Q(s, .) - Q(s, a).

    Args:
        q: (K, B, A), values of all actions.
        actions: (K, B), the actions in the data.
        target: (K, B), without gradient.

    Returns:
        Two tensors (K, B).
    """
    q_taken = q.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (K, B)
    return 0.5 * (q_taken - target) ** 2, q.logsumexp(-1) - q_taken


def train_step(
    q_net: nn.Module,
    target_net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    methods: Weights,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """One gradient step of K networks; returns the means of both terms before it, (K,) each."""
    with torch.no_grad():
        target = td_target(target_net(batch.next_observations), batch, gamma)
    td, conservative = (term.mean(-1) for term in loss_terms(q_net(batch.observations), batch.actions, target))
    loss = methods.td_weight * td + methods.alpha * conservative  # (K,)
    optimizer.zero_grad(set_to_none=True)
    loss.sum().backward()  # networks share nothing, so the gradient of the sum is each network's own
    optimizer.step()
    return td.detach(), conservative.detach()


class Weights(NamedTuple):
    """The methods' weights as tensors, (K,)."""

    td_weight: Tensor
    alpha: Tensor

    @classmethod
    def of(cls, methods: list[Method], n_seeds: int = 1) -> Weights:
        """Each method `n_seeds` times in a row: K = len(methods) * n_seeds."""
        table = torch.tensor([[m.td_weight, m.alpha] for m in methods]).repeat_interleave(n_seeds, 0)
        return cls(table[:, 0], table[:, 1])


# ---------------------------------------------------------------------------------- experiment 1: a table, exact values


def fit_table(
    data: TabularData, methods: list[Method], steps: int, gamma: float, on_step: Callable[[int, Tensor, Tensor], None]
) -> Tensor:
    """Gradient descent on eq. 4 from Q = 0, with all data in each step; returns Q (K, S, A) of K methods.

    The step is 1 over the largest curvature the loss can have, td_weight + alpha / 2, so that no alpha diverges.
    `on_step(step, q, terms)` gets the values before the step and the weighted means of both terms, (2, K).
    """
    weight = Weights(*(column.double().unsqueeze(1) for column in Weights.of(methods)))  # (K, 1)
    step_size = 1 / (weight.td_weight + weight.alpha / 2)
    actions = data.batch.actions.expand(len(methods), -1)  # (K, M)
    q = torch.zeros(len(methods), *data.shares.shape, dtype=torch.float64)
    for step in range(steps):
        q.requires_grad_()
        target = td_target(q.detach()[:, data.batch.next_observations], data.batch, gamma)  # (K, M)
        td, conservative = (data.weights * term for term in loss_terms(q[:, data.batch.observations], actions, target))
        (gradient,) = torch.autograd.grad((weight.td_weight * td + weight.alpha * conservative).sum(), q)
        q = q.detach()
        on_step(step, q, torch.stack([td.detach(), conservative.detach()]).sum(-1) / (data.shares.sum()))
        q = q - step_size.unsqueeze(2) * gradient
    on_step(steps, q, torch.full((2, len(methods)), math.nan))
    return q


def fixed_point_error(q: Tensor, alpha: float, data: TabularData, gamma: float) -> float:
    """Largest | Q(s,a) - [ y(s,a) - alpha * (mu(a|s) / D(a|s) - 1) ] | over the pairs in the data; q is (S, A)."""
    batch, seen = data.batch, data.shares > 0
    y = torch.zeros_like(data.shares)  # (S, A), the mean target of each pair
    rows = (batch.observations, batch.actions)
    target = batch.rewards + gamma * (1 - batch.terminals) * q[batch.next_observations].amax(-1)
    y.index_put_(rows, data.weights / data.shares[rows] * target, accumulate=True)
    expected = y[seen] - alpha * (q.softmax(-1)[seen] / data.shares[seen] - 1)
    return float((q[seen] - expected).abs().max())


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
        return {"method": self.method.name, "alpha": self.method.alpha, **known}


def judge(method: Method, q: Tensor, data: TabularData, model: Model | None, gamma: float) -> Outcome:
    """Compare what Q promises with what its greedy policy gets, exactly."""
    greedy = q.argmax(-1)
    in_data = data.shares.sum(1) > 0
    unseen = data.shares.gather(1, greedy.unsqueeze(1)).squeeze(1) == 0
    value, returns = (
        (float(data.start @ model.value(greedy, gamma)), float(data.start @ model.returns(greedy)))
        if model
        else (math.nan, math.nan)
    )
    q_start = float(data.start @ q.amax(-1))
    return Outcome(method, q, greedy, int((unseen & in_data).sum()), q_start, value, returns)


def tabular(args: Args, data: TabularData, model: Model | None, run_dir: RunDirectory) -> tuple[list[Outcome], Curves]:
    """Train the table with every method and log the run; Q-learning and CQL also as curves."""
    weights = sorted({0.0, args.alpha, *args.alphas})
    methods = [CLONING, *(Method("CQL" if alpha else "Q-learning", 1.0, alpha) for alpha in weights)]
    shown = {"tabular/q_learning/": 1, "tabular/": 1 + weights.index(args.alpha)}
    curves, every = Curves(), max(1, args.tabular_steps // 40)

    def on_step(step: int, q: Tensor, terms: Tensor) -> None:
        if step % every and step != args.tabular_steps:
            return
        row: dict[str, Any] = {"step": step}
        curves.steps.append(step)
        for prefix, k in shown.items():
            now = judge(methods[k], q[k], data, model, args.tabular_gamma)
            curves.add(methods[k].name, *(np.array([number]) for number in (now.q_start, now.value, now.returns)))
            names = ("td_loss", "cql_loss", "q_start", "value", "return")
            numbers = (*terms[:, k].tolist(), now.q_start, now.value, now.returns)
            row |= {prefix + name: number for name, number in zip(names, numbers, strict=True)}
        run_dir.log(row)

    q = fit_table(data, methods, args.tabular_steps, args.tabular_gamma, on_step)
    return [judge(method, q[k], data, model, args.tabular_gamma) for k, method in enumerate(methods)], curves


class Fork(NamedTuple):
    """The one state of the CliffWalking data with two actions: what each is worth, and when CQL changes its mind."""

    state: int
    actions: tuple[int, int]  # the rare action, the frequent one
    y: tuple[float, float]  # their true values
    shares: tuple[float, float]  # D(a|s)
    returns: tuple[float, float]  # undiscounted, of a whole episode that takes the action

    @classmethod
    def find(cls, data: TabularData, model: Model, gamma: float) -> Fork:
        state = int((data.shares > 0).sum(1).argmax())
        frequent, rare = data.shares[state].argsort(descending=True)[:2].tolist()
        policies = data.shares.argmax(-1).repeat(2, 1)  # (2, S)
        policies[:, state] = torch.tensor([rare, frequent])
        y = [float(model.value(policy, gamma)[state]) for policy in policies]
        returns = [float(data.start @ model.returns(policy)) for policy in policies]
        shares = data.shares[state, [rare, frequent]].tolist()
        return cls(state, (rare, frequent), (y[0], y[1]), (shares[0], shares[1]), (returns[0], returns[1]))

    @property
    def crossover(self) -> float:
        """The alpha at which both actions have the same Q, so mu = 1/2, by the fixed point: above it, CQL imitates."""
        return (self.y[0] - self.y[1]) / (0.5 / self.shares[0] - 0.5 / self.shares[1])

    def fixed_point(self, alpha: float) -> tuple[float, float]:
        """Q of both actions at the fixed point, by bisection on their difference (no other action has any mu)."""

        def q(difference: float) -> tuple[float, float]:
            mu = 1 / (1 + math.exp(-difference))
            rare = self.y[0] - alpha * (mu / self.shares[0] - 1)
            return rare, self.y[1] - alpha * ((1 - mu) / self.shares[1] - 1)

        low, high = -700.0, 700.0
        for _ in range(100):
            middle = (low + high) / 2
            rare, frequent = q(middle)
            low, high = (middle, high) if rare - frequent > middle else (low, middle)
        return q(low)


# ------------------------------------------------------------------------------- experiment 2: networks, several seeds


def methods_of(args: Args) -> list[Method]:
    return [Method("DQN", 1.0, 0.0), Method("CQL", 1.0, args.alpha), CLONING]


def fit_networks(args: Args, dataset: OfflineDataset, on_step: Callable[[int, MLPs, Tensor], None]) -> None:
    """Train all methods with all seeds at once; networks of one seed see the same batches, whatever the method.

    `on_step(step, q_net, terms)` gets the means of both terms of eq. 4 since it was last called, (2, K).
    """
    methods = methods_of(args)
    weights, n_networks = Weights.of(methods, args.n_seeds), len(methods) * args.n_seeds
    columns = Batch(
        torch.from_numpy(dataset.observations),
        torch.from_numpy(dataset.actions),
        torch.from_numpy(dataset.rewards),
        torch.from_numpy(dataset.next_observations),
        torch.from_numpy(dataset.terminals).float(),
    )
    generator = torch.Generator().manual_seed(args.seed)
    sizes = (dataset.observations.shape[1], args.hidden_size, args.hidden_size, dataset.n_actions)
    q_net, target_net = (MLPs(n_networks, sizes, generator) for _ in range(2))
    optimizer = torch.optim.Adam(q_net.parameters(), lr=args.learning_rate)
    terms = []
    for step in range(1, args.max_steps + 1):
        if (step - 1) % args.target_update_interval == 0:
            target_net.load_state_dict(q_net.state_dict())
        rows = torch.randint(len(dataset), (args.n_seeds, args.batch_size), generator=generator)  # (seeds, B)
        rows = rows.repeat(len(methods), 1)  # (K, B)
        batch = Batch(*(column[rows] for column in columns))
        terms.append(torch.stack(train_step(q_net, target_net, optimizer, batch, weights, args.gamma)))
        if step % args.logging_steps == 0 or step == args.max_steps:
            on_step(step, q_net, torch.stack(terms).mean(0))
            terms.clear()


@torch.no_grad()
def evaluate(q_net: MLPs, n_networks: int, dataset: OfflineDataset, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Play greedily in the dataset's environment.

    Returns:
        Three tensors (K,), means over the episodes: max_a Q at the start, the discounted return that followed, the
        return. The last two are NaN when the environment is not known; Q is then taken at the starts in the data.
    """
    if dataset.env_id is None:
        starts = torch.from_numpy(dataset.starts).expand(n_networks, -1, -1)
        unknown = torch.full((n_networks,), math.nan)
        return q_net(starts).amax(-1).mean(1), unknown, unknown
    n = args.eval_episodes
    envs = gym.make_vec(dataset.env_id, num_envs=n_networks * n)
    limit = (envs.spec.max_episode_steps if envs.spec else None) or HORIZON
    observations, _ = envs.reset(seed=args.seed)
    going_on: np.ndarray = np.ones(n_networks * n, dtype=bool)
    value, returns, q_start = np.zeros(n_networks * n), np.zeros(n_networks * n), None
    for t in range(limit):
        q = q_net(torch.from_numpy(observations.reshape(n_networks, n, -1)).float())  # (K, n, A)
        q_start = q.amax(-1).mean(1) if q_start is None else q_start
        observations, rewards, terminated, truncated, _ = envs.step(q.argmax(-1).flatten().numpy())
        returns += going_on * rewards
        value += going_on * rewards * args.gamma**t
        going_on &= ~(terminated | truncated)
        if not going_on.any():
            break
    envs.close()
    return q_start, *(torch.from_numpy(total.reshape(n_networks, n).mean(1)) for total in (value, returns))


def train_networks(args: Args, dataset: OfflineDataset, run_dir: RunDirectory) -> Curves:
    """Train the networks and log the run: means over the seeds, CQL under the plain names."""
    methods, curves = methods_of(args), Curves()
    prefixes = {"CQL": "", "DQN": "dqn/", CLONING.name: "behaviour_cloning/"}

    def on_step(step: int, q_net: MLPs, terms: Tensor) -> None:
        found = (*terms, *evaluate(q_net, len(methods) * args.n_seeds, dataset, args))
        td, conservative, q_start, value, returns = (each.view(len(methods), args.n_seeds).numpy() for each in found)
        row: dict[str, Any] = {"step": step}
        curves.steps.append(step)
        for k, method in enumerate(methods):
            curves.add(method.name, q_start[k], value[k], returns[k])
            numbers = {"cql_loss": conservative[k], "value": value[k], "return": returns[k]}
            if method.td_weight:  # else the outputs are logits, not values
                numbers |= {"td_loss": td[k], "q_start": q_start[k]}
            row |= {prefixes[method.name] + name: float(number.mean()) for name, number in numbers.items()}
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
    "fixed_point": (
        "CQL(H) 的不动点：数据中每个 (s, a) 的 Q 等于目标减去 alpha * (mu / D - 1)。不成立说明损失或梯度写错了。",
        "The fixed point of CQL(H), computed from counts. If it does not hold, the loss or its gradient is wrong.",
    ),
    "beats_imitation": (
        "多数轨迹走安全路线，CQL 应从少数轨迹里学到更好的路，而且不用没见过的动作。失败时先看 alpha 是否过大。",
        "CQL should get at least what imitation gets without taking untried actions; on the lesson's data it finds the "
        "shorter path that few took. If it fails, is alpha too large?",
    ),
    "alpha_where_it_imitates": (
        "alpha 越大越接近模仿。由不动点公式可以预先算出贪心路径在哪个 alpha 切换，扫描结果应与它一致。",
        "The larger alpha, the closer to imitation. The fixed point predicts where the greedy path changes, and the "
        "sweep must agree.",
    ),
    "conservative_below_that_alpha": (
        "mu 大于数据占比的动作，Q 低于真值；alpha 更大时常见动作反而被抬高，Q 可高于真值：没有普遍的逐点下界。",
        "Q lies below the true value where mu takes an action more often than the data did. With a larger alpha the "
        "frequent action is raised instead: there is no bound for every alpha.",
    ),
    "dqn_overestimates": (
        "DQN 的 Q 超过任何策略可能得到的回报，因为自举不断放大被高估的动作；CQL 的 Q 应留在真值附近。",
        "Q of DQN exceeds what any policy can get, because bootstrapping feeds on overestimated actions; Q of CQL stays "
        "near it.",
    ),
    "q_start_near_true_value": (
        "把 Q 与自己的贪心策略实测的折扣回报相比，相差很大说明 alpha 太小或太大。",
        "Q compared with the discounted return its own greedy policy gets: far apart means alpha is too small or too "
        "large.",
    ),
    "better_than_dqn": (
        "数据、网络、批次都相同，只差保守项。行为克隆在 CartPole 上同样好：这里展示的是高估，不是胜过模仿。",
        "Same data, networks and batches; only the conservative term differs. Behaviour cloning is as good on CartPole: "
        "this shows overestimation, not a win over imitation.",
    ),
    "enough_target_copies": (
        "目标网络复制次数太少时 Q 还没长到真值，看上去像保守，其实只是没训练够。",
        "After few copies Q has not grown to its value yet: that looks conservative and is only unfinished.",
    ),
}
INVARIANTS = ("q_learning_leaves_the_data", "fixed_point")
ONLY_HERE = "made on the lesson's own data only"


def make_check(name: str, passed: bool | None, observed: Any, expected: str) -> Check:
    kind: Literal["invariant", "learning"] = "invariant" if name in INVARIANTS else "learning"
    return Check(f"cql.{name}", kind, passed, observed, expected, *WHY[name])


def table_checks(outcomes: list[Outcome], model: Model | None, args: Args, fork: Fork | None) -> list[Check]:
    """What any dataset should show. `fork` is None when the data are not the lesson's own."""
    main = next(o for o in outcomes if o.method.name == "CQL" and o.method.alpha == args.alpha)
    cloning = outcomes[0]
    expected = "return at least that of behaviour cloning, greedy actions all in the data"
    passed = main.returns >= cloning.returns and main.n_unseen == 0
    if fork is not None:
        expected = f"the best return, {fork.returns[0]:g}, above behaviour cloning, greedy actions all in the data"
        passed = passed and main.returns == fork.returns[0] > cloning.returns
    observed = {"CQL": main.returns, CLONING.name: cloning.returns, "greedy actions not in the data": main.n_unseen}
    return [make_check("beats_imitation", passed if model else None, observed, expected)]


def reference_checks(outcomes: list[Outcome], data: TabularData, args: Args, fork: Fork | None) -> list[Check]:
    """What must come out on the lesson's own data, where paths part at one `fork`; skipped without one."""
    names = ("q_learning_leaves_the_data", "fixed_point", "alpha_where_it_imitates", "conservative_below_that_alpha")
    if fork is None:
        return [make_check(name, None, None, ONLY_HERE) for name in names]
    swept, naive = [o for o in outcomes if o.method.name == "CQL"], outcomes[1]
    n_states = int((data.shares.sum(1) > 0).sum())
    errors = {o.method.alpha: fixed_point_error(o.q, o.method.alpha, data, args.tabular_gamma) for o in swept}
    best, frequent, switch = *fork.returns, fork.crossover
    return [
        make_check(
            names[0],
            naive.n_unseen == n_states and naive.value < naive.q_start - 1,
            naive.as_dict(),
            f"greedy actions that are not in the data in all {n_states} states, and Q(start) above the true value",
        ),
        make_check(
            names[1],
            all(error < 0.01 * (1 + alpha) for alpha, error in errors.items()),
            {f"alpha {alpha:g}": error for alpha, error in errors.items()},
            "Q = y - alpha * (mu / D - 1) at every pair in the data, within 0.01 * (1 + alpha)",
        ),
        make_check(
            names[2],
            all(
                o.returns == (best if o.method.alpha < switch else frequent) and o.n_unseen == 0
                for o in swept
                if abs(o.method.alpha / switch - 1) > 0.05
            ),
            {f"alpha {o.method.alpha:g}": o.returns for o in swept},
            f"{best:g} below alpha = {switch:.3f} and {frequent:g} above, as the fixed point predicts",
        ),
        make_check(
            names[3],
            all(o.q_start <= o.value for o in swept if o.method.alpha < switch),
            {f"alpha {o.method.alpha:g}": {"Q": o.q_start, "V": o.value} for o in swept},
            f"Q(start) <= V(start) of the own greedy policy for alpha < {switch:.3f}; no bound is claimed beyond",
        ),
    ]


def network_checks(curves: Curves, dataset: OfflineDataset, args: Args, reference: bool) -> list[Check]:
    """`reference`: the data are the lesson's own, whose measured spread set the bounds (README.md)."""
    known, largest = dataset.env_id is not None, largest_value(dataset, args.gamma)
    margin = 0.25 * abs(largest)
    # (seeds,), the highest over the training
    peaks = {name: np.max(curves.q_start[name], axis=0) for name in ("DQN", "CQL")}
    overestimates = (peaks["DQN"] > 2 * largest).all() and (peaks["CQL"] < largest + margin).all()
    q_start, value = curves.q_start["CQL"][-1], curves.value["CQL"][-1]
    difference = float(np.abs(q_start - value).max())
    values = {name: float(rows[-1].mean()) for name, rows in curves.value.items()}
    copies = -(-args.max_steps // args.target_update_interval) - 1  # after the first, which copies the start
    share = 1 - args.gamma ** (copies + 1)
    return [
        make_check(
            "dqn_overestimates",
            bool(overestimates) if reference else None,
            {"lowest peak of DQN": float(peaks["DQN"].min()), "highest peak of CQL": float(peaks["CQL"].max())},
            f"in every seed Q(start) of DQN at some time above {2 * largest:.2f}, twice what any policy can get, "
            f"and that of CQL never above {largest + margin:.2f}"
            if reference
            else ONLY_HERE,
        ),
        make_check(
            "q_start_near_true_value",
            difference < margin if known else None,
            {"Q(start)": float(q_start.mean()), "true value": float(value.mean()), "largest difference": difference},
            f"in every seed Q(start) within {margin:.2f} of the discounted return of its own greedy policy",
        ),
        make_check(
            "better_than_dqn",
            values["CQL"] > values["DQN"] + (margin if reference else 0) if known else None,
            values,
            "discounted return above that of DQN" + (f" by {margin:.2f}" if reference else ""),
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
        alpha = f" (alpha = {outcome.method.alpha:g})" if outcome.method.name == "CQL" else ""
        unseen = f"{outcome.n_unseen} of {n_states} actions never tried"
        axis.set_title(
            f"{outcome.method.name}{alpha}: {ends}, {unseen}", fontsize=11, color="black" if arrives else RED
        )
    handles = [
        plt.Line2D([], [], color=color, marker=">", linestyle="none", label=label)
        for color, label in ((BLUE, "greedy action, in the data"), (RED, "greedy action that nobody tried"))
    ]
    handles.append(
        plt.Rectangle((0, 0), 1, 1, facecolor="#ffe9a8", edgecolor="#999999", label="where the walkers part")
    )
    figure.legend(handles=handles, loc="outside lower center", ncol=3, fontsize=10, frameon=False)
    return figure


def conservatism_figure(outcomes: list[Outcome], fork: Fork) -> Figure:
    """Left: what Q promises at the start and what its greedy policy gets, by alpha. Right: the two Q at the fork."""
    plt = lesson.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.4, 5.0), layout="constrained")
    figure.suptitle("What does alpha do? (CliffWalking, exact values)", fontsize=13, fontweight="bold")
    swept = [o for o in outcomes if o.method.name == "CQL"]
    naive = next(o for o in outcomes if o.method.name == "Q-learning")
    alphas = [o.method.alpha for o in swept]
    left.plot(alphas, [o.q_start for o in swept], "o-", color=BLUE, label="promised: max Q(start, a)")
    left.plot(alphas, [o.value for o in swept], "s--", color="black", label="true value of its greedy policy")
    left.set_title(
        f"Does Q promise too much? (alpha = 0 promises {naive.q_start:.0f} and gets {naive.value:,.0f})", fontsize=11
    )
    left.set_ylabel("discounted return from the start")
    grid = np.geomspace(min(alphas) / 1.5, max(alphas) * 1.5, 200)
    predicted = np.array([fork.fixed_point(float(alpha)) for alpha in grid])  # (200, 2)
    names = ("along the cliff", "to the upper wall")
    for i, (color, share) in enumerate(zip((BLUE, "#ff7f0e"), fork.shares, strict=True)):
        right.plot(grid, predicted[:, i], color=color, label=f"{names[i]} ({share:.0%} of the data)")
        points = [float(o.q[fork.state, fork.actions[i]]) for o in swept]
        right.plot(alphas, points, "o", color=color)
        right.axhline(fork.y[i], color=color, linewidth=0.8, linestyle=":")
    right.set_title("Q where the paths part (lines: predicted, points: trained, dotted: true)", fontsize=11)
    right.set_ylabel("Q(fork, a)")
    for axis in (left, right):
        axis.axvline(fork.crossover, color=GREY, linewidth=1, linestyle="--")
        axis.set(xscale="log", xlabel="alpha, weight of the conservative term")
        axis.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axis.minorticks_off()
        note = f"from alpha = {fork.crossover:.2f} on,\nCQL imitates"
        place = {"transform": axis.get_xaxis_transform(), "ha": "right", "fontsize": 9, "color": "#555555"}
        axis.text(fork.crossover / 1.06, 0.2 if axis is left else 0.8, note, **place)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=2)
    return figure


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
    outcomes, curves = tabular(args, data, model, run_dir)
    run_dir.write("table.json", json.dumps([outcome.as_dict() for outcome in outcomes], indent=2) + "\n")
    fork = Fork.find(data, model, args.tabular_gamma) if reference and model else None
    run_dir.checks += table_checks(outcomes, model, args, fork)
    run_dir.checks += reference_checks(outcomes, data, args, fork)
    if fork is None:
        run_dir.write(
            "training_curves.png", lesson.png(curves_figure(curves, f"CQL on {dataset.source}", dataset, None))
        )
        return
    shown = [o for o in outcomes if o.method.name != "CQL" or o.method.alpha == args.alpha]
    run_dir.write("policies.png", lesson.png(policies_figure(shown, data)))
    run_dir.write("conservatism.png", lesson.png(conservatism_figure(outcomes, fork)))


def run_networks(args: Args, dataset: OfflineDataset, run_dir: RunDirectory, reference: bool) -> None:
    curves = train_networks(args, dataset, run_dir)
    run_dir.checks += network_checks(curves, dataset, args, reference)
    largest = largest_value(dataset, args.gamma) if reference else None
    title = "CartPole, offline: how far from the truth are the values?" if reference else f"CQL on {dataset.source}"
    run_dir.write("training_curves.png", lesson.png(curves_figure(curves, title, dataset, largest)))


if __name__ == "__main__":
    lesson.main(__file__)
