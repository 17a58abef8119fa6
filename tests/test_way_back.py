"""How errors come back along the stream: the mean Jacobians that noise shows, what of them is kept, and that the pass beside is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import support
from forwardtune.models import start_from_feedback, tune
from forwardtune.models.error_directions import taken
from forwardtune.models.feedback import _adding, _begun, _gradient, bytes_of_maps
from forwardtune.models.late import row_of_layers
from forwardtune.models.way_back import WayBack

WIDTH = 8


class Layer(nn.Module):
    """Adds a product of the stream to it, and what a layer of its own gives."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.normal_(self.mix.weight, std=strength / WIDTH**0.5)
        nn.init.zeros_(self.out.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mix(hidden_states) + self.out(hidden_states)


class Row(nn.Module):
    def __init__(self, strength: float, count: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(strength) for _ in range(count))
        self.register_buffer("vocabulary", torch.zeros(1000, WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(hidden_states=h)
        return h


def outs(model: Any) -> list[nn.Module]:
    return [layer.out for layer in model.layers]


def learned(model: Any, layers: list[nn.Module], passes: Any, counted: Tensor | None = None) -> dict[nn.Module, Tensor]:
    way = WayBack(model, layers)
    with way.learning() as count, torch.no_grad():
        for run in passes:
            count(counted)
            run()
    return way.maps(layers[-1])


def test_a_map_is_the_product_of_the_layers_between() -> None:
    torch.manual_seed(0)
    model = Row(0.5)
    h = torch.randn(1, 20_000, WIDTH)
    maps = learned(model, outs(model), [lambda: model(h)])
    expected = torch.eye(WIDTH)
    for layer in reversed(model.layers[1:]):
        expected = expected @ (torch.eye(WIDTH) + layer.mix.weight.detach())
        before = model.layers[list(model.layers).index(layer) - 1]
        torch.testing.assert_close(maps[before.out], expected, atol=0.06, rtol=0)
    assert model.layers[-1].out not in maps  # errors behind its end are its own


def test_few_tokens_leave_the_stream_nearly_as_it_is() -> None:
    """Shrinking makes the error smaller than that of the identity, and than that of the plain mean."""
    torch.manual_seed(0)
    worse = {"identity": 0, "plain": 0}
    for tokens in (4, 8, 16, 64):
        for _trial in range(20):
            model = Row(0.3, 2)
            true = model.layers[1].mix.weight.detach()
            way = WayBack(model, outs(model))
            with way.learning(), torch.no_grad():
                model(torch.randn(1, tokens, WIDTH))
            mean = way._through[1]
            plain = torch.as_tensor(mean.products) / mean.count
            kept = way.maps(model.layers[1].out).get(model.layers[0].out, torch.eye(WIDTH)) - torch.eye(WIDTH)
            error = (kept - true).norm()
            worse["identity"] += bool(error > true.norm() * (1.05 if tokens < 64 else 0.8))
            worse["plain"] += bool(error > (plain - true).norm() * 1.05)
    assert worse["identity"] <= 12, worse  # of 80
    assert worse["plain"] <= 8, worse


def test_noise_alone_is_no_map() -> None:
    model = Row(0.0)
    maps = learned(model, outs(model), [lambda: model(torch.randn(1, 50, WIDTH))])
    assert maps == {}


def test_padding_and_tokens_of_unusual_size_do_not_count() -> None:
    torch.manual_seed(0)
    model = Row(0.5)
    h = torch.randn(2, 6, WIDTH)
    h[0, 0] *= 1e4
    way = WayBack(model, outs(model))
    with way.learning() as count, torch.no_grad():
        count(torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool())
        model(h)
        assert {mean.count for mean in way._through.values()} == {9}
        count(None)
        model(h)
        assert {mean.count for mean in way._through.values()} == {9 + 11}
        h[1, 2] = torch.inf
        model(h)
        assert {mean.count for mean in way._through.values()} == {20 + 10}
    assert all(m.isfinite().all() for m in way.maps(model.layers[-1].out).values())


def family(name: str, targets: list[str], dtype: torch.dtype = torch.float64) -> Any:
    model = support.tiny_model(name, dtype)
    with torch.no_grad():  # layers that have more to say than freshly made ones
        for p in model.parameters():
            if p.ndim == 2 and p.shape[0] != model.config.vocab_size:
                p.mul_(4)
    return tune(model, support.tokenizer(), "lora", lora_rank=4, lora_targets=targets, freeze_a=True)


def choice(model: Any, batch: Any) -> Tensor:
    logits = model(**batch).logits[:, -1, [3, 5]]
    return F.cross_entropy(logits, batch["input_ids"][:, 0] % 2, reduction="none")


def batches(count: int = 16, rows: int = 16) -> list[dict[str, Tensor]]:
    tokens = support.token_batch(rows * count, length=10, seed=1)
    return [{"input_ids": some, "attention_mask": torch.ones_like(some)} for some in tokens.chunk(count)]


TARGETS = {"llama": r"mlp\.down_proj", "opt": "fc2", "gpt2": r"mlp\.c_proj", "gpt_neox": "dense_4h_to_h", "bert": r"\d\.output\.dense"}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "gpt2", "gpt_neox"])
def test_errors_come_back_better_than_along_the_stream_as_it_is(name: str) -> None:
    """Of each family: with post-norm layers, with layers that run attention beside, called with their input by place or by name."""
    model, given = family(name, [TARGETS[name]]), batches()
    layers = _adding(model)
    way = WayBack(model, layers)
    cosines = []
    with torch.no_grad():
        with way.learning():
            fed = taken(model, given, choice, fill=True)
        for walk in (_begun(model, given[0], choice, 1e-2, fed), _begun(model, given[0], choice, 1e-2, fed, way)):
            b = {layer: layer.lora_B["default"].weight for layer in walk.layers}
            with torch.enable_grad():
                expected = torch.autograd.grad(choice(model, given[0]).mean(), [*b.values()])
            _gradient(model, walk, given[0], choice)
            found = [weight.grad for weight in b.values()]
            torch.testing.assert_close(found[-1], expected[-1], rtol=1e-4, atol=1e-7)  # exact in the last one
            cosines.append(float(F.cosine_similarity(found[0].flatten(), expected[0].flatten(), dim=0)))
            for weight in b.values():
                weight.zero_()
    assert 1 - cosines[1] < 0.96 * (1 - cosines[0]), cosines


def test_the_mean_jacobian_of_a_real_layer() -> None:
    """Against automatic differentiation, token by token: what changes of a token's own stream."""
    model = family("llama", [r"mlp\.down_proj"])
    layers, batch = _adding(model), batches(1, rows=2)[0]
    way = WayBack(model, layers)
    seen: dict[str, Any] = {}
    end = model.get_submodule(row_of_layers(model)[-1])
    handle = end.register_forward_hook(
        lambda m, args, kwargs, o: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    with way.learning(), torch.no_grad():
        for _ in range(400):
            model(**batch, use_cache=False)
    handle.remove()
    (h, *rest), kwargs = seen["args"], seen["kwargs"]
    width, mean = h.shape[-1], 0.0
    size = h.square().mean(-1).sqrt()
    usual = size < 4 * size.median()

    def through(h: Tensor) -> Tensor:
        out = end(h, *rest, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    whole = torch.autograd.functional.jacobian(through, h)  # (rows, tokens, width, rows, tokens, width)
    for row in range(h.shape[0]):
        for token in range(h.shape[1]):
            if usual[row, token]:
                mean = mean + whole[row, token, :, row, token, :] / usual.sum()
    found = way.maps(layers[-1])[layers[-2]].double()
    plain = (torch.eye(width).double() - mean).norm()
    assert (found - mean).norm() < 0.25 * plain


def test_what_is_added_as_it_is_comes_back_as_it_is() -> None:
    model = family("llama", ["o_proj", r"mlp\.down_proj"])
    names = {module: name for name, module in model.named_modules()}
    layers = _adding(model)
    way = WayBack(model, layers)
    with way.learning(), torch.no_grad():
        for batch in batches(4):
            model(**batch)
    assert all((layer in way._added) == ("down_proj" in names[layer]) for layer in layers)
    assert all(bool(way._behind[layer].count) == ("o_proj" in names[layer]) for layer in layers)
    maps = way.maps(layers[-1])
    by_name = {names[layer]: m for layer, m in maps.items()}
    assert len({m.shape for m in by_name.values()}) == 1
    assert any("o_proj" in name for name in by_name)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_pass_beside_is_left_alone(name: str) -> None:
    """The same bits, a cache of the tokens that there are, no gradient, and no hook behind it."""
    model, batch = family(name, [TARGETS[name]], torch.bfloat16), batches(1)[0]
    before = model(**batch)
    way = WayBack(model, _adding(model))
    with_gradient: list[bool] = []
    handles = [
        layer.register_forward_hook(lambda m, i, o: with_gradient.append(torch.is_grad_enabled()))
        for layer in _adding(model)
    ]
    with way.learning():
        during = model(**batch)
    for handle in handles:
        handle.remove()
    assert torch.equal(before.logits, during.logits)
    assert during.logits.requires_grad == before.logits.requires_grad
    assert with_gradient.count(True) == len(handles)  # the pass itself, and no run beside it
    assert len(with_gradient) > len(handles)
    if name == "llama":
        assert during.past_key_values.get_seq_length() == batch["input_ids"].shape[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*(learned_again(name) for _ in range(2)), strict=True))


def learned_again(name: str) -> list[Tensor]:
    model, batch = family(name, [TARGETS[name]]), batches(1)[0]
    return list(learned(model, _adding(model), [lambda: model(**batch)] * 3).values())


def test_matrices_take_a_tenth_of_the_memory_of_the_weights() -> None:
    torch.manual_seed(0)
    model = Row(0.5, 6)
    model.vocabulary = torch.zeros(5, WIDTH)
    weights = 4 * (6 * 2 * WIDTH**2 + 5 * WIDTH)
    way = WayBack(model, outs(model))
    with way.learning(), torch.no_grad():
        model(torch.randn(1, 2000, WIDTH))
    assert sum(4 * torch.as_tensor(mean.products).numel() for mean in way._through.values()) <= weights / 10
    assert sorted(way._through) == [5]
    assert way.bytes(WIDTH) == 4 * WIDTH**2
    maps = way.maps(model.layers[-1].out)
    assert len({id(m) for m in maps.values()}) == 1  # what lies before is left as it is
    assert len(maps) == 5 + 6  # of what layers in it give, and of what those of the row read


def test_what_the_walk_takes_is_known_before() -> None:
    model = family("llama", [r"mlp\.down_proj"])
    layers = _adding(model)
    way = WayBack(model, layers)
    with way.learning(), torch.no_grad():
        for batch in batches(2):
            model(**batch)
    taken_up = sum(torch.as_tensor(mean.products).numel() * 4 for mean in way._through.values())
    assert bytes_of_maps(model) == taken_up > 0


def test_layers_that_are_part_of_no_row_are_left_out() -> None:
    model = Row(0.5)
    model.beside = nn.Linear(WIDTH, WIDTH)
    way = WayBack(model, [model.beside, *outs(model)])
    assert way.end(model.beside) is None
    assert way.end(model.layers[2].out) is model.layers[2]
    with way.learning(), torch.no_grad():
        model(torch.randn(1, 500, WIDTH))
    assert way.maps(model.beside) == {}
    assert model.beside not in way.maps(model.layers[-1].out)
    nothing = WayBack(nn.Linear(2, 2), [])
    with nothing.learning():
        pass


def test_the_walk_learns_more_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def gained(with_maps: bool) -> float:
        model, given = family("llama", [r"mlp\.down_proj"], torch.float32), batches()
        if not with_maps:
            monkeypatch.setattr(WayBack, "maps", lambda self, last: {})
        with torch.no_grad():
            before = torch.cat([choice(model, batch) for batch in given]).mean()
        start_from_feedback(model, given * 2, choice, steps=32, rate=0.02)
        with torch.no_grad():
            return float(before - torch.cat([choice(model, batch) for batch in given]).mean())

    assert gained(True) > gained(False)
