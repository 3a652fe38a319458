"""Conservative Q-learning against loops, closed forms and finite differences, and what its checks notice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lesson_doubles import FakeRun, ShortEpisodes

from llmcore_hf import cli, lesson, offline_data
from llmcore_hf.errors import ConfigError
from llmcore_hf.run_dir import validate_summary

cql = lesson.load("cql").file
GAMMA = 0.99


@pytest.fixture(scope="module")
def cliff() -> SimpleNamespace:
    """The table experiment, trained once."""
    args = cql.Args(tabular_steps=1500)
    data = cql.tabulate(offline_data.cliff_walking(70, 30))
    model = cql.Model.of("CliffWalking-v1")
    outcomes, curves = cql.tabular(args, data, model, FakeRun())
    return SimpleNamespace(
        args=args, data=data, model=model, outcomes=outcomes, curves=curves, fork=cql.Fork.find(data, model, GAMMA)
    )


def random_batch(k: int = 3, b: int = 5, n_actions: int = 4, seed: int = 0) -> SimpleNamespace:
    g = torch.Generator().manual_seed(seed)
    double = {"generator": g, "dtype": torch.float64}
    return SimpleNamespace(
        q=torch.randn(k, b, n_actions, **double),
        next_q=torch.randn(k, b, n_actions, **double),
        batch=cql.Batch(
            torch.randn(k, b, 2, **double),
            torch.randint(n_actions, (k, b), generator=g),
            torch.randn(k, b, **double),
            torch.randn(k, b, 2, **double),
            (torch.rand(k, b, **double) < 0.4).double(),
        ),
    )


# --------------------------------------------------------------------------------------------------------- the algorithm


def test_target_and_loss_are_those_of_a_plain_loop() -> None:
    r = random_batch()
    target = cql.td_target(r.next_q, r.batch, 0.9)
    td, conservative = cql.loss_terms(r.q, r.batch.actions, target)
    for k in range(3):
        for b in range(5):
            q, action = r.q[k, b].tolist(), int(r.batch.actions[k, b])
            y = float(r.batch.rewards[k, b])
            if not r.batch.terminals[k, b]:
                y += 0.9 * max(r.next_q[k, b].tolist())
            assert target[k, b] == pytest.approx(y)
            assert td[k, b] == pytest.approx((q[action] - y) ** 2 / 2)
            assert conservative[k, b] == pytest.approx(math.log(sum(math.exp(x) for x in q)) - q[action])


def test_the_conservative_term_is_the_loss_of_behaviour_cloning() -> None:
    r = random_batch()
    _, conservative = cql.loss_terms(r.q, r.batch.actions, torch.zeros(3, 5))
    cloning = F.cross_entropy(r.q.flatten(0, 1), r.batch.actions.flatten(), reduction="none").view(3, 5)
    torch.testing.assert_close(conservative, cloning)


def test_the_gradient_is_that_of_finite_differences_and_of_the_closed_form() -> None:
    r = random_batch()
    target, alpha = cql.td_target(r.next_q, r.batch, 0.9), 0.7

    def loss(q: torch.Tensor) -> torch.Tensor:
        td, conservative = cql.loss_terms(q, r.batch.actions, target)
        return (td + alpha * conservative).sum()

    q = r.q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(q), q)
    taken = F.one_hot(r.batch.actions, 4).double()
    closed = taken * (r.q - target.unsqueeze(-1)) + alpha * (r.q.softmax(-1) - taken)
    torch.testing.assert_close(gradient, closed)
    shift = torch.zeros_like(r.q)
    shift[1, 2, 3] = 1e-6
    numeric = (loss(r.q + shift) - loss(r.q - shift)) / 2e-6
    assert gradient[1, 2, 3] == pytest.approx(float(numeric), abs=1e-7)


def test_stacked_networks_are_so_many_single_ones() -> None:
    nets = cql.MLPs(3, (2, 8, 8, 4), torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 2)
    for k in range(3):
        layers = []
        for weight, bias in zip(nets.weights, nets.biases, strict=True):
            linear = torch.nn.Linear(*weight.shape[1:])
            linear.load_state_dict({"weight": weight[k].T, "bias": bias[k, 0]})
            layers += [linear, torch.nn.ReLU()]
        torch.testing.assert_close(nets(x)[k], torch.nn.Sequential(*layers[:-1])(x[k]))
    assert all(weight.abs().max() <= 1 / math.sqrt(weight.shape[1]) for weight in nets.weights)


def test_a_step_descends_the_loss_of_equation_4() -> None:
    """A step of SGD against the gradient of the formula, written out for one network."""
    r = random_batch(k=1)
    batch = cql.Batch(*(each if each.dtype == torch.long else each.float() for each in r.batch))
    net, target = (cql.MLPs(1, (2, 8, 4), torch.Generator().manual_seed(seed)) for seed in (0, 1))
    loss = torch.zeros(())
    for b in range(5):
        state, action = batch.observations[:, b : b + 1], int(batch.actions[0, b])
        q = net(state)[0, 0]
        with torch.no_grad():
            following = target(batch.next_observations[:, b : b + 1]).max()
        y = batch.rewards[0, b] + 0.9 * (1 - batch.terminals[0, b]) * following
        loss = loss + ((q[action] - y) ** 2 / 2 + 2.5 * (q.exp().sum().log() - q[action])) / 5
    expected = [
        p.detach() - 0.1 * g
        for p, g in zip(net.parameters(), torch.autograd.grad(loss, [*net.parameters()]), strict=True)
    ]
    weights = cql.Weights.of([cql.Method("CQL", 1.0, 2.5)])
    td, conservative = cql.train_step(net, target, torch.optim.SGD(net.parameters(), lr=0.1), batch, weights, 0.9)
    assert float(td + 2.5 * conservative) == pytest.approx(loss.item(), rel=1e-5)
    for found, wanted in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted)


def test_networks_of_a_method_stand_side_by_side() -> None:
    weights = cql.Weights.of(cql.methods_of(cql.Args(alpha=2.5)), n_seeds=2)
    assert weights.td_weight.tolist() == [1, 1, 1, 1, 0, 0]
    assert weights.alpha.tolist() == [0, 0, 2.5, 2.5, 1, 1]


def test_a_step_of_many_networks_is_so_many_steps_of_one() -> None:
    """Nothing leaks between networks: one with alpha = 0 is not moved by its neighbour's conservative term."""
    r = random_batch(k=2)
    batch = cql.Batch(*(each if each.dtype == torch.long else each.float() for each in r.batch))
    weights = cql.Weights.of([cql.Method("DQN", 1.0, 0.0), cql.Method("CQL", 1.0, 2.0)])
    both, target = (cql.MLPs(2, (2, 8, 4), torch.Generator().manual_seed(seed)) for seed in (0, 1))
    before, fixed = both.state_dict(), target.state_dict()
    before, fixed = ({name: each.clone() for name, each in state.items()} for state in (before, fixed))
    terms = cql.train_step(both, target, torch.optim.Adam(both.parameters()), batch, weights, 0.9)
    assert all(torch.equal(each, fixed[name]) for name, each in target.state_dict().items())
    for k in range(2):
        one, its_target = (cql.MLPs(1, (2, 8, 4), torch.Generator()) for _ in range(2))
        one.load_state_dict({name: each[k : k + 1] for name, each in before.items()})
        its_target.load_state_dict({name: each[k : k + 1] for name, each in fixed.items()})
        rows = cql.Batch(*(each[k : k + 1] for each in batch))
        alone = cql.Weights(*(each[k : k + 1] for each in weights))
        found = cql.train_step(one, its_target, torch.optim.Adam(one.parameters()), rows, alone, 0.9)
        for name, each in one.state_dict().items():
            torch.testing.assert_close(each, both.state_dict()[name][k : k + 1])
        torch.testing.assert_close(torch.cat(found), torch.stack(terms)[:, k])


def test_networks_of_a_seed_see_the_same_batches_and_a_late_target(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, copies = [], []

    def record(q_net, target_net, optimizer, batch, weights, gamma):
        same = torch.equal(q_net.weights[0], target_net.weights[0])
        seen.append(batch.observations)
        copies.append(same)
        with torch.no_grad():
            q_net.weights[0].add_(1)
        return torch.zeros(6), torch.zeros(6)

    monkeypatch.setattr(cql, "train_step", record)
    args = cql.Args(n_seeds=2, max_steps=7, target_update_interval=3, logging_steps=5, batch_size=4)
    steps = []
    cql.fit_networks(args, offline_data.cartpole(50, 0.4, 0), lambda step, *_: steps.append(step))
    assert copies == [True, False, False, True, False, False, True]
    assert steps == [5, 7]
    rows = seen[0].view(3, 2, 4, 4)  # (methods, seeds, B, D)
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0, 0], rows[0, 1]) and not torch.equal(seen[0], seen[1])


def test_timeouts_are_bootstrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only terminals end the return: with every row a timeout the target keeps the value of the next state."""
    batches = []
    zeros = torch.zeros(3), torch.zeros(3)
    monkeypatch.setattr(cql, "train_step", lambda q, t, o, batch, w, g: (batches.append(batch), zeros)[1])
    dataset = offline_data.cartpole(30, 0.0, 0)
    assert dataset.timeouts.any() and not dataset.terminals.any()
    cql.fit_networks(cql.Args(n_seeds=1, max_steps=3, batch_size=30), dataset, lambda *_: None)
    assert all(not batch.terminals.any() for batch in batches)


# ------------------------------------------------------------------------------------------------------------- the table


def test_without_the_term_it_is_q_learning_from_zero(cliff: SimpleNamespace) -> None:
    """Every next state has an untried action worth 0, so the target is the reward: Q = -1 in the data, 0 elsewhere."""
    naive = next(o for o in cliff.outcomes if o.method.name == "Q-learning")
    expected = -(cliff.data.shares > 0).double()
    torch.testing.assert_close(naive.q, expected)
    assert naive.n_unseen == 27 and naive.q_start == 0
    assert naive.value == pytest.approx(-100 / (1 - GAMMA))  # right from the start is the cliff, forever


def test_without_the_td_error_it_imitates(cliff: SimpleNamespace) -> None:
    cloning = cliff.outcomes[0]
    visited = cliff.data.shares.sum(1) > 0
    assert torch.equal(cloning.greedy[visited], cliff.data.shares.argmax(-1)[visited])
    torch.testing.assert_close(cloning.q.softmax(-1)[visited], cliff.data.shares[visited], atol=0.01, rtol=0)
    assert cloning.returns == -17


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0, 3.0, 5.0, 10.0])
def test_cql_reaches_the_predicted_fixed_point(cliff: SimpleNamespace, alpha: float) -> None:
    outcome = next(o for o in cliff.outcomes if o.method.name == "CQL" and o.method.alpha == alpha)
    assert cql.fixed_point_error(outcome.q, alpha, cliff.data, GAMMA) < 0.01 * (1 + alpha)
    predicted = cliff.fork.fixed_point(alpha)
    found = outcome.q[cliff.fork.state, list(cliff.fork.actions)]
    assert found.tolist() == pytest.approx(predicted, abs=0.05 * (1 + alpha))  # untried actions still have some mu
    assert outcome.returns == (-13 if alpha < 3.667 else -17)


def test_the_fork_has_closed_forms(cliff: SimpleNamespace) -> None:
    def discounted(steps: int) -> float:
        return -(1 - GAMMA**steps) / (1 - GAMMA)

    assert cliff.fork.state == 24 and cliff.fork.actions == (1, 0)
    assert cliff.fork.y == pytest.approx((discounted(12), discounted(16)))
    assert cliff.fork.returns == (-13, -17)
    assert cliff.fork.crossover == pytest.approx((discounted(12) - discounted(16)) / (1 / 0.6 - 1 / 1.4))
    at_switch = cliff.fork.fixed_point(cliff.fork.crossover)
    assert at_switch[0] == pytest.approx(at_switch[1])


@pytest.mark.parametrize("alpha", [1e-3, 0.5, 2.0, 50.0])
def test_the_fixed_point_solves_its_equation(cliff: SimpleNamespace, alpha: float) -> None:
    q = np.array(cliff.fork.fixed_point(alpha))
    mu = np.exp(q - q.max()) / np.exp(q - q.max()).sum()
    assert q == pytest.approx(np.array(cliff.fork.y) - alpha * (mu / np.array(cliff.fork.shares) - 1), abs=1e-6)


def test_the_fixed_point_error_sees_a_moved_value(cliff: SimpleNamespace) -> None:
    outcome = next(o for o in cliff.outcomes if o.method.alpha == 1.0 and o.method.name == "CQL")
    moved = outcome.q.clone()
    moved[24, 1] += 0.5
    assert cql.fixed_point_error(moved, 1.0, cliff.data, GAMMA) > 0.3


def test_stochastic_data_are_averaged() -> None:
    """One pair with two outcomes, 3 to 1: without other actions in the state, Q is the mean target."""
    columns = {
        "observations": np.zeros(4, int),
        "actions": np.zeros(4, int),
        "rewards": np.array([1.0, 1.0, 1.0, 5.0]),
        "next_observations": np.ones(4, int),
        "terminals": np.ones(4, bool),
        "timeouts": np.zeros(4, bool),
    }
    data = cql.tabulate(offline_data.build(columns, {}, "mine"))
    q = cql.fit_table(data, [cql.Method("Q-learning", 1.0, 0.0)], 1000, 0.9, lambda *_: None)
    assert q[0, 0, 0] == pytest.approx(2.0)
    assert cql.fixed_point_error(q[0], 0.0, data, 0.9) < 1e-9


# ------------------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_is_that_of_a_plain_loop() -> None:
    """Networks that always push to one side: every episode is short, and its value follows from its length."""
    args = cql.Args(eval_episodes=4, seed=5)
    dataset = offline_data.cartpole(50, 0.4, 0)
    nets = cql.MLPs(2, (4, 2), torch.Generator().manual_seed(0))
    with torch.no_grad():
        nets.weights[0].zero_()
        nets.biases[0].copy_(torch.tensor([[[3.0, 1.0]], [[1.0, 7.0]]]))  # left, right
    q_start, value, returns = cql.evaluate(nets, 2, dataset, args)
    assert q_start.tolist() == [3.0, 7.0]
    env = gym.make_vec("CartPole-v1", num_envs=8)
    env.reset(seed=5)
    lengths, going_on = np.zeros(8), np.ones(8, bool)
    while going_on.any():
        _, _, terminated, truncated, _ = env.step(np.array([0] * 4 + [1] * 4))
        lengths += going_on
        going_on &= ~(terminated | truncated)
    assert returns.tolist() == lengths.reshape(2, 4).mean(1).tolist()
    assert value.tolist() == pytest.approx(
        ((1 - args.gamma**lengths) / (1 - args.gamma)).reshape(2, 4).mean(1).tolist()
    )


def test_a_cut_episode_counts_no_further_and_q_is_that_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = offline_data.cartpole(50, 0.4, 0)
    monkeypatch.setattr(gym, "make_vec", lambda env_id, num_envs: ShortEpisodes(num_envs))
    nets = cql.MLPs(2, (4, 2), torch.Generator().manual_seed(0))
    q_start, value, returns = cql.evaluate(nets, 2, dataset, cql.Args(eval_episodes=3))
    torch.testing.assert_close(q_start, nets.biases[0].max(-1).values.flatten())  # observation 0
    assert returns.tolist() == [2.0, 5.0]  # 1, 2, 3 and 4, 5, 6 steps
    assert value.tolist() == pytest.approx(
        [np.mean([sum(0.95**t for t in range(n)) for n in lengths]) for lengths in ((1, 2, 3), (4, 5, 6))]
    )


def test_without_an_environment_only_q_is_known() -> None:
    cartpole = offline_data.cartpole(200, 0.4, 0)
    columns = {name: getattr(cartpole, name) for name in offline_data.COLUMNS}
    dataset = offline_data.build(columns, {}, "mine")
    nets = cql.MLPs(2, (4, 8, 2), torch.Generator().manual_seed(0))
    q_start, value, returns = cql.evaluate(nets, 2, dataset, cql.Args())
    starts = torch.from_numpy(dataset.starts)
    torch.testing.assert_close(q_start, nets(starts.expand(2, -1, -1)).max(-1).values.mean(1))
    assert torch.isnan(value).all() and torch.isnan(returns).all()


def test_the_largest_value_is_a_geometric_sum() -> None:
    dataset = offline_data.cartpole(50, 0.4, 0)
    assert cql.largest_value(dataset, 0.95) == pytest.approx(sum(0.95**t for t in range(500)))


# --------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 1.0}, "--gamma 1.0: a discount is in [0, 1)"),
        ({"gamma": math.nan}, "--gamma nan: a discount is in [0, 1)"),
        ({"tabular_gamma": -0.1}, "--tabular_gamma -0.1: a discount is in [0, 1)"),
        ({"alpha": 0.0}, "--alpha 0.0: it must be finite and above 0"),
        ({"alpha": math.nan}, "--alpha nan: it must be finite and above 0"),
        ({"alphas": [1.0, math.inf]}, "--alphas 1.0 inf: it must be finite and above 0"),
        ({"epsilon": 1.5}, "--epsilon 1.5: a share is in [0, 1]"),
        ({"learning_rate": math.nan}, "--learning_rate nan: it must be a finite number above 0"),
        ({"n_edge": 70}, "--n_edge 70: it must be below --n_safe"),
        ({"tabular_steps": 999}, "--tabular_steps 999: with alpha up to 10 the table needs 1000 steps"),
        ({"alpha": 200.0}, "--tabular_steps 10000: with alpha up to 200 the table needs 20000 steps"),
        ({"env_id": "CartPool-v1", "dataset_path": "x"}, "--env_id: the environment CartPool-v1 cannot be made"),
        ({"env_id": "Pendulum-v1", "dataset_path": "x"}, "--env_id: the environment Pendulum-v1 has the actions Box"),
        ({"n_safe": 0, "n_edge": -1}, "--n_safe 0: it must be 1 or more"),
        *(
            ({name: 0}, f"--{name} 0: it must be 1 or more")
            for name in (
                *("n_edge", "max_steps", "n_seeds", "n_transitions", "batch_size", "hidden_size"),
                *("target_update_interval", "logging_steps", "eval_episodes"),
            )
        ),
    ],
)
def test_a_bad_option_is_named(options: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cql.Args(**options)
    assert words in str(caught.value) and len(caught.value.problems) == (2 if "n_safe" in options else 1)


# ---------------------------------------------------------------------------------------------------------------- checks


def failed(checks: list) -> set[str]:
    return {check.id.removeprefix("cql.") for check in checks if not check.passed}


def table_failures(cliff: SimpleNamespace, **changes: float) -> set[str]:
    args = cql.Args(**{"tabular_steps": 1000, **changes})
    outcomes, _ = cql.tabular(args, cliff.data, cliff.model, FakeRun())
    checks = cql.table_checks(outcomes, cliff.model, args, cliff.fork)
    return failed(checks + cql.reference_checks(outcomes, cliff.data, args, cliff.fork))


def test_all_checks_of_the_table_pass(cliff: SimpleNamespace) -> None:
    assert table_failures(cliff) == set()


def test_an_alpha_that_imitates_is_noticed(cliff: SimpleNamespace) -> None:
    assert table_failures(cliff, alpha=5.0) == {"beats_imitation"}


@pytest.mark.parametrize(
    ("broken", "notices"),
    [
        (lambda q, a, y, td, gap: (td, -gap), {"fixed_point", "beats_imitation", "alpha_where_it_imitates"}),
        (lambda q, a, y, td, gap: (td, 0 * gap), {"fixed_point", "beats_imitation", "alpha_where_it_imitates"}),
        (lambda q, a, y, td, gap: (2 * td, gap), {"fixed_point"}),
        (lambda q, a, y, td, gap: (td, 2 * gap), {"fixed_point"}),
        (lambda q, a, y, td, gap: (td, q.logsumexp(-1)), {"fixed_point"}),
        (lambda q, a, y, td, gap: (td, q.mean(-1) - q.gather(-1, a.unsqueeze(-1)).squeeze(-1)), {"fixed_point"}),
    ],
    ids=["sign", "dropped", "doubled td", "doubled term", "no push up", "mean for logsumexp"],
)
def test_a_broken_loss_is_noticed(cliff: SimpleNamespace, broken, notices, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cql.loss_terms
    monkeypatch.setattr(cql, "loss_terms", lambda q, a, y: broken(q, a, y, *right(q, a, y)))
    assert notices & table_failures(cliff)


@pytest.mark.parametrize(
    "broken",
    [
        lambda q, batch, gamma: batch.rewards + gamma * (1 - batch.terminals) * q.min(-1).values,
        lambda q, batch, gamma: batch.rewards + (1 - batch.terminals) * q.max(-1).values,
        lambda q, batch, gamma: batch.rewards + gamma * batch.terminals * q.max(-1).values,
        lambda q, batch, gamma: batch.rewards - gamma * (1 - batch.terminals) * q.max(-1).values,
    ],
    ids=["minimum", "no gamma", "terminals inverted", "sign"],
)
def test_a_broken_target_is_noticed(cliff: SimpleNamespace, broken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cql, "td_target", broken)
    assert {"fixed_point", "alpha_where_it_imitates"} & table_failures(cliff)


def curves_of(dqn: list[float], cql_q: list[float], value: float = 20.0, dqn_value: float = 7.6) -> object:
    """Two evaluations of two seeds; `dqn` and `cql_q` are the last ones' Q(start)."""
    curves = cql.Curves(steps=[1, 2])
    for name, q, v in (("DQN", dqn, dqn_value), ("CQL", cql_q, value), (cql.CLONING.name, [0.0, 0.0], 20.0)):
        for scale in (0.9, 1.0):
            curves.add(name, scale * np.array(q), np.full(2, v), np.full(2, 200.0))
    return curves


@pytest.mark.parametrize(
    ("curves", "noticed"),
    [
        (curves_of([190.0, 60.0], [21.0, 22.5]), set()),
        (curves_of([190.0, 39.0], [21.0, 22.5]), {"dqn_overestimates"}),
        (curves_of([190.0, 60.0], [21.0, 25.5]), {"dqn_overestimates", "q_start_near_true_value"}),
        (curves_of([190.0, 60.0], [21.0, 14.0]), {"q_start_near_true_value"}),
        (curves_of([190.0, 60.0], [21.0, 22.0], dqn_value=16.0), {"better_than_dqn"}),
    ],
)
def test_the_checks_of_the_networks_notice(curves: object, noticed: set[str]) -> None:
    dataset = offline_data.cartpole(50, 0.4, 0)
    assert failed(cql.network_checks(curves, dataset, cql.Args(), reference=True)) == noticed


def test_too_few_target_copies_are_noticed() -> None:
    """The trap: 40 targets after 2000 steps reach 20 * (1 - 0.95^40) = 17.4 of 20, which is not conservatism."""
    dataset = offline_data.cartpole(50, 0.4, 0)
    args = cql.Args(max_steps=2000, target_update_interval=50)
    check = cql.network_checks(curves_of([190.0, 60.0], [17.0, 17.0]), dataset, args, reference=True)[-1]
    assert check.id == "cql.enough_target_copies" and not check.passed
    assert check.observed["share"] == pytest.approx(1 - 0.95**40)


# --------------------------------------------------------------------------------------------------------------- figures


def test_the_policies_figure_says_what_nobody_tried(cliff: SimpleNamespace) -> None:
    figure = cql.policies_figure([cliff.outcomes[0], cliff.outcomes[1], cliff.outcomes[4]], cliff.data)
    assert [axis.get_title() for axis in figure.axes] == [
        "behaviour cloning: return -17, 0 of 27 actions never tried",
        "Q-learning: never reaches the goal, 27 of 27 actions never tried",
        "CQL (alpha = 1): return -13, 0 of 27 actions never tried",
    ]
    arrows = [[text for text in axis.texts if text.get_text() == ""] for axis in figure.axes]
    assert [len(each) for each in arrows] == [27, 27, 27]
    red, blue = ([a.arrow_patch.get_edgecolor() for a in arrows[i]] for i in (1, 2))
    assert len(set(red)) == len(set(blue)) == 1 and red[0] != blue[0]
    assert lesson.png(figure).startswith(b"\x89PNG")


def test_the_conservatism_figure_holds_the_measured_values(cliff: SimpleNamespace) -> None:
    figure = cql.conservatism_figure(cliff.outcomes, cliff.fork)
    left, right = figure.axes
    promised, true = (line.get_ydata() for line in left.lines[:2])
    swept = [o for o in cliff.outcomes if o.method.name == "CQL"]
    assert list(promised) == [o.q_start for o in swept] and list(true) == [o.value for o in swept]
    assert "promises 0 and gets -10,000" in left.get_title()
    assert list(right.lines[1].get_ydata()) == [float(o.q[24, 1]) for o in swept]
    assert lesson.png(figure).startswith(b"\x89PNG")


def test_the_curves_figure_has_a_log_scale_where_values_are_positive() -> None:
    dataset = offline_data.cartpole(50, 0.4, 0)
    figure = cql.curves_figure(curves_of([190.0, 60.0], [21.0, 22.5]), "title", dataset, 20.0)
    left, right = figure.axes
    assert left.get_yscale() == "log" and right.get_yscale() == "linear"
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["DQN promises", "DQN gets", "CQL promises", "CQL gets", "no policy gets more: 20.0"]
    assert lesson.png(figure).startswith(b"\x89PNG")
    negative = cql.curves_figure(curves_of([-190.0, -60.0], [-21.0, -22.5]), "title", dataset, None)
    assert negative.axes[0].get_yscale() == "symlog"
    lesson.png(negative)


# --------------------------------------------------------------------------------------------------------------- the run

TINY = ["--tabular_steps", "1000", "--max_steps", "60", "--n_seeds", "2", "--logging_steps", "30"]
TINY += ["--eval_episodes", "2", "--n_transitions", "400", "--target_update_interval", "1", "--alphas", "1", "5"]


def summary_of(argv: list[str], code: int | None = 0) -> dict:
    found = cli.main(["--module", "cql", *argv])
    assert code is None or found == code
    summary = json.loads(Path("output/cql/latest/summary.json").read_text())
    validate_summary(summary)
    return summary


def statuses(summary: dict) -> dict[str, str]:
    return {check["id"].removeprefix("cql."): check["status"] for check in summary["checks"]}


@pytest.mark.slow
def test_a_tiny_run_leaves_its_evidence_and_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    summaries, histories = [], []
    for _ in range(2):
        summaries.append(summary_of([*TINY, "--seed", "3"]))
        histories.append(Path("output/cql/latest/log_history.jsonl").read_text())
    first, second = summaries
    assert first["metrics"] == second["metrics"] and histories[0] == histories[1]
    assert first["data"] == second["data"]
    assert {"td_loss", "cql_loss", "q_start", "value", "return", "dqn/q_start", "tabular/return"} <= set(
        first["metrics"]
    )
    pictures = {"training_curves.png", "policies.png", "conservatism.png"}
    assert pictures | {"table.json", "cliffwalking.npz", "cartpole.npz"} <= set(first["artifacts"])
    assert len(statuses(first)) == 9 and first["eval"] is None and first["model"] is None
    run = Path("output/cql/latest")
    digest = offline_data.load(run / "cliffwalking.npz").sha256
    assert first["data"]["datasets"][0]["sha256"] == digest
    table = json.loads((run / "table.json").read_text())
    assert [row["returns"] for row in table] == [-17, -50000, -13, -17]


@pytest.mark.slow
def test_a_users_table_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FrozenLake under random actions, known and unknown environment; checks made for the lesson's data are skipped."""
    monkeypatch.chdir(tmp_path)
    env, rng, rows = gym.make("FrozenLake-v1", max_episode_steps=50), np.random.default_rng(0), []
    env.reset(seed=0)
    for _ in range(60):
        rows += offline_data._episode(env, lambda _: int(rng.integers(4)))
    offline_data.build(offline_data._columns(rows), {}, "lake").save("lake.npz")
    known = summary_of([*TINY, "--dataset_path", "lake.npz", "--env_id", "FrozenLake-v1"])
    assert known["data"]["n_train"] == len(rows) and known["data"]["source"] == "lake.npz"
    assert statuses(known).pop("beats_imitation") in ("pass", "warn")
    assert set(statuses(known).values()) <= {"pass", "warn", "skip"} and len(statuses(known)) == 5
    assert list(statuses(known).values()).count("skip") == 4
    unknown = summary_of([*TINY, "--dataset_path", "lake.npz"])
    assert set(statuses(unknown).values()) == {"skip"}
    assert "tabular/q_start" in unknown["metrics"] and "tabular/return" not in unknown["metrics"]
    assert "training_curves.png" in unknown["artifacts"] and "policies.png" not in unknown["artifacts"]


@pytest.mark.slow
def test_users_vectors_are_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cartpole = offline_data.cartpole(300, 0.4, 0)
    cartpole.save("known.npz")
    columns = {name: getattr(cartpole, name) for name in offline_data.COLUMNS}
    offline_data.build(columns, {}, "x").save("unknown.npz")
    known = statuses(summary_of([*TINY, "--dataset_path", "known.npz"]))
    assert known.pop("dqn_overestimates") == "skip" and set(known.values()) <= {"pass", "warn"}
    unknown = statuses(summary_of([*TINY, "--dataset_path", "unknown.npz"]))
    assert [name for name, status in unknown.items() if status != "skip"] == ["enough_target_copies"]


@pytest.mark.parametrize("options", [["--dataset_path", "nothing.npz"], ["--dataset_path", "mine.npz"]])
def test_a_dataset_that_cannot_be_used_fails_the_run(options, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", observations=np.zeros((3, 4)), acts=np.zeros(3, int))
    assert cli.main(["--module", "cql", *options]) == 1
    assert f"{' '.join(options)}" in capsys.readouterr().err
