"""LLaVA: image features become tokens of a language model through a small MLP, the projector.

    H_v = W_2 gelu(W_1 Z_v)          Z_v: features of the patches, (patches, vision width)
    p(answer | image, question) = product over t of p_LM(x_t | H_v, question, x_<t)

(Liu et al. 2023, arXiv:2304.08485, equations 1 and 2; the MLP of two layers is that of LLaVA-1.5, arXiv:2310.03744.) The loss is
the next-token loss of SFT, on the answer alone. Training has two stages:

    1. alignment            the projector alone learns, on captions; vision tower and language model are frozen
    2. instruction tuning   the language model (or LoRA on it) learns, too; the vision tower stays frozen

Every patch becomes a token: simple, nothing is lost, and long. Trainer: TRL's SFTTrainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from trl import SFTTrainer

from llmcore_hf.alignment.evaluation import GenerationArguments
from llmcore_hf.alignment.training import ModelArguments
from llmcore_hf.config import Config, RunArguments
from llmcore_hf.data.loading import DataArguments, Splits
from llmcore_hf.vlm import training
from llmcore_hf.vlm.evaluation import encode_prompts
from llmcore_hf.vlm.lesson import VisionLesson
from llmcore_hf.vlm.training import Stage, StagedTrainer, VisionArguments, VisionJob, caption_rows

if TYPE_CHECKING:
    import numpy as np
    from trl import SFTConfig

house_defaults, only_asks = training.house_defaults, training.only_asks
check = training.check_options
PROJECTOR, TOWER, LANGUAGE_MODEL = "multi_modal_projector", "vision_tower", "language_model"
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def argument_classes() -> tuple[type, ...]:
    from trl import SFTConfig

    return (RunArguments, VisionArguments, DataArguments, GenerationArguments, ModelArguments, SFTConfig)


class LlavaTrainer(StagedTrainer, SFTTrainer):
    """TRL's SFTTrainer, in stages."""


class Llava(VisionLesson):
    name, title, kinds, tower = "llava", "LLaVA", ("llava",), "model.vision_tower"

    def make_trainer(self, config: Config, job: VisionJob, splits: Splits, args: SFTConfig) -> LlavaTrainer:
        from trl import get_quantization_config

        model_args, options = config.part(ModelArguments), config.part(VisionArguments)
        lengths = training.stage_lengths(args, options.stage1_steps, len(splits.train))
        trainer = LlavaTrainer(
            model=job.path,
            args=args,
            train_dataset=splits.train,
            eval_dataset=splits.validation,
            processing_class=job.processor,
            peft_config=training.peft_config(model_args, LORA_TARGETS, [PROJECTOR]),
            quantization_config=get_quantization_config(model_args),
        )
        rows = splits.train
        trainer.begin(
            [
                Stage(
                    "alignment",
                    lengths[0],
                    options.stage1_learning_rate,
                    lambda n: PROJECTOR in n,
                    caption_rows(rows),
                    frozen=(TOWER, LANGUAGE_MODEL),
                ),
                Stage(
                    "instruction tuning",
                    lengths[1],
                    args.learning_rate,
                    lambda n: TOWER not in n,
                    range(len(rows)),
                    frozen=(TOWER,),
                ),
            ]
        )
        return trainer

    def look(self, model: Any, job: VisionJob, rows: list[dict[str, Any]]) -> tuple[list[str], np.ndarray]:
        """For each layer, attention from the last token of the prompt to the tokens of the last image, averaged over heads."""
        inputs = encode_prompts(job.processor, rows).to(model.device)
        with training.eager_attention(model):
            attentions = model(**inputs, output_attentions=True).attentions  # layers of (B, H, T, T)
        image_tokens = inputs["input_ids"] == job.processor.image_token_id  # (B, T)
        n_patches = int(image_tokens.sum()) // sum(len(row["images"]) for row in rows)
        last = [mask.nonzero().squeeze(1)[-n_patches:] for mask in image_tokens]  # places of each row's last image
        maps = [
            torch.stack([w[places] for w, places in zip(a[:, :, -1].mean(dim=1), last, strict=True)])
            for a in attentions
        ]
        return training.as_grids({f"layer {i + 1}": m for i, m in enumerate(maps)})


LESSON = Llava()
run = LESSON.run
