"""Text generation in PyTorch: the decoder that `opt_common.generation` drives."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from opt_common.generation import Choice, Ids, Prompt, decode, read_prompt
from opt_common.processors import program
from opt_torch.cache import KVCache
from opt_torch.processors import History, choose, process

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM


@torch.no_grad()  # not inference_mode: what comes out of that can go into no call that tracks gradients
def generate(
    model: "OPTForCausalLM",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    **settings: Any,
) -> Tensor:
    """Continue each prompt, by default with its likeliest tokens.

    Args:
        model: the language model; dropout is off whatever mode it is in.
        input_ids: (B, T) integers.
        attention_mask: (B, T), 1 for a token and 0 for padding, on either side or in between; None means no padding.
        logits_processor: functions of (input_ids (B, S), scores (B, V)) that return new scores, as arrays of the
            framework; see `docs/generation.md`.
        settings: fields of `opt_common.GenerationConfig`, such as `max_new_tokens` or `do_sample`, in place of those
            of `model.generation_config`.

    Returns:
        (B * num_return_sequences, T + new) ids: the prompts as they were given, then the new tokens, finished rows
        filled with the pad token.

    Raises:
        InputError: for ids out of range, an empty prompt or a mask that does not fit.
        GenerationError: for a setting that cannot be or changes nothing, a continuation with no room, or a row for
            which the settings rule out every token.
    """
    options = model.generation_config.updated(**settings)
    host_mask = None if attention_mask is None else attention_mask.cpu().numpy()
    prompt = read_prompt(model.config, options, input_ids.cpu().numpy(), host_mask, functions=logits_processor)
    training = model.training
    model.eval()
    try:
        decoder = Decoder(model, prompt)
        new_ids = [torch.from_numpy(tokens_B) for tokens_B in decode(decoder, prompt, options)]
    finally:
        model.train(training)
    input_ids = input_ids.repeat_interleave(options.num_return_sequences, dim=0)
    return torch.cat((input_ids, torch.stack(new_ids, dim=1).to(input_ids)), dim=1)


class Decoder:
    """One run over a batch of prompts; holds the cache of that run."""

    def __init__(self, model: "OPTForCausalLM", prompt: Prompt) -> None:
        self.model = model
        self.new_tokens = prompt.new_tokens
        self.program = program(prompt.processors)
        self.device = model.get_input_embeddings().weight.device
        self.arguments = [tuple(map(self.on_device, processor.arguments)) for processor in prompt.processors]

    def on_device(self, array: np.ndarray) -> Tensor:
        """An array as the processors take it."""
        return torch.from_numpy(array).to(self.device)

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids, choice: Choice) -> Ids:
        """Read the prompts, padded on the left, and return the next token of each row, (B,)."""
        B, T = input_ids_BT.shape
        self.cache = KVCache.allocate(
            self.model.config,
            B,
            T + self.new_tokens,
            dtype=self.model.get_input_embeddings().weight.dtype,
            device=self.device,
        )
        mask_BS = torch.ones((B, self.cache.capacity), dtype=torch.long)
        mask_BS[:, :T] = torch.from_numpy(attention_mask_BT)
        mask_BS = mask_BS.to(self.device)
        self.attended_BS = mask_BS > 0
        self.tokens_BS = torch.zeros_like(mask_BS)
        # Without padding there is no mask, and the kernels take their fast causal path.
        self.mask_BS = None if attention_mask_BT.all() else mask_BS
        return self.step(input_ids_BT, choice)

    def decode_one_token(self, tokens_B: Ids, choice: Choice) -> Ids:
        """Read one more token of each row and return the next, (B,); -1 where every token is ruled out."""
        return self.step(tokens_B[:, None], choice)

    def step(self, ids_BT: Ids, choice: Choice) -> Ids:
        """Read tokens and choose the next one."""
        ids_device_BT = self.on_device(ids_BT)
        outputs = self.model.model.decoder(
            ids_device_BT, attention_mask=self.mask_BS, past_key_values=self.cache, use_cache=True
        )
        self.tokens_BS[:, self.cache.length : self.cache.length + ids_BT.shape[1]] = ids_device_BT
        self.cache = outputs.past_key_values
        logits_BV = self.model.logits(outputs.last_hidden_state[:, -1])
        length = self.cache.length
        slots_S = torch.arange(self.cache.capacity, device=self.device)
        history = History(tokens_BS=self.tokens_BS, attended_BS=self.attended_BS & (slots_S < length), length=length)
        scores_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
        scores_BV = process(scores_BV, history, self.program, self.arguments, self.on_device(choice.gates_P))
        uniforms_B = None if choice.uniforms_B is None else self.on_device(choice.uniforms_B)
        return choose(scores_BV, uniforms_B).cpu().numpy()
