"""What `opt-flax` compiles is kept for its next process; a library's import changes nothing of JAX."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.adapters import BACKENDS
from tests.paths import ROOT

if "flax" not in BACKENDS:
    pytest.skip("JAX is not under test", allow_module_level=True)

import jax

from opt_flax import cli

PROGRAM = """
    import collections, json, sys
    import jax
    found = collections.Counter()
    jax.monitoring.register_event_listener(lambda name, **_: found.update([name.rpartition("/")[2]]))
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: found.update([name.rpartition("/")[2]]))
    from opt_flax.cli import main
    found["code"] = main(sys.argv[1:])
    print(json.dumps(found), file=sys.stderr)
"""
"""Runs `opt-flax`; the last line on standard error counts what JAX did. Each program that it needs is an event
`backend_compile_duration`, those that it found are `cache_hits` besides."""

COMMAND = ("generate", "One day", "Once", "--max-new-tokens", "12", "--num-beams", "2")


def start(cache, *command, **environment):
    """`opt-flax`, for a user with this cache directory."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "1", "XDG_CACHE_HOME": str(cache), **environment},
    )


def end(process):
    """The text, the counts, and what else there is on standard error."""
    text, errors = process.communicate()
    *others, counts = errors.splitlines()
    return text, json.loads(counts), others


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache directory that had nothing in it, and what the command gave that filled it."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, end(start(cache, *COMMAND))


def test_a_second_process_compiles_nothing(filled):
    cache, (text, counts, others) = filled
    programs = counts["backend_compile_duration"]
    assert counts["code"] == 0
    assert counts["cache_misses"] == programs > 2
    assert "cache_hits" not in counts
    again_text, again, again_others = end(start(cache, *COMMAND))
    assert again_text == text
    assert again["cache_hits"] == again["backend_compile_duration"] == programs
    assert "cache_misses" not in again
    assert others == again_others == []


def test_a_damaged_entry_costs_a_warning(filled):
    """Cut short, as a full disk leaves it, and as it is for a moment while another process writes it."""
    cache, (text, _, _) = filled
    entries = {path: path.read_bytes() for path in (cache / "opt-flax").glob("*_one_step*")}
    assert entries
    try:
        for path, whole in entries.items():
            path.write_bytes(whole[: len(whole) // 2])
        again_text, again, others = end(start(cache, *COMMAND))
    finally:
        for path, whole in entries.items():
            path.write_bytes(whole)
    assert again_text == text
    assert again["code"] == 0
    assert again["cache_hits"] == again["backend_compile_duration"] - len(entries)
    assert others
    assert all(line.startswith("opt-flax: Error reading persistent compilation cache entry") for line in others)


def test_processes_at_once(filled, tmp_path):
    _, (text, counts, _) = filled
    ends = [end(process) for process in [start(tmp_path, *COMMAND) for _ in range(2)]]
    assert [(one[0], one[1]["code"]) for one in ends] == 2 * [(text, 0)]
    assert end(start(tmp_path, *COMMAND))[1]["cache_hits"] == counts["backend_compile_duration"]


def test_it_can_be_switched_off(filled, tmp_path):
    _, (text, counts, _) = filled
    again_text, again, others = end(start(tmp_path, *COMMAND, JAX_ENABLE_COMPILATION_CACHE="0"))
    assert again_text == text
    assert again["backend_compile_duration"] == counts["backend_compile_duration"]
    assert {"cache_hits", "cache_misses"}.isdisjoint(again)
    assert others == []
    assert list(tmp_path.iterdir()) == []


# Settings


SETTINGS = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def settings():
    return tuple(getattr(jax.config, name) for name in SETTINGS)


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user with an empty cache directory who has told JAX nothing; nothing may be compiled meanwhile."""
    before = settings()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in zip(SETTINGS, (True, None, 1.0), strict=True):
        jax.config.update(name, value)
    yield tmp_path / "opt-flax"
    for name, value in zip(SETTINGS, before, strict=True):
        jax.config.update(name, value)


def test_the_directory_is_the_user_s_own(user):
    cli.keep_programs()
    assert settings() == (True, str(user), 0)
    assert user.stat().st_mode & 0o777 == 0o700


def test_a_library_leaves_the_settings_alone(user):
    from opt_flax import FlaxOPTForCausalLM

    FlaxOPTForCausalLM.from_pretrained("opt-tiny")
    assert settings() == (True, None, 1)
    assert not user.exists()


def test_what_jax_was_told_holds(user, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1.0")
    cli.keep_programs()
    assert settings() == (True, "/elsewhere", 1)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    cli.keep_programs()
    assert settings() == (True, "/elsewhere", 0)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    cli.keep_programs()
    assert settings() == (False, None, 1)
    assert not user.exists()


def test_a_jax_that_prints_lines_for_what_it_finds(user, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 1))
    cli.keep_programs()
    assert settings() == (True, None, 1)
    assert not user.exists()


def no_directory(user, monkeypatch):
    user.touch()


def no_permission(user, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != user)


def no_room(user, monkeypatch):
    usage = shutil.disk_usage(user.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 << 20))


def no_home(user, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (no_directory, "can't be made (File exists)"),
        (no_permission, "can't be written to"),
        (no_room, "has 3 MiB of free space, less than 100"),
        (no_home, "can't be made (the user has no home directory)"),
    ],
)
def test_a_directory_that_will_not_do(user, monkeypatch, spoil, problem):
    spoil(user, monkeypatch)
    with pytest.warns(UserWarning, match=re.escape(f"opt-flax {problem}, so compiled programs are not kept.")):
        cli.keep_programs()
    assert settings() == (True, None, 1)


@pytest.mark.parametrize(
    ("platform", "environment", "directory"),
    [
        ("linux", {"XDG_CACHE_HOME": "/caches"}, "/caches/opt-flax"),
        ("darwin", {"XDG_CACHE_HOME": "/caches"}, "/caches/opt-flax"),
        ("linux", {"XDG_CACHE_HOME": "caches"}, "/me/.cache/opt-flax"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/me/.cache/opt-flax"),
        ("linux", {}, "/me/.cache/opt-flax"),
        ("darwin", {}, "/me/Library/Caches/opt-flax"),
        ("win32", {}, "/me/AppData/Local/opt-flax"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/opt-flax"),
    ],
)
def test_where_a_user_s_caches_are(monkeypatch, platform, environment, directory):
    monkeypatch.setenv("HOME", "/me")
    assert cli.cache_directory(environment, platform) == Path(directory)
