"""The geometry of embeddings and hidden states: neighbours, projections, similarity of layers."""

from collections.abc import Sequence

import numpy as np

from jaxgpt.hosts import fetch
from jaxgpt.inspect.activations import spell_tokens
from jaxgpt.language_model import LanguageModel
from jaxgpt.optional import require
from jaxgpt.settings import ConfigError


def get_embeddings(model: LanguageModel) -> np.ndarray:
    """Return the token embeddings of a model: float32 [V D]."""
    return np.asarray(fetch(model.merge().params["embed"]["table"]), np.float32)


def find_token(model: LanguageModel, word: str) -> int:
    """Return the token of a word: " word" if that is one token, else "word".

    Raises:
        ConfigError: neither is a single token.
    """
    for form in (f" {word}", word):
        ids = model.tokenizer.encode(form)
        if len(ids) == 1:
            return int(ids[0])
    pieces = spell_tokens(model, model.tokenizer.encode(f" {word}"))
    raise ConfigError(
        f"{word!r} is no single token of this model: it is {' + '.join(map(repr, pieces))}."
    )


def similarity_matrix(x: np.ndarray) -> np.ndarray:
    """Return the cosine similarities of vectors x [N D]: float32 [N N]; 0 for zero vectors."""
    x = np.asarray(x, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
    return (x @ x.T).astype(np.float32)


def find_nearest(
    table: np.ndarray, vector: np.ndarray, count: int, without: Sequence[int] = ()
) -> list[tuple[int, float]]:
    """Return the rows of a table [V D] nearest to a vector [D] by cosine: (row, similarity)."""
    sizes = np.linalg.norm(table, axis=-1) * np.linalg.norm(vector)
    similar = table @ vector / np.maximum(sizes, 1e-30)
    similar[list(without)] = -np.inf
    best = np.argsort(-similar, kind="stable")[:count]
    return [(int(row), float(similar[row])) for row in best]


def neighbours(model: LanguageModel, word: str, count: int = 10) -> list[tuple[str, float]]:
    """Return the tokens whose embeddings are nearest to that of a word: (piece, cosine).

    Raises:
        ConfigError: the word is no single token.
    """
    token, table = find_token(model, word), get_embeddings(model)
    table = table[: model.tokenizer.vocab_size]
    best = find_nearest(table, table[token], count, [token])
    return [(spell_tokens(model, [row])[0], similar) for row, similar in best]


def analogy(
    model: LanguageModel, a: str, b: str, c: str, count: int = 5
) -> list[tuple[str, float]]:
    """Return what is to c as b is to a: the tokens nearest to b - a + c, by normalized embeddings.

    Raises:
        ConfigError: a word is no single token.

    Source: Mikolov et al. 2013, N13-1090, section 4.
    """
    tokens = [find_token(model, word) for word in (a, b, c)]
    table = get_embeddings(model)[: model.tokenizer.vocab_size]
    table = table / np.maximum(np.linalg.norm(table, axis=-1, keepdims=True), 1e-30)
    first, second, third = table[tokens]
    best = find_nearest(table, second - first + third, count, tokens)
    return [(spell_tokens(model, [row])[0], similar) for row, similar in best]


def pca(x: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return the first principal components of x [N D], and their shares of the variance.

    Returns:
        float32 [N C], float32 [C]. The sign of a component makes its largest entry positive.
    """
    x = np.asarray(x, np.float64)
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    projected = (u * s)[:, :count]
    rows = np.abs(projected).argmax(0)
    projected *= np.sign(projected[rows, np.arange(projected.shape[1])])
    return projected.astype(np.float32), (s[:count] ** 2 / (s**2).sum()).astype(np.float32)


def tsne(x: np.ndarray, count: int = 2, perplexity: float = 30.0, seed: int = 0) -> np.ndarray:
    """Return the t-SNE map of x [N D], by scikit-learn: float32 [N C].

    Raises:
        ConfigError: scikit-learn is not installed.

    Source: van der Maaten and Hinton 2008.
    """
    require("sklearn", "inspect.tsne")
    from sklearn.manifold import TSNE

    size = min(perplexity, (len(x) - 1) / 3)
    method = TSNE(count, perplexity=size, init="pca", random_state=seed)
    return method.fit_transform(np.asarray(x, np.float32))


def anisotropy(x: np.ndarray) -> float:
    """Return the mean cosine similarity of two different vectors of x [N D].

    Source: Ethayarajh 2019, arXiv:1909.00512, section 3.
    """
    similar = similarity_matrix(x)
    n = len(similar)
    return float((similar.sum(dtype=np.float64) - np.trace(similar)) / (n * (n - 1)))


def effective_rank(x: np.ndarray) -> float:
    """Return exp(entropy of the normalized singular values) of x [N D], 1 to min(N, D).

    Source: Roy and Vetterli 2007, definition 1.
    """
    s = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    p = s[s > 0] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Return linear CKA of two representations of the same N inputs, [N D] and [N E]: 0 to 1.

    Source: Kornblith et al. 2019, arXiv:1905.00414, equation 4.
    """
    x, y = (np.asarray(a, np.float64) - np.mean(a, 0) for a in (x, y))
    cross = np.linalg.norm(x.T @ y) ** 2
    return float(cross / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))
