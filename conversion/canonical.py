"""Native names of tensors <-> canonical names.

Canonical are Hugging Face's torch names in an `OPTForCausalLM`, as in `opt_common.params`. A file may hold them with
any framework's leaf names, parted by "." or "/", with or without the prefix of the language model, and inside another
model or a wrapper (`WRAPPERS`). Both directions are
derived from `LEAVES` and `Parameter.path`; nothing here lists a model's tensors.
"""

import dataclasses
from collections.abc import Container, Iterable

from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, join_problems
from opt_common.params import HEAD_MODULES, LEAVES, Parameter, Scheme, module_kind, parameter_table
from opt_common.quantization import split_part

DECODER = ("model", "decoder")
"""The path of the decoder in a language model, in front of every tensor but the heads'."""

HEAD = "lm_head.weight"
EMBEDDING = "model.decoder.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Drop:
    """Tensors that are left out on purpose: those whose native name ends so, and why."""

    ending: tuple[str, ...]
    reason: str


DROPS = (
    Drop(("decoder", "version"), "metaseq's number of its own file layout; not a weight"),
    Drop(("embed_positions", "_float_tensor"), "fairseq's marker of a device; not a weight"),
)


BLIP_2 = "language_model"
"""What BLIP-2 calls the OPT inside it."""

BLIP_2_PARTS = ("vision_model", "qformer", "query_tokens", "language_projection")
"""The first parts of the names of everything else in a BLIP-2 checkpoint."""

WRAPPERS = {
    BLIP_2: "BLIP-2's checkpoints hold an OPT under this name",
    "module": "torch.nn.DataParallel and DistributedDataParallel put it in front of a model's names",
    "_orig_mod": "torch.compile puts it in front of a model's names",
}
"""Modules that may stand around a whole model, each with the reason; names are the same without them."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A leaf that a published format names otherwise than its framework does, and why."""

    scheme: Scheme
    module: str
    leaf: str
    published: str
    reason: str


METASEQ_MODULES = {
    "layer_norm": "model.decoder.final_layer_norm",
    "project_in_dim": "model.decoder.project_in",
    "project_out_dim": "model.decoder.project_out",
    "output_projection": "lm_head",
}
"""Modules directly inside metaseq's decoder that are named otherwise there. A tied head may be in its files or not."""

EXCEPTIONS = (
    Published(
        "keras",
        "embed_tokens",
        "embeddings",
        "weight",
        "Hugging Face's TF models keep the token table in a layer of their own, whose variable is `weight`",
    ),
)


@dataclasses.dataclass(frozen=True)
class CanonicalName:
    """What a native name stands for.

    Attributes:
        name: canonical name, or the native one where nothing is known by it.
        transposed: whether the native array is the transpose of the canonical one.
    """

    name: str
    transposed: bool


def drop_reason(native: str) -> str | None:
    """Why a tensor is left out, or None for one that is not."""
    path = _split(native)
    return next((drop.reason for drop in DROPS if path[-len(drop.ending) :] == drop.ending), None)


def to_canonical(native: str, scheme: Scheme) -> CanonicalName:
    """The canonical name of a tensor.

    Args:
        native: its name in a file: `model.decoder.`, `decoder.` or nothing in front of the module, and any `WRAPPERS`
            in front of that; in a Keras file also a scope, which is dropped whatever it is.
        scheme: whose leaf names the file has.
    """
    whole, part = split_part(native)
    if part is not None and scheme == "torch":
        return CanonicalName(f"{to_canonical(whole, scheme).name}.{part}", transposed=False)
    *module, leaf = _without_scope(_without_wrappers(_split(native)), scheme)
    if len(module) == 0:
        return CanonicalName(native, transposed=False)
    for exception in EXCEPTIONS:
        if (scheme, module[-1], leaf) == (exception.scheme, exception.module, exception.published):
            leaf = exception.leaf
    kind = module_kind(module[-1])
    for key, names in LEAVES.items():
        if key.startswith(f"{kind}.") and getattr(names, scheme) == leaf:
            path = _with_prefix(module)
            transposed = scheme != "torch" and names.transposed
            return CanonicalName(".".join((*path, names.torch)), transposed)
    return CanonicalName(native, transposed=False)


def to_native(parameter: Parameter, scheme: Scheme, *, bare: bool) -> tuple[str, ...]:
    """The parts of a parameter's name in a file that Hugging Face's classes load.

    Args:
        parameter: a row of the parameter table.
        scheme: whose leaf names the file has.
        bare: whether the file holds a decoder without a head. Torch and Flax then leave the top module out.
    """
    *module, leaf = parameter.path(scheme)
    for exception in EXCEPTIONS:
        if (scheme, module[-1], leaf) == (exception.scheme, exception.module, exception.leaf):
            leaf = exception.published
    if bare and scheme != "keras":
        module = module[1:]
    return (*module, leaf)


def to_metaseq(parameter: Parameter) -> str:
    """The name of a parameter in metaseq's files."""
    module, _, leaf = parameter.name.rpartition(".")
    names = {canonical: metaseq for metaseq, canonical in METASEQ_MODULES.items()}
    if module in names:
        return f"{DECODER[1]}.{names[module]}.{leaf}"
    return parameter.name.removeprefix(f"{DECODER[0]}.")


def canonical_names(natives: Iterable[str], scheme: Scheme) -> dict[str, tuple[str, bool]]:
    """Canonical name -> (native name, whether it is transposed), for all tensors of a checkpoint but the drops.

    Raises:
        CheckpointError: if two native names stand for the same tensor.
    """
    found: dict[str, tuple[str, bool]] = {}
    problems: list[str] = []
    for native in natives:
        if drop_reason(native) is not None:
            continue
        canonical = to_canonical(native, scheme)
        if canonical.name in found:
            other, _ = found[canonical.name]
            problems.append(f"{other!r} and {native!r} are both {canonical.name}; remove one of them.")
        found[canonical.name] = (native, canonical.transposed)
    if problems:
        raise CheckpointError(join_problems(problems))
    return found


def _split(native: str) -> tuple[str, ...]:
    return tuple(native.removesuffix(":0").replace("/", ".").split("."))


def is_of_blip_2(native: str, parts: Container[str]) -> bool:
    """Whether a tensor is in one of some parts of a BLIP-2 model."""
    path = _split(native)
    return next((part for part in path if part == BLIP_2 or part not in WRAPPERS), "") in parts


def _without_wrappers(path: tuple[str, ...]) -> tuple[str, ...]:
    """The path without the modules around the model."""
    first = next((index for index, part in enumerate(path) if part not in WRAPPERS), 0)
    return path[first:]


def _modules_of_decoder() -> frozenset[str]:
    """Names of the modules directly inside the decoder, of all configurations together."""
    configs = (OPTConfig(num_hidden_layers=1), OPTConfig(num_hidden_layers=1, word_embed_proj_dim=1))
    names = (parameter.name for config in configs for parameter in parameter_table(config))
    return frozenset(name.split(".")[len(DECODER)] for name in names)


_MODULES_OF_DECODER = _modules_of_decoder()


def _without_scope(path: tuple[str, ...], scheme: Scheme) -> tuple[str, ...]:
    """The path without the name that TensorFlow puts in front of a model's variables."""
    if scheme != "keras" or len(path) < 2:
        return path
    is_scope = path[1:3] == DECODER or path[1] in HEAD_MODULES
    return path[1:] if is_scope else path


def _with_prefix(module: list[str]) -> tuple[str, ...]:
    """The canonical path of a module that may lack its prefix or a part of it."""
    if tuple(module[:2]) == DECODER or module[0] in HEAD_MODULES:
        return tuple(module)
    if module[0] == DECODER[1] and len(module) == 2 and module[1] in METASEQ_MODULES:
        return tuple(METASEQ_MODULES[module[1]].split("."))
    if module[0] == DECODER[1]:
        return (DECODER[0], *module)
    return (*DECODER, *module) if module[0] in _MODULES_OF_DECODER else tuple(module)
