"""The script of Hugging Face's OPT documentation runs after changing its import lines."""

import os
from pathlib import Path

import pytest

from tests.adapters import BACKENDS

if "torch" not in BACKENDS:
    pytest.skip("PyTorch is not among the frameworks under test", allow_module_level=True)

PUBLISHED_350M = os.environ.get("OPT_350M_DIR")
PROMPT = (
    "A chat between a curious human and the Statue of Liberty.\n\nHuman: What is your name?\nStatue: I am the "
    "Statue of Liberty.\nHuman: Where do you live?\nStatue: New York City.\nHuman: How long have you lived there?"
)


def run_the_script(ID, attn_implementation, device, prompt):
    """The script, imports changed."""
    import torch

    from opt_common import OPTTokenizer as GPT2Tokenizer
    from opt_torch import OPTForCausalLM

    model = OPTForCausalLM.from_pretrained(ID, torch_dtype=torch.float16, attn_implementation=attn_implementation)
    tokenizer = GPT2Tokenizer.from_pretrained(ID)
    model_inputs = tokenizer([prompt], return_tensors="pt").to(device)
    model.to(device)
    generated_ids = model.generate(**model_inputs, max_new_tokens=30, do_sample=False)
    return tokenizer.batch_decode(generated_ids)[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_the_script_runs_with_a_local_directory(attention):
    import opt_common

    directory = Path(opt_common.__file__).parent / "opt_tiny"
    text = run_the_script(directory, attention, "cpu", "Once upon a time")
    assert text.startswith("</s>Once upon a time")
    assert len(text) > len("</s>Once upon a time") + 10
    # In half precision the paths differ by rounding, which may choose another word; the first ones are far apart.
    reference = run_the_script(directory, "sdpa", "cpu", "Once upon a time")
    assert text[:30] == reference[:30]


@pytest.mark.hub
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_published_350m_gives_the_documented_text(attention):
    import torch

    from opt_common.errors import MissingFrameworkError

    if not PUBLISHED_350M:
        pytest.skip("OPT_350M_DIR names no directory with facebook/opt-350m")
    if not torch.cuda.is_available():
        pytest.skip("no GPU: the documented text was computed in float16 on one")
    try:
        text = run_the_script(PUBLISHED_350M, attention, "cuda", PROMPT)
    except MissingFrameworkError as error:
        pytest.skip(str(error))
    assert "I have lived here for about a year." in text
