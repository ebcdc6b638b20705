"""llama.cpp on the same weights beside our full depth: `python -m research.llama RUN OUT [CANDIDATES]`.

Needs `pip install llama-cpp-py-sync`. The history runs once, every candidate is a sequence of its own behind it, all
in one batch.

Its graph ends in a vocabulary. Here the deepest head's norm and weights stand there, a vocabulary of one row, so it
computes what the head does and no more; like the engine it runs the last layer behind its attention at answer slots
alone. It reads a history as one causal text, as `research.library` does. The package is built for AVX2;
LLAMA_CPP_LIB names a build of your own.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Hashable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from project.data.ragged import within
from project.engine.requests import PreparedRequest
from project.loading import open_run
from project.model.module import ExitRecommender
from project.report.tables import render
from project.run import result_head, write_json
from research.library import Library, speeds

REQUESTS = 16
ABOUT = (
    "Seconds of our full depth over llama.cpp's on the same requests of test in turns, the history not cached: median "
    "of the rounds."
)

KINDS = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


def write_gguf(module: ExitRecommender, path: Path) -> None:
    """Layers in their own precision and the deepest head; embeddings are not in it, since batches carry them."""
    backbone = module.backbone
    head: Any = module.heads[str(module.depth)]
    assert backbone is not None
    # 1. The shape.
    config = backbone.config
    width = (
        getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(module.depth)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(1)
    writer.add_tokenizer_model("no_vocab")
    # 2. The weights, those of no layer and norms as float32.
    weights = {
        f"model.layers.{name}": weight
        for name, weight in backbone.layers.state_dict().items()
    }
    weights |= {"model.norm.weight": head.norm.weight, "lm_head.weight": head.linear.weight}
    weights["model.embed_tokens.weight"] = torch.zeros_like(head.linear.weight)
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, module.depth)
    for name, weight in weights.items():
        # it turns neighbours, transformers turns halves of a head
        if "q_proj" in name or "k_proj" in name:
            halves = weight.view(-1, 2, width // 2, *weight.shape[1:])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        if "layers" not in name or weight.ndim == 1:
            weight = weight.float()
        bits = weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight
        kind = KINDS[weight.dtype]
        writer.add_tensor(
            names.get_name(name, (".weight", ".bias")),
            bits.numpy(force=True),
            raw_dtype=kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@cache
def _library() -> tuple[Any, Any, Any]:
    """llama.h as cffi has it, the library, which says nothing, and what it says it to."""
    bindings: Any = import_module("llama_cpp_py_sync._cffi_bindings")
    ffi, lib = bindings.get_ffi(), bindings.get_lib()
    silence = ffi.callback("ggml_log_callback", lambda *_: None)
    lib.llama_log_set(silence, ffi.NULL)
    lib.llama_backend_init()
    return ffi, lib, silence


def load(module: ExitRecommender) -> Any:
    """The module's weights as llama.cpp has them."""
    ffi, lib, _ = _library()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(module, path)
        model = lib.llama_model_load_from_file(
            str(path).encode(), lib.llama_model_default_params()
        )
    assert model != ffi.NULL
    return ffi.gc(model, lib.llama_model_free)


class LlamaCpp(Library):
    """Scores requests by what `load` made of a module, with as many threads as torch has.

    `cached` keeps keys and values of every user's history between requests, a context each; else one serves all.
    """

    def __init__(self, module: ExitRecommender, model: Any, cached: bool = False) -> None:
        assert module.backbone is not None
        self._kept: dict[Hashable, Any] = {}  # contexts, which go before their model
        self._model, self._depth, self._cached = model, module.depth, cached
        head: Any = module.heads[str(module.depth)]
        self._embed, self._bias = module.backbone.embed_tokens, head.linear.bias

    def _request(self, request: PreparedRequest) -> tuple[list[Tensor], int]:
        (ffi, lib, _), own, n, s = (
            _library(),
            request.candidates,
            len(request),
            len(request.stream),
        )
        spent, key = len(own.values), (request.user, n) if self._cached else None
        context = self._kept.get(key)
        if context is None or not self._cached:
            # 1. The history, which becomes the start of every candidate's sequence.
            context = self._kept[key] = self._emptied(context, s + spent, n)
            self._decode(
                context,
                request.stream.tokens,
                np.arange(s),
                np.zeros(s),
                np.zeros(0, dtype=int),
            )
            for k in range(1, n):
                lib.llama_memory_seq_cp(lib.llama_get_memory(context), 0, k, -1, -1)
            spent += s
        # 2. All candidates in one batch, logits at their answer slots.
        sequence = np.repeat(np.arange(n), own.lengths)
        self._decode(
            context, own.values, s + within(own.lengths), sequence, own.offsets[1:] - 1
        )
        found = np.frombuffer(ffi.buffer(lib.llama_get_logits(context), 4 * n), np.float32)
        logits = torch.from_numpy(found.copy()) + self._bias
        # 3. They leave the history.
        lib.llama_memory_seq_rm(lib.llama_get_memory(context), -1, s, -1)
        return [logits], spent

    def _emptied(self, context: Any, tokens: int, sequences: int) -> Any:
        """This context, or a new one where it has too little room or is None."""
        ffi, lib, _ = _library()
        if (
            context
            and lib.llama_n_batch(context) >= tokens
            and lib.llama_n_seq_max(context) >= sequences
        ):
            lib.llama_memory_clear(lib.llama_get_memory(context), False)
            return context
        given = lib.llama_context_default_params()
        given.n_ctx = given.n_batch = tokens
        given.n_seq_max, given.kv_unified = sequences, True
        given.n_threads = given.n_threads_batch = torch.get_num_threads()
        context = lib.llama_init_from_model(self._model, given)
        assert context != ffi.NULL
        return ffi.gc(context, lib.llama_free)

    def _decode(
        self,
        context: Any,
        tokens: NDArray[Any],
        position: NDArray[Any],
        sequence: NDArray[Any],
        slots: Any,
    ) -> None:
        """Run tokens (T,) at positions (T,) of sequences (T,), with an output at some of the T places."""
        ffi, lib, _ = _library()
        embedded = self._embed(torch.from_numpy(tokens)).float().numpy(force=True)
        places, ids, counts = (
            x.astype(np.int32) for x in (position, sequence, np.ones(len(tokens)))
        )
        pointers = ids.ctypes.data + ids.itemsize * np.arange(len(tokens))
        output = np.zeros(len(tokens), dtype=np.int8)
        output[slots] = 1
        batch = ffi.new("struct llama_batch *", {"n_tokens": len(tokens)})
        batch.embd = ffi.from_buffer("float[]", embedded)
        batch.pos, batch.n_seq_id = (
            ffi.from_buffer("int32_t[]", places),
            ffi.from_buffer("int32_t[]", counts),
        )
        batch.seq_id = ffi.cast("int32_t **", pointers.ctypes.data)
        batch.logits = ffi.from_buffer("int8_t[]", output)
        code = lib.llama_decode(context, batch[0])
        assert code == 0, f"llama_decode says {code}"


def measure(run: Path, candidates: int) -> dict[str, Any]:
    """The result of a calibrated run without adapters, on a CPU: llama, mistral or their like."""
    opened = open_run(run, "cpu")
    model = opened.model
    data = opened.data
    other = LlamaCpp(model, load(model))
    found, count = speeds(opened, REQUESTS, candidates, {"llama.cpp": other})
    row = {"candidates": candidates, "requests": count, "speed": found["llama.cpp"]}
    return result_head(
        "study", data.split.manifest, str(run / "config.yaml"), data.seed
    ) | {
        "rows": [row],
        "about": ABOUT,
    }


if __name__ == "__main__":
    found = measure(Path(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else 64)
    print(render(found), write_json(Path(sys.argv[2]), found), sep="\n")
