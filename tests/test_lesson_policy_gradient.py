"""The lesson `policy_gradient`: its parts against closed forms, counting and naive loops, and its options."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from llmcore_hf import cli, lesson
from llmcore_hf.errors import ConfigError

pg = lesson.load("policy_gradient").file
pytestmark = pytest.mark.usefixtures("one_thread")


def make_agents(**options: Any) -> Any:
    return pg.Agents(pg.Args(**options), n_observations=4, n_actions=2, max_steps=500, seed=0)


def make_env(n: int, seed: int = 0, env_id: str = "CartPole-v1") -> Any:
    env = gymnasium.make_vec(env_id, num_envs=n)
    env.reset(seed=seed)
    return env


def random_episodes(n_runs: int = 2, n_episodes: int = 3, n_steps: int = 7, seed: int = 0) -> Any:
    """Episodes of different lengths, with rewards that differ."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, n_steps + 1, (n_runs, 1, n_episodes), generator=generator)
    lengths[0, 0, 0] = n_steps
    mask = torch.arange(n_steps).view(1, -1, 1) < lengths
    shape = mask.shape
    return pg.Episodes(
        observations=torch.randn(*shape, 4, generator=generator),
        actions=torch.randint(0, 2, shape, generator=generator),
        rewards=torch.randn(shape, generator=generator) * mask,
        mask=mask,
    )


def randomize(networks: Any, seed: int = 0) -> Any:
    """Weights that are nowhere 0, so that nothing is right by symmetry."""
    generator = torch.Generator().manual_seed(seed)
    for weight in networks.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.5
    return networks


# Returns


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
def test_rewards_to_go_match_a_naive_loop(gamma: float) -> None:
    episodes = random_episodes()
    result = pg.rewards_to_go(episodes.rewards.double(), gamma)
    for r, t, n in np.ndindex(*result.shape):
        length = int(episodes.mask[r, :, n].sum())
        expected = sum(gamma ** (k - t) * episodes.rewards[r, k, n].item() for k in range(t, length))
        assert result[r, t, n].item() == pytest.approx(expected, abs=1e-12)


def test_the_return_of_one_reward_per_step_is_a_geometric_sum() -> None:
    ones = torch.ones(1, 500, 1, dtype=torch.float64)
    returns = pg.rewards_to_go(ones, 0.99)[0, :, 0]
    left = torch.arange(500, 0, -1, dtype=torch.float64)
    assert torch.allclose(returns, (1 - 0.99**left) / 0.01, atol=1e-10)


# The policy gradient


def test_the_expected_gradient_of_a_bandit_is_its_closed_form() -> None:
    """One step, three actions: dJ/d logit_a = pi_a (r_a - J), whatever constant is subtracted from the reward."""
    theta = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64)
    pi = theta.softmax(0).detach()
    exact = pi * (reward - (pi * reward).sum())
    actions = torch.arange(3).view(3, 1, 1)  # every action once, each as a run
    for baseline in (0.0, 3.0, -100.0):
        logprobs = pg.log_probabilities(theta.expand(3, 1, 1, 3), actions)
        losses = pg.policy_loss(logprobs, (reward - baseline).view(3, 1, 1), torch.ones(3, 1, 1, dtype=torch.bool))
        (gradient,) = torch.autograd.grad((pi * losses).sum(), theta)
        assert torch.allclose(-gradient, exact, atol=1e-12)


def test_the_tiny_world_is_counted_out_completely() -> None:
    states, actions, rewards, mask = pg.tiny_episodes()
    assert len({tuple(row) for row in actions.squeeze(2).tolist()}) == 8
    totals = {tuple(a[m].tolist()): r.sum().item() for a, r, m in zip(actions, rewards, mask, strict=True)}
    # left at once; change, then stay out; change, back, and end; change, back, change: cut off by the time limit
    assert totals == {(0,): 1.0, (1, 1): -1.0, (1, 0, 0): 3.0, (1, 0, 1): 2.0}
    assert states[mask].max() == 1


def test_the_theorem_holds_by_counting() -> None:
    """J = p(0) + ... written out by hand, differentiated by hand with the logits of one state."""
    theta = torch.tensor([[0.1, 0.9], [-0.3, 0.4]], dtype=torch.float64)
    differences, gradient = pg.exact_gradients(theta, torch.tensor([4.0, -2.0], dtype=torch.float64))
    x, y = theta.softmax(-1)[:, 0].tolist()  # probability of action 0 in state 0 and 1
    # J(x, y) = x + (1 - x) [ (1 - y)(-1) + y (3 x + 2 (1 - x)) ] = x + (1 - x)(y - 1 + y (2 + x))
    dx = 1 - (y - 1 + y * (2 + x)) + (1 - x) * y
    dy = (1 - x) * (1 + 2 + x)
    expected = [dx * x * (1 - x), -dx * x * (1 - x), dy * y * (1 - y), -dy * y * (1 - y)]
    assert differences.flatten().tolist() == pytest.approx(expected, abs=1e-8)
    assert gradient.flatten().tolist() == pytest.approx(expected, abs=1e-12)


def test_the_gradient_matches_finite_differences_of_the_surrogate() -> None:
    episodes, policy = random_episodes(), randomize(make_agents(num_runs=1, hidden_size=3).policy).double()
    weights = pg.rewards_to_go(episodes.rewards.double(), 0.9)

    def loss() -> torch.Tensor:
        logits = policy(episodes.observations.double())
        return pg.policy_loss(pg.log_probabilities(logits, episodes.actions), weights, episodes.mask).sum()

    loss().backward()
    for parameter in policy.parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(len(flat)):
            value = flat[i].item()
            flat[i] = value + 1e-6
            up = loss().item()
            flat[i] = value - 1e-6
            down = loss().item()
            flat[i] = value
            assert gradient[i].item() == pytest.approx((up - down) / 2e-6, abs=1e-7)


def test_the_loss_sums_over_steps_and_averages_over_episodes() -> None:
    episodes = random_episodes()
    logprobs, weights = torch.randn(2, *episodes.mask.shape, dtype=torch.float64)
    losses = pg.policy_loss(logprobs, weights, episodes.mask)
    for r in range(2):
        terms = [
            -logprobs[r, t, n].item() * weights[r, t, n].item()
            for t, n in np.ndindex(*episodes.mask.shape[1:])
            if episodes.mask[r, t, n]
        ]
        assert losses[r].item() == pytest.approx(math.fsum(terms) / 3)


def test_weights_are_constants_for_the_gradient() -> None:
    weights = torch.ones(1, 1, 1, requires_grad=True)
    loss = pg.policy_loss(torch.zeros(1, 1, 1, requires_grad=True), weights, torch.ones(1, 1, 1, dtype=torch.bool))
    loss.sum().backward()
    assert weights.grad is None


def test_the_gradients_of_single_episodes_average_to_the_gradient_of_the_batch() -> None:
    episodes, agents = random_episodes(n_runs=4), make_agents(num_runs=2, hidden_size=3)
    policy = randomize(agents.policy)
    weights = pg.rewards_to_go(episodes.rewards, 0.9)
    logprobs = pg.log_probabilities(policy(episodes.observations), episodes.actions)
    (-pg.policy_loss(logprobs, weights, episodes.mask)).sum().backward()
    batch = torch.cat([p.grad.flatten(1) for p in policy.parameters()], dim=1)  # (R, P)
    single = pg.episode_gradients(policy, episodes, weights, slice(0, 2))
    assert single.shape == (2, 3, batch.shape[1])
    assert torch.allclose(single.mean(1), batch[:2], atol=1e-5)
    variance = pg.gradient_variance(policy, episodes, weights, slice(0, 2))
    naive = [np.trace(np.atleast_2d(np.cov(rows.numpy().T.astype(np.float64)))) for rows in single]
    assert variance.tolist() == pytest.approx(naive, rel=1e-4)


# Entropy, explained variance


def test_entropy_is_zero_for_a_certain_and_log_a_for_a_uniform_policy() -> None:
    mask = torch.tensor([[[True], [False]]])
    certain = torch.tensor([200.0, 0.0, 0.0]).expand(1, 2, 1, 3)
    assert pg.entropy(certain, mask).item() == pytest.approx(0, abs=1e-6)
    mixed = torch.stack([torch.zeros(3), torch.tensor([200.0, 0.0, 0.0])]).view(1, 2, 1, 3)
    assert pg.entropy(mixed, mask).item() == pytest.approx(math.log(3))  # padding does not count


def test_explained_variance() -> None:
    mask = torch.tensor([[[True], [True], [True], [False]]])
    returns = torch.tensor([1.0, 2.0, 3.0, 50.0]).view(1, 4, 1)
    assert pg.explained_variance(returns, returns, mask).item() == 1
    assert pg.explained_variance(torch.full_like(returns, 7.0), returns, mask).item() == pytest.approx(0)
    assert pg.explained_variance(-returns, returns, mask).item() == pytest.approx(-3)
    assert not math.isfinite(pg.explained_variance(returns, torch.ones_like(returns), mask).item())


# Networks, rollouts


def test_every_run_has_a_network_of_its_own_that_matches_nn_sequential() -> None:
    networks = randomize(make_agents(num_runs=2, hidden_size=5).policy)
    x = torch.randn(4, 3, 6, 4)
    result = networks(x)
    assert result.shape == (4, 3, 6, 2)
    for r in range(4):
        hidden = torch.tanh(x[r] @ networks.hidden_weight[r] + networks.hidden_bias[r])
        assert torch.allclose(result[r], hidden @ networks.out_weight[r] + networks.out_bias[r], atol=1e-5)


def test_both_variants_start_uniform_and_from_the_same_weights() -> None:
    agents = make_agents(num_runs=3)
    hidden = agents.policy.hidden_weight
    assert torch.equal(hidden[:3], hidden[3:]) and not torch.equal(hidden[0], hidden[1])
    assert (agents.policy(torch.randn(6, 5, 4)) == 0).all()


def test_each_environment_plays_exactly_one_episode_to_its_end() -> None:
    env, agents = make_env(40), make_agents(num_runs=2)
    episodes = pg.rollout(env, agents.policy, torch.Generator().manual_seed(0))
    mask = episodes.mask
    assert mask.shape[0] == 4 and mask.shape[2] == 10
    assert (mask[:, 1:] <= mask[:, :-1]).all() and mask[:, 0].all()  # once over, always over
    assert torch.equal(episodes.returns(), episodes.lengths().float())  # CartPole pays 1 per step
    assert episodes.lengths().max() == mask.shape[1]
    # the step after the last one would have left the allowed range: the dynamics of CartPole, written out
    for r, n in np.ndindex(4, 10):
        last = int(mask[r, :, n].sum()) - 1
        x, x_dot, theta, theta_dot = episodes.observations[r, last, n].tolist()
        assert abs(theta + 0.02 * theta_dot) > 12 * math.pi / 180 - 1e-4 or abs(x + 0.02 * x_dot) > 2.4 - 1e-4


def test_episodes_are_cut_by_the_time_limit_and_count_up_to_it() -> None:
    """A policy that pushes to where the pole leans and the cart drifts stands for all 500 steps."""
    agents = make_agents(num_runs=1, hidden_size=1)
    with torch.no_grad():
        agents.policy.hidden_weight[:] = torch.tensor([0.05, 0.1, 1.0, 0.5]).view(1, 4, 1)
        agents.policy.out_weight[:] = torch.tensor([-1.0, 1.0]).view(1, 1, 2)
    episodes = pg.rollout(make_env(6), agents.policy, torch.Generator(), greedy=True)
    assert episodes.mask.shape[1] == 500 and (episodes.returns() == 500).all()


def test_greedy_takes_the_most_likely_action_and_sampling_follows_the_policy() -> None:
    logits = torch.tensor([0.0, math.log(3.0)]).expand(1, 4000, 2)
    assert (pg.choose(logits, torch.Generator(), greedy=True) == 1).all()
    share = pg.choose(logits, torch.Generator().manual_seed(0), greedy=False).float().mean().item()
    assert share == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 4000))


class Corridor(gymnasium.Env):
    """Actions are numbered from 5; the time limit ends an episode after four steps."""

    observation_space = Box(-1, 1, (2,), dtype=np.float64)
    action_space = Discrete(3, start=5)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        return np.zeros(2), float(action), False, False, {}


@pytest.fixture
def corridor() -> Any:
    """`Corridor` with and without a time limit, registered for one test."""
    gymnasium.register("Corridor-v0", Corridor, max_episode_steps=4)
    gymnasium.register("Endless-v0", Corridor)
    yield
    for name in ("Corridor-v0", "Endless-v0"):
        del gymnasium.registry[name]


def test_actions_that_do_not_begin_at_zero(corridor: None) -> None:
    agents = pg.Agents(pg.Args(env_id="Corridor-v0", num_runs=1), 2, 3, 4, seed=0)
    episodes = pg.rollout(make_env(4, env_id="Corridor-v0"), agents.policy, torch.Generator(), greedy=True)
    assert (episodes.returns() == 4 * 5).all() and episodes.mask.all()


# Updates


def test_the_first_update_is_the_same_in_both_variants_for_the_same_episodes() -> None:
    """The baseline starts at 0, so the two differ only from the second update on."""
    agents, episodes = make_agents(num_runs=1, learning_rate=0.1), random_episodes(n_runs=1)
    twice = pg.Episodes(*(torch.cat([x, x]) for x in vars(episodes).values()))
    agents.update(twice)
    weights = agents.policy.out_weight.detach().clone()
    assert torch.equal(weights[0], weights[1]) and weights.abs().max() > 0
    agents.update(twice)
    assert not torch.allclose(agents.policy.out_weight[0], agents.policy.out_weight[1])


def test_every_update_has_a_gradient_of_its_own() -> None:
    """On the same episodes, with steps too small to matter, the gradient is the same and does not pile up."""
    agents, episodes = make_agents(num_runs=1, learning_rate=1e-12, value_learning_rate=1e-12), random_episodes()
    gradients = []
    for _ in range(2):
        agents.update(episodes)
        networks = (agents.policy, agents.value)
        gradients.append(torch.cat([p.grad.flatten() for net in networks for p in net.parameters()]))
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


def test_the_learning_rate_of_the_policy_falls_linearly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Log:
        rows: ClassVar[list[dict[str, Any]]] = []

        def log(self, row: dict[str, Any]) -> None:
            self.rows.append(row)

    agents, seen = make_agents(num_runs=1, num_iterations=4, learning_rate=0.1), []
    update = agents.update
    monkeypatch.setattr(pg, "rollout", lambda *arguments: random_episodes())
    monkeypatch.setattr(
        agents, "update", lambda e: (seen.append(agents.policy_optimizer.param_groups[0]["lr"]), update(e))[1]
    )
    curves = pg.train(agents.args, agents, None, None, Log())
    assert seen == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert curves["return"].shape == (4, 2) and curves["value_loss"].shape == (4, 1)
    assert Log.rows[-1]["step"] == 4 * 8
    assert Log.rows[-1]["return"] == pytest.approx(curves["return"][-1, 0].item())
    assert Log.rows[-1]["no_baseline/return"] == pytest.approx(curves["return"][-1, 1].item())


def test_runs_do_not_influence_each_other() -> None:
    """Other episodes in run 1 leave run 0 as it was."""
    results = []
    for seed in (1, 2):
        agents = make_agents(num_runs=2)
        a, b = random_episodes(n_runs=4), random_episodes(n_runs=4, seed=seed)
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
            x[1] = y[1]
        for _ in range(3):
            agents.update(a)
        results.append((agents.policy.out_weight.detach(), agents.value.out_weight.detach()))
    (policy, value), (policy_2, value_2) = results
    assert torch.equal(policy[0], policy_2[0]) and torch.equal(value[0], value_2[0])
    assert not torch.equal(policy[1], policy_2[1]) and not torch.equal(value[1], value_2[1])


def test_an_update_makes_the_better_action_more_likely() -> None:
    agents, episodes = make_agents(num_runs=1), random_episodes(n_runs=2, n_episodes=64, n_steps=1)
    episodes.rewards = (episodes.actions == 1).float() * 3 - 5  # even though every reward is negative
    for _ in range(20):
        agents.update(episodes)
    right = agents.policy(episodes.observations).softmax(-1)[0, ..., 1]
    assert right.mean() > 0.6


def test_the_baseline_fits_returns_and_sees_the_time() -> None:
    agents = make_agents(num_runs=1, value_steps=300)
    episodes = random_episodes(n_runs=2, n_steps=200)
    episodes.observations[:] = 0  # nothing but the time tells anything
    episodes.mask[:] = True
    returns = torch.linspace(90, 10, 200).view(1, -1, 1).expand(1, 200, 3)
    first = agents.fit_values(episodes, returns)
    assert first.item() == pytest.approx((returns**2).mean().item())
    assert pg.explained_variance(agents.values(episodes), returns, episodes.mask[:1]).item() > 0.95


def test_the_baseline_ignores_padding() -> None:
    """Whatever stands in the padding, the fit comes out the same."""
    results = []
    for garbage in (0.0, 1e3):
        agents, episodes = make_agents(num_runs=1), random_episodes(n_runs=2)
        episodes.observations[~episodes.mask] = garbage
        agents.fit_values(episodes, pg.rewards_to_go(episodes.rewards, 0.9)[:1])
        results.append(agents.value.out_weight.detach())
    assert torch.equal(*results)


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"env_id": "CartPoll-v1"}, r"--env_id CartPoll-v1: .*Did you mean: `CartPole`"),
        ({"env_id": "CartPole-v9"}, r"--env_id CartPole-v9: .*version"),
        ({"env_id": "no_such_module:Foo-v0"}, r"--env_id no_such_module:Foo-v0: .*No module named 'no_such_module'"),
        ({"env_id": "Pendulum-v1"}, r"--env_id Pendulum-v1: its actions are Box.* needs Discrete"),
        ({"env_id": "Taxi-v4"}, r"--env_id Taxi-v4: its observations are Discrete\(500\).* needs a Box of one"),
        ({"env_id": "Blackjack-v1"}, r"--env_id Blackjack-v1: its observations are Tuple"),
        ({"gamma": 1.0}, r"--gamma 1.0: a discount lies in \[0, 1\)"),
        ({"gamma": -0.1}, r"--gamma -0.1"),
        ({"gamma": math.nan}, r"--gamma nan"),
        ({"learning_rate": 0.0}, r"--learning_rate 0.0: .* greater than 0"),
        ({"learning_rate": math.inf}, r"--learning_rate inf"),
        ({"value_learning_rate": math.nan}, r"--value_learning_rate nan"),
        ({"hidden_size": 0}, r"--hidden_size 0: at least 1"),
        ({"num_runs": 0}, r"--num_runs 0: at least 1"),
        ({"num_iterations": -3}, r"--num_iterations -3: at least 1"),
        ({"value_steps": 0}, r"--value_steps 0: at least 1"),
        ({"eval_episodes": 0}, r"--eval_episodes 0: at least 1"),
        ({"num_episodes": 1}, r"--num_episodes 1: at least 2"),
        ({"target_return": math.nan}, r"--target_return nan: a finite number"),
        ({"seed": -1}, r"--seed -1"),
    ],
)
def test_a_bad_option_is_one_clear_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pg.Args(**options)
    assert len(caught.value.problems) == 1
    assert re.search(words, caught.value.problems[0])


def test_images_are_refused(monkeypatch: pytest.MonkeyPatch, corridor: None) -> None:
    monkeypatch.setattr(Corridor, "observation_space", Box(0, 255, (8, 8, 3), dtype=np.uint8))
    (problem,) = lesson.environment_problems("Corridor-v0", time_limit=True)
    assert "Box(0, 255, (8, 8, 3), uint8), and this lesson needs a Box of one dimension" in problem


def test_an_environment_without_a_time_limit_is_refused(corridor: None) -> None:
    assert lesson.environment_problems("Corridor-v0", time_limit=True) == []
    (problem,) = lesson.environment_problems("Endless-v0", time_limit=True)
    assert "no time limit" in problem


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        pg.Args(env_id="Pendulum-v1", gamma=2.0, num_runs=0, learning_rate=-1.0)
    assert len(caught.value.problems) == 4


# Checks: each fails when what it watches is broken


def statuses(checks: list[Any]) -> dict[str, bool | None]:
    return {check.id.partition(".")[2]: check.passed for check in checks}


def test_the_theorem_checks_pass() -> None:
    assert set(statuses(pg.theorem_checks()).values()) == {True}


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("policy_loss", lambda logprobs, weights, mask: (logprobs * weights * mask).sum(1).mean(1)),  # sign
        ("policy_loss", lambda logprobs, weights, mask: -(logprobs * weights).sum(1).mean(1)),  # no mask
        ("policy_loss", lambda logprobs, weights, mask: -(logprobs * weights * mask).mean((1, 2))),  # mean over steps
        ("rewards_to_go", lambda rewards, gamma: rewards),  # no future
        ("rewards_to_go", lambda rewards, gamma: rewards.flip(1).cumsum(1).flip(1) - rewards),  # off by one
        ("rewards_to_go", lambda rewards, gamma: rewards.cumsum(1)),  # the past instead of the future
        ("log_probabilities", lambda logits, actions: logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1)),
    ],
)
def test_the_theorem_checks_notice(monkeypatch: pytest.MonkeyPatch, name: str, broken: Any) -> None:
    monkeypatch.setattr(pg, name, broken)
    assert False in statuses(pg.theorem_checks()).values()


def test_the_check_of_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = random_episodes()
    assert pg.returns_check(episodes, 0.9).passed
    correct = pg.rewards_to_go
    monkeypatch.setattr(pg, "rewards_to_go", lambda rewards, gamma: correct(rewards, 0.95 * gamma))
    assert not pg.returns_check(episodes, 0.9).passed


def fake_curves(n: int = 2, iterations: int = 8) -> dict[str, torch.Tensor]:
    rising = torch.linspace(0, 0.7, iterations)[:, None]
    return {
        "return": 20 + 400 * rising.repeat(1, 2 * n),
        "entropy": math.log(2) - rising.repeat(1, 2 * n) / 2,
        "explained_variance": rising.repeat(1, n),
        "gradient_variance": torch.full((iterations, n), 2.0),
        "gradient_variance_without": torch.full((iterations, n), 8.0),
    }


def test_the_entropy_check() -> None:
    assert pg.entropy_check(fake_curves(), 2).passed
    for where, value in ((0, 0.5), (3, -0.1), (3, 0.8)):
        curves = fake_curves()
        curves["entropy"][where] = value
        assert not pg.entropy_check(curves, 2).passed


def test_the_learning_checks() -> None:
    args = pg.Args(num_runs=2, num_iterations=8)  # CartPole-v1 is solved at 475
    before, after = torch.full((4,), 9.0), torch.tensor([480.0, 500.0, 100.0, 100.0])

    def passed(curves: dict[str, torch.Tensor], after: torch.Tensor, args: Any = args) -> list[bool | None]:
        return list(statuses(pg.learning_checks(args, curves, before, after)).values())

    assert passed(fake_curves(), after) == [True, True, True]
    assert passed(fake_curves(), torch.tensor([470.0, 500.0, 500.0, 500.0]))[0] is False
    assert passed(fake_curves(), after, pg.Args(num_runs=2, num_iterations=8, target_return=490.0))[0] is False
    curves = fake_curves()
    curves["gradient_variance"][-2:, 1] = 9.0
    assert passed(curves, after)[1] is False
    for flat in (fake_curves()["explained_variance"] * 0, fake_curves()["explained_variance"] * -1):
        assert passed({**fake_curves(), "explained_variance": flat}, after)[2] is False


def test_a_return_without_known_target_is_not_judged(corridor: None) -> None:
    args = pg.Args(env_id="Corridor-v0", num_runs=2, num_iterations=8)
    check = pg.learning_checks(args, fake_curves(), torch.zeros(4), torch.ones(4))[0]
    assert check.passed is None and check.expected == "no target is known"


# Pictures


def test_the_curves_show_what_was_measured() -> None:
    args, curves = pg.Args(num_runs=2, num_iterations=8, num_episodes=5), fake_curves()
    figure = pg.curves_figure(args, curves, 2)
    axes = figure.axes
    assert len(axes) == 4
    line = next(line for line in axes[0].lines if line.get_label() == "with baseline")
    assert list(line.get_xdata()) == [5 * k for k in range(1, 9)]
    assert np.allclose(line.get_ydata(), curves["return"][:, :2].mean(1))
    assert any(list(line.get_ydata()) == [475, 475] for line in axes[0].lines)
    assert axes[1].get_yscale() == "log"
    assert lesson.png(figure).startswith(b"\x89PNG")


def test_the_policy_plane_shows_the_probability_of_pushing_right() -> None:
    agents = make_agents(num_runs=1, hidden_size=1)
    episodes = random_episodes()
    after = make_agents(num_runs=1, hidden_size=1).policy
    with torch.no_grad():
        after.hidden_weight[:] = torch.tensor([0.0, 0.0, 1.0, 0.0]).view(1, 4, 1)
        after.out_weight[:] = torch.tensor([-1.0, 1.0]).view(1, 1, 2)
    figure = pg.policy_figure(agents.policy, after, episodes, episodes)
    before_mesh, after_mesh = (axis.collections[0].get_array() for axis in figure.axes[:2])
    assert np.allclose(before_mesh, 0.5)
    after_mesh = np.asarray(after_mesh).reshape(121, 121)
    assert after_mesh[0, 0] == pytest.approx(1 / (1 + math.exp(2 * math.tanh(0.21))), abs=1e-5)  # leans left
    assert np.allclose(after_mesh, after_mesh[:1])  # the velocity, on the vertical axis, has no weight
    lesson.png(figure)


# Whole runs

SHORT = (
    "--num_runs",
    "2",
    "--num_iterations",
    "3",
    "--num_episodes",
    "2",
    "--eval_episodes",
    "3",
    "--hidden_size",
    "4",
)


def short_run(folder: Path, *options: str) -> dict[str, Any]:
    cli.main(["--module", "policy_gradient", "--output_dir", str(folder), *SHORT, *options])
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_run_leaves_its_evidence(tmp_path: Path) -> None:
    summary = short_run(tmp_path / "a")
    assert summary["status"] == "ok" and summary["eval"] is None and summary["model"] is None
    for name in ("training_curves.png", "policy_before_after.png", "policy.safetensors", "results.json"):
        assert name in summary["artifacts"]
    invariants = {check["id"]: check["status"] for check in summary["checks"][:4]}
    assert set(invariants.values()) == {"pass"}
    assert {"return", "episode_length", "policy_loss", "value_loss", "entropy", "eval_return"} <= set(
        summary["metrics"]
    )
    rows = [json.loads(line) for line in (tmp_path / "a" / "log_history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 6]
    assert rows[1]["return"] == rows[1]["episode_length"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lesson, "png", lambda figure: b"")
    for name in ("curves_figure", "policy_figure"):
        monkeypatch.setattr(pg, name, lambda *arguments: None)
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        short_run(tmp_path / name, "--seed", seed)
    logs = [(tmp_path / name / "log_history.jsonl").read_text() for name in "abc"]
    assert logs[0] == logs[1] != logs[2]


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "MountainCar-v0"])
@pytest.mark.slow
def test_other_environments_run(env_id: str, tmp_path: Path) -> None:
    summary = short_run(tmp_path / "a", "--env_id", env_id, "--num_iterations", "1", "--num_runs", "1")
    assert summary["status"] == "ok"
    assert "policy_before_after.png" not in summary["artifacts"]
    assert summary["metrics"]["eval_return"]["first"] < 0


def test_the_saved_policy_loads_into_plain_torch(tmp_path: Path) -> None:
    from safetensors import safe_open

    policy = randomize(make_agents(num_runs=2, hidden_size=6).policy)
    (tmp_path / "policy.safetensors").write_bytes(pg.policy_file(pg.Args(hidden_size=6), policy, 321.5))
    with safe_open(tmp_path / "policy.safetensors", "pt") as file:
        facts, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    plain = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    plain.load_state_dict(tensors)
    x = torch.randn(5, 4)
    assert torch.allclose(plain(x), policy(x.expand(4, 5, 4))[0], atol=1e-6)
    assert facts["env_id"] == "CartPole-v1" and facts["eval_return"] == "321.5" and facts["seed"] == "42"
