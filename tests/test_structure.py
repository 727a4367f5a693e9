"""The three backends are one model written three times: same files, classes, methods and names, in one order.

A reader with the three `modeling.py` side by side must see one model. Whatever differs is listed in `SANCTIONED`, with
its reason, and nothing may be listed that no longer differs.
"""

import ast
import difflib
import fnmatch
from pathlib import Path

import pytest

from tests.paths import ROOT

PACKAGES = {"torch": "opt_torch", "tf": "opt_tf", "flax": "opt_flax"}
FILES = (
    "cache.py",
    "attention.py",
    "quantized.py",
    "layers.py",
    "modeling.py",
    "heads.py",
    "lora.py",
    "optimizer.py",
    "training.py",
    "processors.py",
    "selection.py",
    "contrastive.py",
    "dola.py",
    "guidance.py",
    "assisted.py",
    "generation.py",
    "checkpoint.py",
)

RENAMED = {"call": "forward", "__call__": "forward"}
"""What each framework calls the method that computes."""


NOT_IN_ALL = {
    "bits_and_bytes.py": (("torch",), "bitsandbytes, which quantises base weights, is PyTorch's"),
    "recorded_step.py": (("torch",), "there a step is compiled as a whole"),
    "tape.py": (("torch",), "likewise"),
    "shared_layer.py": (("tf", "flax"), "only what is traced can be traced once"),
    "packed.py": (("torch",), "XLA orders matrices itself"),
}
"""Files that some package does not have: which ones do, and why."""


def outline(file):
    """A file as lines: its definitions in order, and under each function its parameters and local names in order."""
    lines = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        lines += definition(node, "")
    return lines


def definition(node, owner):
    """The lines of one definition; none for imports, docstrings and statements."""
    if isinstance(node, ast.ClassDef):
        name = plain(node.name)
        return [f"class {name}"] + [line for part in node.body for line in definition(part, f"{name}.")]
    if isinstance(node, ast.FunctionDef):
        name = owner + RENAMED.get(node.name, node.name)
        parameters = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        return [
            f"def {name}",
            *(f"{name}({parameter})" for parameter in parameters),
            *(f"{name}: {local}" for local in local_names(node) if local not in parameters),
        ]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [f"{owner}{name.id} =" for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return []


def local_names(function):
    """Names that a function binds, in the order of first binding."""
    stores = [node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    stores.sort(key=lambda node: (node.lineno, node.col_offset))
    return list(dict.fromkeys(node.id for node in stores))


def plain(name):
    """A class's name without its framework."""
    return name.removeprefix("TF").removeprefix("Flax")


def differences(name, file, base="torch"):
    """Lines that one backend has and PyTorch's, or another's, has not ("+"), and the other way round ("-")."""
    ours, theirs = (outline(ROOT / PACKAGES[key] / file) for key in (base, name))
    return [line[0] + line[2:] for line in difflib.ndiff(ours, theirs) if line[0] in "+-"]


BOTH = ("tf", "flax")
SANCTIONED = {
    "cache.py": {
        "KVCache.written =": (BOTH, "only PyTorch writes in place, and must know who else has"),
        "KVCache.with_room: *": (BOTH, "padding makes room in one call"),
        "KVCache.gathered: rows_B1": (("tf",), "gathering has a word for rows"),
        "append: T": (("flax",), "slices are written by their start alone"),
        "append: slots_S": (("tf",), "a slice of XLA's is slow, and TensorFlow has none"),
        "*(device)": (BOTH, "the frameworks place arrays themselves"),
        "*KVCache.__tf_*": (("tf",), "how tf.function takes a cache apart"),
        "*KVCache.in_*": (("tf",), "what TensorFlow compiles writes in place to variables alone"),
        "*KVCache.is_in_variables*": (("tf",), "likewise"),
        "*KVCache.assign*": (("tf",), "likewise"),
        "*is_traced*": (("tf",), "JAX has a class for it, PyTorch a flag"),
    },
    "attention.py": {
        "*_sdpa*": (BOTH, "a kernel of PyTorch's"),
        "*_flex_attention*": (BOTH, "a kernel of PyTorch's"),
        "*_flash_attention_2*": (BOTH, "a kernel of PyTorch's"),
        "*_row_starts*": (BOTH, "part of flash_attention_2"),
        "_KERNELS =": (BOTH, "with one kernel there is nothing to choose from"),
        "Masking.padding_BS =": (BOTH, "flash_attention_2 cuts padding out instead of masking it"),
        "Masking.maybe_empty =": (BOTH, "only PyTorch's kernels differ on queries that attend to nothing"),
        "*_fused*": (("flax",), "JAX's own kernels"),
        "*_swapped*": (("tf",), "its einsum has a slow product"),
        "*_side_by_side*": (BOTH, "XLA is slow on many small products"),
        "attend: [kv]_BSNH": (BOTH, "a static cache is attended to whole, slots without a token masked"),
        "attend: buffer_BSNH": (BOTH, "as above"),
        "attend: fused": (BOTH, "PyTorch's condition has more parts"),
        "attend: at_first": (BOTH, "as above"),
        "attend: eager": (("flax",), "as below"),
        "*_zero_after*": (("flax",), "only JAX lets XLA write to a cache in place"),
        "attend: unfused": (("flax",), "what JAX's kernels can't compute"),
        "attend(implementation)": (("tf",), "TensorFlow has one path"),
        "_eager: at_least_float32": (("tf",), "no function promotes dtypes there"),
    },
    "quantized.py": {
        "*KERNEL_WIDTH*": (BOTH, "a limit of PyTorch's kernels"),
        "*KERNEL_ROWS*": (BOTH, "as above"),
        "*KERNEL_BLOCK*": (BOTH, "as above"),
        "*BLOCK_ROWS*": (BOTH, "as above"),
        "*CUDA_ROWS*": (BOTH, "a limit of PyTorch's kernels"),
        "*Int4Linear*": (BOTH, "only PyTorch multiplies by 4-bit integers"),
        "*int4_linear*": (BOTH, "as above"),
        "*blocks*": (BOTH, "as above"),
        "*kernel_order*": (BOTH, "as above"),
        "*Int8Linear.multiply*": (BOTH, "only PyTorch multiplies 8-bit integers by numbers that are not rounded"),
        "Int8Linear.forward: multiply": (BOTH, "as above"),
        "*(dynamic)": (BOTH, "as above"),
        "*.codes_FD =": (BOTH, "a type checker must be told what a buffer is"),
        "*.scales_F =": (BOTH, "as above"),
        "*.bias =": (BOTH, "as above"),
        "*.__init__: bias": (BOTH, "as above"),
        "*(device)": (BOTH, "the frameworks place arrays themselves"),
        "*.weight*": (BOTH, "each framework has its name for a matrix"),
        "*.kernel*": (BOTH, "as above"),
        "*Int8Embedding.embedding*": (BOTH, "as above"),
        "*Int8Embedding.head*": (BOTH, "in PyTorch the head is a second name for the token table"),
        "*Int8Embedding.attend*": (BOTH, "as above"),
        "int8_product: *": (BOTH, "a compiled program has both branches, each a function"),
        "multiply_integers: *": (BOTH, "each framework has its own product of integers"),
        "*Int8Product*": (BOTH, "each framework has its way to give a function a gradient"),
        "*rounded_product*": (BOTH, "as above"),
        "*Rounded*": (("flax",), "the kind of variable that no optimiser moves"),
        "*(param_dtype)": (("flax",), "Flax tells the dtypes of parameters and arithmetic apart"),
        "*(name)": (("tf",), "Keras layers have names"),
        "*.build*": (("tf",), "Keras makes weights in build()"),
        "*.forward: *": (("tf",), "shapes may be unknown while a function is traced"),
        "*assign_stored: variable": (("tf",), "variables are assigned to, not replaced"),
        "*rounded(*": (("tf",), "a variable that no dtype policy casts"),
        "def rounded": (("tf",), "as above"),
        "*dequantized*": (("tf",), "no operator mixes integers and floats"),
    },
    "layers.py": {
        "*Together*": (BOTH, "compilers need no help with calls; a product's cost is in the reading of its matrix"),
        "*moved_together*": (BOTH, "as above"),
        "*places_of*": (BOTH, "as above"),
        "*alike*": (BOTH, "as above"),
        "PARTS =": (BOTH, "as above"),
        "ONEDNN_DTYPES =": (BOTH, "XLA has one product"),
        "*suits_onednn*": (BOTH, "as above"),
        "*OneDNNProduct*": (BOTH, "as above"),
        "*product*": (BOTH, "as above"),
        "*Builder.*": (BOTH, "making new layers is each framework's own business"),
        "*Linear*": (("flax",), "nnx.Linear knows its width, and XLA has one product"),
        "*class L*": (("tf",), "Keras' layers ask for an input before they have weights"),
        "*Linear.*": (("tf",), "as above"),
        "*LayerNorm.*": (("tf",), "as above"),
        "*Embedding*": (BOTH, "Keras' own has a gradient that its optimizers misread, Flax's a slow product"),
        "*multiply*": (BOTH, "PyTorch has more products to choose from, see product"),
    },
    "modeling.py": {
        "*prepare_inputs_for_generation*": (BOTH, "PEFT, which is PyTorch's, wants to see it"),
        "*(device)": (BOTH, "the frameworks place arrays themselves"),
        "*tie_weights*": (BOTH, "there the head reads the token table; in PyTorch it is a second name for it"),
        "OPTDecoder.embed: *": (BOTH, "PyTorch's embedding has the pad row's gradient rule built in"),
        "*together*": (BOTH, "see Together in layers.py"),
        "*OPTAttention._apply*": (BOTH, "as above"),
        "OPTAttention.forward: [qkv]_BTD": (BOTH, "as above"),
        "OPTDecoder.forward(call_layer)": (BOTH, "see shared_layer.py"),
        "OPTDecoder.forward: call": (BOTH, "likewise"),
        "OPTDecoder.forward: unused": (BOTH, "the mask is widened to the static cache"),
        "OPTDecoder.place(hidden_BTD)": (BOTH, "no device to agree with"),
        "OPTDecoder.masking: maybe_empty": (BOTH, "see attention.py"),
        "check: *": (BOTH, "each framework has its way to know a traced array"),
        "OPTAttention.forward: dropping": (
            ("flax",),
            "a module that decides by itself would draw a number in evaluation",
        ),
        "*(param_dtype)": (("flax",), "Flax tells the dtypes of parameters and arithmetic apart"),
        "*(rngs)": (("flax",), "Flax takes its random numbers from its caller"),
        "*.training*": (("flax",), "a property the other two have from their base class"),
        "*.build*": (("tf",), "Keras makes weights in build()"),
        "*(name)": (("tf",), "Keras layers have names"),
        "*.__init__: *": (("tf",), "temporary names of those names"),
        "*(new_weights)": (("tf",), "the other two build without storage"),
        "*(attn_implementation)": (("tf",), "TensorFlow has one path"),
        "*.get_config*": (("tf",), "how Keras saves a model"),
        "*.from_config*": (("tf",), "how Keras restores a model"),
        "*OPT*.forward": (("tf",), "Keras calls call() by way of __call__()"),
        "OPT*.forward(self)": (("tf",), "as above"),
        "OPT*.forward: options": (("tf",), "as above"),
        "*check_call*": (("tf",), "as above"),
        "*(training)": (("tf",), "Keras passes the mode as an argument"),
        "OPTForCausalLM.forward: *": (("tf",), "the loss takes the head's weight, whose gradient it computes itself"),
        "OPTForCausalLM.logits: *": (("tf",), "the tied head is a product with the transposed table"),
    },
    "heads.py": {
        "*(device)": (BOTH, "the frameworks place arrays themselves"),
        "cross_entropy: *": (BOTH, "PyTorch's cross_entropy knows ignored labels"),
        "*(param_dtype)": (("flax",), "Flax tells the dtypes of parameters and arithmetic apart"),
        "*(rngs)": (("flax",), "Flax takes its random numbers from its caller"),
        "*.training*": (("flax",), "a property the other two have from their base class"),
        "*.build*": (("tf",), "Keras makes weights in build()"),
        "*(name)": (("tf",), "Keras layers have names"),
        "*(new_weights)": (("tf",), "the other two build without storage"),
        "*.get_config*": (("tf",), "how Keras saves a model"),
        "*.from_config*": (("tf",), "how Keras restores a model"),
        "*OPT*.forward": (("tf",), "Keras calls call() by way of __call__()"),
        "OPT*.forward(self)": (("tf",), "as above"),
        "OPT*.forward: options": (("tf",), "as above"),
        "*(training)": (("tf",), "Keras passes the mode as an argument"),
    },
    "training.py": {
        "*(gradient_checkpointing_kwargs)": (BOTH, "only PyTorch's checkpointing has options"),
        "*(offload)": (BOTH, "what transformers.Trainer, which is PyTorch's, wants to see"),
        "*activation_checkpointing*": (BOTH, "as above"),
        "*accepts_loss_kwargs*": (BOTH, "as above"),
        "*loss_type*": (BOTH, "as above"),
        "*_tied_head*": (BOTH, "only PyTorch's state has the tied table under two names"),
        "*gradient_checkpointing_enable: decoder": (BOTH, "as above"),
        "run_again(options)": (BOTH, "as above"),
        "run_again: *": (("tf",), "random numbers and the order of a graph are kept by hand"),
        "*is_matrix*": (BOTH, "there a head without a matrix is told from others by its call"),
        "BLOCK_LOGITS =": (BOTH, "compilers choose their own blocks"),
        "*turn_into_slopes*": (BOTH, "as above"),
        "causal_lm_loss(training)": (("tf",), "Keras passes the mode as an argument"),
        "*SummedLosses*": (BOTH, "each framework has its way to give a function a gradient"),
        "causal_lm_loss: *": (BOTH, "where a loop is compiled, its turns must be alike"),
        "*Trainable.*_step*": (("tf",), "what fit, evaluate and predict call"),
        "*Trainable.compute_*": (("tf",), "as above"),
        "*with_targets*": (("tf",), "as above"),
        "*register_record*": (("tf",), "so that Keras finds the tensors in a record"),
        "*_summed_losses*": (BOTH, "its own gradient: a compiled loop keeps all logits, or computes them twice"),
        "*_slopes*": (BOTH, "as above"),
    },
    "lora.py": {
        "*LoraLinear.weight*": (BOTH, "they call it kernel"),
        "*LoraLinear.kernel*": (BOTH, "as above"),
        "outer_place: *": (BOTH, "modules are found by attributes; PyTorch finds them by name"),
        "adapter_linear: *": (BOTH, "each framework has its way to make a layer"),
        "fill: variable": (BOTH, "an array is laid out as the variable is"),
        "*(rngs)": (("flax",), "Flax takes its random numbers from its caller"),
        "*retype*": (("flax",), "there, what trains is known by the type of the variable"),
        "Adaptable.merge_and_unload: *": (BOTH, "each framework has its way to say what trains"),
        "wrap: variable": (("tf",), "as above"),
        "*replace*": (("tf",), "Keras has a lock on the layers of a layer"),
        "adapter_linear(name)": (("tf",), "Keras layers have names"),
    },
    "optimizer.py": {
        "save_optimizer: *": (BOTH, "PyTorch counts steps by parameter"),
        "load_optimizer: *": (BOTH, "each framework has its place for the moments"),
        "matched: *": (BOTH, "each framework has its way to know an optimizer's variables"),
        "*groups_of*": (BOTH, "optax tells nobody its settings, and Keras has one group"),
        "*AdamW*": (("tf",), "Keras' own adds epsilon elsewhere"),
        "*unscaled*": (("tf",), "Keras scales losses by an optimizer around the optimizer"),
        "*moments_of*": (("tf",), "where Keras keeps the moments"),
        "*adam_state*": (("flax",), "optax chains its parts"),
        "*parts*": (("flax",), "as above"),
    },
    "processors.py": {
        "likeliest: *": (BOTH, "each compiler has its slow searches"),
        "History.seen: *": (BOTH, "each framework has its way to scatter"),
        "running_sum*": (("flax",), "without float64, a sum is a pair of numbers"),
        "unsorted: *": (("tf",), "scattering takes pairs of places"),
        "members: *": (("tf",), "scattering starts from nothing"),
        "vocab_size*": (("tf",), "a static size may be None to a type checker"),
        "def vocab_size": (("tf",), "as above"),
    },
    "selection.py": {
        "best: *": (BOTH, "PyTorch's topk takes any of the equal totals at its end"),
        "drawn: *": (BOTH, "a scan keeps JAX's program small; TensorFlow has no way to set one element a row"),
        "*counted*": (("tf",), "adding at places takes pairs"),
    },
    "contrastive.py": {},
    "dola.py": {},
    "guidance.py": {},
    "assisted.py": {},
    "generation.py": {
        "*evaluating*": (("tf",), "Keras is told its mode call by call"),
        "Decoder.prefill: *": (BOTH, "prompts are padded to a bucket, so that one compiled step serves many"),
        "Decoder.decode: *": (BOTH, "rows are reordered inside that function"),
        "Decoder.forget: *": (BOTH, "only PyTorch writes in place, and must know how far"),
        "*Decoder.read*": (BOTH, "as below"),
        "Decoder.step: *": (BOTH, "the step is a compiled function of its own"),
        "*_step*": (BOTH, "that function"),
        "*Structure*": (("flax",), "what a compiled call is looked up by, hashed once"),
        "*(structure)": (("flax",), "as above"),
        "_STRUCTURES =": (("flax",), "as above"),
        "Decoder.__init__: *": (("flax",), "as above"),
        "*on_device*": (BOTH, "the frameworks place arrays themselves"),
        "_STATIC =": (("flax",), "what that function is compiled for"),
        "_STEPS =": (("tf",), "that function's results, by model"),
        "*suits_xla*": (("tf",), "TensorFlow has two compilers"),
        "*forget_compiled*": (("tf",), "as above; JAX sees by itself that a model has other layers"),
    },
    "checkpoint.py": {
        "Pretrained.from_pretrained: stays": (BOTH, "the others take no memory that is not their own"),
        "Pretrained.from_pretrained: module": (("tf",), "no weights are laid together there, see layers.py"),
        "*Pretrained.dtype*": (BOTH, "there a model knows its dtype from its maker"),
        "*Pretrained.device*": (BOTH, "the frameworks place arrays themselves"),
        "*Pretrained.position_table*": (BOTH, "as the two above"),
        "*(torch_dtype)": (BOTH, "an older name that only PyTorch's users have"),
        "*(device)": (BOTH, "the frameworks place arrays themselves"),
        "*(rngs)": (("flax",), "dropout's random numbers"),
        "Pretrained.from_pretrained: *": (BOTH, "an array, where PyTorch has a tensor"),
        "*assign*": (BOTH, "as above"),
        "stored_value: tensor": (BOTH, "only PyTorch has bitsandbytes"),
        "*to_tensor*": (BOTH, "as above"),
        "*to_array*": (BOTH, "as above"),
        "*to_numpy*": (BOTH, "as above"),
        "local_place: *": (BOTH, "modules are found by attributes; PyTorch finds them by name"),
    },
}
"""file -> pattern of a differing line -> backends that differ, and why."""


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", ["tf", "flax"])
def test_a_file_is_pytorch_s_but_for_sanctioned_differences(name, file):
    patterns = {pattern for pattern, (names, _) in SANCTIONED[file].items() if name in names}
    found = differences(name, file)
    unexplained = [line for line in found if not any(fnmatch.fnmatchcase(line[1:], pattern) for pattern in patterns)]
    assert unexplained == [], (
        f"{PACKAGES[name]}/{file} differs from PyTorch's (+ added, - absent), and no reason is given"
    )
    needless = [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(line[1:], pattern) for line in found)]
    assert needless == [], "sanctioned, but no longer a difference"


TENSORFLOW_ALONE = {
    "*STABLEHLO_DTYPES*": "JAX writes StableHLO itself",
    "*MODULE_VERSION*": "as above",
    "*stablehlo_type*": "as above",
    "*forward*": "as above",
    "attention: call": "as above",
    "*: arguments": "as above",
    "is_registered: *": "each has its way to XLA's interface",
    "is_called: *": "TensorFlow has no word for the backend",
    "suits: *": "sizes may be unknown there",
}
"""How the two that XLA serves call the library: pattern of a differing line -> why."""


def test_xla_calls_the_library_alike():
    found = differences("tf", "native.py", "flax")
    assert [line for line in found if not any(fnmatch.fnmatchcase(line[1:], each) for each in TENSORFLOW_ALONE)] == []
    assert [each for each in TENSORFLOW_ALONE if not any(fnmatch.fnmatchcase(line[1:], each) for line in found)] == []


def test_the_packages_have_the_same_files():
    files = {name: {path.name for path in (ROOT / package).glob("*.py")} for name, package in PACKAGES.items()}
    for file, (names, _) in NOT_IN_ALL.items():
        for name in names:
            files[name].remove(file)
    assert files["torch"] == files["tf"] == files["flax"]
    assert set(FILES) <= files["torch"]


def test_the_packages_export_the_same_names():
    exported = {}
    for name, package in PACKAGES.items():
        tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
        values = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
        exported[name] = sorted(plain(item) for item in ast.literal_eval(values[0]))
    assert exported["torch"] == exported["tf"] == exported["flax"]


def test_the_comparison_sees_what_it_should(tmp_path):
    """A renamed local, a reordered method, a lost parameter: each shows as a difference."""
    text = (ROOT / "opt_torch" / "modeling.py").read_text(encoding="utf-8")
    before = outline(ROOT / "opt_torch" / "modeling.py")
    for old, new in (
        ("q_BTNH", "query"),
        ("def drop_layer(", "def a_layer("),
        ("    output_attentions: bool = False,", ""),
    ):
        changed = Path(tmp_path / "modeling.py")
        assert old in text
        changed.write_text(text.replace(old, new), encoding="utf-8")
        assert outline(changed) != before
