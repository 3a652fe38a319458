"""BLIP-2: a small transformer with learned queries, the Q-Former, reads the image and says it to a frozen language model.

    Z = Q-Former(queries; cross-attention to the patches)        (Q, D): as many vectors as queries, however many patches
    p(answer | image, question) = product over t of p_LM(x_t | W Z, question, x_<t)

(Li et al. 2023, arXiv:2301.12597.) Vision tower and, as published, language model are frozen. Training has two stages:

    1. representation   the Q-Former alone, on images and captions, with three losses of equal weight: image-text contrastive
                        (ITC), image-text matching (ITM) on hard negatives, image-grounded text generation (ITG)
    2. generation       Q-Former and projection (and the language model, with `--train_language_model` or LoRA) learn to make
                        the language model answer; its loss is that of SFT, on the answer alone

The queries are a bottleneck: few tokens, trained to hold what text says about images. Trainer: transformers' Trainer with
TRL's collator for images (TRL's SFTTrainer does not take BLIP-2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from llmcore_hf.alignment.evaluation import GenerationArguments, evaluating
from llmcore_hf.alignment.training import ModelArguments
from llmcore_hf.checks import Check
from llmcore_hf.config import Config, RunArguments
from llmcore_hf.curves import HELD_OUT, REJECTED, SHARE, TRAIN, Line, Panel
from llmcore_hf.data.loading import DataArguments, Splits
from llmcore_hf.errors import UserError
from llmcore_hf.run_dir import RunDirectory
from llmcore_hf.stats import Z95
from llmcore_hf.vlm import tiny, training
from llmcore_hf.vlm.blip2_model import Blip2ForTwoStages, hard_negatives
from llmcore_hf.vlm.data import answer_of, is_caption
from llmcore_hf.vlm.evaluation import HeldOut, encode_prompts, padded, scores
from llmcore_hf.vlm.lesson import VisionLesson
from llmcore_hf.vlm.training import Stage, StagedTrainer, VisionArguments, VisionJob, caption_rows

if TYPE_CHECKING:
    import numpy as np
    from trl import SFTConfig

house_defaults, only_asks = training.house_defaults, training.only_asks
IMAGES_PER_ROW = 1
TOWER, LANGUAGE_MODEL = "vision_model", "language_model"
GENERATES = ("qformer", "query_tokens", "language_projection")  # what learns in the second stage
STAGE1_HEADS = ("embeddings", "vision_projection", "text_projection", "itm_head", "itg_head", "temperature")
REPRESENTS = ("qformer", "query_tokens", *STAGE1_HEADS)  # what learns in the first
LORA_TARGETS = (  # linear layers of the published language models (OPT), of Llama and Qwen
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|out_proj|gate_proj|up_proj|down_proj|fc1|fc2)"
)
# Published BLIP-2 checkpoints have no chat template; this is the prompt of the paper's VQA (section 4.2).
QUESTION_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['content'] is string %}{%- set text = message['content'] %}"
    "{%- else %}{%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{{- ' ' + text + eos_token }}"
    "{%- else %}{{- 'Question: ' + text + ' Answer:' }}{%- endif %}"
    "{%- endfor %}"
)
STAGE1, STAGE2, STAGE3 = "representation", "generation", "generation, language model too"


@dataclass
class Blip2Arguments:
    """Options of BLIP-2 alone."""

    language_model_steps: int = field(
        default=0,
        metadata={
            "help": "The last steps, out of --max_steps, in which the language model learns, too: all of it, or LoRA with "
            "--use_peft. 0 keeps it frozen, as published; with --use_peft, all steps of the second stage."
        },
    )


def argument_classes() -> tuple[type, ...]:
    from trl import SFTConfig

    return (
        RunArguments,
        Blip2Arguments,
        VisionArguments,
        DataArguments,
        GenerationArguments,
        ModelArguments,
        SFTConfig,
    )


def check(config: Config) -> list[str]:
    """Impossible combinations of options, one sentence each."""
    values, problems = config.values, training.check_options(config, IMAGES_PER_ROW)
    if values["language_model_steps"] < 0:
        problems.append(f"--language_model_steps must not be negative, not {values['language_model_steps']}")
    elif 0 < values["max_steps"] < values["stage1_steps"] + values["language_model_steps"]:
        problems.append(
            f"--stage1_steps {values['stage1_steps']} and --language_model_steps {values['language_model_steps']} are more "
            f"than --max_steps {values['max_steps']}"
        )
    if values["use_peft"] and values["stage1_steps"]:
        problems.append("--stage1_steps trains all of the Q-Former, which --use_peft freezes: run one after the other")
    return problems


@dataclass
class Blip2Collator:
    """Batches for both stages: TRL's, with all padding on the right, and the answers alone as text for the Q-Former."""

    collator: DataCollatorForVisionLanguageModeling

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        answers = [answer_of(row) for row in rows]
        batch = padded(self.collator([dict(row) for row in rows]), "right")
        text = text_inputs(self.collator.processor.tokenizer, answers)
        return {**batch, "text_ids": text["input_ids"], "text_mask": text["attention_mask"]}


def text_inputs(tokenizer: Any, texts: list[str]) -> Any:
    """Texts for the Q-Former: `[CLS]`, the text, end of sequence; padded on the right."""
    texts = [tiny.CLS + text + tokenizer.eos_token for text in texts]
    options = {"padding": True, "padding_side": "right", "add_special_tokens": False, "return_tensors": "pt"}
    return tokenizer(texts, **options)


class Blip2Trainer(StagedTrainer):
    """transformers' Trainer with the loss of the stage it is in."""

    def __init__(self, dec_id: int, **options: Any) -> None:
        super().__init__(**options)
        self.dec_id = dec_id
        self.losses: list[dict[str, float]] = []  # of the first stage, since the last logged row

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not (model.training and self.stage_at(self.state.global_step).name == STAGE1):
            kept = {name: value for name, value in inputs.items() if name not in ("text_ids", "text_mask")}
            return super().compute_loss(model, kept, return_outputs, num_items_in_batch)
        names = ("pixel_values", "text_ids", "text_mask")
        output = model(**{name: inputs[name] for name in names}, dec_id=self.dec_id)
        self.losses.append({name: output[name].item() for name in ("itc", "itm", "itg", "itm_accuracy")})
        loss = output.loss / self.current_gradient_accumulation_steps  # a mean over rows, not a sum over tokens
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.losses:
            logs |= {name: sum(row[name] for row in self.losses) / len(self.losses) for name in self.losses[0]}
            self.losses = []
        super().log(logs, *args, **kwargs)

    def generation_inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: v for n, v in super().generation_inputs(batch).items() if n not in ("text_ids", "text_mask")}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint holds everything; what the run leaves is plain `Blip2ForConditionalGeneration`."""
        model = self.accelerator.unwrap_model(self.model)
        if _internal_call or not isinstance(model, Blip2ForTwoStages):
            super().save_model(output_dir, _internal_call)
            return
        state = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            export(model, state, Blip2ForConditionalGeneration, str(output_dir))
            self.processing_class.save_pretrained(output_dir)


def export(model: Any, state: dict[str, torch.Tensor], cls: Any, folder: str) -> None:
    """Save the weights that `cls` has, as a checkpoint of `cls`."""
    with torch.device("meta"):
        plain = cls(model.config)
    plain.load_state_dict({name: state[name] for name in plain.state_dict()}, assign=True)
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)


class Blip2(VisionLesson):
    name, title, kinds, images_per_row, tower = "blip2", "BLIP-2", ("blip-2",), IMAGES_PER_ROW, TOWER
    default_template = QUESTION_TEMPLATE
    panels = (
        Panel(
            "Stage 1: losses of the Q-Former (training)",
            (Line("itc", "contrastive", TRAIN), Line("itm", "matching", HELD_OUT), Line("itg", "generation", REJECTED)),
        ),
        Panel(
            "Stage 1: image-text pairs told right (training)",
            (Line("itm_accuracy", "matching", HELD_OUT),),
            level=0.5,
            level_label="chance",
            limits=SHARE,
        ),
    )

    def shown_history(self, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The first stage's loss is another: it stands in a panel of its own, as the three it is the sum of."""
        return [{n: v for n, v in row.items() if n != "loss"} if "itc" in row else row for row in history]

    def make_trainer(self, config: Config, job: VisionJob, splits: Splits, args: SFTConfig) -> Blip2Trainer:
        from peft import get_peft_model
        from trl import get_quantization_config

        model_args, options = config.part(ModelArguments), config.part(VisionArguments)
        model = load_model(job, options.stage1_steps > 0, args, get_quantization_config(model_args))
        peft = training.peft_config(model_args, LORA_TARGETS, ["language_projection"])
        model = model if peft is None else get_peft_model(model, peft)
        args.remove_unused_columns = False  # the collator wants images and turns, which the model does not know
        stage1, stage2 = training.stage_lengths(args, options.stage1_steps, len(splits.train))
        with_lm = config.part(Blip2Arguments).language_model_steps
        with_lm = min(stage2, with_lm if with_lm or peft is None else stage2)
        trainer = Blip2Trainer(
            job.tokenizer.convert_tokens_to_ids(tiny.DEC) if stage1 else -1,
            model=model,
            args=args,
            train_dataset=splits.train,
            eval_dataset=splits.validation,
            processing_class=job.processor,
            data_collator=Blip2Collator(
                DataCollatorForVisionLanguageModeling(job.processor, args.max_length, completion_only_loss=True)
            ),
        )
        rows, frozen, rate = splits.train, (TOWER, LANGUAGE_MODEL), args.learning_rate
        everything = range(len(rows))
        with_language_model = starts_with((*GENERATES, LANGUAGE_MODEL))
        trainer.begin(
            [
                Stage(
                    STAGE1, stage1, options.stage1_learning_rate, starts_with(REPRESENTS), caption_rows(rows), frozen
                ),
                Stage(STAGE2, stage2 - with_lm, rate, starts_with(GENERATES), everything, frozen),
                Stage(STAGE3, with_lm, rate, with_language_model, everything, frozen=(TOWER,)),
            ]
        )
        return trainer

    def milestone(
        self, stage: str, trainer: StagedTrainer, job: VisionJob, held_out: HeldOut
    ) -> dict[str, list[float]]:
        """After the first stage what its three objectives can do; after the second what the frozen language model answers."""
        if stage == STAGE1:
            return measure_stage1(trainer, job, held_out)
        questions = [row for row in held_out.rows if not is_caption(row)]
        return {"frozen_lm/vqa_accuracy": scores(questions, held_out.ask(questions, trainer, job).texts)}

    def leave(self, stage: str, trainer: StagedTrainer, run_dir: RunDirectory) -> None:
        """The first stage leaves a model for retrieval."""
        if stage == STAGE1 and trainer.args.should_save:
            model = trainer.accelerator.unwrap_model(trainer.model)
            with run_dir.folder("stage1") as folder:
                export(model, model.state_dict(), Blip2ForImageTextRetrieval, str(folder))
                trainer.processing_class.save_pretrained(folder)

    def look(self, model: Any, job: VisionJob, rows: list[dict[str, Any]]) -> tuple[list[str], np.ndarray]:
        """Cross-attention of each query to the patches in the last layer, averaged over heads."""
        inputs = encode_prompts(job.processor, rows).to(model.device)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        with training.eager_attention(model):
            images = base.vision_model(inputs["pixel_values"]).last_hidden_state
            queries = base.query_tokens.expand(len(rows), -1, -1)
            output = base.qformer(query_embeds=queries, encoder_hidden_states=images, output_attentions=True)
        weights = output.cross_attentions[-1].mean(dim=1)[..., 1:]  # (B, Q, patches), without the class token
        return training.as_grids({f"query {i + 1}": weights[:, i] for i in range(min(8, weights.shape[1]))})

    def end_checks(self, block: dict[str, Any], after: dict[str, list[float]]) -> list[Check]:
        name = "stage1/itm_accuracy"
        if name not in block["after"]:
            return []
        n, accuracy = block["n"][name], block["after"][name]
        margin = Z95 * 0.5 / n**0.5
        return [
            Check(
                "blip2.itm_above_chance",
                "learning",
                accuracy - margin > 0.5,
                {"accuracy": accuracy, "chance": 0.5, "pairs": n},
                f"more than chance, 0.5, by more than {margin:.3f}, the 95 % half-width of guessing {n} pairs",
                "留出集上的图文匹配（一半是难负例）停在 0.5，说明 Q-Former 没有学会把词和图对上。",
                "Matching held-out images and texts, half of them hard negatives, at 0.5 means that the Q-Former does not "
                "compare words with what is seen.",
            )
        ]


def starts_with(prefixes: tuple[str, ...]) -> Any:
    """Name of a parameter -> whether it lies in one of those parts of the model, within PEFT's wrapper or without."""
    return lambda name: name.removeprefix("base_model.model.").startswith(prefixes)


def load_model(job: VisionJob, with_stage1: bool, args: SFTConfig, quantization_config: Any) -> Any:
    """The model, with the heads of the first stage where they are trained.

    Raises:
        UserError: the checkpoint has no text input in its Q-Former, or a language model with an encoder.
    """
    from transformers import AutoConfig

    options = dict(args.model_init_kwargs or {})
    config = AutoConfig.from_pretrained(job.path, revision=options.get("revision"))
    if not config.use_decoder_only_language_model:
        raise UserError(
            f"{job.name} has a language model with encoder and decoder, which is not trained here: take one with OPT"
        )
    if with_stage1 and not config.qformer_config.use_qformer_text_input:
        raise UserError(
            f"the Q-Former of {job.name} reads no text, so there is no first stage: leave --stage1_steps at 0"
        )
    cls = Blip2ForTwoStages if with_stage1 else Blip2ForConditionalGeneration
    return cls.from_pretrained(job.path, quantization_config=quantization_config, **options)


@torch.no_grad()
def measure_stage1(trainer: StagedTrainer, job: VisionJob, held_out: HeldOut) -> dict[str, list[float]]:
    """On held-out images and captions, one value each: matching pairs and hard negatives told apart (ITM), the right text
    found among all (ITC), every word of the text the likeliest one (ITG)."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    captions = [row for row in held_out.rows if is_caption(row)]
    rows = captions or held_out.rows  # as `caption_rows` chooses what the stage trains on
    device = trainer.accelerator.device
    text = text_inputs(job.tokenizer, [answer_of(row) for row in rows]).to(device)
    ids, mask = text["input_ids"], text["attention_mask"]
    pixels = job.processor.image_processor([row["images"][0] for row in rows], return_tensors="pt")["pixel_values"]
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(0)  # hard negatives are drawn
        images = model.vision_model(pixels.to(device)).last_hidden_state
        similarity = model.similarity(model.queries_of(images), model.text_features(ids, mask)) / model.temperature
        same = (ids[:, None] == ids[None]).all(-1)
        wrong, _ = hard_negatives(similarity, same)
        right = model.match(images, ids, mask).argmax(-1) == 1
        told = model.match(images, ids[wrong], mask[wrong]).argmax(-1) == 0
        written = ids.clone()
        written[:, 0] = job.tokenizer.convert_tokens_to_ids(tiny.DEC)
        logits = model.generation_logits(images, written, mask)[:, :-1]
    found = same.gather(1, similarity.argmax(dim=1, keepdim=True)).squeeze(1)
    words = ((logits.argmax(-1) == written[:, 1:]) | (mask[:, 1:] == 0)).all(dim=1)
    values = {"itm": torch.cat([right, told]), "itc": found, "itg": words}
    return {f"stage1/{name}_accuracy": value.float().tolist() for name, value in values.items()}


LESSON = Blip2()
run = LESSON.run
