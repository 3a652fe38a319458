"""Discrete BCQ against loops, closed forms and finite differences, and what its checks notice."""

from __future__ import annotations

import itertools
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

bcq = lesson.load("bcq").file
GAMMA = 0.99


@pytest.fixture(scope="module")
def cliff() -> SimpleNamespace:
    """The table experiment, trained once."""
    args = bcq.Args(tabular_steps=1000)
    data = bcq.tabulate(offline_data.cliff_walking(70, 30))
    model = bcq.Model.of("CliffWalking-v1")
    outcomes, logits, curves = bcq.tabular(args, data, model, FakeRun())
    fork = bcq.Fork.find(data, model)
    return SimpleNamespace(
        args=args, data=data, model=model, outcomes=outcomes, logits=logits, curves=curves, fork=fork
    )


def random_batch(k: int = 3, b: int = 5, n_actions: int = 4, seed: int = 0) -> SimpleNamespace:
    g = torch.Generator().manual_seed(seed)
    double = {"generator": g, "dtype": torch.float64}
    tensors = {
        name: torch.randn(k, b, n_actions, **double) for name in ("q", "logits", "next_q", "next_target", "next_logits")
    }
    batch = bcq.Batch(
        torch.randn(k, b, 2, **double),
        torch.randint(n_actions, (k, b), generator=g),
        3 * torch.randn(k, b, **double),
        torch.randn(k, b, 2, **double),
        (torch.rand(k, b, **double) < 0.4).double(),
    )
    return SimpleNamespace(batch=batch, **tensors)


# --------------------------------------------------------------------------------------------------------- the algorithm


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.6, 1.0])
def test_filter_target_and_loss_are_those_of_a_plain_loop(tau: float) -> None:
    r = random_batch()
    chosen = bcq.best_allowed(r.next_q, r.next_logits, tau)
    target = bcq.td_target(r.next_target, chosen, r.batch, 0.9)
    td, nll, squares = bcq.loss_terms(r.q, r.logits, r.batch.actions, target)
    for k in range(3):
        for b in range(5):
            weights = [math.exp(x) for x in r.next_logits[k, b].tolist()]
            ratio = [w / max(weights) for w in weights]
            best = max((a for a in range(4) if ratio[a] >= tau), key=lambda a: float(r.next_q[k, b, a]))
            assert chosen[k, b] == best
            y = float(r.batch.rewards[k, b])
            if not r.batch.terminals[k, b]:
                y += 0.9 * float(r.next_target[k, b, best])
            assert target[k, b] == pytest.approx(y)
            logits, action = r.logits[k, b].tolist(), int(r.batch.actions[k, b])
            error = float(r.q[k, b, action]) - y
            assert td[k, b] == pytest.approx(error**2 / 2 if abs(error) < 1 else abs(error) - 0.5)
            assert nll[k, b] == pytest.approx(math.log(sum(math.exp(x) for x in logits)) - logits[action])
            assert squares[k, b] == pytest.approx(sum(x**2 for x in logits) / 4)


def test_zero_allows_everything_and_one_the_likeliest_alone() -> None:
    r = random_batch()
    assert bcq.allowed(r.logits, 0.0).all()
    assert torch.equal(bcq.allowed(r.logits, 1.0), F.one_hot(r.logits.argmax(-1), 4).bool())
    assert torch.equal(bcq.best_allowed(r.q, r.logits, 0.0), r.q.argmax(-1))
    assert torch.equal(bcq.best_allowed(r.q, r.logits, 1.0), r.logits.argmax(-1))


def test_a_higher_threshold_allows_fewer_actions() -> None:
    r = random_batch()
    passed = [bcq.allowed(r.logits, tau) for tau in (0.0, 0.1, 0.3, 0.7, 1.0)]
    assert all((not (more < less).any()) for more, less in itertools.pairwise(passed))
    assert all(each.any(-1).all() for each in passed)


def test_the_filter_does_not_care_about_the_scale_of_q_or_extreme_logits() -> None:
    """Huge negative values stay below a mask, and logits far apart do not overflow."""
    q = torch.tensor([[-1e12, -5e11, 0.0]])
    logits = torch.tensor([[0.0, -1.0, -2000.0]])
    assert bcq.best_allowed(q, logits, 0.3).tolist() == [1]
    assert bcq.allowed(logits, 0.3).tolist() == [[True, True, False]]
    assert bcq.allowed(logits, 0.0).all()


def test_the_gradient_is_that_of_finite_differences() -> None:
    r = random_batch()
    target = torch.zeros(3, 5, dtype=torch.float64)

    def loss(q: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        td, nll, squares = bcq.loss_terms(q, logits, r.batch.actions, target)
        return (td + nll + bcq.PENALTY * squares).sum()

    q, logits = (each.clone().requires_grad_() for each in (r.q, r.logits))
    to_q, to_logits = torch.autograd.grad(loss(q, logits), (q, logits))
    taken = F.one_hot(r.batch.actions, 4).double()
    torch.testing.assert_close(to_q, taken * r.q.clamp(-1, 1))
    torch.testing.assert_close(to_logits, r.logits.softmax(-1) - taken + 2 * 1e-2 / 4 * r.logits)
    shift = torch.zeros_like(r.logits)
    shift[1, 2, 3] = 1e-6
    numeric = (loss(r.q, r.logits + shift) - loss(r.q, r.logits - shift)) / 2e-6
    assert to_logits[1, 2, 3] == pytest.approx(float(numeric), abs=1e-7)


def test_stacked_networks_are_so_many_single_ones() -> None:
    nets = bcq.MLPs(3, (2, 8, 8, 4), torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 2)
    for k in range(3):
        layers = []
        for weight, bias in zip(nets.weights, nets.biases, strict=True):
            linear = torch.nn.Linear(*weight.shape[1:])
            linear.load_state_dict({"weight": weight[k].T, "bias": bias[k, 0]})
            layers += [linear, torch.nn.ReLU()]
        torch.testing.assert_close(nets(x)[k], torch.nn.Sequential(*layers[:-1])(x[k]))


def test_a_step_descends_the_whole_loss() -> None:
    """A step of SGD against the gradient of the formula, written out for one network."""
    r = random_batch(k=1)
    batch = bcq.Batch(*(each if each.dtype == torch.long else each.float() for each in r.batch))
    nets = bcq.Networks(1, (2, 8, 4), torch.Generator().manual_seed(0))
    target = bcq.MLPs(1, (2, 8, 4), torch.Generator().manual_seed(1))
    loss = torch.zeros(())
    for b in range(5):
        state, following = (each[:, b : b + 1] for each in (batch.observations, batch.next_observations))
        action = int(batch.actions[0, b])
        with torch.no_grad():
            probabilities, values = nets.g(following)[0, 0].softmax(0), nets.q(following)[0, 0]
            possible = [a for a in range(4) if probabilities[a] / probabilities.max() > 0.8]
            best = max(possible, key=lambda a: float(values[a]))
            y = batch.rewards[0, b] + 0.9 * (1 - batch.terminals[0, b]) * target(following)[0, 0, best]
        error = (nets.q(state)[0, 0, action] - y).abs()
        logits = nets.g(state)[0, 0]
        huber = error**2 / 2 if error < 1 else error - 0.5
        loss = loss + (huber - logits.softmax(0)[action].log() + 1e-2 * (logits**2).mean()) / 5
    gradients = torch.autograd.grad(loss, [*nets.parameters()])
    expected = [p.detach() - 0.1 * g for p, g in zip(nets.parameters(), gradients, strict=True)]
    optimizer = torch.optim.SGD(nets.parameters(), lr=0.1)
    bcq.train_step(nets, target, optimizer, batch, torch.tensor([[[0.8]]]), 0.9)
    for found, wanted in zip(nets.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted)


def test_networks_of_a_method_stand_side_by_side() -> None:
    threshold = bcq.thresholds_of(bcq.Args(threshold=0.25, n_seeds=2))
    assert threshold.shape == (6, 1, 1) and threshold.flatten().tolist() == [0, 0, 0.25, 0.25, 1, 1]


def test_a_step_of_many_networks_is_so_many_steps_of_one() -> None:
    r = random_batch(k=2)
    batch = bcq.Batch(*(each if each.dtype == torch.long else each.float() for each in r.batch))
    threshold = torch.tensor([0.0, 0.8]).view(2, 1, 1)
    both = bcq.Networks(2, (2, 8, 4), torch.Generator().manual_seed(0))
    target = bcq.MLPs(2, (2, 8, 4), torch.Generator().manual_seed(1))
    before, fixed = ({n: each.clone() for n, each in net.state_dict().items()} for net in (both, target))
    terms = bcq.train_step(both, target, torch.optim.Adam(both.parameters()), batch, threshold, 0.9)
    assert all(torch.equal(each, fixed[name]) for name, each in target.state_dict().items())
    assert terms[2][0] == 4 and 1 <= terms[2][1] < 4
    for k in range(2):
        one = bcq.Networks(1, (2, 8, 4), torch.Generator())
        its_target = bcq.MLPs(1, (2, 8, 4), torch.Generator())
        one.load_state_dict({name: each[k : k + 1] for name, each in before.items()})
        its_target.load_state_dict({name: each[k : k + 1] for name, each in fixed.items()})
        rows = bcq.Batch(*(each[k : k + 1] for each in batch))
        found = bcq.train_step(one, its_target, torch.optim.Adam(one.parameters()), rows, threshold[k : k + 1], 0.9)
        for name, each in one.state_dict().items():
            torch.testing.assert_close(each, both.state_dict()[name][k : k + 1])
        torch.testing.assert_close(torch.cat(found), torch.stack(terms)[:, k])


def test_the_next_action_is_chosen_by_q_and_valued_by_the_target() -> None:
    """As in Double DQN: with constant networks the TD error is known."""
    nets, target = bcq.Networks(1, (2, 3), torch.Generator()), bcq.MLPs(1, (2, 3), torch.Generator())
    with torch.no_grad():
        for net, bias in ((nets.q, [5.0, 9.0, 7.0]), (nets.g, [3.0, 0.0, 2.9]), (target, [10.0, 20.0, 30.0])):
            net.weights[0].zero_()
            net.biases[0].copy_(torch.tensor([[bias]]))
    x = torch.zeros(1, 1, 2)
    batch = bcq.Batch(x, torch.tensor([[0]]), torch.tensor([[1.0]]), x, torch.zeros(1, 1))
    for tau, value in ((0.0, 20.0), (0.3, 30.0), (1.0, 10.0)):
        optimizer = torch.optim.SGD(nets.parameters(), lr=0.0)
        td, _, _ = bcq.train_step(nets, target, optimizer, batch, torch.tensor([[[tau]]]), 0.5)
        assert td.item() == pytest.approx(abs(5.0 - (1 + 0.5 * value)) - 0.5)


def test_networks_of_a_seed_see_the_same_batches_and_a_late_target(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, copies = [], []

    def record(nets, target_q, optimizer, batch, threshold, gamma):
        same = torch.equal(nets.q.weights[0], target_q.weights[0])
        seen.append(batch.observations)
        copies.append(same)
        with torch.no_grad():
            nets.q.weights[0].add_(1)
        return torch.zeros(6), torch.zeros(6), torch.zeros(6)

    monkeypatch.setattr(bcq, "train_step", record)
    args = bcq.Args(n_seeds=2, max_steps=7, target_update_interval=3, logging_steps=5, batch_size=4)
    steps = []
    bcq.fit_networks(args, offline_data.cartpole(50, 0.4, 0), lambda step, *_: steps.append(step))
    assert copies == [True, False, False, True, False, False, True]
    assert steps == [5, 7]
    rows = seen[0].view(3, 2, 4, 4)  # (methods, seeds, B, D)
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0, 0], rows[0, 1]) and not torch.equal(seen[0], seen[1])


def test_timeouts_are_bootstrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only terminals end the return: with every row a timeout the target keeps the value of the next state."""
    batches = []
    zeros = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    monkeypatch.setattr(bcq, "train_step", lambda q, t, o, batch, w, g: (batches.append(batch), zeros)[1])
    dataset = offline_data.cartpole(30, 0.0, 0)
    assert dataset.timeouts.any() and not dataset.terminals.any()
    bcq.fit_networks(bcq.Args(n_seeds=1, max_steps=3, batch_size=30), dataset, lambda *_: None)
    assert all(not batch.terminals.any() for batch in batches)


# ------------------------------------------------------------------------------------------------------------- the table


def test_without_a_filter_it_is_q_learning_from_zero(cliff: SimpleNamespace) -> None:
    """Every next state has an untried action worth 0, so the target is the reward: Q = -1 in the data, 0 elsewhere."""
    naive = cliff.outcomes[1]
    torch.testing.assert_close(naive.q, -(cliff.data.shares > 0).double())
    assert naive.n_unseen == 27 and naive.q_start == 0
    assert naive.value == pytest.approx(-100 / (1 - GAMMA))  # right from the start is the cliff, forever


def in_data_values(shares: torch.Tensor, best: bool) -> torch.Tensor:
    """Q by value iteration over the data's actions alone: over the `best`, or the most frequent. A plain loop."""
    table = gym.make("CliffWalking-v1").unwrapped.P
    q = torch.zeros(48, 4, dtype=torch.float64)
    for _ in range(60):
        for s, a in torch.nonzero(shares > 0).tolist():
            _, following, reward, terminal = table[s][a][0]
            options = torch.nonzero(shares[following] > 0).flatten().tolist()
            if not best:
                options = options and [int(shares[following].argmax())]
            q[s, a] = reward + (0 if terminal else GAMMA * max(float(q[following, b]) for b in options))
    return q


@pytest.mark.parametrize(("tau", "best"), [(0.1, True), (0.3, True), (0.4, True), (0.5, False), (0.9, False)])
def test_bcq_is_q_learning_among_allowed_actions(cliff: SimpleNamespace, tau: float, best: bool) -> None:
    outcome = next(o for o in cliff.outcomes if o.method == bcq.Method("BCQ", tau))
    torch.testing.assert_close(outcome.q, in_data_values(cliff.data.shares, best))
    steps = 13 if best else 17
    assert outcome.returns == -steps and outcome.n_unseen == 0
    assert outcome.q_start == pytest.approx(-(1 - GAMMA**steps) / (1 - GAMMA)) == pytest.approx(outcome.value)


def test_the_model_of_the_data_is_the_penalised_maximum_likelihood(cliff: SimpleNamespace) -> None:
    """Against Newton's method in numpy, state by state."""
    pull = 2 * bcq.PENALTY / 4
    for state in (24, 36):
        shares, logits = cliff.data.shares[state].numpy(), np.zeros(4)
        for _ in range(50):
            p = np.exp(logits) / np.exp(logits).sum()
            hessian = np.diag(p) - np.outer(p, p) + pull * np.eye(4)
            logits = logits - np.linalg.solve(hessian, p - shares + pull * logits)
        assert cliff.logits[state].tolist() == pytest.approx(logits.tolist(), abs=1e-6)
    assert bcq.behaviour_error(cliff.logits, cliff.data) < 1e-9
    assert bcq.behaviour_error(cliff.logits + torch.eye(48, 4), cliff.data) > 1e-3


def test_one_filter_is_not_enough(cliff: SimpleNamespace) -> None:
    target_only, policy_only = cliff.outcomes[-2:]
    assert (target_only.n_unseen, target_only.q_start) == (27, 0)
    assert target_only.q[36, 0] == pytest.approx(-(1 - GAMMA**13) / (1 - GAMMA))  # its Q is right, where there are data
    assert (policy_only.n_unseen, policy_only.q_start) == (0, pytest.approx(-1))
    assert policy_only.q[24, :2].tolist() == pytest.approx([-1, -1])  # it cannot tell the two paths apart


def test_the_fork_and_the_ratios_of_untried_actions(cliff: SimpleNamespace) -> None:
    assert cliff.fork == (24, pytest.approx(3 / 7), (-13, -17))
    low, high = bcq.untried_ratios(cliff.logits, cliff.data)
    ratios = (cliff.logits.exp() / cliff.logits.exp().max(-1, keepdim=True).values)[[24, 36]]
    assert (high, low) == pytest.approx((float(ratios[0, 2]), float(ratios[1, 2])))
    assert low < high < 0.05 < ratios[0, 1] < 3 / 7 + 0.01


# ------------------------------------------------------------------------------------------------------------ evaluation


def constant_networks(q: list[list[float]], logits: list[list[float]]) -> object:
    nets = bcq.Networks(len(q), (4, 2), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for net, bias in ((nets.q, q), (nets.g, logits)):
            net.weights[0].zero_()
            net.biases[0].copy_(torch.tensor(bias).unsqueeze(1))
    return nets


def test_evaluation_is_that_of_a_plain_loop() -> None:
    """Q prefers right, G left: Q-learning (tau = 0) pushes right, BCQ and cloning push left."""
    args = bcq.Args(eval_episodes=4, seed=5, n_seeds=1)
    dataset = offline_data.cartpole(50, 0.4, 0)
    nets = constant_networks([[3.0, 7.0]] * 3, [[2.0, 0.0]] * 3)
    q_start, value, returns = bcq.evaluate(nets, dataset, args)
    assert q_start.tolist() == [7.0, 3.0, 3.0]
    env = gym.make_vec("CartPole-v1", num_envs=12)
    env.reset(seed=5)
    lengths, going_on = np.zeros(12), np.ones(12, bool)
    while going_on.any():
        _, _, terminated, truncated, _ = env.step(np.array([1] * 4 + [0] * 8))
        lengths += going_on
        going_on &= ~(terminated | truncated)
    assert returns.tolist() == lengths.reshape(3, 4).mean(1).tolist()
    discounted = (1 - args.gamma**lengths) / (1 - args.gamma)
    assert value.tolist() == pytest.approx(discounted.reshape(3, 4).mean(1).tolist())


def test_a_cut_episode_counts_no_further_and_q_is_that_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = offline_data.cartpole(50, 0.4, 0)
    monkeypatch.setattr(gym, "make_vec", lambda env_id, num_envs: ShortEpisodes(num_envs))
    nets = bcq.Networks(3, (4, 2), torch.Generator().manual_seed(0))
    q_start, value, returns = bcq.evaluate(nets, dataset, bcq.Args(eval_episodes=3, n_seeds=1))
    q, logits = nets.q.biases[0][:, 0], nets.g.biases[0][:, 0]  # at observation 0
    chosen = bcq.best_allowed(q, logits, torch.tensor([[0.0], [0.3], [1.0]]))
    torch.testing.assert_close(q_start, bcq.take(q, chosen))
    assert returns.tolist() == [2.0, 5.0, 8.0]  # 1, 2, 3 and 4, 5, 6 and 7, 8, 9 steps
    assert value[0] == pytest.approx(np.mean([sum(0.95**t for t in range(n)) for n in (1, 2, 3)]))


def test_without_an_environment_only_q_is_known() -> None:
    cartpole = offline_data.cartpole(200, 0.4, 0)
    columns = {name: getattr(cartpole, name) for name in offline_data.COLUMNS}
    dataset = offline_data.build(columns, {}, "mine")
    q_start, value, returns = bcq.evaluate(
        constant_networks([[3.0, 7.0]] * 3, [[2.0, 0.0]] * 3), dataset, bcq.Args(n_seeds=1)
    )
    assert q_start.tolist() == [7.0, 3.0, 3.0]
    assert torch.isnan(value).all() and torch.isnan(returns).all()


def test_the_largest_value_is_a_geometric_sum() -> None:
    assert bcq.largest_value(offline_data.cartpole(50, 0.4, 0), 0.95) == pytest.approx(sum(0.95**t for t in range(500)))


# --------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 1.0}, "--gamma 1.0: a discount is in [0, 1)"),
        ({"gamma": math.nan}, "--gamma nan: a discount is in [0, 1)"),
        ({"tabular_gamma": -0.1}, "--tabular_gamma -0.1: a discount is in [0, 1)"),
        ({"threshold": 0.0}, "--threshold 0.0: it is between 0 and 1"),
        ({"threshold": math.nan}, "--threshold nan: it is between 0 and 1"),
        ({"thresholds": [0.1, 1.0]}, "--thresholds 0.1 1.0: it is between 0 and 1"),
        ({"epsilon": 1.5}, "--epsilon 1.5: a share is in [0, 1]"),
        ({"learning_rate": math.nan}, "--learning_rate nan: it must be a finite number above 0"),
        ({"n_edge": 70}, "--n_edge 70: it must be below --n_safe"),
        ({"tabular_steps": 999}, "--tabular_steps 999: the table needs 1000 steps"),
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
        bcq.Args(**options)
    assert words in str(caught.value) and len(caught.value.problems) == (2 if "n_safe" in options else 1)


# ---------------------------------------------------------------------------------------------------------------- checks


def failed(checks: list) -> set[str]:
    return {check.id.removeprefix("bcq.") for check in checks if not check.passed}


def table_failures(cliff: SimpleNamespace, **changes: float) -> set[str]:
    args = bcq.Args(**{"tabular_steps": 1000, **changes})
    outcomes, logits, _ = bcq.tabular(args, cliff.data, cliff.model, FakeRun())
    checks = bcq.table_checks(outcomes, cliff.model, args, cliff.fork)
    return failed(checks + bcq.reference_checks(outcomes, logits, cliff.data, cliff.fork))


def test_all_checks_of_the_table_pass(cliff: SimpleNamespace) -> None:
    assert table_failures(cliff) == set()


def test_a_threshold_that_imitates_or_lets_untried_actions_in_is_noticed(cliff: SimpleNamespace) -> None:
    assert table_failures(cliff, threshold=0.5) == {"beats_imitation"}
    assert "beats_imitation" in table_failures(cliff, threshold=0.001)


def broken_filter(logits: torch.Tensor, threshold: object) -> torch.Tensor:
    return logits.softmax(-1) >= threshold  # without the division by the largest G


@pytest.mark.parametrize(
    ("name", "broken", "noticed"),
    [
        (
            "allowed",
            lambda logits, tau: torch.ones_like(logits, dtype=torch.bool),
            {"beats_imitation", "values_are_true"},
        ),
        ("allowed", lambda logits, tau: ~(logits - logits.amax(-1, keepdim=True) > -0.1), {"beats_imitation"}),
        ("allowed", broken_filter, {"threshold_where_it_imitates", "beats_imitation", "values_are_true"}),
        ("best_allowed", lambda q, logits, tau: q.argmax(-1), {"beats_imitation", "values_are_true"}),
        (
            "best_allowed",
            lambda q, logits, tau: q.masked_fill(~bcq.allowed(logits, tau), math.inf).argmin(-1),
            {"beats_imitation", "threshold_where_it_imitates"},
        ),
        ("td_target", lambda q, a, batch, gamma: batch.rewards.expand_as(a), {"values_are_true"}),
        ("td_target", lambda q, a, batch, gamma: batch.rewards + gamma * q.max(-1).values, {"values_are_true"}),
        (
            "td_target",
            lambda q, a, batch, gamma: batch.rewards + (1 - batch.terminals) * bcq.take(q, a),
            {"values_are_true"},
        ),
        ("PENALTY", 0.0, {"behaviour_model"}),
        ("PENALTY", 0.2, {"behaviour_model"}),
    ],
    ids=[
        "everything",
        "inverted",
        "no division",
        "no filter",
        "minimum",
        "no bootstrap",
        "plain maximum",
        "no gamma",
        "no penalty",
        "too much penalty",
    ],
)
def test_a_broken_algorithm_is_noticed(
    cliff: SimpleNamespace, name: str, broken: object, noticed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bcq, name, broken)
    assert noticed & table_failures(cliff)


@pytest.mark.parametrize(
    "broken",
    [
        lambda td, nll, squares: (td, -nll, squares),
        lambda td, nll, squares: (td, 2 * nll, squares),
        lambda td, nll, squares: (td, nll, -squares),
        lambda td, nll, squares: (td, nll, squares * 4),
    ],
    ids=["sign of the likelihood", "likelihood twice", "sign of the penalty", "sum for mean"],
)
def test_a_broken_loss_of_the_model_is_noticed(cliff: SimpleNamespace, broken, monkeypatch) -> None:
    right = bcq.loss_terms
    monkeypatch.setattr(bcq, "loss_terms", lambda *given: broken(*right(*given)))
    assert "behaviour_model" in table_failures(cliff)


def curves_of(dqn: list[float], bcq_q: list[float], value: float = 20.0, dqn_value: float = 7.6) -> object:
    """Two evaluations of two seeds; `dqn` and `bcq_q` are the last ones' Q(start)."""
    curves = bcq.Curves(steps=[1, 2])
    for name, q, v in (("Double DQN", dqn, dqn_value), ("BCQ", bcq_q, value), (bcq.CLONING.name, [0.0, 0.0], 20.0)):
        for scale in (0.9, 1.0):
            curves.add(name, scale * np.array(q), np.full(2, v), np.full(2, 200.0))
    return curves


@pytest.mark.parametrize(
    ("curves", "noticed"),
    [
        (curves_of([190.0, 60.0], [21.0, 22.5]), set()),
        (curves_of([190.0, 39.0], [21.0, 22.5]), {"dqn_overestimates"}),
        (curves_of([190.0, 60.0], [21.0, 25.5]), {"dqn_overestimates"}),
        (curves_of([190.0, 60.0], [27.0, 25.5]), {"dqn_overestimates", "q_start_near_true_value"}),
        (curves_of([190.0, 60.0], [11.0, 14.0]), {"q_start_near_true_value"}),
        (curves_of([190.0, 60.0], [21.0, 22.0], dqn_value=16.0), {"better_than_dqn"}),
    ],
)
def test_the_checks_of_the_networks_notice(curves: object, noticed: set[str]) -> None:
    dataset = offline_data.cartpole(50, 0.4, 0)
    assert failed(bcq.network_checks(curves, dataset, bcq.Args(), reference=True)) == noticed


def test_too_few_target_copies_are_noticed() -> None:
    """The trap: 40 targets after 2000 steps reach 20 * (1 - 0.95^40) = 17.4 of 20, which is not conservatism."""
    dataset = offline_data.cartpole(50, 0.4, 0)
    args = bcq.Args(max_steps=2000, target_update_interval=50)
    check = bcq.network_checks(curves_of([190.0, 60.0], [17.0, 17.0]), dataset, args, reference=True)[-1]
    assert check.id == "bcq.enough_target_copies" and not check.passed
    assert check.observed["share"] == pytest.approx(1 - 0.95**40)


# --------------------------------------------------------------------------------------------------------------- figures


def test_the_policies_figure_says_what_nobody_tried(cliff: SimpleNamespace) -> None:
    figure = bcq.policies_figure([cliff.outcomes[0], cliff.outcomes[1], cliff.outcomes[5]], cliff.data)
    assert [axis.get_title() for axis in figure.axes] == [
        "behaviour cloning (tau = 1): return -17, 0 of 27 actions never tried",
        "Q-learning (tau = 0): never reaches the goal, 27 of 27 actions never tried",
        "BCQ (tau = 0.3): return -13, 0 of 27 actions never tried",
    ]
    arrows = [[text for text in axis.texts if text.get_text() == ""] for axis in figure.axes]
    assert [len(each) for each in arrows] == [27, 27, 27]
    red, blue = ([a.arrow_patch.get_edgecolor() for a in arrows[i]] for i in (1, 2))
    assert len(set(red)) == len(set(blue)) == 1 and red[0] != blue[0]
    assert lesson.png(figure).startswith(b"\x89PNG")


def arrows(axis: object) -> list:
    return [text for text in axis.texts if text.get_text() == ""]


def test_the_filter_figure_shows_every_allowed_action(cliff: SimpleNamespace) -> None:
    figure = bcq.filter_figure(cliff.logits, cliff.data, [0.0, 0.3, 1.0])
    assert [axis.get_title() for axis in figure.axes] == [
        "tau = 0 (Q-learning): 108 actions in 27 states, 80 of them never tried",
        "tau = 0.3 (BCQ): 28 actions in 27 states, 0 of them never tried",
        "tau = 1 (behaviour cloning): 27 actions in 27 states, 0 of them never tried",
    ]
    assert [len(arrows(axis)) for axis in figure.axes] == [108, 28, 27]
    colors = [arrow.arrow_patch.get_edgecolor() for arrow in arrows(figure.axes[0])]
    assert sorted(colors.count(color) for color in set(colors)) == [28, 80]
    assert lesson.png(figure).startswith(b"\x89PNG")


def test_the_threshold_figure_holds_the_measured_values(cliff: SimpleNamespace) -> None:
    figure = bcq.threshold_figure(cliff.outcomes, cliff.logits, cliff.data, 0.3)
    left, right = figure.axes
    tried, untried = (line.get_xdata() for line in left.lines[:2])
    assert (len(tried), len(untried)) == (28, 80) and min(tried) > 0.3 > max(untried)
    swept = sorted(cliff.outcomes[:-2], key=lambda o: o.method.threshold)
    assert list(right.lines[0].get_ydata()) == [o.q_start for o in swept]
    assert list(right.lines[1].get_ydata()) == [o.value for o in swept]
    words = [text.get_text() for text in right.texts]
    assert words == ["lost", "lost", "lost", "-13", "-13", "-13", "-17", "-17", "-17"]
    assert lesson.png(figure).startswith(b"\x89PNG")


def test_the_curves_figure_has_a_log_scale_where_values_are_positive() -> None:
    dataset = offline_data.cartpole(50, 0.4, 0)
    figure = bcq.curves_figure(curves_of([190.0, 60.0], [21.0, 22.5]), "title", dataset, 20.0)
    left, right = figure.axes
    assert left.get_yscale() == "log" and right.get_yscale() == "linear"
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["Double DQN promises", "Double DQN gets", "BCQ promises", "BCQ gets", "no policy gets more: 20.0"]
    assert lesson.png(figure).startswith(b"\x89PNG")
    negative = bcq.curves_figure(curves_of([-190.0, -60.0], [-21.0, -22.5]), "title", dataset, None)
    assert negative.axes[0].get_yscale() == "symlog"
    lesson.png(negative)


# --------------------------------------------------------------------------------------------------------------- the run

TINY = ["--tabular_steps", "1000", "--max_steps", "60", "--n_seeds", "2", "--logging_steps", "30"]
TINY += ["--eval_episodes", "2", "--n_transitions", "400", "--target_update_interval", "1", "--thresholds", "0.5"]


def summary_of(argv: list[str], code: int | None = 0) -> dict:
    found = cli.main(["--module", "bcq", *argv])
    assert code is None or found == code
    summary = json.loads(Path("output/bcq/latest/summary.json").read_text())
    validate_summary(summary)
    return summary


def statuses(summary: dict) -> dict[str, str]:
    return {check["id"].removeprefix("bcq."): check["status"] for check in summary["checks"]}


@pytest.mark.slow
def test_a_tiny_run_leaves_its_evidence_and_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    summaries, histories = [], []
    for _ in range(2):
        summaries.append(summary_of([*TINY, "--seed", "3"]))
        histories.append(Path("output/bcq/latest/log_history.jsonl").read_text())
    first, second = summaries
    assert first["metrics"] == second["metrics"] and histories[0] == histories[1]
    assert first["data"] == second["data"]
    assert {
        "td_loss",
        "bc_loss",
        "allowed_actions",
        "q_start",
        "value",
        "return",
        "dqn/q_start",
        "tabular/return",
    } <= set(first["metrics"])
    pictures = {"training_curves.png", "policies.png", "filter.png", "threshold.png"}
    assert pictures | {"table.json", "cliffwalking.npz", "cartpole.npz"} <= set(first["artifacts"])
    assert len(statuses(first)) == 10 and first["eval"] is None and first["model"] is None
    run = Path("output/bcq/latest")
    digest = offline_data.load(run / "cliffwalking.npz").sha256
    assert first["data"]["datasets"][0]["sha256"] == digest
    table = json.loads((run / "table.json").read_text())
    assert [row["returns"] for row in table] == [-17, -50000, -13, -17, -50000, -13]


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
    assert set(statuses(known).values()) <= {"pass", "warn", "skip"} and len(statuses(known)) == 6
    assert list(statuses(known).values()).count("skip") == 5
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
    assert cli.main(["--module", "bcq", *options]) == 1
    assert f"{' '.join(options)}" in capsys.readouterr().err
