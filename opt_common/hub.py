"""Where a model's files are: a local directory, the bundled model, or a repository of the Hugging Face hub.

`resolve` turns what a user names into a local directory; `find_weights` says which of a directory's files are the
weights. Both follow one rule, wherever the files come from:

1. Formats are tried in this order: safetensors, the one the caller prefers, the others as in `WEIGHT_FILES`.
   The first format of which a weight file is there is the one; exactly one format is ever fetched.
2. Inside a format the single file wins over shards, as in Hugging Face's loaders. (opt-13b holds both for Flax.)
3. Shards count only with their index, and with every file that the index names.
4. Where a directory has none of these formats, metaseq's files are looked for (`metaseq_files`), then what frameworks
   save (`opt_common.native_files`); on the hub neither is.

Importing this module loads no network client; naming a directory never touches the network.
"""

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, Self, cast

from opt_common.errors import CheckpointError
from opt_common.json_file import UnreadableError, read_json
from opt_common.links import refuse_links_outside
from opt_common.native_files import (
    KERAS_ARCHIVE,
    KERAS_INDEX,
    KERAS_WEIGHTS,
    home_of,
    is_keras_hub,
    native_weights,
)

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Every file that a tokenizer may be made of; no repository needs to hold all of them."""

BUNDLED_MODEL = "opt-tiny"
"""Name of the model that comes with this package. A directory of that name wins over it."""

_BUNDLED_DIRECTORY = Path(__file__).with_name("opt_tiny")
_INDEX_SUFFIX = ".index.json"
_DEFAULT_REVISION = "main"

# Letters, digits, "-", "_" and "." only, with neither end a "-" or a ".": the hub's own rule, minus everything that
# could be read as a path. `_is_hub_id` adds the rest of it.
_ID = re.compile(r"(?:\w|\w[\w.-]{0,94}\w)(?:/(?:\w|\w[\w.-]{0,94}\w))?", re.ASCII)
_LONGEST_ID = 96
_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)

_LFS_POINTER = b"version https://git-lfs"
_LFS_POINTER_MAX_BYTES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """How Hugging Face names the weight files of one format.

    Attributes:
        single: name of the one file that holds all weights, "model.safetensors".
    """

    single: str

    @property
    def index(self) -> str:
        """Name of the JSON file that says which shard holds which tensor."""
        return self.single + _INDEX_SUFFIX

    def shard(self, number: int, count: int) -> str:
        """Name of shard `number`, counted from 1, of `count`: "model-00001-of-00002.safetensors"."""
        stem, _, suffix = self.single.rpartition(".")
        return f"{stem}-{number:05d}-of-{count:05d}.{suffix}"

    def is_shard(self, name: str) -> bool:
        """Whether a file of this name is a shard of this format."""
        stem, _, suffix = self.single.rpartition(".")
        return re.fullmatch(rf"{re.escape(stem)}-\d{{5,}}-of-\d{{5,}}\.{re.escape(suffix)}", name, re.ASCII) is not None


FORMATS: Mapping[str, WeightFiles] = {
    "safetensors": WeightFiles(single="model.safetensors"),
    "torch": WeightFiles(single="pytorch_model.bin"),
    "tf": WeightFiles(single="tf_model.h5"),
    "flax": WeightFiles(single="flax_model.msgpack"),
}
"""File names by format, in the order in which formats are tried."""

QUANTIZED = "quantized"
"""Name of the format of rounded matrices, see `opt_common.quantization`: safetensors of tensors that only this package
knows. Its files have a name of their own: other software then finds no weights, in place of some that it misreads."""

WEIGHT_FILES: Mapping[str, WeightFiles] = {**FORMATS, QUANTIZED: WeightFiles(single="quantized.safetensors")}
"""The same, with the format that Hugging Face does not have."""

METASEQ = "metaseq"
"""Name of the format of the project that OPT was trained with. It is no format of the hub: it has no index."""

_METASEQ_NAME = re.compile(
    r"(?P<stem>\w[\w.-]*?)(?:-model_part-(?P<part>\d{1,4}))?(?:-shard(?P<shard>\d{1,4}))?\.pt", re.ASCII
)
_METASEQ_SINGLES = ("restored", "reshard", "consolidated")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaseqName:
    """What the name of a metaseq file says: "reshard-model_part-1.pt", "checkpoint_last-model_part-0-shard3.pt".

    Attributes:
        stem: what the files of one checkpoint have in common.
        part: number of the model-parallel part, counted from 0; None where there is but one.
        shard: number of the shard of that part, counted from 0; None for a part that is whole.
    """

    stem: str
    part: int | None
    shard: int | None

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The meaning of a file name, or None for one that metaseq does not give."""
        match = _METASEQ_NAME.fullmatch(name)
        if match is None:
            return None
        part, shard = (None if match[key] is None else int(match[key]) for key in ("part", "shard"))
        if part is None and shard is None and not match["stem"].startswith(_METASEQ_SINGLES):
            return None
        return cls(stem=match["stem"], part=part, shard=shard)


def metaseq_files(names: Iterable[str], where: str) -> tuple[str, ...]:
    """The files of the one metaseq checkpoint among some file names, in the order of parts and shards; none at all.

    Raises:
        CheckpointError: if there is more than one.
    """
    checkpoints: dict[str, list[tuple[int, int, str]]] = {}
    for name in names:
        if (found := MetaseqName.parse(name)) is not None:
            checkpoints.setdefault(found.stem, []).append((found.part or 0, found.shard or 0, name))
    if len(checkpoints) > 1:
        some = {min(files)[2] for files in checkpoints.values()}
        raise CheckpointError(
            f"{where} holds {len(some)} metaseq checkpoints: {_listed(some)}. Name one of these files."
        )
    return tuple(name for files in checkpoints.values() for *_, name in sorted(files))


WEIGHT_SUFFIXES = (
    *(f".{files.single.rpartition('.')[2]}" for files in FORMATS.values()),
    _INDEX_SUFFIX,
    ".pt",
    ".pth",
    KERAS_WEIGHTS,
    KERAS_ARCHIVE,
    KERAS_INDEX,
)
"""How the names of weight files end, of whatever format."""


def states_its_config(path: Path) -> bool:
    """Whether weights say themselves what a `config.json` would: metaseq's, a `.keras`, a preset of KerasHub."""
    if path.is_file():
        return path.suffix == ".pt" or path.name.endswith(KERAS_ARCHIVE) or is_keras_hub(path.parent)
    if is_keras_hub(path):
        return True
    names = _file_names(path)
    return _choose(names, None) is None and any(
        MetaseqName.parse(name) is not None or name.endswith(KERAS_ARCHIVE) for name in names
    )


def find_weights(directory: Path, *, prefer: str | None = None) -> tuple[str, tuple[Path, ...], Path | None]:
    """The weight files of a local directory, by the rule at the top of this module.

    Args:
        directory: a directory that exists.
        prefer: format to try right after safetensors, a key of `FORMATS`.

    Returns:
        The format, its file or its shards in the order of their names, and the shards' index (None for a single file,
        and for the formats that are not in `WEIGHT_FILES`). What Orbax saves is one directory in place of files.

    Raises:
        CheckpointError: if there are no weights, an index is absent, damaged, hostile or names missing shards, or a
            file is only the pointer that Git LFS leaves in place of a large file.
    """
    names = _file_names(directory)
    chosen = _choose(names, prefer)
    if chosen is None and (parts := metaseq_files(names, str(directory))):
        format_name, files, index = METASEQ, parts, None
    elif chosen is None and (native := native_weights(directory, names)) is not None:
        return *native, None
    else:
        format_name, files, index = _select(names, prefer, str(directory), directory.joinpath)
    paths = tuple(directory / name for name in files)
    for path in paths:
        _refuse_lfs_pointer(path)
    if index is not None:
        refuse_links_outside(directory / index, paths)
    return format_name, paths, None if index is None else directory / index


def read_index(path: Path) -> dict[str, str]:
    """Read the index of a sharded checkpoint: name of a tensor -> name of the file that holds it.

    An index is untrusted: every file it names must be a plain name with the suffix of its format, so that it can't
    point outside its directory or at a file of another kind.

    Raises:
        CheckpointError: if the file is not such an index; all bad file names are listed.
    """
    suffix = "." + path.name.removesuffix(_INDEX_SUFFIX).rpartition(".")[2]
    try:
        content: Any = read_json(path)
    except (FileNotFoundError, UnreadableError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}. Fetch the file again.") from None
    weight_map: Any = cast("dict[str, Any]", content).get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f'{path}: expected an object "weight_map" of tensor names and files. Fetch the file again.'
        )
    shards = cast("dict[str, Any]", weight_map)
    bad = {
        repr(shard)
        for shard in shards.values()
        if not (isinstance(shard, str) and _PLAIN_NAME.fullmatch(shard) and shard.endswith(suffix))
    }
    if bad:
        raise CheckpointError(
            f"{path} names {_listed(bad)}, expected plain names of *{suffix} files. Don't trust this checkpoint."
        )
    return shards


def resolve(
    path_or_id: str | os.PathLike[str],
    *,
    prefer: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """The local directory of a model, or its weight file if a user names that, fetched from the hub if need be.

    A directory that exists wins over everything else; then comes `BUNDLED_MODEL`; then the hub. From the hub come
    the configuration, the tokenizer's files and exactly one format of weights, chosen from the repository's list of
    files before anything is fetched. When the hub can't be used or reached, the choice is made from the cache.

    Args:
        path_or_id: a directory, a weight file, `BUNDLED_MODEL`, or a hub id such as "facebook/opt-125m". A `Path` is
            never an id.
        prefer: format of weights to take when there is no safetensors, a key of `FORMATS`.
        revision: branch, tag, commit or "refs/pr/N" of the hub's repository; default "main".
        cache_dir: directory of the hub's cache; default that of `huggingface_hub` (`HF_HOME`, `HF_HUB_CACHE`).
        token: the hub's access token, True for the stored one, False for none; default what `huggingface_hub` finds.
        local_files_only: use the cache only; `HF_HUB_OFFLINE=1` does the same.
        weights: whether weights are wanted. Without them neither weights nor a configuration need to be there.

    Raises:
        CheckpointError: if nothing of that name can be had, or what was found is no complete checkpoint.
    """
    if prefer is not None and prefer not in FORMATS:
        raise CheckpointError(f"prefer is {prefer!r}, expected one of {', '.join(FORMATS)}.")
    directory = Path(path_or_id)
    try:
        # An empty text is no name, though as a path it is the working directory.
        is_directory, exists = os.fspath(path_or_id) != "" and directory.is_dir(), directory.is_file()
    except OSError as error:  # a name too long for the file system, or a parent that may not be read
        raise CheckpointError(f"{directory} can't be opened: {error.strerror}. Check the path.") from None
    if is_directory:
        if revision is not None:
            warnings.warn(f"revision {revision!r} is ignored: {directory} is a local directory.", stacklevel=3)
        return _checked(directory, prefer, weights=weights)
    if exists and directory.name.endswith(WEIGHT_SUFFIXES):
        return directory if weights else home_of(directory)
    if exists:
        raise CheckpointError(f"{directory} is a file, but no weights. Name a directory that holds a checkpoint.")
    if path_or_id == BUNDLED_MODEL:
        return _checked(_BUNDLED_DIRECTORY, prefer, weights=weights)
    if not isinstance(path_or_id, str) or not _is_hub_id(path_or_id):
        raise CheckpointError(
            f"There is no directory {os.fspath(path_or_id)!r}, and that can't be a hub id "
            f"such as 'facebook/opt-125m' either. Check the path."
        )
    if revision is not None and not _is_revision(revision):
        raise CheckpointError(f"revision is {revision!r}, expected a branch, a tag, a commit or refs/pr/N.")
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    repository = _Repository(id=path_or_id, revision=revision or _DEFAULT_REVISION, cache=cache, token=token)
    return _from_hub(repository, prefer, local_files_only=local_files_only, weights=weights)


def _checked(directory: Path, prefer: str | None, *, weights: bool) -> Path:
    """`directory`, if it holds a checkpoint; any directory will do where no weights are wanted."""
    if weights:
        if not (home_of(directory) / CONFIG_FILE).is_file() and not states_its_config(directory):
            raise CheckpointError(f"No {CONFIG_FILE} in {directory}. Name a directory that holds an OPT checkpoint.")
        find_weights(directory, prefer=prefer)
        return directory
    return home_of(directory)


# The rule


def _file_names(directory: Path) -> frozenset[str]:
    return frozenset(path.name for path in directory.iterdir() if path.is_file())


def _order(prefer: str | None) -> Iterator[str]:
    """The formats in the order in which they are tried."""
    first = ["safetensors"] if prefer is None else ["safetensors", prefer]
    return iter(dict.fromkeys([*first, *WEIGHT_FILES]))


def _choose(names: Set[str], prefer: str | None) -> str | None:
    """The format to use of those in a list of file names, None if there is none."""
    for name in _order(prefer):
        if WEIGHT_FILES[name].single in names or any(map(WEIGHT_FILES[name].is_shard, names)):
            return name
    # An index alone counts last: it is small and may be all that an interrupted download left behind.
    return next((name for name in _order(prefer) if WEIGHT_FILES[name].index in names), None)


def _select(
    names: Set[str], prefer: str | None, where: str, fetch: Callable[[str], Path]
) -> tuple[str, tuple[str, ...], str | None]:
    """Apply the rule to a list of file names: format, weight files, index. `fetch` gets an index to the local disk."""
    format_name = _choose(names, prefer)
    if format_name is None:
        singles = ", ".join(files.single for files in WEIGHT_FILES.values())
        raise CheckpointError(f"No weights in {where}: expected one of {singles}, or its shards with their index.")
    files = WEIGHT_FILES[format_name]
    if files.single in names:
        return format_name, (files.single,), None
    if files.index not in names:
        raise CheckpointError(f"{where} has shards of {files.single} but no {files.index}. Fetch that file too.")
    shards = tuple(sorted(set(read_index(fetch(files.index)).values())))
    if missing := set(shards) - names:
        raise CheckpointError(
            f"{files.index} names {len(shards)} files, of which {where} lacks {_listed(missing)}. Fetch them again."
        )
    return format_name, shards, files.index


def _refuse_lfs_pointer(path: Path) -> None:
    if path.stat().st_size <= _LFS_POINTER_MAX_BYTES and path.read_bytes().startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights themselves. Run `git lfs pull` in its directory."
        )


def _listed(items: Set[str], most: int = 5) -> str:
    """A few of the items, sorted, and how many there are besides."""
    shown = sorted(items)[:most]
    return ", ".join(shown) + (f" and {len(items) - most} more" if len(items) > most else "")


# The hub


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Repository:
    """A repository of the hub at one revision, and how it is accessed."""

    id: str
    revision: str
    cache: Path | None
    token: str | bool | None = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return f"{self.id!r} on the hub (revision {self.revision!r})"


def _is_hub_id(text: str) -> bool:
    return (
        len(text) <= _LONGEST_ID
        and _ID.fullmatch(text) is not None
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )


def _is_revision(text: str) -> bool:
    """Whether a text may name a revision. The cache uses it as a relative path, so it must stay one."""
    parts = text.split("/")
    return all(part not in ("", ".", "..") and part.isprintable() and "\\" not in part for part in parts)


def _from_hub(repository: _Repository, prefer: str | None, *, local_files_only: bool, weights: bool) -> Path:
    from huggingface_hub import constants

    if local_files_only or constants.HF_HUB_OFFLINE:
        wish = "local_files_only=True" if local_files_only else "HF_HUB_OFFLINE"
        return _from_cache(repository, prefer, weights=weights, reason=f"{wish} forbids to fetch it")
    try:
        names = _list_files(repository)
    except _UnreachableError as error:
        directory = _from_cache(repository, prefer, weights=weights, reason=f"the hub can't be reached ({error})")
        warnings.warn(f"The hub can't be reached ({error}); using the cached copy of {repository.id}.", stacklevel=4)
        return directory
    wanted = {CONFIG_FILE, GENERATION_CONFIG_FILE, *TOKENIZER_FILES}
    if weights:
        if CONFIG_FILE not in names:
            raise CheckpointError(f"{repository} has no {CONFIG_FILE}. Name a repository that holds an OPT checkpoint.")
        _, files, index = _select(names, prefer, str(repository), lambda name: _fetch(repository, {name}) / name)
        wanted |= {*files, *((index,) if index else ())}
    if not wanted & names:
        raise CheckpointError(
            f"{repository} holds no file that an OPT model or its tokenizer is made of. Check the name."
        )
    return _checked(_fetch(repository, wanted & names), prefer, weights=weights)


def _from_cache(repository: _Repository, prefer: str | None, *, weights: bool, reason: str) -> Path:
    """The cached files of a repository, complete or not at all."""
    from huggingface_hub import try_to_load_from_cache

    for name in (CONFIG_FILE,) if weights else (CONFIG_FILE, *TOKENIZER_FILES):
        found = try_to_load_from_cache(repository.id, name, cache_dir=repository.cache, revision=repository.revision)
        if isinstance(found, str):
            break
    else:
        raise CheckpointError(f"{repository} is neither a local directory nor cached, and {reason}.")
    try:
        return _checked(Path(found).parent, prefer, weights=weights)
    except CheckpointError as error:
        raise CheckpointError(f"The cached copy of {repository} is not complete, and {reason}: {error}") from None


class _UnreachableError(Exception):
    """The hub did not answer; the text says why in a few words."""


def _list_files(repository: _Repository) -> frozenset[str]:
    """Names of a repository's files, without fetching any.

    Raises:
        CheckpointError: if the hub answers that there is no such repository or revision, or that it may not be read.
        _UnreachableError: if the hub does not answer, or not sensibly.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi(token=repository.token).model_info(repository.id, revision=repository.revision)
    except GatedRepoError:
        raise CheckpointError(_gated(repository)) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"There is no directory {repository.id!r}, and the hub has no repository of that name that you may read. "
            f"Check the name; a private repository needs a token."
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"The hub's {repository.id!r} has no revision {repository.revision!r}. Check its name."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500:  # 5xx: the hub is down, so that the cache may be used; 4xx: it refuses
            raise CheckpointError(f"The hub refuses to list {repository.id!r} (HTTP status {status}).") from None
        raise _UnreachableError(f"HTTP status {status}") from None
    except _network_errors() as error:
        raise _UnreachableError(_in_short(error)) from None
    return frozenset(sibling.rfilename for sibling in info.siblings or ())


def _fetch(repository: _Repository, names: Set[str]) -> Path:
    """Fetch some files of a repository, unless they are cached, and return the directory that they are in."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]  # its tqdm_class
    from huggingface_hub.errors import GatedRepoError

    try:
        directory = snapshot_download(
            repository.id,
            revision=repository.revision,
            cache_dir=repository.cache,
            token=repository.token,
            allow_patterns=sorted(names),
        )
    except GatedRepoError:
        raise CheckpointError(_gated(repository)) from None
    except _network_errors() as error:
        raise CheckpointError(
            f"Fetching {repository} failed: {_in_short(error)}. Try again; the files that have come are kept."
        ) from None
    return Path(directory)


def _gated(repository: _Repository) -> str:
    return f"{repository} is gated. Ask for access on the repository's page and give the token of that account."


def _network_errors() -> tuple[type[Exception], ...]:
    """What `huggingface_hub` raises when a request fails.

    Its HTTP client changed from requests to httpx with version 1, and httpx's errors are no `OSError`: the base
    classes of its own error are those of the client, whichever it is.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    return OSError, EntryNotFoundError, *HfHubHTTPError.__bases__


def _in_short(error: Exception, most: int = 100) -> str:
    """The kind of an error and the first line of its text, unless that is too long to be read."""
    line = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    return f"{type(error).__name__}: {line}" if 0 < len(line) <= most else type(error).__name__
