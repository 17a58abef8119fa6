"""What there is to be found in the embedded model, untuned, by prompt and answer words, on the embedded reviews.

    python benchmarks/prompts.py

For each prompt and pair of words: the area under the ROC curve of the score difference over the 400 training reviews, the
accuracy at threshold 0, and the best accuracy that any threshold gives. bfloat16.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from machine import write

from forwardtune.evaluation import find_layout, prepare
from forwardtune.models import load_model
from forwardtune.objectives import option_scores
from forwardtune.tasks import get_task, load_split
from forwardtune.tasks.encoding import Encoder

PROMPTS = (
    "{text} It was",
    "Review: {text}\nSentiment:",
    "Sentiment of reviews, positive or negative.\nReview: {text}\nSentiment:",
    "Review: A waste of money.\nSentiment: Negative\nReview: I would buy it again.\nSentiment: Positive\n"
    "Review: {text}\nSentiment:",
    "Review: {text}\nRecommended:",
    "Positive or negative?\n{text}\nAnswer:",
)
WORDS = (("terrible", "great"), ("negative", "positive"), ("Negative", "Positive"))


@torch.no_grad()
def main() -> None:
    """Print and save the table."""
    model, tokenizer = load_model("smollm2-135m", dtype="bfloat16")
    task, rows = get_task("reviews"), []
    for prompt in PROMPTS:
        for negative, positive in WORDS:
            variant = replace(task, prompt=prompt, answers={"negative": negative, "positive": positive})
            examples = Encoder(tokenizer, 512)(variant, load_split(variant, "train").examples)
            examples.sort(key=lambda example: example.length)
            layout = find_layout(model, tokenizer, examples)
            batches = [examples[lo : lo + 25] for lo in range(0, len(examples), 25)]
            scores = torch.cat([option_scores(model, prepare(model, tokenizer, batch, layout)) for batch in batches])
            difference = scores[:, 1] - scores[:, 0]
            labels = torch.tensor([example.label for example in examples])
            up, down = difference[labels == 1], difference[labels == 0]
            area = float((up[:, None] > down).float().mean() + 0.5 * (up[:, None] == down).float().mean())
            at_zero = float(((difference > 0) == (labels == 1)).float().mean())
            at_best = max(float(((difference > t) == (labels == 1)).float().mean()) for t in difference)
            rows.append({"prompt": prompt, "words": [negative, positive], "area": area, "accuracy": at_zero,
                         "best_accuracy": at_best})  # fmt: skip
            print(f"{area:.2f}  {at_zero:.2f}  {at_best:.2f}  {negative} / {positive}  {prompt!r}", flush=True)
    write("prompts", {"rows": rows})


if __name__ == "__main__":
    main()
