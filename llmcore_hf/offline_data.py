"""Offline RL datasets: transitions somebody else's policy has left behind, as columns of one `.npz` file.

    observations       (N,) integers when the states are numbered, else (N, ...) floats
    actions            (N,) integers
    rewards            (N,) floats
    next_observations  as observations; what the environment showed *after* the action, also at the end of an episode
    terminals          (N,) booleans: the episode ended in a terminal state, whose value is 0 (Gymnasium: terminated)
    timeouts           (N,) booleans: the episode was cut, and the next state still has a value (Gymnasium: truncated)

The names are those of D4RL (Fu et al. 2020, arXiv:2004.07219). A further entry, `provenance`, is a JSON text that says
how the data came about; the same data always make the same bytes. Columns with other names are ignored, pickled objects
are never loaded. The file also has the two datasets of the lessons and the options every offline lesson offers.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from llmcore_hf.durability import write_atomically
from llmcore_hf.errors import UserError
from llmcore_hf.lesson import LessonArguments

COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
MOST = 1_000_000  # states, or actions, where no environment says how many there are; a table needs a row for each
CONTROLLER = (0.1, 0.3, 1.0, 0.5)  # weights of x, dx/dt, theta, dtheta/dt


@dataclass(frozen=True, eq=False)
class OfflineDataset:
    """Validated transitions. Make one with `build`, `load`, `from_minari`, `cliff_walking` or `cartpole`.

    Attributes:
        observations: (N,) int64 when tabular, else (N, D) float32.
        actions: (N,) int64.
        rewards: (N,) float32.
        next_observations: as observations.
        terminals: (N,) bool.
        timeouts: (N,) bool.
        provenance: how the data came about; `env_id` names the environment where it is known.
        n_actions: how many actions there are: the environment's number, or the largest action seen plus 1.
        n_states: how many numbered states there are; None when observations are vectors.
        source: where the data come from, in words.
        sha256: of the file they were read from, or of the file `save` writes.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    terminals: np.ndarray
    timeouts: np.ndarray
    provenance: dict[str, Any]
    n_actions: int
    n_states: int | None
    source: str
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def env_id(self) -> str | None:
        return self.provenance.get("env_id")

    @property
    def ends(self) -> np.ndarray:
        """(N,) bool: the last rows of episodes."""
        return self.terminals | self.timeouts

    @property
    def starts(self) -> np.ndarray:
        """First observations of the episodes, (E,) or (E, D)."""
        return self.observations[np.concatenate([[True], self.ends[:-1]])]

    def to_bytes(self) -> bytes:
        """The `.npz` file; the same data make the same bytes."""
        buffer = io.BytesIO()
        columns = {name: getattr(self, name) for name in COLUMNS}
        provenance = np.array(json.dumps(self.provenance, sort_keys=True))
        np.savez(buffer, allow_pickle=False, **columns, provenance=provenance)
        return buffer.getvalue()

    def save(self, path: str | Path) -> None:
        """Write the `.npz` file, whole or not at all."""
        write_atomically(Path(path), self.to_bytes())


def build(
    columns: dict[str, np.ndarray], provenance: dict[str, Any], source: str, env_id: str | None = None
) -> OfflineDataset:
    """Check the columns and make a dataset of them.

    Args:
        columns: arrays by the names in `COLUMNS`; others are ignored.
        provenance: kept with the data.
        source: what error messages and the summary call the data.
        env_id: the environment of the data; by default the one `provenance` names, if any.

    Raises:
        UserError: something is wrong with the columns; the message has every problem and how to mend it.
    """
    _require_columns(columns, list(columns), source)
    env_id = env_id or provenance.get("env_id")
    space = _spaces(env_id, source) if env_id else None
    if problems := _problems(columns, space):
        raise UserError(f"{source} is not an offline dataset:" + "".join(f"\n  - {problem}" for problem in problems))
    tabular = columns["observations"].ndim == 1
    observations, next_observations = (_states(columns[name]) for name in ("observations", "next_observations"))
    actions: np.ndarray = columns["actions"].astype(np.int64)
    dataset = OfflineDataset(
        observations,
        actions,
        columns["rewards"].astype(np.float32),
        next_observations,
        columns["terminals"].astype(bool),
        columns["timeouts"].astype(bool),
        {**provenance, "env_id": env_id},
        int(space[1].n if space else actions.max() + 1),
        int(space[0].n if space else max(observations.max(), next_observations.max()) + 1) if tabular else None,
        source,
    )
    return replace(dataset, sha256=hashlib.sha256(dataset.to_bytes()).hexdigest())


def _states(array: np.ndarray) -> np.ndarray:
    """(N,) int64 of numbered states, or (N, D) float32."""
    return array.astype(np.int64) if array.ndim == 1 else array.reshape(len(array), -1).astype(np.float32)


def load(path: str | Path, env_id: str | None = None) -> OfflineDataset:
    """Read an `.npz` file. `env_id` overrides the environment its provenance names.

    Raises:
        UserError: there is no such file, it is no `.npz`, holds pickled objects, or its columns are wrong.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    columns = _read_npz(content, path)
    dataset = build(columns, _read_provenance(columns, path), str(path), env_id)
    return replace(dataset, sha256=hashlib.sha256(content).hexdigest())


def _read_npz(content: bytes, path: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise UserError(
            f"{path} is not an .npz file: write one with `numpy.savez` and the columns {', '.join(COLUMNS)}"
        )
    columns: dict[str, np.ndarray] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        for name in (name for name in archive.files if name in (*COLUMNS, "provenance")):
            try:
                columns[name] = np.asarray(archive[name])
            except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
                pickled = "allow_pickle" in str(error)
                why = "holds pickled Python objects, which are not loaded: save plain numbers" if pickled else error
                raise UserError(f"{path}: column `{name}` cannot be read: {why}") from None
        found = [name for name in archive.files if name != "provenance"]
    _require_columns(columns, found, str(path))
    return columns


def _require_columns(columns: dict[str, np.ndarray], found: list[str], source: str) -> None:
    problems = []
    for name in (name for name in COLUMNS if name not in columns):
        close = difflib.get_close_matches(name, [other for other in found if other not in COLUMNS], n=1)
        problems.append(f"`{name}` is missing" + (f" (is it what the file calls `{close[0]}`?)" if close else ""))
    if problems:
        raise UserError(f"{source}: {'; '.join(problems)}. The file has: {', '.join(found) or 'no columns'}")


def _read_provenance(columns: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    text = columns.pop("provenance", None)
    try:
        provenance = {} if text is None else json.loads(str(text))
    except ValueError:
        provenance = None
    env_id = provenance.get("env_id") if isinstance(provenance, dict) else None
    if not isinstance(provenance, dict) or not isinstance(env_id, str | None):
        raise UserError(f"{path}: `provenance` must be a JSON object whose `env_id`, if any, is a text")
    if ":" in (env_id or ""):  # gymnasium would import the module before the colon
        raise UserError(f"{path}: the environment {env_id!r} would import code; name it yourself with --env_id")
    return provenance


def _spaces(env_id: str, source: str) -> tuple[gym.Space, gym.spaces.Discrete]:
    if problems := env_problems(env_id):
        raise UserError(f"{source}: {problems[0]}")
    with gym.make(env_id) as env:
        return env.observation_space, env.action_space


def env_problems(env_id: str) -> list[str]:
    """Why the offline lessons cannot use an environment; empty when they can. `env_id` is named in each sentence."""
    try:
        with gym.make(env_id) as env:
            observations, actions = env.observation_space, env.action_space
    except (gym.error.Error, ModuleNotFoundError) as error:
        return [f"the environment {env_id} cannot be made: {error}"]
    problems = []
    if not isinstance(actions, gym.spaces.Discrete) or actions.start != 0:
        problems.append(f"the environment {env_id} has the actions {actions}: this lesson is for Discrete(n)")
    if not isinstance(observations, gym.spaces.Discrete | gym.spaces.Box):
        problems.append(f"the environment {env_id} observes {observations}: only Discrete and Box are supported")
    return problems


def _problems(columns: dict[str, np.ndarray], space: tuple[gym.Space, gym.spaces.Discrete] | None) -> list[str]:
    """What is wrong with columns that are all there: types and shapes first, values only when those are right."""
    return _shape_problems(columns) or [
        *_finite_problems(columns),
        *_action_problems(columns["actions"], space[1] if space else None),
        *_observation_problems(columns, space[0] if space else None),
        *_end_problems(columns),
    ]


def _shape_problems(columns: dict[str, np.ndarray]) -> list[str]:
    problems, shapes = [], {name: columns[name].shape for name in COLUMNS}
    for name in COLUMNS:
        kind = columns[name].dtype.kind
        if kind not in "biuf":
            problems.append(f"`{name}` holds {columns[name].dtype}, not numbers")
        elif name == "actions" and kind not in "iu":
            problems.append(f"`actions` holds {columns[name].dtype}: discrete actions are integers, 0 to n - 1")
        if name in ("actions", "rewards", "terminals", "timeouts") and len(shapes[name]) != 1:
            problems.append(f"`{name}` has the shape {shapes[name]}, expected (N,)")
    first, second = shapes["observations"], shapes["next_observations"]
    if not first or first[1:] != second[1:] or 0 in first[1:]:
        problems.append(
            f"`observations` has the shape {first} and `next_observations` {second}: expected (N, ...) twice"
        )
    if not problems and first == (len(columns["actions"]),) and columns["observations"].dtype.kind not in "iu":
        problems.append("`observations` is (N,) of floats: numbered states are integers, vectors have the shape (N, D)")
    lengths = {name: shape[0] for name, shape in shapes.items() if shape}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        problems.append(f"the columns differ in length: {told}")
    elif 0 in lengths.values():
        problems.append("there is not a single row")
    return problems


def _finite_problems(columns: dict[str, np.ndarray]) -> list[str]:
    problems = []
    for name in ("observations", "rewards", "next_observations"):
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(columns[name].astype(np.float32))
        if bad.any():
            rows = np.unique(np.nonzero(bad)[0])
            problems.append(f"`{name}` has NaN or infinite values in {len(rows)} rows, the first is row {rows[0]}")
    return problems


def _action_problems(actions: np.ndarray, space: gym.spaces.Discrete | None) -> list[str]:
    n = int(space.n) if space else MOST
    bad = (actions < 0) | (actions >= n)
    if not bad.any():
        return []
    row = int(np.flatnonzero(bad)[0])
    return [f"`actions` has {actions[row]} in row {row}: actions are numbered 0 to {n - 1}"]


def _observation_problems(columns: dict[str, np.ndarray], space: gym.Space | None) -> list[str]:
    problems, most = [], int(space.n) if isinstance(space, gym.spaces.Discrete) else MOST
    for name in ("observations", "next_observations"):
        array = columns[name]
        discrete = array.ndim == 1
        if isinstance(space, gym.spaces.Box) and array.shape[1:] != space.shape:
            problems.append(f"`{name}` has the shape {array.shape}, the environment observes {space.shape}")
        elif isinstance(space, gym.spaces.Discrete) and not discrete:
            problems.append(f"`{name}` has the shape {array.shape}, the environment has numbered states: expected (N,)")
        elif discrete and not 0 <= array.min() <= array.max() < most:
            problems.append(f"`{name}` goes from {array.min()} to {array.max()}: states are numbered 0 to {most - 1}")
    return problems


def _end_problems(columns: dict[str, np.ndarray]) -> list[str]:
    ends = ("terminals", "timeouts")
    problems = [f"`{name}` has other values than 0 and 1" for name in ends if not np.isin(columns[name], (0, 1)).all()]
    if not any(columns[name].any() for name in ends):
        problems.append("no row is marked in `terminals` or `timeouts`: without them no episode ever ends")
    return problems


def from_episodes(
    episodes: Iterable[Any], provenance: dict[str, Any], source: str, env_id: str | None = None
) -> OfflineDataset:
    """Transitions out of Minari's episodes.

    Args:
        episodes: objects with `observations` of T + 1 rows, and `actions`, `rewards`, `terminations`, `truncations` of T.
        provenance: kept with the data.
        source: what error messages call the data.
        env_id: the environment of the data; by default the one `provenance` names, if any.

    Raises:
        UserError: there is no episode, observations are not arrays, or the columns are wrong.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for number, episode in enumerate(episodes):
        observations = np.asarray(episode.observations)
        if isinstance(episode.observations, dict | tuple) or len(observations) != len(episode.actions) + 1:
            raise UserError(
                f"{source}, episode {number}: `observations` must be one array, one row longer than `actions`"
            )
        found = (observations[:-1], episode.actions, episode.rewards, observations[1:])
        for name, part in zip(COLUMNS, (*found, episode.terminations, episode.truncations), strict=True):
            parts[name].append(np.asarray(part))
    if not parts["actions"]:
        raise UserError(f"{source} has no episodes")
    try:
        columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    except ValueError as error:
        raise UserError(f"{source}: the episodes differ in shape: {error}") from None
    return build(columns, provenance, source, env_id)


def from_minari(dataset_id: str, env_id: str | None = None) -> OfflineDataset:
    """A dataset of the local Minari store, such as `cartpole/medium-v0`. Nothing is downloaded.

    Raises:
        UserError: Minari is not installed, has no such dataset, or its columns are wrong.
    """
    try:
        import minari
    except ImportError:
        raise UserError('Minari is not installed: pip install "minari[hdf5]", or give an .npz file') from None
    try:
        stored = minari.load_dataset(dataset_id)
    except FileNotFoundError:
        raise UserError(
            f"{dataset_id} is not in the local Minari store: `minari list local` shows what is, "
            f"`minari download {dataset_id}` fetches it"
        ) from None
    except (ValueError, ImportError, OSError) as error:
        raise UserError(f"{dataset_id} cannot be loaded by Minari: {error}") from None
    provenance = {"minari_dataset": dataset_id, "env_id": _plain_id(stored.env_spec)}
    return from_episodes(stored.iterate_episodes(), provenance, f"minari:{dataset_id}", env_id)


def _plain_id(spec: EnvSpec | None) -> str | None:
    """The environment's id, when `gym.make(id)` makes just that environment: known here, and without arguments."""
    try:
        return spec.id if spec is not None and spec.kwargs == gym.spec(spec.id).kwargs else None
    except gym.error.Error:
        return None


@dataclass
class DatasetArguments(LessonArguments):
    """Options of the offline lessons: whose data are learned from."""

    dataset_path: str | None = field(
        default=None,
        metadata={
            "help": "Your own dataset: an .npz file with the columns observations, actions, rewards, next_observations, "
            "terminals, timeouts. By default the run makes the data of the lesson."
        },
    )
    minari_dataset: str | None = field(
        default=None, metadata={"help": "Your own dataset in the local Minari store (pip install minari)."}
    )
    env_id: str | None = field(
        default=None,
        metadata={
            "help": "Environment that your dataset comes from, when it does not say so; policies are tried in it."
        },
    )

    def problems(self) -> list[str]:
        found = []
        if self.dataset_path and self.minari_dataset:
            found.append("--dataset_path and --minari_dataset exclude each other: give one")
        if self.env_id and not (self.dataset_path or self.minari_dataset):
            found.append("--env_id belongs to your own dataset: give --dataset_path or --minari_dataset with it")
        if self.env_id:
            found += [f"--env_id: {problem}" for problem in env_problems(self.env_id)]
        return found


def of_user(args: DatasetArguments) -> OfflineDataset | None:
    """The dataset the options name; None when they name none.

    Raises:
        UserError: it cannot be used; the message names the option.
    """
    try:
        if args.dataset_path:
            return load(args.dataset_path, args.env_id)
        return from_minari(args.minari_dataset, args.env_id) if args.minari_dataset else None
    except UserError as error:
        raise UserError(f"{'--dataset_path' if args.dataset_path else '--minari_dataset'} {error}") from None


def describe(datasets: list[OfflineDataset]) -> dict[str, Any]:
    """The `data` block of `summary.json`."""
    return {
        "source": "; ".join(dataset.source for dataset in datasets),
        "format": "offline transitions (D4RL columns)",
        "n_train": sum(map(len, datasets)),
        "n_eval": 0,
        "n_dropped": 0,
        "problems": {},
        "on_bad_rows": "stop",
        "fingerprint": " ".join(f"sha256:{dataset.sha256}" for dataset in datasets),
        "truncated_fraction": None,
        "trained_token_fraction": None,
        "datasets": [
            {"source": d.source, "n": len(d), "episodes": len(d.starts), "sha256": d.sha256, "provenance": d.provenance}
            for d in datasets
        ],
    }


UP, RIGHT, DOWN = 0, 1, 2
SAFE_PATH = 3 * [UP] + 11 * [RIGHT] + 3 * [DOWN]  # along the upper wall, return -17
EDGE_PATH = [UP] + 11 * [RIGHT] + [DOWN]  # along the cliff, the shortest way, return -13


def cliff_walking(n_safe: int, n_edge: int) -> OfflineDataset:
    """CliffWalking-v1 as two kinds of walkers went through it; every other action is missing from the data.

    The paths part at one state alone, where a share n_safe / (n_safe + n_edge) of the data goes up and the rest right.
    """
    rows: list[tuple] = []
    policy = f"{n_safe} episodes along the upper wall, {n_edge} along the cliff"
    with gym.make("CliffWalking-v1") as env:
        for path in n_safe * [SAFE_PATH] + n_edge * [EDGE_PATH]:
            rows += _episode(env, _follow(path))
        return build(_columns(rows), _made(env, policy, None), f"CliffWalking-v1: {policy}")


def _follow(path: list[int]) -> Callable[[Any], int]:
    remaining = iter(path)
    return lambda _: next(remaining)


def cartpole(n_transitions: int, epsilon: float, seed: int) -> OfflineDataset:
    """CartPole-v1 under a linear controller that holds the pole, except that a share `epsilon` of the actions is random.

    The sign of CONTROLLER times observation says to which side it pushes. The last episode is cut by a timeout.
    """
    rng = np.random.default_rng(seed)

    def act(observation: np.ndarray) -> int:
        return int(rng.integers(2)) if rng.random() < epsilon else int(np.dot(CONTROLLER, observation) > 0)

    rows: list[tuple] = []
    policy = f"linear controller {CONTROLLER} with epsilon {epsilon:g}"
    with gym.make("CartPole-v1") as env:
        env.reset(seed=seed)
        while len(rows) < n_transitions:
            rows += _episode(env, act)
        columns = {name: column[:n_transitions] for name, column in _columns(rows).items()}
        columns["timeouts"][-1] = not columns["terminals"][-1]
        return build(columns, _made(env, policy, seed), f"CartPole-v1: {n_transitions} transitions, {policy}")


def _episode(env: gym.Env, act: Callable[[Any], int]) -> list[tuple]:
    """Rows of one episode, in the order of `COLUMNS`."""
    rows, over = [], False
    observation, _ = env.reset()
    while not over:
        action = act(observation)
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, following, terminated, truncated))
        observation, over = following, terminated or truncated
    return rows


def _columns(rows: list[tuple]) -> dict[str, np.ndarray]:
    return {name: np.array(column) for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)}


def _made(env: gym.Env, policy: str, seed: int | None) -> dict[str, Any]:
    assert env.spec is not None
    return {"env_id": env.spec.id, "gymnasium": gym.__version__, "behaviour_policy": policy, "seed": seed}
