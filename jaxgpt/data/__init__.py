"""Turn text into batches.

data.source        text: Python's own documentation, files, TensorFlow Datasets
    |  sources.read_documents(cfg)   read it as documents, always in the same order
    v
Document(name, content)
    |  shards.prepare(cfg, vocab)    hold some out, tokenize once, cache the files on disk
    v
Corpus(tokenizer, train, held_out)   two streams of tokens: <bos> document <eos> <bos> ...
    |                                (and `test`, if data.test names a source)
    |  packing                       rows of T tokens: windows, or whole documents packed together
    |  Loader(rows, B, seed)         of one source or several, in an order set by (seed, step)
    |  make_eval_batches(held_out, B, T)     all windows in order, every target once
    |  tasks, chat                   mask, split or pair tokens as the objective requires
    v
Batch(tokens, targets, positions, segment_ids, weights), each [B T]
    |  prefetch_batches(task, step)  made ahead of the device by Grain's threads
    v
the training loop
"""

from jaxgpt.data.loader import Loader, count_eval_batches, make_eval_batches, prefetch_batches
from jaxgpt.data.packing import Batch, EncoderInputs, PackedDocuments, Windows
from jaxgpt.data.shards import Corpus, Tokens, prepare, prepare_evaluation
from jaxgpt.data.sources import Document, read_documents

__all__ = [
    "Batch",
    "Corpus",
    "Document",
    "EncoderInputs",
    "Loader",
    "PackedDocuments",
    "Tokens",
    "Windows",
    "count_eval_batches",
    "make_eval_batches",
    "prefetch_batches",
    "prepare",
    "prepare_evaluation",
    "read_documents",
]
