"""A job that outlives its workers: sharded checkpoints, and a supervisor that starts again from the last whole one.

Training is data parallel with FSDP2 (`fully_shard`): every rank holds and saves its shard (`torch.distributed.checkpoint`). When a
worker dies the others cannot go on, because the next collective waits for it for ever; so all of them are stopped, and a fresh group
loads the last checkpoint. That group may have another size: a distributed checkpoint knows where in the whole tensor each shard
belongs. The run kills a worker with SIGKILL in the middle of a step, several times, and the result must be that of a run which nobody
disturbed. It also reads one checkpoint of two ranks with one and with four.

How this differs from `torchrun --max-restarts`: that restarts the workers inside the same agents. Over gloo the new group was seen to
meet leftovers of the old one and to fail in 6 of 8 tries; a supervisor that starts everything anew has nothing left over.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from llmcore_hf import lesson
from llmcore_hf.checks import Check
from llmcore_hf.config import Config
from llmcore_hf.durability import last_complete, mark_complete
from llmcore_hf.run_dir import finite
from llmcore_hf.systems import devices, workers
from llmcore_hf.systems.data_parallel import Engine, Replica, forward, make_replica, mean_over_ranks
from llmcore_hf.systems.devices import DeviceArguments
from llmcore_hf.systems.parallel import ModelShape, Training, largest_difference, learning_rate_problems, require_finite
from llmcore_hf.systems.text import VOCAB_SIZE, packed_batches
from llmcore_hf.systems.workers import WorkerFailed

if TYPE_CHECKING:
    from llmcore_hf.run_dir import RunDirectory

ENGINE = Engine("fsdp2", "fsdp2", reshard=True)
LOSSES = "losses.json"  # in a checkpoint: of the steps before it
MAX_RESTARTS = 3
READERS = (1, 4)  # numbers of ranks that read what two have saved


@dataclass
class Args(DeviceArguments):
    hidden_size: int = field(default=64, metadata={"help": "Width of the model, a multiple of 8."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers."})
    max_length: int = field(default=32, metadata={"help": "Tokens per sequence."})
    batch_size: int = field(default=16, metadata={"help": "Sequences per step over all ranks, a multiple of 4."})
    max_steps: int = field(default=20, metadata={"help": "Optimizer steps."})
    save_steps: int = field(default=5, metadata={"help": "Steps between checkpoints."})
    kills: int = field(default=10, metadata={"help": "Runs in which a worker is killed, each at another step."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Learning rate of AdamW."})

    def problems(self) -> list[str]:
        found = [
            *self.below(num_hidden_layers=1, max_length=1, kills=1),
            *self.no_multiples(
                hidden_size=(8, "four attention heads of an even size"),
                batch_size=(4, "a share for each of 1, 2 or 4 processes"),
            ),
            *self.not_positive("learning_rate"),
            *learning_rate_problems(self.learning_rate),
            *self.too_few_gpus(max(READERS)),
        ]
        if not 1 <= self.save_steps < self.max_steps:
            found.append(
                f"--save_steps {self.save_steps}: from 1 to --max_steps ({self.max_steps}), the end not included"
            )
        return found


house_defaults, check = lesson.house_defaults, lesson.check


def argument_classes() -> tuple[type, ...]:
    return (Args,)


# ---------------------------------------------------------------------------------------------------------------------
# In a worker
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What is trained, where its checkpoints go, and how often they are written."""

    shape: ModelShape
    training: Training
    folder: str
    save_steps: int


def train(job: Job, batches: Tensor, kill_at: int | None) -> dict[str, Any]:
    """Train to the end from the newest whole checkpoint in the job's folder; from the beginning when there is none.

    It ends early where the loss is no longer a finite number.

    Args:
        kill_at: the step in whose backward pass the last rank kills itself; None for never.

    Returns:
        `begin`, the step after which it went on; `losses` of all steps, those before the restart too; `weights`.
    """
    replica = make_replica(ENGINE, job.shape, job.training)
    batches = batches.to(devices.own(job.training.device))
    checkpoint = last_complete(Path(job.folder))[0]
    losses = load(replica, checkpoint) if checkpoint else []
    begin = len(losses)
    for step in range(begin, len(batches)):
        loss = forward(replica, batches[step])
        if step + 1 == kill_at and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        replica.backward(loss)
        replica.step()
        losses.append(mean_over_ranks(loss))
        if not math.isfinite(losses[-1]):
            break
        if (step + 1) % job.save_steps == 0:
            save(replica, Path(job.folder) / f"checkpoint-{step + 1}", losses)
    return {"begin": begin, "losses": losses, "weights": replica.weights()}


def save(replica: Replica, checkpoint: Path, losses: list[float]) -> None:
    """Every rank writes its shard; the checkpoint counts when all have, and the first rank has said so.

    Args:
        losses: of all steps so far.
    """
    model, optimizer = get_state_dict(replica.model, replica.optimizer)
    # Without copies ahead of writing, which would take the GPU of a machine that has one, whatever the tensors are on.
    writer = dcp.FileSystemWriter(checkpoint, per_thread_copy_ahead=0)
    dcp.save({"model": model, "optimizer": optimizer}, storage_writer=writer)
    if dist.get_rank() == 0:
        (checkpoint / LOSSES).write_text(json.dumps(losses), encoding="utf-8")
        mark_complete(checkpoint, len(losses))
    dist.barrier()


def load(replica: Replica, checkpoint: Path) -> list[float]:
    """Each rank reads its shard, whatever number of ranks wrote the checkpoint. Returns the losses of the steps before it."""
    model, optimizer = get_state_dict(replica.model, replica.optimizer)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=checkpoint)
    set_state_dict(replica.model, replica.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    return json.loads((checkpoint / LOSSES).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# The supervisor
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """One run under the supervisor, to its end.

    Attributes:
        killed_at: the step in which a worker was made to die; 0 for a run that was left alone.
        restarts: how often the workers were started anew.
        resumed_at: the steps at which they went on.
        seconds: from the failure that was noticed to the end.
    """

    killed_at: int
    restarts: int
    resumed_at: list[int]
    result: dict[str, Any]
    seconds: float


def supervise(
    job: Job, batches: Tensor, n_ranks: int, kill_at: int | None = None, max_restarts: int = MAX_RESTARTS
) -> Attempt:
    """Start workers until they come to the end, whatever they die of; the first ones are killed at `kill_at`.

    Raises:
        WorkerFailed: they were started `max_restarts` times anew and died each time.
        Diverged: they came to the end, and the loss is not a finite number.
    """
    restarts, begun = 0, time.monotonic()
    while True:
        try:
            killed = kill_at if restarts == 0 else None
            [result, *_] = workers.launch(train, n_ranks, job, batches, killed, device=job.training.device)
            break
        except WorkerFailed as error:
            if restarts == max_restarts:
                raise WorkerFailed(f"given up after {restarts} restarts, the last time because {error}") from None
            restarts, begun = restarts + 1, time.monotonic()
            if kill_at is None or restarts > 1:  # nobody did this on purpose
                print(f"{error}. Starting anew from the last checkpoint ({restarts} of {max_restarts})", flush=True)
    require_finite(result["losses"], job.training.learning_rate)
    return Attempt(kill_at or 0, restarts, [result["begin"]], result, time.monotonic() - begun)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def run(config: Config, run_dir: RunDirectory) -> None:
    """One undisturbed run, the killed ones, a checkpoint read by other numbers of ranks; check and draw."""
    args = config.part(Args)
    shape = ModelShape("qwen3", VOCAB_SIZE, args.hidden_size, 3 * args.hidden_size, args.num_hidden_layers, 4)
    sizes = (args.max_steps, args.batch_size, args.max_length, 1)
    training = Training(*sizes, args.learning_rate, 1e-5, args.seed, device=args.device)
    batches = packed_batches(training.max_steps, training.batch_size, training.seq_length, args.seed)
    steps = kill_steps(args)
    with tempfile.TemporaryDirectory(prefix="llmcore-elastic-") as folder:
        job = Job(shape, training, f"{folder}/calm", args.save_steps)
        calm = supervise(job, batches, 2).result
        attempts = []
        for number, step in enumerate(steps):
            disturbed = dataclasses.replace(job, folder=f"{folder}/{number}")
            attempts.append(supervise(disturbed, batches, 2, step))
            print(f"killed in step {step}, went on at {attempts[-1].resumed_at[-1]}", flush=True)
        # The last checkpoint may be the end: one that leaves something to train.
        others = {n: go_on(job, batches, n) for n in READERS}
    for step, loss in enumerate(calm["losses"]):
        run_dir.log({"step": step + 1, "loss": loss})
    run_dir.checks += checks(calm, attempts, others, args)
    run_dir.write("results.json", json.dumps(finite(results(calm, attempts, others)), indent=1) + "\n")
    run_dir.write("training_curves.png", draw(calm, attempts, args))


def kill_steps(args: Args) -> list[int]:
    """Steps spread over the whole run: before the first checkpoint, right after one, and in the last step."""
    if args.kills == 1:
        return [args.max_steps - 1]
    return [1 + round(i * (args.max_steps - 1) / (args.kills - 1)) for i in range(args.kills)]


def go_on(job: Job, batches: Tensor, n_ranks: int) -> dict[str, Any]:
    """Read the first checkpoint of `job`, which two ranks wrote, with `n_ranks`, and train to the end."""
    with tempfile.TemporaryDirectory(prefix="llmcore-elastic-") as folder:
        name = f"checkpoint-{job.save_steps}"
        shutil.copytree(Path(job.folder) / name, Path(folder) / name)
        return supervise(dataclasses.replace(job, folder=folder), batches, n_ranks).result


def checks(calm: dict[str, Any], attempts: list[Attempt], others: dict[int, dict[str, Any]], args: Args) -> list[Check]:
    apart = [largest_difference(attempt.result["weights"], calm["weights"]) for attempt in attempts]
    begins = [(attempt.killed_at - 1) // args.save_steps * args.save_steps for attempt in attempts]
    found = [attempt.resumed_at[-1] for attempt in attempts]
    other_apart = {f"{n} ranks": largest_difference(r["weights"], calm["weights"]) for n, r in others.items()}
    read = [result["begin"] for result in others.values()]
    return [
        Check(
            "elastic.killed_runs_end_as_if_nothing_had_happened",
            "invariant",
            all(value == 0 for value in apart),
            {"runs": len(apart), "equal": sum(value == 0 for value in apart), "largest_difference": max(apart)},
            "final weights equal those of the undisturbed run, bit by bit, every time",
            "被 SIGKILL 的作业从最近的完整检查点接着训练，最终权重逐位相同：检查点里什么都没漏。",
            "A job whose worker was killed goes on from the last whole checkpoint and ends with the same bits: nothing was "
            "missing from the checkpoint.",
        ),
        Check(
            "elastic.one_restart_from_the_last_checkpoint",
            "invariant",
            found == begins and all(attempt.restarts == 1 for attempt in attempts),
            {"went on at": str(found), "restarts": str([attempt.restarts for attempt in attempts])},
            f"one restart each, going on at {begins}",
            "只重启一次，只丢掉上一个检查点之后的几步。",
            "One restart, and only the steps after the last checkpoint are lost.",
        ),
        Check(
            "elastic.other_numbers_of_ranks_read_the_checkpoint",
            "invariant",
            all(value <= 1e-5 for value in other_apart.values()) and read == [args.save_steps] * len(read),
            other_apart,
            "final weights at most 1e-5 from those of two ranks",
            "两个进程存的检查点由 1 个或 4 个进程接着训练：每一片都知道自己在整个张量里的位置。求和次序不同，所以只差舍入。",
            "What two ranks saved is continued by 1 and by 4: every shard knows its place in the whole tensor. Sums are taken "
            "in another order, so rounding differs.",
        ),
        Check(
            "elastic.loss_fell",
            "learning",
            calm["losses"][-1] < 0.9 * calm["losses"][0],
            {"first": calm["losses"][0], "last": calm["losses"][-1]},
            "the last loss is below 0.9 of the first",
            "模型确实在学。",
            "The model does learn.",
        ),
    ]


def results(calm: dict[str, Any], attempts: list[Attempt], others: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """All numbers of the run, for `results.json`."""
    return {
        "losses": calm["losses"],
        "killed": [
            {
                "killed_at": attempt.killed_at,
                "restarts": attempt.restarts,
                "resumed_at": attempt.resumed_at,
                "apart": largest_difference(attempt.result["weights"], calm["weights"]),
                "seconds_after_restart": attempt.seconds,
            }
            for attempt in attempts
        ],
        "ranks": {n: largest_difference(r["weights"], calm["weights"]) for n, r in others.items()},
    }


def draw(calm: dict[str, Any], attempts: list[Attempt], args: Args) -> bytes:
    """Left: the loss of the calm run and of one that was killed. Right: what each killed run lost and did again."""
    figure, (left, right) = lesson.pyplot().subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    left.plot(range(1, args.max_steps + 1), calm["losses"], color="black", linewidth=5, alpha=0.25, label="undisturbed")
    shown = attempts[len(attempts) // 2]
    begin = shown.resumed_at[-1]
    left.plot(
        range(begin + 1, args.max_steps + 1),
        shown.result["losses"][begin:],
        "--",
        color="#1f77b4",
        label="after the restart",
    )
    left.axvline(shown.killed_at, color="#d62728", linestyle=":", label=f"worker killed in step {shown.killed_at}")
    for step in range(args.save_steps, args.max_steps + 1, args.save_steps):
        left.plot(
            step,
            calm["losses"][step - 1],
            "^",
            color="#2ca02c",
            label="checkpoint" if step == args.save_steps else None,
        )
    left.set(xlabel="optimizer step", ylabel="training loss")
    left.set_title("Does the loss go on where it was?", fontsize=11)
    for row, attempt in enumerate(attempts):
        begin = attempt.resumed_at[-1]
        right.barh(row, begin, color="#2ca02c", label="kept" if row == 0 else None)
        lost = attempt.killed_at - begin
        right.barh(row, lost, left=begin, color="#d62728", label="lost, done again" if row == 0 else None)
        right.barh(
            row,
            args.max_steps - attempt.killed_at,
            left=attempt.killed_at,
            color="#c6dbef",
            label="after" if row == 0 else None,
        )
    right.set_yticks(range(len(attempts)), [f"run {row + 1}" for row in range(len(attempts))])
    right.invert_yaxis()
    right.set_xlabel("optimizer step")
    right.set_title("What does a killed worker cost? The steps since the last checkpoint", fontsize=11)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=4)
    figure.suptitle("A worker is killed, the job goes on", fontweight="bold")
    return lesson.png(figure)
