"""Text becomes batches.

data.source        text: Python's own documentation, files, TensorFlow Datasets
    |  sources.documents(cfg)        reads it as documents, always in the same order
    v
Document(name, content)
    |  shards.prepare(cfg, vocab)    holds some out, tokenizes once, keeps files on disk
    v
Corpus(tokenizer, train, held)       two streams of tokens: <bos> document <eos> <bos> ...
    |  Loader(train, B, T, seed)     windows in an order that (seed, step) decides
    |  eval_batches(held, B, T)      all of them in order, every target once
    |  tasks                         hides, cuts or pairs tokens as the objective wants
    v
Batch(tokens, targets, positions, segments, weights), each [B T]
    |  prefetch(batches, size)       made ahead of the device by a thread
    v
the training loop
"""

from jaxgpt.data.loader import Batch, Loader, Source, eval_batches, eval_size, prefetch
from jaxgpt.data.shards import Corpus, Tokens, prepare
from jaxgpt.data.sources import Document, documents

__all__ = [
    "Batch",
    "Corpus",
    "Document",
    "Loader",
    "Source",
    "Tokens",
    "documents",
    "eval_batches",
    "eval_size",
    "prefetch",
    "prepare",
]
