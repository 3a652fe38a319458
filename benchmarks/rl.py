"""The lessons' fast parts against their peers, on the same work in one run: `make bench-rl`.

Value iteration against plain torch and numpy and against quantecon; GAE against the plain loop and torchrl; tabular
Q-learning against a Python loop; steps of DQN and CQL against d3rlpy. The peers are installed into `build/peers`, which
nothing else uses: they pin other versions of what this project uses, so their dependencies are named here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "build" / "peers"
PACKAGES = (
    *("quantecon==0.11.4", "numba==0.68.1", "llvmlite", "scipy==1.17.1"),
    *("torchrl==0.14.1", "tensordict==0.15.3", "pyvers", "orjson", "importlib_metadata"),
    *("d3rlpy==2.8.1", "gym==0.26.2", "gym_notices", "structlog", "dataclasses_json", "marshmallow", "typing_inspect"),
    *("mypy_extensions", "h5py", "colorama", "click", "scikit-learn", "joblib", "threadpoolctl", "narwhals"),
)
GAMMA, TOLERANCE = 0.99, 1e-6


def install_peers() -> None:
    if not PEERS.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(PEERS), *PACKAGES]
        subprocess.run(command, check=True)
    sys.path.append(str(PEERS))  # behind the project's own packages


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Least wall time of several calls, after one that compiles and fills caches; of that one alone when it is long."""
    began = time.perf_counter()
    work()
    times = [time.perf_counter() - began]
    if times[0] > 5:
        return times[0]
    times.clear()
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def lesson(name: str) -> Any:
    from llmcore_hf import lesson

    return lesson.load(name).file


# ---------------------------------------------------------------- dynamic programming


def plain_value_iteration(next_state: Any, probability: Any, reward: Any, best: Callable[[Any], Any]) -> Any:
    """Sweeps until the norm bound gamma / (1 - gamma) * |v' - v| certifies the tolerance; for torch and numpy alike."""
    values = reward[0] * 0
    while True:
        following = best(reward + GAMMA * (probability * values[next_state]).sum(-1))
        change = abs(following - values).max()
        values = following
        if change * GAMMA / (1 - GAMMA) <= TOLERANCE:
            return values


def solvers(mdp_lesson: Any, mdp: Any) -> dict[str, Callable[[], Any]]:
    """Ways to the same certified error, by name."""
    from quantecon.markov import DiscreteDP
    from scipy import sparse

    reward, shape = mdp.expected_reward, mdp.next_state.shape
    arrays = [tensor.contiguous().numpy() for tensor in (mdp.next_state, mdp.probability, reward)]
    n_actions, n_states, _ = shape
    pairs = np.arange(n_states * n_actions)
    states, actions = pairs // n_actions, pairs % n_actions  # quantecon wants the pairs state by state
    q = sparse.csr_matrix(
        (
            arrays[1].transpose(1, 0, 2).ravel(),
            arrays[0].transpose(1, 0, 2).ravel(),
            np.arange(0, len(pairs) * shape[2] + 1, shape[2]),
        ),
        shape=(len(pairs), n_states),
    )
    problem = DiscreteDP(arrays[2].T.ravel().copy(), q, GAMMA, states, actions)
    ways: dict[str, Callable[[], Any]] = {
        "ours: `solve`": lambda: mdp_lesson.solve(mdp, GAMMA, TOLERANCE).values,
        "plain torch": lambda: plain_value_iteration(
            mdp.next_state, mdp.probability, reward, lambda backup: backup.amax(0)
        ),
        "plain numpy": lambda: plain_value_iteration(*arrays, lambda backup: backup.max(0)),
    }
    for name, method, epsilon in (
        ("quantecon value iteration", "value_iteration", 2 * TOLERANCE),
        ("quantecon modified policy iteration", "modified_policy_iteration", 2 * TOLERANCE),
        ("quantecon policy iteration", "policy_iteration", None),
    ):
        options = {"epsilon": epsilon} if epsilon else {}
        ways[name] = lambda m=method, o=options: torch.from_numpy(problem.solve(method=m, max_iter=10**6, **o).v.copy())
    return ways


def dynamic_programming(largest: int) -> str:
    module = lesson("mdp")
    lines = [
        f"**Value iteration**, values certified to within {TOLERANCE:g} at gamma {GAMMA}; seconds, and the ratio to `solve`.",
        "",
    ]
    for kind in ("random, fast mixing", "slippery grid, slow mixing"):
        names: list[str] = []
        rows: dict[str, list[str]] = {}
        sizes = [n for n in (1_000, 10_000, 100_000) if n <= largest]
        for n in sizes:
            generator = torch.Generator().manual_seed(0)
            mdp = (
                module.random_mdp(n, 4, 5, generator)
                if kind[0] == "r"
                else module.slippery_grid(round(n**0.5), generator)
            )
            ways = solvers(module, mdp)
            exact, ours = None, 0.0
            for name, work in ways.items():
                if n > 10_000 and not name.startswith(("ours", "quantecon modified")):
                    measured = "-"  # many minutes where mixing is slow; the growth shows in the columns before
                else:
                    results: list[Any] = []
                    took = seconds(lambda w=work, r=results: r.append(w()))
                    found = torch.as_tensor(results[-1])
                    exact = found if exact is None else exact
                    off = float((found - exact).abs().max())
                    if off > 2.1 * TOLERANCE:
                        raise SystemExit(f"{name} on {kind}, {n} states: {off} away from `solve`")
                    ours = ours or took
                    measured = f"{took:.4f} ({took / ours:.1f})"
                rows.setdefault(name, []).append(measured)
                names.append(name)
        lines += [f"| {kind} | {' | '.join(f'{n:,} states' for n in sizes)} |", "|---" * (len(sizes) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(rows[name])} |" for name in dict.fromkeys(names)] + [""]
    return "\n".join(lines)


# ---------------------------------------------------------------- generalized advantage estimation


def plain_gae(steps: tuple[torch.Tensor, ...], gamma: float, lam: float) -> torch.Tensor:
    """The loop of the field, in torch."""
    rewards, values, next_values, terminated, truncated = steps
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_values[t] * ~terminated[t] - values[t]
        last = delta + gamma * lam * ~(terminated[t] | truncated[t]) * last
        advantages[t] = last
    return advantages


def numpy_gae(steps: tuple[np.ndarray, ...], gamma: float, lam: float) -> np.ndarray:
    rewards, values, next_values, terminated, truncated = steps
    delta = rewards + gamma * next_values * ~terminated - values
    carry = np.float32(gamma * lam) * ~(terminated | truncated)
    last = np.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        last = delta[t] + carry[t] * last
        delta[t] = last
    return delta


def advantages() -> tuple[str, bool]:
    from torchrl.objectives.value.functional import generalized_advantage_estimate, vec_generalized_advantage_estimate

    module, gamma, lam = lesson("gae"), 0.99, 0.95
    lines = [
        "**GAE**, T = 2048 steps, float32; milliseconds, and the ratio to ours.",
        "",
        "| environments | ours | torch loop | numpy loop | torchrl loop | torchrl vectorised |",
        "|---|---|---|---|---|---|",
    ]
    never_slower = True
    for n in (64, 1024, 4096):
        generator = torch.Generator().manual_seed(0)
        rewards, values, next_values = (torch.randn(2048, n, generator=generator) for _ in range(3))
        terminated = torch.rand(2048, n, generator=generator) < 0.01
        truncated = torch.rand(2048, n, generator=generator) < 0.01
        steps = (rewards, values, next_values, terminated, truncated)
        arrays = tuple(tensor.numpy() for tensor in steps)
        by_env = [tensor.T.unsqueeze(-1).contiguous() for tensor in (values, next_values, rewards)]  # (N, T, 1)
        ends = [tensor.T.unsqueeze(-1).contiguous() for tensor in (terminated | truncated, terminated)]
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda s=steps: module.gae(*s, gamma, lam),
            "torch": lambda s=steps: plain_gae(s, gamma, lam),
            "numpy": lambda a=arrays: numpy_gae(a, gamma, lam),
            "torchrl": lambda b=by_env, e=ends: generalized_advantage_estimate(gamma, lam, *b, *e)[0],
            "vec": lambda b=by_env, e=ends: vec_generalized_advantage_estimate(gamma, lam, *b, *e)[0],
        }
        expected = plain_gae(steps, gamma, lam)
        for name, work in ways.items():
            found = torch.as_tensor(work())
            found = found.squeeze(-1).T if found.ndim == 3 else found
            if not torch.allclose(found, expected, atol=1e-3):
                raise SystemExit(f"GAE of {name} differs by {(found - expected).abs().max()}")
        took = {name: seconds(work, 7) for name, work in ways.items()}
        never_slower &= took["ours"] <= 1.05 * min(took.values())
        lines.append(
            f"| {n} | {1e3 * took['ours']:.2f} | "
            + " | ".join(f"{1e3 * t:.2f} ({t / took['ours']:.1f})" for name, t in took.items() if name != "ours")
            + " |"
        )
    return "\n".join(lines), never_slower


# ---------------------------------------------------------------- tabular Q-learning


def loop_q_learning(n_steps: int) -> None:
    """Q-learning on the cliff as a plain loop over Gymnasium's table and numpy arrays."""
    import gymnasium as gym

    table: Any = gym.make("CliffWalking-v1").unwrapped
    rng, q, state = np.random.default_rng(0), np.zeros((48, 4)), 36
    for _ in range(n_steps):
        best = np.flatnonzero(q[state] == q[state].max())
        action = int(rng.integers(4)) if rng.random() < 0.1 else int(rng.choice(best))
        _, following, reward, terminated = table.P[state][action][0]
        q[state, action] += 0.5 * (reward + (0 if terminated else q[following].max()) - q[state, action])
        state = 36 if terminated else following


def q_learning() -> str:
    module, n_steps = lesson("td_learning"), 20_000
    loop = n_steps / seconds(lambda: loop_q_learning(n_steps))
    table = module.Table.of("CliffWalking-v1")
    lines = [
        "**Tabular Q-learning** on CliffWalking-v1: steps per second of all runs together, and the ratio to the loop.",
        "",
        f"| Python loop, one run | {loop:,.0f} | 1.0 |",
        "|---|---|---|",
    ]
    for n_runs in (1, 16, 128, 1024, 8192):
        began = time.perf_counter()
        steps = count_steps(module, table, n_runs)
        took = time.perf_counter() - began
        lines.append(f"| ours, {n_runs} runs | {steps / took:,.0f} | {steps / took / loop:.1f} |")
    return "\n".join(lines)


def count_steps(module: Any, table: Any, n_runs: int) -> int:
    """Train all runs for 20 episodes each; the steps that all of them made."""
    made = 0

    class Counting(module.Table):  # type: ignore[misc,name-defined]
        def step(self, *args: Any) -> Any:
            nonlocal made
            made += n_runs
            return super().step(*args)

    module.control(Counting(*table), "Q-learning", n_runs, 20, 0.5, 0.1, torch.Generator().manual_seed(0))
    return made


# ---------------------------------------------------------------- offline RL


def offline(n_steps: int = 500, batch: int = 64, hidden: int = 64) -> str:
    """Gradient steps per second with the same data, network and batch."""
    import d3rlpy
    from d3rlpy.algos import DiscreteCQLConfig, DQNConfig
    from d3rlpy.models.encoders import VectorEncoderFactory

    d3rlpy.logging.set_log_context()
    module = lesson("cql")
    rng = np.random.default_rng(0)
    n = 10_000
    observations = rng.normal(size=(n, 4)).astype(np.float32)
    actions, rewards = rng.integers(2, size=n), np.ones(n, dtype=np.float32)
    terminals = (np.arange(n) % 50 == 49).astype(np.float32)
    data = d3rlpy.dataset.MDPDataset(observations, actions.reshape(-1, 1), rewards.reshape(-1, 1), terminals)
    encoder = VectorEncoderFactory([hidden, hidden])
    lines = [
        f"**Offline RL**: gradient steps per second; 10,000 transitions, {hidden} x {hidden} network, batch {batch}.",
        "",
        "| method | ours, one network | ours, 5 seeds at once (network steps) | d3rlpy | ours / d3rlpy | 5 seeds / d3rlpy |",
        "|---|---|---|---|---|---|",
    ]
    for name, config, alpha in (("DQN", DQNConfig, 0.0), ("CQL", DiscreteCQLConfig, 1.0)):
        more = {"alpha": alpha} if alpha else {}
        peer = config(
            batch_size=batch, gamma=0.99, encoder_factory=encoder, target_update_interval=100, **more
        ).create()
        peer.build_with_dataset(data)

        def train_peer(peer: Any = peer) -> None:
            for _ in range(n_steps):
                peer.update(data.sample_transition_batch(batch))

        rates = [
            ours_steps(module, k, alpha, n_steps, batch, hidden, observations, actions, rewards, terminals)
            for k in (1, 5)
        ]
        theirs = n_steps / seconds(train_peer, 2)
        lines.append(
            f"| {name} | {rates[0]:,.0f} | {5 * rates[1]:,.0f} | {theirs:,.0f} | {rates[0] / theirs:.1f} | {5 * rates[1] / theirs:.1f} |"
        )
    return "\n".join(lines)


def ours_steps(
    module: Any,
    n_networks: int,
    alpha: float,
    n_steps: int,
    batch: int,
    hidden: int,
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    terminals: np.ndarray,
) -> float:
    generator = torch.Generator().manual_seed(0)
    q_net, target = (module.MLPs(n_networks, (4, hidden, hidden, 2), generator) for _ in range(2))
    optimizer = torch.optim.Adam(q_net.parameters(), lr=1e-3)
    weights = module.Weights.of([module.Method("CQL" if alpha else "DQN", 1.0, alpha)], n_networks)
    columns = module.Batch(
        *(torch.from_numpy(a) for a in (observations, actions, rewards, np.roll(observations, -1, 0), terminals))
    )

    def train() -> None:
        for step in range(n_steps):
            if step % 100 == 0:
                target.load_state_dict(q_net.state_dict())
            rows = torch.randint(len(rewards), (n_networks, batch), generator=generator)
            module.train_step(q_net, target, optimizer, module.Batch(*(c[rows] for c in columns)), weights, 0.99)

    return n_steps / seconds(train, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=100_000, help="states of the largest MDP")
    args = parser.parse_args()
    install_peers()
    torch.set_num_threads(1)  # as the lessons run; tensors this small lose by more
    gae_table, never_slower = advantages()
    parts = [
        f"Measured on {tables.machine()}, one thread.",
        dynamic_programming(args.largest),
        gae_table,
        q_learning(),
        offline(),
    ]
    tables.replace("rl", "\n\n".join(part.strip() for part in parts))
    return 0 if never_slower else 1


if __name__ == "__main__":
    sys.exit(main())
