"""Bad inputs of the rows about samples, tokenizers and labels."""

import json

import numpy as np

from hpcllm.data import shards
from hpcllm.data.labelled import Reading
from hpcllm.data.prepare_labelled import prepare_labelled
from hpcllm.metrics import entities

from .rows import all_refused, refusal, row


@row(19, "more ranks, or a larger batch, than samples")
def few_samples(place):
    count = len(source(place))
    batch = count + 2 - count % 2
    holds, says = all_refused(
        [(65, f"{count}", lambda: place.train(train__global_batch_size=batch, train__micro_batch_size=1))]
    )
    code, sentence = refusal(place.settings().train.accumulation, 64)
    return holds and code == 2, f"{says}; {code}: {sentence}"


def source(place):
    from hpcllm import sources

    settings = place.settings()
    words = sources.read_tokenizer(settings.data.tokenizer_dir)
    return sources.open_source(settings, place.world, settings.data.train, words)


@row(20, "shards of unequal size, a last batch that is not full")
def unequal(place):
    samples, plan = source(place), place.settings().train
    sizes = {shard["token_count"] for shard in shards.read_manifest(place.train_data)["shards"]}
    rows = [len(samples.training_step(0, rank, 2, plan)) for rank in range(2)]
    calls = [len(list(samples.validation(rank, 3, 4))) for rank in range(3)]
    seen = sum(batch.samples for rank in range(3) for batch in samples.validation(rank, 3, 4))
    holds = len(sizes) > 1 and len(set(rows)) == len(set(calls)) == 1 and seen == len(samples)
    return holds, f"shards of {len(sizes)} sizes; micro-batches of 2 ranks {rows}, evaluation's of 3 ranks {calls}"


@row(23, "another tokenizer than that of the shards")
def other_tokenizer(place):
    place.prepare(place.here / "other", vocab_size=280)
    tokenizer = place.here / "other" / "tokenizer"
    return all_refused([(65, "was tokenised by another tokenizer", lambda: place.train(data__tokenizer=tokenizer))])


@row(24, "sequences longer than the model has positions for")
def too_long(place):
    # A matter of two keys of the run file: 2.
    return all_refused(
        [(2, "sequence_length (128) is more than the model's max_position_embeddings (64)",
          lambda: place.train(train__sequence_length=128))]
    )  # fmt: skip


@row(33, "labels: outside the scheme, all `O`, more words than tags")
def labels(place):
    nothing = entities.scores(entities.count([["O", "O"]], [["O", "O"]]))
    defined = nothing["f1"] == 0.0 and nothing["accuracy"] == 1.0 and all(np.isfinite(list(nothing.values())))
    path = place.here / "short.jsonl"
    path.write_text(json.dumps({"tokens": ["anna"], "tags": ["O", "O"]}) + "\n")
    how = {"tokenizer": str(place.data / "tokenizer"), "reading": Reading("tags"), "output": str(place.out)}
    holds, says = all_refused(
        [
            (65, "short.jsonl", lambda: prepare_labelled(place.world, inputs=[str(path)], **how)),
            (65, "'X-PER' is not a tag", entities.count, [["X-PER"]], [["O"]]),
            (65, "", entities.count, [["O"]], [["O", "O"]]),
        ]
    )
    return holds and defined, f"all O: F1 0, accuracy 1; {says}"
