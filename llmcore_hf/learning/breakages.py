"""What breaks the runs of the bug zoo: edits of the project's own source, in force for the length of one run.

The product has no option that makes it wrong. A breakage takes the source of one function, changes a line or two, compiles
it in the module it comes from, and puts the result in the place of the original until the run is over. So a broken run
goes through everything that a healthy one goes through, and the answer can be shown as a diff.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from unittest import mock


@dataclass(frozen=True)
class Breakage:
    """Edits of one function.

    Attributes:
        module: the module whose toy run is broken.
        file: where the function is: an import path, or `recipes.<name>` for the file of a lesson.
        function: its name.
        edits: pairs of a piece of its source, which must stand there once, and what takes its place.
    """

    module: str
    file: str
    function: str
    edits: tuple[tuple[str, str], ...]

    def source_file(self) -> ModuleType:
        if self.file.startswith("recipes."):
            from llmcore_hf import lesson

            return lesson.load(self.file.removeprefix("recipes.")).file
        return importlib.import_module(self.file)

    def sources(self) -> tuple[str, str]:
        """The function before and after the edits.

        Raises:
            LookupError: the source has changed, so that an edit no longer fits.
        """
        before = after = textwrap.dedent(inspect.getsource(getattr(self.source_file(), self.function)))
        for old, new in self.edits:
            if after.count(old) != 1:
                raise LookupError(f"{self.file}.{self.function} does not hold this exactly once: {old!r}")
            after = after.replace(old, new)
        return before, after

    def diff(self) -> str:
        """The edits as a unified diff."""
        before, after = (source.splitlines() for source in self.sources())
        lines = list(difflib.unified_diff(before, after, n=1, lineterm=""))[2:]
        return "\n".join([f"{self.file}.{self.function}", *(line for line in lines if not line.startswith("@@"))])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, every module of the project that has the function has the broken one."""
        file = self.source_file()
        original = getattr(file, self.function)
        compiled: dict[str, FunctionType] = {}
        exec(compile(self.sources()[1], f"<broken {self.function}>", "exec"), file.__dict__, compiled)
        with contextlib.ExitStack() as stack:
            for module in _holders(self.function, original):
                stack.enter_context(mock.patch.object(module, self.function, compiled[self.function]))
            yield


def _holders(name: str, value: object) -> list[ModuleType]:
    """The modules of the project that know `value` under that name: those that imported it, too."""
    ours = [module for key, module in list(sys.modules.items()) if key.split(".")[0] == "llmcore_hf"]
    return [module for module in ours if module.__dict__.get(name) is value]


BREAKAGES = {
    "pad_is_eos": Breakage(
        "sft",
        "llmcore_hf.alignment.sft",
        "run",
        (
            (
                "    with training.explaining(job, splits):\n",
                "    job.tokenizer.pad_token = job.tokenizer.eos_token\n    with training.explaining(job, splits):\n",
            ),
            (
                "    training.attach(trainer, run_dir)\n",
                "    collate = trainer.data_collator\n\n"
                "    def collate_without_padding(rows):\n"
                "        batch = collate(rows)\n"
                '        batch["labels"][batch["input_ids"] == job.tokenizer.pad_token_id] = IGNORED\n'
                "        return batch\n\n"
                "    trainer.data_collator = collate_without_padding\n"
                "    training.attach(trainer, run_dir)\n",
            ),
        ),
    ),
    "prompt_is_trained": Breakage(
        "sft",
        "llmcore_hf.alignment.sft",
        "run",
        (
            (
                "    training.attach(trainer, run_dir)\n",
                "    collate = trainer.data_collator\n\n"
                "    def collate_with_all_labels(rows):\n"
                "        batch = collate(rows)\n"
                '        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)\n'
                "        return batch\n\n"
                "    trainer.data_collator = collate_with_all_labels\n"
                "    training.attach(trainer, run_dir)\n",
            ),
        ),
    ),
    "swapped_pairs": Breakage(
        "dpo",
        "llmcore_hf.alignment.dpo",
        "make_trainer",
        (
            (
                "    model_args = config.part(ModelArguments)\n",
                "    model_args = config.part(ModelArguments)\n"
                '    swap = {"chosen": "rejected", "rejected": "chosen"}\n',
            ),
            ("train_dataset=splits.train,", "train_dataset=splits.train.rename_columns(swap),"),
            ("eval_dataset=splits.validation,", "eval_dataset=splits.validation.rename_columns(swap),"),
        ),
    ),
    "reference_not_frozen": Breakage(
        "dpo",
        "llmcore_hf.alignment.dpo",
        "make_trainer",
        (("    return trainer\n", "    trainer.ref_model = trainer.model\n    return trainer\n"),),
    ),
    "kl_sign": Breakage(
        "ppo",
        "llmcore_hf.ppo.advantages",
        "kl_k1",
        (("return logprobs - ref_logprobs", "return ref_logprobs - logprobs"),),
    ),
    "gae_off_by_one": Breakage(
        "ppo",
        "llmcore_hf.ppo.advantages",
        "gae",
        (("gamma * next_value - values[:, t]", "gamma * values[:, t] - values[:, t]"),),
    ),
    "zero_variance_groups": Breakage(
        "grpo",
        "llmcore_hf.alignment.grpo",
        "checked",
        (
            (
                "        return [None if math.isnan(value) else value for value in "
                "scorer(batch, len(prompts), **given).tolist()]\n",
                "        scores = scorer(batch, len(prompts), **given).tolist()\n"
                "        cached = {str(prompt): score for prompt, score in zip(prompts, scores, strict=True)}\n"
                "        return [cached[str(prompt)] for prompt in prompts]\n",
            ),
        ),
    ),
    "truncation_as_termination": Breakage(
        "actor_critic",
        "recipes.actor_critic",
        "nothing_follows",
        (("terminal[n_bootstrap:] |= rollout.truncated[n_bootstrap:]", "terminal |= rollout.truncated"),),
    ),
    "advantages_not_detached": Breakage(
        "actor_critic",
        "recipes.actor_critic",
        "update",
        (
            ("    old = values.detach()\n", "    old = values\n"),
            (
                "policy_loss(log_probabilities(logits, rollout.actions), advantages, mask)",
                "masked_mean(-log_probabilities(logits, rollout.actions) * advantages, mask)",
            ),
        ),
    ),
}
