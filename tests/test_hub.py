"""Which files a model is made of, and how they are got: from a directory, the cache or a (stand-in) hub."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_common.errors import CheckpointError
from opt_common.hub import FORMATS, QUANTIZED, WEIGHT_FILES, find_weights, read_index, resolve
from tests.paths import GOLDENS
from tests.stand_in_hub import Client, Repository, StandInHub

SINGLES = {name: files.single for name, files in FORMATS.items()}
SMALL = ("config.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer_config.json")
UNWANTED = ("README.md", ".gitattributes", "training_args.bin", "logo.png", "onnx/model.safetensors")


def shards(format_name: str, count: int = 3) -> list[str]:
    return [FORMATS[format_name].shard(number, count) for number in range(1, count + 1)]


def index(names: list[str]) -> bytes:
    return json.dumps(
        {"metadata": {"total_size": 0}, "weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    ).encode()


def sharded(format_name: str, count: int = 3) -> dict[str, bytes]:
    return {**contents(shards(format_name, count)), FORMATS[format_name].index: index(shards(format_name, count))}


def contents(names: list[str] | tuple[str, ...]) -> dict[str, bytes]:
    return {name: f"contents of {name}".encode() for name in names}


def fill(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


# Directories


@pytest.mark.parametrize(
    ("present", "prefer", "chosen"),
    [
        ("safetensors torch tf flax", None, "safetensors"),
        ("safetensors torch tf flax", "flax", "safetensors"),
        ("torch tf flax", "flax", "flax"),
        ("torch tf flax", "tf", "tf"),
        ("torch tf flax", None, "torch"),
        ("tf flax", "torch", "tf"),
        ("flax", "tf", "flax"),
    ],
)
def test_safetensors_comes_first_then_the_preferred_format(tmp_path, present, prefer, chosen):
    fill(tmp_path, contents([SINGLES[name] for name in present.split()]))
    assert find_weights(tmp_path, prefer=prefer) == (chosen, (tmp_path / SINGLES[chosen],), None)


@pytest.mark.parametrize("format_name", FORMATS)
def test_shards_are_those_that_the_index_names(tmp_path, format_name):
    fill(tmp_path, sharded(format_name) | contents(shards(format_name, 4)))
    expected = tuple(tmp_path / name for name in shards(format_name))
    assert find_weights(tmp_path) == (format_name, expected, tmp_path / FORMATS[format_name].index)


def test_a_single_file_wins_over_shards_as_in_opt_13b(tmp_path):
    fill(tmp_path, sharded("flax") | contents([SINGLES["flax"]]))
    assert find_weights(tmp_path) == ("flax", (tmp_path / SINGLES["flax"],), None)


def test_rounded_weights_come_last(tmp_path):
    fill(tmp_path, contents([WEIGHT_FILES[QUANTIZED].single]))
    assert find_weights(tmp_path) == (QUANTIZED, (tmp_path / WEIGHT_FILES[QUANTIZED].single,), None)
    fill(tmp_path, contents([SINGLES["flax"]]))
    assert find_weights(tmp_path)[0] == "flax"


def test_an_index_without_any_shard_does_not_hide_another_format(tmp_path):
    fill(tmp_path, {FORMATS["safetensors"].index: index(shards("safetensors"))} | contents([SINGLES["tf"]]))
    assert find_weights(tmp_path)[0] == "tf"


def test_an_incomplete_format_is_an_error_and_no_reason_to_take_another(tmp_path):
    fill(tmp_path, sharded("safetensors") | contents([SINGLES["torch"]]))
    for name in shards("safetensors")[1:]:
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r"names 3 files.*lacks model-00002.*model-00003") as error:
        find_weights(tmp_path)
    assert "model-00001-of" not in str(error.value)


def test_shards_without_an_index(tmp_path):
    fill(tmp_path, contents(shards("torch")))
    with pytest.raises(CheckpointError, match=r"shards of pytorch_model\.bin but no pytorch_model\.bin\.index\.json"):
        find_weights(tmp_path)


def test_a_directory_without_weights_and_one_without_a_configuration(tmp_path):
    fill(tmp_path, contents(SMALL))
    with pytest.raises(
        CheckpointError, match=r"No weights in .*expected one of model\.safetensors, pytorch_model\.bin"
    ):
        resolve(tmp_path)
    assert resolve(tmp_path, weights=False) == tmp_path
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"No config\.json in "):
        resolve(tmp_path)


@pytest.mark.parametrize(
    "name", ["../model-1.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "config.json", 3, ""]
)
def test_an_index_may_only_name_plain_files_of_its_format(tmp_path, name):
    fill(tmp_path, sharded("safetensors"))
    path = tmp_path / FORMATS["safetensors"].index
    path.write_bytes(index([*shards("safetensors"), name]))
    with pytest.raises(CheckpointError, match=r"expected plain names of \*\.safetensors files") as error:
        find_weights(tmp_path)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_index(tmp_path, content):
    path = tmp_path / FORMATS["torch"].index
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="Fetch the file again"):
        read_index(path)


def test_a_git_lfs_pointer_is_no_weight_file(tmp_path):
    fill(tmp_path, {SINGLES["torch"]: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"})
    with pytest.raises(CheckpointError, match="is a Git LFS pointer"):
        find_weights(tmp_path)


@pytest.mark.parametrize("format_name", ["safetensors", "torch", "tf", "flax"])
def test_the_golden_checkpoints(format_name):
    folder = {"safetensors": "safetensors", "torch": "torch_bin", "tf": "tf_h5", "flax": "flax_msgpack"}[format_name]
    found, files, found_index = find_weights(resolve(GOLDENS / "sharded" / folder))
    assert (found, found_index is None) == (format_name, False)
    assert len(files) > 1


# Names


@pytest.mark.parametrize(
    "name",
    [
        "../no-such-directory",
        "a/../b",
        "org/..",
        "a/b/c",
        "/nowhere/opt",
        "./opt",
        "~/opt",
        "a\\b",
        "",
        "a b",
        "a--b/c",
        "a/b.git",
        "é/b",
        "a/b\n",
        "x" * 97,
    ],
)
def test_what_is_no_directory_and_no_id(name):
    with pytest.raises(CheckpointError, match=r"There is no directory .* can't be a hub id"):
        resolve(name)


def test_a_name_that_no_file_system_takes():
    with pytest.raises(CheckpointError, match="can't be opened: File name too long"):
        resolve("Hello, my dog is" * 100)


def test_a_path_object_is_never_a_hub_id():
    with pytest.raises(CheckpointError, match="There is no directory"):
        resolve(Path("facebook/opt-125m"))


@pytest.mark.parametrize("revision", ["../no-such-directory", "/x", "a//b", "..", "", "a/../../b", "a\\b", "a\n"])
def test_a_revision_that_is_a_path(revision):
    with pytest.raises(CheckpointError, match="expected a branch, a tag, a commit"):
        resolve("facebook/opt-125m", revision=revision)


def test_a_file_in_place_of_a_directory(tmp_path):
    fill(tmp_path, contents([SINGLES["torch"], "README.md"]))
    assert resolve(tmp_path / SINGLES["torch"]) == tmp_path / SINGLES["torch"]
    assert resolve(tmp_path / SINGLES["torch"], weights=False) == tmp_path
    with pytest.raises(CheckpointError, match=r"is a file, but no weights\. Name a directory"):
        resolve(tmp_path / "README.md")


def test_an_unknown_preference(tmp_path):
    with pytest.raises(CheckpointError, match="prefer is 'onnx', expected one of safetensors, torch, tf, flax"):
        resolve(tmp_path, prefer="onnx")


def test_a_revision_of_a_directory_is_ignored_aloud(tmp_path):
    with pytest.warns(UserWarning, match="revision 'v1' is ignored"):
        resolve(tmp_path, revision="v1", weights=False)


def test_a_directory_wins_over_an_id_and_over_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("opt-tiny", "facebook/opt-125m"):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        fill(directory, contents(["config.json", SINGLES["flax"]]))
        assert resolve(name).resolve() == directory


def test_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = resolve("opt-tiny")
    assert find_weights(directory)[0] == "safetensors"
    assert {"config.json"} < {path.name for path in directory.iterdir()}


def test_no_client_is_loaded_for_a_directory(tmp_path):
    fill(tmp_path, contents(["config.json", SINGLES["torch"]]))
    program = (
        "import sys; from opt_common.hub import resolve; resolve(sys.argv[1]); "
        "sys.exit(bool({'huggingface_hub', 'requests', 'httpx'} & sys.modules.keys()))"
    )
    repository = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=repository, check=True)


# The hub


SMALL_FILES = contents(SMALL)
FOUR_FORMATS = SMALL_FILES | contents(UNWANTED) | contents(list(SINGLES.values()))
NO_SAFETENSORS = {name: content for name, content in FOUR_FORMATS.items() if "safetensors" not in name}
LIKE_13B = SMALL_FILES | sharded("flax") | contents([SINGLES["flax"]])
SECRET = "hf_thistokenisasecret"
CLIENT_PIECE = 10 * 1024 * 1024
"""Bytes that the client writes at a time; of what is cut, whole pieces are kept."""
LARGE = bytes(CLIENT_PIECE) + b"end" * 1000
REPOSITORIES = {
    "org/large": Repository({"main": SMALL_FILES | {SINGLES["torch"]: LARGE}}),
    "org/four": Repository(
        {"main": FOUR_FORMATS, "v1": NO_SAFETENSORS, "refs/pr/7": SMALL_FILES | sharded("safetensors")}
    ),
    "org/three": Repository({"main": NO_SAFETENSORS}),
    "org/sharded": Repository({"main": SMALL_FILES | sharded("torch") | sharded("flax") | contents(UNWANTED)}),
    "org/thirteen": Repository({"main": LIKE_13B}),
    "org/hole": Repository({"main": SMALL_FILES | {n: c for n, c in sharded("tf").items() if "00002-of" not in n}}),
    "org/hostile": Repository(
        {"main": SMALL_FILES | sharded("torch") | {FORMATS["torch"].index: index(["../../x.bin", "*.bin"])}}
    ),
    "org/empty": Repository({"main": SMALL_FILES}),
    "org/other": Repository({"main": contents(UNWANTED)}),
    "org/private": Repository({"main": FOUR_FORMATS}, token=SECRET),
    "org/gated": Repository({"main": FOUR_FORMATS}, gated=True),
}


@pytest.fixture(scope="module")
def server() -> Iterator[StandInHub]:
    with StandInHub.running(REPOSITORIES) as running:
        yield running


@pytest.fixture
def hub(server) -> StandInHub:
    server.reset()
    return server


@pytest.fixture(scope="module")
def client(server, tmp_path_factory) -> Iterator[Client]:
    running = Client(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path_factory.mktemp("hf_home")))
    yield running
    running.close()


@pytest.fixture(scope="module")
def offline_client(server, tmp_path_factory) -> Iterator[Client]:
    home = str(tmp_path_factory.mktemp("offline_home"))
    running = Client(HF_ENDPOINT=server.url, HF_HOME=home, HF_HUB_OFFLINE="1")
    yield running
    running.close()


@pytest.mark.parametrize(
    ("name", "prefer", "expected"),
    [
        ("org/four", None, [SINGLES["safetensors"]]),
        ("org/four", "flax", [SINGLES["safetensors"]]),
        ("org/three", None, [SINGLES["torch"]]),
        ("org/three", "tf", [SINGLES["tf"]]),
        ("org/three", "flax", [SINGLES["flax"]]),
        ("org/sharded", "flax", [*shards("flax"), FORMATS["flax"].index]),
        ("org/sharded", "tf", [*shards("torch"), FORMATS["torch"].index]),
        ("org/thirteen", "flax", [SINGLES["flax"]]),
    ],
)
def test_exactly_one_format_is_fetched(hub, client, tmp_path, *, name, prefer, expected):
    answer = client.resolve(name, prefer=prefer, cache_dir=str(tmp_path))
    assert answer.error is None
    assert hub.fetched() == sorted([*SMALL, *expected])
    assert answer.files == sorted([*SMALL, *expected])
    assert answer.directory.is_relative_to(tmp_path)
    for path in answer.directory.iterdir():
        assert path.read_bytes() == REPOSITORIES[name].revisions["main"][path.name]


def test_a_cut_download_goes_on_where_it_was_cut(hub, client, tmp_path):
    hub.cut[SINGLES["torch"]] = CLIENT_PIECE + 1000
    answer = client.resolve("org/large", cache_dir=str(tmp_path))
    assert answer.error is None
    assert hub.cut == {}
    ranges = [request.range for request in hub.requests if request.range is not None]
    assert ranges == [f"bytes={CLIENT_PIECE}-"]
    assert hub.sent < len(LARGE) + 10_000, "what had come was not sent again"
    assert (answer.directory / SINGLES["torch"]).read_bytes() == LARGE


def test_after_a_failure_only_what_is_missing_is_fetched(hub, client, tmp_path):
    missing = shards("torch")[1]
    hub.failing.add(missing)
    answer = client.resolve("org/sharded", cache_dir=str(tmp_path))
    assert "failed" in answer.error
    assert "Try again; the files that have come are kept." in answer.error
    assert missing in hub.fetched()
    come = set(hub.fetched()) - {missing}
    hub.reset()
    answer = client.resolve("org/sharded", cache_dir=str(tmp_path))
    assert answer.error is None
    everything = {*SMALL, *shards("torch"), FORMATS["torch"].index}
    assert set(hub.fetched()) == everything - come
    assert len(hub.fetched()) == len(set(hub.fetched()))
    assert answer.files == sorted(everything)


def test_one_of_three_formats_is_asked_for_and_once(hub, client, tmp_path):
    """Every file of the chosen format is sent once, and no other is asked for at all, not even its size."""
    assert client.resolve("org/three", prefer="tf", cache_dir=str(tmp_path)).error is None
    asked = {name for request in hub.requests if "/resolve/" in request.path for name in [Path(request.path).name]}
    assert asked == {*SMALL, SINGLES["tf"]}
    assert len(hub.fetched()) == len(SMALL) + 1


def test_nothing_is_fetched_twice(hub, client, tmp_path):
    first = client.resolve("org/sharded", cache_dir=str(tmp_path))
    hub.requests.clear()
    assert client.resolve("org/sharded", cache_dir=str(tmp_path)) == first
    assert hub.fetched() == []


def test_a_tokenizer_needs_no_weights(hub, client, tmp_path):
    assert client.resolve("org/four", weights=False, cache_dir=str(tmp_path)).files == sorted(SMALL)
    assert hub.fetched() == sorted(SMALL)


@pytest.mark.parametrize(
    ("revision", "expected"),
    [("v1", [SINGLES["torch"]]), ("refs/pr/7", [*shards("safetensors"), FORMATS["safetensors"].index])],
)
def test_a_revision_is_honoured(hub, client, tmp_path, revision, expected):
    answer = client.resolve("org/four", revision=revision, cache_dir=str(tmp_path))
    assert answer.files == sorted([*SMALL, *expected])
    commit = REPOSITORIES["org/four"].find(revision)[0]
    assert answer.directory.name == commit
    assert client.resolve("org/four", revision=revision, cache_dir=str(tmp_path), local_files_only=True) == answer
    assert client.resolve("org/four", revision=commit, cache_dir=str(tmp_path), local_files_only=True) == answer
    assert client.resolve("org/four", cache_dir=str(tmp_path), local_files_only=True).directory is None


def test_a_token_is_sent_and_never_shown(hub, client, tmp_path):
    refused = client.resolve("org/private", cache_dir=str(tmp_path))
    assert "no repository of that name that you may read" in refused.error
    wrong = client.resolve("org/private", cache_dir=str(tmp_path), token=SECRET + "x")
    assert wrong.directory is None
    assert SECRET not in wrong.error
    hub.requests.clear()
    assert client.resolve("org/private", cache_dir=str(tmp_path), token=SECRET).error is None
    assert {request.authorization for request in hub.requests} == {f"Bearer {SECRET}"}


@pytest.mark.parametrize(
    ("name", "revision", "text"),
    [
        ("org/absent", None, "There is no directory 'org/absent', and the hub has no repository of that name"),
        ("org/four", "v9", "has no revision 'v9'"),
        ("org/gated", None, "'org/gated' on the hub (revision 'main') is gated. Ask for access"),
        ("org/empty", None, "No weights in 'org/empty' on the hub"),
        ("org/other", None, "'org/other' on the hub (revision 'main') has no config.json"),
        ("org/hole", None, "lacks tf_model-00002-of-00003.h5"),
        ("org/hostile", None, "names '*.bin', '../../x.bin', expected plain names"),
    ],
)
def test_one_sentence_says_why_there_is_no_model(hub, client, tmp_path, *, name, revision, text):
    answer = client.resolve(name, revision=revision, cache_dir=str(tmp_path))
    assert answer.directory is None
    assert answer.error.startswith("CheckpointError: ")
    assert text in answer.error
    assert "\n" not in answer.error
    assert not [file for file in hub.fetched() if file.endswith((".bin", ".h5", ".safetensors", ".msgpack"))]


def test_a_repository_without_tokenizer_files(hub, client, tmp_path):
    assert "holds no file" in client.resolve("org/other", cache_dir=str(tmp_path), weights=False).error


def test_offline_takes_what_is_cached(hub, client, offline_client, tmp_path):
    cached = client.resolve("org/three", prefer="flax", cache_dir=str(tmp_path))
    hub.requests.clear()
    for prefer in ("flax", "torch", None):
        assert offline_client.resolve("org/three", prefer=prefer, cache_dir=str(tmp_path)) == cached
        assert client.resolve("org/three", prefer=prefer, cache_dir=str(tmp_path), local_files_only=True) == cached
    assert offline_client.resolve("org/three", weights=False, cache_dir=str(tmp_path)) == cached
    assert hub.requests == []


def test_offline_and_not_cached(hub, client, offline_client, tmp_path):
    text = "is neither a local directory nor cached, and {} forbids to fetch it"
    assert text.format("HF_HUB_OFFLINE") in offline_client.resolve("org/three", cache_dir=str(tmp_path)).error
    answer = client.resolve("org/three", cache_dir=str(tmp_path), local_files_only=True)
    assert text.format("local_files_only=True") in answer.error
    client.resolve("org/three", weights=False, cache_dir=str(tmp_path))
    partial = offline_client.resolve("org/three", cache_dir=str(tmp_path)).error
    assert "The cached copy of 'org/three'" in partial
    assert "No weights in" in partial


def test_offline_with_a_shard_missing_from_the_cache(hub, client, offline_client, tmp_path):
    cached = client.resolve("org/sharded", cache_dir=str(tmp_path)).directory
    (cached / shards("torch")[1]).unlink()
    assert f"lacks {shards('torch')[1]}" in offline_client.resolve("org/sharded", cache_dir=str(tmp_path)).error
    assert client.resolve("org/sharded", cache_dir=str(tmp_path)).directory == cached
    assert offline_client.resolve("org/sharded", cache_dir=str(tmp_path)).directory == cached


def test_a_hub_that_is_down(hub, client, tmp_path):
    cached = client.resolve("org/four", cache_dir=str(tmp_path))
    hub.broken = True
    answer = client.resolve("org/four", cache_dir=str(tmp_path))
    assert answer.directory == cached.directory
    assert answer.warnings == ("The hub can't be reached (HTTP status 503); using the cached copy of org/four.",)
    answer = client.resolve("org/three", cache_dir=str(tmp_path))
    assert "neither a local directory nor cached, and the hub can't be reached (HTTP status 503)." in answer.error


def test_no_network(tmp_path):
    # Nothing listens on port 9 (discard) of a test machine; a refused connection is how a missing network looks.
    client = Client(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    try:
        error = client.resolve("org/four").error
    finally:
        client.close()
    assert "is neither a local directory nor cached, and the hub can't be reached (Connect" in error
    assert "\n" not in error
