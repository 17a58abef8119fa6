"""Adapters: the frozen model stays, the adapters move, and a saved adapter loads as any other."""

import peft
import torch

import support
from forwardtune import MeZO, StepLog, replay
from support import assert_same_bits, closure_for, snapshot, tiny_model, token_batch


def adapted(dtype: torch.dtype = torch.bfloat16) -> peft.PeftModel:
    """A tiny half-precision llama with float32 LoRA adapters whose second factor is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny_model("llama", dtype), config).eval()


def test_only_adapters_move_and_replay_rebuilds_them(tmp_path):
    model = adapted()
    before = snapshot(model)
    optimizer = MeZO(model, lr=1e-2, eps=1e-2)
    assert {tensor.parameter.dtype for tensor in optimizer.tuned} == {torch.float32}
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        for _ in range(5):
            optimizer.step(closure_for(model, token_batch()))
    assert optimizer.perturbation.name == "scratch"
    moved = {name for name, tensor in model.state_dict().items() if not support.same_bits(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name}

    again = adapted()
    replay(tmp_path / "steps.jsonl", again)
    assert_same_bits(again, snapshot(model))


def test_a_saved_adapter_loads_with_peft(tmp_path):
    model = adapted()
    MeZO(model, lr=1e-2, eps=1e-2).step(closure_for(model, token_batch()))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama", torch.bfloat16), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(token_batch()).logits, model(token_batch()).logits)
