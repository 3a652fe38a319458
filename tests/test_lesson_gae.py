"""The GAE lesson: against the loops of the field, closed forms and linear algebra; options, pictures, a small run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from llmcore_hf import cli, lesson
from llmcore_hf.errors import ConfigError

lesson_file = lesson.load("gae").file
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {
    "lambdas": [0.0, 0.9, 1.0],
    "train_lambdas": [0.0, 0.95],
    "walk_episodes": 250,
    "num_seeds": 5,
    "num_envs": 2,
    "num_steps": 16,
    "total_timesteps": 320,
}


def batch(steps: int, envs: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random steps; a tenth of them ends an episode in one way or the other, some in both at once."""
    generator = torch.Generator().manual_seed(seed)
    numbers = {
        name: torch.randn(steps, envs, generator=generator, dtype=dtype)
        for name in ("rewards", "values", "next_values")
    }
    ends = {name: torch.rand(steps, envs, generator=generator) < 0.07 for name in ("terminated", "truncated")}
    return {**numbers, **ends}


def reference(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    gamma: float,
    lam: float,
) -> torch.Tensor:
    """The definition, one number at a time in Python floats: A_t = sum_k (gamma lambda)^k delta_{t+k} up to the end."""
    steps, envs = rewards.shape
    result = torch.zeros(steps, envs, dtype=torch.float64)
    for i in range(envs):
        for t in range(steps):
            weight, total = 1.0, 0.0
            for k in range(t, steps):
                bootstrap = 0.0 if terminated[k, i] else gamma * next_values[k, i].item()
                total += weight * (rewards[k, i].item() + bootstrap - values[k, i].item())
                weight *= gamma * lam
                if terminated[k, i] or truncated[k, i]:
                    break
            result[t, i] = total
    return result


# --- the estimator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "envs"), [(1, 1), (2, 3), (37, 1), (40, 4), (9, 129)])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_is_its_definition(steps: int, envs: int, lam: float) -> None:
    data = batch(steps, envs, dtype=torch.float64)
    found = lesson_file.gae(**data, gamma=0.97, lam=lam)
    torch.testing.assert_close(found, reference(**data, gamma=0.97, lam=lam), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("envs", [3, 128, 129])
@pytest.mark.parametrize("chunk", [1, 7, 2**17])
def test_working_in_chunks_changes_nothing(envs: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batch(50, envs, dtype=torch.float64)
    whole = lesson_file.gae(**data, gamma=0.99, lam=0.95)
    monkeypatch.setattr(lesson_file, "CHUNK", chunk * envs)
    torch.testing.assert_close(lesson_file.gae(**data, gamma=0.99, lam=0.95), whole, rtol=1e-12, atol=1e-12)


def sb3_loop(
    rewards: np.ndarray,
    values: np.ndarray,
    last_values: np.ndarray,
    episode_starts: np.ndarray,
    dones: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """How Stable-Baselines3 computes it: one step back at a time, float32, ends known as starts of the next episode."""
    advantages = np.zeros_like(rewards)
    last_gae_lam = 0
    for step in reversed(range(len(rewards))):
        if step == len(rewards) - 1:
            next_non_terminal = 1.0 - dones.astype(np.float32)
            next_values = last_values
        else:
            next_non_terminal = 1.0 - episode_starts[step + 1]
            next_values = values[step + 1]
        delta = rewards[step] + gamma * next_values * next_non_terminal - values[step]
        last_gae_lam = delta + gamma * gae_lambda * next_non_terminal * last_gae_lam
        advantages[step] = last_gae_lam
    return advantages


def as_rows(data: dict[str, torch.Tensor], seed: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Data whose next values are those of the next row, save where an episode ends: there they are of their own."""
    last = torch.randn(data["values"].shape[1], generator=torch.Generator().manual_seed(seed + 1))
    done = data["terminated"] | data["truncated"]
    following = torch.cat([data["values"][1:], last[None]])
    return {**data, "next_values": torch.where(done, data["next_values"], following)}, last.numpy()


@pytest.mark.parametrize("envs", [3, 128])
def test_the_row_loop_is_bit_equal_to_that_of_stable_baselines3(envs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It adds gamma V(final observation) to the reward of a truncated step and treats the step as an end."""
    monkeypatch.setattr(lesson_file, "FEW_ENVS", 0)
    gamma, lam = 0.99, 0.95
    data, last = as_rows(batch(200, envs, seed=3), seed=3)
    only_truncated = data["truncated"] & ~data["terminated"]
    rewards = data["rewards"].numpy().copy()
    rewards[only_truncated] += gamma * data["next_values"][only_truncated].numpy()
    done = (data["terminated"] | data["truncated"]).numpy().astype(np.float32)
    starts = np.concatenate([np.ones((1, envs), np.float32), done[:-1]])
    expected = sb3_loop(rewards, data["values"].numpy(), last, starts, done[-1], gamma, lam)
    found = lesson_file.gae(**data, gamma=gamma, lam=lam)
    assert torch.equal(found, torch.from_numpy(expected))
    monkeypatch.undo()
    fast = lesson_file.gae(**data, gamma=gamma, lam=lam)
    torch.testing.assert_close(fast, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("envs", [3, 128])
def test_the_row_loop_is_bit_equal_to_that_of_cleanrl(envs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows one kind of end, `done`, told by the row after it, and computes in torch."""
    monkeypatch.setattr(lesson_file, "FEW_ENVS", 0)
    gamma, gae_lambda = 0.99, 0.95
    data, last = as_rows(batch(200, envs, seed=4), seed=4)
    rewards, values = data["rewards"], data["values"]
    next_value = torch.from_numpy(last)[None]
    ended = (data["terminated"] | data["truncated"]).float()
    dones, next_done = torch.cat([torch.zeros(1, envs), ended[:-1]]), ended[-1]
    advantages, lastgaelam = torch.zeros_like(rewards), 0
    for t in reversed(range(len(rewards))):
        if t == len(rewards) - 1:
            nextnonterminal, nextvalues = 1.0 - next_done, next_value
        else:
            nextnonterminal, nextvalues = 1.0 - dones[t + 1], values[t + 1]
        delta = rewards[t] + gamma * nextvalues * nextnonterminal - values[t]
        advantages[t] = lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
    as_cleanrl = {**data, "terminated": ended.bool(), "truncated": torch.zeros_like(data["truncated"])}
    assert torch.equal(lesson_file.gae(**as_cleanrl, gamma=gamma, lam=gae_lambda), advantages)


@pytest.mark.parametrize("envs", [5, 140])
def test_nothing_crosses_the_end_of_an_episode(envs: int) -> None:
    data = batch(60, envs, dtype=torch.float64)
    done = data["terminated"] | data["truncated"]
    before = lesson_file.gae(**data, gamma=0.99, lam=0.95)
    for i in range(0, envs, 7):
        end = int(done[:, i].nonzero()[0])
        changed = {name: tensor.clone() for name, tensor in data.items()}
        changed["rewards"][end + 1 :, i] += 100
        after = lesson_file.gae(**changed, gamma=0.99, lam=0.95)
        assert torch.equal(after[: end + 1, i], before[: end + 1, i])


def test_the_value_after_a_termination_is_never_looked_at() -> None:
    data = batch(60, 5)
    spoilt = {**data, "next_values": torch.where(data["terminated"], math.nan, data["next_values"])}
    assert torch.equal(lesson_file.gae(**spoilt, gamma=0.99, lam=0.9), lesson_file.gae(**data, gamma=0.99, lam=0.9))


def test_it_leaves_its_arguments_alone_and_returns_no_gradient() -> None:
    data = batch(30, 140)
    kept = {name: tensor.clone() for name, tensor in data.items()}
    data["values"].requires_grad_()
    assert not lesson_file.gae(**data, gamma=0.9, lam=0.9).requires_grad
    assert all(torch.equal(data[name], kept[name]) for name in kept)


def test_tensors_that_are_not_contiguous() -> None:
    data = batch(70, 30, dtype=torch.float64)
    turned = {name: tensor.T for name, tensor in data.items()}
    same = {name: tensor.T.contiguous() for name, tensor in data.items()}
    for few in (0, 100):
        lesson_file.FEW_ENVS, kept = few, lesson_file.FEW_ENVS
        try:
            found, expected = (lesson_file.gae(**d, gamma=0.9, lam=0.9) for d in (turned, same))
        finally:
            lesson_file.FEW_ENVS = kept
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": torch.zeros(5, 3)}, r"one shape \(T, N\)"),
        ({name: torch.zeros(0, 2) for name in ("rewards", "values", "next_values")}, r"one shape \(T, N\)"),
        ({"terminated": torch.zeros(4, 2)}, "must be bool"),
        ({"values": torch.zeros(4, 2, dtype=torch.float64)}, "all be float32 or all float64"),
        ({name: torch.zeros(4, 2).half() for name in ("rewards", "values", "next_values")}, "float16"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lesson_file.gae(**{**batch(4, 2), **change}, gamma=0.9, lam=0.9)


# --- the walk ---------------------------------------------------------------------------------------------------------


def test_values_of_the_walk_solve_its_recurrence() -> None:
    """v(k) = gamma (v(k-1) + v(k+1)) / 2 with v = -1, 1 / gamma-discounted ends: a sinh, k counted from the middle."""
    gamma = 0.99
    walk = lesson_file.Walk.make(gamma, 0.5)
    growth = math.acosh(1 / gamma)
    k = torch.arange(-9, 10, dtype=torch.float64)
    expected = torch.sinh(growth * k) / math.sinh(growth * 10) / gamma
    torch.testing.assert_close(walk.values, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(walk.critic, 0.5 * walk.values)


def test_values_of_the_walk_become_those_of_the_book() -> None:
    """Sutton & Barto, Example 7.1 is undiscounted: -.9 to .9."""
    walk = lesson_file.Walk.make(1 - 1e-9, 1.0)
    torch.testing.assert_close(walk.values, torch.linspace(-0.9, 0.9, 19, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.6, 0.95, 1.0])
def test_exact_moments_by_summing_the_series(lam: float) -> None:
    """Bias from n-step returns, sum_n (1 - lambda) lambda^(n-1) gamma^n P^n e; variance from propagating both moments."""
    walk = lesson_file.Walk.make(0.9, 0.3)
    bias, std = lesson_file.exact_moments(walk, lam)
    error, expected = walk.critic - walk.values, torch.zeros(19, dtype=torch.float64)
    for n in range(1, 2000):
        error = 0.9 * walk.transitions @ error
        expected += (1 - lam) * lam ** (n - 1) * error
    torch.testing.assert_close(bias, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(lesson_file.bias_formula(walk, lam), expected, rtol=1e-9, atol=1e-12)
    first = second = torch.zeros(21, dtype=torch.float64)  # terminal states at both ends
    critic = torch.nn.functional.pad(walk.critic, (1, 1))
    for _ in range(2000):
        new_first, new_second = torch.zeros(21, dtype=torch.float64), torch.zeros(21, dtype=torch.float64)
        for s in range(1, 20):
            for to in (s - 1, s + 1):
                delta = (to == 20) - (to == 0) + 0.9 * critic[to] - critic[s]
                new_first[s] += 0.5 * (delta + 0.9 * lam * first[to])
                new_second[s] += 0.5 * (delta**2 + 2 * delta * 0.9 * lam * first[to] + (0.9 * lam) ** 2 * second[to])
        done = torch.equal(new_second, second)
        first, second = new_first, new_second
        if done:
            break
    torch.testing.assert_close(std, (second - first**2)[1:-1].clamp(min=0).sqrt(), rtol=1e-6, atol=1e-7)


def test_a_perfect_critic_has_no_bias_at_any_lambda() -> None:
    walk = lesson_file.Walk.make(0.99, 1.0)
    for lam in (0.0, 0.5, 1.0):
        assert lesson_file.exact_moments(walk, lam)[0].abs().max() < 1e-14


def test_the_best_lambda_grows_with_the_number_of_samples() -> None:
    walk = lesson_file.Walk.make(0.99, 0.5)
    lambdas = np.linspace(0, 1, 101).tolist()
    moments = [lesson_file.exact_moments(walk, lam) for lam in lambdas]
    bias, variance = (
        torch.stack([f(m) for m in moments]) for f in (lambda m: (m[0] ** 2).mean(), lambda m: (m[1] ** 2).mean())
    )
    best = [lambdas[int((bias + variance / n).argmin())] for n in (1, 10, 100)]
    assert best == sorted(best) and 0.7 <= best[0] <= 0.8 and best[-1] >= 0.98


def test_sampled_episodes_are_walks() -> None:
    walk = lesson_file.Walk.make(0.99, 1.0)
    data = lesson_file.sample_episodes(walk, 50, torch.Generator().manual_seed(0))
    data = data._asdict()
    starts = torch.arange(19).repeat_interleave(50)
    assert torch.equal(data["values"][0], walk.critic[starts])
    assert (data["rewards"][0][1 * 50 : 18 * 50] == 0).all()
    ended = data["terminated"].any(0)
    assert ended.double().mean() > 0.98
    ends = data["terminated"].int().argmax(0)  # first end of each column
    rewards = data["rewards"].gather(0, ends[None])[0]
    assert (rewards[ended].abs() == 1).all()
    share = (rewards.view(19, 50) == 1).double().mean(1)
    assert (share - torch.linspace(0.05, 0.95, 19)).abs().max() < 0.3  # a standard error is .07


def test_the_noise_of_the_samples_is_no_bias() -> None:
    """A perfect critic has none: what the picture shows stays below the noise, and two kinds of noise do not add up."""
    walk, lambdas = lesson_file.Walk.make(0.99, 1.0), [0.5, 0.9, 1.0]
    measured = lesson_file.sample_moments(walk, lambdas, 500, 0)
    noise = measured.standard_errors()[0].square().mean(1).sqrt()
    assert (lesson_file._rms_without_noise(walk, measured) < 0.9 * noise).all()


def test_standard_errors_of_known_moments() -> None:
    """Standard normal: variance 1, fourth moment 3, so errors 1 / sqrt(n) and sqrt(2 / (n - 1)); a shift changes neither."""
    shift = 2.0
    powers = torch.tensor([shift, shift**2 + 1, shift**3 + 3 * shift, shift**4 + 6 * shift**2 + 3], dtype=torch.float64)
    measured = lesson_file.Measured(powers[:, None, None], 100)
    of_mean, of_variance = measured.standard_errors()
    assert measured.variance().item() == pytest.approx(1)
    assert of_mean.item() == pytest.approx(0.1) and of_variance.item() == pytest.approx(math.sqrt(2 / 99))


def test_the_check_survives_two_equal_halves() -> None:
    """With lambda = 0 the residual is one of two numbers. Half and half, mu_4 = sigma^4: the error must not become NaN."""
    powers = torch.tensor([0.0, 0.1**2, 0.0, 0.1**4 * (1 - 1e-15)], dtype=torch.float64)
    assert lesson_file.Measured(powers[:, None, None], 4000).standard_errors()[1].item() > 0


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("critic_scale", [0.0, 1.0, -2.0])
def test_the_checks_of_the_walk_hold_for_other_options(gamma: float, critic_scale: float) -> None:
    walk, lambdas = lesson_file.Walk.make(gamma, critic_scale), [0.0, 0.5, 1.0]
    checks = lesson_file.walk_checks(walk, lambdas, lesson_file.sample_moments(walk, lambdas, 1000, 0))
    assert [check.passed for check in checks if check.kind == "invariant"] == [True, True]


# --- ends of episodes -------------------------------------------------------------------------------------------------


def test_the_timeline_is_right_and_each_mistake_is_not() -> None:
    gamma, lam = 0.9, 0.8
    found = lesson_file.timeline_advantages(gamma, lam)
    right = found.pop("right")
    assert right[:24].abs().max() < 1e-12
    expected = [10 * (gamma * lam) ** k for k in range(5, -1, -1)]
    assert right[24:30].tolist() == pytest.approx(expected) and right[30:].abs().max() < 1e-12
    assert len(found) == 3 and all((wrong - right).abs().max() > 0.5 for wrong in found.values())
    early = found["truncation treated as termination"]
    assert early[:12].abs().max() < 1e-12 and early[23].item() == pytest.approx(-gamma * 10)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_recorded_walks_reach_the_final_observation(mode: AutoresetMode) -> None:
    walk = lesson_file.Walk.make(0.99, 1.0)
    steps, real = lesson_file.record_walk(walk, mode, seed=0, envs=4, steps=300)
    assert steps.terminated.any() and steps.truncated.any()
    truncated = steps.truncated & ~steps.terminated
    moved = (steps.next_values - steps.values)[truncated].abs()
    assert (moved > 0).all() and (moved < 0.14).all()  # one state away, .134 at most
    assert (steps.next_values[truncated] != walk.critic[9]).any()  # not the middle, where the next walk starts
    assert real.all() == (mode == AutoresetMode.SAME_STEP)


def test_both_modes_hold_the_same_episodes() -> None:
    walk = lesson_file.Walk.make(0.99, 0.5)
    lists = [
        lesson_file.finished_advantages(*lesson_file.record_walk(walk, mode, 1), 0.99, 0.9)
        for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP)
    ]
    assert sum(len(a) for a in lists[0]) > 2000
    for a, b in zip(*lists, strict=True):
        torch.testing.assert_close(a, b[: len(a)], rtol=0, atol=1e-12)


def test_returns_to_go_of_a_hand_made_record() -> None:
    rewards = torch.arange(1.0, 6.0, dtype=torch.float64)[:, None]
    terminated = torch.tensor([[False], [True], [False], [False], [False]])
    truncated = torch.tensor([[False], [False], [True], [False], [False]])
    record = lesson_file.Steps(rewards, torch.zeros(5, 1), torch.full((5, 1), 10.0).double(), terminated, truncated)
    found = lesson_file.returns_to_go(record, 0.5)[:, 0].tolist()
    assert found == [1 + 0.5 * 2, 2, 3 + 0.5 * 10, 4 + 0.5 * 5 + 0.25 * 10, 5 + 0.5 * 10]


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_batch_of_networks_is_each_network_alone() -> None:
    parameters = lesson_file.make_network(3, [4, 8, 8, 2], 0.01, torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 4)
    together = lesson_file.forward(parameters, x)
    for r in range(3):
        w = [p[r].detach() for p in parameters]
        alone = torch.tanh(torch.tanh(x[r] @ w[0] + w[1]) @ w[2] + w[3]) @ w[4] + w[5]
        torch.testing.assert_close(together[r], alone, rtol=1e-5, atol=1e-6)
    assert not torch.equal(parameters[0][0], parameters[0][1])
    torch.testing.assert_close(parameters[2][0] @ parameters[2][0].T, 2 * torch.eye(8), rtol=1e-4, atol=1e-4)


def rollout_and_values(args: Any, seed: int = 0, steps: int = 60) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    actor = lesson_file.make_network(4, [4, 8, 2], 1.0, generator)
    critic = lesson_file.make_network(4, [4, 8, 1], 1.0, generator)
    sampler = lesson_file.Sampler("CartPole-v1", 4, 2, seed)
    with torch.no_grad():
        rollout = sampler.collect(actor, steps, generator)
        values = lesson_file.forward(critic, rollout.observations.flatten(1, 2)).view(4, steps + 1, 2)
    return actor, critic, rollout, values, sampler


def test_a_rollout_marks_the_steps_that_were_spent_on_resets() -> None:
    *_, rollout, _, sampler = rollout_and_values(None)
    done = (rollout.terminated | rollout.truncated).transpose(0, 1)
    assert done.any() and not rollout.real.all()
    assert torch.equal(~rollout.real[:, 1:], done[:, :-1])
    assert (rollout.rewards.transpose(0, 1)[~rollout.real] == 0).all()
    fallen = rollout.observations[:, 1:][done]  # what the last action reached
    assert ((fallen[:, 2].abs() > 12 * math.pi / 180) | (fallen[:, 0].abs() > 2.4)).all()
    after = rollout.observations[:, 1:][~rollout.real]  # what the reset led to
    assert (after.abs() <= 0.05).all()
    assert 8 <= sampler.latest.nanmean() <= 60


def test_the_returns_that_are_noted_are_lengths_of_episodes() -> None:
    *_, rollout, _, sampler = rollout_and_values(None)
    done = rollout.terminated | rollout.truncated
    for run in range(4):
        lengths = []
        for env in range(2):
            ends = done[:, run, env].nonzero()[:, 0].tolist()
            starts = [0, *(end + 2 for end in ends)][: len(ends)]  # one step goes by for the reset
            lengths += [end - start + 1 for start, end in zip(starts, ends, strict=True)]
        assert sampler.latest[run].item() == pytest.approx(np.mean(lengths))


def test_a_time_limit_resets_like_a_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps per episode: every fourth row is the reset."""
    spec = gym.spec("CartPole-v1")
    monkeypatch.setattr(spec, "max_episode_steps", 3)
    sampler = lesson_file.Sampler("CartPole-v1", 2, 2, 0)
    actor = lesson_file.make_network(2, [4, 2], 1.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        rollout = sampler.collect(actor, 8, torch.Generator().manual_seed(0))
    expected = torch.tensor([False, False, True, False] * 2)
    assert (rollout.truncated[:, 0, 0] == expected).all() and not rollout.terminated.any()
    assert (rollout.real[0, :, 0] == torch.tensor([True, True, True, False] * 2)).all()
    assert (sampler.latest == 3).all()


def test_first_and_last_tenth_of_a_curve() -> None:
    curve = torch.arange(40.0)[:, None, None].expand(40, 2, 5)
    summary = lesson_file.Summary.of(curve)
    assert summary.first[0, 0] == 1.5 and summary.last[0, 0] == 37.5 and summary.whole[0, 0] == 19.5


def test_each_group_of_runs_gets_its_own_lambda() -> None:
    _, _, rollout, values, _ = rollout_and_values(None)
    found = lesson_file.rollout_advantages(rollout, values, [0.3, 1.0], 0.9)
    for run, lam in enumerate([0.3, 0.3, 1.0, 1.0]):
        data = {name: getattr(rollout, name)[:, run] for name in ("rewards", "terminated", "truncated")}
        expected = reference(**data, values=values[run, :-1], next_values=values[run, 1:], gamma=0.9, lam=lam)
        torch.testing.assert_close(found[run].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_each_run_written_out() -> None:
    args = lesson_file.Args(ent_coef=0.03, vf_coef=0.7)
    actor, critic, rollout, values, _ = rollout_and_values(args)
    advantages = lesson_file.rollout_advantages(rollout, values, [0.3, 1.0], 0.9)
    expected = 0.0
    for run in range(4):
        real = rollout.real[run].flatten()
        observations = rollout.observations[run, :-1].flatten(0, 1)[real]
        logits = lesson_file.forward([p[run : run + 1] for p in actor], observations[None])[0]
        policy = torch.distributions.Categorical(logits=logits)
        a = advantages[run].flatten()[real]
        target = values[run, :-1].flatten()[real] + a
        v = lesson_file.forward([p[run : run + 1] for p in critic], observations[None])[0, :, 0]
        scaled = (a - a.mean()) / a.std(unbiased=False)
        gain = policy.log_prob(rollout.actions[run].flatten()[real]) * scaled + 0.03 * policy.entropy()
        expected += (-gain + 0.7 * (v - target) ** 2).mean().item()
    loss = lesson_file.a2c_loss(actor, critic, rollout, values, advantages, args)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in actor + critic)


def test_gradients_are_clipped_run_by_run() -> None:
    parameters = [torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(2, 1, 4, requires_grad=True)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
        parameter.grad[1] *= 0.01
    lesson_file.clip_each_run(parameters, 0.5)
    norms = [math.sqrt(sum(p.grad[run].square().sum().item() for p in parameters)) for run in (0, 1)]
    assert norms == pytest.approx([0.5, 0.04])


def test_interval_of_students_t() -> None:
    """Quantiles t_{.975, v} of any statistics table: 2.776 (4), 2.262 (9), 2.093 (19)."""
    for n, quantile in ((5, 2.776), (10, 2.262), (20, 2.093)):
        samples = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        mean, half = lesson_file.mean_interval(samples)
        assert mean.item() == pytest.approx(samples.mean().item())
        assert (half / samples.std() * math.sqrt(n)).item() == pytest.approx(quantile, abs=0.011)


# --- each check notices what it is there for ---------------------------------------------------------------------------


def failed(checks: list[Any]) -> set[str]:
    return {check.id.removeprefix("gae.") for check in checks if not check.passed}


WALK = lesson_file.Walk.make(0.99, 0.5)


def test_all_checks_pass_when_nothing_is_broken() -> None:
    measured = lesson_file.sample_moments(WALK, [0.0, 0.9, 1.0], 500, 0)
    advantages = lesson_file.timeline_advantages(0.99, 0.9)
    assert not failed(lesson_file.estimator_checks(WALK, 0))
    assert not failed(lesson_file.boundary_checks(WALK, advantages, 0.9, 0))
    assert not failed(lesson_file.walk_checks(WALK, [0.0, 0.9, 1.0], measured))


def test_checks_of_the_estimator_notice_a_wrong_lambda(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lesson_file.gae
    monkeypatch.setattr(lesson_file, "gae", lambda *steps_and_numbers: right(*steps_and_numbers[:-1], 0.5))
    assert failed(lesson_file.estimator_checks(WALK, 0)) == {
        "lambda_0_is_the_td_residual",
        "lambda_1_is_monte_carlo_minus_v",
    }


def test_checks_of_the_estimator_notice_a_loop_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lesson_file.backward_rows
    monkeypatch.setattr(
        lesson_file,
        "backward_rows",
        lambda steps, gamma, lam, following, out: right(
            steps._replace(truncated=steps.terminated), gamma, lam, following, out
        ),
    )
    assert failed(lesson_file.estimator_checks(WALK, 0)) == {"scan_equals_row_loop"}


def test_checks_of_the_boundaries_notice_every_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    advantages = lesson_file.timeline_advantages(0.99, 0.9)
    for mistake in advantages.keys() - {"right"}:
        broken = {**advantages, "right": advantages[mistake]}
        assert failed(lesson_file.boundary_checks(WALK, broken, 0.9, 0)) == {"terminated_and_truncated"}
    monkeypatch.setattr(lesson_file, "reached_observations", lambda observations, infos: observations)
    assert failed(lesson_file.boundary_checks(WALK, advantages, 0.9, 0)) == {"both_autoreset_modes_agree"}


def test_checks_of_the_walk_notice_wrong_samples_and_wrong_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    lambdas = [0.0, 0.9, 1.0]
    measured = lesson_file.sample_moments(WALK, lambdas, 500, 0)
    other = lesson_file.Walk.make(0.95, 0.5)
    wrong = lesson_file.sample_moments(other, lambdas, 500, 0)
    assert failed(lesson_file.walk_checks(WALK, lambdas, wrong)) == {"sampled_moments_are_exact"}
    backwards = lesson_file.Measured(measured.powers.flip(1), measured.episodes)
    assert failed(lesson_file.walk_checks(WALK, lambdas[::-1], backwards)) == {"bias_falls_and_spread_rises"}
    formula = lesson_file.bias_formula
    monkeypatch.setattr(lesson_file, "bias_formula", lambda walk, lam: formula(walk, lam) * 1.01)
    assert failed(lesson_file.walk_checks(WALK, lambdas, measured)) == {"bias_is_the_critics_error"}


def test_the_check_of_training_notices_that_nothing_was_learned() -> None:
    level = torch.full((2, 5), 20.0) + torch.arange(5)
    for last, passed in ((level, False), (level - 10, False), (level + 200 * torch.rand(2, 5) + 50, True)):
        assert lesson_file.training_check(lesson_file.Summary(level, level, last), [0.0, 0.95]).passed == passed


# --- options, pictures, runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 1.0}, "--gamma 1.0: a discount is in [0, 1)"),
        ({"gamma": -0.1}, "--gamma -0.1"),
        ({"gamma": math.nan}, "--gamma nan"),
        ({"lambdas": []}, "--lambdas "),
        ({"lambdas": [0.0, 1.5]}, "--lambdas 0 1.5: give at least one number, each in [0, 1]"),
        ({"train_lambdas": [0.9, 0.5]}, "--train_lambdas 0.9 0.5: they must ascend"),
        ({"train_lambdas": [math.nan]}, "--train_lambdas nan"),
        ({"critic_scale": math.inf}, "--critic_scale inf"),
        ({"walk_episodes": 1}, "--walk_episodes 1"),
        ({"num_seeds": 4}, "--num_seeds 4: a confidence interval needs at least 5"),
        ({"num_envs": 0}, "--num_envs 0"),
        ({"num_steps": -1}, "--num_steps -1"),
        ({"hidden_size": 0}, "--hidden_size 0"),
        ({"total_timesteps": 100}, "--total_timesteps 100: must allow 10 updates"),
        ({"learning_rate": 0.0}, "--learning_rate 0.0"),
        ({"max_grad_norm": math.nan}, "--max_grad_norm nan"),
        ({"ent_coef": -0.1}, "--ent_coef -0.1"),
        ({"vf_coef": math.nan}, "--vf_coef nan"),
        ({"env_id": "CartPole-v9"}, "--env_id CartPole-v9: Gymnasium cannot make it"),
        ({"env_id": "Pendulum-v1"}, "--env_id Pendulum-v1: its actions are Box"),
        ({"env_id": "FrozenLake-v1"}, "--env_id FrozenLake-v1: its observations are Discrete"),
    ],
)
def test_a_bad_option_is_named_in_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lesson_file.Args(**options)
    assert len(caught.value.problems) == 1 and words in caught.value.problems[0]


def test_the_options_of_the_toy_and_of_the_full_recipe_are_accepted() -> None:
    assert lesson_file.Args().num_seeds >= 10


def texts(figure: Any) -> str:
    return " ".join(
        [
            t
            for axis in figure.axes
            for t in (axis.get_title(), axis.get_title(loc="left"), axis.get_xlabel(), axis.get_ylabel())
        ]
    )


def test_pictures_show_what_they_say() -> None:
    import matplotlib.pyplot as plt

    walk = lesson_file.Walk.make(0.99, 0.5)
    lambdas = [0.0, 0.9, 1.0]
    measured = lesson_file.sample_moments(walk, lambdas, 250, 0)
    figure = lesson_file.draw_bias_and_spread(walk, lambdas, measured)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    bias, spread = lines["bias, exact"].get_ydata(), lines["standard deviation, exact"].get_ydata()
    assert bias[-1] == pytest.approx(0, abs=1e-12) and spread[-1] == pytest.approx(0.4800, abs=1e-4)
    assert len(lines["bias, sampled"].get_ydata()) == 3
    figures = [
        figure,
        lesson_file.draw_weights(lambdas, 0.99),
        lesson_file.draw_boundaries(lesson_file.timeline_advantages(0.99, 0.9)),
        lesson_file.draw_returns(torch.arange(12), torch.rand(12, 3, 5), lambdas, "CartPole-v1"),
    ]
    for figure in figures:
        assert texts(figure).isascii() and all(axis.get_ylabel() for axis in figure.axes)
        assert lesson.png(figure).startswith(b"\x89PNG")
    assert not plt.get_fignums()


def test_one_lambda_is_enough() -> None:
    walk = lesson_file.Walk.make(0.9, 0.5)
    measured = lesson_file.sample_moments(walk, [0.9], 250, 0)
    for figure in (
        lesson_file.draw_bias_and_spread(walk, [0.9], measured),
        lesson_file.draw_weights([1.0], 0.9),
        lesson_file.draw_returns(torch.arange(12), torch.rand(12, 1, 5), [0.9], "CartPole-v1"),
    ):
        assert lesson.png(figure)


def command(output: Path, **options: Any) -> list[str]:
    words = ["--module", "gae", "--output_dir", str(output)]
    for name, value in {**SMALL, **options}.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


@pytest.mark.slow
def test_a_small_run_leaves_its_evidence_and_repeats_itself(tmp_path: Path) -> None:
    for name, threads in (("a", 1), ("b", 2)):  # the number of threads must not matter
        torch.set_num_threads(threads)
        assert cli.main(command(tmp_path / name)) == 0
        assert torch.get_num_threads() == threads
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    by_id = {check["id"]: check["status"] for check in summary["checks"]}
    assert len(by_id) == 9 and all(status == "pass" for id, status in by_id.items() if id != "gae.return_rose")
    assert summary["eval"] is None and summary["model"] is None
    pictures = {"training_curves.png", "bias_and_spread.png", "weights.png", "boundaries.png"}
    assert pictures | {"results.json"} <= set(summary["artifacts"])
    assert {"return/lambda_0", "return/lambda_0.95"} <= set(summary["metrics"])
    table = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [row["lambda"] for row in table["walk"]] == SMALL["lambdas"]
    for file in ("log_history.jsonl", "results.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.slow
def test_any_discrete_environment_will_do(tmp_path: Path) -> None:
    """One without a vector implementation of its own, so Gymnasium steps copies of it."""
    assert cli.main(command(tmp_path / "run", env_id="Acrobot-v1", train_lambdas=[0.9])) == 0


def test_the_vector_environment_resets_as_the_lesson_expects() -> None:
    assert gym.make_vec("CartPole-v1", num_envs=2).metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
