"""Do the presets that `conversion` writes load in KerasHub, with the same logits and the same text, and its own here?

    make oracle-keras-hub

runs this in an environment of its own (`requirements-keras-hub.txt`) with each backend of Keras that is named by
`KERAS_BACKEND`. Exit code 1 if a difference is above the tolerance, a tensor is lost, or a text is another.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import keras
import keras_hub
import numpy as np

from conversion import convert, open_checkpoint
from opt_common import OPTTokenizer
from opt_common.hub import resolve
from opt_common.reference import generate_greedy

# KerasHub numbers positions by column, so that padding on the left or inside moves its texts.
GROUPS = ("nopad", "rightpad", "len1", "maxlen")
PROMPTS = ("Once upon a time", "The little dog")
NEW_TOKENS = 20
ABSOLUTE, RELATIVE = 1e-5, 2e-6

Arrays = dict[str, np.ndarray]


def tensors(path: Path) -> Arrays:
    """Every tensor of a checkpoint."""
    with open_checkpoint(path) as checkpoint:
        return {name: np.array(checkpoint.read(name)) for name in checkpoint.names}


def compare(preset: Path, expected: Path) -> Iterator[tuple[str, float, float]]:
    """KerasHub's logits of a preset against the goldens: group, largest difference where the mask is 1, tolerance."""
    model = keras_hub.models.OPTCausalLM.from_preset(str(preset), preprocessor=None)
    with np.load(expected) as golden:
        for group in GROUPS:
            if f"{group}/logits" not in golden:
                continue
            ids, mask = golden[f"{group}/input_ids"], golden[f"{group}/attention_mask"]
            output = model({"token_ids": ids.astype("int32"), "padding_mask": mask.astype("int32")}, training=False)
            attended = mask == 1
            logits = golden[f"{group}/logits"][attended]
            difference = np.abs(keras.ops.convert_to_numpy(output)[attended] - logits).max()
            yield group, float(difference), ABSOLUTE + RELATIVE * float(np.abs(logits).max())


def check_variant(variant: Path, scratch: Path) -> bool:
    """A golden model there and back: written for KerasHub, loaded, saved by KerasHub in one file and in shards."""
    preset = scratch / "preset"
    convert(variant / "safetensors", preset, "keras-hub")
    right = True
    for group, difference, tolerance in compare(preset, variant / "expected.npz"):
        right &= difference <= tolerance
        print(f"  {group:10} {difference:.1e} of {tolerance:.1e}")
    ours = tensors(variant / "safetensors")
    right &= same(tensors(preset), ours, rows=0, what="written")
    backbone = keras_hub.models.OPTBackbone.from_preset(str(preset))
    backbone.save_to_preset(str(scratch / "saved"))
    # In units of 10**9 bytes, as Keras counts.
    backbone.save_to_preset(str(scratch / "shards"), max_shard_size=8e-5)
    assert len(list((scratch / "shards").glob("*.h5"))) > 1
    for name in ("saved", "shards"):
        right &= same(tensors(scratch / name), ours, rows=2, what=name)
        convert(scratch / name, scratch / f"{name}-back", "safetensors")
    return right


def same(found: Arrays, expected: Arrays, *, rows: int, what: str) -> bool:
    """Whether two models are the same bits, but the first rows of the position table, which KerasHub has not."""
    table = "model.decoder.embed_positions.weight"
    first = {name: rows if name == table else 0 for name in expected}
    equal = found.keys() == expected.keys() and all(
        np.array_equal(found[name][start:], expected[name][start:]) for name, start in first.items()
    )
    print(f"  {what:10} {len(found)} tensors {'equal' if equal else 'DIFFERENT'}")
    return equal


def check_layout(golden: Path, scratch: Path, *, write: bool) -> bool:
    """KerasHub's layout of a preset against what is written down in the repository, which the tests hold ours to."""
    tokenizer = keras_hub.models.OPTTokenizer(
        vocabulary={"<s>": 0, "<pad>": 1, "</s>": 2, "a": 3, "aa": 4}, merges=["a a"]
    )
    preprocessor = keras_hub.models.OPTCausalLMPreprocessor(tokenizer, sequence_length=4)
    backbone = keras_hub.models.OPTBackbone(40, 12, 2, 8, 16, max_sequence_length=6, name="opt_backbone")
    keras_hub.models.OPTCausalLM(backbone, preprocessor).save_to_preset(str(scratch / "layout"))
    found: dict[str, object] = {}
    with h5py.File(scratch / "layout" / "model.weights.h5") as file:
        file.visititems(
            lambda name, item: found.update({name: list(item.shape)}) if isinstance(item, h5py.Dataset) else None
        )
    layout = {
        "shapes": found,
        "config.json": json.loads((scratch / "layout" / "config.json").read_text()),
        "tokenizer.json": json.loads((scratch / "layout" / "tokenizer.json").read_text()),
    }
    settings = layout["tokenizer.json"]["config"]
    settings["name"] = "opt_tokenizer"
    settings["unsplittable_tokens"].sort(reverse=True)  # KerasHub writes a set, in any order
    if write:
        golden.write_text(json.dumps(layout, indent=1, sort_keys=True) + "\n")
    equal = json.loads(golden.read_text()) == layout
    print(f"  layout     {len(found)} arrays {'as' if equal else 'NOT AS'} in {golden.name}")
    return equal


def check_text(scratch: Path) -> bool:
    """The bundled model with its tokenizer: ids and greedy text."""
    source, preset = resolve("opt-tiny"), scratch / "preset"
    convert(source, preset, "keras-hub")
    model = keras_hub.models.OPTCausalLM.from_preset(str(preset))
    model.compile(sampler="greedy")
    tokenizer = OPTTokenizer.from_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    right = True
    with open_checkpoint(source) as checkpoint:
        weights = {name: np.asarray(checkpoint.read(name), np.float64) for name in checkpoint.names}
        for prompt in PROMPTS:
            ids = np.array(tokenizer([prompt])["input_ids"])
            theirs = np.asarray(model.preprocessor.tokenizer(prompt))
            equal = [config["bos_token_id"], *theirs.tolist()] == ids[0].tolist()
            mask = np.ones_like(ids)
            greedy = generate_greedy(checkpoint.config, weights, ids, mask, NEW_TOKENS)[0]
            text = tokenizer.decode(greedy.tolist(), skip_special_tokens=True)
            answer = model.generate(prompt, max_length=len(greedy))
            right &= equal and answer == text
            print(f"  {'equal' if equal and answer == text else 'DIFFERENT'}: {answer!r}")
    convert(preset, scratch / "back", "safetensors")
    back = OPTTokenizer.from_pretrained(scratch / "back")
    right &= back(list(PROMPTS))["input_ids"] == tokenizer(list(PROMPTS))["input_ids"]
    model.save_to_preset(str(scratch / "saved"))
    convert(scratch / "saved", scratch / "saved-back", "safetensors")
    back = OPTTokenizer.from_pretrained(scratch / "saved-back")
    return right and back(list(PROMPTS))["input_ids"] == tokenizer(list(PROMPTS))["input_ids"]


def main() -> int:
    """Print a line for each check; 1 if one is not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", type=Path, default=Path(__file__).parents[1] / "goldens")
    parser.add_argument("--write", action="store_true", help="write KerasHub's layout down anew")
    arguments = parser.parse_args()
    goldens = arguments.goldens
    print(f"keras-hub {keras_hub.__version__} on {keras.backend.backend()}")
    with tempfile.TemporaryDirectory() as scratch:
        right = check_layout(goldens / "keras_hub_layout.json", Path(scratch), write=arguments.write)
    for name in ("pre_ln", "sharded"):
        with tempfile.TemporaryDirectory() as scratch:
            print(name)
            right &= check_variant(goldens / name, Path(scratch))
    with tempfile.TemporaryDirectory() as scratch:
        print("opt-tiny")
        right &= check_text(Path(scratch))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
