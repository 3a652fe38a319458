"""`PPOTrainer`: proximal policy optimization of a causal language model, on transformers' Trainer.

A rollout is generated when the Trainer fetches the first micro-batch of it; the optimizer steps on it are the Trainer's
own. So logging, checkpoints, schedules, mixed precision and accelerate work as in every other trainer.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from trl import is_conversational
from trl.models import prepare_deepspeed, unwrap_model_for_generation
from trl.trainer.utils import (
    create_model_from_path,
    disable_dropout_in_model,
    identity,
    print_prompt_completions_sample,
)

from llmcore_hf.durability import write_atomically
from llmcore_hf.errors import UserError
from llmcore_hf.models.loading import stop_ids
from llmcore_hf.ppo import losses
from llmcore_hf.ppo.advantages import (
    AdaptiveKLController,
    FixedKLController,
    gae,
    implied_reward,
    kl_k1,
    kl_k3,
    masked_mean,
    token_rewards,
    whiten,
)
from llmcore_hf.ppo.config import PPOConfig
from llmcore_hf.ppo.model import (
    HEADS,
    VALUE_FOLDER,
    PolicyAndValue,
    SeparateModels,
    SharedBackbone,
    completion_logprobs,
)
from llmcore_hf.ppo.rewards import OWN_ARGUMENTS, Batch, Text, make_scorers, total
from llmcore_hf.ppo.rollout import Rollout, Sequences, generate
from llmcore_hf.ppo.sampler import RolloutSampler

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

STATE_FILE = "ppo_state.json"  # what a resumed run needs besides what the Trainer saves


class ResumeError(UserError):
    """Training can't go on from a checkpoint with the options that were given."""


class PPOTrainer(Trainer):
    """Trainer for PPO with reward functions or reward models.

    Args:
        model: a causal language model, or its id or path.
        reward_funcs: one or several of: a callable with TRL's signature
            `f(prompts, completions, completion_ids, trainer_state, **columns) -> list[float | None]`; a sequence
            classifier; the id or path of one. Their weighted sum is the score of a completion.
        args: options.
        train_dataset: has a column `prompt`, plain text or conversational; the other columns go to the functions.
        eval_dataset: the same, for `evaluate`.
        processing_class: tokenizer; that of the model when not given.
        reward_processing_classes: tokenizers of reward models, one entry per reward function.
        peft_config: trains LoRA adapters instead of all weights. With `args.share_backbone` the critic is a second
            adapter on the same base weights, and the reference is the base itself.
        value_model: critic, a token classifier with one label, or its id or path. When not given, it starts as a copy of
            the policy's backbone with a head of zeros.
        ref_model: reference of the KL penalty, or its id or path. When not given, the policy as it is at the start.

    Source: Schulman et al. (2017) for the method, Ziegler et al. (2019) and Ouyang et al. (2022) for language models.
    """

    args: PPOConfig
    model: PolicyAndValue
    control: TrainerControl

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any,
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
        value_model: str | PreTrainedModel | None = None,
        ref_model: str | PreTrainedModel | None = None,
    ) -> None:
        args = args or PPOConfig("trainer_output")
        for name, dataset in _datasets(train_dataset, eval_dataset):
            _check_columns(name, dataset)
        if hasattr(model, "peft_config"):
            raise ValueError(
                "the model has adapters already: give the base model and a `peft_config`, or merge them first"
            )
        if args.n_gpu > 1:
            raise ValueError("one process drives one GPU here: start with `accelerate launch`")
        load: Load | None = None  # the model's weights once more
        if isinstance(model, str):
            options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
            if args.world_size > 1:
                options = {"device_map": None, **options}  # each process its own device, not all of them
            load = partial(create_model_from_path, model, **{"trust_remote_code": args.trust_remote_code, **options})
            model = load()
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                model.config.name_or_path, padding_side="left", trust_remote_code=args.trust_remote_code
            )
        if processing_class.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no padding token: set one that is not the end token, or the policy never learns to stop"
            )
        for name, dataset in _datasets(train_dataset, eval_dataset):
            _check_prompts(name, dataset, processing_class)
        self.scorers = make_scorers(reward_funcs, args.reward_weights, reward_processing_classes)
        self.ref_model = _reference(model, ref_model, peft_config, args, load)
        both = _policy_and_value(model, value_model, peft_config, args, load)
        if args.disable_dropout:
            disable_dropout_in_model(both)
        super().__init__(
            model=both,
            args=args,
            data_collator=identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        set_seed(args.seed, device_specific=True)  # or all processes would draw the same tokens
        self.loss_is_scaled_for_ga = True  # `compute_loss` divides by the tokens of the whole mini-batch
        if self.ref_model is not None:
            self.ref_model = self._prepare_frozen(self.ref_model)
        for scorer in self.scorers:
            if isinstance(scorer.func, nn.Module):
                scorer.func = self._prepare_frozen(scorer.func)
        if args.kl_target is None:
            self.kl_controller = FixedKLController(args.kl_coef)
        else:
            self.kl_controller = AdaptiveKLController(args.kl_coef, args.kl_target, args.kl_horizon)
        self.sampling = self._generation_config(do_sample=True)
        self.greedy = self._generation_config(do_sample=False)
        self._sampler: RolloutSampler | None = None
        self._updates: Iterator[dict[str, Any] | None] = iter(())
        # since the last log row: means of each rollout, and each micro-batch's part of the mean of its mini-batch
        self._rollout_means: dict[str, list[float]] = defaultdict(list)
        self._step_parts: dict[str, list[Tensor]] = defaultdict(list)
        self._step_kl: list[Tensor] = []  # of the micro-batches since the last look at `target_kl`
        self._reported: dict[str, list[float]] = defaultdict(list)  # numbers that reward functions logged
        self._extra: dict[str, list[Any]] = {}  # columns of the table that reward functions added
        self._table: tuple[Batch, Tensor, list[float]] | None = None  # of the last rollout
        self._episodes = self._episodes_before = 0  # completions trained on: in all, and before this process began
        self._began = time.perf_counter()
        self.add_callback(_StateCallback(self))

    # ------------------------------------------------------------ set-up

    def _prepare_frozen(self, model: nn.Module) -> Any:
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _generation_config(self, do_sample: bool) -> GenerationConfig:
        how: dict[str, Any] = {"do_sample": False}
        if do_sample:
            how = {
                "do_sample": True,
                "temperature": self.args.temperature,
                "top_k": self.args.top_k,
                "top_p": self.args.top_p,
            }
        return GenerationConfig(
            max_new_tokens=self.args.max_completion_length,
            pad_token_id=self.processing_class.pad_token_id,
            eos_token_id=stop_ids(self.model, self.processing_class),
            **how,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Batches of prompts for whole rollouts; see `RolloutSampler`."""
        args = self.args
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        self._sampler = RolloutSampler(
            len(self.train_dataset),
            args.rollout_size,
            micro_batches=args.steps_per_rollout * args.gradient_accumulation_steps,
            seed=args.seed if args.data_seed is None else args.data_seed,
            rank=args.process_index,
            world_size=args.world_size,
        )
        return DataLoader(self.train_dataset, batch_sampler=self._sampler, collate_fn=identity)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint` as in the Trainer. Critic and KL coefficient come back as well.

        Raises:
            ResumeError: the checkpoint stands within a rollout.
        """
        found = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self._episodes = 0
        if found:
            self._load_state(Path(found))
        self._began, self._episodes_before = time.perf_counter(), self._episodes
        output = super().train(resume_from_checkpoint=found or None, **kwargs)
        if self.args.load_best_model_at_end and (best := self.state.best_model_checkpoint):
            self._load_critic(Path(best))  # the Trainer has brought back the policy alone
        return output

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's optimizer over all that is trained, also when the model was used before `train`."""
        self.model.mark_trainable()
        return super().create_optimizer(*args, **kwargs)

    # ------------------------------------------------------------ one optimizer step

    def training_step(self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. The first of a rollout brings the prompts, which are answered before it is trained on."""
        if inputs:
            self._updates = self._micro_batches(self.make_rollout(inputs))
        micro_batch = next(self._updates)
        if micro_batch is None:  # `target_kl` is reached: without gradients the optimizer changes nothing
            return torch.zeros((), device=self.accelerator.device)
        return super().training_step(model, micro_batch, num_items_in_batch)

    def _micro_batches(self, rollout: Rollout) -> Iterator[dict[str, Any] | None]:
        """Micro-batches of all epochs on a rollout, None for those after `target_kl` is reached."""
        args, mask = self.args, rollout.sequences.mask
        self._step_kl = []
        stopped, first = False, True
        for _ in range(args.num_ppo_epochs):
            for rows in torch.randperm(len(mask)).to(mask.device).chunk(args.num_mini_batches):
                stopped = stopped or self._has_moved_too_far()
                n_tokens = self._sum(mask[rows].sum())
                for part in rollout.sequences.by_length(rows, args.per_device_train_batch_size):
                    yield None if stopped else {**rollout.select(part), "n_tokens": n_tokens, "first": first}
                first = False

    def _has_moved_too_far(self) -> bool:
        if self.args.target_kl is None or not self._step_kl:
            return False
        kl = self._sum(torch.stack(self._step_kl).sum())
        self._step_kl = []
        return bool(kl > self.args.target_kl)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Policy, value and entropy loss of a micro-batch, as its part of the mean over the tokens of the mini-batch."""
        args, mask = self.args, inputs["mask"]
        logprobs, entropies, values = model(
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs["n_completion"],
            with_entropy=args.entropy_coef > 0,
        )

        def mean(per_token: Tensor) -> Tensor:
            return torch.where(mask > 0, per_token, 0.0).sum() / inputs["n_tokens"]

        pg, pg_clipped = losses.policy_loss(logprobs, inputs["old_logprobs"], inputs["advantages"], args.cliprange)
        vf, vf_clipped = losses.value_loss(values, inputs["old_values"], inputs["returns"], args.cliprange_value)
        loss = mean(pg) + args.vf_coef * mean(vf)
        if entropies is not None:
            loss = loss - args.entropy_coef * mean(entropies)
        with torch.no_grad():
            kl = losses.approx_kl(logprobs, inputs["old_logprobs"])
            ratio = torch.exp(logprobs - inputs["old_logprobs"])
            self._step_kl.append(mean(kl))
            parts = {
                "loss/policy_avg": pg,
                "loss/value_avg": vf,
                "policy/approxkl_avg": kl,
                "policy/clipfrac_avg": pg_clipped.float(),
                "val/clipfrac_avg": vf_clipped.float(),
                "val/ratio": ratio,
            }
            for name, per_token in parts.items():
                self._step_parts[name].append(mean(per_token))
            if inputs["first"]:
                off = torch.where(mask > 0, (ratio - 1).abs(), 0.0).max()
                self._step_parts["val/first_ratio_off"].append(off)
        # DDP and DeepSpeed average over processes what is a sum of parts here
        return loss * args.world_size

    # ------------------------------------------------------------ rollout

    @torch.no_grad()
    def make_rollout(self, rows: list[dict[str, Any]]) -> Rollout:
        """Answer the prompts of `rows`, score the answers, and compute what the update needs."""
        args = self.args
        self.model.eval()
        batch, prompt_ids = self.complete(rows, self.sampling, f"the rollout before step {self.state.global_step + 1}")
        self._extra = {}
        scores = self.score(batch, self._log_metric, partial(self._log_extra, len(rows)))  # (B, F)
        score = self._total(scores, batch)  # (B,)
        sequences = Sequences.of(
            prompt_ids, batch.completion_ids, self.processing_class.pad_token_id, self.accelerator.device
        )
        mask = sequences.mask
        logprobs, entropies, ref_logprobs, values = self._forward(sequences)
        ended = torch.tensor(
            [ids[-1] in self.sampling.eos_token_id for ids in batch.completion_ids], device=mask.device
        )
        adjusted, bootstrap = self._at_the_end(score, ended, values.gather(1, mask.sum(1, keepdim=True)).squeeze(1))
        values = values[:, :-1] * mask

        measured: dict[str, Tensor] = {}
        kl = kl_k1(logprobs, ref_logprobs) * mask
        if self.kl_controller.value:  # without a reference the KL is not known
            measured = {"objective/kl": kl.sum(1), "objective/kl_k3": (kl_k3(logprobs, ref_logprobs) * mask).sum(1)}
        rewards = token_rewards(adjusted, kl, self.kl_controller.value, mask)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=self._sum)
        advantages = gae(rewards, values, mask, bootstrap, args.gamma, args.lam)
        returns = advantages + values
        penalty = self.kl_controller.value * kl.sum(1)
        rlhf_reward = adjusted - penalty
        if not args.whiten_rewards:
            found = implied_reward(advantages, values, mask, bootstrap, args.gamma, args.lam)
            measured["val/reward_off"] = (found - rlhf_reward).abs() / (1 + rlhf_reward.abs())
        self._log_rollout(
            {
                **measured,
                "objective/entropy": -logprobs.sum(1),
                "objective/non_score_reward": -penalty,
                "objective/rlhf_reward": rlhf_reward,
                "objective/scores": score,
                "completions/mean_length": mask.sum(1).float(),
                "completions/eos_rate": ended.float(),
                **{f"rewards/{s.name}/mean": column for s, column in zip(self.scorers, scores.T, strict=True)},
            },
            entropy=masked_mean(entropies, mask, self._sum),
            explained_variance=losses.explained_variance(values, returns, mask, self._sum),
        )
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, reduce=self._sum)
        if args.log_completions:
            mean_advantages = (advantages.sum(1) / mask.sum(1)).tolist()
            self._table = (batch, scores, mean_advantages)
        return Rollout(sequences, logprobs, values, advantages, returns)

    def complete(
        self, rows: list[dict[str, Any]], config: GenerationConfig, name: str
    ) -> tuple[Batch, list[list[int]]]:
        """Answers of the policy to the prompts of `rows`, and the prompts as tokens."""
        prompts: list[Text] = [row["prompt"] for row in rows]
        tokenizer = self.processing_class
        conversational = is_conversational({"prompt": prompts[0]})
        if conversational:
            template = {"add_generation_prompt": True, "return_dict": True}
            prompt_ids = [
                tokenizer.apply_chat_template(row["prompt"], tools=row.get("tools"), **template)["input_ids"]
                for row in rows
            ]
        else:
            prompt_ids = tokenizer(prompts)["input_ids"]
        self._check_lengths(prompt_ids, name)
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model, self.accelerator.autocast():
            size = self.args.local_rollout_forward_batch_size
            completion_ids = generate(model.policy, prompt_ids, config, size, self.accelerator.device)
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        return Batch(prompts, completions, completion_ids, columns, name), prompt_ids

    def _check_lengths(self, prompt_ids: list[list[int]], name: str) -> None:
        """Raises `ValueError` for a prompt that leaves no room in the context: beyond it a model answers nonsense, or fails."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        room = context - self.args.max_completion_length
        for row, ids in enumerate(prompt_ids):
            if len(ids) > room:
                raise ValueError(
                    f"{name}: prompt {row} has {len(ids)} tokens, and max_completion_length {self.args.max_completion_length} "
                    f"leaves room for {room} in the model's context of {context}: shorten it, or lower "
                    f"max_completion_length. It begins: {self.processing_class.decode(ids[:50])!r}"
                )

    def score(
        self,
        batch: Batch,
        log_metric: Callable[[str, float], None] = lambda name, value: None,
        log_extra: Callable[[str, list[Any]], None] = lambda column, values: None,
    ) -> Tensor:
        """(B, F) rewards, one column per reward function; NaN where a function does not apply.

        Functions that ask for it may log a number or a column of the table of completions.
        """
        given = {"trainer_state": self.state, "log_metric": log_metric, "log_extra": log_extra}
        size = self.args.local_rollout_forward_batch_size
        columns = [scorer(batch, size, **given) for scorer in self.scorers]
        return torch.stack(columns, dim=1).to(self.accelerator.device)

    def _log_metric(self, name: str, value: float) -> None:
        number = float(value)  # raises within the function that gave it, so that it is named
        self._reported[name].append(number)

    def _log_extra(self, n: int, column: str, values: list[Any]) -> None:
        if len(values) != n:
            raise ValueError(f"log_extra({column!r}) got {len(values)} values for {n} completions")
        self._extra[column] = values

    def _total(self, scores: Tensor, batch: Batch) -> Tensor:
        weights = torch.tensor([scorer.weight for scorer in self.scorers], device=scores.device)
        return total(scores, weights, batch)

    def _at_the_end(self, score: Tensor, ended: Tensor, last_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) reward on the last token and (B,) value of what would follow, by `truncated_completions`."""
        zero = torch.zeros_like(score)
        if self.args.truncated_completions == "bootstrap":
            return torch.where(ended, score, zero), torch.where(ended, zero, last_values)
        if self.args.truncated_completions == "penalty":
            score = torch.where(ended, score, score - self.args.missing_eos_penalty)
        return score, zero

    def _forward(self, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and reference log-probabilities (B, T), and values (B, T + 1); 0 on padding."""
        n, t = sequences.mask.shape
        device = sequences.mask.device
        logprobs, entropies, ref_logprobs = (torch.zeros(n, t, device=device) for _ in range(3))
        values = torch.zeros(n, t + 1, device=device)
        with self.accelerator.autocast():  # in the precision of the update, or the first ratio is not 1
            for rows in self._groups(sequences):
                inputs, own = sequences.select(rows)
                mask = sequences.mask[rows, :own]
                found, entropy = self.model.logprobs(**inputs, with_entropy=True)
                assert entropy is not None
                logprobs[rows, :own] = found.float() * mask
                entropies[rows, :own] = entropy.float() * mask
                values[rows, : own + 1] = self.model.values(**inputs)
                if self.kl_controller.value:
                    ref_logprobs[rows, :own] = self._ref_logprobs(inputs).float() * mask
        if not self.kl_controller.value:
            ref_logprobs = logprobs
        return logprobs, entropies, ref_logprobs, values

    def _groups(self, sequences: Sequences) -> Iterator[Tensor]:
        """Rows for one forward pass each. The layers of a sharded model are gathered by all processes together, so there
        each makes as many passes as the others."""
        size = self.args.local_rollout_forward_batch_size
        if is_deepspeed_zero3_enabled() or self.is_fsdp_enabled:
            return sequences.by_length(torch.arange(len(sequences.mask), device=sequences.mask.device), size)
        return sequences.by_similar_length(size)

    def _ref_logprobs(self, inputs: dict[str, Any]) -> Tensor:
        model = self.model
        how: dict[str, Any] = {"temperature": model.temperature, "keeps_logits": model.keeps_logits}
        if self.ref_model is not None:
            return completion_logprobs(self.ref_model, **inputs, **how)[0]
        with model.policy.disable_adapter():
            return completion_logprobs(model.policy, **inputs, **how)[0]

    # ------------------------------------------------------------ evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean reward of greedy and of sampled answers to held-out prompts; draws from a generator of its own.

        Processes share the rows. All answer as many: those with a row less answer the first one again, without counting it,
        because the layers of a sharded model are gathered by all together.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {key: value for part in parts for key, value in part.items()}
        began = time.perf_counter()
        everything = list(dataset)
        rows = everything[self.args.process_index :: self.args.world_size]
        filler = everything[:1] if len(rows) < math.ceil(len(everything) / self.args.world_size) else []
        metrics: dict[str, float] = {}
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed + self.args.process_index)
            for prefix, config in (("", self.greedy), ("sampled_", self.sampling)):
                metrics |= {
                    f"{metric_key_prefix}_{prefix}{k}": v for k, v in self._measure(rows, filler, config).items()
                }
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _measure(
        self, rows: list[dict[str, Any]], filler: list[dict[str, Any]], config: GenerationConfig
    ) -> dict[str, float]:
        self.model.eval()
        names = ["reward", *(f"rewards/{scorer.name}" for scorer in self.scorers)]
        names += ["completions/mean_length", "completions/eos_rate"]
        batch, _ = self.complete(rows + filler, config, "the evaluation")
        scores = self.score(batch)
        lengths = torch.tensor([len(ids) for ids in batch.completion_ids], device=scores.device)
        ended = torch.tensor([ids[-1] in config.eos_token_id for ids in batch.completion_ids], device=scores.device)
        columns = torch.stack([self._total(scores, batch), *scores.T, lengths.float(), ended.float()])[:, : len(rows)]
        totals, counts = self._sum(torch.stack([columns.nansum(1), (~columns.isnan()).sum(1)]))
        return {name: float(a / n) for name, a, n in zip(names, totals.tolist(), counts.tolist(), strict=True) if n}

    # ------------------------------------------------------------ logging

    def _sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all processes."""
        return self.accelerator.reduce(tensor, reduction="sum") if self.args.world_size > 1 else tensor

    def _log_rollout(self, per_completion: dict[str, Tensor], entropy: Tensor, explained_variance: Tensor) -> None:
        """Means of (B,) numbers over the completions of all processes, under TRL's names; then adapt the KL coefficient."""
        stacked = torch.stack(list(per_completion.values()))  # (names, B)
        sums = self._sum(torch.stack([stacked.nansum(1), (~stacked.isnan()).sum(1)]))
        means = dict(zip(per_completion, (sums[0] / sums[1]).tolist(), strict=True))
        n = stacked.shape[1] * self.args.world_size
        self._episodes += n
        means["policy/entropy_avg"] = float(entropy)
        means["val/num_eos_tokens"] = means["completions/eos_rate"] * n
        means["val/explained_variance"] = float(explained_variance)
        means["objective/kl_coef"] = self.kl_controller.value
        for name, value in {**means, **self._take_reported()}.items():
            if not math.isnan(value):  # no function had a word to say, or no return differed
                self._rollout_means[name].append(value)
        if "objective/kl" in means:
            self.kl_controller.update(means["objective/kl"], n)

    def _take_reported(self) -> dict[str, float]:
        """Means over all processes of what reward functions logged; not every process need have logged every name."""
        rows = {}
        for name in sorted(set(gather_object(list(self._reported)))):
            values = self._reported.pop(name, [])
            pair = torch.tensor([sum(values), len(values)], dtype=torch.float32, device=self.accelerator.device)
            total, count = self._sum(pair).tolist()
            rows[name] = total / count
        return rows

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages since the last row, and in training the speed, to what the Trainer logs."""
        if "loss" in logs:
            logs = {**logs, **self._take_averages()}
            logs["episode"] = self._episodes
            logs["eps"] = (self._episodes - self._episodes_before) / (time.perf_counter() - self._began)
            if self._table and self.is_world_process_zero():
                self._print_table(*self._table)
        super().log(logs, start_time)

    def _take_averages(self) -> dict[str, float]:
        rows = {name: sum(values) / len(values) for name, values in self._rollout_means.items()}
        for name, collected in self._step_parts.items():
            parts = torch.stack(collected)
            if name == "val/first_ratio_off":
                rows[name] = float(self.accelerator.gather(parts.max().reshape(1)).max())
                continue
            # (S,) means over the mini-batch of each optimizer step, whose parts are micro-batches and processes
            means = self._sum(parts.view(-1, self.args.gradient_accumulation_steps).sum(1))
            rows[name] = float(means.mean())
            if name == "val/ratio" and len(means) > 1:
                rows["val/ratio_var"] = float(means.var())
        self._rollout_means.clear()
        self._step_parts.clear()
        return rows

    def _print_table(self, batch: Batch, scores: Tensor, advantages: list[float]) -> None:
        rewards = {s.name: column.tolist() for s, column in zip(self.scorers, scores.T, strict=True)}
        n = self.args.num_completions_to_print
        print_prompt_completions_sample(
            batch.prompts, batch.completions, rewards, advantages, self.state.global_step, n, self._extra
        )

    # ------------------------------------------------------------ saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy into `output_dir`, the critic into `output_dir/value_model`; both load with `from_pretrained`."""
        folder = Path(output_dir or self.args.output_dir)
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model_wrapped).save(folder, state, is_checkpoint=_internal_call)
        self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _load_state(self, checkpoint: Path) -> None:
        """What the Trainer does not bring back by itself: the critic's weights, the KL coefficient, the completions so far."""
        self._check_place(checkpoint)
        self._load_critic(checkpoint)
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        self.kl_controller.value, self._episodes = state["kl_coef"], state["episode"]

    def _load_critic(self, checkpoint: Path) -> None:
        if not self.is_deepspeed_enabled:  # whose engine loads all weights itself
            self.model.load_critic(checkpoint)

    def _check_place(self, checkpoint: Path) -> None:
        """Raises `ResumeError` when the rollout that the checkpoint was trained on is not over: it is not saved."""
        step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
        args, whole = self.args, self.args.steps_per_rollout
        if step % whole and not args.ignore_data_skip:
            raise ResumeError(
                f"{checkpoint} was written after {step} optimizer steps, which is no multiple of num_ppo_epochs * "
                f"num_mini_batches = {args.num_ppo_epochs} * {args.num_mini_batches}: it would stand within a rollout, and "
                "training goes on between two alone. Give the num_ppo_epochs and num_mini_batches of the run that wrote it, "
                f"or a checkpoint after a multiple of {whole} steps"
            )


class _StateCallback(TrainerCallback):
    """Tells the sampler which epoch begins, and saves what the Trainer does not know about."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer._sampler is not None
        self.trainer._sampler.epoch = int(state.epoch or 0)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
            kept = {"kl_coef": self.trainer.kl_controller.value, "episode": self.trainer._episodes}
            write_atomically(file, json.dumps(kept))


def _datasets(train: Any, evaluation: Any) -> Iterator[tuple[str, Any]]:
    if train is not None:
        yield "train_dataset", train
    parts = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    for name, part in parts.items():
        if part is not None:
            yield f"eval_dataset {name}".strip(), part


def _check_columns(name: str, dataset: Any) -> None:
    columns = getattr(dataset, "column_names", None)
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"{name} is a stream: PPO needs a dataset that knows its length")
    if len(dataset) == 0:
        raise ValueError(f"{name} has no rows")
    if columns is not None and "prompt" not in columns:
        raise ValueError(f"{name} has no column `prompt`; it has: {', '.join(columns)}")
    if images := {"image", "images"} & set(columns or ()):
        raise ValueError(f"{name} has a column `{images.pop()}`: PPO trains on text alone; GRPO can show images")
    if taken := sorted(set(columns or ()) & set(OWN_ARGUMENTS)):
        raise ValueError(f"{name}: rename column {', '.join(taken)}: reward functions get an argument of that name")


def _check_prompts(name: str, dataset: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ValueError` for a prompt that is no text, or has no tokens to predict an answer from."""
    prompts = dataset["prompt"] if hasattr(dataset, "column_names") else (row["prompt"] for row in dataset)
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str | list):
            raise ValueError(
                f"{name}, row {row}: the prompt is {type(prompt).__name__}: it must be a text, or a list of messages with "
                "`role` and `content`"
            )
        blank = not prompt.strip() if isinstance(prompt, str) else not prompt
        if blank and not (isinstance(prompt, str) and tokenizer(prompt)["input_ids"]):
            raise ValueError(f"{name}, row {row}: the prompt is empty: fill it in, or remove the row")


Load = Callable[..., PreTrainedModel]


def _reference(model: Any, ref_model: Any, peft_config: Any, args: PPOConfig, load: Load | None) -> Any:
    """A frozen model, or None where it is not needed or is the policy's base itself."""
    if args.kl_coef == 0 or (ref_model is None and peft_config is not None):
        return None
    if isinstance(ref_model, str):
        ref_model = create_model_from_path(ref_model, trust_remote_code=args.trust_remote_code)
    elif ref_model is None:
        ref_model = _loaded_again(load, "ref_model") if is_deepspeed_zero3_enabled() else copy.deepcopy(model)
    return ref_model.eval().requires_grad_(False)


def _loaded_again(load: Load | None, name: str, **options: Any) -> PreTrainedModel:
    """A second model from the policy's path: under ZeRO-3 no process holds the weights that could be copied."""
    if load is None:
        raise ValueError(
            f"under DeepSpeed ZeRO-3 a model cannot be copied: give the model by its id or path, or give a {name} as well"
        )
    return load(**options)


def _policy_and_value(
    model: Any, value_model: Any, peft_config: Any, args: PPOConfig, load: Load | None
) -> PolicyAndValue:
    if value_model is not None:
        value_model = _as_critic(value_model)
    if peft_config is None:
        return SeparateModels(model, value_model or _copy_as_critic(model, load), args.temperature)
    from peft import get_peft_model

    # Adapters draw their weights before the Trainer seeds: the same ones in all processes, however the base was loaded.
    if args.share_backbone and value_model is None:
        if args.activation_checkpointing:
            raise ValueError(
                "activation_checkpointing computes layers again with the wrong adapter when policy and critic share a "
                "backbone: turn it off, or set share_backbone=False"
            )
        set_seed(args.seed)
        return SharedBackbone(get_peft_model(model, copy.deepcopy(peft_config)), peft_config, args.temperature)
    critic = value_model or _copy_as_critic(model, load)
    set_seed(args.seed)
    config = copy.deepcopy(peft_config)
    config.task_type, config.exclude_modules = "TOKEN_CLS", list(HEADS)  # the head is trained whole, by PEFT itself
    return SeparateModels(
        get_peft_model(model, copy.deepcopy(peft_config)), get_peft_model(critic, config), args.temperature
    )


def _as_critic(value_model: str | PreTrainedModel) -> PreTrainedModel:
    """A critic that the user gives, loaded if it is an id or path.

    Raises:
        ValueError: it does not give one value per token; in a language model the head for it would be a random one.
    """
    needed = (
        "a value_model is a token classifier with one label, as AutoModelForTokenClassification.from_pretrained(..., "
        f"num_labels=1) loads it from the `{VALUE_FOLDER}` of an earlier run or from a reward model"
    )
    if isinstance(value_model, str):
        path = value_model
        value_model, found = AutoModelForTokenClassification.from_pretrained(
            path, num_labels=1, output_loading_info=True
        )
        if missing := sorted({f"{head}.weight" for head in HEADS} & set(found["missing_keys"])):
            raise ValueError(f"{needed}; {path} has no weights for {', '.join(missing)}")
    if not type(value_model).__name__.endswith("ForTokenClassification"):
        raise ValueError(f"{needed}; not a {type(value_model).__name__}")
    if value_model.config.num_labels != 1:
        raise ValueError(f"{needed}; this one has {value_model.config.num_labels} labels")
    return value_model


def _copy_as_critic(policy: PreTrainedModel, load: Load | None) -> PreTrainedModel:
    """A token classifier on a copy of the policy's backbone; its head is 0, so every value is 0 before the first update."""
    if is_deepspeed_zero3_enabled():
        options = {"architecture": AutoModelForTokenClassification, "num_labels": 1, "dtype": policy.dtype}
        critic = _loaded_again(load, "value_model", **options)
    else:
        config = copy.deepcopy(policy.config)
        config.num_labels = 1
        critic = AutoModelForTokenClassification.from_config(config, dtype=policy.dtype).to(policy.device)
        critic.base_model.load_state_dict(policy.base_model.state_dict())
    head = next(getattr(critic, name) for name in HEADS if hasattr(critic, name))
    with whole(head):
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    return critic


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Gather weights that ZeRO-3 has sharded, and shard again what process 0 made of them."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0):
        yield
