"""How much memory a training step takes, found by taking it on tensors that have shapes and no values.

PyTorch's fake tensors run the real code of the model and of its backward in a second or so, whatever its size.
"""

import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from transformers import PreTrainedConfig
from transformers.integrations import moe
from transformers.quantizers.auto import AutoHfQuantizer

from fine_tune.models import AUTO_CLASSES, Head, quantization_config

BLOCK, BLOCKS = 64, 256  # of bitsandbytes: weights per scale, scales per scale of scales


@contextmanager
def without_values() -> Iterator[FakeTensorMode]:
    """Make every tensor one that has a shape, a type, a size in bytes, and neither memory nor values."""
    # torch's grouped product of experts knows shapes of bfloat16 only; transformers' own stand-in takes as much
    chooses = mock.patch.object(moe, "_can_use_grouped_mm", return_value=False, create=True)
    with chooses, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors that were made while it is entered and are still there; with values or without.

    Args:
        known: Tensors that are there already; they and their views are not counted.
        kind_of: Names the kind of a tensor; each is counted for itself.

    Attributes:
        now: Bytes that live, by kind.
        at_peak: The same when the most of them lived; ``start_peak`` forgets it.
    """

    def __init__(self, known: Iterable[Tensor], kind_of: Callable[[Tensor], str]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.kind_of = kind_of
        self.now: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._made: dict[int, tuple[str, int]] = {}

    def start_peak(self) -> None:
        """Look for the most again, from what lives now."""
        self.at_peak = Counter(self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._made or key in self._known:
            return
        kind = self.kind_of(tensor)
        self._made[key] = (kind, storage.nbytes())
        self.now[kind] += storage.nbytes()
        if self.now.total() > self.at_peak.total():
            self.at_peak = Counter(self.now)
        weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        kind, size = self._made.pop(key)
        self.now[kind] -= size


class PackedLinear(nn.Linear):
    """Stands for a quantized linear layer: as many bytes, and as much memory for its dequantized weights.

    Args:
        in_features: Columns of the matrix.
        out_features: Its rows.
        bias: The layer's, which stays as it is.
        kind: ``nf4``, ``fp4`` or ``int8``.
        compute_dtype: Type that the weights are multiplied in.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        kind: str,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = in_features, out_features
        self.bias = bias  # type: ignore[assignment]
        self.compute_dtype = compute_dtype
        size = packed_bytes(out_features, in_features, kind)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        inputs = input.to(self.compute_dtype)
        shape = (self.out_features, self.in_features)
        result: Tensor = _Dequantized.apply(inputs, shape)
        result = result if self.bias is None else result + self.bias.to(self.compute_dtype)
        return result.to(input.dtype)


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return inputs @ inputs.new_empty(shape).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.shape), None


def packed_bytes(rows: int, columns: int, kind: str) -> int:
    """Return the bytes of a quantized matrix with its scales, as bitsandbytes keeps them.

    4 bit: half a byte a weight; a byte a scale of 64 weights, these scaled once more by 256 (QLoRA, arXiv 2305.14314);
    two tables, of 16 and 256 float32, and an offset. 8 bit: a byte a weight, a float32 a row.
    """
    weights = rows * columns
    if kind == "int8":
        return weights + 4 * rows
    scales = math.ceil(weights / BLOCK)
    return math.ceil(weights / 2) + scales + 4 * math.ceil(scales / BLOCKS) + 4 * (16 + 256 + 1)


def model_without_values(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    quantization: str | None = None,
    compute_dtype: torch.dtype = torch.float32,
    head: Head = "lm",
) -> Any:
    """Build a model on the meta device, its linear layers quantized as transformers would.

    Args:
        config: The model's config.
        dtype: Type of the weights that are not quantized.
        attn_implementation: See ``models.load_model``.
        quantization: ``nf4``, ``fp4``, ``int8`` or None.
        compute_dtype: Type that quantized weights are multiplied in.
        head: The model's.
    """
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        model = AUTO_CLASSES[head].from_config(copy.deepcopy(config), dtype=dtype, **options)
        if quantization is not None:
            for path, size in _quantized_layers(config, quantization, head).items():
                parent, _, name = path.rpartition(".")
                bias = model.get_submodule(path).bias
                packed = PackedLinear(*size, bias, quantization, compute_dtype)
                setattr(model.get_submodule(parent), name, packed)
    return model


def as_if_loaded(model: nn.Module) -> None:
    """Give the weights of a model on the meta device places of their own, inside ``without_values``."""
    places: dict[int, Tensor] = {}  # tied weights share theirs
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in places:
                    place = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        place = nn.Parameter(place, requires_grad=tensor.requires_grad)
                    places[id(tensor)] = place
                tensors[name] = places[id(tensor)]  # type: ignore[assignment]


def _quantized_layers(
    config: PreTrainedConfig, kind: str, head: Head
) -> dict[str, tuple[int, int]]:
    """Ask transformers which layers it would quantize; return their columns and rows."""
    wanted = quantization_config(kind, torch.float32, head)
    quantizer = AutoHfQuantizer.from_config(wanted, pre_quantized=False)
    with torch.device("meta"):
        model = AUTO_CLASSES[head].from_config(copy.deepcopy(config))
        quantizer.preprocess_model(model=model, device_map=None)
    return {
        path: (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    }


def bytes_held(tensors: Iterable[Tensor]) -> int:
    """Sum the bytes of tensors, those that share memory once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def without_values_of(batch: Any, mode: FakeTensorMode) -> Any:
    """Return a batch with the shapes of another one."""
    return tree_map_only(Tensor, mode.from_tensor, batch)
