"""Whatever becomes of a file, it ends in a sentence or in exactly what was written. Cases are the same every time;
`python -m tests.faults.bad_input --fuzz N` tries others."""

import copy
import datetime
import json
import time

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hpcllm import blocks, config, files
from hpcllm.data import shards
from hpcllm.errors import Refusal
from tests.faults import fuzz
from tests.faults.rows import RUN

PLACE = st.integers(0, fuzz._PLACES - 1)
EDIT = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACE),
    st.tuples(st.just("drop"), PLACE, st.integers(1, 64)),
    st.tuples(st.just("put"), PLACE, st.sampled_from(fuzz.SNIPPETS) | st.text("\0\n\"'[]{}=,.#-09aeE\xff", max_size=6)),
    st.tuples(st.just("copy"), PLACE, PLACE, st.integers(1, 200)),
)
EDITS = st.lists(EDIT, min_size=1, max_size=4)


def cases(count, **more):
    """The same cases every time, however long they take."""
    how = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=count, **how, **more)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def good_run(base):
    values = copy.deepcopy(RUN)
    values["run"]["output_dir"], values["data"] = "runs/a", {"train": "data/train"}
    return config.load(values).toml().encode()


@cases(250)
@given(edits=EDITS)
def test_bytes_of_a_run_file(base, good_run, edits):
    assert fuzz.run_file(base / "run.toml", good_run, edits) in fuzz.GOOD


NUMBERS = st.integers() | st.integers(-(2**80), 2**80) | st.floats() | st.booleans()
TIMES = st.sampled_from([datetime.date(1979, 5, 27), datetime.time(7, 32), datetime.datetime(1979, 5, 27)])
VALUES = st.recursive(
    NUMBERS | TIMES | st.text(max_size=8) | st.sampled_from(["auto", "none", "mpi", "full", "fp32", "1e-5", "10:00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
SECTIONS = {name: field.annotation for name, field in config.Config.model_fields.items()} | {"lora": config.Lora}
KEYS = [(name, key) for name, section in SECTIONS.items() for key in (*section.model_fields, "x")]


@cases(400)
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=2), some=VALUES)
def test_values_of_a_run_file(changes, some):
    values = copy.deepcopy(RUN)
    values["run"]["output_dir"], values["data"] = "a/b", {"train": "a/b"}
    for (part, key), value in changes:
        values.setdefault(part, {})[key] = value
    if isinstance(values["model"].get("config"), dict):
        values["model"]["config"] |= {"model_type": "bert", "some": some}
    try:
        taken = config.load(values)
    except Refusal as refused:
        assert len(str(refused)) > 10
    else:
        assert config.load(config.run_file.parse(taken.toml(), "again")) == taken
        json.dumps(taken.model_dump(), allow_nan=False)  # as a checkpoint keeps it


@cases(150)
@given(word=st.text(max_size=20) | st.builds("train.{}={}".format, st.sampled_from(["max_steps", "x"]), st.text()))
def test_words_of_a_command_line(good_run, word):
    try:
        config.load(config.run_file.parse(good_run.decode(), "good"), [word])
    except Refusal as refused:
        assert len(str(refused)) > 10


# --- data --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(base):
    import numpy as np

    from tests.data.small_inputs import write_shards

    ids = np.random.default_rng(3).integers(0, 1000, 3000)
    return write_shards(base / "written", [[ids[:1000], ids[1000:1500]], [ids[1500:1600]], [ids[1600:]]])


@cases(120)
@given(edits=EDITS, fits=st.booleans())
def test_bytes_of_a_manifest(folder, edits, fits):
    assert fuzz.manifest(folder, tokens(folder), edits, fits) in fuzz.GOOD


FIELD = st.sampled_from(["shards", "token_count", "vocab_size", "dtype", "labelled", "highest_id", "separator_id", "x"])
OF_SHARD = st.sampled_from(
    ["name", "size_bytes", "token_count", "tokens_offset", "tokens_bytes", "sha256", "highest_id"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 5000) | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)


@cases(150)
@given(field=FIELD | st.tuples(st.integers(0, 2), OF_SHARD), value=JSON)
def test_values_of_a_manifest_that_fits_its_digest(folder, field, value):
    said = json.loads((folder / shards.MANIFEST).read_text())
    if isinstance(field, tuple):
        said["shards"][field[0]][field[1]] = value
    else:
        said[field] = value
    path = folder / shards.MANIFEST
    content = path.read_bytes()
    try:
        path.write_text(json.dumps(said | {"digest": fuzz.digest(said)}))
        assert fuzz.outcome(lambda: (fuzz.all_tokens(folder) == tokens(folder)).all()) in fuzz.GOOD
    finally:
        path.write_bytes(content)


def tokens(folder, known={}):  # noqa: B006 (read once)
    if folder not in known:
        known[folder] = fuzz.all_tokens(folder)
    return known[folder]


@pytest.fixture(scope="module")
def apart(folder, base):
    return fuzz.shards_to_spoil(folder, base)


@pytest.mark.parametrize("fits", [False, True])
@cases(4, phases=[Phase.generate])  # each takes a process: too long to look for the smallest that fails
@given(data=st.data())
def test_bytes_of_a_shard(apart, fits, data):
    names = st.sampled_from([shards.name(number) for number in range(3)])
    flips = st.lists(st.tuples(st.just("flip"), PLACE, st.integers(0, 7)), min_size=1, max_size=3)
    tried = data.draw(
        st.lists(st.tuples(names, flips if fits else flips | EDITS, st.just(fits)), min_size=40, max_size=40)
    )
    found = fuzz.in_a_process(apart, tried)
    assert len(found) == len(tried) and not [one for one in found if one not in fuzz.GOOD]


# --- what a run leaves -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(base):
    """A run's folder with a checkpoint, as `hpcllm.checkpoint` writes one, and its records."""
    run = base / "run"
    saved = run / "checkpoint-4"
    saved.mkdir(parents=True)
    (saved / "config.json").write_text('{"model_type": "bert"}')
    files.write_json(saved / "trainer_state.json", {"step": 4, "samples": 16, "best": None, "config": RUN})
    for name in ("model.safetensors", "optimizer.safetensors"):
        (saved / name).write_bytes(bytes(range(256)) * 20)
    listed = {}
    for path in sorted(saved.iterdir()):
        made = list(blocks.digests(path).values())
        told = made if path.suffix == ".safetensors" else files.digest(path)
        listed[path.name] = {"bytes": path.stat().st_size, "sha256": told}
    files.write_json(saved / ".complete", {"block_bytes": blocks.BLOCK_BYTES, "files": listed})
    now = time.time()
    events = [
        {"event": "start", "step": 0, "ranks": 2, "hosts": ["n1"], "job": "1", "max_steps": 4, "restart": 0},
        {"event": "checkpoint", "step": 2, "path": "run/checkpoint-2", "seconds": 0.5, "restart": 0},
        {"event": "end", "step": 4, "restart": 0},
    ]
    step = {
        "loss": 5.0,
        "learning_rate": 1e-3,
        "step_s": 0.5,
        "tokens_per_s": 10.0,
        "mfu": 0.1,
        "memory_bytes": 1 << 30,
    }
    steps = [{"step": number, **step, "useful_s": 0.5 * number, "restart": 0} for number in range(1, 5)]
    steps.append({"step": 4, "eval_loss": 4.0, "restart": 0})
    for name, told in (("events.jsonl", events), ("metrics.jsonl", steps)):
        (run / name).write_text("".join(json.dumps(record | {"time": now}) + "\n" for record in told))
    return run


@pytest.mark.parametrize(
    "name", [".complete", "config.json", "model.safetensors", "optimizer.safetensors", "trainer_state.json"]
)
@cases(60)
@given(edits=EDITS)
def test_bytes_of_a_checkpoint(left, name, edits):
    assert fuzz.saved(left / "checkpoint-4", name, edits) in fuzz.GOOD


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl"])
@cases(150)
@given(edits=EDITS)
def test_bytes_of_records(left, name, edits):
    assert fuzz.records(left, name, edits) in fuzz.GOOD


def test_a_checkpoint_that_names_no_step_is_passed_over(left):
    path = left / "events.jsonl"
    content = path.read_bytes()
    try:
        path.write_bytes(content + b'{"event": "checkpoint", "restart": 0, "time": 1.0}\n')
        assert fuzz.outcome(lambda: fuzz.told_of(left)) == "as written"
    finally:
        path.write_bytes(content)


RECORD_KEYS = [
    "event",
    "step",
    "ranks",
    "hosts",
    "max_steps",
    "restart",
    "time",
    "path",
    "seconds",
    "why",
    "ends",
    "job",
]
RECORD_KEYS += ["loss", "step_s", "mfu", "tokens_per_s", "memory_bytes", "useful_s", "learning_rate", "eval_loss"]


@cases(250)
@given(
    name=st.sampled_from(["events.jsonl", "metrics.jsonl"]),
    event=st.sampled_from(["start", "checkpoint", "stop", "end", "x"]),
    more=st.dictionaries(st.sampled_from(RECORD_KEYS), JSON, max_size=4),
    front=st.booleans(),
)
def test_values_of_records(left, name, event, more, front):
    path = left / name
    content = path.read_bytes()
    first = json.loads(content.splitlines()[0])
    line = json.dumps(first | {"event": event} | more).encode() + b"\n"
    try:
        path.write_bytes(line + content if front else content + line)
        assert fuzz.outcome(lambda: fuzz.told_of(left)) in fuzz.GOOD
    finally:
        path.write_bytes(content)
