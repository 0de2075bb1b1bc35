"""Text becomes batches.

data.source        text: Python's own documentation, files, TensorFlow Datasets
    |  sources.documents(cfg)        reads it as documents, always in the same order
    v
Document(name, content)
    |  shards.prepare(cfg, vocab)    holds some out, tokenizes once, keeps files on disk
    v
Corpus(tokenizer, train, held)       two streams of tokens: <bos> document <eos> <bos> ...
    |  packing                       rows of T tokens: windows, or whole documents put together
    |  Loader(rows, B, seed)         of one source or several, in an order that (seed, step) decides
    |  eval_batches(held, B, T)      all windows in order, every target once
    |  tasks                         hides, cuts or pairs tokens as the objective wants
    v
Batch(tokens, targets, positions, segments, weights), each [B T]
    |  read_ahead(task, step)        made ahead of the device by Grain's threads
    v
the training loop
"""

from jaxgpt.data.loader import Loader, eval_batches, eval_size, read_ahead
from jaxgpt.data.packing import Batch, Documents, Source, Windows
from jaxgpt.data.shards import Corpus, Tokens, prepare
from jaxgpt.data.sources import Document, documents

__all__ = [
    "Batch",
    "Corpus",
    "Document",
    "Documents",
    "Loader",
    "Source",
    "Tokens",
    "Windows",
    "documents",
    "eval_batches",
    "eval_size",
    "prepare",
    "read_ahead",
]
