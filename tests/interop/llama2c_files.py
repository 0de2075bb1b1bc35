"""Writers and a forward pass of llama2.c after its export.py and run.c: slow, by the book."""

import math
import struct

import numpy as np

SIZE = dict(
    dim=16, hidden_dim=24, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=32
)
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def make_weights(size: dict, seed: int = 0) -> dict:
    """Draw the weights of every layer, matrices [out in]."""
    rng = np.random.default_rng(seed)
    D, F, L, V = size["dim"], size["hidden_dim"], size["n_layers"], size["vocab_size"]
    kv = D // size["n_heads"] * size["n_kv_heads"]
    shapes = dict(
        attention_norm=(L, D), wq=(L, D, D), wk=(L, kv, D), wv=(L, kv, D), wo=(L, D, D),
        ffn_norm=(L, D), w1=(L, F, D), w2=(L, D, F), w3=(L, F, D), norm=(D,),
        tok_embeddings=(V, D), output=(V, D),
    )  # fmt: skip
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, size: dict, weights: dict, version: int, is_tied: bool, group: int = 8) -> None:
    numbers = [size[k] for k in ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads")]
    with open(path, "wb") as file:
        if version == 0:
            sign = 1 if is_tied else -1
            file.write(struct.pack("<7i", *numbers, sign * size["vocab_size"], size["max_seq_len"]))
            for name in ("tok_embeddings", "attention_norm", *MATRICES[:4], "ffn_norm",
                         *MATRICES[4:], "norm"):  # fmt: skip
                file.write(weights[name].tobytes())
            half = size["dim"] // size["n_heads"] // 2
            file.write(np.full((2, size["max_seq_len"], half), 7, np.float32).tobytes())
            if not is_tied:
                file.write(weights["output"].tobytes())
            return
        file.write(struct.pack("<Ii", 0x616B3432, version))
        file.write(struct.pack("<7i", *numbers, size["vocab_size"], size["max_seq_len"]))
        file.write(struct.pack("<B", is_tied))
        if version == 2:
            file.write(struct.pack("<i", group))
        file.write(b"\0" * (256 - file.tell()))
        for name in ("attention_norm", "ffn_norm", "norm"):
            file.write(weights[name].tobytes())
        for name in ("tok_embeddings", *MATRICES, *([] if is_tied else ["output"])):
            layers = weights[name] if weights[name].ndim == 3 else [weights[name]]
            for matrix in layers:
                if version == 1:
                    file.write(matrix.tobytes())
                else:
                    values, scales = quantize(matrix, group)
                    file.write(values.tobytes() + scales.tobytes())


def quantize(matrix: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    groups = matrix.reshape(-1, group)
    scales = (np.abs(groups).max(1) / 127).astype(np.float32)
    return np.round(groups / scales[:, None]).astype(np.int8), scales


def write_tokenizer(path, pieces: list[tuple[bytes, float]]) -> None:
    with open(path, "wb") as file:
        file.write(struct.pack("<i", max(len(text) for text, _ in pieces)))
        for text, score in pieces:
            file.write(struct.pack("<fi", score, len(text)) + text)


def run(size: dict, weights: dict, tokens: list[int], is_tied: bool) -> np.ndarray:
    """Compute the logits of each token, as run.c does: float32 [T V]."""
    D, H, G = size["dim"], size["n_heads"], size["n_kv_heads"]
    K, w = D // H, weights
    norm = lambda x, scale: x / math.sqrt((x * x).mean() + 1e-5) * scale  # noqa: E731

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        x = x.reshape(-1, K).copy()
        for head in x:
            for i in range(0, K, 2):  # neighbors
                angle = position / 10000.0 ** (i / K)
                a, b = head[i], head[i + 1]
                head[i] = a * math.cos(angle) - b * math.sin(angle)
                head[i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return x

    keys: list = [[] for _ in range(size["n_layers"])]
    values: list = [[] for _ in range(size["n_layers"])]
    rows = []
    for position, token in enumerate(tokens):
        x = w["tok_embeddings"][token].astype(np.float64)
        for layer in range(size["n_layers"]):
            h = norm(x, w["attention_norm"][layer])
            q = rotate(w["wq"][layer] @ h, position)
            keys[layer].append(rotate(w["wk"][layer] @ h, position))
            values[layer].append((w["wv"][layer] @ h).reshape(G, K))
            mixed = []
            for head in range(H):
                group = head // (H // G)
                scores = np.array([k[group] @ q[head] for k in keys[layer]]) / math.sqrt(K)
                weight = np.exp(scores - scores.max())
                weight /= weight.sum()
                parts = zip(weight, values[layer], strict=True)
                mixed.append(sum(a * v[group] for a, v in parts))
            x = x + w["wo"][layer] @ np.concatenate(mixed)
            h = norm(x, w["ffn_norm"][layer])
            gate = w["w1"][layer] @ h
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ h))
        head = w["tok_embeddings"] if is_tied else w["output"]
        rows.append(head @ norm(x, w["norm"]))
    return np.stack(rows)
