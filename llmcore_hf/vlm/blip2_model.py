"""BLIP-2 with the heads of its first stage, which `transformers` offers for inference only.

The Q-Former is one transformer that reads images through learned queries and text through word embeddings; queries and text
meet in its self-attention. Which of them may see which is all that tells the three objectives apart (Li et al. 2023,
arXiv:2301.12597, section 3.2 and figure 2):

    ITC   contrastive     uni-modal        queries see queries, text sees text: two passes
    ITM   matching        bi-directional   all see all
    ITG   generation      causal           queries see queries; a word sees the queries and the words before it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, normalize
from transformers import Blip2Config, Blip2ForConditionalGeneration
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings
from transformers.utils import ModelOutput

IGNORED = -100


@dataclass
class Stage1Output(ModelOutput):
    """Losses of the first stage, all means in nats, and the share of image-text pairs told right."""

    loss: torch.Tensor | None = None
    itc: torch.Tensor | None = None
    itm: torch.Tensor | None = None
    itg: torch.Tensor | None = None
    itm_accuracy: torch.Tensor | None = None


class Blip2ForTwoStages(Blip2ForConditionalGeneration):
    """`Blip2ForConditionalGeneration` and, beside it, what the first stage trains: text embeddings and three heads.

    The names are those of `Blip2ForImageTextRetrieval`, so either class loads what it needs from the same weights. The config
    must have `qformer_config.use_qformer_text_input`.
    """

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        width, shared = config.qformer_config.hidden_size, config.image_text_hidden_size
        self.embeddings = Blip2TextEmbeddings(config.qformer_config)
        self.vision_projection = nn.Linear(width, shared)
        self.text_projection = nn.Linear(width, shared)
        self.itm_head = nn.Linear(width, 2)
        self.itg_head = nn.Linear(width, config.qformer_config.vocab_size)
        self.temperature = nn.Parameter(torch.tensor(0.07))  # as in BLIP
        self.post_init()
        nn.init.normal_(self.query_tokens, std=0.5)  # zeros, all alike, would stay all alike

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        text_ids: torch.Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """The first stage's losses when there is `text_ids`, else what BLIP-2 does."""
        if text_ids is not None:
            return self.stage1(pixel_values, text_ids, **inputs)
        return super().forward(pixel_values=pixel_values, input_ids=input_ids, labels=labels, **inputs)

    def stage1(
        self, pixel_values: torch.Tensor, text_ids: torch.Tensor, text_mask: torch.Tensor, dec_id: int
    ) -> Stage1Output:
        """The sum of the three losses for matching images and texts.

        Args:
            pixel_values: (B, 3, H, W).
            text_ids: (B, T), each beginning with `[CLS]`, padded on the right.
            text_mask: (B, T), 1 for a token.
            dec_id: the token that takes the place of `[CLS]` when the text is to be written.
        """
        images = self.vision_model(pixel_values).last_hidden_state  # (B, P, D)
        queries = self.queries_of(images)  # (B, Q, D)
        similarity = self.similarity(queries, self.text_features(text_ids, text_mask)) / self.temperature  # (B, B)
        same = (text_ids[:, None] == text_ids[None]).all(-1)  # (B, B): equal texts are no negatives of each other
        itc = contrastive_loss(similarity, same)
        rows = torch.arange(len(text_ids), device=text_ids.device)
        wrong_text, wrong_image = hard_negatives(similarity.detach(), same)
        image_rows, text_rows = torch.cat([rows, rows, wrong_image]), torch.cat([rows, wrong_text, rows])
        logits = self.match(images[image_rows], text_ids[text_rows], text_mask[text_rows])  # (3B, 2)
        matches = torch.arange(len(logits), device=logits.device) < len(rows)
        itm = cross_entropy(logits, matches.long())
        itg = self.generation_loss(images, text_ids, text_mask, dec_id)
        accuracy = (logits.argmax(-1) == matches).float()
        balanced = (accuracy[matches].mean() + accuracy[~matches].mean()) / 2
        return Stage1Output(itc + itm + itg, itc, itm, itg, balanced.detach())

    def queries_of(self, images: torch.Tensor) -> torch.Tensor:
        """(B, P, D) features of patches -> (B, Q, D) outputs of the queries, without text."""
        queries = self.query_tokens.expand(len(images), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=images).last_hidden_state

    def text_features(self, text_ids: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, D), the output at `[CLS]`, without any image."""
        embedded = self.embeddings(input_ids=text_ids)
        return self.qformer(query_embeds=embedded, query_length=0, attention_mask=text_mask).last_hidden_state[:, 0]

    def similarity(self, queries: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """(N, Q, D) and (M, D) -> (N, M): the cosine of the best query of each image."""
        queries = normalize(self.vision_projection(queries), dim=-1)
        texts = normalize(self.text_projection(texts), dim=-1)
        return torch.einsum("nqd,md->nqm", queries, texts).amax(dim=1)

    def match(self, images: torch.Tensor, text_ids: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        """(N, P, D) and (N, T) -> (N, 2), logits of `does not match` and `matches`, the mean over the queries."""
        queries = self.query_tokens.expand(len(images), -1, -1)
        joint = self.embeddings(input_ids=text_ids, query_embeds=queries)
        mask = torch.cat([text_mask.new_ones(queries.shape[:2]), text_mask], dim=1)
        output = self.qformer(
            query_embeds=joint, query_length=queries.shape[1], attention_mask=mask, encoder_hidden_states=images
        ).last_hidden_state
        return self.itm_head(output[:, : queries.shape[1]]).mean(dim=1)

    def generation_logits(self, images: torch.Tensor, text_ids: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        """(B, P, D) and (B, T) -> (B, T, V): at each word, logits of the next."""
        queries = self.query_tokens.expand(len(images), -1, -1)
        joint = self.embeddings(input_ids=text_ids, query_embeds=queries)
        mask = multimodal_causal_mask(queries.shape[1], text_mask, joint.dtype)
        output = self.qformer(
            query_embeds=joint, query_length=queries.shape[1], attention_mask=mask, encoder_hidden_states=images
        ).last_hidden_state
        return self.itg_head(output[:, queries.shape[1] :])

    def generation_loss(
        self, images: torch.Tensor, text_ids: torch.Tensor, text_mask: torch.Tensor, dec_id: int
    ) -> torch.Tensor:
        """Mean negative log-likelihood of the words of each text, given its image."""
        ids = torch.cat([torch.full_like(text_ids[:, :1], dec_id), text_ids[:, 1:]], dim=1)
        logits = self.generation_logits(images, ids, text_mask)[:, :-1]
        labels = ids[:, 1:].masked_fill(text_mask[:, 1:] == 0, IGNORED)
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def contrastive_loss(similarity: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """InfoNCE in both directions over (B, B) logits; where several texts are equal, the target is spread over them.

    With `same` the identity this is the loss of CLIP (arXiv:2103.00020, figure 3), as in ITC.
    """
    target = same.float() / same.sum(dim=1, keepdim=True)  # (B, B), symmetric in its support
    to_text = -(target * log_softmax(similarity, dim=1)).sum(dim=1).mean()
    to_image = -(target * log_softmax(similarity.T, dim=1)).sum(dim=1).mean()
    return (to_text + to_image) / 2


def hard_negatives(similarity: torch.Tensor, same: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) a wrong text for each image and (B,) a wrong image for each text, the likelier the more similar (BLIP-2, ITM)."""

    def draw(logits: torch.Tensor) -> torch.Tensor:
        weights = logits.masked_fill(same, -torch.inf).softmax(dim=1)
        alike = same.all(dim=1, keepdim=True)  # a batch of one text only has no negatives: any row is as wrong
        return torch.multinomial(torch.where(alike, torch.ones_like(weights), weights), 1).squeeze(1)

    return draw(similarity), draw(similarity.T)


def multimodal_causal_mask(n_queries: int, text_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask of ITG, (B, 1, Q + T, Q + T): 0 where a row may see a column, the lowest number where not.

    Queries see queries and no text; a word sees all queries, and the words up to itself that are no padding.
    """
    batch, n_text = text_mask.shape
    n = n_queries + n_text
    may_see = torch.ones(n, n, dtype=torch.bool, device=text_mask.device).tril()
    may_see[:n_queries, :n_queries] = True
    keys = torch.cat([text_mask.new_ones(batch, n_queries), text_mask], dim=1).bool()  # (B, Q + T)
    seen = (may_see[None] & keys[:, None])[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=text_mask.device).masked_fill(~seen, torch.finfo(dtype).min)
