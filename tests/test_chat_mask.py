"""Which tokens of a conversation are learned, and the rows that conversations become."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat import ENDS, SOURCES, make
from test_data_sources import make_builder_class
from tiny_runs import config

from jaxgpt.data import prepare
from jaxgpt.data.chat import ChatTask, OnlineTask, PreferenceTask
from jaxgpt.data.conversations import (
    PreferenceEncoder,
    PromptEncoder,
    RecordEncoder,
    drop_turns,
    read_conversation,
    read_preference,
    take_flags,
)
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import make_byte_tokenizer
from jaxgpt.tokenizer.chat_mask import mark_answers, show_learned, spell
from jaxgpt.tokenizer.chat_templates import TEMPLATES

UNMARKED = {f"unmarked {name}": source for name, source in SOURCES.items()}
TEXT = st.lists(
    st.sampled_from(["a", " b", "\n", "  ", "1+1", "é", "🙂", "<|im_end|>", "</s>", "[INST]", "."]),
    max_size=6,
).map("".join)


def make_messages(texts):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def expect(name: str, text: str) -> str:
    """Return what the assistant's text is learned as."""
    kind = name.removeprefix("unmarked ")
    before = " " if kind == "mistral" else ""
    text = text if kind in ("chatml", "plain") else text.strip()
    return before + text + ENDS[kind]


@pytest.mark.parametrize("name", [*TEMPLATES, *UNMARKED])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(TEXT, min_size=2, max_size=7), system=st.booleans())
def test_what_is_learned_is_the_assistants_texts_and_end_tokens(name, texts, system):
    tokenizer = make("gpt2", {**TEMPLATES, **UNMARKED}[name])
    messages = make_messages(texts)
    if system and name not in ("unmarked mistral", "unmarked gemma"):
        messages = [{"role": "system", "content": "Be short."}, *messages]
    chat = mark_answers(tokenizer, messages)
    expected = "".join(expect(name, text) for text in texts[1::2])
    assert spell(tokenizer, chat.ids[chat.is_generated]) == expected
    # The whole text is the one that the template writes, however it is divided.
    assert spell(tokenizer, chat.ids) == chat.text


def test_a_prompt_has_the_tokens_that_stood_before_the_answer_in_training():
    tokenizer = make("gpt2", TEMPLATES["plain"])
    messages = make_messages(["Hi", "the answer", "Bye", "a night"])
    chat = mark_answers(tokenizer, messages)
    assert tokenizer.encode(" the").size == 1  # a token across the border, which is not taken
    for count in (1, 3):
        prompt = tokenizer.encode_chat(messages[:count], add_generation_prompt=True)
        assert prompt.tolist() == chat.ids[: prompt.size].tolist()
        assert chat.is_generated[prompt.size]


FORGETFUL = """{% for m in messages %}{{- '<|im_start|>' + m.role + '\n' -}}
{%- if loop.last or m.role == 'user' -%}{{- m.content -}}{%- endif -%}
{{- '<|im_end|>\n' -}}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
ENDLESS = """{% for m in messages %}{{- m.role + ': ' }}{%- if m.role == 'assistant' -%}
{%- generation -%}{{- m.content -}}{%- endgeneration -%}{%- else -%}{{- m.content -}}{%- endif -%}
{{- '<|im_end|>' -}}{% endfor %}"""


def test_a_template_that_is_not_prefix_stable_is_refused_and_a_marked_one_offered():
    tokenizer = make("gpt2", FORGETFUL)
    with pytest.raises(ConfigError, match=r"not prefix-stable.*data\.chat_template=chatml or"):
        mark_answers(tokenizer, make_messages(["a", "b", "c", "d"]))


def test_a_template_whose_end_token_is_not_learned_is_refused():
    with pytest.raises(ConfigError, match="would never learn to stop"):
        RecordEncoder(64, ENDLESS).resolve(None).adapt(make("gpt2", ENDLESS))


def test_the_end_of_an_answer_ends_generated_texts_too():
    before = make("gpt2", "")
    tokenizer = RecordEncoder(64, "chatml").resolve(before).adapt(before)
    assert tokenizer.ends == (before.eos, before.special_ids["<|im_end|>"])
    assert tokenizer.fingerprint == before.fingerprint
    assert tokenizer.chat_template == TEMPLATES["chatml"]


def test_an_example_shows_what_is_learned():
    tokenizer = make("gpt2", TEMPLATES["chatml"])
    chat = mark_answers(tokenizer, make_messages(["a", "b"]))
    shown = show_learned(tokenizer, chat.ids, chat.is_generated)
    assert shown == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n")


def test_whole_turns_leave_from_the_front_and_the_system_message_stays():
    messages = [{"role": "system", "content": "s"}, *make_messages("abcdef")]
    left = ["".join(m["content"] for m in kept) for kept in drop_turns(messages)]
    assert left == ["sabcdef", "scdef", "sef"]


# --- records to rows ---


def write(folder, name, records):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def make_task(folder, kind, records, *assignments, holdout=0.3):
    source = write(folder, f"{kind.__name__}.jsonl", records)
    objective = {ChatTask: "chat", PreferenceTask: "preference", OnlineTask: "online"}[kind]
    cfg = config(
        f"data.source={source}", "data.tokenizer=bytes", "data.chat_template=plain",
        "model.context=64", "train.batch=4", f"data.cache={folder / 'cache'}",
        f"data.holdout={holdout}", f"train.objective={objective}", "online.reward=exact",
        *assignments,
    )  # fmt: skip
    encoder = cfg.objective.task.make_encoder(cfg)
    corpus = prepare(cfg.data, cfg.tokenizer_vocab, log=lambda line: None, encoder=encoder)
    return kind(cfg, corpus)


CONVERSATIONS = [
    {"messages": make_messages([f"q{n}", f"a{n}", *(["again", "yes"] if n % 3 == 0 else [])])}
    for n in range(20)
]


def list_documents(tokenizer, batch):
    """Return (tokens, positions, weights) of every document of a batch as text and tuples."""
    found = []
    for row in range(len(batch.tokens)):
        for number in range(1, batch.segment_ids[row].max() + 1):
            is_own = batch.segment_ids[row] == number
            ids = batch.tokens[row][is_own]
            learned = batch.targets[row][is_own][batch.weights[row][is_own] > 0]
            assert batch.positions[row][is_own].tolist() == list(range(ids.size))
            found.append((spell(tokenizer, ids), spell(tokenizer, learned)))
    return found


def test_packed_conversations_are_those_of_one_a_row(tmp_path):
    alone = make_task(tmp_path, ChatTask, CONVERSATIONS)
    packed = make_task(tmp_path, ChatTask, CONVERSATIONS, "data.packing=documents")
    tokenizer, (one, few) = alone.corpus.tokenizer, (t.loader.rows[0] for t in (alone, packed))
    assert few.size < one.size
    documents = [
        list_documents(tokenizer, rows.gather(np.arange(rows.size))) for rows in (one, few)
    ]
    assert sorted(documents[0]) == sorted(documents[1])
    for text, learned in documents[0]:
        answers = [part.partition("<eos>")[0] for part in text.split("assistant: ")[1:]]
        assert learned == "".join(f"{answer}<eos>" for answer in answers)


def save_as_data_set(kind, folder, monkeypatch):
    """Save the conversations as a data set of a library, and return its data.source."""
    conversations = [record["messages"] for record in CONVERSATIONS]
    if kind == "tfds":
        import tensorflow_datasets as tfds

        monkeypatch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        monkeypatch.setattr("jaxgpt.data.tfds.find_spec", lambda name: None)
        text = tfds.features.Text()
        feature = tfds.features.Sequence({"role": text, "content": text})
        splits = {"train": conversations}
        make_builder_class("conversations", splits, key="messages", feature=feature)
        return "tfds:conversations"
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    named = [{**conversations[0][0], "name": "x"}, *conversations[0][1:]]  # others lack the field
    rows = datasets.Dataset.from_list([
        {"id": number, "messages": messages}
        for number, messages in enumerate([named, *conversations[1:]])
    ])  # fmt: skip
    if kind == "saved":
        rows.save_to_disk(folder / "rows")
    else:
        rows.to_parquet(folder / "rows" / "train.parquet")
    return f"hf:{folder / 'rows'}"


@pytest.mark.parametrize("kind", ["saved", "parquet", "tfds"])
def test_a_data_set_of_conversations_has_the_rows_of_a_file_of_them(tmp_path, monkeypatch, kind):
    tasks = [
        make_task(tmp_path, ChatTask, CONVERSATIONS, *source)
        for source in ([], [f"data.source={save_as_data_set(kind, tmp_path, monkeypatch)}"])
    ]
    expected, found = (
        sorted(
            document
            for rows in (task.loader.rows[0], task.held_out_rows)
            for document in list_documents(task.corpus.tokenizer, rows.gather(np.arange(rows.size)))
        )
        for task in tasks
    )
    assert len(expected) == len(CONVERSATIONS)
    assert found == expected


def test_a_null_field_of_a_message_is_one_that_it_lacks():
    record = {"messages": [
        {"role": "user", "content": "a", "name": None, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [1]},
    ]}  # fmt: skip
    assert read_conversation(record) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [1]},
    ]


def test_padding_is_what_no_document_covers_and_the_end_token_counts_though_it_is_the_pad(tmp_path):
    task = make_task(tmp_path, ChatTask, CONVERSATIONS)
    tokenizer = task.corpus.tokenizer
    tokenizer.pad = tokenizer.eos  # as where a tokenizer has no padding token
    rows = task.make_rows(task.corpus.train)
    batch = rows.gather(np.arange(rows.size))
    is_end = (batch.targets == tokenizer.eos) & (batch.weights > 0)
    assert is_end.sum() == sum(
        text.count("assistant: ") for text, _ in list_documents(tokenizer, batch)
    )
    assert not batch.weights[batch.segment_ids == 0].any()
    assert (batch.tokens[batch.segment_ids == 0] == tokenizer.eos).all()


def test_what_does_not_fit_loses_turns_or_is_left_out_and_is_counted(tmp_path):
    long = [{"messages": make_messages(["x" * 30, "y", "z", f"{n}"])} for n in range(10)]
    hopeless = [{"messages": make_messages(["x" * 60, f"{n}"])} for n in range(10)]
    task = make_task(tmp_path, ChatTask, [*CONVERSATIONS, *long, *hopeless, {"messages": [
        {"role": "user", "content": "?"}]}])  # fmt: skip
    assert "10 conversations lost turns" in task.note
    assert "10 are longer than model.context" in task.note
    assert "1 have no answer" in task.note
    assert task.corpus.train.documents + task.corpus.held_out.documents == 30
    assert "[[" in task.example


def test_a_corpus_without_a_learned_token_is_refused(tmp_path):
    records = [{"messages": [{"role": "user", "content": f"{n}"}]} for n in range(20)]
    with pytest.raises(ConfigError, match=r"nothing to learn.*have no answer"):
        make_task(tmp_path, ChatTask, records)


@pytest.mark.parametrize("record", [
    {"text": "a"}, {"messages": []}, {"messages": [{"content": "a"}]}, {"messages": "a"},
    {"prompt": "a"}, {"prompt": "a", "completion": 3},
])  # fmt: skip
def test_a_record_of_another_form_is_refused_by_its_line(tmp_path, record):
    with pytest.raises(ConfigError, match=r"ChatTask.jsonl:21: "):
        make_task(tmp_path, ChatTask, [*CONVERSATIONS, record])


def test_a_text_file_is_no_source_of_conversations(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {n}\n" for n in range(30)))
    with pytest.raises(ConfigError, match="is no record"):
        make_task(tmp_path, ChatTask, [], f"data.source={tmp_path / 'a.txt'}", "data.separator=\\n")


PAIRS = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": "bad"} for n in range(20)]


def test_a_pair_is_two_documents_of_one_row_that_begin_with_the_same_prompt(tmp_path):
    task = make_task(tmp_path, PreferenceTask, PAIRS)
    rows = task.held_out_rows
    documents = list_documents(task.corpus.tokenizer, rows.gather(np.arange(rows.size)))
    assert len(documents) == 2 * rows.size > 0
    for (chosen, good), (rejected, bad) in zip(documents[::2], documents[1::2], strict=True):
        prompt = chosen.partition("assistant: ")[0]
        assert rejected.startswith(prompt)
        assert (good.startswith("good"), bad) == (True, "bad<eos>")


def test_preferences_are_read_in_every_form():
    user, good, bad = ({"role": r, "content": c} for r, c in
                       [("user", "q"), ("assistant", "x"), ("assistant", "y")])  # fmt: skip
    expected = [user], [good], [bad]
    for record in (
        {"prompt": "q", "chosen": "x", "rejected": "y"},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "q", "chosen": [user, good], "rejected": [user, bad]},
        {"messages": [user], "chosen": "x", "rejected": "y"},
    ):
        assert read_preference(record) == expected
    for record in ({"prompt": "q", "chosen": "x"}, {"chosen": [user], "rejected": [user]},
                   {"chosen": "x", "rejected": "y"}):  # fmt: skip
        with pytest.raises(ConfigError):
            read_preference(record)


def test_a_prompt_keeps_its_record_for_the_reward(tmp_path):
    records = [{"prompt": f"{n}+1", "answer": n + 1, "note": "é"} for n in range(20)]
    task = make_task(tmp_path, OnlineTask, records)
    found = task.read_prompts(task.make_batch(0))
    assert len(found) == 4
    for ids, record in found:
        text = spell(task.corpus.tokenizer, ids)
        assert text.endswith(f"user: {record['prompt']}\n\nassistant: ")
        assert record["note"] == "é"


def test_encoders_of_other_kinds_or_contexts_have_files_of_their_own():
    facts = [kind(T, "plain").facts for kind in (RecordEncoder, PreferenceEncoder, PromptEncoder)
             for T in (8, 9)]  # fmt: skip
    assert len({json.dumps(x) for x in facts}) == 6


def test_tokens_to_learn_have_a_flag_that_is_no_part_of_their_id():
    tokenizer = RecordEncoder(64, "plain").resolve(None).adapt(make_byte_tokenizer())
    counts = Counter()
    record = json.dumps(CONVERSATIONS[0]).encode()
    (ids,) = RecordEncoder(64, "plain").encode(tokenizer, "x", record, counts)
    plain, is_learned = take_flags(ids)
    assert counts == {"learned": int(is_learned.sum()), "shortened": 0}
    assert plain.max() < tokenizer.vocab_size
    assert spell(tokenizer, plain[is_learned]) == "a0<eos>yes<eos>"
