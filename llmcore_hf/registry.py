"""The table of modules: one row each. `--list`, the roadmap and the parametrised tests read it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from llmcore_hf.errors import ConfigError


@dataclass(frozen=True)
class Module:
    """One lesson and training job.

    The code behind `code` offers four functions: `argument_classes()` gives the dataclasses of its options,
    `house_defaults(explicit)` the defaults that depend on the machine, `check(config)` names impossible combinations,
    and `run(config, run_dir)` does the work. One that trains on datasets also offers `as_trained(job, rows, max_length)`,
    what its trainer makes of rows, and `prompt_limit_of(job, max_length)`, for `data inspect`; one that also answers questions
    without training, `only_asks(config)`. Without `code` the module is a lesson in a single file, `recipes/<name>/<name>.py`
    (`lesson`).
    """

    name: str
    day: int
    level: int
    title_zh: str
    title_en: str
    code: str | None = None
    extra: str | None = None  # the optional dependency group it needs
    trains_on: str | None = None  # task of its datasets, as `data.formats` names them
    stages: tuple[str, ...] = ()  # modules that it runs one after the other, each in a directory of its own

    def load(self) -> Any:
        if self.code:
            return import_module(self.code)
        from llmcore_hf import lesson

        return lesson.load(self.name)

    def only_asks(self, config: Any) -> bool:
        """Whether a run with these options trains nothing and only asks a model."""
        asks = getattr(self.load(), "only_asks", None)
        return asks is not None and bool(asks(config))


MODULES = (
    Module("mdp", 1, 1, "MDP 与动态规划", "Markov decision processes and dynamic programming"),
    Module("td_learning", 2, 1, "时序差分：TD 对比蒙特卡洛", "Temporal-difference learning against Monte Carlo"),
    Module("advantage", 3, 2, "优势估计与方差缩减", "Advantage estimation and variance reduction"),
    Module(
        "policy_gradient", 3, 2, "策略梯度：REINFORCE 与基线", "Policy gradient: REINFORCE with and without a baseline"
    ),
    Module("gae", 4, 2, "广义优势估计 GAE", "Generalized advantage estimation"),
    Module("actor_critic", 4, 2, "演员-评论家：A2C", "Actor-critic: A2C"),
    Module("sft", 5, 3, "SFT 入门：监督微调", "Supervised fine-tuning", "llmcore_hf.alignment.sft", trains_on="sft"),
    Module(
        "dpo",
        6,
        3,
        "DPO 对齐：直接偏好优化",
        "Direct preference optimization",
        "llmcore_hf.alignment.dpo",
        trains_on="preference",
    ),
    Module(
        "reward",
        6,
        3,
        "奖励模型：从偏好学打分",
        "Reward modelling: scores from preferences",
        "llmcore_hf.alignment.reward",
        trains_on="preference",
    ),
    Module(
        "ppo", 7, 4, "PPO：近端策略优化", "Proximal policy optimization", "llmcore_hf.alignment.ppo", trains_on="prompt"
    ),
    Module(
        "grpo",
        8,
        4,
        "GRPO：组内相对策略优化",
        "Group relative policy optimization",
        "llmcore_hf.alignment.grpo",
        trains_on="prompt",
    ),
    Module(
        "rlhf",
        9,
        4,
        "RLHF 全流程：SFT、奖励模型、PPO",
        "The RLHF pipeline: SFT, reward model, PPO",
        "llmcore_hf.alignment.rlhf",
        stages=("sft", "reward", "ppo"),
    ),
    Module(
        "blip2",
        12,
        5,
        "BLIP-2：Q-Former 用查询向量读图",
        "BLIP-2: a Q-Former reads the image through queries",
        "llmcore_hf.vlm.blip2",
    ),
    Module(
        "llava",
        12,
        5,
        "LLaVA：投影层把图像变成词元",
        "LLaVA: a projector turns images into tokens",
        "llmcore_hf.vlm.llava",
    ),
    Module(
        "flamingo",
        13,
        5,
        "Flamingo：门控交叉注意力与少样本",
        "Flamingo: gated cross-attention and few-shot",
        "llmcore_hf.vlm.flamingo",
    ),
    Module(
        "vlm",
        13,
        5,
        "三种视觉语言架构的对比：LLaVA、BLIP-2、Flamingo",
        "Three vision-language architectures side by side",
        "llmcore_hf.vlm.compare",
        stages=("llava", "blip2", "flamingo"),
    ),
    Module("cql", 10, 4, "离线强化学习：保守 Q 学习 CQL", "Offline RL: conservative Q-learning"),
    Module("bcq", 11, 4, "离线强化学习：批约束 Q 学习 BCQ", "Offline RL: batch-constrained Q-learning"),
    Module(
        "megatron",
        14,
        5,
        "模型并行：TP、SP、PP、DP 与 3D",
        "Model parallelism: tensor, sequence, pipeline, data, 3D",
        "llmcore_hf.systems.megatron",
    ),
    Module(
        "deepspeed",
        14,
        5,
        "ZeRO：DeepSpeed 0 到 3 与 FSDP2",
        "ZeRO: DeepSpeed 0 to 3 and FSDP2",
        "llmcore_hf.systems.deepspeed",
        extra="deepspeed",
    ),
    Module(
        "elastic",
        14,
        5,
        "容错训练：杀掉进程，接着训练",
        "Fault tolerance: a worker is killed, the job goes on",
        "llmcore_hf.systems.elastic",
    ),
    Module(
        "mixed_precision",
        14,
        5,
        "混合精度：bf16、fp16 与损失缩放",
        "Mixed precision: bf16, fp16 and loss scaling",
        "llmcore_hf.systems.mixed_precision",
    ),
)


def get(name: str) -> Module:
    """The row called `name`.

    Raises:
        ConfigError: there is no such module; the message suggests the nearest name.
    """
    for module in MODULES:
        if module.name == name:
            return module
    names = [module.name for module in MODULES]
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    raise ConfigError([f"there is no module `{name}`.{hint} `--list` shows: {', '.join(names)}"])


def for_task(task: str) -> Module | None:
    """The first module that trains on datasets of that task; None when there is none."""
    return next((module for module in MODULES if module.trains_on == task), None)
