"""Text generation in PyTorch: the decoder that `opt_common.generation` drives."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from opt_common.assisted import check_assistant
from opt_common.decoding import ON_DEVICE, Arrays, Choice, Generated, Ids, Prompt
from opt_common.generation import check_streamer, given_slots, read_prompt, returns_cache, run, token_steps
from opt_common.generation_config import GenerationConfig
from opt_common.outputs import GenerateOutput, OPTModelOutput
from opt_common.processors import program
from opt_common.stopping import Criterion, read_stopping
from opt_common.streaming import Streamer, new_text, new_texts, text_pieces
from opt_common.tokenizer import OPTTokenizer
from opt_torch import recorded_step
from opt_torch.cache import KVCache, append
from opt_torch.contrastive import preferred, rows_of
from opt_torch.dola import early_logits
from opt_torch.processors import History
from opt_torch.recorded_step import RecordedStep
from opt_torch.selection import Step, select
from opt_torch.tape import NotRecordedError

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM


def generate(
    model: "OPTForCausalLM",
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    stopping_criteria: Criterion | Iterable[Criterion] | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    past_key_values: KVCache | None = None,
    negative_prompt_ids: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: Streamer | None = None,
    tokenizer: OPTTokenizer | None = None,
    **settings: Any,
) -> Tensor | GenerateOutput:
    """Continue each prompt, by default with its likeliest tokens.

    Args:
        model: the language model; dropout is off whatever mode it is in.
        input_ids: (B, T) integers; may be left out beside `inputs_embeds`.
        attention_mask: (B, T), 1 for a token and 0 for padding, on either side or in between; None means no padding.
        logits_processor: functions of (input_ids (B, S), scores (B, V)) that return new scores, as arrays of the
            framework; see `docs/generation.md`.
        stopping_criteria: functions of ids (B, T), padded on the left, that return True or False for all rows, or (B,).
        inputs_embeds: (B, T, E), read in place of the tokens' rows of the table.
        past_key_values: the cache of the first columns of the prompts, from an earlier call of the model or of
            `generate`: only the others are read. Of one row, it serves prompts that all begin with it.
        negative_prompt_ids: (B, N), or (1, N) for all prompts: what `guidance_scale` leads away from; None means each
            prompt's last token.
        negative_prompt_attention_mask: the same shape, padding anywhere; None means no padding.
        generation_config: settings in place of `model.generation_config`.
        streamer: is told of each token as it is chosen, such as `opt_common.TextStreamer`.
        tokenizer: the model's, which `stop_strings` needs.
        settings: fields of `opt_common.GenerationConfig`, such as `max_new_tokens` or `do_sample`, in place of those
            of the configuration.

    Returns:
        (B * num_return_sequences, T + new) ids: the prompts as they were given, then the new tokens, finished rows
        filled with the pad token; of embeddings without ids, the new tokens alone. With `return_dict_in_generate`, a
        `GenerateOutput`.

    Raises:
        InputError: for ids out of range, an empty prompt or a mask that does not fit.
        GenerationError: for a setting that cannot be or changes nothing, a continuation with no room, a cache of
            another text, or a row for which the settings rule out every token.
    """
    options, prompt = prepare(
        model,
        input_ids,
        attention_mask,
        logits_processor,
        stopping_criteria,
        inputs_embeds=inputs_embeds,
        past_key_values=past_key_values,
        negative_prompt_ids=negative_prompt_ids,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
        generation_config=generation_config,
        tokenizer=tokenizer,
        **settings,
    )
    check_streamer(streamer, options)
    with evaluating(model, options):
        decoder = Decoder(model, prompt)
        generated = run(decoder, prompt, options, streamer)
    return results(decoder, input_ids, generated, options)


def stream(model: "OPTForCausalLM", text: str, tokenizer: OPTTokenizer, **options: Any) -> Iterator[str]:
    """Continue one text, and yield what is new as it is produced, in whole characters.

    Args:
        model: the language model; between two pieces it is in the mode it was in.
        text: the prompt.
        tokenizer: the model's.
        options: as for `generate`. With `stop_strings`, the text ends right before the first of them.

    Raises:
        InputError: as `generate`.
        GenerationError: as `generate`, and for a strategy whose text is certain only at its end.
    """
    inputs = tokenizer([text], return_tensors="pt")
    settings, prompt = prepare(model, **inputs, tokenizer=tokenizer, **options)
    check_streamer(tokenizer, settings)
    steps = token_steps(Decoder(model, prompt), prompt, settings)
    return text_pieces(steps, lambda: evaluating(model, settings), new_text(tokenizer, prompt.input_ids[0], settings))


def generate_text(
    model: "OPTForCausalLM", text: str | Sequence[str], tokenizer: OPTTokenizer, **options: Any
) -> str | list[str]:
    """Continue one text or several, and return what is new: what `stream` yields, joined.

    Args:
        model: the language model; dropout is off whatever mode it is in.
        text: the prompt, or a list of them.
        tokenizer: the model's.
        options: as for `generate`. With `stop_strings`, a text ends right before the first of them.

    Returns:
        The new text; a list of them, `num_return_sequences` of each prompt in turn, for a list of prompts or several
        texts of one.

    Raises:
        InputError: as `generate`.
        GenerationError: as `generate`.
    """
    texts = [text] if isinstance(text, str) else list(text)
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    settings, prompt = prepare(model, **inputs, tokenizer=tokenizer, **options)
    with evaluating(model, settings):
        generated = run(Decoder(model, prompt), prompt, settings)
    found = new_texts(tokenizer, prompt.input_ids, generated.new_ids, settings)
    return found[0] if isinstance(text, str) and len(found) == 1 else found


def prepare(
    model: "OPTForCausalLM",
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    stopping_criteria: Criterion | Iterable[Criterion] | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    past_key_values: KVCache | None = None,
    negative_prompt_ids: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    tokenizer: OPTTokenizer | None = None,
    **settings: Any,
) -> tuple[GenerationConfig, Prompt]:
    """The settings in force and the prompts; arguments are those of `generate`."""
    options = (generation_config or model.generation_config).updated(**settings)
    check_assistant(model, options)
    prompt = read_prompt(
        model.config,
        options,
        to_host(input_ids),
        to_host(attention_mask),
        functions=logits_processor,
        inputs_embeds=to_host(inputs_embeds),
        past_key_values=past_key_values,
        negative_prompt_ids=to_host(negative_prompt_ids),
        negative_prompt_attention_mask=to_host(negative_prompt_attention_mask),
        stopping=read_stopping(options, tokenizer, stopping_criteria, torch.from_numpy),
    )
    return options, prompt


@contextlib.contextmanager
def evaluating(model: "OPTForCausalLM", options: GenerationConfig) -> Iterator[None]:
    """Where nothing is dropped out; the mode of the model and its assistant is restored afterwards, come what may."""
    models = [each for each in (model, options.assistant_model) if each is not None]
    modes = [(each, each.training) for each in models]
    for each in models:
        each.eval()
    try:
        with torch.no_grad():  # not inference_mode: what comes out of that can go into no call that tracks gradients
            yield
    finally:
        for each, training in modes:
            each.train(training)


def to_host(array: Tensor | None) -> np.ndarray | None:
    """An array in NumPy; bfloat16, which it lacks, as float32."""
    if array is None:
        return None
    array = array.detach().cpu()
    return array.float().numpy() if array.dtype == torch.bfloat16 else array.numpy()


def results(
    decoder: "Decoder", input_ids: Tensor | None, generated: Generated, options: GenerationConfig
) -> Tensor | GenerateOutput:
    """What `generate` returns, in the framework's arrays and on the device of the prompts."""

    def array(value: np.ndarray) -> Tensor:
        return torch.from_numpy(value).to(decoder.device if input_ids is None else input_ids.device)

    sequences = array(generated.after(to_host(input_ids)))
    past_key_values = decoder.past() if returns_cache(options) else None
    if not options.return_dict_in_generate:
        return sequences
    return generated.output(sequences, array, past_key_values)


class Decoder:
    """One run over a batch of prompts; holds the cache of that run."""

    def __init__(self, model: "OPTForCausalLM", prompt: Prompt) -> None:
        self.model = model
        self.prompt = prompt
        self.program = program(prompt.processors)
        self.device = model.device
        self.arguments = [tuple(map(self.on_device, processor.arguments)) for processor in prompt.processors]
        self.guidance_scale = None if prompt.guidance is None else self.on_device(np.array(prompt.guidance.scale))
        self.recorded: RecordedStep | None = None
        self.records = True

    def on_device(self, array: np.ndarray | Tensor) -> Tensor:
        """An array as the processors take it."""
        return torch.as_tensor(array).to(self.device)

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids, choice: Choice) -> Arrays:
        """Read the prompts, padded on the left, and select what follows the last token of each."""
        B, T = input_ids_BT.shape
        past = self.prompt.past
        start = self.prompt.past_length
        capacity = T + self.prompt.most_tokens
        if past is None:
            # Half precision costs attention of one token on a CPU 2 to 8 times as long: its kernel is made for many.
            least = torch.float32 if self.device.type == "cpu" else self.model.dtype
            dtype = torch.promote_types(self.model.dtype, least)
            self.cache = KVCache.allocate(self.model.config, B, capacity, dtype=dtype, device=self.device)
        else:
            rows_B = self.on_device(past.rows_B)
            self.cache = past.cache.reordered(rows_B).cropped(start).with_room(capacity - start)
        mask_BS = np.ones((B, self.cache.capacity), dtype=np.int64)
        mask_BS[:, :T] = attention_mask_BT
        tokens_BS = np.zeros_like(mask_BS)
        tokens_BS[:, :start] = input_ids_BT[:, :start]
        self.mask_BS, self.tokens_BS = self.on_device(mask_BS), self.on_device(tokens_BS)
        self.padded = not attention_mask_BT.all()
        self.states_BS1E = self.room_for_states() if choice.selection.compares_states else None
        self.text_start = 0 if self.prompt.has_ids else T
        embeds_BTE = None if self.prompt.inputs_embeds is None else self.prompt.inputs_embeds[:, start:]
        return self.step(input_ids_BT[:, start:], choice, embeds_BTE)

    def past(self) -> KVCache:
        """The cache of what was read, in the order in which the prompts were given."""
        assert self.prompt.order is not None
        cache, margin = self.cache, self.prompt.margin
        slots_BS = given_slots(self.prompt.order, self.prompt.past_length, margin, cache.capacity)
        length = cache.length - margin
        if self.guidance_scale is not None:
            cache = cache.reordered(self.on_device(np.arange(len(self.prompt.order))))
        return cache if slots_BS is None else cache.gathered(self.on_device(slots_BS), length)

    def room_for_states(self) -> Tensor:
        """Where the last hidden states of all that is read are kept, beside the cache."""
        shape_BS1E = (*self.mask_BS.shape, 1, self.model.config.word_embed_proj_dim)
        return torch.zeros(shape_BS1E, dtype=self.model.dtype, device=self.device)

    def decode(self, ids_BT: Ids, choice: Choice) -> Arrays:
        """Continue the rows that the choice names by one or several tokens each, and select what follows the last."""
        if choice.rows_B is not None:
            rows_B = self.on_device(choice.rows_B)
            self.cache = self.cache.reordered(rows_B)
            self.mask_BS, self.tokens_BS = self.mask_BS[rows_B], self.tokens_BS[rows_B]
            self.states_BS1E = None if self.states_BS1E is None else self.states_BS1E[rows_B]
        return self.step(ids_BT, choice)

    def forget(self, count: int) -> None:
        """Drop the last `count` tokens of every row, as if they had not been read."""
        length = self.cache.length - count
        # Nobody else holds these buffers, so their slots may be written again.
        self.cache = dataclasses.replace(self.cache.cropped(length), written=[length])

    def other(self, model: "OPTForCausalLM", prompt: Prompt) -> "Decoder":
        """A decoder for another model."""
        return Decoder(model, prompt)

    def read(self, ids_BT: Tensor, embeds_BTE: Tensor | None, choice: Choice) -> OPTModelOutput:
        """What the decoder makes of tokens, or of embeddings in their place, which its cache then holds."""
        # Without padding there is no mask, and the kernels take their fast causal path.
        mask_BS = self.mask_BS if self.padded else None
        decoder = self.model.model.decoder
        if ids_BT.shape[1] == 1 and embeds_BTE is None and choice.rows_B is None and not choice.selection.layers:
            if self.recorded is not None and self.recorded.serves(self.cache):
                return self.recorded(ids_BT, self.cache)
            if self.records and recorded_step.suits(decoder, self.cache, self.prompt.most_tokens):
                try:
                    self.recorded = RecordedStep(decoder, self.cache, mask_BS, ids_BT)
                    return self.recorded.outputs(self.cache)
                except NotRecordedError:
                    self.records = False
        return decoder(
            ids_BT,
            attention_mask=mask_BS,
            inputs_embeds=embeds_BTE,
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=bool(choice.selection.layers),
        )

    def step(self, ids_BT: Ids, choice: Choice, embeds_BTE: np.ndarray | None = None) -> Arrays:
        """Read tokens, or embeddings in their place, and select what follows the last."""
        ids_device_BT = self.on_device(ids_BT)
        embeds_device_BTE = None if embeds_BTE is None else self.on_device(embeds_BTE).to(self.model.dtype)
        outputs = self.read(ids_device_BT, embeds_device_BTE, choice)
        self.tokens_BS[:, self.cache.length : self.cache.length + ids_BT.shape[1]] = ids_device_BT
        if self.states_BS1E is not None:
            append(self.states_BS1E, outputs.last_hidden_state[:, :, None], self.cache.length)
        self.cache = outputs.past_key_values
        length = self.cache.length
        slots_S = torch.arange(self.cache.capacity, device=self.device)
        attended_BS = (self.mask_BS > 0) & (slots_S >= self.text_start) & (slots_S < length)
        history = History(tokens_BS=self.tokens_BS, attended_BS=attended_BS, length=length)
        reach = choice.selection.reach
        hidden_BE = outputs.last_hidden_state[:, -reach:].flatten(0, 1)
        if reach > 1:
            history = history.each(reach)
        choice_arguments = tuple(map(self.on_device, choice.arguments))
        found = {}
        if choice.selection.name == "contrast":
            assert self.states_BS1E is not None
            before_BS = (self.mask_BS > 0) & (slots_S < length - 1)
            found["places"] = preferred(self.states_BS1E[:, :, 0], before_BS, hidden_BE, *choice_arguments)
            kept_B = rows_of(found["places"], choice.selection.size)
            hidden_BE, history = hidden_BE[kept_B], history.of(kept_B)
        logits_BV = self.model.logits(hidden_BE)
        logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
        unconditional_BV = None
        if self.guidance_scale is not None:
            logits_BV, unconditional_BV = logits_BV.chunk(2)
            history = history.of(np.arange(len(logits_BV)))
        early_BCV = (
            early_logits(self.model, outputs.hidden_states or (), choice.selection.layers)
            if choice.selection.layers
            else None
        )
        step = Step(
            logits_BV=logits_BV,
            history=history,
            program=self.program,
            arguments=self.arguments,
            gates_P=self.on_device(choice.gates_P),
            early_BCV=early_BCV,
            unconditional_BV=unconditional_BV,
            guidance_scale=self.guidance_scale,
        )
        found |= select(step, choice.selection, choice_arguments)
        return {name: array if name in ON_DEVICE else array.cpu().numpy() for name, array in found.items()}
