"""Text generation in PyTorch: the decoder that `opt_common.generation` drives."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opt_common.generation import Ids, decode, read_prompt
from opt_torch.cache import KVCache

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM


@torch.no_grad()  # not inference_mode: what comes out of that can go into no call that tracks gradients
def generate(
    model: "OPTForCausalLM", input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any
) -> Tensor:
    """Continue each prompt with its likeliest tokens.

    Args:
        model: the language model; dropout is off whatever mode it is in.
        input_ids: (B, T) integers.
        attention_mask: (B, T), 1 for a token and 0 for padding, on either side or in between; None means no padding.
        settings: fields of `opt_common.generation.GenerationConfig`, such as `max_new_tokens` or `eos_token_id`, in
            place of those of `model.generation_config`.

    Returns:
        (B, T + new) ids: the prompts as they were given, then the new tokens, finished rows filled with the pad token.

    Raises:
        InputError: for ids out of range, an empty prompt or a mask that does not fit.
        GenerationError: for a setting that cannot be, or a continuation with no room.
    """
    options = model.generation_config.updated(**settings)
    host_mask = None if attention_mask is None else attention_mask.cpu().numpy()
    prompt = read_prompt(model.config, options, input_ids.cpu().numpy(), host_mask)
    training = model.training
    model.eval()
    try:
        decoder = Decoder(model, prompt.new_tokens)
        new_ids = [torch.from_numpy(tokens_B) for tokens_B in decode(decoder, prompt, options)]
    finally:
        model.train(training)
    return torch.cat((input_ids, torch.stack(new_ids, dim=1).to(input_ids)), dim=1)


class Decoder:
    """One run over a batch of prompts; holds the cache of that run."""

    def __init__(self, model: "OPTForCausalLM", new_tokens: int) -> None:
        self.model = model
        self.new_tokens = new_tokens

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids) -> Ids:
        """Read the prompts, padded on the left, and return the next token of each row, (B,)."""
        B, T = input_ids_BT.shape
        table_VE = self.model.get_input_embeddings().weight
        self.cache = KVCache.allocate(
            self.model.config, B, T + self.new_tokens, dtype=table_VE.dtype, device=table_VE.device
        )
        # Without padding there is no mask, and the kernels take their fast causal path.
        mask_BS = torch.ones((B, self.cache.capacity), dtype=torch.long)
        mask_BS[:, :T] = torch.from_numpy(attention_mask_BT)
        self.mask_BS = None if attention_mask_BT.all() else mask_BS.to(table_VE.device)
        return self.step(input_ids_BT)

    def decode_one_token(self, tokens_B: Ids) -> Ids:
        """Read one more token of each row and return the next, (B,)."""
        return self.step(tokens_B[:, None])

    def step(self, ids_BT: Ids) -> Ids:
        """Read tokens and choose the likeliest next one, the lower id where two are equal."""
        device = self.model.get_input_embeddings().weight.device
        outputs = self.model.model.decoder(
            torch.from_numpy(ids_BT).to(device),
            attention_mask=self.mask_BS,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = outputs.past_key_values
        logits_BV = self.model.logits(outputs.last_hidden_state[:, -1])
        return logits_BV.argmax(dim=-1).cpu().numpy()
