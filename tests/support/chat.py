"""Conversations, and a tokenizer with a chat template; what TRL's trainers make of them is in ``golden/chat.json``.

``python tests/support/chat.py`` writes that file anew, with TRL installed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden" / "chat.json"

_TURN = "{{ '<bos>' + m['role'] + '\n' }}"
_ANSWER = "{{ m['content'] + '<eos>\n' }}"
_REQUEST = "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
#: With and without marks around what the assistant writes.
PLAIN = f"{{% for m in messages %}}{_TURN}{_ANSWER}{{% endfor %}}{_REQUEST}"
MARKED = (
    f"{{% for m in messages %}}{_TURN}{{% if m['role'] == 'assistant' %}}{{% generation %}}{_ANSWER}{{% endgeneration %}}"
    f"{{% else %}}{_ANSWER}{{% endif %}}{{% endfor %}}{_REQUEST}"
)

USER = {"role": "user", "content": "What is the capital of Peru?"}
ANSWER = {"role": "assistant", "content": "Lima, on the coast."}
MORE = [{"role": "user", "content": "And of Chile?"}, {"role": "assistant", "content": "Santiago."}]
SYSTEM = {"role": "system", "content": "Be brief."}
#: What each case's rows and settings are, by TRL's names.
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "messages": (
        [{"messages": [USER, ANSWER]}, {"messages": [SYSTEM, USER, ANSWER, *MORE]}, {"messages": [USER, ANSWER, *MORE]}],
        {"assistant_only_loss": True},
    ),
    "all turns": ([{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, *MORE]}], {}),
    "sharegpt": (
        [{"conversations": [{"from": m["role"], "value": m["content"]} for m in (USER, ANSWER)]}],
        {},
    ),
    "conversational completion": (
        [{"prompt": [SYSTEM, USER], "completion": [ANSWER]}, {"prompt": [USER, ANSWER, MORE[0]], "completion": [MORE[1]]}],
        {},
    ),
    "completion": ([{"prompt": "The capital of France is", "completion": " Paris."}, {"prompt": "1+1=", "completion": "2<eos>"}], {}),
    "completion, all of it": ([{"prompt": "The capital is", "completion": " Lima."}], {"completion_only_loss": False}),
    "text": ([{"text": "Once there was a fox."}, {"text": "The end.<eos>"}], {}),
    "named text": ([{"body": "Once there was a fox."}], {"dataset_text_field": "body"}),
    "cut": (
        [{"messages": [USER, ANSWER, *MORE]}, {"messages": [SYSTEM, {**USER, "content": "long " * 50}, ANSWER]}],
        {"assistant_only_loss": True, "max_length": 60},
    ),
    "packed": (
        [{"text": "word " * n} for n in (1, 12, 5, 3, 9, 7, 2, 30)],
        {"packing": True, "max_length": 40},
    ),
}  # fmt: skip


#: Preferences, by TRL's names.
PAIRS: dict[str, list[dict[str, Any]]] = {
    "preferences": [{"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "Chile."}]}],
    "implicit prompt": [{"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "Chile."}]}],
    "texts": [{"prompt": "The capital is", "chosen": " Lima.", "rejected": " Chile, I think."}],
}


def chat_tokenizer(template: str | None = PLAIN) -> Any:
    """The tests' tokenizer, with a chat template."""
    from support import tokenizer

    made = tokenizer()
    made.chat_template = template
    return made


def _of_trl(name: str) -> list[dict[str, Any]]:
    import datasets
    from trl import SFTConfig, SFTTrainer

    from support import tiny_model

    rows, settings = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], **settings)
        trainer = SFTTrainer(
            tiny_model(), args, train_dataset=datasets.Dataset.from_list(rows), processing_class=chat_tokenizer(MARKED)
        )
        return [
            {key: row[key] for key in ("input_ids", "labels", "seq_lengths") if key in row}
            for row in trainer.train_dataset
        ]


def _of_dpo(name: str) -> list[dict[str, Any]]:
    import datasets
    from trl import DPOConfig, DPOTrainer

    from support import tiny_model

    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[])
        rows = datasets.Dataset.from_list(PAIRS[name])
        trainer = DPOTrainer(tiny_model(), tiny_model(), args, train_dataset=rows, processing_class=chat_tokenizer())
        return [
            {key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in trainer.train_dataset
        ]


if __name__ == "__main__":
    import sys

    import trl

    sys.path.insert(0, str(Path(__file__).parents[1]))
    made = {
        "trl": trl.__version__,
        **{name: _of_trl(name) for name in CASES},
        **{name: _of_dpo(name) for name in PAIRS},
    }
    GOLDEN.write_text(json.dumps(made) + "\n", encoding="utf-8")
