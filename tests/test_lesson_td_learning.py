"""TD learning against loops written out step by step, closed forms, and Gymnasium."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from llmcore_hf import cli, lesson

td = lesson.load("td_learning").file
pytestmark = pytest.mark.usefixtures("one_thread")
WALKS = [td.Walk(5, 0.0, 1.0, 0.5), td.Walk(7, -1.0, 1.0, 0.0)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- prediction


@pytest.mark.parametrize("walk", WALKS)
def test_true_values_solve_the_bellman_equation(walk: Any) -> None:
    n = walk.n_states
    p, r = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        for j in (i - 1, i + 1):
            if 0 <= j < n:
                p[i, j] = 0.5
            else:
                r[i] += 0.5 * (walk.left if j < 0 else walk.right)
    assert torch.allclose(torch.linalg.solve(torch.eye(n, dtype=torch.float64) - p, r), walk.true_values)


def test_episodes_are_walks_from_the_middle_to_an_end() -> None:
    walk = WALKS[1]
    states, length, outcome = td.Episodes.sample(walk, 400, seeded())
    assert (states[0] == 4).all()
    for r in range(400):
        path = states[: int(length[r]) + 1, r].tolist()
        assert all(abs(a - b) == 1 for a, b in itertools.pairwise(path))
        assert path[-1] in (0, 8) and all(1 <= s <= 7 for s in path[:-1])
        assert float(outcome[r]) == (-1.0 if path[-1] == 0 else 1.0)
    assert abs(float(outcome.mean())) < 5 / math.sqrt(400)


def by_hand(walk: Any, path: list[int], outcome: float, values: list[float], n: float, alpha: float) -> None:
    """n-step TD of one run, with the rewards written out (eq. 7.1)."""
    end = len(path) - 1
    rewards = [0.0] * end + [outcome]  # rewards[t] follows step t - 1
    for t in range(end):
        last = int(min(t + n, end))
        target = sum(rewards[t + 1 : last + 1]) + (values[path[last]] if last < end else 0.0)
        values[path[t]] += alpha * (target - values[path[t]])


@pytest.mark.parametrize("walk", WALKS)
def test_n_step_td_equals_the_loop(walk: Any) -> None:
    n, alphas, runs = torch.tensor([1, 3, 1000]), torch.tensor([0.1, 0.7], dtype=torch.float64), 6
    values, generator = walk.first_values(3, 2, runs), seeded(1)
    expected = values.tolist()
    for _ in range(3):
        episodes = td.Episodes.sample(walk, runs, generator)
        td.n_step_td(values, episodes, n, alphas)
        for i, steps in enumerate(n.tolist()):
            for k, alpha in enumerate(alphas.tolist()):
                for r in range(runs):
                    path = episodes.states[: int(episodes.length[r]) + 1, r].tolist()
                    by_hand(walk, path, float(episodes.outcome[r]), expected[i][k][r], steps, alpha)
    assert torch.allclose(values, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("walk", WALKS)
def test_td_lambda_equals_the_loop(walk: Any) -> None:
    lambdas, alpha, runs = torch.tensor([0.0, 0.6, 1.0], dtype=torch.float64), 0.3, 5
    values, generator = walk.first_values(3, 1, runs), seeded(2)
    expected = values.tolist()
    for _ in range(2):
        episodes = td.Episodes.sample(walk, runs, generator)
        td.td_lambda(values, episodes, lambdas, torch.tensor([alpha], dtype=torch.float64))
        for i, lam in enumerate(lambdas.tolist()):
            for r in range(runs):
                v, trace = expected[i][0][r], [0.0] * (walk.n_states + 2)
                path = episodes.states[: int(episodes.length[r]) + 1, r].tolist()
                for t in range(len(path) - 1):
                    reward = float(episodes.outcome[r]) if t == len(path) - 2 else 0.0
                    error = reward + v[path[t + 1]] - v[path[t]]
                    trace = [lam * z for z in trace]
                    trace[path[t]] += 1
                    for s, z in enumerate(trace):
                        v[s] += alpha * error * z
    assert torch.allclose(values, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_values_of_the_ends_stay_0() -> None:
    values = WALKS[0].first_values(1, 1, 50)
    for _ in range(5):
        td.n_step_td(values, td.Episodes.sample(WALKS[0], 50, seeded()), torch.tensor([2]), torch.ones(1).double())
    assert (values[..., [0, -1]] == 0).all()


def test_the_rms_error_is_over_the_states_alone() -> None:
    walk = WALKS[0]
    values = torch.cat([torch.tensor([9.0]), walk.true_values + torch.tensor([1, -1, 1, -1, 1.0]), torch.tensor([9.0])])
    assert float(walk.rms_error(values)) == pytest.approx(1.0)


# ---------------------------------------------------------------- control


@pytest.fixture(scope="module")
def cliff() -> Any:
    return td.Table.of("CliffWalking-v1")


@pytest.mark.parametrize("env_id", ["CliffWalking-v1", "FrozenLake-v1", "Taxi-v4"])
def test_the_table_is_the_environment(env_id: str) -> None:
    table = td.Table.of(env_id)
    assert td.table_is_the_environment(table, env_id, 300, seeded()) == 0
    assert (table.cumulative[..., -1] - 1).abs().max() < 1e-9


def test_a_wrong_table_is_noticed(cliff: Any) -> None:
    assert td.table_is_the_environment(cliff._replace(reward=cliff.reward - 1), "CliffWalking-v1", 50, seeded()) == 50


def test_outcomes_come_as_often_as_they_should() -> None:
    table, n = td.Table.of("FrozenLake-v1"), 20_000
    states, actions = torch.zeros(n, dtype=torch.int64), torch.full((n,), 2)
    following, _, _ = table.step(states, actions, torch.rand(n, generator=seeded(), dtype=torch.float64))
    inner: Any = gym.make("FrozenLake-v1").unwrapped
    expected: dict[int, float] = {}
    for p, s, _, _ in inner.P[0][2]:
        expected[s] = expected.get(s, 0.0) + p
    for state, p in expected.items():
        share = float((following == state).double().mean())
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_actions_are_epsilon_greedy_and_ties_random() -> None:
    q = torch.tensor([1.0, 3.0, 3.0, 0.0]).repeat(40_000, 1)
    actions, best = td.choose(q, 0.2, seeded())
    shares = torch.bincount(actions, minlength=4) / len(q)
    expected = torch.tensor([0.05, 0.45, 0.45, 0.05])
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / len(q)).sqrt()).all()
    assert best[0].tolist() == [False, True, True, False]


def test_targets_are_those_of_the_book() -> None:
    q, actions, epsilon = torch.tensor([[1.0, 5.0, 3.0, 5.0]]), torch.tensor([2]), 0.2
    best = q == 5
    values = {method: float(td.target_of(method, q, actions, best, epsilon)) for method in td.METHODS}
    policy = torch.tensor([0.05, 0.45, 0.05, 0.45])
    assert values["SARSA"] == 3.0 and values["Q-learning"] == 5.0
    assert values["Expected SARSA"] == pytest.approx(float((policy * q[0]).sum()))


def test_q_learning_finds_the_optimal_values(cliff: Any) -> None:
    """Deterministic, so with alpha = 1 the values on the shortest path are exact: minus the steps to the goal."""
    q, returns = td.control(cliff, "Q-learning", 4, 300, 1.0, 0.1, seeded())
    greedy, paths = td.greedy_returns(cliff, q)
    assert (greedy == -13).all() and (q[:, 36].amax(1) == -13).all()
    assert torch.unique_consecutive(paths[:, 0]).tolist() == [36, *range(24, 36), 47]
    assert returns.shape == (300, 4) and (returns <= -13).all()


def test_sarsa_without_exploration_prices_its_own_policy(cliff: Any) -> None:
    """Without exploration SARSA and Q-learning have the same target; the safe path costs what it costs."""
    q, returns = td.control(cliff, "SARSA", 3, 400, 1.0, 0.0, seeded())
    greedy, _ = td.greedy_returns(cliff, q)
    assert torch.equal(greedy, returns[-1]) and torch.equal(q[:, 36].amax(1), greedy)


@pytest.mark.parametrize("method", td.METHODS)
def test_runs_are_deterministic_for_a_seed(cliff: Any, method: str) -> None:
    first, second = (td.control(cliff, method, 3, 20, 0.5, 0.1, seeded(5)) for _ in range(2))
    other = td.control(cliff, method, 3, 20, 0.5, 0.1, seeded(6))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize("method", td.METHODS)
def test_what_follows_an_end_is_worth_nothing(method: str) -> None:
    """One state whose only step ends the episode with reward 1, and leads back to it by name: Q is 1, not more."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    table = td.Table(one, one.long() * 0, one, one.bool(), torch.ones(1, dtype=torch.float64))
    q, _ = td.control(table, method, 3, 60, 0.5, 0.1, seeded())
    assert torch.allclose(q, torch.ones_like(q), atol=1e-9)


def test_episodes_that_never_end_are_an_error(cliff: Any) -> None:
    with pytest.raises(RuntimeError, match="episodes after 50 steps"):
        td.control(cliff, "SARSA", 2, 20, 0.5, 0.1, seeded(), max_steps=50)


def test_a_greedy_policy_that_goes_in_circles_has_no_return(cliff: Any) -> None:
    returns, _ = td.greedy_returns(cliff, torch.zeros(2, 48, 4, dtype=torch.float64))  # always up, against the wall
    assert returns.isnan().all()


# ---------------------------------------------------------------- the bias of the maximum


def double_q_by_hand(n_episodes: int, tables: int, rng: random.Random) -> list[bool]:
    q_a, q_b = [[0.0] * 2 for _ in range(tables)], [[0.0] * 10 for _ in range(tables)]

    def best(values: list[float]) -> int:
        return rng.choice([i for i, v in enumerate(values) if v == max(values)])

    def epsilon_greedy(values: list[float]) -> int:
        return rng.randrange(len(values)) if rng.random() < 0.1 else best(values)

    went_left = []
    for _ in range(n_episodes):
        action = epsilon_greedy([sum(column) for column in zip(*q_a, strict=True)])
        went_left.append(action == 0)
        k = rng.randrange(tables)
        if action == 0:
            q_a[k][0] += 0.1 * (q_b[tables - 1 - k][best(q_b[k])] - q_a[k][0])
            b = epsilon_greedy([sum(column) for column in zip(*q_b, strict=True)])
            k = rng.randrange(tables)
            q_b[k][b] += 0.1 * (rng.gauss(-0.1, 1) - q_b[k][b])
        else:
            q_a[k][1] += 0.1 * (0 - q_a[k][1])
    return went_left


@pytest.mark.parametrize("double", [False, True])
def test_example_6_7_equals_the_loop(double: bool) -> None:
    runs, episodes, rng = 1500, 30, random.Random(3)
    by_loop = torch.tensor([double_q_by_hand(episodes, 1 + double, rng) for _ in range(runs)]).double().mean(0)
    ours = td.left_actions(double, 20_000, seeded(), episodes).double().mean(1)
    spread = (0.25 * (1 / runs + 1 / 20_000)) ** 0.5
    assert ((ours - by_loop).abs() < 5 * spread).all()


# ---------------------------------------------------------------- options, checks, the run


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("env_id", "Nowhere-v9", "Gymnasium cannot make it"),
        ("env_id", "Pendulum-v1", "its actions are Box"),
        ("env_id", "CartPole-v1", "its observations are Box"),
        ("env_id", "Blackjack-v1", "its observations are Tuple"),
        ("step_size", "0", "in (0, 1]"),
        ("step_size", "nan", "in (0, 1]"),
        ("epsilon", "1.5", "in [0, 1]"),
        ("n_episodes", "19", "at least 20"),
        ("control_runs", "1", "at least 2"),
        ("walk_runs", "0", "at least 2"),
        ("long_walk_runs", "-3", "at least 2"),
        ("bias_runs", "1", "at least 2"),
    ],
)
def test_a_bad_option_is_one_message(option: str, value: str, words: str, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--module", "td_learning", "--toy", f"--{option}={value}"]) == 2
    error = capsys.readouterr().err
    assert f"--{option} " in error and words in error and "1 problem" in error
    assert not list(tmp_path.iterdir())


def test_agreement_is_a_matter_of_standard_errors() -> None:
    samples = torch.randn(1000, generator=seeded()).double()
    assert td.near(samples, 0.0, 1000, 0.0)
    assert not td.near(samples + 0.4, 0.0, 1000, 0.0)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with few of everything, where only what depends on many runs may fail."""
    folder = tmp_path_factory.mktemp("td")
    sizes = ("--walk_runs=150", "--long_walk_runs=4", "--control_runs=20", "--bias_runs=300", "--n_episodes=60")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(["--module", "td_learning", *sizes, "--output_dir", "run"])
    return folder / "run"


@pytest.mark.slow
def test_a_small_run_leaves_everything(small: Path) -> None:
    summary = json.loads((small / "summary.json").read_text(encoding="utf-8"))
    assert {"training_curves.png", "random_walk.png", "cliff_paths.png", "results.json"} <= set(summary["artifacts"])
    statuses = {check["id"].split(".")[1]: check["status"] for check in summary["checks"]}
    assert statuses.pop("cliff_online_returns") == "skip", "the reference is for 500 episodes"
    assert statuses.pop("cliff_greedy_paths") == "skip"
    assert statuses["lambda_0_is_one_step"] == statuses["example_6_2"] == statuses["returns_rose"] == "pass"
    assert (
        summary["metrics"]["control/q_learning/return"]["last"]
        > summary["metrics"]["control/q_learning/return"]["first"]
    )


@pytest.mark.slow
def test_another_environment_than_the_cliff(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ("--walk_runs=100", "--long_walk_runs=3", "--control_runs=30", "--bias_runs=200", "--n_episodes=300")
    cli.main(["--module", "td_learning", "--env_id", "FrozenLake-v1", *sizes, "--output_dir", "run"])
    summary = json.loads(Path("run/summary.json").read_text(encoding="utf-8"))
    assert "cliff_paths.png" not in summary["artifacts"]
    assert {c["id"]: c["status"] for c in summary["checks"]}["td_learning.table_is_the_environment"] == "pass"


def test_a_wrong_update_does_not_reproduce_the_book(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of Example 6.2 tells a wrong step size from a right one."""
    right = td.n_step_td

    def wrong(values: Tensor, episodes: Any, n: Tensor, alphas: Tensor) -> None:
        right(values, episodes, n, 1.5 * alphas)

    monkeypatch.setattr(td, "n_step_td", wrong)
    errors = td.learn_short_walk(150, seeded()).errors[-1]
    agree = [td.near(e, v, 2000) for e, v in zip(errors, td.WALK_REFERENCE.values(), strict=True)]
    assert not all(agree)
