"""Tuned parameters: their names and ids, the digest of their values, and what cannot be tuned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forwardtune import MeZO
from forwardtune.errors import InputError
from forwardtune.parameters import TunedParameters
from support import DTYPES


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(3, 2), nn.Linear(2, 3, bias=False)


def tune(module: nn.Module) -> TunedParameters:
    return TunedParameters.from_groups([{"params": list(module.parameters())}], module)


def names(tuned: TunedParameters) -> dict[str, int]:
    return {tensor.name: tensor.id for tensor in tuned}


def test_ids_are_places_among_the_sorted_names_whatever_the_order():
    pair = Pair()
    expected = {"first.weight": 0, "second.bias": 1, "second.weight": 2}
    parameters = list(pair.parameters())
    for groups in (
        [parameters],
        [parameters[::-1]],
        [parameters[:1], parameters[1:]],
        [parameters[2:], parameters[:1], parameters[1:2]],
    ):
        tuned = TunedParameters.from_groups([{"params": group} for group in groups], pair)
        assert names(tuned) == expected
        for tensor in tuned:
            assert tensor.parameter is pair.get_parameter(tensor.name)
            assert any(tensor.parameter is parameter for parameter in groups[tensor.group])
    assert tuned.numel == 14
    assert tuned[0].name == "first.weight"
    assert len(tuned) == 3
    named = [{"params": [p], "param_names": [name]} for name, p in reversed(list(pair.named_parameters()))]
    assert names(TunedParameters.from_groups(named)) == expected


def test_tied_tensors_count_once_under_the_first_of_their_names():
    tied = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    tied.b.weight = tied.a.weight
    assert names(tune(tied)) == {"a.bias": 0, "a.weight": 1, "b.bias": 2}
    tied.a_shorter_path = tied.b
    assert names(tune(tied)) == {"a.bias": 0, "a.weight": 1, "a_shorter_path.bias": 2}


def test_unnamed_parameters_are_named_by_their_position():
    tensors = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    tuned = TunedParameters.from_groups([{"params": tensors[:1]}, {"params": tensors[1:]}])
    assert names(tuned) == {f"parameter.{i:06d}": i for i in range(3)}
    assert [tensor.group for tensor in tuned] == [0, 1, 1]


def test_tensors_are_described_for_the_step_log():
    pair = Pair().half()
    assert tune(pair).describe()[1:] == [
        {"name": "second.bias", "shape": [2], "dtype": "float16", "group": 0},
        {"name": "second.weight", "shape": [2, 3], "dtype": "float16", "group": 0},
    ]


@pytest.mark.parametrize("chunk", [1, 5, 6, 1 << 24])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_digest_is_that_of_the_specification(chunk, dtype, monkeypatch):
    """Of names, dtypes, shapes and bytes in the order of ids, whatever their layout and however they are cut."""
    monkeypatch.setattr("forwardtune.parameters._DIGEST_CHUNK", chunk)  # larger than any tensor here
    value = torch.linspace(-1, 1, 12).to(dtype).view(3, 4)
    tensors = {
        "w": value, "a.turned": value.t().contiguous().t(), "v": torch.stack([value, value], dim=-1)[..., 0],
        "flat": value.view(12), "scalar": torch.tensor(-0.0, dtype=dtype), "empty": torch.empty(0, dtype=dtype),
    }  # fmt: skip
    expected = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        expected.update(f"{name}\0{str(dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
        expected.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    groups = [{"params": [nn.Parameter(tensor) for tensor in tensors.values()], "param_names": list(tensors)}]
    assert TunedParameters.from_groups(groups).digest() == expected.hexdigest()


@pytest.mark.parametrize(
    ("groups", "module", "message"),
    [
        ([], None, "nothing to tune"),
        ([{"params": []}], nn.Linear(2, 2), "nothing to tune"),
        (
            [{"params": [nn.Parameter(torch.zeros(2, dtype=torch.int8), False)]}],
            None,
            "int8, which cannot be perturbed",
        ),
        ([{"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]}], None, "complex64"),
        ([{"params": [nn.Parameter(torch.empty(2, device="meta"))]}], None, "no values of its own \\(meta device\\)"),
        ([{"params": [nn.Parameter(torch.zeros(2, 5))]}], nn.Linear(2, 2), "group 0 \\(shape \\(2, 5\\)\\) is not in"),
    ],
    ids=["no group", "empty group", "int8", "complex", "meta", "not in the module"],
)
def test_what_cannot_be_tuned_is_refused_with_the_reason(groups, module, message):
    with pytest.raises(ValueError, match=message):
        TunedParameters.from_groups(groups, module)


def test_a_module_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="nothing to tune: no parameter of the module has requires_grad=True"):
        MeZO(nn.Linear(2, 2).requires_grad_(False))


def test_a_tensor_with_more_elements_than_blocks_can_number_is_refused():
    """Noise would come a second time."""
    most = torch.zeros(1).expand(2**35)
    assert TunedParameters.from_groups([{"params": [nn.Parameter(most)]}]).numel == 2**35
    with pytest.raises(ValueError, match=r"34359738369 elements; at most 2\*\*35"):
        TunedParameters.from_groups([{"params": [nn.Parameter(torch.zeros(1).expand(2**35 + 1))]}])


class Quantised(Tensor):
    """Integers and a scale that pass for a float tensor, as torchao's do."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: float) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values: Tensor, scale: float) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        plain = [arg.values * arg.scale if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def distributed() -> Tensor:
    """A DTensor over the one process that there is."""
    from torch.distributed import device_mesh, tensor

    return tensor.distribute_tensor(torch.ones(2, 3), device_mesh.init_device_mesh("cpu", (1,)), [tensor.Replicate()])


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: Quantised(torch.ones(2, 3, dtype=torch.int8), 0.5), "Quantised"),
        (distributed, "DTensor"),
        (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    ],
    ids=["quantised", "distributed", "sparse"],
)
@pytest.mark.parametrize("by_module", [True, False])
def test_tensors_that_do_not_hold_their_values_are_refused_with_the_remedy(make, kind, by_module, one_process):
    net = nn.ModuleDict({"layer": nn.Linear(3, 2)})
    net.layer.weight = nn.Parameter(make())
    with pytest.raises(InputError, match=f"layer.weight is a .*{kind}.*requires_grad=False.*adapter"):
        MeZO(net if by_module else net.named_parameters())
    net.layer.weight.requires_grad_(False)
    MeZO(net, lr=1e-3, perturbation="copy").step(lambda: net.layer.bias.sum())  # the rest can be tuned beside it


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_subclass_with_an_ordinary_memory_is_tuned():
    class Named(Tensor):
        """What a library may hang names on."""

    net = nn.Linear(3, 2)
    net.weight = nn.Parameter(torch.ones(2, 3).as_subclass(Named))
    MeZO(net, lr=1e-3).step(lambda: net(torch.ones(3)).sum())
    assert not torch.equal(net.weight, torch.ones(2, 3))
