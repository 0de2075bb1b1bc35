"""Test the batches of every objective against the definitions in their papers."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxgpt.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxgpt.data import Tokens, prepare, prepare_evaluation
from jaxgpt.data.tasks import (
    CausalTask,
    ClassifyTask,
    MaskedTask,
    PairTask,
    PrefixTask,
    SpanTask,
    _draw_span_sizes,
)
from jaxgpt.model import Coords, build, init_params
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import make_byte_tokenizer

V, T, B = 300, 24, 8
SHAPES = {
    "causal": dict(),
    "prefix": dict(pattern=("prefix",)),
    "masked": dict(family="encoder"),
    "span": dict(family="encoder_decoder"),
    "pairs": dict(family="encoder_decoder"),
    "classify": dict(family="encoder", classes=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write texts about numbers, as pairs, as labeled texts and as plain text."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"q": f"what is {n}? {n * 7919}", "a": f"it is {n}"} for n in range(60)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    classes = folder / "classes"
    classes.mkdir()
    (classes / "x.even").write_text("\n".join(f"number {n} of all" for n in range(0, 80, 2)))
    (classes / "x.odd").write_text("\n".join(f"number {n} of all" for n in range(1, 80, 2)))
    (classes / "README.md").write_text("Not a class.")
    texts = folder / "texts"
    texts.mkdir()
    for n in range(30):
        (texts / f"{n:02}.txt").write_text(" ".join(str(n * k) for k in range(12)))
    return folder


def make_config(folder, name, data=None, **changes):
    source = {"pairs": folder / "pairs.jsonl", "classify": f"classes:{folder / 'classes'}"}
    keys = dict(text_key="q", target_key="a") if name == "pairs" else {}
    return Config(
        model=ModelConfig(**dict(vocab=V, context=T) | SHAPES[name] | changes.pop("model", {})),
        data=DataConfig(source=str(source.get(name, folder / "texts")), tokenizer="bytes",
                        cache=str(folder / "cache"), holdout=0.2, **keys, **(data or {})),
        train=TrainConfig(objective=name, batch=B, steps=200, **changes),
    )  # fmt: skip


def make_task(folder, name, **changes):
    cfg = make_config(folder, name, **changes)
    row = cfg.objective.task
    corpus = prepare(cfg.data, V - row.count_mask_tokens(cfg), is_paired=row.IS_PAIRED)
    return row(cfg, corpus)


DOCUMENTS = dict(packing="documents")
every_task = pytest.mark.parametrize("name", SHAPES)


def list_arrays(batch):
    return [x for x in (*batch[:6], *(batch.encoder_inputs or ())) if x is not None]


@every_task
def test_a_batch_is_a_function_of_the_step_and_differs_between_steps(folder, name):
    one, other = make_task(folder, name), make_task(folder, name)
    other.make_batch(3)
    for x, y in zip(list_arrays(one.make_batch(5)), list_arrays(other.make_batch(5)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert any(
        (x != y).any()
        for x, y in zip(list_arrays(one.make_batch(5)), list_arrays(one.make_batch(6)), strict=True)
    )


@every_task
def test_a_host_can_make_only_its_rows_of_a_batch(folder, name):
    task = make_task(folder, name)
    for rows in (slice(2, 4), np.array([0, 5, 6])):
        for x, y in zip(
            list_arrays(task.make_batch(5)), list_arrays(task.make_batch(5, rows)), strict=True
        ):
            np.testing.assert_array_equal(x[rows], y)


@every_task
def test_held_out_batches_are_the_same_every_time_and_of_the_shape_of_training(folder, name):
    task = make_task(folder, name)
    first, again = list(task.make_eval_batches()), list(task.make_eval_batches())
    assert first
    for one, other in zip(first, again, strict=True):
        for x, y in zip(list_arrays(one), list_arrays(other), strict=True):
            np.testing.assert_array_equal(x, y)
        assert [x.shape for x in list_arrays(one)] == [
            x.shape for x in list_arrays(task.make_batch(0))
        ]
        assert [x.dtype for x in list_arrays(one)] == [
            x.dtype for x in list_arrays(task.make_batch(0))
        ]


def test_every_held_out_row_has_masks_of_its_own(folder):
    task, rows = make_task(folder, "masked", mask_rate=0.5), 4 * B
    # One long document without special tokens inside, so that rows differ only by their draws.
    ids = np.random.default_rng(0).integers(4, 260, rows * T + 1).astype(np.uint16)
    held_out = Tokens(ids, np.array([0, ids.size]))
    task.corpus = dataclasses.replace(task.corpus, held_out=held_out)
    masks = [row for batch in task.make_eval_batches() for row in batch.weights]
    assert len(masks) == len(np.unique(masks, axis=0)) == rows  # of 2^24 equally likely ones


def test_causal_batches_are_unchanged_loader_batches(folder):
    task = make_task(folder, "causal")
    for x, y in zip(task.make_batch(3)[:5], task.loader.make_batch(3)[:5], strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_prefix_is_not_predicted_and_everything_after_it_is(folder):
    task = make_task(folder, "prefix")
    lengths = set()
    for step in range(20):
        batch, plain = task.make_batch(step), task.loader.make_batch(step)
        np.testing.assert_array_equal(batch.tokens, plain.tokens)
        for row in range(B):
            for at in range(T):
                prefix = batch.prefix[row, at]
                size = (batch.segment_ids[row] == batch.segment_ids[row, at]).sum()
                assert 1 <= prefix <= max(1, size - 1)
                # The next token is at position + 1: predicted if it is not in the prefix.
                is_predicted = batch.positions[row, at] + 1 >= prefix
                assert batch.weights[row, at] == plain.weights[row, at] * is_predicted
                lengths.add((int(size), int(prefix)))
            for document in np.unique(batch.segment_ids[row]):
                assert len(set(batch.prefix[row, batch.segment_ids[row] == document])) == 1
    full = {prefix for size, prefix in lengths if size == T}
    assert len(full) > 10  # of 23 lengths


def test_masked_tokens_are_masked_replaced_or_unchanged_as_in_bert(folder):
    task = make_task(folder, "masked")
    tokenizer = task.corpus.tokenizer
    predicted = hidden = left = total = 0
    for step in range(150):
        batch, plain = task.make_batch(step), task.loader.make_batch(step)
        np.testing.assert_array_equal(batch.targets, plain.tokens)
        is_predicted = batch.weights > 0
        np.testing.assert_array_equal(batch.tokens[~is_predicted], plain.tokens[~is_predicted])
        assert not np.isin(plain.tokens[is_predicted], [tokenizer.bos, tokenizer.eos]).any()
        total += (~np.isin(plain.tokens, [tokenizer.bos, tokenizer.eos])).sum()
        predicted += is_predicted.sum()
        hidden += (batch.tokens[is_predicted] == V - 1).sum()
        left += (batch.tokens[is_predicted] == plain.tokens[is_predicted]).sum()
    # Fractions of about 4,000 predicted tokens: standard deviations of 0.6%; four of them.
    assert abs(predicted / total - 0.15) < 0.01
    assert abs(hidden / predicted - 0.8) < 0.026
    assert abs(left / predicted - 0.1) < 0.02  # a replaced one may be the same by chance, 1 in 260
    assert MaskedTask.count_mask_tokens(task.cfg) == 1


def test_spans_reinserted_in_their_places_are_the_text(folder):
    task = make_task(folder, "span")
    eos = task.corpus.tokenizer.eos
    hidden = 0
    for step in range(10):
        batch, plain = task.make_batch(step), task.loader.make_batch(step)
        assert batch.encoder_inputs.tokens.shape == (B, T)  # it fills the context
        assert batch.encoder_inputs.segment_ids.all()
        assert batch.weights.all()
        np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert (batch.tokens[:, 0] == task.corpus.tokenizer.bos).all()
        for source, target, text in zip(
            batch.encoder_inputs.tokens, batch.targets, plain.tokens, strict=True
        ):
            assert source[-1] == target[-1] == eos
            source, target = source[:-1].tolist(), target[:-1].tolist()
            spans = {}
            for token in target:
                if token > 260:
                    mask = token
                    spans[mask] = []
                else:
                    spans[mask].append(token)
            assert list(spans) == [V - 1 - i for i in range(len(spans))]
            assert all(spans.values())
            filled = [y for x in source for y in (spans.pop(x) if x > 260 else [x])]
            assert filled == text.tolist()
            assert not spans
            hidden += sum(x < 260 for x in target)
    assert abs(hidden / (10 * B * task.T) - 0.15) < 0.02


def corrupt_spans_reference(task, tokens, rng):
    """Return source and target of one T5 row, computed token by token."""
    n = len(tokens)
    hidden = min(max(round(n * 0.4), 1), n - 1)
    spans = min(max(round(hidden / 3), 1), hidden, n - hidden)
    kept_sizes, masked_sizes = (
        _draw_span_sizes(rng, n - hidden, spans),
        _draw_span_sizes(rng, hidden, spans),
    )
    source, target, at = [], [], 0
    for mask, (keep, hide) in enumerate(zip(kept_sizes, masked_sizes, strict=True)):
        source += [*tokens[at : at + keep], V - 1 - mask]
        target += [V - 1 - mask, *tokens[at + keep : at + keep + hide]]
        at += keep + hide
    eos = task.corpus.tokenizer.eos
    return [*source, eos], [*target, eos]


@pytest.mark.parametrize("data", [{}, DOCUMENTS])
def test_spans_equal_the_token_by_token_reference(folder, data):
    task = make_task(folder, "span", data=data, mask_rate=0.4)  # some three spans a row
    tokenizer = task.corpus.tokenizer
    sizes = set()
    for step in range(6):
        batch, plain = task.make_batch(step), task.loader.make_batch(step)
        for row in range(B):
            rng = np.random.default_rng([0, 0, step * B + row])
            there = plain.tokens[row][plain.segment_ids[row] > 0]
            source, target = corrupt_spans_reference(task, there.tolist(), rng)
            n, S, said = len(there), len(source), len(target)
            assert batch.encoder_inputs.tokens[row].tolist() == source + [tokenizer.pad] * (T - S)
            assert batch.encoder_inputs.segment_ids[row].tolist() == [1] * S + [0] * (T - S)
            assert batch.targets[row, :said].tolist() == target
            assert batch.tokens[row, 1:said].tolist() == target[:-1]
            assert batch.weights[row].sum() == batch.weights[row, :said].sum() == said
            assert (batch.segment_ids[row] == batch.weights[row]).all()
            sizes.add(n)
    assert len(sizes) == 1 if not data else len(sizes) > 1  # full rows, and padded ones


def test_a_longer_window_would_not_fit_the_context_of_spans(folder):
    task = make_task(folder, "span")

    def source(n):
        masked = round(0.15 * n)
        return n - masked + round(masked / 3) + 1

    assert source(task.T) <= T < source(task.T + 1)


def test_pairs_are_whole_and_each_occurs_once_an_epoch(folder):
    task = make_task(folder, "pairs")
    tokenizer = task.corpus.tokenizer
    size = task.corpus.train.documents // 2
    seen = []
    for step in range(-(-size // B) + 2):
        batch = task.make_batch(step)
        for row in range(B):
            predicted = batch.targets[row][batch.weights[row] > 0]
            given = batch.tokens[row][batch.segment_ids[row] > 0]
            read = batch.encoder_inputs.tokens[row][batch.encoder_inputs.segment_ids[row] > 0]
            assert given[0] == tokenizer.bos
            assert predicted[-1] == tokenizer.eos
            np.testing.assert_array_equal(given[1:], predicted[:-1])
            question, answer = tokenizer.decode(read[1:]), tokenizer.decode(predicted[:-1])
            number = answer.removeprefix("it is ")
            assert question.startswith(f"what is {number}?"[: T - 2])
            np.testing.assert_array_equal(batch.positions[row][: len(given)], np.arange(len(given)))
            seen.append(int(number))
    assert len(set(seen[:size])) == size  # an epoch
    assert seen[:size] != sorted(seen[:size])
    held = sum((batch.weights.sum(axis=1) > 0).sum() for batch in task.make_eval_batches())
    assert size + held == 60
    assert held > 0


def test_a_source_longer_than_the_context_is_truncated_and_reported(folder):
    assert make_task(folder, "pairs", model=dict(context=64)).note == ""
    task = make_task(folder, "pairs", model=dict(context=12))
    assert task.note == "60 of 60 are longer than model.context=12, and cut"
    assert task.make_batch(0).encoder_inputs.segment_ids.all()


@pytest.mark.parametrize("name", ["causal", "prefix", "masked", "span"])
def test_rows_of_whole_documents_serve_every_objective_and_do_not_change_evaluation(folder, name):
    task, plain = make_task(folder, name, data=DOCUMENTS), make_task(folder, name)
    assert task.loader.rows[0].tokens is task.corpus.train
    assert f"{task.loader.padding:.2%} of the rows is padding" == task.note
    assert 0 < task.loader.padding < 0.2  # of 24 documents of some 50 tokens
    for one, other in zip(task.make_eval_batches(), plain.make_eval_batches(), strict=True):
        for x, y in zip(list_arrays(one), list_arrays(other), strict=True):
            np.testing.assert_array_equal(x, y)
    for step in range(10):
        batch = task.make_batch(step)
        assert [x.shape for x in list_arrays(batch)] == [
            x.shape for x in list_arrays(plain.make_batch(step))
        ]
        is_empty = batch.segment_ids == 0
        assert not batch.weights[is_empty].any()
        if name != "span":
            rows = task.loader.make_batch(step)
            assert is_empty.any(axis=1).tolist() == (rows.segment_ids == 0).any(axis=1).tolist()
            if name == "prefix":
                assert (batch.prefix[~is_empty] >= 1).all()


def test_packed_pairs_stay_separate_and_each_occurs_once_an_epoch(folder):
    model = dict(model=dict(context=64))
    task, unpacked = (
        make_task(folder, "pairs", data=DOCUMENTS, **model),
        make_task(folder, "pairs", **model),
    )
    expected, seen = [], []
    for packed, into in ((task, seen), (unpacked, expected)):
        rows = packed.loader.rows[0]
        batch = rows.gather(np.arange(rows.size))
        for row in range(rows.size):
            for pair in range(1, batch.segment_ids[row].max() + 1):
                here, there = (
                    batch.segment_ids[row] == pair,
                    batch.encoder_inputs.segment_ids[row] == pair,
                )
                fields = (batch.tokens, batch.targets, batch.positions, batch.weights)
                source = (batch.encoder_inputs.tokens, batch.encoder_inputs.positions)
                arrays = [*(x[row, here] for x in fields), *(x[row, there] for x in source)]
                assert arrays[1][-1] == arrays[4][-1] == packed.corpus.tokenizer.eos
                into.append(tuple(tuple(x.tolist()) for x in arrays))
    assert sorted(seen) == sorted(expected)
    assert len(expected) == task.corpus.train.documents // 2
    assert task.loader.rows[0].size < len(expected) / 1.5
    assert "of the rows is padding" in task.note
    held = [batch.weights.sum() for batch in task.make_eval_batches()]
    assert sum(held) == sum(batch.weights.sum() for batch in unpacked.make_eval_batches())


def test_impossible_packings_are_rejected(folder):
    with pytest.raises(ConfigError, match=r"data\.packing='documents'.*classify.*=stream"):
        make_config(folder, "classify", data=DOCUMENTS)
    with pytest.raises(ConfigError, match=r"data\.packing='documents'.*model\.documents='joined'"):
        make_config(folder, "causal", data=DOCUMENTS, model=dict(documents="joined"))


@pytest.mark.parametrize("documents", ["separate", "joined"])
def test_tokens_depend_on_the_previous_document_only_if_documents_are_joined(folder, documents):
    task = make_task(folder, "causal", model=dict(documents=documents, width=8, heads=2, ffn=8))
    cfg, batch = task.cfg.model, task.make_batch(0)
    starts = np.argwhere(make_task(folder, "causal").make_batch(0).positions == 0)
    row, begin = next((row, begin) for row, begin in starts.tolist() if begin)
    model, params = build(cfg), init_params(cfg, jax.random.key(0))[0]

    def hidden(tokens):
        return model.apply({"params": params}, tokens, Coords(*batch[2:4]))[0]

    other = batch.tokens.copy()
    other[row, begin - 1] += 1
    is_affected = bool((hidden(other) != hidden(batch.tokens))[row, begin:].any())
    assert is_affected == (documents == "joined")
    assert is_affected == bool((batch.positions == np.arange(T)).all())
    assert is_affected == bool(batch.weights.all())


@every_task
def test_sources_are_mixed_by_weight(folder, name):
    cfg = make_config(folder, name)
    one = make_task(folder, name).corpus
    half = one.train.documents // 4 * 2
    begin = one.train.starts[half]
    parts = [
        Tokens(one.train.ids[:begin], one.train.starts[: half + 1]),
        Tokens(one.train.ids[begin:], one.train.starts[half:] - begin),
    ]
    mixed = cfg.objective.task(
        cfg, dataclasses.replace(one, mixture=((0.75, parts[0]), (0.25, parts[1])))
    )
    which, _ = mixed.loader.interleave.locate(np.arange(3 * B, 4 * B))
    assert np.bincount(which).tolist() == [6, 2]
    single_source_tasks = [
        cfg.objective.task(cfg, dataclasses.replace(one, mixture=((1.0, part),))) for part in parts
    ]
    shown = mixed.loader.make_batch(3)
    for row, stream in enumerate(which):
        # Row 3 B + row is the nth of its stream; compare it with a task of that stream only.
        nth = mixed.loader.interleave.locate(np.array([3 * B + row]))[1]
        first = mixed.loader.epochs[stream].take(nth)
        kept = single_source_tasks[stream].loader.rows[0].gather(first)
        if name == "classify":
            kept = kept._replace(targets=shown.targets[row : row + 1])
        for x, y in zip(list_arrays(shown), list_arrays(kept), strict=True):
            np.testing.assert_array_equal(x[row], y[0])


def test_texts_are_classified_by_the_ending_of_their_file(folder):
    task = make_task(folder, "classify")
    tokenizer = task.corpus.tokenizer
    assert task.labels == ["even", "odd"]
    texts = []
    for batch in (*(task.make_batch(step) for step in range(9)), *task.make_eval_batches()):
        assert batch.targets.shape == batch.weights.shape == (B,)
        for row in np.flatnonzero(batch.weights):
            text = tokenizer.decode(batch.tokens[row][batch.segment_ids[row] > 0])
            number = int(text.split()[1])
            assert task.labels[batch.targets[row]] == ("odd" if number % 2 else "even")
            texts.append(number)
    assert set(texts) == set(range(80))


def test_a_model_of_another_number_of_classes_is_rejected(folder):
    with pytest.raises(ConfigError, match=r"model.classes=3.*2 classes \('even', 'odd'\).*=2"):
        make_task(folder, "classify", model=dict(classes=3))


def test_pairs_without_answers_are_rejected_by_name(folder, tmp_path):
    data = DataConfig(source=str(folder / "texts"), tokenizer="bytes", cache=str(tmp_path))
    with pytest.raises(ConfigError, match=r"00\.txt has no answer.*data\.target_key"):
        prepare(data, V, is_paired=True)
    keyed = dataclasses.replace(data, source=str(folder / "pairs.jsonl"), text_key="q")
    with pytest.raises(ConfigError, match=r"pairs\.jsonl:1 has no answer"):
        prepare(keyed, V, is_paired=True)
    with pytest.raises(ConfigError, match=r"data\.target_key"):
        prepare(dataclasses.replace(keyed, target_key="b"), V, is_paired=True)


def test_pairs_are_not_cut_by_the_tail(folder, tmp_path):
    data = DataConfig(source=str(folder / "pairs.jsonl"), text_key="q", target_key="a",
                      split="tail", cache=str(tmp_path), tokenizer="bytes")  # fmt: skip
    with pytest.raises(ConfigError, match=r"data\.split='tail'"):
        prepare(data, V, is_paired=True)


def test_folders_of_text_files_are_classes_too(tmp_path):
    for name in ("good", "bad"):
        (tmp_path / "reviews" / name).mkdir(parents=True)
        for n in range(30):
            (tmp_path / "reviews" / name / f"{n}.txt").write_text(f"{name} film {n}\nindeed")
    data = DataConfig(source=f"classes:{tmp_path / 'reviews'}", tokenizer="bytes",
                      cache=str(tmp_path / "cache"))  # fmt: skip
    corpus = prepare(data, V, is_paired=True)
    tokenizer, stream = corpus.tokenizer, corpus.train
    for n in range(0, stream.documents, 2):
        a, b, c = stream.starts[n : n + 3]
        text, label = tokenizer.decode(stream.ids[a:b]), tokenizer.decode(stream.ids[b:c])
        assert text.startswith(label)
        assert text.endswith("indeed")
    assert corpus.train.documents + corpus.held_out.documents == 120


def test_classes_without_files_are_rejected(tmp_path):
    data = DataConfig(source=f"classes:{tmp_path}", cache=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="matches no file with an ending"):
        prepare(data, V, is_paired=True)


def test_mask_tokens_do_not_collide_with_tokenizer_tokens(folder):
    for name, row in dict(masked=MaskedTask, span=SpanTask).items():
        task = make_task(folder, name)
        assert task.corpus.tokenizer.vocab_size + row.count_mask_tokens(task.cfg) <= V
    for row in (CausalTask, PrefixTask, PairTask, ClassifyTask):
        assert row.count_mask_tokens(task.cfg) == 0


# --- sources of their own ---


def make_evaluation(folder, name, source, labels=(), **changes):
    cfg = make_config(folder, name, **changes)
    data = dataclasses.replace(cfg.data, test=str(source))
    corpus = prepare_evaluation(
        data, make_byte_tokenizer(), cfg.objective.task.IS_PAIRED, labels=labels
    )
    return cfg.objective.task(cfg, corpus)


@every_task
def test_a_test_set_has_the_batches_that_it_would_have_as_the_held_out_text(folder, name):
    own = make_config(folder, name).data.source
    task = make_task(folder, name, data=dict(test=own))
    alone = make_evaluation(folder, name, own, labels=task.labels)
    batches = list(task.make_eval_batches(task.corpus.test))
    assert len(batches) == len(list(alone.make_eval_batches())) > 0
    for batch, other in zip(batches, alone.make_eval_batches(), strict=True):
        for ours, theirs in zip(list_arrays(batch), list_arrays(other), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_test_set_may_lack_a_class_but_has_no_other(folder, tmp_path):
    (tmp_path / "y.odd").write_text("number 1\nnumber 3")
    task = make_evaluation(folder, "classify", f"classes:{tmp_path}", labels=["even", "odd"])
    (batch,) = task.make_eval_batches()
    assert batch.targets[batch.weights > 0].tolist() == [1, 1]
    (tmp_path / "z.prime").write_text("number 2")
    with pytest.raises(ConfigError, match="'prime', which the model does not have: it has 'even'"):
        make_evaluation(folder, "classify", f"classes:{tmp_path}", labels=["even", "odd"])


def test_a_pair_counts_once(folder):
    task = make_task(folder, "pairs")
    assert task.corpus.is_paired
    pairs = sum(rows.size for rows in task.loader.rows)
    assert task.corpus.train_documents == pairs == task.corpus.train.documents / 2
    causal = make_task(folder, "causal").corpus
    assert causal.train_documents == causal.train.documents
