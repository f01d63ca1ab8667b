"""Bad inputs of the rows about models and checkpoints."""

import json
import os
import pickle
import shutil
import struct

from safetensors import SafetensorError, safe_open

from hpcllm import checkpoint, model

from .rows import all_refused, cut, flip, refusal, row

WEIGHTS = "model.safetensors"


@row(25, "a checkpoint of another model, seed, length, or of other data")
def other_run(place):
    place.prepare(place.here / "other", tokenizer=str(place.data / "tokenizer"), shard_tokens=3000)
    run = place.a_run()

    def resumed(**changes):
        return lambda: place.train(output=run, resume=True, **changes)

    before = sorted(path.name for path in run.iterdir())
    holds, says = all_refused(
        [
            (65, "model.config was", resumed(model__config__hidden_size=64)),
            (65, "model.task was masked_lm", resumed(model__task="causal_lm", model__config__model_type="gpt2")),
            (65, "run.seed was 7", resumed(run__seed=8)),
            (65, "train.sequence_length was 32", resumed(train__sequence_length=16)),
            (65, "are not those of the checkpoint", resumed(data=place.here / "other" / "train")),
            (2, "is beyond train.max_steps (3)", resumed(train__max_steps=3)),
        ]
    )
    return holds and sorted(path.name for path in run.iterdir()) == before, says


@row(26, "safetensors cut, a byte longer, a header of 2^40 bytes")
def damaged_weights(place):
    def longer(file):
        with open(file, "ab") as end:
            end.write(b"\0")

    def vast(file):
        with open(file, "r+b") as begin:
            begin.write(struct.pack("<Q", 1 << 40))

    calls, loads = [], 0
    for name, spoil in (("cut", cut), ("longer", longer), ("vast", vast)):
        folder = place.model(name)
        spoil(folder / WEIGHTS)
        calls.append((65, f"{folder / WEIGHTS}", checkpoint.verify, folder))
        calls.append((65, str(folder), model.load, folder, "masked_lm"))
        try:
            with safe_open(folder / WEIGHTS, framework="pt"):
                loads += 1
        except SafetensorError:
            pass
    holds, says = all_refused(calls)
    return holds and not loads, says


@row(27, "a bit flipped in safetensors")
def flipped_weights(place):
    run, found = place.a_run(), 0
    file = run / "checkpoint-4" / WEIGHTS
    places = [file.stat().st_size * part // 32 for part in range(32)]
    for offset in places:
        flip(file, offset)
        code, sentence = refusal(checkpoint.verify, file.parent)
        found += code == 65 and str(file) in sentence
        flip(file, offset)
    flip(file, places[16])
    place.train(output=run, resume=True)  # falls back by one
    kept = (run / "damaged-checkpoint-4").is_dir()
    same = (run / "checkpoint-4" / WEIGHTS).read_bytes() == (place.run / "checkpoint-4" / WEIGHTS).read_bytes()
    return found == 32 and kept and same, f"{found} of 32 found, continued to the same bytes; {code}: {sentence}"


class Program:
    """What runs where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@row(28, "weights in a pickle")
def pickled(place):
    calls = []
    for name in ("pytorch_model.bin", "weights.pt"):
        folder = place.model(name)
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(Program(place.here / "ran")))
        words = f"{folder} has weights in {name} only; hpcllm reads safetensors"
        calls.append((65, words, model.load, folder, "masked_lm"))
        calls.append((65, words, lambda folder=folder: from_folder(place, folder)))
    beside = place.model("beside")  # the safetensors file is taken, and nothing else is looked at
    (beside / "pytorch_model.bin").write_bytes(pickle.dumps(Program(place.here / "ran")))
    model.load(beside, "masked_lm")
    holds, says = all_refused(calls)
    return holds and not (place.here / "ran").exists(), says


def from_folder(place, folder):
    from hpcllm import train

    settings = place.settings()
    section = settings.model.model_copy(update={"config": None, "init_from": str(folder)})
    return train.train(settings.model_copy(update={"model": section}), place.world)


@row(29, "a model folder with a program of its own (`auto_map`)")
def own_program(place):
    calls = []
    for name, kind in (("known", "bert"), ("unknown", "mine")):
        folder = place.model(name)
        (folder / "mine.py").write_text(f"import os\nos.mkdir({str(place.here / 'ran')!r})\nclass Mine: pass\n")
        said = json.loads((folder / "config.json").read_text())
        said |= {"model_type": kind, "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForMaskedLM": "mine.Mine"}}
        (folder / "config.json").write_text(json.dumps(said))
        calls.append((65, "needs a program of its own (auto_map", model.load, folder, "masked_lm"))
        calls.append((65, "needs a program of its own (auto_map", lambda folder=folder: from_folder(place, folder)))
    holds, says = all_refused(calls)
    return holds and not (place.here / "ran").exists(), says


@row(32, "clocks that are wrong: time stamps of 1970, and in the wrong order")
def clocks(place):
    run = place.a_run()
    for name, when in (("checkpoint-2", 2_000_000_000), ("checkpoint-4", 0)):
        for path in (run / name, *(run / name).iterdir()):
            os.utime(path, (when, when))
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-10")
    found = [path.name for path in checkpoint.find(run)]
    return found == ["checkpoint-2", "checkpoint-4", "checkpoint-10"], f"found in the order {', '.join(found)}"
