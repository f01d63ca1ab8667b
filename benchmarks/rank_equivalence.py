"""Does the loss depend on the number of ranks? The same run at 1, 2, 3 and 4 ranks, dropout on, step by step.

    python -m benchmarks.rank_equivalence --data DIR [--steps 50]

DIR is a folder that `hpcllm prepare` wrote. For masked_lm (BERT) and causal_lm (GPT-2), SGD and AdamW, fp32, with equal
global batches: the largest relative difference of the loss of any step to that of one rank.
"""

import argparse
import tempfile
from pathlib import Path

from . import jobs

MODELS = {
    "masked_lm": 'model.config={model_type="bert",hidden_size=64,num_hidden_layers=2,num_attention_heads=2}',
    "causal_lm": 'model.config={model_type="gpt2",n_embd=64,n_layer=2,n_head=2,n_positions=64}',
}
OPTIMIZERS = {"sgd": ["train.learning_rate=0.1", "train.sgd_momentum=0.9"], "adamw": ["train.learning_rate=2e-3"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that hpcllm prepare wrote")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    args = parser.parse_args()
    print(f"{args.steps} steps, global batch 24, micro-batch 2, fp32, dropout 0.1; {jobs.versions()}")
    print("| task | optimizer | loss first | loss last | " + " | ".join(f"{n} ranks" for n in args.ranks[1:]) + " |")
    print("|---|---|---|---|" + "---|" * (len(args.ranks) - 1))
    with tempfile.TemporaryDirectory() as folder:
        run_file = Path(folder) / "run.toml"
        run_file.write_text(
            "[train]\nglobal_batch_size = 24\nmicro_batch_size = 2\nsequence_length = 64\nwarmup_steps = 5\n"
        )
        for task, model in MODELS.items():
            for optimizer, rates in OPTIMIZERS.items():
                curves = []
                for ranks in args.ranks:
                    output = f"{folder}/{task}-{optimizer}-{ranks}"
                    settings = [
                        f"run.output_dir={output}",
                        f"data.train={args.data}/train",
                        f"model.task={task}",
                        model,
                    ]
                    settings += [f"train.max_steps={args.steps}", f"train.optimizer={optimizer}", *rates]
                    jobs.run(ranks, "-m", "hpcllm", "train", run_file, *settings)
                    curves.append([record["loss"] for record in jobs.metrics(output)])
                worst = [max(abs(a / b - 1) for a, b in zip(c, curves[0], strict=True)) for c in curves[1:]]
                cells = " | ".join(f"{difference:.1e}" for difference in worst)
                print(f"| {task} | {optimizer} | {curves[0][0]:.4f} | {curves[0][-1]:.4f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
