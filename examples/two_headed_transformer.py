"""A small transformer with two heads, trained by the Hugging Face Trainer with balanced gradients.

Sequences of symbols; one head tells which symbol is the most frequent (cross-entropy), the other how many different
ones there are (squared error of a count, times 100: at first a loss several hundred times as large, and a gradient
several thousand times). Nothing is downloaded. Trains, evaluates, and prints both losses before and after, and how the
gradients were weighed. Exit status 0 only if both losses fell by a third.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

try:
    from dbmtl_kernels.integrations.transformers import BalancedTrainer
    from transformers import BertConfig, BertModel, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    sys.exit(f"This example needs {package}, which is not installed: pip install 'dbmtl-kernels[hf]'")

SYMBOLS, LENGTH = 6, 12
TASKS = ("most frequent", "how many")


class Sequences(Dataset[dict[str, Tensor]]):
    """Random sequences, some symbols likelier than others, and their two labels."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        odds = torch.rand(size, SYMBOLS, generator=generator) ** 4 + 0.01
        self.tokens = torch.multinomial(odds, LENGTH, replacement=True, generator=generator)
        counts = functional.one_hot(self.tokens, SYMBOLS).sum(1)
        self.labels_most = counts.argmax(1)
        self.labels_many = (counts > 0).sum(1).float()

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A sequence and its labels."""
        return {
            "input_ids": self.tokens[index],
            "labels_most": self.labels_most[index],
            "labels_many": self.labels_many[index],
        }


class TwoHeads(nn.Module):
    """An encoder shared by two heads; gives a dict with the two losses and the two predictions."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=SYMBOLS, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
            max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.most = nn.Linear(48, SYMBOLS)
        self.many = nn.Linear(48, 1)

    def forward(self, input_ids: Tensor, labels_most: Tensor, labels_many: Tensor) -> dict[str, object]:
        """Losses of a batch; predictions."""
        z = self.encoder(input_ids=input_ids).last_hidden_state.mean(1)
        most, many = self.most(z), self.many(z).squeeze(1)
        losses = [functional.cross_entropy(most, labels_most), 100 * functional.mse_loss(many, labels_many)]
        return {"losses": losses, "most": most, "many": many}


@torch.no_grad()
def test(model: TwoHeads, data: Sequences) -> list[float]:
    """Both losses over all of ``data``."""
    model.eval()
    device = next(model.parameters()).device
    losses = model(*(x.to(device) for x in (data.tokens, data.labels_most, data.labels_many)))["losses"]
    return [float(loss) for loss in losses]


def main(argv: list[str] | None = None) -> int:
    """Train and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step (default: %(default)s)")
    parser.add_argument("--out", help="folder for checkpoints; a later run with more steps goes on from the last")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model, unseen = TwoHeads(), Sequences(512, seed=1)
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            output_dir=args.out or scratch, max_steps=args.steps, per_device_train_batch_size=16,
            gradient_accumulation_steps=args.accumulate, learning_rate=3e-3, logging_steps=max(args.steps // 3, 1),
            save_strategy="steps" if args.out else "no", save_steps=args.steps, report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = BalancedTrainer(
            model, settings, train_dataset=Sequences(4096, seed=0), shared="encoder", num_tasks=2, task_names=TASKS,
            log_gramian=True,
        )  # fmt: skip
        before = test(model, unseen)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(args.out) if args.out else None)
        after = test(model, unseen)

    print(f"{'task':15}{'loss before':>12}{'after':>8}{'weight':>10}")
    assert trainer.balancer is not None
    for task, *numbers in zip(TASKS, before, after, trainer.balancer.weights.tolist(), strict=True):
        print("{:15}{:12.3f}{:8.3f}{:10.3f}".format(task, *numbers))
    fell = [b > 1.5 * a for b, a in zip(before, after, strict=True)]
    if not all(fell):
        print("A loss did not fall by a third.", file=sys.stderr)
    return 0 if all(fell) else 1


if __name__ == "__main__":
    sys.exit(main())
