"""The run file: what is accepted, what is refused, and in which words."""

import copy
import tomllib

import pytest

from hpcllm import config
from hpcllm.errors import MissingInput, UsageError

GOOD = {
    "run": {"output_dir": "runs/a"},
    "data": {"train": "corpus/train"},
    "model": {"task": "masked_lm", "config": {"model_type": "bert"}},
    "train": {
        "max_steps": 50,
        "global_batch_size": 12,
        "micro_batch_size": 2,
        "sequence_length": 64,
        "learning_rate": "1e-3",
    },
}


def load(*overrides):
    return config.load(copy.deepcopy(GOOD), overrides)


def test_a_learning_rate_written_as_1e_3_is_a_number():
    assert load().train.learning_rate == 1e-3


def test_overrides_have_toml_types_and_bare_words_are_strings():
    settings = load("train.max_steps=5", "run.output_dir=runs/b c", 'model.config={model_type="gpt2", n_layer=2}')
    assert settings.train.max_steps == 5
    assert settings.run.output_dir == "runs/b c"
    assert settings.model.config == {"model_type": "gpt2", "n_layer": 2}


def test_the_resolved_file_reads_back_as_itself():
    settings = load("checkpoint.keep=3")
    assert config.load(tomllib.loads(settings.toml())) == settings


def test_the_tokenizer_lies_beside_the_training_shards():
    assert load().data.tokenizer_dir == "corpus/tokenizer"


def test_shards_of_text_alone_are_left_out():
    assert load("data.quarantine=true").data.quarantine and not load().data.quarantine
    with pytest.raises(UsageError, match=r"data\.quarantine leaves out shards of text"):
        load("data.quarantine=true", "model.task=token_classification")


def test_rows_that_ranks_share_out_hold_no_documents_kept_apart():
    assert load("parallel.context=2").data.attention == "row"
    with pytest.raises(
        UsageError, match=r"parallel\.context \(2\) shares out rows, .* set context to 1 or attention to row"
    ):
        load("parallel.context=2", "data.attention=document")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lerning_rate=1", ['unknown key "lerning_rate"', 'did you mean "learning_rate"', "max_steps"]),
        ("trian.max_steps=1", ['unknown key "trian"', 'did you mean "train"']),
        ("train.max_steps=0", ["train.max_steps", "greater than or equal to 1", "0"]),
        ("train.max_steps=many", ["train.max_steps", "valid integer", "many"]),
        ("train.learning_rate=-1", ["train.learning_rate", "greater than 0"]),
        ("train.learning_rate=inf", ["train.learning_rate", "finite"]),
        ("train.warmup_steps=51", ["warmup_steps (51)", "max_steps (50)"]),
        ("train.micro_batch_size=5", ["global_batch_size (12)", "micro_batch_size (5)"]),
        ("data.attention=all", ["data.attention", "'row' or 'document'"]),
        ("train.precision=fp8", ["train.precision", "'fp32' or 'bf16'"]),
        ("model.init_from=a", ["model:", "either config", "or init_from"]),
        ("model.config={hidden_size=8}", ["model_type"]),
        ("parallel.context=5", ["parallel.context (5)", "10 chunks", "train.sequence_length (64)"]),
        ("parallel.pipeline_schedule=interleaved", ["stages_per_rank = 1", "2 or more"]),
        ("parallel.stages_per_rank=2", ['"1f1b"', "stages_per_rank = 2"]),
        ("parallel.pipeline_schedule=zero_bubble", ["zero_bubble", "pipeline of 2 ranks"]),
        ("parallel.offload=true", ["offload = true", 'sharding = "auto" has none', '"full"']),
        ("max_steps=3", ["section.key=value"]),
        ("train.max_steps", ["section.key=value"]),
        ("run.seed.deep=1", ["run.seed", "integer"]),
        ("train.max_steps=true", ["train.max_steps", "not true or false"]),
        ("train.max_steps=0x" + "f" * 5000, ["train.max_steps", "at most 63 bits", "a number of 20000 bits"]),
        ('train.max_steps="' + "9" * 30 + '"', ["train.max_steps", "at most 63 bits"]),
        ("run.seed=1\nrun.seed=2", ["run.seed", "integer"]),
        ("model.freeze.0=x", ["model.freeze", "list"]),
        ('run.output_dir="a\\nb"', ["run.output_dir", "no line breaks"]),
        ("run.output_dir=", ["run.output_dir", "not empty"]),
        ("run.output_dir=" + "a" * 300, ["run.output_dir", "each name in it 200"]),
        ("run.output_dir=a\udcff", ["is not UTF-8"]),
        ("model.config.day=1979-05-27", ["config.day", "a date"]),
        ("model.config.rate=inf", ["config.rate (inf)", "finite"]),
        ("model.config.size=0x" + "f" * 40, ["config.size", "64 bits"]),
    ],
)
def test_a_bad_key_or_value_is_named(override, words):
    with pytest.raises(UsageError) as refused:
        load(override)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[run\n", "is not TOML: .*line 1"),
        (b"\xff\xfe[\0r\0u\0n\0]\0", "is UTF-16, not text in UTF-8"),
        (b'[run]\noutput_dir = "\xe9"\n', "is not UTF-8: byte 0xe9 in line 2"),
        (b"[run]\nseed = 1\nseed = 2\n", "is not TOML: .*line 3"),
        (b"[run]\n[run]\n", "is not TOML: .*line 2"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"#" * (1 << 20) + b"\n", "is larger than 1 MiB"),
        (b"x = " + b"[" * 100_000, "is nested too deeply"),
        (b"x = " + b"[" * 40 + b"]" * 40, "is nested too deeply: more than 32 levels"),
        (b".".join([b"a"] * 5000) + b" = 1", "is nested too deeply"),
        (b"[run]\nseed = " + b"9" * 5000, "is not TOML"),
    ],
)
def test_a_file_that_is_no_run_file_says_why(tmp_path, content, says):
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(UsageError, match=rf"^run file {tmp_path}/run.toml {says}"):
        config.load(tmp_path / "run.toml")


def test_a_folder_and_a_device_without_end_are_no_run_files(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        config.load(tmp_path)
    with pytest.raises(UsageError, match="is larger than 1 MiB"):
        config.load("/dev/zero")


def test_a_missing_run_file_is_input_missing(tmp_path):
    with pytest.raises(MissingInput, match=r"nowhere.toml"):
        config.load(tmp_path / "nowhere.toml")


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + load().toml().encode())
    assert config.load(tmp_path / "run.toml") == load()


def test_accumulation_follows_from_batches_and_ranks():
    assert [load().train.accumulation(size) for size in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(UsageError, match=r"\(12\) is not divisible by micro_batch_size \(2\) x 4 ranks = 8"):
        load().train.accumulation(4)


def test_what_fsdp2_takes_away_cannot_be_put_off():
    with pytest.raises(UsageError, match='zero_bubble" goes with sharding = "none", not "full"'):
        load("parallel.pipeline=2", "parallel.pipeline_schedule=zero_bubble", "parallel.sharding=full")


def test_blocks_that_hold_more_than_arithmetic_are_not_compiled():
    with pytest.raises(UsageError, match=r"train\.compile goes with parallel\.tensor = 1, not 2"):
        load("train.compile=true", "parallel.tensor=2")
    with pytest.raises(UsageError, match=r'train\.compile goes with any .* but "zero_bubble"'):
        load("train.compile=true", "parallel.pipeline=2", "parallel.pipeline_schedule=zero_bubble")
