"""The schema of experiments: what is accepted, what is rejected, and the error messages."""

import concurrent.futures
import dataclasses
import json
import math
import pathlib
import sys
import typing

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from jaxgpt.config import (
    FORMER_DEFAULTS,
    RENAMED_SETTINGS,
    Config,
    ConfigError,
    MeshConfig,
    ModelConfig,
    SampleConfig,
    describe,
    from_json,
    list_differences,
    load,
    override,
    to_json,
)
from jaxgpt.config_files import importable_configs
from jaxgpt.sections import SparseConfig
from jaxgpt.settings import get, list_fields, list_types, resolve_table

ROOT = pathlib.Path(__file__).parent.parent
FIELDS, HINTS = list_fields(Config), list_types(Config)


def get_error(*assignments: str) -> str:
    with pytest.raises(ConfigError) as error:
        override(Config(), assignments)
    return str(error.value)


# --- overrides ---


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("model.width=768", 768),
        ("train.steps=2e3", 2000),
        ("optimizer.lr=3e-4", 3e-4),
        ("optimizer.clip=0", 0.0),
        ("model.embed_norm=true", True),
        ("model.tie=no", False),
        ("model.kv_heads=none", None),
        ("model.kv_heads=2", 2),
        ("sample.stop=END,###", ("END", "###")),
        ('sample.stop=["a, b", "\\n"]', ("a, b", "\n")),
        ("data.source=a=b/*.txt", "a=b/*.txt"),
        ("--optimizer.weight-decay=0", 0.0),
    ],
)
def test_a_setting_of_every_type_is_set_on_the_command_line(assignment, value):
    key = assignment.partition("=")[0].removeprefix("--").replace("-", "_")
    found = get(override(Config(), [assignment]), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model.bias", {"true": "all", "false": None, "none": None, "qkv": "qkv"}),
        ("model.qk_norm", {"true": "head", "false": None, "width": "width"}),
    ],
)
def test_a_setting_that_was_true_or_false_still_reads_these(key, values):
    name = key.partition(".")[2]
    for text, value in values.items():
        config = override(Config(), [f"{key}={text}"])
        assert get(config, key) == value
        old = json.loads(to_json(config))
        old["model"][name] = {"true": True, "false": False}.get(text, value)
        assert from_json(json.dumps(old)) == config


def test_an_override_changes_nothing_else():
    changed = override(Config(), ["model.width=768"])
    assert dataclasses.replace(changed, model=ModelConfig()) == Config()


def test_overrides_apply_all_at_once_so_that_only_the_result_must_be_valid():
    # 390 is not divisible by the 6 heads that the default has, nor is 384 by 5.
    sizes = override(Config(), ["model.width=390", "model.heads=5"]).model.sizes
    assert (sizes["D"], sizes["H"], sizes["K"]) == (390, 5, 78)


def test_the_last_of_two_overrides_of_a_key_wins():
    assert override(Config(), ["train.steps=500", "train.steps=700"]).train.steps == 700


def test_without_an_equals_sign_the_form_is_shown():
    assert get_error("model.width") == (
        "expected path=value, such as model.width=512; got 'model.width'."
    )


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("model.widht", "model.width"),
        ("modle.width", "model.width"),
        ("width", "model.width"),
        ("lr", "optimizer.lr"),
        ("optimiser.lr", "optimizer.lr"),
        ("batchs", "train.batch"),
        ("sede", "seed"),
    ],
)
def test_a_misspelled_or_shortened_key_suggests_the_right_one(key, suggestion):
    message = get_error(f"{key}=1")
    assert message.startswith(f"there is no setting {key!r}.")
    assert suggestion in message.partition("Did you mean ")[2].rstrip("?").split(" or ")


def test_a_leaf_of_two_sections_suggests_both():
    assert get_error("tokens=3").endswith("Did you mean sample.tokens?")
    assert get_error("nothing.seed=3").endswith("Did you mean seed or sample.seed?")


def test_a_key_unlike_any_other_refers_to_the_list_of_all():
    assert get_error("qqqqq=1").endswith("`jaxgpt train --help` lists all keys.")


@pytest.mark.parametrize(
    ("assignments", "parts"),
    [
        (["model.width=wide"], ["model.width='wide'", "whole number"]),
        (["model.width=2.5"], ["model.width=2.5", "whole number"]),
        (["optimizer.lr=fast"], ["optimizer.lr='fast'", "a number"]),
        (["optimizer.lr=nan"], ["optimizer.lr=nan"]),
        (["optimizer.lr=inf"], ["optimizer.lr=inf"]),
        (["model.tie=perhaps"], ["model.tie='perhaps'", "true or false"]),
        (["model.bias=perhaps"], ["model.bias='perhaps'", "all, attention, qkv"]),
        (
            ["model.bias=qkv", "model.mixers=gru", "model.position=none"],
            ["model.bias='qkv'", "gru"],
        ),
        (["optimizer.lr=0"], ["optimizer.lr=0.0", "more than 0"]),
        (["model.layers=0"], ["model.layers=0", "at least 1"]),
        (["sample.top_p=1.5"], ["sample.top_p=1.5", "at most 1"]),
        (["model.width=385"], ["model.width=385", "model.heads=6", "384 or 390"]),
        (["model.width=4"], ["model.width=4", "model.heads=6", "model.width=6,"]),
        (["model.kv_heads=4"], ["model.kv_heads=4", "model.heads=6", "[1, 2, 3, 6]"]),
        (["model.kv_heads=12"], ["model.kv_heads=12", "model.heads=6"]),
        (["model.width=390"], ["'rope'", "65", "model.head_width"]),
        (["model.head_width=63"], ["'rope'", "63"]),
        (["model.position=sinusoidal", "model.width=9", "model.heads=3"], ["model.width", "9"]),
        (["model.unroll=4"], ["model.unroll=4", "model.layers=6"]),
        (["model.norm=rsm"], ["model.norm='rsm'", "'rms'", "layer, rms"]),
        (["optimizer.name=adam_w"], ["optimizer.name='adam_w'", "'adamw'"]),
        (["train.objective=casual"], ["train.objective='casual'", "'causal'"]),
        (["model.vocab=259"], ["model.vocab=259", "260"]),
        (["model.vocab=100", "data.tokenizer=bytes"], ["model.vocab=100", "260"]),
        (["optimizer.warmup=300", "train.steps=200"], ["300", "200", "optimizer.warmup=20"]),
        (["train.batch=10", "train.accumulate=4"], ["10", "4", "train.batch=8 or 12"]),
        (["train.batch=2", "train.accumulate=4"], ["train.batch=4."]),
        (["mesh.data=0"], ["mesh.data=0", "at least 1"]),
        (["mesh.fsdp=-2"], ["mesh.fsdp=-2", "at least -1"]),
        (["mesh.fsdp=-1"], ["mesh.data and mesh.fsdp are both -1"]),
        (["name=a/b"], ["name='a/b'", "folder name"]),
        (["name=.."], ["name='..'"]),
        (["name="], ["name=''"]),
        (['sample.stop=["a",""]'], ["sample.stop", "empty"]),
    ],
)
def test_invalid_settings_are_rejected_with_key_value_and_remedy(assignments, parts):
    message = get_error(*assignments)
    assert [part for part in parts if part not in message] == []


UPPER_BOUNDS = {
    "seed": 2**63 - 1,
    "sample.seed": 2**63 - 1,
    "model.rope.share": 1.0,
    "model.dropout": 0.99,
    "model.attention_dropout": 0.99,
    "data.holdout": 0.5,
    "optimizer.b1": 0.99999,
    "optimizer.b2": 0.99999,
    "optimizer.floor": 1.0,
    "optimizer.decay_share": 1.0,
    "train.mask_rate": 0.9,
    "train.label_smoothing": 0.99,
    "lora.dropout": 0.99,
    "sample.top_p": 1.0,
    "sample.min_p": 1.0,
    "preference.label_smoothing": 0.49,
    "distill.weight": 1.0,
}


@pytest.mark.parametrize("key", UPPER_BOUNDS)
def test_a_setting_is_valid_up_to_its_upper_bound(key):
    bound = UPPER_BOUNDS[key]
    assert get(override(Config(), [f"{key}={bound}"]), key) == bound
    beyond = bound + (1 if isinstance(bound, int) else 1e-6)
    assert f"{key}={beyond}" in get_error(f"{key}={beyond}")


def test_every_upper_bound_is_tested():
    assert {key for key, f in FIELDS.items() if f.metadata["high"] is not None} == set(UPPER_BOUNDS)


def test_an_odd_head_width_is_valid_without_rope():
    model = ModelConfig(width=15, heads=5, position="learned")
    assert model.sizes["K"] == 3


def test_an_explicit_head_width_leaves_the_width_free():
    assert ModelConfig(width=100, heads=6, head_width=32).sizes["K"] == 32


def test_a_tokenizer_file_may_have_fewer_tokens_than_bytes():
    assert override(Config(), ["data.tokenizer=x.json", "model.vocab=100"]).model.vocab == 100


def test_one_mesh_axis_may_take_the_remaining_devices():
    assert MeshConfig(data=2, fsdp=-1).fsdp == -1


def test_kv_heads_none_means_one_per_query_head():
    assert ModelConfig().sizes["G"] == ModelConfig().heads


# --- the schema ---


@pytest.mark.parametrize("key", [key for key, f in FIELDS.items() if f.metadata["table"]])
def test_a_table_resolves_and_has_the_default(key):
    default, table = FIELDS[key].default, resolve_table(FIELDS[key].metadata["table"])
    for name in default if isinstance(default, tuple) else (default,):
        assert name in table or name is None


def test_every_section_name_is_its_field_name_in_config():
    for f in dataclasses.fields(Config):
        if dataclasses.is_dataclass(value := getattr(Config(), f.name)):
            assert value.section == f.name


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().name = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.width = 3


def test_configs_are_hashable_so_that_they_can_be_static_arguments_of_jit():
    assert hash(Config()) == hash(override(Config(), ["model.width=384"]))


def test_describe_lists_every_key_with_its_default_and_meaning():
    text = describe()
    assert [key for key in FIELDS if f"  {key}=" not in text] == []
    assert [key for key, f in FIELDS.items() if f.metadata["doc"] not in text] == []
    assert "model.kv_heads=none" in text
    assert "learned" in text  # the choices of a table


def test_describe_of_a_section_lists_only_its_keys():
    lines = describe("sample").splitlines()
    keys = [line.split("=")[0].strip() for line in lines if "=" in line]  # not lines of choices
    assert keys == [f"sample.{f.name}" for f in dataclasses.fields(SampleConfig)]


# --- files ---


def test_every_config_file_loads(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = [path.stem for path in sorted(ROOT.glob("configs/*.py")) if path.stem != "__init__"]
    assert "gpt_mini" in names
    for name in names:
        assert isinstance(load(name), Config), name


def test_a_config_file_is_found_by_path_and_by_bare_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = ["configs/gpt_mini.py", "configs/gpt_mini", "gpt_mini.py", "gpt_mini"]
    assert {load(path).name for path in names} == {"gpt_mini"}


def test_a_path_that_does_not_exist_is_not_resolved_to_another_file_of_that_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"--config elsewhere/gpt_mini\.py: no such file"):
        load("elsewhere/gpt_mini.py")


def test_a_misspelled_config_file_suggests_the_nearest(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"Did you mean gpt_mini .*--help"):
        load("configs/gpt_mni.py")


def test_config_files_of_two_threads_run_one_after_the_other(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / "configs").mkdir(parents=True)
        (tmp_path / name / "configs" / "sizes.py").write_text(f"NAME = {name!r}\n")
        (tmp_path / name / "configs" / "mine.py").write_text(
            "from jaxgpt.config import Config\nfrom configs.sizes import NAME\n"
            "config = Config(name=NAME)\n"
        )
    paths = {name: str(tmp_path / name / "configs" / "mine.py") for name in ("one", "other")}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with importable_configs(paths["one"]):
            import configs.sizes

            waiting = pool.submit(load, paths["other"])
            assert concurrent.futures.wait([waiting], timeout=0.5).not_done
            assert sys.modules["configs.sizes"] is configs.sizes
            assert load(paths["one"]).name == "one"  # the same thread does not wait
        assert waiting.result(timeout=60).name == "other"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        names = ["one", "other"] * 20
        assert [found.name for found in pool.map(load, [paths[name] for name in names])] == names


def test_load_applies_assignments(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from jaxgpt.config import Config\nconfig = Config(name='mine')\n")
    config = load(str(path), ["train.steps=300"])
    assert (config.name, config.train.steps) == ("mine", 300)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("config = (", "SyntaxError"),
        ("import nosuchmodule", "ModuleNotFoundError"),
        ("x = 1", "must define `config = Config(...)`; its `config` is a NoneType"),
        ("config = {}", "its `config` is a dict"),
        (
            "from jaxgpt.config import *\nconfig = Config(model=ModelConfig(width=385))",
            "model.width=385",
        ),
    ],
)
def test_a_config_file_that_fails_is_rejected_with_the_reason(tmp_path, content, expected):
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        load(str(path))
    assert expected in str(error.value)


# --- saving ---


def texts(key: str):
    """Return a strategy for valid values of a key, as command-line strings."""
    f, kind = FIELDS[key], HINTS[key]
    args = [a for a in typing.get_args(kind) if a not in (type(None), Ellipsis)]
    low, high, above = (f.metadata[k] for k in ("low", "high", "above"))
    low = low if low is not None else above
    if f.metadata["table"]:
        return st.sampled_from(sorted(resolve_table(f.metadata["table"])))
    if bool in (kind, *args):
        return st.sampled_from(["true", "false"])
    if kind is str:
        return st.text()
    if kind == tuple[str, ...]:
        return st.lists(st.text(min_size=1), max_size=3).map(json.dumps)
    if int in (kind, *args):
        return st.integers(low or 0, 10_000).map(str)
    assert float in (kind, *args)
    return st.floats(low or 0, high if high is not None else 1e6, exclude_min=above == 0).map(str)


assignments = st.lists(
    st.sampled_from(sorted(FIELDS)).flatmap(
        lambda key: texts(key).map(lambda text: f"{key}={text}")
    ),
    max_size=5,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.filter_too_much], deadline=None)
@given(assignments)
def test_json_gives_back_the_config_that_was_saved(given):
    try:
        config = override(Config(), given)
    except ConfigError:  # two incompatible values
        reject()
    assert from_json(to_json(config)) == config


def test_an_unknown_key_in_a_saved_config_names_file_and_key():
    tree = json.loads(to_json(Config()))
    tree["model"]["widht"] = 3
    with pytest.raises(ConfigError) as error:
        from_json(json.dumps(tree), "runs/a/config.json")
    assert str(error.value).startswith("runs/a/config.json: there is no setting 'model.widht'.")
    assert "model.width" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "3", "[]", "null", '"x"', '{"model": 3}'])
def test_a_file_that_is_not_a_config_is_rejected_by_name(text):
    with pytest.raises(ConfigError, match=r"^runs/a/config\.json"):
        from_json(text, "runs/a/config.json")


def test_a_saved_config_without_a_newer_key_uses_its_default():
    tree = json.loads(to_json(override(Config(), ["model.width=768"])))
    del tree["model"]["norm_eps"]
    config = from_json(json.dumps(tree))
    assert math.isclose(config.model.norm_eps, 1e-5)
    assert config.model.width == 768


# --- renamed settings ---


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("train.noise=0.3", "train.mask_rate=0.3"),
        ("--train.noise=0.3", "train.mask_rate=0.3"),
        ("model.documents=apart", "model.documents=separate"),
        ("model.documents=joined", "model.documents=joined"),
    ],
)
def test_an_old_setting_on_the_command_line_means_its_new_one(old, new):
    assert override(Config(), [old]) == override(Config(), [new])


def test_an_old_setting_in_a_saved_config_means_its_new_one():
    new = override(Config(), ["train.mask_rate=0.3"])
    tree = json.loads(to_json(new))
    tree["train"]["noise"] = tree["train"].pop("mask_rate")
    tree["model"]["documents"] = "apart"
    assert from_json(json.dumps(tree)) == new


def test_every_renamed_setting_leads_to_a_present_one():
    for old, new in RENAMED_SETTINGS.items():
        key, _, value = new.partition("=")
        assert key in FIELDS
        assert not value or value in resolve_table(FIELDS[key].metadata["table"])
        assert old.partition("=")[0] not in FIELDS or value


# --- differences ---


def test_a_config_has_no_differences_from_itself():
    assert list_differences(Config(), Config()) == []


def test_differences_name_the_key_and_both_values():
    new = override(Config(), ["model.width=768", "optimizer.lr=0.5"])
    assert list_differences(Config(), new) == [
        "model.width: 384 -> 768",
        "optimizer.lr: 0.001 -> 0.5",
    ]


def test_differences_ignore_settings_that_do_not_change_what_is_learned():
    runtime_settings = [
        "folder=elsewhere",
        "resume=force",
        "model.remat=full",
        "mesh.fsdp=2",
        "train.log_every=3",
        "sample.temperature=0",
        "train.loss_chunk=8",
    ]
    assert list_differences(Config(), override(Config(), runtime_settings)) == []


def test_a_setting_that_follows_from_others_differs_by_its_value_in_effect():
    old = override(Config(), ["model.embed_scale=false"])  # what older run folders say
    assert list_differences(old, Config()) == []
    sinusoidal = ["model.position=sinusoidal", "model.width=64", "model.heads=4"]
    t5 = override(Config(), ["model.position=t5"])
    assert list_differences(Config(), override(Config(), ["optimizer.logit_lr=1"])) == []
    assert list_differences(override(t5, ["optimizer.logit_lr=1"]), t5) == [
        "optimizer.logit_lr: 1.0 -> 10.0"
    ]
    assert list_differences(override(old, sinusoidal), override(Config(), sinusoidal)) == [
        "model.embed_scale: False -> True",
        "model.embed_std: 0.02 -> 0.125",
    ]


def test_a_saved_config_from_before_a_setting_keeps_its_meaning():
    tree = json.loads(to_json(override(Config(), ["model.position=sinusoidal"])))
    assert from_json(json.dumps(tree)).model.has_embed_scale
    del tree["model"]["embed_scale"]
    assert not from_json(json.dumps(tree)).model.has_embed_scale
    del tree["optimizer"]["logit_lr"]
    assert from_json(json.dumps(tree)).optimizer.logit_lr == 1


def test_a_saved_config_with_settings_without_effect_is_read_without_them():
    tree = json.loads(to_json(override(Config(), ["model.layers=2", "model.pattern=window"])))
    tree["model"]["sparse"] |= {"window": 16, "block": 8}
    tree["model"]["rope"]["theta"] = [1e4, 1e5, 1e6]
    tree["model"]["position"] = ["rope", "none", "none"]
    model = from_json(json.dumps(tree)).model
    assert model.sparse == SparseConfig(window=16)
    assert model.rope.theta == (1e4, 1e5)
    assert model.position == ("rope", "none")


def test_every_former_default_is_of_a_present_setting():
    for key, value in FORMER_DEFAULTS.items():
        assert get(override(Config(), [f"{key}={value}"]), key) == value
