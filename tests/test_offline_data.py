"""Offline datasets: what is read, what is refused, and the two datasets of the lessons."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

from llmcore_hf import offline_data
from llmcore_hf.errors import ConfigError, UserError
from llmcore_hf.offline_data import COLUMNS, DatasetArguments, OfflineDataset, build, load


def vectors(n: int = 6) -> dict[str, np.ndarray]:
    """Two episodes of CartPole's shapes; the first ends, the second is cut."""
    rng = np.random.default_rng(0)
    terminals, timeouts = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    terminals[n // 2 - 1] = timeouts[-1] = True
    states = rng.normal(size=(n, 4)).astype(np.float32), rng.normal(size=(n, 4)).astype(np.float32)
    arrays = (states[0], np.arange(n) % 2, np.ones(n, dtype=np.float32), states[1], terminals, timeouts)
    return dict(zip(COLUMNS, arrays, strict=True))


def numbered(n: int = 6) -> dict[str, np.ndarray]:
    return {**vectors(n), "observations": np.arange(n), "next_observations": np.arange(n) + 1}


def written(tmp_path: Path, columns: dict[str, np.ndarray], **further: np.ndarray) -> Path:
    np.savez(tmp_path / "mine.npz", **columns, **further)
    return tmp_path / "mine.npz"


def refusal(columns: dict[str, np.ndarray], env_id: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        build(columns, {}, "mine", env_id)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ reading and writing


def same(first: OfflineDataset, second: OfflineDataset) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in COLUMNS)


@pytest.mark.parametrize("columns", [vectors(), numbered()], ids=["vectors", "numbered"])
def test_what_is_saved_is_loaded(columns: dict[str, np.ndarray], tmp_path: Path) -> None:
    made = build(columns, {"behaviour_policy": "测试"}, "mine")
    made.save(tmp_path / "data.npz")
    again = load(tmp_path / "data.npz")
    assert same(made, again) and again.provenance == made.provenance and again.sha256 == made.sha256
    assert again.source == str(tmp_path / "data.npz")


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    import hashlib

    path = written(tmp_path, vectors(), infos=np.arange(3))
    assert load(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_data_make_the_same_bytes() -> None:
    assert build(vectors(), {"a": 1, "b": 2}, "x").to_bytes() == build(vectors(), {"b": 2, "a": 1}, "y").to_bytes()
    assert build(vectors(), {}, "x").sha256 != build(vectors(8), {}, "x").sha256


def test_columns_get_their_types_and_others_are_ignored(tmp_path: Path) -> None:
    columns = {
        name: array.astype(np.float64) if array.dtype.kind == "f" else array for name, array in vectors().items()
    }
    columns["terminals"] = columns["terminals"].astype(np.int8)
    dataset = load(written(tmp_path, columns, **{"infos/x": np.arange(3)}))
    kinds = [getattr(dataset, name).dtype for name in COLUMNS]
    assert kinds == [np.float32, np.int64, np.float32, np.float32, bool, bool]
    assert (dataset.n_actions, dataset.n_states, dataset.env_id) == (2, None, None)


def test_images_are_flattened() -> None:
    images = {"observations": np.zeros((6, 2, 3), np.uint8), "next_observations": np.ones((6, 2, 3), np.uint8)}
    assert build({**vectors(), **images}, {}, "mine").observations.shape == (6, 6)


def test_states_and_actions_are_counted() -> None:
    dataset = build(numbered(), {}, "mine")
    assert (dataset.n_states, dataset.n_actions) == (7, 2)  # the largest next state is 6
    cliff = build(numbered(), {}, "mine", "CliffWalking-v1")
    assert (cliff.n_states, cliff.n_actions, cliff.env_id) == (48, 4, "CliffWalking-v1")


def test_episodes_start_after_an_end() -> None:
    dataset = build(numbered(), {}, "mine")
    assert dataset.starts.tolist() == [0, 3]
    assert dataset.ends.tolist() == [False, False, True, False, False, True]


# ------------------------------------------------------------------------------------------------------ what is refused


def spoiled(column: str, row: int, value: float) -> dict[str, np.ndarray]:
    columns = vectors()
    array = columns[column].copy()
    array[row] = value
    return {**columns, column: array}


@pytest.mark.parametrize("column", ["observations", "rewards", "next_observations"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_their_row(column: str, value: float) -> None:
    assert f"`{column}` has NaN or infinite values in 1 rows, the first is row 4" in refusal(spoiled(column, 4, value))


def test_what_overflows_float32_is_refused() -> None:
    columns = vectors()
    columns["rewards"] = columns["rewards"].astype(np.float64) * 1e300
    assert "`rewards` has NaN or infinite values in 6 rows" in refusal(columns)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_column_is_named(name: str, tmp_path: Path) -> None:
    columns = {key: array for key, array in vectors().items() if key != name}
    with pytest.raises(UserError, match=f"`{name}` is missing"):
        load(written(tmp_path, columns))


def test_a_misspelt_column_is_guessed(tmp_path: Path) -> None:
    columns = vectors()
    columns["terminal"] = columns.pop("terminals")
    with pytest.raises(UserError, match=r"`terminals` is missing \(is it what the file calls `terminal`\?\)"):
        load(written(tmp_path, columns))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"actions": np.zeros(6)}, "`actions` holds float64: discrete actions are integers"),
        ({"actions": np.zeros((6, 1), int)}, "`actions` has the shape (6, 1), expected (N,)"),
        ({"rewards": np.array(["1"] * 6)}, "`rewards` holds <U1, not numbers"),
        ({"rewards": np.ones(5)}, "differ in length: observations 6, actions 6, rewards 5"),
        ({"rewards": np.float32(1)}, "`rewards` has the shape (), expected (N,)"),
        ({"observations": np.zeros((6, 3))}, "`observations` has the shape (6, 3) and `next_observations` (6, 4)"),
        ({"terminals": np.full(6, 2)}, "`terminals` has other values than 0 and 1"),
        ({"timeouts": np.full(6, np.nan)}, "`timeouts` has other values than 0 and 1"),
        ({"actions": np.array([0, 1, -1, 0, 1, 0])}, "`actions` has -1 in row 2: actions are numbered 0 to"),
        ({"observations": np.zeros(6), "next_observations": np.zeros(6)}, "numbered states are integers"),
        ({"observations": np.full(6, -2), "next_observations": np.zeros(6, int)}, "`observations` goes from -2 to -2"),
        ({"observations": np.zeros(6, int), "next_observations": np.full(6, 10**9)}, "numbered 0 to 999999"),
        ({"observations": np.zeros((6, 0)), "next_observations": np.zeros((6, 0))}, "the shape (6, 0)"),
        ({"terminals": np.zeros(6), "timeouts": np.zeros(6)}, "no row is marked in `terminals` or `timeouts`"),
        ({name: array[:0] for name, array in vectors().items()}, "not a single row"),
    ],
)
def test_wrong_columns_are_refused(change: dict[str, np.ndarray], words: str) -> None:
    message = refusal({**vectors(), **change})
    assert words in message and message.count("\n  - ") == 1


def test_all_problems_are_told_at_once() -> None:
    columns = {**spoiled("rewards", 0, np.nan), "actions": np.full(6, -1), "terminals": np.full(6, 3)}
    assert refusal(columns).count("\n  - ") == 3


def test_the_environment_is_consulted() -> None:
    assert "row 1: actions are numbered 0 to 1" in refusal({**vectors(), "actions": np.arange(6) * 2}, "CartPole-v1")
    assert "numbered states: expected (N,)" in refusal(vectors(), "CliffWalking-v1")
    assert "the environment observes (6,)" in refusal(vectors(), "Acrobot-v1")
    assert "the environment observes (4,)" in refusal(numbered(), "CartPole-v1")
    assert "states are numbered 0 to 15" in refusal({**numbered(), "observations": np.full(6, 16)}, "FrozenLake-v1")


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("CartPool-v1", "cannot be made"),
        ("CartPole-v9", "cannot be made"),
        ("no_such_module:CartPole-v1", "cannot be made"),
        ("Pendulum-v1", "this lesson is for Discrete(n)"),
        ("Blackjack-v1", "only Discrete and Box are supported"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(env_id: str, words: str) -> None:
    assert words in refusal(vectors(), env_id)
    with pytest.raises(ConfigError, match="--env_id: the environment"):
        DatasetArguments(dataset_path="x.npz", env_id=env_id)


def test_actions_that_do_not_start_at_0_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    env = gym.make("CartPole-v1")
    env.action_space = gym.spaces.Discrete(2, start=1)
    monkeypatch.setattr(gym, "make", lambda env_id: env)
    assert "this lesson is for Discrete(n)" in refusal(vectors(), "CartPole-v1")


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.npz cannot be read: No such file"):
        load(tmp_path / "nothing.npz")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load(tmp_path)


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"observations,actions\n1,2\n", npy(), b"PK\x03\x04 and then nothing"])
def test_what_is_no_npz_is_told(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"mine.npz is not an .npz file"):
        load(path)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, vectors(2000))
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 0xFF  # inside the data of `observations`
    path.write_bytes(content)
    with pytest.raises(UserError, match="column `observations` cannot be read"):
        load(path)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    columns = {**vectors(), "rewards": np.array([1, None, 1, 1, 1, 1], dtype=object)}
    with pytest.raises(UserError, match="column `rewards` cannot be read: holds pickled Python objects"):
        load(written(tmp_path, columns))


@pytest.mark.parametrize("text", ["{not json", "[1]", json.dumps({"env_id": 3})])
def test_a_wrong_provenance_is_told(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`provenance` must be a JSON object"):
        load(written(tmp_path, vectors(), provenance=np.array(text)))


def test_a_file_cannot_name_a_module_to_import(tmp_path: Path) -> None:
    path = written(tmp_path, vectors(), provenance=np.array(json.dumps({"env_id": "antigravity:CartPole-v1"})))
    with pytest.raises(UserError, match="would import code"):
        load(path)
    assert "antigravity" not in sys.modules


# ---------------------------------------------------------------------------------------------------------------- Minari


def episode(length: int, terminated: bool, first: int = 0) -> SimpleNamespace:
    """An episode as Minari 0.5 gives it: one more observation than actions."""
    last = np.arange(length) == length - 1
    return SimpleNamespace(
        observations=np.arange(first, first + length + 1),
        actions=np.ones(length, dtype=np.int64),
        rewards=-np.ones(length),
        terminations=last & terminated,
        truncations=last & (not terminated),
    )


def test_episodes_become_transitions() -> None:
    dataset = offline_data.from_episodes([episode(3, True), episode(2, False, 10)], {"env_id": None}, "mine")
    assert dataset.observations.tolist() == [0, 1, 2, 10, 11]
    assert dataset.next_observations.tolist() == [1, 2, 3, 11, 12]
    assert dataset.terminals.tolist() == [False, False, True, False, False]
    assert dataset.timeouts.tolist() == [False, False, False, False, True]
    assert dataset.starts.tolist() == [0, 10]


def test_wrong_episodes_are_refused() -> None:
    short, mapping, vector = episode(3, True), episode(3, True), episode(3, True)
    short.observations = short.observations[:-1]
    mapping.observations = {"position": np.zeros(4)}
    vector.observations = np.zeros((4, 2))
    for wrong in (short, mapping):
        with pytest.raises(UserError, match="mine, episode 1: `observations` must be one array"):
            offline_data.from_episodes([episode(3, True), wrong], {}, "mine")
    with pytest.raises(UserError, match="the episodes differ in shape"):
        offline_data.from_episodes([episode(3, True), vector], {}, "mine")
    with pytest.raises(UserError, match="has no episodes"):
        offline_data.from_episodes([], {}, "mine")


@pytest.fixture
def minari(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for Minari with one dataset, of the documented form."""
    module = ModuleType("minari")

    def load_dataset(dataset_id: str) -> SimpleNamespace:
        if dataset_id == "broken/x-v0":
            raise ImportError("h5py is not installed")
        if dataset_id not in ("lake/mine-v0", "lake/slippery-v0"):
            raise FileNotFoundError(dataset_id)
        spec = copy.deepcopy(gym.spec("FrozenLake-v1"))
        if dataset_id == "lake/slippery-v0":
            spec.kwargs = {**spec.kwargs, "is_slippery": False}
        return SimpleNamespace(env_spec=spec, iterate_episodes=lambda: iter([episode(3, True)]))

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "minari", module)
    return module


def test_a_minari_dataset_is_read(minari: ModuleType) -> None:
    dataset = offline_data.of_user(DatasetArguments(minari_dataset="lake/mine-v0"))
    assert dataset is not None and dataset.source == "minari:lake/mine-v0"
    assert (dataset.env_id, dataset.n_states, len(dataset)) == ("FrozenLake-v1", 16, 3)


def test_an_environment_made_with_arguments_is_not_guessed(minari: ModuleType) -> None:
    assert offline_data.from_minari("lake/slippery-v0").env_id is None
    assert offline_data.from_minari("lake/slippery-v0", "FrozenLake-v1").env_id == "FrozenLake-v1"


def test_trouble_with_minari_is_told(minari: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--minari_dataset no/such-v0 is not in the local Minari store"):
        offline_data.of_user(DatasetArguments(minari_dataset="no/such-v0"))
    with pytest.raises(UserError, match="cannot be loaded by Minari: h5py is not installed"):
        offline_data.from_minari("broken/x-v0")
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(UserError, match="Minari is not installed: pip install"):
        offline_data.from_minari("lake/mine-v0")


# --------------------------------------------------------------------------------------------------------------- options


def test_the_options_pick_the_dataset(tmp_path: Path) -> None:
    assert offline_data.of_user(DatasetArguments()) is None
    mine = offline_data.of_user(DatasetArguments(dataset_path=str(written(tmp_path, vectors())), env_id="CartPole-v1"))
    assert mine is not None and mine.env_id == "CartPole-v1"
    with pytest.raises(UserError, match=r"--dataset_path nowhere.npz cannot be read"):
        offline_data.of_user(DatasetArguments(dataset_path="nowhere.npz"))


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="--dataset_path and --minari_dataset exclude each other"):
        DatasetArguments(dataset_path="x.npz", minari_dataset="a/b-v0")
    with pytest.raises(ConfigError, match="--env_id belongs to your own dataset"):
        DatasetArguments(env_id="CartPole-v1")


def test_the_summary_describes_the_data() -> None:
    first, second = build(vectors(), {"seed": 1}, "one"), build(numbered(8), {}, "two")
    block = offline_data.describe([first, second])
    assert block["source"] == "one; two" and block["n_train"] == 14
    assert first.sha256 in block["fingerprint"] and second.sha256 in block["fingerprint"]
    assert block["datasets"][0]["provenance"] == {"seed": 1, "env_id": None}
    assert [entry["episodes"] for entry in block["datasets"]] == [2, 2]


# ---------------------------------------------------------------------------------------------------- the lessons' data


def test_cliff_walking_is_what_the_environment_does() -> None:
    dataset = offline_data.cliff_walking(2, 1)
    table = gym.make("CliffWalking-v1").unwrapped.P
    assert len(dataset) == 2 * 17 + 13 and dataset.starts.tolist() == [36, 36, 36]
    assert not dataset.timeouts.any() and dataset.terminals.sum() == 3
    for state, action, reward, following, terminal in zip(
        *(getattr(dataset, name).tolist() for name in COLUMNS[:5]), strict=True
    ):
        assert table[state][action] == [(1.0, following, reward, terminal)]


def test_cliff_walking_has_one_state_with_two_actions() -> None:
    dataset = offline_data.cliff_walking(70, 30)
    pairs, counts = np.unique(np.stack([dataset.observations, dataset.actions]), axis=1, return_counts=True)
    states, actions = np.unique(pairs[0], return_counts=True)
    assert len(states) == 27 and states[actions > 1].tolist() == [24]
    at_fork = {int(action): int(count) for (state, action), count in zip(pairs.T, counts, strict=True) if state == 24}
    assert at_fork == {0: 70, 1: 30}
    assert dataset.rewards.tolist() == [-1.0] * 1580


def test_cartpole_repeats_for_a_seed_and_differs_for_another() -> None:
    first, again, other = (offline_data.cartpole(500, 0.4, seed) for seed in (1, 1, 2))
    assert first.sha256 == again.sha256 != other.sha256
    assert first.provenance["gymnasium"] == gym.__version__ and first.provenance["seed"] == 1
    assert len(first) == 500 and first.ends[-1]


def test_cartpole_steps_are_those_of_the_environment() -> None:
    dataset = offline_data.cartpole(400, 0.4, 3)
    env = gym.make("CartPole-v1").unwrapped
    env.reset()
    for row in range(0, 400, 7):
        env.state = dataset.observations[row].astype(np.float64)
        following, reward, terminated, _, _ = env.step(int(dataset.actions[row]))
        assert following == pytest.approx(dataset.next_observations[row], abs=1e-6)
        assert reward == dataset.rewards[row]
        assert terminated == dataset.terminals[row]
    inside = ~dataset.ends[:-1]
    assert np.array_equal(dataset.next_observations[:-1][inside], dataset.observations[1:][inside])


def test_epsilon_is_the_share_of_random_actions() -> None:
    """Half of the random actions are the controller's by chance: at 0.4, a fifth differs (binomial, 4 deviations)."""
    dataset = offline_data.cartpole(4000, 0.4, 0)
    controller = dataset.observations.astype(np.float64) @ np.array(offline_data.CONTROLLER) > 0
    assert abs((dataset.actions != controller).mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 4000)
    faultless = offline_data.cartpole(1000, 0.0, 0)
    assert not faultless.terminals.any() and np.flatnonzero(faultless.timeouts).tolist() == [499, 999]


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = "import sys, llmcore_hf.offline_data; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
