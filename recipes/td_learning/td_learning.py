"""Temporal-difference learning: learn a guess from a guess, before the outcome is known.

Monte Carlo waits for the end of an episode and moves V(S_t) towards the return G_t. TD(0) moves it at once towards the
reward and its own value of the next state,

    V(S_t) <- V(S_t) + alpha [ G_t - V(S_t) ]                                   Sutton & Barto (2nd ed.), eq. 6.1
    V(S_t) <- V(S_t) + alpha [ R_{t+1} + gamma V(S_{t+1}) - V(S_t) ]            eq. 6.2; in brackets: the TD error

Between the two lies n-step TD, whose target is n rewards and then a value (eq. 7.1, 7.2), and TD(lambda), which averages
over all n and is computed forward in time with an eligibility trace (section 12.2, with accumulating traces):

    z_t = gamma lambda z_{t-1} + grad V(S_t),    V <- V + alpha (TD error) z_t          eq. 12.5 to 12.7

For control, Q(S_t, A_t) moves towards R_{t+1} plus gamma times

    Q(S_{t+1}, A_{t+1})                  SARSA: the action that is taken next           eq. 6.7
    sum_a pi(a|S_{t+1}) Q(S_{t+1}, a)    Expected SARSA: the mean over the policy       eq. 6.9
    max_a Q(S_{t+1}, a)                  Q-learning: the best, whatever is done         eq. 6.8

The maximum of noisy estimates is too large on average; Double Q-learning lets one table choose the action and a second
one say its value (eq. 6.10).

What the run shows, each as an average over many independent runs:
1. TD(0) against constant-alpha Monte Carlo on the random walk (Example 6.2).
2. n-step TD and TD(lambda) on the 19-state walk (Figures 7.2 and 12.6 have the same task): the best is in between.
3. SARSA, Expected SARSA and Q-learning on the cliff (Example 6.6): who earns more while exploring, and whose greedy path
   is the shortest.
4. Q-learning against Double Q-learning where the maximum misleads (Example 6.7).

How the code differs from the book: all runs advance together, one tensor operation for one step of each; a run whose
episode is over waits for the others (1, 2) or begins the next (3). A walk does not depend on the values, so all methods
and step sizes learn from the same walks. Ties among the best actions are broken at random. Everything is undiscounted
(gamma = 1), as in these examples.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor

from llmcore_hf import lesson
from llmcore_hf.checks import Check

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmcore_hf.run_dir import RunDirectory

CLIFF = "CliffWalking-v1"


@dataclass
class Args(lesson.LessonArguments):
    env_id: str = field(
        default=CLIFF,
        metadata={
            "help": "Where the control methods are compared: a Gymnasium environment with a transition table `P`."
        },
    )
    step_size: float = field(default=0.5, metadata={"help": "Alpha of the control methods, in (0, 1]."})
    epsilon: float = field(default=0.1, metadata={"help": "Share of random actions of the control methods, in [0, 1]."})
    n_episodes: int = field(default=500, metadata={"help": "Episodes of each run of the control methods."})
    control_runs: int = field(default=500, metadata={"help": "Independent runs of each control method."})
    walk_runs: int = field(default=2000, metadata={"help": "Independent runs on the random walk of five states."})
    long_walk_runs: int = field(default=300, metadata={"help": "Independent runs on the random walk of 19 states."})
    bias_runs: int = field(default=10_000, metadata={"help": "Independent runs of Double Q-learning's example."})

    def problems(self) -> list[str]:
        found = lesson.environment_problems(self.env_id, tabular=True)
        if not 0 < self.step_size <= 1:
            found.append(f"--step_size {self.step_size}: a step size is in (0, 1]")
        if not 0 <= self.epsilon <= 1:
            found.append(f"--epsilon {self.epsilon}: a share is in [0, 1]")
        for name, least in (("n_episodes", 20), ("control_runs", 2), ("walk_runs", 2), ("long_walk_runs", 2)):
            if getattr(self, name) < least:
                found.append(f"--{name} {getattr(self, name)}: at least {least}")
        if self.bias_runs < 2:
            found.append(f"--bias_runs {self.bias_runs}: at least 2")
        return found


# ---------------------------------------------------------------------------------------------------------------------
# 1. and 2. Prediction on random walks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """States 1 to n in a row; left or right with equal chance; 0 and n + 1 end the episode with a reward.

    Attributes:
        n_states: n.
        left, right: reward on reaching either end.
        initial: first guess of every value.
    """

    n_states: int
    left: float
    right: float
    initial: float

    @property
    def true_values(self) -> Tensor:
        """(n,): the value is linear between the two ends."""
        position = torch.arange(1, self.n_states + 1, dtype=torch.float64) / (self.n_states + 1)
        return self.left + (self.right - self.left) * position

    def first_values(self, *shape: int) -> Tensor:
        """(*shape, n + 2) values before learning; those of both ends are 0."""
        values = torch.full((*shape, self.n_states + 2), self.initial, dtype=torch.float64)
        values[..., [0, -1]] = 0.0
        return values

    def rms_error(self, values: Tensor) -> Tensor:
        """(...,) root of the mean squared error over the states of values (..., n + 2)."""
        return (values[..., 1:-1] - self.true_values).square().mean(-1).sqrt()


class Episodes(NamedTuple):
    """One episode of each of R runs, which all start in the middle."""

    states: Tensor  # (T + 1, R), int64; a run that has ended stays where it ended
    length: Tensor  # (R,), steps until the end
    outcome: Tensor  # (R,), the reward at the end; all others are 0

    @classmethod
    def sample(cls, walk: Walk, n_runs: int, generator: torch.Generator) -> Episodes:
        state = torch.full((n_runs,), (walk.n_states + 1) // 2)
        states, length = [state], torch.zeros(n_runs, dtype=torch.int64)
        while (alive := (state > 0) & (state <= walk.n_states)).any():
            move = torch.randint(2, (n_runs,), generator=generator) * 2 - 1
            state = torch.where(alive, state + move, state)
            states.append(state)
            length += alive
        return cls(torch.stack(states), length, torch.where(state == 0, walk.left, walk.right).double())


def n_step_td(values: Tensor, episodes: Episodes, n: Tensor, alphas: Tensor) -> None:
    """Update values (N, K, R, S + 2) in place by one episode: n-step TD for N numbers of steps and K step sizes.

    The target of S_t is the reward at the end if the episode ends within n steps, else V(S_{t+n}) (eq. 7.1 with gamma =
    1 and rewards at the end alone). With n = 1 this is TD(0), with an n beyond every episode constant-alpha Monte Carlo.

    Args:
        n: (N,) numbers of steps.
        alphas: (K,) step sizes.
    """
    states, length, outcome = episodes
    shape = values.shape[:-1]  # (N, K, R)
    for t in range(len(states) - 1):
        ahead = (t + n).clamp(max=len(states) - 1)  # (N,)
        ends = (t + n).unsqueeze(1) >= length  # (N, R)
        bootstrap = values.gather(3, states[ahead].unsqueeze(1).expand(shape).unsqueeze(3)).squeeze(3)
        target = torch.where(ends.unsqueeze(1), outcome, bootstrap)  # (N, K, R)
        here = states[t].expand(shape).unsqueeze(3)
        step = alphas.unsqueeze(1) * (target.unsqueeze(3) - values.gather(3, here)).squeeze(3)
        values.scatter_add_(3, here, (step * (t < length)).unsqueeze(3))


def td_lambda(values: Tensor, episodes: Episodes, lambdas: Tensor, alphas: Tensor) -> None:
    """Update values (L, K, R, S + 2) in place by one episode: online TD(lambda) with accumulating traces.

    Args:
        lambdas: (L,).
        alphas: (K,) step sizes.
    """
    states, length, outcome = episodes
    shape = values.shape[:-1]  # (L, K, R)
    traces = torch.zeros_like(values)
    for t in range(len(states) - 1):
        here, following = (states[i].expand(shape).unsqueeze(3) for i in (t, t + 1))
        reward = torch.where(t + 1 == length, outcome, 0.0)  # (R,)
        error = reward + (values.gather(3, following) - values.gather(3, here)).squeeze(3)  # (L, K, R)
        traces *= lambdas.view(-1, 1, 1, 1)
        traces.scatter_add_(3, here, torch.ones_like(here, dtype=values.dtype))
        values += (alphas.unsqueeze(1) * error * (t < length)).unsqueeze(3) * traces


class Learned(NamedTuple):
    """What several methods made of the short walk."""

    errors: Tensor  # (E + 1, M, R), RMS error before the first and after each episode
    values: dict[int, Tensor]  # episode -> (M, S), mean over the runs


TD_ALPHAS, MC_ALPHAS = (0.05, 0.1, 0.15), (0.01, 0.02, 0.03, 0.04)
WALK, WALK_EPISODES = Walk(5, 0.0, 1.0, 0.5), 100
SHOWN = (0, 1, 10, 100)  # episodes after which the estimates are drawn


def learn_short_walk(n_runs: int, generator: torch.Generator) -> Learned:
    """Example 6.2: TD(0) with each of `TD_ALPHAS`, then Monte Carlo with each of `MC_ALPHAS`, on the same walks."""
    td, mc = (WALK.first_values(1, len(alphas), n_runs) for alphas in (TD_ALPHAS, MC_ALPHAS))
    alphas = [torch.tensor(numbers, dtype=torch.float64) for numbers in (TD_ALPHAS, MC_ALPHAS)]
    one, unbounded = torch.tensor([1]), torch.tensor([2**40])
    errors, shown = [], {}
    for episode in range(WALK_EPISODES + 1):
        if episode:
            walks = Episodes.sample(WALK, n_runs, generator)
            n_step_td(td, walks, one, alphas[0])
            n_step_td(mc, walks, unbounded, alphas[1])
        both = torch.cat([td[0], mc[0]])  # (M, R, S + 2)
        errors.append(WALK.rms_error(both))
        if episode in SHOWN:
            shown[episode] = both[..., 1:-1].mean(1)
    return Learned(torch.stack(errors), shown)


LONG_WALK, LONG_EPISODES = Walk(19, -1.0, 1.0, 0.0), 10
N_STEPS, LAMBDAS = (1, 2, 4, 8, 16, 32), (0.0, 0.4, 0.8, 0.9, 0.95, 1.0)
LONG_ALPHAS = (0.01, 0.02, 0.03, *(round(0.05 * i, 2) for i in range(1, 21)))


def learn_long_walk(n_runs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Figure 7.2's task: RMS error over the first ten episodes, for all n and all lambda, (N, K, R) and (L, K, R)."""
    n, lambdas = torch.tensor(N_STEPS), torch.tensor(LAMBDAS, dtype=torch.float64)
    alphas = torch.tensor(LONG_ALPHAS, dtype=torch.float64)
    by_n, by_lambda = (LONG_WALK.first_values(len(m), len(alphas), n_runs) for m in (n, lambdas))
    error_n, error_lambda = torch.zeros(by_n.shape[:-1]), torch.zeros(by_lambda.shape[:-1])
    for _ in range(LONG_EPISODES):
        walks = Episodes.sample(LONG_WALK, n_runs, generator)
        n_step_td(by_n, walks, n, alphas)
        td_lambda(by_lambda, walks, lambdas, alphas)
        error_n += LONG_WALK.rms_error(by_n) / LONG_EPISODES
        error_lambda += LONG_WALK.rms_error(by_lambda) / LONG_EPISODES
    return error_n, error_lambda


# ---------------------------------------------------------------------------------------------------------------------
# 3. Control with tables
# ---------------------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A Gymnasium environment's `P` as tensors; K outcomes per pair, those of probability 0 fill the rows up."""

    cumulative: Tensor  # (S, A, K), cumulative probability
    next_state: Tensor  # (S, A, K)
    reward: Tensor  # (S, A, K)
    terminated: Tensor  # (S, A, K)
    start: Tensor  # (S,), distribution of the first state

    @classmethod
    def of(cls, env_id: str) -> Table:
        env = gym.make(env_id)
        inner: Any = env.unwrapped
        n_states, n_actions = int(inner.observation_space.n), int(inner.action_space.n)
        longest = max(len(inner.P[s][a]) for s in range(n_states) for a in range(n_actions))
        filler = [(0.0, 0, 0.0, True)]
        rows = [
            [list(inner.P[s][a]) + filler * (longest - len(inner.P[s][a])) for a in range(n_actions)]
            for s in range(n_states)
        ]
        probability, next_state, reward, terminated = torch.tensor(rows, dtype=torch.float64).unbind(-1)
        start = torch.as_tensor(inner.initial_state_distrib, dtype=torch.float64)
        env.close()
        return cls(probability.cumsum(-1), next_state.long(), reward, terminated.bool(), start)

    @property
    def shape(self) -> tuple[int, int]:
        return self.reward.shape[0], self.reward.shape[1]

    def step(self, states: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next states, rewards and ends (R,) of R runs; `draws` (R,) are uniform numbers in [0, 1)."""
        outcome = (draws.unsqueeze(1) >= self.cumulative[states, actions, :-1]).sum(1)  # (R,)
        pick = (states, actions, outcome)
        return self.next_state[pick], self.reward[pick], self.terminated[pick]


METHODS = ("SARSA", "Expected SARSA", "Q-learning")


def choose(q: Tensor, epsilon: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Epsilon-greedy actions (R,) for action values (R, A), and whether each is a best one; ties are broken at random."""
    best = q == q.amax(1, keepdim=True)
    ranks = torch.rand(q.shape, generator=generator)
    explores = torch.rand(len(q), generator=generator) < epsilon
    return torch.where(explores, ranks.argmax(1), (ranks + best).argmax(1)), best


def target_of(method: str, q: Tensor, actions: Tensor, best: Tensor, epsilon: float) -> Tensor:
    """(R,) value of the next state: eq. 6.7, 6.9, 6.8. q (R, A) of the next state, actions (R,) taken there."""
    if method == "SARSA":
        return q.gather(1, actions.unsqueeze(1)).squeeze(1)
    if method == "Q-learning":
        return q.amax(1)
    greedy = (q * best).sum(1) / best.sum(1)
    return epsilon * q.mean(1) + (1 - epsilon) * greedy


def control(
    table: Table,
    method: str,
    n_runs: int,
    n_episodes: int,
    step_size: float,
    epsilon: float,
    generator: torch.Generator,
    max_steps: int = 1_000_000,
) -> tuple[Tensor, Tensor]:
    """Learn Q (R, S, A) in R runs at once; also the undiscounted return of every episode, (n_episodes, R).

    A run that has finished its episodes goes on without learning until the slowest is done.

    Raises:
        RuntimeError: the episodes are not over after `max_steps` steps.
    """
    n_states, n_actions = table.shape
    runs = torch.arange(n_runs)
    q = torch.zeros(n_runs, n_states, n_actions, dtype=torch.float64)
    returns = torch.zeros(n_episodes + 1, n_runs, dtype=torch.float64)  # the last row takes what comes after the end
    episode = torch.zeros(n_runs, dtype=torch.int64)

    def first_states() -> Tensor:
        return torch.multinomial(table.start, n_runs, replacement=True, generator=generator)

    states = first_states()
    actions, _ = choose(q[runs, states], epsilon, generator)
    for _ in range(max_steps):
        draws = torch.rand(n_runs, generator=generator, dtype=torch.float64)
        following, rewards, ends = table.step(states, actions, draws)
        next_actions, best = choose(q[runs, following], epsilon, generator)
        ahead = target_of(method, q[runs, following], next_actions, best, epsilon)
        error = rewards + torch.where(ends, 0.0, ahead) - q[runs, states, actions]
        learns = episode < n_episodes
        q[runs, states, actions] += step_size * error * learns
        returns[episode, runs] += rewards
        episode = torch.where(ends & learns, episode + 1, episode)
        if not (episode < n_episodes).any():
            return q, returns[:-1]
        if ends.any():  # the first state of an episode is left by an action chosen there
            following = torch.where(ends, first_states(), following)
            restarted, _ = choose(q[runs, following], epsilon, generator)
            next_actions = torch.where(ends, restarted, next_actions)
        states, actions = following, next_actions
        if method != "SARSA":  # the update may have changed what is best here
            actions, _ = choose(q[runs, states], epsilon, generator)
    raise RuntimeError(f"{method}: {int(episode.min())} of {n_episodes} episodes after {max_steps} steps")


def greedy_returns(table: Table, q: Tensor, limit: int = 200) -> tuple[Tensor, Tensor]:
    """Return of the greedy policy of each run, NaN where no end is reached, and the states on its way, (limit + 1, R).

    For deterministic environments; the first of several best actions is taken.
    """
    runs = torch.arange(len(q))
    states = table.start.argmax().expand(len(q))
    total, alive, path = torch.zeros(len(q), dtype=torch.float64), torch.ones(len(q), dtype=torch.bool), [states]
    for _ in range(limit):
        following, rewards, ends = table.step(states, q[runs, states].argmax(1), torch.zeros(len(q)))
        total += torch.where(alive, rewards, 0.0)
        states = torch.where(alive, following, states)
        alive = alive & ~ends
        path.append(states)
    return torch.where(alive, math.nan, total), torch.stack(path)


def table_is_the_environment(table: Table, env_id: str, n_steps: int, generator: torch.Generator) -> int:
    """Random steps on which Gymnasium's own `step` gave an outcome that the table does not have there; must be 0."""
    env = gym.make(env_id)
    state, _ = env.reset(seed=int(torch.randint(2**31, (1,), generator=generator)))
    wrong = 0
    for action in torch.randint(table.shape[1], (n_steps,), generator=generator).tolist():
        following, reward, terminated, truncated, _ = env.step(action)
        possible = table.cumulative[state, action].diff(prepend=torch.zeros(1, dtype=torch.float64)) > 0
        same = (table.next_state[state, action] == following) & (table.reward[state, action] == reward)
        wrong += not bool((possible & same & (table.terminated[state, action] == terminated)).any())
        state = env.reset()[0] if terminated or truncated else following
    env.close()
    return wrong


# ---------------------------------------------------------------------------------------------------------------------
# 4. The bias of the maximum
# ---------------------------------------------------------------------------------------------------------------------

BIAS_EPISODES, BIAS_ALPHA, BIAS_EPSILON, B_ACTIONS = 300, 0.1, 0.1, 10


def left_actions(double: bool, n_runs: int, generator: torch.Generator, n_episodes: int = BIAS_EPISODES) -> Tensor:
    """(E, R) whether each episode of Example 6.7 began with `left`.

    In A, right ends with 0 and left goes to B; there each of ten actions ends with a reward from N(-0.1, 1). Left is
    worth -0.1, but the maximum of ten estimates looks better than 0 until they are good.
    """
    tables = 2 if double else 1
    q_a = torch.zeros(tables, n_runs, 2, dtype=torch.float64)  # left, right
    q_b = torch.zeros(tables, n_runs, B_ACTIONS, dtype=torch.float64)
    runs, went_left = torch.arange(n_runs), []
    for _ in range(n_episodes):
        first, _ = choose(q_a.sum(0), BIAS_EPSILON, generator)
        second, _ = choose(q_b.sum(0), BIAS_EPSILON, generator)
        left = first == 0
        went_left.append(left)
        reward = torch.randn(n_runs, generator=generator, dtype=torch.float64) - 0.1
        # which table learns, in A and in B; the other one judges
        learner_a, learner_b = (torch.randint(tables, (n_runs,), generator=generator) for _ in range(2))
        judge = (tables - 1) - learner_a if double else learner_a
        chosen, _ = choose(q_b[learner_a, runs], 0.0, generator)
        ahead = q_b[judge, runs, chosen]
        q_a[learner_a, runs, first] += BIAS_ALPHA * (torch.where(left, ahead, 0.0) - q_a[learner_a, runs, first])
        q_b[learner_b, runs, second] += BIAS_ALPHA * left * (reward - q_b[learner_b, runs, second])
    return torch.stack(went_left)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Everything that is drawn and checked."""

    short: Learned
    by_n: Tensor  # (N, K, R)
    by_lambda: Tensor  # (L, K, R)
    returns: dict[str, Tensor]  # method -> (E, R)
    q: dict[str, Tensor]  # method -> (R, S, A)
    left: dict[str, Tensor]  # (E, R)


def run(args: Args, run_dir: RunDirectory) -> None:
    """Learn, log, draw, check."""
    generator = torch.Generator().manual_seed(args.seed)
    table = Table.of(args.env_id)
    short = learn_short_walk(args.walk_runs, generator)
    by_n, by_lambda = learn_long_walk(args.long_walk_runs, generator)
    how = (args.control_runs, args.n_episodes, args.step_size, args.epsilon, generator)
    learned = {method: control(table, method, *how) for method in METHODS}
    left = {
        name: left_actions(double, args.bias_runs, generator)
        for name, double in (("Q-learning", False), ("Double Q-learning", True))
    }
    found = Results(
        short, by_n, by_lambda, {m: r for m, (_, r) in learned.items()}, {m: q for m, (q, _) in learned.items()}, left
    )
    log(found, run_dir)
    run_dir.write("training_curves.png", lesson.png(draw_curves(found, args)))
    run_dir.write("random_walk.png", lesson.png(draw_estimates(short)))
    if args.env_id == CLIFF:
        run_dir.write("cliff_paths.png", lesson.png(draw_paths(table, found.q)))
    run_dir.write("results.json", json.dumps(summary(found), indent=2) + "\n")
    run_dir.checks += [
        table_check(table, args, generator),
        *walk_checks(found),
        *control_checks(table, found, args),
        *bias_checks(found),
    ]


def log(found: Results, run_dir: RunDirectory) -> None:
    """One row per episode, up to the longest of the experiments."""
    names = [f"walk/td_alpha_{a}" for a in TD_ALPHAS] + [f"walk/mc_alpha_{a}" for a in MC_ALPHAS]
    series = {f"{n}/rms_error": found.short.errors[1:, m].mean(1) for m, n in enumerate(names)}
    short_names = {"SARSA": "sarsa", "Expected SARSA": "expected_sarsa", "Q-learning": "q_learning"}
    series |= {f"control/{short_names[m]}/return": r.mean(1) for m, r in found.returns.items()}
    series |= {
        "bias/q_learning/left": found.left["Q-learning"].double().mean(1),
        "bias/double_q_learning/left": found.left["Double Q-learning"].double().mean(1),
    }
    for episode in range(max(map(len, series.values()))):
        run_dir.log({"step": episode + 1, **{n: float(s[episode]) for n, s in series.items() if episode < len(s)}})


def best_alpha(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Over (M, K, R): index of the best step size and its error per run, (M,) and (M, R)."""
    best = errors.mean(2).nan_to_num(math.inf).argmin(1)
    return best, errors[torch.arange(len(errors)), best]


def summary(found: Results) -> dict[str, Any]:
    """The figures of the run, means over runs, with their standard errors."""
    n_best, n_error = best_alpha(found.by_n)
    l_best, l_error = best_alpha(found.by_lambda)
    return {
        "rms_error_after_100_episodes": {
            name: mean_and_error(found.short.errors[-1, m])
            for m, name in enumerate([f"TD {a}" for a in TD_ALPHAS] + [f"MC {a}" for a in MC_ALPHAS])
        },
        "best_of_n": {
            n: {"alpha": LONG_ALPHAS[int(n_best[i])], **mean_and_error(n_error[i])} for i, n in enumerate(N_STEPS)
        },
        "best_of_lambda": {
            lam: {"alpha": LONG_ALPHAS[int(l_best[i])], **mean_and_error(l_error[i])} for i, lam in enumerate(LAMBDAS)
        },
        "online_return_last_fifth": {m: mean_and_error(late_return(r)) for m, r in found.returns.items()},
        "share_of_left": {
            name: {episode: float(left[episode - 1].double().mean()) for episode in (10, 100, 300)}
            for name, left in found.left.items()
        },
    }


def late_return(returns: Tensor) -> Tensor:
    """(R,) mean return of each run over the last fifth of its episodes (E, R)."""
    return returns[-(len(returns) // 5) :].mean(0)


def mean_and_error(samples: Tensor) -> dict[str, float]:
    """Mean over runs (R,) and its standard error."""
    return {"mean": float(samples.mean()), "standard_error": float(samples.std() / math.sqrt(len(samples)))}


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------

# Reference values and the number of runs behind each. They agree with the book's figures as far as those can be read.
WALK_REFERENCE = {
    "TD 0.05": 0.0355, "TD 0.1": 0.0556, "TD 0.15": 0.0705,
    "MC 0.01": 0.0974, "MC 0.02": 0.0822, "MC 0.03": 0.0941, "MC 0.04": 0.1080,
}  # fmt: skip
N_REFERENCE = {1: 0.344, 2: 0.274, 4: 0.262, 8: 0.276, 16: 0.318}
LAMBDA_REFERENCE = {0.0: 0.344, 0.8: 0.259, 1.0: 0.504}
RETURN_REFERENCE = {"SARSA": -27.2, "Expected SARSA": -20.7, "Q-learning": -49.7}
LEFT_REFERENCE = {
    "Q-learning": {10: 0.872, 100: 0.461, 300: 0.120},
    "Double Q-learning": {10: 0.449, 100: 0.093, 300: 0.069},
}
REFERENCE_RUNS = {"walk": 2000, "long walk": 300, "control": 500, "bias": 200_000}
Z, ROUNDING = 5.0, 0.0015  # standard errors, and what the reference values were rounded by


def near(samples: Tensor, expected: float, reference_runs: int, rounding: float = ROUNDING) -> bool:
    """Does the mean of the runs (R,) agree with a mean of so many runs, within 5 standard errors of the difference?"""
    error = float(samples.double().std()) * math.sqrt(1 / len(samples) + 1 / reference_runs)
    return abs(float(samples.double().mean()) - expected) < Z * error + rounding


def table_check(table: Table, args: Args, generator: torch.Generator) -> Check:
    wrong = table_is_the_environment(table, args.env_id, 2000, generator)
    return Check(
        "td_learning.table_is_the_environment",
        "invariant",
        wrong == 0,
        wrong,
        "0 of 2000 random steps of Gymnasium's environment with an outcome that the table does not have",
        "批量运行用的转移表必须与环境一致，否则学到的是另一个问题。",
        "The table that all runs step through must be the environment; otherwise another problem is solved.",
    )


def walk_checks(found: Results) -> list[Check]:
    after = summary(found)
    errors = dict(zip(WALK_REFERENCE, found.short.errors[-1], strict=True))  # method -> (R,)
    agree = {name: near(errors[name], value, REFERENCE_RUNS["walk"]) for name, value in WALK_REFERENCE.items()}
    best_td = min(float(errors[name].mean()) for name in WALK_REFERENCE if name.startswith("TD"))
    best_mc = min(float(errors[name].mean()) for name in WALK_REFERENCE if name.startswith("MC"))
    n_error, l_error = best_alpha(found.by_n)[1], best_alpha(found.by_lambda)[1]
    long_walk = {
        f"n = {n}": near(n_error[N_STEPS.index(n)], v, REFERENCE_RUNS["long walk"]) for n, v in N_REFERENCE.items()
    }
    long_walk |= {
        f"lambda = {lam}": near(l_error[LAMBDAS.index(lam)], value, REFERENCE_RUNS["long walk"])
        for lam, value in LAMBDA_REFERENCE.items()
    }
    means = {n: float(e.mean()) for n, e in zip(N_STEPS, n_error, strict=True)}
    best_n = min(means, key=lambda n: means[n])
    one = float((found.by_lambda[0] - found.by_n[0]).abs().max())  # TD(lambda = 0) and 1-step TD are both TD(0)
    return [
        Check(
            "td_learning.example_6_2",
            "invariant",
            all(agree.values()),
            {name: value["mean"] for name, value in after["rms_error_after_100_episodes"].items()},
            f"RMS error after 100 episodes within {Z:g} standard errors of {WALK_REFERENCE}",
            "随机游走上的误差应重现例 6.2；不符说明更新目标或步长用错。",
            "The errors on the random walk reproduce Example 6.2; if not, a target or a step size is wrong.",
        ),
        Check(
            "td_learning.td_beats_monte_carlo",
            "learning",
            best_td < best_mc,
            {"TD": best_td, "MC": best_mc},
            "the best TD has a smaller error than the best Monte Carlo",
            "TD 利用马尔可夫结构做自举，同样的回合数下误差更小。",
            "TD uses that the process is Markov, and errs less after the same number of episodes.",
        ),
        Check(
            "td_learning.figure_7_2",
            "invariant",
            all(long_walk.values()),
            {f"n = {n}": v["mean"] for n, v in after["best_of_n"].items()}
            | {f"lambda = {lam}": v["mean"] for lam, v in after["best_of_lambda"].items()},
            f"best RMS error over 10 episodes within {Z:g} standard errors of {N_REFERENCE} (n), {LAMBDA_REFERENCE} (lambda)",
            "19 状态随机游走上各 n 与 λ 的最佳误差应重现图 7.2。",
            "The best errors for each n and lambda reproduce Figure 7.2 and its like for TD(lambda).",
        ),
        Check(
            "td_learning.in_between_is_best",
            "learning",
            1 < best_n < max(N_STEPS),
            {f"n = {n}": value for n, value in means.items()},
            "the best n is neither 1 nor the largest",
            "n 太小偏差大，n 太大方差大，最好的在中间。",
            "A small n keeps the bias of the guess, a large one the variance of the outcome; the best is in between.",
        ),
        Check(
            "td_learning.lambda_0_is_one_step",
            "invariant",
            one < 1e-9,
            one,
            "TD(lambda = 0) = 1-step TD on the same walks, within 1e-9",
            "λ=0 时资格迹只剩当前状态，TD(λ) 就是 TD(0)。",
            "With lambda = 0 the trace is the present state alone, and TD(lambda) is TD(0).",
        ),
    ]  # fmt: skip


def control_checks(table: Table, found: Results, args: Args) -> list[Check]:
    book = (args.env_id, args.step_size, args.epsilon, args.n_episodes) == (CLIFF, 0.5, 0.1, 500)
    late = {method: late_return(returns) for method, returns in found.returns.items()}
    agree = (
        all(near(late[m], v, REFERENCE_RUNS["control"], 0.05) for m, v in RETURN_REFERENCE.items()) if book else None
    )
    first = {method: float(returns[:5].mean()) for method, returns in found.returns.items()}
    rose = {method: float(late[method].mean()) - first[method] for method in METHODS}
    greedy = {method: greedy_returns(table, found.q[method])[0] for method in METHODS} if args.env_id == CLIFF else {}
    paths = None
    if book:
        paths = bool((greedy["Q-learning"] == -13).all() and (greedy["Expected SARSA"] == -15).all())
    return [
        Check(
            "td_learning.cliff_online_returns",
            "invariant",
            agree,
            {method: float(late[method].mean()) for method in METHODS},
            f"mean return of the last fifth of 500 episodes within {Z:g} standard errors of {RETURN_REFERENCE}",
            "悬崖行走上的在线回报应重现例 6.6：同策略的 SARSA 绕开悬崖，Q-learning 因探索常跌落。",
            "Online returns reproduce Example 6.6: SARSA keeps away from the cliff, Q-learning falls while it explores.",
        ),
        Check(
            "td_learning.cliff_greedy_paths",
            "learning",
            paths,
            {
                method: {
                    "reaches_the_goal": float((~values.isnan()).double().mean()),
                    "median_return": float(values.nanmedian()) if not bool(values.isnan().all()) else None,
                }
                for method, values in greedy.items()
            },
            "greedy return in every run: Q-learning -13 (the shortest path), Expected SARSA -15",
            "Q-learning 学到最短路（-13）；Expected SARSA 考虑探索，离悬崖远一格（-15）。SARSA 受采样噪声影响，不作断言。",
            "Q-learning learns the shortest path (-13), Expected SARSA one row farther from the cliff (-15). SARSA's path "
            "depends on its noise, so nothing is asserted about it.",
        ),
        Check(
            "td_learning.returns_rose",
            "learning",
            all(gain > 0 for gain in rose.values()),
            rose,
            "every method earns more in the last fifth of its episodes than in the first five",
            "回报没有上升说明没有学到东西：检查步长、探索率和更新目标。",
            "A return that does not rise says that nothing was learned: look at step size, exploration and target.",
        ),
    ]


def bias_checks(found: Results) -> list[Check]:
    shares = {name: {e: found.left[name][e - 1] for e in reference} for name, reference in LEFT_REFERENCE.items()}
    agree = all(
        near(shares[name][episode], value, REFERENCE_RUNS["bias"])
        for name, reference in LEFT_REFERENCE.items()
        for episode, value in reference.items()
    )
    peak = {name: float(left.double().mean(1).max()) for name, left in found.left.items()}
    observed = {f"{n}, episode {e}": float(s.double().mean()) for n, by in shares.items() for e, s in by.items()}
    return [
        Check(
            "td_learning.example_6_7",
            "invariant",
            agree,
            observed,
            f"share of `left` within {Z:g} standard errors of {LEFT_REFERENCE}",
            "最大化偏差例 6.7：Q-learning 起初大多选 left，Double Q-learning 没有这种偏好。",
            "Example 6.7: Q-learning takes `left` far too often at first, Double Q-learning does not.",
        ),
        Check(
            "td_learning.maximum_misleads",
            "learning",
            peak["Q-learning"] > 0.8 and peak["Double Q-learning"] < 0.65,
            peak,
            "highest share of `left`: above 0.8 with one table, below 0.65 with two (5 % would be best)",
            "用同一张表既选动作又估值，噪声的最大值被当成价值；两张表分开就消除了偏差。",
            "One table that chooses and judges takes the largest noise for value; two tables remove that bias.",
        ),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

COLORS = {"SARSA": "#1f77b4", "Expected SARSA": "#2ca02c", "Q-learning": "#d62728", "Double Q-learning": "#9467bd"}


def draw_curves(found: Results, args: Args) -> Figure:
    """Four panels, one per experiment."""
    figure, axes = lesson.pyplot().subplots(2, 2, figsize=(12.5, 9), layout="constrained")
    draw_short_walk(axes[0, 0], found.short)
    draw_long_walk(axes[0, 1], found)
    draw_control(axes[1, 0], found.returns, args)
    draw_bias(axes[1, 1], found.left)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    return figure


def draw_short_walk(axis: Axes, short: Learned) -> None:
    plt = lesson.pyplot()
    curves = short.errors.mean(2)  # (E + 1, M)
    for m, alpha in enumerate((*TD_ALPHAS, *MC_ALPHAS)):
        is_td = m < len(TD_ALPHAS)
        shade = (m + 1) / len(TD_ALPHAS) if is_td else (m - len(TD_ALPHAS) + 1) / len(MC_ALPHAS)
        color = (plt.cm.Blues if is_td else plt.cm.Reds)(0.35 + 0.55 * shade)
        axis.plot(curves[:, m], color=color, label=f"{'TD(0)' if is_td else 'MC'}, alpha {alpha}", lw=1.7)
    axis.set(title="Guess from a guess, or wait for the outcome? (Example 6.2)", xlabel="episodes", ylim=(0, None))
    axis.set_ylabel("RMS error of the values")
    axis.legend(fontsize=8, ncol=2, frameon=False)


def draw_long_walk(axis: Axes, found: Results) -> None:
    plt = lesson.pyplot()
    for i, n in enumerate(N_STEPS):
        axis.plot(LONG_ALPHAS, found.by_n[i].mean(1), color=plt.cm.viridis(i / len(N_STEPS)), label=f"n = {n}", lw=1.7)
    best = LAMBDAS.index(0.8)
    axis.plot(LONG_ALPHAS, found.by_lambda[best].mean(1), "k--", label="TD(lambda = 0.8)", lw=1.5)
    axis.set(title="How far to look ahead? (Figure 7.2)", xlabel="step size alpha", ylim=(0.24, 0.63))
    axis.set_ylabel("RMS error over the first 10 episodes")
    axis.legend(fontsize=8, framealpha=1, edgecolor="none", loc="upper center", ncol=4)


def draw_control(axis: Axes, returns: dict[str, Tensor], args: Args) -> None:
    for method, series in returns.items():
        mean = series.mean(1)
        smooth = mean.unfold(0, 10, 1).mean(1) if len(mean) >= 20 else mean
        axis.plot(range(len(mean) - len(smooth) + 1, len(mean) + 1), smooth, color=COLORS[method], label=method, lw=1.7)
    if args.env_id == CLIFF:
        axis.axhline(-13, color="black", lw=0.9, ls=":", label="shortest path: -13")
        axis.set_ylim(-100, 0)
    axis.set_title(f"Who earns more while exploring? ({args.env_id}, epsilon {args.epsilon:g})")
    axis.set(xlabel="episodes", ylabel="return of an episode (mean over runs, 10 episodes)")
    axis.legend(fontsize=8, frameon=False, loc="lower right")


def draw_bias(axis: Axes, left: dict[str, Tensor]) -> None:
    for name, series in left.items():
        axis.plot(range(1, len(series) + 1), 100 * series.double().mean(1), color=COLORS[name], label=name, lw=1.7)
    axis.axhline(100 * BIAS_EPSILON / 2, color="black", lw=0.9, ls=":", label="best: 5 %")
    axis.set(
        title="Does the maximum mislead? (Example 6.7)", xlabel="episodes", ylabel="% left actions in A", ylim=(0, 100)
    )
    axis.legend(fontsize=8, frameon=False)


def draw_estimates(short: Learned) -> Figure:
    """Mean estimates of TD(0) and Monte Carlo beside the true values, as they grow."""
    plt = lesson.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained", sharey=True)
    names = ["A", "B", "C", "D", "E"]
    columns = {
        "TD(0), alpha 0.1": TD_ALPHAS.index(0.1),
        "Monte Carlo, alpha 0.02": len(TD_ALPHAS) + MC_ALPHAS.index(0.02),
    }
    for axis, (title, m) in zip(axes, columns.items(), strict=True):
        for i, (episode, values) in enumerate(short.values.items()):
            color = plt.cm.viridis(0.9 - 0.28 * i)
            axis.plot(names, values[m], "o-", color=color, label=f"after {episode} episodes", lw=1.6)
        axis.plot(names, WALK.true_values, "k:", label="true values", lw=2)
        axis.set(title=f"How do the estimates grow? {title}", xlabel="state")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("value (mean over runs)")
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def draw_paths(table: Table, q: dict[str, Tensor]) -> Figure:
    """The greedy path of most runs on the 4 x 12 grid, one panel per method."""
    figure, axes = lesson.pyplot().subplots(len(q), 1, figsize=(8.2, 2.35 * len(q)), layout="constrained")
    for axis, (method, values) in zip(axes, q.items(), strict=True):
        returns, paths = greedy_returns(table, values)
        axis.set_title(f"{method}: {_path_title(returns)}", fontsize=11)
        axis.add_patch(lesson.pyplot().Rectangle((0.5, 2.5), 10, 1, color="#444444"))
        axis.text(5.5, 3, "the cliff: -100", color="white", ha="center", va="center")
        for label, x in (("S", 0), ("G", 11)):
            circle = {"boxstyle": "circle", "facecolor": "white", "edgecolor": "black"}
            axis.text(x, 3, label, ha="center", va="center", fontweight="bold", bbox=circle, zorder=5)
        if not bool(returns.isnan().all()):
            usual = returns.nanmedian()
            run = int((returns == usual).nonzero()[0])
            path = torch.unique_consecutive(paths[:, run])
            axis.plot(path % 12, path // 12, "-o", color=COLORS[method], ms=4, lw=2, alpha=0.85)
        axis.set(xlim=(-0.5, 11.5), ylim=(3.5, -0.5), xticks=[], yticks=[], aspect="equal")
        for edge in range(1, 12):
            axis.axvline(edge - 0.5, color="#dddddd", lw=0.6, zorder=0)
        for edge in range(1, 4):
            axis.axhline(edge - 0.5, color="#dddddd", lw=0.6, zorder=0)
    return figure


def _path_title(returns: Tensor) -> str:
    share = float((~returns.isnan()).double().mean())
    if share == 0:
        return "its greedy policy reaches the goal in no run"
    return f"greedy return {float(returns.nanmedian()):g} (median), goal reached in {share:.0%} of the runs"


if __name__ == "__main__":
    lesson.main(__file__)
