"""Record what TRL 1.12's PPOTrainer computes on fixed tensors: writes `tests/trl_ppo_1_12.json`.

The numbers come from TRL's own statements: the parts of `PPOTrainer.train` that turn log-probabilities, values and scores into
advantages, and a micro-batch into its loss, are cut out of the installed source by their first and last lines and run on the
tensors. Nothing of them is written down again here. TRL 1.12, the last release line with that trainer, goes into
`build/trl`, which the benchmarks of PPO alone use.

    python benchmarks/record_trl_ppo.py
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PEER, VERSION = ROOT / "build" / "trl", "1.12.0"
FIXTURE = ROOT / "tests" / "trl_ppo_1_12.json"
SOURCE = PEER / "trl" / "experimental" / "ppo" / "ppo_trainer.py"
# name -> (first, last) line of a part of `PPOTrainer.train`, by how they begin
PARTS = {
    "rollout": ("contain_eos_token = torch.any(", "advantages = torch.masked_fill(advantages, padding_mask, 0)"),
    "loss": ("logits = output.logits[:, context_length - 1 : -1]", "loss = pg_loss + args.vf_coef * vf_loss"),
    "metrics": ("pg_clipfrac = masked_mean(", "approxkl = 0.5 * (logprobs_diff**2).mean()"),
    "objective": ("mean_kl = kl.sum(1).mean()", "rlhf_reward = mean_non_score_reward + scores.mean()"),
}
PROMPT, TOKENS, VOCABULARY, PAD, EOS = 2, 6, 7, 0, 6
SETTINGS = {
    **{"gamma": 0.97, "lam": 0.9, "kl_coef": 0.05, "kl_estimator": "k1", "temperature": 0.7, "whiten_rewards": False},
    **{"missing_eos_penalty": 1.0, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1},
}
# name -> (lengths of the completions, settings that differ); those shorter than TOKENS end with EOS
CASES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "full": ([6, 6, 6, 6, 6], {}),
    "full, rewards whitened": ([6, 6, 6, 6, 6], {"whiten_rewards": True}),
    "full, k3": ([6, 6, 6, 6, 6], {"kl_estimator": "k3"}),
    "padded": ([1, 6, 3, 5, 2], {}),
    "padded, lambda 1": ([1, 6, 3, 5, 2], {"gamma": 1.0, "lam": 1.0}),
}
RECORDED = {
    "rollout": ("kl", "scores", "rewards", "returns", "advantages"),
    "loss": ("pg_loss", "vf_loss", "loss", "vf_clipfrac"),
    "metrics": ("pg_clipfrac", "entropy", "approxkl", "ratio"),
    "objective": ("mean_kl", "mean_entropy", "mean_non_score_reward", "rlhf_reward"),
}


def install() -> None:
    if not SOURCE.is_file():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(PEER), f"trl=={VERSION}"]
        subprocess.run(command, check=True)


def part(lines: list[str], first: str, last: str) -> tuple[str, tuple[int, int]]:
    """Dedented source from the line that begins with `first` to the one with `last`, and their numbers, from 1."""
    begin = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i in range(begin, len(lines)) if lines[i].strip().startswith(last))
    return textwrap.dedent("\n".join(lines[begin : end + 1])), (begin + 1, end + 1)


def make_inputs(lengths: list[int]) -> dict[str, Tensor]:
    """Tensors rounded to six decimals, so that the file holds them exactly."""
    generator = torch.Generator().manual_seed(0)
    n = len(lengths)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, dtype=torch.float64, generator=generator)).round(decimals=6)

    responses = torch.randint(1, EOS, (n, TOKENS), generator=generator)
    for row, length in enumerate(lengths):
        responses[row, length:] = PAD
        if length < TOKENS:
            responses[row, length - 1] = EOS
    logits = normal(n, PROMPT + TOKENS, VOCABULARY)
    now = (logits[:, PROMPT - 1 : -1] / SETTINGS["temperature"]).log_softmax(-1)
    logprobs = now.gather(-1, responses.unsqueeze(-1)).squeeze(-1) + normal(n, TOKENS, scale=0.3)
    return {
        "lengths": torch.tensor(lengths),
        "responses": responses,
        "logits": logits,  # of the policy that is updated
        "vpred": normal(n, PROMPT + TOKENS, 1),  # of the critic that is updated
        "logprobs": logprobs.round(decimals=6),  # of the policy that generated
        "ref_logprobs": (logprobs + normal(n, TOKENS, scale=0.5)).round(decimals=6),
        "values": normal(n, TOKENS),  # of the critic at the rollout
        "scores": normal(n),
    }


def compute(parts: dict[str, str], trl: Any, inputs: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """Run TRL's statements on the inputs, all rows as one micro-batch; its gradients as well."""
    n = len(inputs["lengths"])
    logits, vpred = inputs["logits"].clone().requires_grad_(), inputs["vpred"].clone().requires_grad_()
    args = SimpleNamespace(**settings)
    tokenizer = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)
    space: dict[str, Any] = {
        **vars(trl),  # the module's own functions, and torch
        "args": args,
        "self": SimpleNamespace(args=args, processing_class=tokenizer),
        "processing_class": tokenizer,
        "context_length": PROMPT,
        "responses": inputs["responses"],
        "postprocessed_responses": inputs["responses"],
        "sequence_lengths": inputs["lengths"] - 1,  # TRL: index of the last token
        **{name: inputs[name].clone() for name in ("logprobs", "ref_logprobs", "values", "scores")},
    }
    exec(parts["rollout"], space)
    space |= {
        "output": SimpleNamespace(logits=logits * 1),  # divided in place by TRL
        "vpred_temp": vpred,
        "micro_batch_inds": torch.arange(n),
        "mb_responses": inputs["responses"],
        "mb_advantage": space["advantages"],
        "mb_logprobs": space["logprobs"],
        "mb_return": space["returns"],
        "mb_values": space["values"],
    }
    exec(parts["loss"], space)
    gradients = torch.autograd.grad(space["loss"], (logits, vpred), retain_graph=True)
    with torch.no_grad():
        exec(parts["metrics"], space)
        exec(parts["objective"], space)
    found = {name: space[name] for names in RECORDED.values() for name in names}
    found |= {"gradient_logits": gradients[0], "gradient_vpred": gradients[1]}
    return {name: tensor.detach().round(decimals=12).tolist() for name, tensor in found.items()}


def main() -> None:
    install()
    torch.set_default_dtype(torch.float64)  # or TRL's quotients of integers would be float32
    sys.path.insert(0, str(PEER))
    from trl.experimental.ppo import ppo_trainer  # type: ignore[import-not-found]

    text = SOURCE.read_text(encoding="utf-8")
    cut = {name: part(text.splitlines(), *ends) for name, ends in PARTS.items()}
    fixture: dict[str, Any] = {
        "source": {
            "package": f"trl {VERSION}",
            "file": "trl/experimental/ppo/ppo_trainer.py",
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "function": "PPOTrainer.train",
            "lines": {name: numbers for name, (_, numbers) in cut.items()},
            "recorded_by": "benchmarks/record_trl_ppo.py",
        },
        "cases": {},
    }
    for name, (lengths, different) in CASES.items():
        settings, inputs = SETTINGS | different, make_inputs(lengths)
        found = compute({name: code for name, (code, _) in cut.items()}, ppo_trainer, inputs, settings)
        fixture["cases"][name] = {
            "settings": settings,
            "inputs": {key: tensor.tolist() for key, tensor in inputs.items()},
            "found": found,
        }
    FIXTURE.write_text(json.dumps(fixture) + "\n", encoding="utf-8")
    print(f"{FIXTURE.relative_to(ROOT)}: {FIXTURE.stat().st_size / 1000:.0f} kB, {', '.join(CASES)}")


if __name__ == "__main__":
    main()
