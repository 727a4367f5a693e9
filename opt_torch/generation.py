"""Text generation in PyTorch: the decoder that `opt_common.generation` drives."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from opt_common.decoding import Arrays, Choice, Generated, Ids, Prompt
from opt_common.generation import read_prompt, run
from opt_common.generation_config import GenerationConfig
from opt_common.outputs import GenerateOutput
from opt_common.processors import program
from opt_torch.cache import KVCache
from opt_torch.processors import History
from opt_torch.selection import Step, select

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM


@torch.no_grad()  # not inference_mode: what comes out of that can go into no call that tracks gradients
def generate(
    model: "OPTForCausalLM",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    **settings: Any,
) -> Tensor | GenerateOutput:
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
        filled with the pad token. With `return_dict_in_generate`, a `GenerateOutput`.

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
        generated = run(Decoder(model, prompt), prompt, options)
    finally:
        model.train(training)
    return results(input_ids, generated, options)


def results(input_ids: Tensor, generated: Generated, options: GenerationConfig) -> Tensor | GenerateOutput:
    """What `generate` returns, in the framework's arrays and on the device of the prompts."""

    def array(value: np.ndarray) -> Tensor:
        return torch.from_numpy(value).to(input_ids.device)

    input_ids = input_ids.repeat_interleave(options.num_return_sequences, dim=0)
    sequences = torch.cat((input_ids, array(generated.new_ids).to(input_ids)), dim=1)
    return generated.output(sequences, array) if options.return_dict_in_generate else sequences


class Decoder:
    """One run over a batch of prompts; holds the cache of that run."""

    def __init__(self, model: "OPTForCausalLM", prompt: Prompt) -> None:
        self.model = model
        self.new_tokens = prompt.new_tokens
        self.program = program(prompt.processors)
        self.device = model.device
        self.arguments = [tuple(map(self.on_device, processor.arguments)) for processor in prompt.processors]

    def on_device(self, array: np.ndarray) -> Tensor:
        """An array as the processors take it."""
        return torch.from_numpy(array).to(self.device)

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids, choice: Choice) -> Arrays:
        """Read the prompts, padded on the left, and select what follows the last token of each."""
        B, T = input_ids_BT.shape
        self.cache = KVCache.allocate(
            self.model.config,
            B,
            T + self.new_tokens,
            dtype=self.model.dtype,
            device=self.device,
        )
        mask_BS = torch.ones((B, self.cache.capacity), dtype=torch.long)
        mask_BS[:, :T] = torch.from_numpy(attention_mask_BT)
        self.mask_BS = mask_BS.to(self.device)
        self.padded = not attention_mask_BT.all()
        self.tokens_BS = torch.zeros_like(self.mask_BS)
        return self.step(input_ids_BT, choice)

    def decode(self, ids_BT: Ids, choice: Choice) -> Arrays:
        """Continue the rows that the choice names by one or several tokens each, and select what follows the last."""
        if choice.rows_B is not None:
            rows_B = self.on_device(choice.rows_B)
            self.cache = self.cache.reordered(rows_B)
            self.mask_BS, self.tokens_BS = self.mask_BS[rows_B], self.tokens_BS[rows_B]
        return self.step(ids_BT, choice)

    def forget(self, count: int) -> None:
        """Drop the last `count` tokens of every row, as if they had not been read."""
        length = self.cache.length - count
        # Nobody else holds these buffers, so their slots may be written again.
        self.cache = dataclasses.replace(self.cache.cropped(length), written=[length])

    def step(self, ids_BT: Ids, choice: Choice) -> Arrays:
        """Read tokens and select what follows the last."""
        ids_device_BT = self.on_device(ids_BT)
        # Without padding there is no mask, and the kernels take their fast causal path.
        mask_BS = self.mask_BS if self.padded else None
        outputs = self.model.model.decoder(
            ids_device_BT, attention_mask=mask_BS, past_key_values=self.cache, use_cache=True
        )
        self.tokens_BS[:, self.cache.length : self.cache.length + ids_BT.shape[1]] = ids_device_BT
        self.cache = outputs.past_key_values
        length = self.cache.length
        slots_S = torch.arange(self.cache.capacity, device=self.device)
        attended_BS = (self.mask_BS > 0) & (slots_S < length)
        history = History(tokens_BS=self.tokens_BS, attended_BS=attended_BS, length=length)
        logits_BV = self.model.logits(outputs.last_hidden_state[:, -1])
        step = Step(
            logits_BV=logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)),
            history=history,
            program=self.program,
            arguments=self.arguments,
            gates_P=self.on_device(choice.gates_P),
        )
        found = select(step, choice.selection, tuple(map(self.on_device, choice.arguments)))
        return {name: array.cpu().numpy() for name, array in found.items()}
