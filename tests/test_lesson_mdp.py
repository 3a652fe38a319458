"""Markov decision processes and dynamic programming: `recipes/mdp/mdp.py` against published tables and naive loops."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import pytest
import torch

from llmcore_hf import cli, lesson
from llmcore_hf.errors import ConfigError, UserError
from llmcore_hf.run_dir import validate_summary

matplotlib.use("Agg")
mdp = lesson.load("mdp").file
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def close_figures() -> Any:
    yield
    lesson.pyplot().close("all")


def make(env_id: str, **options: Any) -> Any:
    return mdp.from_gymnasium(gym.make(env_id, **options))


def naive_values(table: Any, n_states: int, n_actions: int, gamma: float, sweeps: int) -> list[float]:
    """Value iteration written out in loops over Gymnasium's own table."""
    values = [0.0] * n_states
    for _ in range(sweeps):
        values = [
            max(
                sum(p * (r + gamma * values[following] * (not over)) for p, following, r, over in table[s][a])
                for a in range(n_actions)
            )
            for s in range(n_states)
        ]
    return values


def small_random(seed: int, n_states: int = 7, n_actions: int = 3, terminating: bool = True) -> Any:
    """An MDP of random shape: ragged outcome lists, missing actions, rewards of both signs."""
    draw = random.Random(seed)

    def outcomes(state: int, action: int) -> list[tuple]:
        if action and draw.random() < 0.2:
            return []
        weights = [draw.random() + 0.01 for _ in range(draw.randint(1, 4))]
        over = terminating and draw.random() < 0.5
        return [
            (w / sum(weights), draw.randrange(n_states), draw.uniform(-2, 2), over and draw.random() < 0.4)
            for w in weights
        ]

    start = torch.full((n_states,), 1 / n_states, dtype=torch.float64)
    return mdp.from_outcomes(outcomes, n_states, n_actions, start)


def exact(model: Any, gamma: float) -> torch.Tensor:
    """v* by trying every deterministic policy with a dense numpy solve: no iteration that could share a mistake."""
    available = [[a for a in range(model.n_actions) if model.available[a, s]] for s in range(model.n_states)]
    best = np.full(model.n_states, -np.inf)
    for choice in itertools.product(*available):
        matrix, reward = np.eye(model.n_states), np.zeros(model.n_states)
        for s, a in enumerate(choice):
            for k in range(model.next_state.shape[-1]):
                p = float(model.probability[a, s, k])
                reward[s] += p * float(model.reward[a, s, k])
                matrix[s, int(model.next_state[a, s, k])] -= gamma * p * (not model.terminated[a, s, k])
        best = np.maximum(best, np.linalg.solve(matrix, reward))
    return torch.from_numpy(best)


# Published values


def test_the_values_of_the_gridworld_are_those_of_figures_3_2_and_3_5() -> None:
    world = mdp.gridworld()
    random_values, best = mdp.evaluate(world, mdp.uniform(world), 0.9), mdp.solve(world, 0.9, 1e-9).values
    assert random_values.view(5, 5).numpy().round(1).tolist() == [list(row) for row in mdp.FIGURE_3_2]
    assert best.view(5, 5).numpy().round(1).tolist() == [list(row) for row in mdp.FIGURE_3_5]
    assert random_values[1] == pytest.approx(8.8, abs=0.05) and best[1] == pytest.approx(24.4, abs=0.05)


@pytest.mark.parametrize(
    ("sweeps", "row"),
    [(1, (0, -1, -1, -1)), (2, (0, -1.75, -2, -2)), (3, (0, -2.4, -2.9, -3)), (10, (0, -6.1, -8.4, -9))],
)
def test_sweeps_of_policy_evaluation_are_those_of_figure_4_1(sweeps: int, row: tuple[float, ...]) -> None:
    world = mdp.small_gridworld()
    values = torch.zeros(16, dtype=torch.float64)
    for _ in range(sweeps):
        values = mdp.action_values(world, values, 1.0).mean(0)
    torch.testing.assert_close(values[:4], torch.tensor(row, dtype=torch.float64), atol=0.051, rtol=0)


def test_the_random_policy_of_the_small_gridworld_has_the_values_of_figure_4_1() -> None:
    world = mdp.small_gridworld()
    values = mdp.evaluate(world, mdp.uniform(world), 1.0).view(4, 4)
    torch.testing.assert_close(values, torch.tensor(mdp.FIGURE_4_1, dtype=torch.float64), atol=1e-9, rtol=0)
    assert mdp.solve_episodic(world)[0].view(4, 4)[0].tolist() == [0, -1, -2, -3]


def bold(capital: float, p: float) -> float:
    """Probability of reaching 1 from a dyadic capital by staking all or what is missing (Dubins & Savage 1965)."""
    if capital in (0.0, 1.0):
        return capital
    return p * bold(2 * capital, p) if capital <= 0.5 else p + (1 - p) * bold(2 * capital - 1, p)


@pytest.mark.parametrize("p", [0.25, 0.4])
def test_the_gambler_with_bad_odds_is_worth_bold_play(p: float) -> None:
    values, _, residual = mdp.solve_episodic(mdp.gambler(p, goal=64))
    expected = torch.tensor([bold(s / 64, p) for s in range(1, 64)], dtype=torch.float64)
    torch.testing.assert_close(values[1:-1], expected, atol=1e-10, rtol=0)
    assert residual < 1e-12 and values[0] == values[-1] == 0


def test_the_gambler_with_good_odds_plays_timidly() -> None:
    """p > 1/2: stake 1; the ruin probability of the random walk in closed form."""
    values, _, _ = mdp.solve_episodic(mdp.gambler(0.55, goal=20))
    ratio = 0.45 / 0.55
    expected = torch.tensor([(1 - ratio**s) / (1 - ratio**20) for s in range(1, 20)], dtype=torch.float64)
    torch.testing.assert_close(values[1:-1], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("n1", "n2", "moved"), [(0, 0, 0), (10, 3, 4), (20, 20, -5), (2, 18, -1)])
def test_the_dynamics_of_the_car_rental_are_those_of_example_4_2(n1: int, n2: int, moved: int) -> None:
    """Against plain sums over Poisson numbers up to 40, each event for itself."""
    model = mdp.car_rental()
    pmf = {mean: [math.exp(-mean) * mean**n / math.factorial(n) for n in range(41)] for mean in (2, 3, 4)}
    reward, following = -2.0 * abs(moved), np.ones(1)
    for cars, requests, returns in ((min(n1 - moved, 20), 3, 3), (min(n2 + moved, 20), 4, 2)):
        evening = np.zeros(21)
        for asked, back in itertools.product(range(41), range(41)):
            p, rented = pmf[requests][asked] * pmf[returns][back], min(asked, cars)
            evening[min(cars - rented + back, 20)] += p
            reward += p * 10 * rented
        following = np.outer(following, evening).reshape(-1)
    state, action = 21 * n1 + n2, moved + 5
    assert model.expected_reward[action, state].item() == pytest.approx(reward, abs=1e-9)
    np.testing.assert_allclose(model.probability[action, state].numpy(), following, atol=1e-12)


def test_a_car_that_is_not_there_cannot_be_moved() -> None:
    model = mdp.car_rental()
    assert model.available[:, 0].tolist() == [a == 5 for a in range(11)]
    assert model.available[:, 21 * 2 + 1].tolist() == [-1 <= a - 5 <= 2 for a in range(11)]


def test_policy_iteration_on_the_car_rental_goes_through_five_policies() -> None:
    model = mdp.car_rental()
    steps = list(mdp.policy_iteration(model, 0.9, torch.full((441,), 5)))
    moved = [(step.policy - 5).view(21, 21) for step in steps]
    assert len(steps) == 5 and (moved[-1].min(), moved[-1].max()) == (-4, 5)
    assert moved[1].max() == 5 and moved[1][20, 0] == 5 and moved[1][0, 20] == -4
    values = mdp.solve(model, 0.9, 1e-6).values
    assert values[0].item() == pytest.approx(421.41, abs=0.01) and values[-1].item() == pytest.approx(636.99, abs=0.01)
    torch.testing.assert_close(values, steps[-1].values, atol=1e-6, rtol=0)


# Gymnasium's tables


@pytest.mark.parametrize(
    ("env_id", "gamma", "horizon", "start", "reached", "best"),
    [
        ("FrozenLake-v1", 0.99, 100, 0.5420, 0.7402, 0.7442),
        ("FrozenLake8x8-v1", 0.99, 200, 0.4146, 0.8630, 0.9132),
        ("FrozenLake8x8-v1", 0.99, 100, 0.4146, 0.6317, None),
        ("FrozenLake8x8-v1", 0.999, 200, 0.8926, 0.8857, 0.9132),
        ("Taxi-v4", 0.99, 200, 6.3275, 7.930, 7.930),
        ("CliffWalking-v1", 0.99, 1000, -(1 - 0.99**13) / 0.01, -13, -13),
        ("CliffWalkingSlippery-v1", 0.99, 1000, -46.3527, -64.709, -64.709),
    ],
)
def test_the_table_of_results(
    env_id: str, gamma: float, horizon: int, start: float, reached: float, best: float | None
) -> None:
    model = make(env_id)
    solution = mdp.solve(model, gamma, 1e-8)
    assert float(model.start @ solution.values) == pytest.approx(start, abs=6e-5)
    assert mdp.expected_return(model, solution.policy, horizon) == pytest.approx(reached, abs=1e-3)
    if best is not None:
        assert mdp.best_return(model, horizon) == pytest.approx(best, abs=1e-3)


def test_without_a_time_limit_and_a_discount() -> None:
    lake = make("FrozenLake-v1")
    values, _, _ = mdp.solve_episodic(lake)
    assert values[0].item() == pytest.approx(14 / 17, abs=1e-9)
    assert mdp.expected_return(lake, mdp.uniform(lake), 100) == pytest.approx(0.0139, abs=1e-4)
    assert mdp.solve_episodic(make("CliffWalking-v1"))[0][36].item() == pytest.approx(-13, abs=1e-9)
    taxi = make("Taxi-v4")
    assert float(taxi.start @ mdp.solve_episodic(taxi)[0]) == pytest.approx(7.93, abs=1e-9)


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "CliffWalkingSlippery-v1", "Taxi-v4"])
def test_value_iteration_is_the_naive_loop_over_the_table(env_id: str) -> None:
    env: Any = gym.make(env_id).unwrapped
    model, sweeps = mdp.from_gymnasium(env), 8
    expected = naive_values(env.P, model.n_states, model.n_actions, 0.9, sweeps)
    *_, last = itertools.islice(mdp.value_iteration(model, 0.9), sweeps)
    np.testing.assert_allclose(last.backup.numpy(), expected, atol=1e-12)
    assert last.work == sweeps


def test_what_terminated_means_is_read_from_the_table() -> None:
    """A wrong reading would let values flow back from the cliff's goal, whose table goes on."""
    model = make("CliffWalking-v1")
    assert model.terminated[1, 46 - 12].any().item() is False and model.terminated[2, 35, 0].item() is True
    assert model.terminates and not mdp.gridworld().terminates


def test_the_corners_of_the_small_gridworld_end_the_episode() -> None:
    world = mdp.small_gridworld()
    assert world.terminated[:, 4, 0].tolist() == [True, False, False, False]  # only north of state 4 is a corner
    ruin = mdp.gambler().terminated[:, 30]  # stakes 1 to 30 are possible
    assert ruin[29].tolist() == [False, True] and ruin[19].tolist() == [False, False]


def test_the_slippery_grid_slips_to_either_side_and_keeps_its_free_cell() -> None:
    grid = mdp.slippery_grid(5, torch.Generator().manual_seed(0), slip=0.2)
    assert [set(row) for row in grid.next_state[:, 12].tolist()] == [
        {7, 13, 11},
        {13, 17, 7},
        {17, 11, 13},
        {11, 7, 17},
    ]
    assert grid.next_state[:, 12, 0].tolist() == [7, 13, 17, 11] and grid.probability[0, 12].tolist() == [0.8, 0.1, 0.1]
    assert (grid.next_state[:, 0] == 0).all() and (grid.reward[:, 0] == 0).all() and (grid.reward[:, 1:] < 0).all()


# Operators and evaluation


def test_greedy_is_the_first_maximum() -> None:
    q = torch.randint(0, 3, (5, 200), generator=torch.Generator().manual_seed(0)).double()
    best, policy = mdp.greedy(q)
    assert torch.equal(best, q.amax(0)) and torch.equal(policy, q.argmax(0))
    assert torch.equal(q.gather(0, policy[None])[0], best)


@pytest.mark.parametrize("seed", range(4))
def test_every_method_finds_the_best_of_all_policies(seed: int) -> None:
    model, gamma = small_random(seed, terminating=seed % 2 == 0), 0.93
    expected = exact(model, gamma)
    for name, solution in mdp.solve_by_all(model, gamma, 1e-9).items():
        assert solution.error_bound <= 1e-9, name
        torch.testing.assert_close(solution.values, expected, atol=1.1e-9, rtol=0)
        loss = expected - mdp.evaluate(model, solution.policy, gamma)
        assert loss.max() <= 2e-9, name


@pytest.mark.parametrize("seed", range(30))
def test_bounds_hold_at_every_iterate_and_iterates_rise(seed: int) -> None:
    model, gamma = small_random(seed, n_states=12, terminating=seed % 3 != 0), (0.5, 0.9, 0.99)[seed % 3]
    star = mdp.certify(mdp.policy_iteration(model, gamma), model, gamma, 1e-8).values
    methods = (mdp.value_iteration, mdp.policy_iteration, mdp.modified_policy_iteration, mdp.mixed_policy_iteration)
    for method in methods:
        former = None
        for values, backup, _, _ in itertools.islice(method(model, gamma), 40):
            correction, bound = mdp.span_bound(model, values, backup, gamma)
            assert (backup + correction - star).abs().max() <= bound + 1e-8
            assert (backup - star).abs().max() <= mdp.norm_bound(model, values, backup, gamma) + 1e-8
            assert bound <= mdp.norm_bound(model, values, backup, gamma) + 1e-12
            policy = mdp.greedy(mdp.action_values(model, values, gamma))[1]
            assert (mdp.evaluate(model, policy, gamma) - (backup + correction - bound)).min() >= -1e-8
            if method is not mdp.value_iteration:
                assert former is None or (values >= former - 1e-9).all()
                assert (backup >= values - 1e-9).all() and (values <= star + 1e-8).all()
                former = backup


def test_zero_belongs_to_the_range_of_the_residual_where_episodes_end() -> None:
    """Every component of Lv - v is 1 here; without the 0 the span would be 0 and the values wrong by 1 / (1 - gamma)."""
    model = mdp.from_outcomes(lambda s, a: [(1.0, 0, 1.0, True)], 1, 1, torch.ones(1, dtype=torch.float64))
    values = torch.zeros(1, dtype=torch.float64)
    assert mdp.residual_range(model, values, values + 1) == (0.0, 1.0)
    assert mdp.solve(model, 0.9, 1e-9).values.item() == pytest.approx(1.0, abs=1e-9)


def test_the_lower_solution_is_the_largest_constant() -> None:
    for seed in range(10):
        model = small_random(seed)
        constant = mdp.lower_solution(model, 0.9)
        slack = mdp.action_values(model, constant, 0.9).amax(0) - constant
        assert slack.min() == pytest.approx(0.0, abs=1e-12)


def test_no_discounting_of_the_future_at_all() -> None:
    model = small_random(0)
    solution = mdp.solve(model, 0.0, 1e-9)
    torch.testing.assert_close(solution.values, model.expected_reward.amax(0))


def test_sparse_and_dense_evaluation_agree() -> None:
    model, gamma = mdp.slippery_grid(6, torch.Generator().manual_seed(1)), 0.95
    policy = torch.randint(4, (36,), generator=torch.Generator().manual_seed(2))
    dense = mdp.evaluate(model, policy, gamma)
    transition, reward = mdp.follow(model, policy)
    solved, used, done = mdp.bicgstab(transition, reward, torch.zeros(36, dtype=torch.float64), gamma, 1e-11, 400)
    assert done and used < 100
    torch.testing.assert_close(solved, dense, atol=1e-9, rtol=0)
    one_hot = torch.nn.functional.one_hot(policy, 4).T.double()
    torch.testing.assert_close(mdp.evaluate(model, one_hot, gamma), dense)


def ring(n_states: int) -> Any:
    """Always one step on, paid once a round: a Krylov method gets nowhere before n steps."""
    start = torch.full((n_states,), 1 / n_states, dtype=torch.float64)
    return mdp.from_outcomes(lambda s, a: [(1.0, (s + 1 + a) % n_states, float(s == 0), False)], n_states, 2, start)


def test_a_failed_linear_solve_does_no_harm() -> None:
    model, gamma = ring(60), 0.99
    transition, reward = mdp.follow(model, torch.zeros(60, dtype=torch.long))
    guess = torch.zeros(60, dtype=torch.float64)
    solved, used, done = mdp.bicgstab(transition, reward, guess, gamma, 1e-9, 40)
    assert not done and used <= 40 and torch.isfinite(solved).all()
    low = mdp.lowered(transition, reward, solved, gamma)
    assert (low <= mdp.evaluate(model, torch.zeros(60, dtype=torch.long), gamma) + 1e-9).all()


@pytest.mark.parametrize("first", [1, 10, 10**9])
@pytest.mark.parametrize("which", ["ring", "lake", "cliff", "random", "grid"])
def test_however_the_work_is_shared_the_values_are_right(which: str, first: int, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    model = {
        "ring": lambda: ring(50),
        "lake": lambda: make("FrozenLake8x8-v1"),
        "cliff": lambda: make("CliffWalkingSlippery-v1"),
        "random": lambda: mdp.random_mdp(50, 3, 5, generator),
        "grid": lambda: mdp.slippery_grid(8, generator),
    }[which]()
    monkeypatch.setattr(mdp, "FIRST_SOLVE", first)
    solution = mdp.solve(model, 0.99, 1e-7)
    *_, last = mdp.policy_iteration(model, 0.99)
    assert solution.error_bound <= 1e-7
    torch.testing.assert_close(solution.values, last.values, atol=2e-7, rtol=0)


def test_the_linear_solve_pays_on_a_slowly_mixing_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 states: 266 sweeps with the linear solve, 450 without."""
    model = mdp.slippery_grid(100, torch.Generator().manual_seed(0))
    mixed = mdp.solve(model, 0.999, 1e-6).work
    monkeypatch.setattr(mdp, "FIRST_SOLVE", 10**9)
    assert mixed < 0.8 * mdp.solve(model, 0.999, 1e-6).work


@pytest.mark.parametrize("seed", range(5))
def test_solvers_save_sweeps_on_both_kinds_of_mdp(seed: int) -> None:
    """Value iteration over `solve`, seeds 0-4, 900 and 2,500 states: 175-185 (fast mixing), 3.2-9.6 (slow mixing).

    40,000 states, seed 42: 159 and 22. The checks ask for 50 and 2.
    """
    solvers = mdp.compare_solvers(mdp.Args(seed=seed, n_states=900))
    assert all(s.error_bound <= mdp.SOLVER_TOLERANCE for row in solvers.values() for s in row.values())
    assert all(check.passed for check in mdp.solver_checks(solvers))


def test_a_tolerance_that_float64_can_just_certify_is_reached() -> None:
    for seed, gamma in itertools.product(range(5), (0.5, 0.99, 0.9999)):
        model = small_random(seed)
        floor = mdp.rounding(model, mdp.solve(model, gamma, 1e-4).values, gamma)
        assert mdp.solve(model, gamma, 2.1 * floor).error_bound <= 2.1 * floor
        with pytest.raises(UserError, match="beyond float64"):
            mdp.solve(model, gamma, 0.5 * floor)


# Returns


def test_the_return_of_a_coin_that_ends_the_episode() -> None:
    """Reward 1 per step, over with probability 1/4: geometric, mean 4 and variance (1 - p) / p^2 = 12."""
    coin = mdp.from_outcomes(lambda s, a: [(0.25, 0, 1.0, True), (0.75, 0, 1.0, False)], 1, 1, torch.ones(1).double())
    policy = torch.zeros(1, dtype=torch.long)
    mean, deviation = mdp.return_moments(coin, policy, 1000)
    assert mean == pytest.approx(4) and deviation == pytest.approx(math.sqrt(12))
    assert mdp.expected_return(coin, policy, 3) == pytest.approx(1 + 0.75 + 0.75**2)


@pytest.mark.parametrize("seed", range(5))
def test_returns_forwards_backwards_and_by_enumeration(seed: int) -> None:
    model, horizon = small_random(seed, n_states=4, n_actions=2), 4
    policy = mdp.solve(model, 0.9, 1e-8).policy
    first = second = 0.0

    def walk(state: int, p: float, total: float, left: int) -> None:
        nonlocal first, second
        if not left:
            first, second = first + p * total, second + p * total**2
            return
        a = int(policy[state])
        for k in range(model.next_state.shape[-1]):
            q, r = p * float(model.probability[a, state, k]), total + float(model.reward[a, state, k])
            over = bool(model.terminated[a, state, k])
            walk(int(model.next_state[a, state, k]), q, r, 0 if over else left - 1)

    for state in range(4):
        walk(state, float(model.start[state]), 0.0, horizon)
    mean, deviation = mdp.return_moments(model, policy, horizon)
    assert (mean, mean**2 + deviation**2) == (pytest.approx(first), pytest.approx(second))
    assert mdp.expected_return(model, policy, horizon) == pytest.approx(first)
    assert mdp.best_return(model, horizon) >= first - 1e-12


def test_a_simulation_is_repeatable_and_near_the_exact_return() -> None:
    model = make("FrozenLake-v1")
    policy = mdp.solve(model, 0.99, 1e-8).policy
    returns = mdp.simulate("FrozenLake-v1", policy, 100, 200, seed=3)
    assert np.array_equal(returns, mdp.simulate("FrozenLake-v1", policy, 100, 200, seed=3))
    assert returns.mean() == pytest.approx(0.7402, abs=5 * 0.4386 / math.sqrt(200))
    assert not np.array_equal(returns, mdp.simulate("FrozenLake-v1", policy, 100, 200, seed=4))


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"env_id": "Nope-v0"}, "--env_id Nope-v0: Gymnasium cannot make it"),
        ({"env_id": "Taxi-v3"}, "use `Taxi-v4` instead"),
        ({"env_id": ""}, "--env_id : Gymnasium"),
        ({"env_id": "a:b:c"}, "--env_id a:b:c"),
        ({"env_id": "no_such_package:Env-v0"}, "no_such_package"),
        ({"env_id": "Pendulum-v1"}, "its actions are Box"),
        ({"env_id": "CartPole-v1"}, "its observations are Box"),
        ({"env_id": "Blackjack-v1"}, "its observations are Tuple"),
        ({"gamma": 1.0}, "--gamma 1.0: a discount factor is in [0, 1)"),
        ({"gamma": -0.1}, "--gamma -0.1"),
        ({"gamma": math.nan}, "--gamma nan"),
        ({"tolerance": 0.0}, "--tolerance 0.0"),
        ({"tolerance": math.inf}, "--tolerance inf"),
        ({"tolerance": math.nan}, "--tolerance nan"),
        ({"horizon": 0}, "--horizon 0: at least 1"),
        ({"episodes": 1}, "--episodes 1: at least 2"),
        ({"n_states": 3}, "--n_states 3: at least 4"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_bad_option_is_named_in_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mdp.Args(**options)
    assert len(caught.value.problems) == 1 and words in caught.value.problems[0]


OWN = """
import gymnasium as gym

class Coin(gym.Env):
    observation_space = action_space = gym.spaces.Discrete(2)
    P = {s: {a: [(0.5, 0, 1.0, False), (0.5, 1, 0.0, a == 1)] for a in range(2)} for s in range(2)}

class Fair(Coin):
    initial_state_distrib = [1.0, 0.0]

class Broken(gym.Env):
    def __init__(self):
        raise TypeError("no screen")

gym.register("NoStart-v0", Coin)
gym.register("Fair-v0", Fair)
gym.register("Broken-v0", Broken)
"""


def test_an_environment_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_envs.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    assert lesson.environment_problems("own_envs:Fair-v0", tabular=True) == []
    assert "no `P` and `initial_state_distrib`" in lesson.environment_problems("own_envs:NoStart-v0", tabular=True)[0]
    assert "no screen" in lesson.environment_problems("own_envs:Broken-v0", tabular=True)[0]
    model = make("own_envs:Fair-v0")
    assert mdp.solve(model, 0.5, 1e-9).values.tolist() == pytest.approx([1.0, 1.0])
    sys.modules.pop("own_envs")


ONE = {
    "next_state": torch.zeros(1, 1, 1, dtype=torch.long),
    "probability": torch.ones(1, 1, 1, dtype=torch.float64),
    "reward": torch.zeros(1, 1, 1, dtype=torch.float64),
    "terminated": torch.zeros(1, 1, 1, dtype=torch.bool),
    "available": torch.ones(1, 1, dtype=torch.bool),
    "start": torch.ones(1, dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("probability", 0.9, "do not sum to 1 (state 0, action 0)"),
        ("probability", -1.0, "negative or not a number"),
        ("probability", math.nan, "negative or not a number"),
        ("next_state", 1, "a next state does not exist"),
        ("next_state", -1, "a next state does not exist"),
        ("reward", math.inf, "a reward is not finite"),
        ("available", False, "state 0 has no action"),
        ("start", 0.5, "first states do not sum to 1"),
    ],
)
def test_tensors_that_are_no_mdp_are_refused(field: str, value: Any, words: str) -> None:
    mdp.MDP(**ONE)
    with pytest.raises(UserError) as caught:
        mdp.MDP(**{**ONE, field: torch.full_like(ONE[field], value)})
    assert words in str(caught.value)


def test_an_undiscounted_problem_that_never_ends_is_refused() -> None:
    with pytest.raises(UserError, match="can an episode go on for ever"):
        mdp.solve_episodic(mdp.gridworld(), most_sweeps=50)


# Checks that fail when something is wrong


def test_checks_fail_when_the_numbers_are_wrong() -> None:
    world = mdp.gridworld()
    assert not mdp.published("x", mdp.evaluate(world, mdp.uniform(world), 0.89), mdp.FIGURE_3_2, 0.05, "Fig.").passed
    row = {
        **{"env_id": "CliffWalking-v1", "return": 0.5, "return_forwards": 0.5, "return_std": 0.5, "episodes": 100},
        **{"simulated_return": 0.6, "random_return": 0.1, "best_return": 0.6},
    }
    assert mdp.simulation_check([row]).passed and mdp.return_check(row).passed
    assert not mdp.simulation_check([row, {**row, "simulated_return": 0.8}]).passed
    assert not mdp.simulation_check([{**row, "return_forwards": 0.5001}, row]).passed
    assert not mdp.return_check({**row, "return": 0.05}).passed and not mdp.return_check({**row, "return": 0.7}).passed
    assert not mdp.cliff_check([row]).passed and mdp.cliff_check([{**row, "return": -13.0}]).passed


def test_checks_on_the_solvers_fail_when_one_is_broken() -> None:
    model, args = make("FrozenLake-v1"), mdp.Args(env_id="FrozenLake-v1", gamma=0.9)
    good = mdp.solve_by_all(model, 0.9, 1e-8)
    assert mdp.agreement_check(good).passed
    off = mdp.Solution(good["policy iteration"].values + 1e-6, good["policy iteration"].policy, 1e-8, 1.0, [])
    assert not mdp.agreement_check({**good, "policy iteration": off}).passed
    curve = mdp.watch(model, args, good["policy iteration"].values, 100)
    plain = good["value iteration"]
    assert all(check.passed for check in mdp.bound_checks(curve, plain, args))
    covered, _ = mdp.bound_checks([{**curve[0], "span_bound": 0.0}], plain, args)
    assert not covered.passed
    slower = [{**row, "bellman_residual": 0.95**i} for i, row in enumerate(plain.trace)]
    _, contraction = mdp.bound_checks(curve, mdp.Solution(plain.values, plain.policy, 0.0, 1.0, slower), args)
    assert not contraction.passed


# Pictures


def test_actions_become_arrows_on_any_map() -> None:
    lake, cliff = gym.make("FrozenLake-v1"), gym.make("CliffWalkingSlippery-v1")
    assert mdp.directions(mdp.from_gymnasium(lake), 4) == [(-1, 0), (0, 1), (1, 0), (0, -1)]
    assert mdp.directions(mdp.from_gymnasium(cliff), 12) == [(0, -1), (1, 0), (0, 1), (-1, 0)]
    assert mdp.map_of(lake) == ((4, 4), "SFFFFHFHFFFHHFFG") and mdp.map_of(cliff) == ((4, 12), "")
    assert mdp.map_of(gym.make("Taxi-v4")) is None
    idle = mdp.idle_states(mdp.from_gymnasium(lake)).nonzero().flatten().tolist()
    assert idle == [5, 7, 11, 12, 15]
    assert mdp.idle_states(mdp.from_gymnasium(cliff)).nonzero().flatten().tolist() == list(range(37, 48))


def test_all_greedy_actions_are_marked() -> None:
    world = mdp.gridworld()
    best = mdp.best_actions(world, mdp.solve(world, 0.9, 1e-9).values, 0.9)
    assert best[:, 1].all() and best[:, 3].all() and best[:, 0].tolist() == [False, True, False, False]
    assert best[:, 10].tolist() == [True, True, False, False]


def test_the_pictures_show_what_their_titles_say() -> None:
    world = mdp.gridworld()
    random_big, best_big = mdp.evaluate(world, mdp.uniform(world), 0.9), mdp.solve(world, 0.9, 1e-9).values
    small = mdp.small_gridworld()
    figure = mdp.draw_gridworlds(random_big, best_big, mdp.evaluate(small, mdp.uniform(small), 1.0))
    texts = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert texts[0][:5] == ["3.3", "8.8", "4.4", "5.3", "1.5"] and "24.4" in texts[1] and "-14" in texts[2]
    gambler = mdp.gambler()
    figure = mdp.draw_gambler(gambler, mdp.solve_episodic(gambler)[0])
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["after sweep 1", "after sweep 2", "after sweep 3", "v* (probability of reaching 100)"]
    smallest = figure.axes[1].lines[1].get_ydata()
    assert smallest[49] == 50 and smallest[24] == 25 and smallest[0] == 1
    solvers = mdp.compare_solvers(mdp.Args(n_states=100))
    figure = mdp.draw_solvers(solvers, 100)
    assert all(axis.get_xscale() == axis.get_yscale() == "log" for axis in figure.axes)


@pytest.mark.slow
def test_a_run_of_the_taxi_leaves_a_valid_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"env_id": "Taxi-v4", "gamma": 0.9, "episodes": 50, "horizon": 300, "n_states": 900, "output_dir": "out"}
    code = cli.main(["--module", "mdp", *(word for k, v in options.items() for word in (f"--{k}", str(v)))])
    summary = json.loads(Path("out/summary.json").read_text())
    validate_summary(summary)
    assert code == 0 and summary["status"] == "ok" and summary["eval"] is None and len(summary["checks"]) == 15
    pictures = {"training_curves", "gridworlds", "gambler", "car_rental", "toy_text", "solvers"}
    assert {f"{name}.png" for name in pictures} <= set(summary["artifacts"])
    assert summary["metrics"]["bellman_residual"]["last"] < summary["metrics"]["bellman_residual"]["first"]
    assert summary["metrics"]["return"]["last"] == pytest.approx(7.93, abs=1e-6)
    results = json.loads(Path("out/results.json").read_text())
    assert results["environment"]["horizon"] == 200 and len(results["toy_text"]) == 6
