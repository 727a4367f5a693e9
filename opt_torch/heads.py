"""Heads on the decoder for sequences and for spans, in PyTorch.

    OPTForSequenceClassification ── score, at one position a row ── logits BC
    OPTForQuestionAnswering ── qa_outputs ── start_logits BT, end_logits BT
      OPTModel

Names and numbers are Hugging Face's; the definition is `opt_common.reference`. Axis letters: B batch, T query length,
E word_embed_proj_dim, C labels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from opt_common.config import OPTConfig, problem_type_of
from opt_common.inputs import reject_dropped
from opt_common.outputs import OPTQuestionAnsweringOutput, OPTSequenceClassifierOutput
from opt_common.reference import IGNORED_LABEL
from opt_torch.cache import KVCache
from opt_torch.checkpoint import Pretrained
from opt_torch.layers import Builder
from opt_torch.lora import Adaptable
from opt_torch.modeling import OPTModel, check
from opt_torch.quantized import Int8Embedding
from opt_torch.training import Trainable


class OPTForSequenceClassification(Adaptable, Trainable, Pretrained, nn.Module):
    """The sequence classifier: token ids in, logits of the labels out."""

    head = "sequence_classification"

    def __init__(
        self,
        config: OPTConfig,
        *,
        attn_implementation: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """A model with new weights and `config.num_labels` outputs, in training mode. Arguments: see `OPTModel`."""
        super().__init__()
        C, E = config.num_labels, config.word_embed_proj_dim
        self.config = config
        self.model = OPTModel(config, attn_implementation=attn_implementation, dtype=dtype, device=device)
        build = Builder(config.replace(quantization=None), dtype, device)
        self.score = build.linear(E, C, use_bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **dropped: Any,
    ) -> OPTSequenceClassifierOutput:
        """Compute logits and, given labels, the loss.

        Logits are those at the rightmost position that is attended to and does not hold the pad id, on whichever side
        the padding is; `opt_common.reference.pooled_positions` is the rule in full.

        Args:
            labels: by `config.problem_type`, (B,) integers from 0 to C - 1, of which -100 does not count; (B, C) of 0
                and 1; or (B, C) of any numbers, (B,) with one label. `opt_common.config.problem_type_of` infers it.

        The other arguments and the errors are those of `OPTModel`. Several rows of ids need an attention mask or a
        `pad_token_id`.
        """
        reject_dropped(dropped)
        check(
            self.config,
            past_key_values,
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            labels,
            head=self.head,
        )
        offset = 0 if past_key_values is None else past_key_values.length
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=False if use_cache is None and labels is not None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        hidden_BTE = outputs.last_hidden_state
        positions_B = pooled_positions(self.config, hidden_BTE, input_ids, attention_mask, offset)
        pooled_BE = hidden_BTE[torch.arange(hidden_BTE.shape[0], device=hidden_BTE.device), positions_B]
        logits_BC = self.score(pooled_BE)
        return OPTSequenceClassifierOutput(
            loss=None if labels is None else sequence_classification_loss(self.config, logits_BC, labels),
            logits=logits_BC,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_input_embeddings(self) -> nn.Embedding | Int8Embedding:
        """The token table."""
        return self.model.get_input_embeddings()


class OPTForQuestionAnswering(Adaptable, Trainable, Pretrained, nn.Module):
    """Extractive question answering: token ids in, logits of where the answer starts and ends out."""

    head = "question_answering"

    def __init__(
        self,
        config: OPTConfig,
        *,
        attn_implementation: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """A model with new weights, in training mode. Arguments are those of `OPTModel`."""
        super().__init__()
        E = config.word_embed_proj_dim
        self.config = config
        self.model = OPTModel(config, attn_implementation=attn_implementation, dtype=dtype, device=device)
        build = Builder(config.replace(quantization=None), dtype, device)
        self.qa_outputs = build.linear(E, 2, use_bias=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **dropped: Any,
    ) -> OPTQuestionAnsweringOutput:
        """Compute logits and, given where the answers are, the loss.

        Args:
            start_positions: (B,) integers, the first token of each answer. One behind the last token does not count,
                as of an answer that was cut off; one before the first is taken for the first.
            end_positions: (B,) integers, the last token of each answer.

        The other arguments and the errors are those of `OPTModel`.
        """
        reject_dropped(dropped)
        check(
            self.config,
            past_key_values,
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            start_positions=start_positions,
            end_positions=end_positions,
            head=self.head,
        )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=False if use_cache is None and start_positions is not None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        logits_BT2 = self.qa_outputs(outputs.last_hidden_state)
        start_BT, end_BT = logits_BT2[..., 0], logits_BT2[..., 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = question_answering_loss(start_BT, end_BT, start_positions, end_positions)
        return OPTQuestionAnsweringOutput(
            loss=loss,
            start_logits=start_BT,
            end_logits=end_BT,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_input_embeddings(self) -> nn.Embedding | Int8Embedding:
        """The token table."""
        return self.model.get_input_embeddings()


def pooled_positions(
    config: OPTConfig, hidden_BTE: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, offset: int
) -> Tensor:
    """`opt_common.reference.pooled_positions`, (B,), without a look at a value on the host.

    Args:
        config: the model's configuration.
        hidden_BTE: what is pooled.
        input_ids: (B, T), or None.
        attention_mask: (B, offset + T), or None.
        offset: number of tokens in the cache, which the mask covers too.
    """
    B, T = hidden_BTE.shape[:2]
    attended_BT = torch.ones((B, T), dtype=torch.bool, device=hidden_BTE.device)
    if attention_mask is not None:
        attended_BT = attention_mask[:, offset : offset + T] != 0
    counted_BT = attended_BT
    if input_ids is not None and config.pad_token_id is not None:
        counted_BT = attended_BT & (input_ids != config.pad_token_id)
    # No two positions of a row have the same rank, so that the choice is no framework's: those that count come first,
    # from the right; then the others that are attended to, from the left.
    index_T = torch.arange(T, device=hidden_BTE.device)
    rank_BT = torch.where(counted_BT, T + index_T, torch.where(attended_BT, T - index_T, -index_T))
    return rank_BT.argmax(dim=1)


def sequence_classification_loss(config: OPTConfig, logits_BC: Tensor, labels: Tensor) -> Tensor:
    """`opt_common.reference.sequence_classification_loss`, in float32 at least."""
    kind = problem_type_of(config, labels.dtype)
    logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
    labels = labels.to(logits_BC.device)
    if kind == "single_label_classification":
        return cross_entropy(logits_BC, labels.reshape(-1))
    labels_BC = labels.reshape(logits_BC.shape).to(logits_BC.dtype)
    if kind == "regression":
        return ((logits_BC - labels_BC) ** 2).mean()
    return functional.binary_cross_entropy_with_logits(logits_BC, labels_BC)


def question_answering_loss(start_BT: Tensor, end_BT: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """`opt_common.reference.question_answering_loss`, in float32 at least."""
    losses: list[Tensor] = []
    for logits, positions in ((start_BT, start_positions), (end_BT, end_positions)):
        logits_BT = logits.to(torch.promote_types(logits.dtype, torch.float32))
        positions_B = positions.to(logits_BT.device).reshape(-1).clamp(min=0)
        labels_B = torch.where(positions_B < logits_BT.shape[1], positions_B, IGNORED_LABEL)
        losses.append(cross_entropy(logits_BT, labels_B))
    return (losses[0] + losses[1]) / 2


def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Mean cross-entropy over the labels that are not -100; NaN if all are."""
    return functional.cross_entropy(logits_BC, labels_B.long(), ignore_index=IGNORED_LABEL)
