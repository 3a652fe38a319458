"""The lesson `actor_critic`: its parts against closed forms, counting and naive loops, and its options."""

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
from gymnasium.vector import AutoresetMode

from llmcore_hf import cli, lesson
from llmcore_hf.errors import ConfigError, UserError

ac = lesson.load("actor_critic").file
pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(**options: Any) -> Any:
    return ac.ActorCritic(ac.Args(**options), n_observations=4, n_actions=2, seed=0)


def randomize(networks: Any, seed: int = 0) -> Any:
    """Weights that are nowhere 0, so that nothing is right by symmetry."""
    generator = torch.Generator().manual_seed(seed)
    for weight in networks.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.5
    return networks


def random_rollout(n_runs: int = 2, n_steps: int = 9, n_envs: int = 5, seed: int = 0) -> Any:
    """Steps with ends of both kinds; the step after an end only resets, as in Gymnasium."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_runs, n_steps, n_envs)
    terminated, truncated, mask = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    for r, e in np.ndindex(n_runs, n_envs):
        ended = False
        for t in range(n_steps):
            mask[r, t, e] = not ended
            kind = torch.rand((), generator=generator).item()
            terminated[r, t, e], truncated[r, t, e] = not ended and kind < 0.15, not ended and 0.15 <= kind < 0.3
            ended = bool(terminated[r, t, e] or truncated[r, t, e])
    return ac.Rollout(
        observations=torch.randn(n_runs, n_steps + 1, n_envs, 4, generator=generator),
        actions=torch.randint(0, 2, shape, generator=generator),
        rewards=torch.randn(shape, generator=generator) * mask,
        terminated=terminated,
        truncated=truncated,
        mask=mask,
    )


# Advantages


def naive_advantage(rollout: Any, values: Any, r: int, t: int, e: int, gamma: float, lam: float, cut: bool) -> float:
    """Sum of (gamma lambda)^k delta_{t+k} up to the end of the episode, by the definition."""
    total, k = 0.0, t
    while k < rollout.rewards.shape[1]:
        nothing = rollout.terminated[r, k, e] or (cut and rollout.truncated[r, k, e])
        following = 0.0 if nothing else values[r, k + 1, e].item()
        delta = rollout.rewards[r, k, e].item() + gamma * following - values[r, k, e].item()
        total += (gamma * lam) ** (k - t) * delta
        if rollout.terminated[r, k, e] or rollout.truncated[r, k, e]:
            break
        k += 1
    return total


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_advantages_match_a_naive_loop_in_both_ways(gae_lambda: float) -> None:
    rollout = random_rollout()
    values = torch.randn(2, 10, 5, dtype=torch.float64)
    terminal = ac.nothing_follows(rollout, n_bootstrap=1)
    ended = rollout.terminated | rollout.truncated
    assert rollout.truncated.any() and rollout.terminated.any()
    result = ac.estimate_advantages(rollout.rewards.double(), values, terminal, ended, 0.9, gae_lambda)
    for r, t, e in np.ndindex(*result.shape):
        if rollout.mask[r, t, e]:
            expected = naive_advantage(rollout, values, r, t, e, 0.9, gae_lambda, cut=r == 1)
            assert result[r, t, e].item() == pytest.approx(expected, abs=1e-12)


def test_a_pole_that_never_falls_is_worth_the_geometric_sum() -> None:
    """V = 1 / (1 - gamma) is right with bootstrap: every advantage is 0, also where the time limit strikes."""
    ones = torch.ones(2, 6, 1, dtype=torch.float64)
    values = torch.full((2, 7, 1), 100.0, dtype=torch.float64)
    rollout = random_rollout(n_steps=6, n_envs=1)
    rollout.terminated[:], rollout.truncated[:] = False, False
    rollout.truncated[:, 3] = True
    terminal = ac.nothing_follows(rollout, n_bootstrap=1)
    advantages = ac.estimate_advantages(ones, values, terminal, rollout.truncated, 0.99, 1.0)[:, :, 0]
    assert advantages[0].tolist() == pytest.approx([0] * 6, abs=1e-10)
    assert advantages[1].tolist() == pytest.approx([-99 * 0.99**3, -99 * 0.99**2, -99 * 0.99, -99, 0, 0])


def test_what_nothing_follows() -> None:
    rollout = random_rollout()
    terminal = ac.nothing_follows(rollout, n_bootstrap=1)
    assert torch.equal(terminal[0], rollout.terminated[0])
    assert torch.equal(terminal[1], rollout.terminated[1] | rollout.truncated[1])
    assert not (rollout.terminated & rollout.truncated).any()  # the rollout itself was not changed


# The gradient


def test_the_tiny_world_is_counted_out_completely() -> None:
    rollout = ac.tiny_rollout()
    lengths, totals = rollout.mask.sum(1).squeeze(1), rollout.rewards.sum((1, 2))
    # four sequences leave at once; two change and leave; one changes, comes back and leaves, one is cut by the limit
    assert sorted(zip(lengths.tolist(), totals.tolist(), strict=True)) == [
        *[(1, 1.0)] * 4,
        *[(2, -1.0)] * 2,
        (3, 2.0),
        (3, 3.0),
    ]
    assert rollout.truncated.sum() == 1 and rollout.terminated.sum() == 7
    assert (rollout.observations[rollout.observations == 2].numel()) == 3 * 4 + 2 * 2 + 1


def test_the_theorem_holds_by_counting_and_needs_the_bootstrap() -> None:
    """J written out and differentiated by hand; without bootstrap the gradient is another one."""
    theta = torch.tensor([[0.1, 0.9], [-0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    x, y = theta.softmax(-1)[:2, 0].tolist()  # probability of action 0 in state 0 and 1
    # After three changes the state is 1, which is then worth -3:
    # J(x, y) = x + (1 - x) [ (1 - y)(-1) + y (2 + x * 1 + (1 - x)(0 - 3)) ] = x + (1 - x)(y - 1 + y (4 x - 1))
    dx = 1 - (y - 1 + y * (4 * x - 1)) + (1 - x) * 4 * y
    dy = (1 - x) * (1 + 4 * x - 1)
    expected = [dx * x * (1 - x), -dx * x * (1 - x), dy * y * (1 - y), -dy * y * (1 - y), 0, 0]
    for gae_lambda in (0.0, 0.3, 1.0):
        differences, gradient = ac.exact_gradients(theta, gae_lambda, n_bootstrap=8)
        assert differences.flatten().tolist() == pytest.approx(expected, abs=1e-8)
        assert gradient.flatten().tolist() == pytest.approx(expected, abs=1e-12)
        _, cut = ac.exact_gradients(theta, gae_lambda, n_bootstrap=0)
        assert (cut.flatten() - torch.tensor(expected)).abs().max() > 0.05


def test_the_gradient_matches_finite_differences_of_the_surrogate() -> None:
    """Advantages and targets are constants; policy, value and entropy terms are differentiated together."""
    args = ac.Args(num_runs=1, hidden_size=3, gamma=0.9, value_coef=0.7, entropy_coef=0.3, max_grad_norm=1e9)
    model, rollout = randomize(ac.ActorCritic(args, 4, 2, seed=0)).double(), random_rollout()
    rollout.observations, rollout.rewards = rollout.observations.double(), rollout.rewards.double()
    ended, terminal = rollout.terminated | rollout.truncated, ac.nothing_follows(rollout, 1)
    old = model(rollout.observations)[1].detach()
    advantages = ac.estimate_advantages(rollout.rewards, old, terminal, ended, 0.9, args.gae_lambda)
    targets = advantages + old[:, :-1]

    def surrogate() -> float:
        logits, values = model(rollout.observations[:, :-1])
        logprobs, total = logits.log_softmax(-1), 0.0
        for r in range(2):
            terms = [
                -logprobs[r, t, e, rollout.actions[r, t, e]] * advantages[r, t, e]
                + 0.7 * ((values[r, t, e] - targets[r, t, e]) * (1 - 0.9)) ** 2
                + 0.3 * (logprobs[r, t, e].exp() * logprobs[r, t, e]).sum()
                for t, e in np.ndindex(9, 5)
                if rollout.mask[r, t, e]
            ]
            total += (sum(terms) / len(terms)).item()
        return total

    ac.update(model, torch.optim.SGD(model.parameters(), lr=0.0), rollout, args)
    for parameter in model.parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in (0, len(flat) // 2, len(flat) - 1):
            value = flat[i].item()
            flat[i] = value + 1e-6
            up = surrogate()
            flat[i] = value - 1e-6
            down = surrogate()
            flat[i] = value
            assert gradient[i].item() == pytest.approx((up - down) / 2e-6, abs=1e-7)


def test_each_run_is_clipped_by_its_own_norm() -> None:
    model = randomize(make_model(num_runs=1, hidden_size=3))
    scale = torch.tensor([0.01, 100.0])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * scale.view(-1, *[1] * (parameter.dim() - 1))
    norms = ac.clip_each_run(model, 2.0)
    n_weights = sum(parameter[0].numel() for parameter in model.parameters())
    assert norms.tolist() == pytest.approx([0.01 * math.sqrt(n_weights), 100 * math.sqrt(n_weights)])
    after = torch.stack([p.grad.flatten(1).square().sum(1) for p in model.parameters()]).sum(0).sqrt()
    assert after.tolist() == pytest.approx([0.01 * math.sqrt(n_weights), 2.0], rel=1e-5)


def test_the_step_that_only_resets_teaches_nothing() -> None:
    """Whatever action and reward stand there, the update is the same."""
    results = []
    for garbage in (0, 1):
        args = ac.Args(num_runs=1)
        model, rollout = ac.ActorCritic(args, 4, 2, seed=0), random_rollout()
        rollout.actions[~rollout.mask] = garbage
        rollout.rewards[~rollout.mask] = 50.0 * garbage
        ac.update(model, torch.optim.Adam(model.parameters(), lr=0.1), rollout, args)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_learning_rate_falls_linearly_and_rows_are_means_over_their_updates(monkeypatch) -> None:
    class Log:
        rows: ClassVar[list[dict[str, Any]]] = []

        def log(self, row: dict[str, Any]) -> None:
            self.rows.append(row)

    seen = []

    def update(model: Any, optimizer: Any, rollout: Any, args: Any) -> dict[str, torch.Tensor]:
        seen.append(optimizer.param_groups[0]["lr"])
        return {"value": torch.tensor([float(len(seen)), 0.0])}

    monkeypatch.setattr(ac, "update", update)
    monkeypatch.setattr(ac, "N_ROWS", 2)
    args = ac.Args(num_runs=1, num_envs=2, num_steps=3, total_timesteps=4 * 6 + 5, learning_rate=0.1)
    player = ac.Player(ac.make_envs("CartPole-v1", 4, seed=0), 2, torch.Generator().manual_seed(0))
    curves = ac.train(args, ac.ActorCritic(args, 4, 2, 0), player, Log())
    assert seen == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert curves["step"].tolist() == [12, 24] and curves["value"].tolist() == [[1.5, 0], [3.5, 0]]
    assert [row["value"] for row in Log.rows] == [1.5, 3.5]
    assert math.isnan(Log.rows[0]["return"])  # no episode ends within six steps


def test_runs_do_not_influence_each_other() -> None:
    results = []
    for seed in (1, 2):
        args = ac.Args(num_runs=2)
        model, rollout, other = ac.ActorCritic(args, 4, 2, 0), random_rollout(n_runs=4), random_rollout(4, seed=seed)
        for x, y in zip(vars(rollout).values(), vars(other).values(), strict=True):
            x[1] = y[1]
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(3):
            ac.update(model, optimizer, rollout, args)
        results.append(model.actor.out_weight.detach())
    assert torch.equal(results[0][0], results[1][0]) and not torch.equal(results[0][1], results[1][1])


def test_the_entropy_coefficient_keeps_the_policy_uniform() -> None:
    entropies = []
    for coefficient in (0.0, 100.0):
        args = ac.Args(num_runs=1, entropy_coef=coefficient, max_grad_norm=100.0)
        model, rollout = ac.ActorCritic(args, 4, 2, 0), random_rollout()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(60):
            measured = ac.update(model, optimizer, rollout, args)
        entropies.append(measured["entropy"][0].item())
    assert entropies[0] < 0.5 and entropies[1] > 0.68


def test_a_critic_learns_the_value_of_a_pole_that_never_falls() -> None:
    """From V = 0 to 1 / (1 - gamma), through its own bootstrap at the time limit; without it, it stays below."""
    args = ac.Args(num_runs=1, gamma=0.9, num_steps=5, learning_rate=0.03)
    model, rollout = ac.ActorCritic(args, 4, 2, 0), random_rollout(n_steps=5)
    rollout.observations[:], rollout.rewards[:], rollout.mask[:] = 0.5, 1.0, True
    rollout.terminated[:], rollout.truncated[:] = False, False
    rollout.truncated[:, 2] = True
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    for _ in range(400):
        measured = ac.update(model, optimizer, rollout, args)
    # Without bootstrap: v = mean of the targets, 1, 1 + g, 1 + g + g^2 up to the limit, and 1 + g v, 1 + g + g^2 v
    # after it, of a constant v: 5 v = 1 + 1.9 + 2.71 + (1.9 + .81 v) + (1 + .9 v).
    assert measured["value"].tolist() == pytest.approx([10.0, 8.51 / (5 - 0.81 - 0.9)], rel=0.02)


# Entropy, explained variance, networks


def test_entropy_is_zero_for_a_certain_and_log_a_for_a_uniform_policy() -> None:
    mask = torch.tensor([[[True], [False]]])
    certain = torch.tensor([200.0, 0.0, 0.0]).expand(1, 2, 1, 3)
    assert ac.entropy(certain, mask).item() == pytest.approx(0, abs=1e-6)
    mixed = torch.stack([torch.zeros(3), torch.tensor([200.0, 0.0, 0.0])]).view(1, 2, 1, 3)
    assert ac.entropy(mixed, mask).item() == pytest.approx(math.log(3))


def test_explained_variance() -> None:
    mask = torch.tensor([[[True], [True], [True], [False]]])
    returns = torch.tensor([1.0, 2.0, 3.0, 50.0]).view(1, 4, 1)
    assert ac.explained_variance(returns, returns, mask).item() == 1
    assert ac.explained_variance(torch.full_like(returns, 7.0), returns, mask).item() == pytest.approx(0)
    assert ac.explained_variance(-returns, returns, mask).item() == pytest.approx(-3)


@pytest.mark.parametrize("shared", [False, True])
def test_actor_and_critic_start_uniform_at_zero_and_equal_in_both_ways(shared: bool) -> None:
    model = make_model(num_runs=3, shared_network=shared)
    x = torch.randn(6, 5, 2, 4)
    logits, values = model(x)
    assert logits.shape == (6, 5, 2, 2) and values.shape == (6, 5, 2)
    assert (logits == 0).all() and (values == 0).all()
    assert (model.critic is None) == shared
    for parameter in model.parameters():
        assert torch.equal(parameter[:3], parameter[3:])
    assert not torch.equal(model.actor.hidden_weight[0], model.actor.hidden_weight[1])


def test_the_networks_match_plain_matrix_products() -> None:
    model = randomize(make_model(num_runs=1, hidden_size=5, gamma=0.9))
    x = torch.randn(2, 3, 6, 4)
    logits, values = model(x)
    for r in range(2):
        for net, result in ((model.actor, logits[r]), (model.critic, values[r].unsqueeze(-1) / 10)):
            hidden = torch.tanh(x[r] @ net.hidden_weight[r] + net.hidden_bias[r])
            assert torch.allclose(result, hidden @ net.out_weight[r] + net.out_bias[r], atol=1e-5)


# Playing


def test_a_rollout_follows_the_environments_and_their_resets() -> None:
    """Replay the actions in environments of the same seed: every observation, and what the mask leaves out."""
    model, env = make_model(num_runs=2), ac.make_envs("CartPole-v1", 20, seed=3)
    player = ac.Player(env, 4, torch.Generator().manual_seed(0))
    first, second = player.collect(model, 40), player.collect(model, 30)
    twin = ac.make_envs("CartPole-v1", 20, seed=3)
    observation, _ = twin.reset()
    ended = np.zeros(20, dtype=bool)
    for rollout in (first, second):
        for t in range(rollout.actions.shape[1]):
            assert np.allclose(rollout.observations[:, t].flatten(0, 1), observation)
            assert np.array_equal(rollout.mask[:, t].flatten(), ~ended)
            observation, reward, terminated, truncated, _ = twin.step(rollout.actions[:, t].flatten().numpy())
            ended = terminated | truncated
            assert np.array_equal(rollout.rewards[:, t].flatten(), reward)
            assert np.array_equal(rollout.terminated[:, t].flatten(), terminated)
            assert np.array_equal(rollout.truncated[:, t].flatten(), truncated)
    assert torch.equal(first.observations[:, -1], second.observations[:, 0])
    assert first.terminated.any() and (first.rewards[~first.mask] == 0).all()


def test_finished_episodes_are_counted_once() -> None:
    model, env = make_model(num_runs=1), ac.make_envs("CartPole-v1", 6, seed=0)
    player = ac.Player(env, 2, torch.Generator().manual_seed(0))
    rollouts = [player.collect(model, 50) for _ in range(2)]
    mask, ended = torch.cat([r.mask for r in rollouts], 1), torch.cat([r.terminated for r in rollouts], 1)
    lengths: list[list[int]] = [[], []]
    for r, e in np.ndindex(2, 3):
        length = 0
        for t in range(100):
            length += int(mask[r, t, e])
            if ended[r, t, e]:
                lengths[r].append(length)
                length = 0
    returns, counted = player.take_finished()
    assert counted.tolist() == pytest.approx([np.mean(row) for row in lengths])
    assert torch.equal(returns, counted)  # CartPole pays 1 per step
    assert player.take_finished().isnan().all()


def balancing(model: Any) -> Any:
    """Weights that push to where the pole leans and the cart drifts, in every run."""
    with torch.no_grad():
        model.actor.hidden_weight[:] = torch.tensor([0.05, 0.1, 1.0, 0.5]).view(1, 4, 1)
        model.actor.out_weight[:] = 10 * torch.tensor([-1.0, 1.0]).view(1, 1, 2)
    return model


def test_play_counts_whole_episodes() -> None:
    model = balancing(make_model(num_runs=1, hidden_size=1))
    returns, observations, mask = ac.play(ac.make_envs("CartPole-v1", 6, seed=0), model, torch.Generator(), greedy=True)
    assert (returns == 500).all() and observations.shape == (2, 500, 3, 4) and mask.all()
    untrained = make_model(num_runs=1)
    env = ac.make_envs("CartPole-v1", 6, seed=0)
    returns, _, mask = ac.play(env, untrained, torch.Generator().manual_seed(0), greedy=False, gamma=0.9)
    lengths = mask.sum(1)
    assert torch.allclose(returns, (1 - 0.9**lengths) / 0.1, atol=1e-4) and lengths.min() < lengths.max()


def test_the_true_value_goes_beyond_the_time_limit() -> None:
    """A pole that never falls: 100 (1 - gamma^688), far more than what 10 steps could give."""
    args = ac.Args(num_runs=1, hidden_size=1, eval_episodes=2)
    model = balancing(ac.ActorCritic(args, 4, 2, seed=0))
    with torch.no_grad():
        model.actor.out_weight *= 100  # as good as greedy
        model.critic.out_bias[:] = 0.5
    worth = ac.value_errors(args, model, torch.Generator().manual_seed(0), seed=1)
    assert math.ceil(math.log(1e-3) / math.log(0.99)) == 688
    assert worth["true"].tolist() == pytest.approx([100 * (1 - 0.99**688)] * 2, rel=1e-4)
    assert worth["critic"].tolist() == pytest.approx([50.0] * 2)


def test_greedy_takes_the_most_likely_action_and_sampling_follows_the_policy() -> None:
    logits = torch.tensor([0.0, math.log(3.0)]).expand(1, 4000, 2)
    assert (ac.choose(logits, torch.Generator(), greedy=True) == 1).all()
    share = ac.choose(logits, torch.Generator().manual_seed(0), greedy=False).float().mean().item()
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
    model = ac.ActorCritic(ac.Args(env_id="Corridor-v0", num_runs=1), 2, 3, seed=0)
    env = ac.make_envs("Corridor-v0", 4, seed=0)
    assert (ac.play(env, model, torch.Generator(), greedy=True)[0] == 4 * 5).all()
    rollout = ac.Player(env, 2, torch.Generator().manual_seed(0)).collect(model, 10)
    assert rollout.truncated[:, (3, 8)].all() and rollout.truncated.sum() == 2 * 4
    assert not rollout.mask[:, (4, 9)].any() and not rollout.terminated.any()


def test_environments_that_reset_at_once_are_refused() -> None:
    kind = {"vectorization_mode": "sync", "vector_kwargs": {"autoreset_mode": AutoresetMode.SAME_STEP}}
    with pytest.raises(UserError, match="SAME_STEP, and this lesson needs NEXT_STEP"):
        ac.make_envs("CartPole-v1", 2, seed=0, **kind)


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"env_id": "CartPoll-v1"}, r"--env_id CartPoll-v1: .*Did you mean: `CartPole`"),
        ({"env_id": "no_such_module:Foo-v0"}, r"--env_id no_such_module:Foo-v0: .*No module named 'no_such_module'"),
        ({"env_id": "Pendulum-v1"}, r"--env_id Pendulum-v1: its actions are Box.* needs Discrete"),
        ({"env_id": "Taxi-v4"}, r"--env_id Taxi-v4: its observations are Discrete\(500\).* needs a Box of one"),
        ({"gamma": 1.0}, r"--gamma 1.0: a discount lies in \[0, 1\)"),
        ({"gamma": math.nan}, r"--gamma nan"),
        ({"gae_lambda": 1.1}, r"--gae_lambda 1.1: it lies in \[0, 1\]"),
        ({"gae_lambda": math.nan}, r"--gae_lambda nan"),
        ({"learning_rate": 0.0}, r"--learning_rate 0.0: .* greater than 0"),
        ({"max_grad_norm": math.inf}, r"--max_grad_norm inf"),
        ({"value_coef": -0.1}, r"--value_coef -0.1: .* at least 0"),
        ({"entropy_coef": math.nan}, r"--entropy_coef nan"),
        ({"hidden_size": 0}, r"--hidden_size 0: at least 1"),
        ({"num_runs": 0}, r"--num_runs 0: at least 1"),
        ({"num_envs": -1}, r"--num_envs -1: at least 1"),
        ({"num_steps": 0}, r"--num_steps 0: at least 1"),
        ({"eval_episodes": 0}, r"--eval_episodes 0: at least 1"),
        ({"total_timesteps": 1000}, r"--total_timesteps 1000: one update takes .* = 1024"),
        ({"target_return": math.inf}, r"--target_return inf: a finite number"),
        ({"seed": -1}, r"--seed -1"),
    ],
)
def test_a_bad_option_is_one_clear_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ac.Args(**options)
    assert len(caught.value.problems) == 1
    assert re.search(words, caught.value.problems[0])


def test_images_and_endless_environments_are_refused(monkeypatch: pytest.MonkeyPatch, corridor: None) -> None:
    assert lesson.environment_problems("Corridor-v0", time_limit=True) == []
    assert "no time limit" in lesson.environment_problems("Endless-v0", time_limit=True)[0]
    monkeypatch.setattr(Corridor, "observation_space", Box(0, 255, (8, 8, 3), dtype=np.uint8))
    assert "needs a Box of one dimension" in lesson.environment_problems("Corridor-v0", time_limit=True)[0]


# Checks: each fails when what it watches is broken


def broken_advantages(kind: str) -> Any:
    correct = ac.estimate_advantages

    def broken(rewards: Any, values: Any, terminal: Any, ended: Any, gamma: float, gae_lambda: float) -> Any:
        nowhere = torch.zeros_like(terminal)
        if kind == "bootstraps after a fall":
            return correct(rewards, values, nowhere, ended, gamma, gae_lambda)
        if kind == "time limit is an end":
            return correct(rewards, values, ended, ended, gamma, gae_lambda)
        if kind == "runs on into the next episode":
            return correct(rewards, values, terminal, nowhere, gamma, gae_lambda)
        if kind == "wrong sign":
            return -correct(rewards, values, terminal, ended, gamma, gae_lambda)
        return correct(rewards, values.roll(1, 1), terminal, ended, gamma, gae_lambda)

    return broken


KINDS = ["bootstraps after a fall", "time limit is an end", "runs on into the next episode", "wrong sign", "shifted"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_n_step_check_notices(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    rollout, values = random_rollout(), torch.randn(2, 10, 5)
    assert ac.n_step_check(rollout, values, 0.9).passed
    monkeypatch.setattr(ac, "estimate_advantages", broken_advantages(kind))
    assert not ac.n_step_check(rollout, values, 0.9).passed


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "runs on into the next episode"])
def test_the_theorem_check_notices(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert ac.theorem_check().passed
    monkeypatch.setattr(ac, "estimate_advantages", broken_advantages(kind))
    assert not ac.theorem_check().passed


@pytest.mark.parametrize(
    "broken",
    [
        lambda logprobs, advantages, mask: ac.masked_mean(logprobs * advantages, mask),
        lambda logprobs, advantages, mask: -(logprobs * advantages).mean((1, 2)),
        lambda logprobs, advantages, mask: ac.masked_mean(-logprobs.exp() * advantages, mask),
    ],
)
def test_the_theorem_check_notices_a_wrong_loss(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    monkeypatch.setattr(ac, "policy_loss", broken)
    assert not ac.theorem_check().passed


def fake_curves(n: int = 2, rows: int = 8) -> dict[str, torch.Tensor]:
    rising = torch.linspace(0, 0.7, rows)[:, None].repeat(1, 2 * n)
    return {
        "step": torch.arange(1, rows + 1) * 100,
        "return": 20 + 400 * rising,
        "value": 100 * rising,
        "value_loss": 100 - 100 * rising,
        "entropy": math.log(2) - rising / 2,
        "explained_variance": rising,
    }


WORTH = {"critic": torch.tensor([99.0, 100.0, 80.0, 85.0]), "true": torch.tensor([99.5, 99.9, 99.0, 100.0])}


def test_the_entropy_check() -> None:
    top = torch.full((4,), math.log(2))
    assert ac.entropy_check(fake_curves(), top, 2).passed
    assert not ac.entropy_check(fake_curves(), top - 0.1, 2).passed
    for value in (-0.1, 0.8):
        curves = fake_curves()
        curves["entropy"][3] = value
        assert not ac.entropy_check(curves, top, 2).passed


def test_the_learning_checks() -> None:
    before, after = torch.full((4,), 9.0), torch.tensor([480.0, 500.0, 100.0, 100.0])

    def passed(
        after: Any = after, worth: Any = WORTH, explained: float = 1.0, share_cut: float = 0.9, **options: Any
    ) -> list[bool | None]:
        curves = fake_curves()
        curves["explained_variance"] *= explained
        args = ac.Args(num_runs=2, **options)  # CartPole-v1 is solved at 475
        return [check.passed for check in ac.learning_checks(args, curves, before, after, worth, share_cut)]

    assert passed() == [True, True, True]
    assert passed(after=torch.tensor([470.0, 500.0, 500.0, 500.0]))[0] is False
    assert passed(target_return=490.0)[0] is False
    swapped = {name: values.flip(0) for name, values in WORTH.items()}
    assert passed(worth=swapped)[1] is False
    assert passed(worth=swapped, share_cut=0.4)[1] is None  # the limit is hardly ever reached
    assert passed(explained=0.0)[2] is False and passed(explained=-1.0)[2] is False


# Pictures


def test_the_curves_show_what_was_measured() -> None:
    curves = fake_curves()
    curves["return"][0] = math.nan  # no episode ended there
    curves["return"][1, 0] = math.nan
    figure = ac.curves_figure(ac.Args(num_runs=2), curves, WORTH, 2)
    axes = figure.axes
    assert len(axes) == 6
    line = next(line for line in axes[0].lines if line.get_label() == "bootstrap at the time limit")
    assert list(line.get_xdata()) == [100 * k for k in range(2, 9)]
    assert line.get_ydata()[0] == pytest.approx(curves["return"][1, 1])
    assert line.get_ydata()[1:] == pytest.approx(curves["return"][2:, :2].mean(1).numpy())
    assert any(list(line.get_ydata()) == [475, 475] for line in axes[0].lines)
    points = [collection.get_offsets().tolist() for collection in axes[2].collections]
    assert points == [[[99, 80], [100, 85]], [[99.5, 99], [pytest.approx(99.9), 100]]]
    lesson.png(figure)


def test_the_planes_show_policy_and_critic() -> None:
    before, after = make_model(num_runs=1, hidden_size=1), make_model(num_runs=1, hidden_size=1)
    with torch.no_grad():
        after.actor.hidden_weight[:] = torch.tensor([0.0, 0.0, 1.0, 0.0]).view(1, 4, 1)
        after.actor.out_weight[:] = torch.tensor([-1.0, 1.0]).view(1, 1, 2)
        after.critic.out_bias[:] = 0.7
    states = {"before": torch.randn(5, 4), "after": torch.randn(900, 4)}
    figure = ac.policy_figure(before, after, states, {"before": 9.0, "after": 480.0})
    meshes = [np.asarray(axis.collections[0].get_array()).reshape(121, 121) for axis in figure.axes[:3]]
    assert np.allclose(meshes[0], 0.5) and np.allclose(meshes[2], 70)
    assert meshes[1][0, 0] == pytest.approx(1 / (1 + math.exp(2 * math.tanh(0.21))), abs=1e-5)  # leans left
    assert np.allclose(meshes[1], meshes[1][:1])  # the velocity, on the vertical axis, has no weight
    lesson.png(figure)


# Whole runs

SHORT = [
    "--num_runs",
    "2",
    "--total_timesteps",
    "96",
    "--num_envs",
    "4",
    "--num_steps",
    "8",
    "--eval_episodes",
    "3",
    "--hidden_size",
    "4",
]


def short_run(folder: Path, *options: str) -> dict[str, Any]:
    cli.main(["--module", "actor_critic", "--output_dir", str(folder), *SHORT, *options])
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["false", "true"])
def test_a_run_leaves_its_evidence(tmp_path: Path, shared: str) -> None:
    summary = short_run(tmp_path / "a", "--shared_network", shared)
    assert summary["status"] == "ok" and summary["eval"] is None and summary["model"] is None
    for name in ("training_curves.png", "policy_before_after.png", "policy.safetensors", "results.json"):
        assert name in summary["artifacts"]
    assert {check["status"] for check in summary["checks"][:3]} == {"pass"}
    names = {"return", "episode_length", "policy_loss", "value_loss", "entropy", "explained_variance", "eval_return"}
    assert names <= set(summary["metrics"])
    rows = [json.loads(line) for line in (tmp_path / "a" / "log_history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 32, 64, 96, 96]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lesson, "png", lambda figure: b"")
    for name in ("curves_figure", "policy_figure"):
        monkeypatch.setattr(ac, name, lambda *arguments: None)
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        short_run(tmp_path / name, "--seed", seed)
    logs = [(tmp_path / name / "log_history.jsonl").read_text() for name in "abc"]
    assert logs[0] == logs[1] != logs[2]


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "MountainCar-v0"])
@pytest.mark.slow
def test_other_environments_run(env_id: str, tmp_path: Path) -> None:
    summary = short_run(tmp_path / "a", "--env_id", env_id, "--num_runs", "1")
    assert summary["status"] == "ok"
    assert "policy_before_after.png" not in summary["artifacts"]
    assert summary["metrics"]["eval_return"]["first"] < 0


@pytest.mark.parametrize("shared", [False, True])
def test_the_saved_policy_loads_into_plain_torch(tmp_path: Path, shared: bool) -> None:
    from safetensors import safe_open

    args = ac.Args(hidden_size=6, num_runs=2, shared_network=shared)
    model = randomize(ac.ActorCritic(args, 4, 2, seed=0))
    (tmp_path / "policy.safetensors").write_bytes(ac.policy_file(args, model, 2, 321.5))
    with safe_open(tmp_path / "policy.safetensors", "pt") as file:
        facts, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    plain = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    plain.load_state_dict(tensors)
    x = torch.randn(5, 4)
    assert torch.allclose(plain(x), model(x.expand(4, 5, 4))[0][0], atol=1e-6)
    assert facts["env_id"] == "CartPole-v1" and facts["eval_return"] == "321.5" and facts["lesson"] == "actor_critic"
