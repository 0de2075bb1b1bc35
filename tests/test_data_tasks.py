"""The batches of every objective, against what their papers say of them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxgpt.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxgpt.data import Tokens, prepare
from jaxgpt.data.tasks import Causal, Classify, Masked, Pairs, Prefix, Span, _cuts
from jaxgpt.model import Coords, build, init_params
from jaxgpt.settings import ConfigError

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
    """Numbers and their names, as pairs, as classes and as plain text."""
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


def config(folder, name, data=None, **changes):
    source = {"pairs": folder / "pairs.jsonl", "classify": f"classes:{folder / 'classes'}"}
    keys = dict(text_key="q", target_key="a") if name == "pairs" else {}
    return Config(
        model=ModelConfig(**dict(vocab=V, context=T) | SHAPES[name] | changes.pop("model", {})),
        data=DataConfig(source=str(source.get(name, folder / "texts")), tokenizer="bytes",
                        cache=str(folder / "cache"), holdout=0.2, **keys, **(data or {})),
        train=TrainConfig(objective=name, batch=B, steps=200, **changes),
    )  # fmt: skip


def task(folder, name, **changes):
    cfg = config(folder, name, **changes)
    row = cfg.objective.task
    corpus = prepare(cfg.data, V - row.reserved(cfg), is_paired=row.IS_PAIRED)
    return row(cfg, corpus)


DOCUMENTS = dict(packing="documents")
every_task = pytest.mark.parametrize("name", SHAPES)


def leaves(batch):
    return [x for x in (*batch[:6], *(batch.source or ())) if x is not None]


@every_task
def test_a_batch_is_a_function_of_the_step_and_differs_between_steps(folder, name):
    one, other = task(folder, name), task(folder, name)
    other.batch(3)
    for x, y in zip(leaves(one.batch(5)), leaves(other.batch(5)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert any(
        (x != y).any() for x, y in zip(leaves(one.batch(5)), leaves(one.batch(6)), strict=True)
    )


@every_task
def test_a_host_makes_its_own_rows_of_a_batch(folder, name):
    made = task(folder, name)
    for rows in (slice(2, 4), np.array([0, 5, 6])):
        for x, y in zip(leaves(made.batch(5)), leaves(made.batch(5, rows)), strict=True):
            np.testing.assert_array_equal(x[rows], y)


@every_task
def test_held_out_batches_are_the_same_every_time_and_of_the_shape_of_training(folder, name):
    made = task(folder, name)
    first, again = list(made.held()), list(made.held())
    assert first
    for one, other in zip(first, again, strict=True):
        for x, y in zip(leaves(one), leaves(other), strict=True):
            np.testing.assert_array_equal(x, y)
        assert [x.shape for x in leaves(one)] == [x.shape for x in leaves(made.batch(0))]
        assert [x.dtype for x in leaves(one)] == [x.dtype for x in leaves(made.batch(0))]


def test_causal_batches_are_the_loaders(folder):
    made = task(folder, "causal")
    for x, y in zip(made.batch(3)[:5], made.loader.batch(3)[:5], strict=True):
        np.testing.assert_array_equal(x, y)


def test_of_a_prefix_nothing_is_asked_and_of_the_rest_everything(folder):
    made = task(folder, "prefix")
    lengths = set()
    for step in range(20):
        batch, plain = made.batch(step), made.loader.batch(step)
        np.testing.assert_array_equal(batch.tokens, plain.tokens)
        for row in range(B):
            for at in range(T):
                prefix = batch.prefix[row, at]
                size = (batch.segments[row] == batch.segments[row, at]).sum()
                assert 1 <= prefix <= max(1, size - 1)
                # The token after this one is at position + 1: asked for if that is not given.
                is_asked = batch.positions[row, at] + 1 >= prefix
                assert batch.weights[row, at] == plain.weights[row, at] * is_asked
                lengths.add((int(size), int(prefix)))
            for document in np.unique(batch.segments[row]):
                assert len(set(batch.prefix[row, batch.segments[row] == document])) == 1
    full = {prefix for size, prefix in lengths if size == T}
    assert len(full) > 10  # of 23 lengths


def test_masked_tokens_are_hidden_replaced_or_left_as_bert_says(folder):
    made = task(folder, "masked")
    words = made.corpus.tokenizer
    asked = hidden = left = total = 0
    for step in range(150):
        batch, plain = made.batch(step), made.loader.batch(step)
        np.testing.assert_array_equal(batch.targets, plain.tokens)
        is_asked = batch.weights > 0
        np.testing.assert_array_equal(batch.tokens[~is_asked], plain.tokens[~is_asked])
        assert not np.isin(plain.tokens[is_asked], [words.bos, words.eos]).any()
        total += (~np.isin(plain.tokens, [words.bos, words.eos])).sum()
        asked += is_asked.sum()
        hidden += (batch.tokens[is_asked] == V - 1).sum()
        left += (batch.tokens[is_asked] == plain.tokens[is_asked]).sum()
    # Shares of some 4,000 tokens that are asked for: deviations of 0.6%; four of them.
    assert abs(asked / total - 0.15) < 0.01
    assert abs(hidden / asked - 0.8) < 0.026
    assert abs(left / asked - 0.1) < 0.02  # a replaced one may be the same by chance, 1 in 260
    assert Masked.reserved(made.cfg) == 1


def test_spans_put_back_in_their_places_are_the_text(folder):
    made = task(folder, "span")
    eos = made.corpus.tokenizer.eos
    hidden = 0
    for step in range(10):
        batch, plain = made.batch(step), made.loader.batch(step)
        assert batch.source.tokens.shape == (B, T)  # it fills the context
        assert batch.source.segments.all()
        assert batch.weights.all()
        np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert (batch.tokens[:, 0] == made.corpus.tokenizer.bos).all()
        for source, target, text in zip(
            batch.source.tokens, batch.targets, plain.tokens, strict=True
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
    assert abs(hidden / (10 * B * made.T) - 0.15) < 0.02


def twin_of_spans(made, tokens, rng):
    """One row of T5, token by token."""
    n = len(tokens)
    hidden = min(max(round(n * 0.4), 1), n - 1)
    spans = min(max(round(hidden / 3), 1), hidden, n - hidden)
    kept, gone = _cuts(rng, n - hidden, spans), _cuts(rng, hidden, spans)
    source, target, at = [], [], 0
    for mask, (keep, hide) in enumerate(zip(kept, gone, strict=True)):
        source += [*tokens[at : at + keep], V - 1 - mask]
        target += [V - 1 - mask, *tokens[at + keep : at + keep + hide]]
        at += keep + hide
    eos = made.corpus.tokenizer.eos
    return [*source, eos], [*target, eos]


@pytest.mark.parametrize("data", [{}, DOCUMENTS])
def test_spans_are_what_hiding_token_by_token_gives(folder, data):
    made = task(folder, "span", data=data, noise=0.4)  # some three spans a row
    words = made.corpus.tokenizer
    sizes = set()
    for step in range(6):
        batch, plain = made.batch(step), made.loader.batch(step)
        for row in range(B):
            rng = np.random.default_rng([0, 0, step * B + row])
            there = plain.tokens[row][plain.segments[row] > 0]
            source, target = twin_of_spans(made, there.tolist(), rng)
            n, S, said = len(there), len(source), len(target)
            assert batch.source.tokens[row].tolist() == source + [words.pad] * (T - S)
            assert batch.source.segments[row].tolist() == [1] * S + [0] * (T - S)
            assert batch.targets[row, :said].tolist() == target
            assert batch.tokens[row, 1:said].tolist() == target[:-1]
            assert batch.weights[row].sum() == batch.weights[row, :said].sum() == said
            assert (batch.segments[row] == batch.weights[row]).all()
            sizes.add(n)
    assert len(sizes) == 1 if not data else len(sizes) > 1  # full rows, and padded ones


def test_a_longer_window_would_not_fit_the_context_of_spans(folder):
    made = task(folder, "span")

    def source(n):
        gone = round(0.15 * n)
        return n - gone + round(gone / 3) + 1

    assert source(made.T) <= T < source(made.T + 1)


def test_pairs_are_read_and_written_whole_and_each_once_an_epoch(folder):
    made = task(folder, "pairs")
    words = made.corpus.tokenizer
    size = made.corpus.train.documents // 2
    seen = []
    for step in range(-(-size // B) + 2):
        batch = made.batch(step)
        for row in range(B):
            asked = batch.targets[row][batch.weights[row] > 0]
            given = batch.tokens[row][batch.segments[row] > 0]
            read = batch.source.tokens[row][batch.source.segments[row] > 0]
            assert given[0] == words.bos
            assert asked[-1] == words.eos
            np.testing.assert_array_equal(given[1:], asked[:-1])
            question, answer = words.decode(read[1:]), words.decode(asked[:-1])
            number = answer.removeprefix("it is ")
            assert question.startswith(f"what is {number}?"[: T - 2])
            np.testing.assert_array_equal(batch.positions[row][: len(given)], np.arange(len(given)))
            seen.append(int(number))
    assert len(set(seen[:size])) == size  # an epoch
    assert seen[:size] != sorted(seen[:size])
    held = sum((batch.weights.sum(axis=1) > 0).sum() for batch in made.held())
    assert size + held == 60
    assert held > 0


def test_a_source_longer_than_the_context_is_cut_and_reported(folder):
    assert task(folder, "pairs", model=dict(context=64)).note == ""
    made = task(folder, "pairs", model=dict(context=12))
    assert made.note == "60 of 60 are longer than model.context=12, and cut"
    assert made.batch(0).source.segments.all()


@pytest.mark.parametrize("name", ["causal", "prefix", "masked", "span"])
def test_rows_of_whole_documents_serve_every_objective_and_leave_evaluation_alone(folder, name):
    made, plain = task(folder, name, data=DOCUMENTS), task(folder, name)
    assert made.loader.rows[0].tokens is made.corpus.train
    assert f"{made.loader.padding:.2%} of the rows is padding" == made.note
    assert 0 < made.loader.padding < 0.2  # of 24 documents of some 50 tokens
    for one, other in zip(made.held(), plain.held(), strict=True):
        for x, y in zip(leaves(one), leaves(other), strict=True):
            np.testing.assert_array_equal(x, y)
    for step in range(10):
        batch = made.batch(step)
        assert [x.shape for x in leaves(batch)] == [x.shape for x in leaves(plain.batch(step))]
        is_empty = batch.segments == 0
        assert not batch.weights[is_empty].any()
        if name != "span":
            rows = made.loader.batch(step)
            assert is_empty.any(axis=1).tolist() == (rows.segments == 0).any(axis=1).tolist()
            if name == "prefix":
                assert (batch.prefix[~is_empty] >= 1).all()


def test_packed_pairs_keep_to_themselves_and_come_each_once_an_epoch(folder):
    model = dict(model=dict(context=64))
    made, alone = task(folder, "pairs", data=DOCUMENTS, **model), task(folder, "pairs", **model)
    expected, seen = [], []
    for packed, into in ((made, seen), (alone, expected)):
        rows = packed.loader.rows[0]
        batch = rows.cut(np.arange(rows.size))
        for row in range(rows.size):
            for pair in range(1, batch.segments[row].max() + 1):
                here, there = batch.segments[row] == pair, batch.source.segments[row] == pair
                fields = (batch.tokens, batch.targets, batch.positions, batch.weights)
                source = (batch.source.tokens, batch.source.positions)
                told = [*(x[row, here] for x in fields), *(x[row, there] for x in source)]
                assert told[1][-1] == told[4][-1] == packed.corpus.tokenizer.eos
                into.append(tuple(tuple(x.tolist()) for x in told))
    assert sorted(seen) == sorted(expected)
    assert len(expected) == made.corpus.train.documents // 2
    assert made.loader.rows[0].size < len(expected) / 1.5
    assert "of the rows is padding" in made.note
    held = [batch.weights.sum() for batch in made.held()]
    assert sum(held) == sum(batch.weights.sum() for batch in alone.held())


def test_what_can_not_be_packed_is_refused(folder):
    with pytest.raises(ConfigError, match=r"data\.packing='documents'.*classify.*=stream"):
        config(folder, "classify", data=DOCUMENTS)
    with pytest.raises(ConfigError, match=r"data\.packing='documents'.*model\.documents='joined'"):
        config(folder, "causal", data=DOCUMENTS, model=dict(documents="joined"))


@pytest.mark.parametrize("documents", ["apart", "joined"])
def test_tokens_hear_of_the_document_before_only_where_documents_are_joined(folder, documents):
    made = task(folder, "causal", model=dict(documents=documents, width=8, heads=2, ffn=8))
    cfg, batch = made.cfg.model, made.batch(0)
    starts = np.argwhere(task(folder, "causal").batch(0).positions == 0)
    row, begin = next((row, begin) for row, begin in starts.tolist() if begin)
    model, params = build(cfg), init_params(cfg, jax.random.key(0))[0]

    def hidden(tokens):
        return model.apply({"params": params}, tokens, Coords(*batch[2:4]))[0]

    other = batch.tokens.copy()
    other[row, begin - 1] += 1
    is_heard = bool((hidden(other) != hidden(batch.tokens))[row, begin:].any())
    assert is_heard == (documents == "joined")
    assert is_heard == bool((batch.positions == np.arange(T)).all())
    assert is_heard == bool(batch.weights.all())


@every_task
def test_sources_are_mixed_by_weight(folder, name):
    cfg = config(folder, name)
    one = task(folder, name).corpus
    half = one.train.documents // 4 * 2
    begin = one.train.starts[half]
    parts = [
        Tokens(one.train.ids[:begin], one.train.starts[: half + 1]),
        Tokens(one.train.ids[begin:], one.train.starts[half:] - begin),
    ]
    mixed = cfg.objective.task(
        cfg, dataclasses.replace(one, mixture=((0.75, parts[0]), (0.25, parts[1])))
    )
    which, _ = mixed.loader.rhythm.take(np.arange(3 * B, 4 * B))
    assert np.bincount(which).tolist() == [6, 2]
    alone = [
        cfg.objective.task(cfg, dataclasses.replace(one, mixture=((1.0, part),))) for part in parts
    ]
    shown = mixed.loader.batch(3)
    for row, stream in enumerate(which):
        # Row 3 B + row is the nth of its stream, whose own first epoch is another task's.
        nth = mixed.loader.rhythm.take(np.array([3 * B + row]))[1]
        first = mixed.loader.epochs[stream].take(nth)
        kept = alone[stream].loader.rows[0].cut(first)
        if name == "classify":
            kept = kept._replace(targets=shown.targets[row : row + 1])
        for x, y in zip(leaves(shown), leaves(kept), strict=True):
            np.testing.assert_array_equal(x[row], y[0])


def test_texts_are_classified_by_the_ending_of_their_file(folder):
    made = task(folder, "classify")
    words = made.corpus.tokenizer
    assert made.labels == ["even", "odd"]
    texts = []
    for batch in (*(made.batch(step) for step in range(9)), *made.held()):
        assert batch.targets.shape == batch.weights.shape == (B,)
        for row in np.flatnonzero(batch.weights):
            text = words.decode(batch.tokens[row][batch.segments[row] > 0])
            number = int(text.split()[1])
            assert made.labels[batch.targets[row]] == ("odd" if number % 2 else "even")
            texts.append(number)
    assert set(texts) == set(range(80))


def test_a_model_of_another_number_of_classes_is_refused(folder):
    with pytest.raises(ConfigError, match=r"model.classes=3.*2 classes \('even', 'odd'\).*=2"):
        task(folder, "classify", model=dict(classes=3))


def test_pairs_without_answers_are_refused_by_name(folder, tmp_path):
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
    words, stream = corpus.tokenizer, corpus.train
    for n in range(0, stream.documents, 2):
        a, b, c = stream.starts[n : n + 3]
        text, label = words.decode(stream.ids[a:b]), words.decode(stream.ids[b:c])
        assert text.startswith(label)
        assert text.endswith("indeed")
    assert corpus.train.documents + corpus.held.documents == 120


def test_classes_without_files_are_refused(tmp_path):
    data = DataConfig(source=f"classes:{tmp_path}", cache=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="matches no file with an ending"):
        prepare(data, V, is_paired=True)


def test_masks_are_kept_free_of_the_tokenizers_words(folder):
    for name, row in dict(masked=Masked, span=Span).items():
        made = task(folder, name)
        assert made.corpus.tokenizer.vocab_size + row.reserved(made.cfg) <= V
    for row in (Causal, Prefix, Pairs, Classify):
        assert row.reserved(made.cfg) == 0
