"""The lesson on policy-gradient estimators: against finite differences, naive loops and enumeration; options and a small run."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcore_hf import cli, lesson
from llmcore_hf.errors import ConfigError

adv = lesson.load("advantage").file
pytestmark = pytest.mark.usefixtures("one_thread")
GAMMA = 0.9


def objective(logits: list[list[float]], horizon: int) -> float:
    """J by recursion over the robot's story in plain Python, as Example 3.3 tells it."""
    a, b = adv.ALPHA, adv.BETA

    def softmax(numbers: list[float]) -> list[float]:
        powers = [math.exp(x) for x in numbers]
        return [p / sum(powers) for p in powers]

    high, low = softmax(logits[0][:2]), softmax(logits[1])

    def value(state: str, steps: int) -> float:
        if steps == 0:
            return 0.0
        up, down = value("high", steps - 1), value("low", steps - 1)
        if state == "high":
            search = a * (2 + GAMMA * up) + (1 - a) * (2 + GAMMA * down)
            return high[0] * search + high[1] * (1 + GAMMA * up)
        search = b * (2 + GAMMA * down) + (1 - b) * (-3 + GAMMA * up)
        return low[0] * search + low[1] * (1 + GAMMA * down) + low[2] * (0 + GAMMA * up)

    return value("high", horizon)


# --- the exact side ---------------------------------------------------------------------------------------------------


def test_the_tables_are_the_robot_of_the_book() -> None:
    """Sutton & Barto, Example 3.3: six kinds of transition, -3 only for a battery that runs out during a search."""
    assert torch.equal(adv.TRANSITIONS.sum(-1), adv.AVAILABLE.double())
    high, low, search, wait, recharge = 0, 1, 0, 1, 2
    assert adv.TRANSITIONS[high, search].tolist() == pytest.approx([adv.ALPHA, 1 - adv.ALPHA])
    assert adv.TRANSITIONS[low, search].tolist() == pytest.approx([1 - adv.BETA, adv.BETA])
    assert (
        adv.TRANSITIONS[high, wait, high]
        == adv.TRANSITIONS[low, wait, low]
        == adv.TRANSITIONS[low, recharge, high]
        == 1
    )
    assert adv.REWARDS[low, search].tolist() == [-3, adv.R_SEARCH] and adv.R_SEARCH > adv.R_WAIT
    assert adv.REWARDS[low, recharge].tolist() == [0, 0]


@pytest.mark.parametrize("horizon", [1, 2, 6])
def test_values_by_recursion_in_plain_python(horizon: int) -> None:
    exact = adv.solve(adv.LOGITS, horizon, GAMMA)
    assert exact.values[0, 0].item() == pytest.approx(objective(adv.LOGITS.tolist(), horizon), rel=1e-12)
    assert exact.values.shape == (horizon + 1, 2) and exact.q_values.shape == (horizon, 2, 3)


def test_the_gradient_is_that_of_finite_differences() -> None:
    horizon, step = 6, 1e-5
    gradient = adv.solve(adv.LOGITS, horizon, GAMMA).gradient()
    for s, a in itertools.product(range(2), range(3)):
        up, down = adv.LOGITS.tolist(), adv.LOGITS.tolist()
        up[s][a] += step
        down[s][a] -= step
        slope = (objective(up, horizon) - objective(down, horizon)) / (2 * step)
        assert gradient[s, a].item() == pytest.approx(slope, abs=1e-8)
    assert gradient[0, 2] == 0 and gradient.sum(1).abs().max() < 1e-12


def test_the_gradient_is_that_of_autograd_at_a_long_horizon() -> None:
    gradient = adv.solve(adv.LOGITS, 160, 0.99).gradient()
    torch.testing.assert_close(adv.gradient_by_autograd(160, 0.99), gradient, rtol=1e-10, atol=1e-10)


def test_advantages_average_to_zero_and_values_are_averages() -> None:
    exact = adv.solve(adv.LOGITS, 12, GAMMA)
    assert (exact.pi * exact.advantages).sum(-1).abs().max() < 1e-13
    torch.testing.assert_close((exact.pi * exact.q_values).sum(-1), exact.values[:-1], rtol=1e-12, atol=1e-12)
    assert exact.pi[0, 2] == 0 and torch.allclose(exact.visits.sum(1), torch.ones(12, dtype=torch.float64))


def test_enumeration_counts_every_trajectory_once() -> None:
    """Three ways on from a full battery, four from a low one: a 2 x 2 matrix counts the trajectories."""
    paths, probabilities = adv.enumerate_all(adv.policy(adv.LOGITS), 5)
    ways = torch.tensor([[2, 1], [2, 2]])  # search stays, wait; search drains | search rescued, recharge; search, wait
    count = int((torch.linalg.matrix_power(ways, 5)[0]).sum())
    assert len(probabilities) == count and probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    rows = torch.cat([paths.states, paths.actions], 1)
    assert len(rows.unique(dim=0)) == count
    value = probabilities @ (paths.rewards @ GAMMA ** torch.arange(5, dtype=torch.float64))
    assert value.item() == pytest.approx(objective(adv.LOGITS.tolist(), 5), rel=1e-12)


def test_expected_values_of_all_estimators_over_all_trajectories() -> None:
    exact = adv.solve(adv.LOGITS, 5, GAMMA)
    gradient = exact.gradient()
    paths, probabilities = adv.enumerate_all(exact.pi, 5)
    critic = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    critic[-1] = 0
    found = adv.estimates(paths, adv.psi(paths, exact, 3.7, critic, GAMMA), exact.pi)
    means = {name: torch.einsum("n,nsa->sa", probabilities, samples) for name, samples in found.items()}
    assert set(means) == set(adv.ESTIMATORS) == {*adv.UNBIASED, adv.BIASED} and len(means) == 8
    for name in adv.UNBIASED:
        torch.testing.assert_close(means[name], gradient, rtol=1e-11, atol=1e-11)
    believed = exact.gradient(adv.backup(critic[1:], GAMMA))
    torch.testing.assert_close(means[adv.BIASED], believed, rtol=1e-11, atol=1e-11)
    assert (believed - gradient).abs().max() > 0.1


# --- samples ----------------------------------------------------------------------------------------------------------


def test_estimates_of_one_trajectory_written_out() -> None:
    """Every weight and every score by loops over the time step."""
    exact = adv.solve(adv.LOGITS, 6, GAMMA)
    paths = adv.sample(exact.pi, 6, 3, torch.Generator().manual_seed(5))
    critic = 0.3 * exact.values
    found = adv.estimates(paths, adv.psi(paths, exact, 2.0, critic, GAMMA), exact.pi)
    for n in range(3):
        s, a, r = paths.states[n].tolist(), paths.actions[n].tolist(), paths.rewards[n].tolist()
        expected = {name: torch.zeros(2, 3, dtype=torch.float64) for name in adv.ESTIMATORS}
        for t in range(6):
            logits = adv.LOGITS.clone().requires_grad_()
            (score,) = torch.autograd.grad(adv.policy(logits)[s[t], a[t]].log(), logits)
            whole = sum(GAMMA**k * r[k] for k in range(6))
            to_go = sum(GAMMA ** (k - t) * r[k] for k in range(t, 6))
            v, w = exact.values, critic
            weights = {
                "return": whole,
                "return - b*": whole - 2.0,
                "reward-to-go": GAMMA**t * to_go,
                "rtg - wrong V": GAMMA**t * (to_go - w[t, s[t]].item()),
                "rtg - V": GAMMA**t * (to_go - v[t, s[t]].item()),
                "TD residual": GAMMA**t * (r[t] + GAMMA * v[t + 1, s[t + 1]] - v[t, s[t]]).item(),
                "Q - V": GAMMA**t * (exact.q_values[t, s[t], a[t]] - v[t, s[t]]).item(),
                "wrong TD residual": GAMMA**t * (r[t] + GAMMA * w[t + 1, s[t + 1]] - w[t, s[t]]).item(),
            }
            for name, weight in weights.items():
                expected[name] += weight * score
        for name in adv.ESTIMATORS:
            torch.testing.assert_close(found[name][n], expected[name], rtol=1e-10, atol=1e-10)


def test_sampled_trajectories_follow_policy_and_dynamics() -> None:
    pi = adv.policy(adv.LOGITS)
    paths = adv.sample(pi, 8, 20_000, torch.Generator().manual_seed(0))
    assert (paths.states[:, 0] == 0).all() and paths.states.shape == (20_000, 9)
    state, following = paths.states[:, :-1], paths.states[:, 1:]
    for s, a in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        here, taken = state == s, (state == s) & (paths.actions == a)
        share = taken.sum() / here.sum()
        assert abs(share - pi[s, a]) < 5 * math.sqrt(pi[s, a] * (1 - pi[s, a]) / here.sum())
        p = adv.TRANSITIONS[s, a, 0]
        assert abs((following[taken] == 0).double().mean() - p) <= 5 * math.sqrt(p * (1 - p) / taken.sum())
        assert torch.equal(paths.rewards[taken], adv.REWARDS[s, a][following[taken]])
    assert not ((state == 0) & (paths.actions == 2)).any()


def test_the_best_constant_beats_its_neighbours_and_is_not_the_mean_return() -> None:
    exact = adv.solve(adv.LOGITS, 6, GAMMA)
    paths, probabilities = adv.enumerate_all(exact.pi, 6)
    best = adv.best_constant(paths, exact.pi, exact.discounts, probabilities)

    def trace(baseline: float) -> float:
        samples = adv.estimates(paths, adv.psi(paths, exact, baseline, exact.values, GAMMA), exact.pi)["return - b*"]
        mean = torch.einsum("n,nsa->sa", probabilities, samples)
        return (probabilities @ (samples - mean).square().sum((1, 2))).item()

    assert trace(best) < min(trace(best - 0.01), trace(best + 0.01), trace(exact.values[0, 0].item()))
    assert abs(best - exact.values[0, 0].item()) > 0.01


def test_the_pilot_is_near_the_best_constant() -> None:
    exact = adv.solve(adv.LOGITS, 6, GAMMA)
    paths, probabilities = adv.enumerate_all(exact.pi, 6)
    best = adv.best_constant(paths, exact.pi, exact.discounts, probabilities)
    sampled = adv.best_constant(
        adv.sample(exact.pi, 6, 50_000, torch.Generator().manual_seed(1)), exact.pi, exact.discounts
    )
    assert sampled == pytest.approx(best, abs=0.05)


def test_traces_of_samples_are_those_of_the_enumeration() -> None:
    args = adv.Args(num_trajectories=50_000, gamma=GAMMA)
    exact, samples = adv.all_estimates(args, 6, 3)
    paths, probabilities = adv.enumerate_all(exact.pi, 6)
    best = adv.best_constant(paths, exact.pi, exact.discounts, probabilities)
    everything = adv.estimates(paths, adv.psi(paths, exact, best, 0.5 * exact.values, GAMMA), exact.pi)
    for name, values in everything.items():
        mean = torch.einsum("n,nsa->sa", probabilities, values)
        trace = (probabilities @ (values - mean).square().sum((1, 2))).item()
        found, half = adv.trace_interval(samples[name])
        assert abs(found - trace) < 2 * half + 0.001 * trace  # about four standard errors, and b* is sampled


def test_many_small_batches_are_as_good_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, samples = adv.all_estimates(adv.Args(num_trajectories=41_000), 20, 0)
    assert all(tensor.shape == (41_000, 2, 3) for tensor in samples.values())  # in parts of 20,000, the last one short


# --- statistics -------------------------------------------------------------------------------------------------------


def gradient_like(samples: torch.Tensor) -> torch.Tensor:
    """Numbers (N, 3) put at the free coordinates, (N, 2, 3)."""
    full = torch.zeros(len(samples), 2, 3, dtype=torch.float64)
    for i, (s, a) in enumerate(adv.FREE):
        full[:, s, a] = samples[:, i]
    return full


def test_p_values_are_uniform_when_the_mean_is_right_and_tiny_when_not() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [-2, 1, 3]], dtype=torch.float64)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    draws = [torch.randn(400, 3, generator=generator, dtype=torch.float64) @ mixing.T for _ in range(400)]
    p = torch.tensor([adv.Against.of(gradient_like(draw), zero).p for draw in draws])
    for quantile in (0.1, 0.5, 0.9):
        assert abs((p < quantile).double().mean() - quantile) < 0.08  # a standard error is .025 at most
    moved = adv.Against.of(gradient_like(draws[0] + 0.5), zero)
    assert moved.p < 1e-6 and moved.z > 4


def test_the_joint_test_sees_what_no_coordinate_shows() -> None:
    """Two nearly equal coordinates that deviate in opposite directions."""
    common = torch.randn(10_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(10_000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    samples = torch.cat([common, common, common], 1) + 0.01 * noise
    samples = samples - samples.mean(0) + torch.tensor([0.01, -0.01, 0.0])
    found = adv.Against.of(gradient_like(samples), torch.zeros(2, 3, dtype=torch.float64))
    assert found.z < 2 and found.p < 1e-10


def test_intervals_of_traces_and_ratios_cover() -> None:
    """Normal samples of variance 1 and 4 that share their noise: the ratio is 1/4; 95 % of 300 intervals hold it."""
    covered = torch.zeros(2)
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(500, 2, 3, generator=generator, dtype=torch.float64)
        y = math.sqrt(3.2) * x + math.sqrt(0.8) * torch.randn(500, 2, 3, generator=generator, dtype=torch.float64)
        trace, half = adv.trace_interval(x)
        ratio, half_ratio = adv.trace_ratio(x, y)
        covered += torch.tensor([abs(trace - 6) < half, abs(ratio - 0.25) < half_ratio])
    assert (covered > 270).all() and (covered < 298).all()


def test_the_error_of_means_falls_with_the_root() -> None:
    samples = torch.randn(64_000, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    for count in (1, 10, 100):
        assert adv.error_of_means(samples, zero, count) == pytest.approx(math.sqrt(6 / count), rel=0.05)
    assert adv.error_of_means(samples, zero + 1, 1000) == pytest.approx(math.sqrt(6), rel=0.02)


def test_the_exponent_of_a_power_law() -> None:
    assert adv.growth([5, 10, 40], [7 * h**2.5 for h in (5, 10, 40)]) == pytest.approx(2.5)


# --- what is claimed, on several seeds --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_claims_hold_on_five_seeds(seed: int) -> None:
    """Measured with 20 steps and 10,000 trajectories over seeds 0 to 19, how many times the variance of the return is that of
    reward-to-go: 2.98 to 3.10, rtg - V: 162 to 178, Q - V: 6,868 to 7,127; the largest z 1.2 to 2.9. The bounds are wider.
    """
    args = adv.Args(num_trajectories=10_000, seed=seed)
    exact, samples = adv.all_estimates(args, args.horizon, seed)
    checks = {check.id: check for check in adv.sampled_checks(args, exact, samples)}
    assert all(check.passed for check in checks.values()), checks
    for name, low, high in (("reward-to-go", 2.8, 3.3), ("rtg - V", 145, 195), ("Q - V", 6500, 7500)):
        assert low < 1 / adv.trace_ratio(samples[name], samples["return"])[0] < high


# --- each check notices what it is there for ---------------------------------------------------------------------------


def failed(checks: list[Any]) -> set[str]:
    return {check.id.removeprefix("advantage.") for check in checks if not check.passed}


SHORT = {"enumerated_horizon": 4, "num_trajectories": 10_000}


def test_exact_checks_notice_a_wrong_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    right = adv.gradient_by_autograd
    monkeypatch.setattr(adv, "gradient_by_autograd", lambda *args: right(*args) * 1.001)
    assert failed(adv.exact_checks(adv.Args(**SHORT))) == {"gradient_three_ways"}


def test_exact_checks_notice_an_advantage_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adv.Exact, "advantages", property(lambda self: self.q_values - self.values[1:, :, None]))
    assert failed(adv.exact_checks(adv.Args(**SHORT))) == {
        "advantage_averages_to_zero"
    }  # a shift costs variance, no bias


def test_exact_checks_notice_a_weight_without_discount(monkeypatch: pytest.MonkeyPatch) -> None:
    right = adv.psi

    def undiscounted(paths: Any, exact: Any, *more: Any) -> dict[str, torch.Tensor]:
        weights = right(paths, exact, *more)
        return {**weights, "TD residual": weights["TD residual"] / exact.discounts}

    monkeypatch.setattr(adv, "psi", undiscounted)
    assert failed(adv.exact_checks(adv.Args(**SHORT))) == {"means_over_all_trajectories"}


def test_exact_checks_notice_a_baseline_that_is_not_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    right = adv.best_constant
    monkeypatch.setattr(adv, "best_constant", lambda *args: right(*args) + 0.1)
    assert failed(adv.exact_checks(adv.Args(**SHORT))) == {"best_constant_baseline"}


def test_sampled_checks_notice_bias_and_its_absence_and_swapped_variances() -> None:
    args = adv.Args(**SHORT)
    exact, samples = adv.all_estimates(args, 20, 0)
    assert not failed(adv.sampled_checks(args, exact, samples))
    shifted = samples["Q - V"] + 0.05 * exact.gradient()
    assert failed(adv.sampled_checks(args, exact, {**samples, "Q - V": shifted})) == {"unbiased_in_samples"}
    assert failed(adv.sampled_checks(args, exact, {**samples, adv.BIASED: samples["Q - V"]})) == {"bias_is_detected"}
    swapped = {**samples, "Q - V": samples["TD residual"], "TD residual": samples["Q - V"]}
    assert failed(adv.sampled_checks(args, exact, swapped)) == {"variance_falls"}


def test_the_check_of_the_horizon_notices_equal_growth() -> None:
    same = {name: [1.0, 2.0, 4.0] for name in adv.ESTIMATORS}
    assert failed([adv.horizon_check([5, 10, 20], same)]) == {"variance_grows_with_the_horizon"}


# --- options, pictures, runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 1.0}, "--gamma 1.0: a discount is in [0, 1)"),
        ({"gamma": math.nan}, "--gamma nan"),
        ({"gamma": -0.5}, "--gamma -0.5"),
        ({"horizon": 1}, "--horizon 1: must be at least 2"),
        ({"horizons": [5]}, "--horizons 5: give two or more"),
        ({"horizons": []}, "--horizons : give two or more"),
        ({"horizons": [10, 5]}, "--horizons 10 5"),
        ({"horizons": [1, 5]}, "--horizons 1 5"),
        ({"enumerated_horizon": 10}, "--enumerated_horizon 10: must be from 2 to 9"),
        ({"num_trajectories": 10}, "--num_trajectories 10: must be at least 1000"),
        ({"critic_scale": 1.0}, "--critic_scale 1.0: must be a finite number other than 1"),
        ({"critic_scale": math.nan}, "--critic_scale nan"),
    ],
)
def test_a_bad_option_is_named_in_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        adv.Args(**options)
    assert len(caught.value.problems) == 1 and words in caught.value.problems[0]


def test_exact_checks_hold_for_other_options() -> None:
    for gamma, scale in ((0.0, 0.5), (0.5, -1.0), (0.999, 0.0)):
        checks = adv.exact_checks(adv.Args(gamma=gamma, critic_scale=scale, enumerated_horizon=4))
        assert all(check.passed for check in checks), checks


def test_pictures_show_what_they_say() -> None:
    import matplotlib.pyplot as plt

    args = adv.Args(num_trajectories=2000)
    exact, samples = adv.all_estimates(args, 20, 0)
    figure = adv.draw_variances(samples, exact.gradient())
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([adv.trace_interval(samples[name])[0] for name in adv.ESTIMATORS])
    scatter = adv.draw_scatter(samples, exact.gradient())
    assert [axis.get_title() for axis in scatter.axes] == [*adv.UNBIASED, f"{adv.BIASED} (biased)"]
    horizons = adv.draw_horizons([5, 10], {name: [1.0, 4.0] for name in adv.ESTIMATORS}, [1.0, 2.0])
    assert "return: H^2.0" in [text.get_text() for text in horizons.axes[0].get_legend().get_texts()]
    for each in (figure, scatter, horizons):
        assert lesson.png(each).startswith(b"\x89PNG")
    assert not plt.get_fignums()


def command(output: Path, *more: str) -> list[str]:
    words = ["--module", "advantage", "--output_dir", str(output), "--num_trajectories", "5000"]
    return [*words, "--horizons", "5", "40", "--enumerated_horizon", "4", *more]


@pytest.mark.slow
def test_a_small_run_leaves_its_evidence_and_repeats_itself(tmp_path: Path) -> None:
    for name, threads in (("a", 1), ("b", 2)):  # the number of threads must not matter
        torch.set_num_threads(threads)
        assert cli.main(command(tmp_path / name)) == 0
        assert torch.get_num_threads() == threads
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert len(summary["checks"]) == 8 and {check["status"] for check in summary["checks"]} == {"pass"}
    assert summary["eval"] is None and summary["model"] is None
    assert {"training_curves.png", "scatter.png", "horizons.png", "results.json"} <= set(summary["artifacts"])
    assert {"variance/return", "variance/Q - V", "gradient_length"} <= set(summary["metrics"])
    for file in ("log_history.jsonl", "results.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_another_seed_draws_other_trajectories() -> None:
    args = adv.Args(num_trajectories=1000)
    one, other, same = (adv.all_estimates(args, 5, seed)[1]["return"] for seed in (1, 2, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
