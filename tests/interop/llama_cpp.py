"""llama.cpp as an independent implementation, through the C interface in the wheel of xllamacpp.

Its structs are passed by value, as buffers that are larger than them; the few fields that are set
here have the offsets of the pinned version, which their defaults confirm.
"""

import ctypes
import functools
import pathlib
import struct

import numpy as np
import pytest

xllamacpp = pytest.importorskip("xllamacpp")

# Offsets in llama_context_params, in bytes.
_CONTEXT, _THREADS, _FLASH, _TYPES = 0, 28, 52, 104
_F32, _F16 = 0, 1


class _Struct(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * 512)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("pointers", ctypes.c_void_p * 6),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    folder = pathlib.Path(xllamacpp.__file__).parent
    library = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_backend_init", None, []),
        ("llama_log_set", None, [pointer, pointer]),
        ("llama_model_default_params", _Struct, []),
        ("llama_context_default_params", _Struct, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Struct]),
        ("llama_init_from_model", pointer, [pointer, _Struct]),
        ("llama_model_free", None, [pointer]),
        ("llama_free", None, [pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", integer, [pointer]),
        ("llama_vocab_is_eog", ctypes.c_bool, [pointer, integer]),
        ("llama_vocab_eos", integer, [pointer]),
        ("llama_model_n_embd", integer, [pointer]),
        ("llama_model_decoder_start_token", integer, [pointer]),
        ("llama_model_chat_template", ctypes.c_char_p, [pointer, ctypes.c_char_p]),
        ("llama_batch_get_one", _Batch, [pointer, integer]),
        ("llama_decode", integer, [pointer, _Batch]),
        ("llama_encode", integer, [pointer, _Batch]),
        ("llama_set_embeddings", None, [pointer, ctypes.c_bool]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, integer]),
        ("llama_get_embeddings_ith", ctypes.POINTER(ctypes.c_float), [pointer, integer]),
        ("llama_get_embeddings_seq", ctypes.POINTER(ctypes.c_float), [pointer, integer]),
        (
            "llama_tokenize",
            integer,
            [pointer, ctypes.c_char_p, integer, pointer, integer, ctypes.c_bool, ctypes.c_bool],
        ),
        (
            "llama_token_to_piece",
            integer,
            [pointer, integer, ctypes.c_char_p, integer, integer, ctypes.c_bool],
        ),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_SILENT, None)
    library.llama_backend_init()
    return library


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_MESSAGES: list[str] = []
_SILENT = ctypes.cast(
    _KEPT := _LOG(lambda level, text, _: _MESSAGES.append(text.decode("utf-8", "replace"))),
    ctypes.c_void_p,
)


class LlamaCpp:
    """A GGUF file in llama.cpp, with a float32 cache."""

    def __init__(self, path, context: int = 256, is_encoder: bool = False, threads: int = 1):
        self.library = library = _library()
        _MESSAGES.clear()
        self.model = library.llama_model_load_from_file(
            str(path).encode(), library.llama_model_default_params()
        )
        assert self.model, f"llama.cpp cannot load {path}: {''.join(_MESSAGES[-8:])}"
        params = library.llama_context_default_params()
        raw = bytearray(params.bytes)
        assert struct.unpack_from("<2i", raw, _TYPES) == (_F16, _F16), "another llama.cpp"
        assert struct.unpack_from("<i", raw, _FLASH) == (-1,), "another llama.cpp"
        assert struct.unpack_from("<2i", raw, _THREADS) == (4, 4), "another llama.cpp"
        struct.pack_into("<4I", raw, _CONTEXT, context, context, context, 1)
        struct.pack_into("<2i", raw, _THREADS, threads, threads)
        struct.pack_into("<2i", raw, _TYPES, _F32, _F32)
        struct.pack_into("<i", raw, _FLASH, 0)
        params.bytes[:] = raw
        self.context = library.llama_init_from_model(self.model, params)
        assert self.context, "".join(_MESSAGES[-8:])
        self.vocab = library.llama_model_get_vocab(self.model)
        self.size = library.llama_vocab_n_tokens(self.vocab)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def _run(self, function, tokens) -> None:
        array = (ctypes.c_int32 * len(tokens))(*map(int, tokens))
        batch = self.library.llama_batch_get_one(ctypes.cast(array, ctypes.c_void_p), len(tokens))
        assert function(self.context, batch) == 0, "".join(_MESSAGES[-8:])

    def clear(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def encode(self, tokens) -> None:
        """Run the encoder of an encoder-decoder."""
        self._run(self.library.llama_encode, tokens)

    def step(self, tokens) -> np.ndarray:
        """Continue with some tokens; return the logits after the last, float32 [V]."""
        self._run(self.library.llama_decode, tokens)
        logits = self.library.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.size,)).copy()

    def logits(self, tokens) -> np.ndarray:
        """Return the logits after each token, decoded one by one: float32 [T V]."""
        self.clear()
        return np.stack([self.step([token]) for token in tokens])

    def greedy(self, tokens, count: int) -> list[int]:
        """Return the likeliest continuation, up to an end token."""
        self.clear()
        found: list[int] = []
        logits = self.step(tokens)
        while len(found) < count:
            found.append(int(logits.argmax()))
            if self.is_end(found[-1]):
                break
            logits = self.step(found[-1:])
        return found

    def embeddings(self, tokens) -> np.ndarray:
        """Return the last hidden state of an encoder for each token: float32 [T D]."""
        self.library.llama_set_embeddings(self.context, True)
        self._run(self.library.llama_encode, tokens)
        width = self.library.llama_model_n_embd(self.model)
        rows = [self.library.llama_get_embeddings_ith(self.context, i) for i in range(len(tokens))]
        return np.stack([np.ctypeslib.as_array(row, (width,)).copy() for row in rows])

    def pooled(self, tokens, width: int) -> np.ndarray:
        """Return what the model makes of a whole text, float32 [width]."""
        self.library.llama_set_embeddings(self.context, True)
        self._run(self.library.llama_encode, tokens)
        values = self.library.llama_get_embeddings_seq(self.context, 0)
        return np.ctypeslib.as_array(values, (width,)).copy()

    def is_end(self, token: int) -> bool:
        return self.library.llama_vocab_is_eog(self.vocab, token)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of a text, without bos."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 16))()
        count = self.library.llama_tokenize(
            self.vocab, raw, len(raw), ctypes.cast(room, ctypes.c_void_p), len(room), special,
            special,
        )  # fmt: skip
        return list(room[:count])

    def decode(self, tokens) -> str:
        pieces = []
        for token in tokens:
            room = ctypes.create_string_buffer(256)
            count = self.library.llama_token_to_piece(self.vocab, int(token), room, 256, 0, False)
            pieces.append(room.raw[:count])
        return b"".join(pieces).decode("utf-8", "replace")

    def chat_template(self) -> str:
        return (self.library.llama_model_chat_template(self.model, None) or b"").decode()
