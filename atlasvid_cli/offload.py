"""How weights are kept, where they and states live, and how they come to the compute device (DESIGN §4).

A block is a map over all windows, so its weights are loaded once a forward however many chunks run through it. Of
states that live in host memory the next chunk's come while one computes, and the last one's go.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch.utils._pytree import tree_leaves

from .errors import UsageError
from .memory import Offload, WeightDtype

Item = TypeVar("Item")
Fetched = TypeVar("Fetched")

TORCHAO = (0, 18)  # whose int8 weights can be pinned and moved as they are


def device_of(model: WanTransformer3DModel) -> torch.device:
    """Where the model computes: its embeddings are never offloaded."""
    return model.patch_embedding.weight.device


def check_weight_dtype(kept: WeightDtype) -> None:
    """Raises UsageError where weights cannot be kept so here."""
    if kept != "int8":
        return
    try:
        found = tuple(int(part) for part in version("torchao").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        found = (0, 0)
    if found < TORCHAO:
        raise UsageError("--weight-dtype int8 needs torchao: pip install 'torchao>=0.18', or take fp8")


def narrow(model: WanTransformer3DModel, kept: WeightDtype) -> WanTransformer3DModel:
    """Keeps the blocks' linear layers in eight bits a weight; each is widened as it computes.

    int8 has a scale a row (torchao), fp8 (e4m3) none (diffusers' layerwise casting).
    """
    if kept == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        # the inductor's settings would be the whole process's
        quantize_(model.blocks, Int8WeightOnlyConfig(version=2, set_inductor_config=False))
    elif kept == "fp8":
        model.enable_layerwise_casting(torch.float8_e4m3fn, model.dtype)
    return model


def place(model: WanTransformer3DModel, device: torch.device, offload: Offload) -> WanTransformer3DModel:
    """Moves the model to `device`, or all but its blocks, which stay in (pinned) host memory."""
    if offload == "none":
        return model.to(device)
    for name, part in model.named_children():
        if name != "blocks":
            part.to(device)
    for name, parameter in model.named_parameters(recurse=False):
        _replace(model, name, parameter.to(device))
    if device.type == "cuda":
        for owner, name, parameter in _parameters(model.blocks):
            _replace(owner, name, parameter.pin_memory())  # only from pinned memory does a copy overlap with compute
    return model


def on_device(blocks: Sequence[nn.Module], device: torch.device) -> Generator[Any]:
    """Each block with its weights on `device`. Those that live elsewhere are copied while the block before computes.

    A GPU's host waits for the block before that one: it would run ahead, and hold the weights of many.
    """
    if all(p.device == device for block in blocks for p in block.parameters()):
        yield from blocks
        return
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(block: nn.Module) -> list[torch.Tensor]:
        with torch.cuda.stream(stream) if stream else nullcontext():
            return [p.detach().to(device, non_blocking=True) for _, _, p in _parameters(block)]

    fetched, computed = fetch(blocks[0]), None
    for i, block in enumerate(blocks):
        home = list(_parameters(block))
        if stream:
            torch.cuda.current_stream(device).wait_stream(stream)
        for (owner, name, _), weight in zip(home, fetched, strict=True):
            _replace(owner, name, weight)
            for part in stored(weight) if stream else ():
                part.record_stream(torch.cuda.current_stream(device))
        if computed:
            computed.synchronize()
        fetched = fetch(blocks[i + 1]) if i + 1 < len(blocks) else []
        try:
            yield block
        finally:
            for owner, name, parameter in home:
                setattr(owner, name, parameter)
        computed = torch.cuda.current_stream(device).record_event() if stream else None


def _parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every parameter with its owner and the name it has there, through which it can be replaced.

    Its data alone cannot be where it is quantized: there it is several tensors.
    """
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            yield owner, name, parameter


def stored(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a weight: a quantized one's values and scales, or itself."""
    if hasattr(weight, "__tensor_flatten__"):
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return [weight]


def _replace(owner: nn.Module, name: str, weight: torch.Tensor) -> None:
    setattr(owner, name, nn.Parameter(weight.detach(), requires_grad=False))


class Transfers:
    """Rows of tensors on `home`, such as hidden states, for chunks that are computed on `device`, without gradients.

    Where the two differ, a thread gathers the next chunk's rows and another one scatters what was computed, while the
    device computes; on a GPU the copies have streams of their own, and pass through pinned memory. Chunks must not read
    rows that another one writes between `begun` and its end.
    """

    def __init__(self, home: torch.device, device: torch.device):
        self.home, self.device = home, device
        self.apart = home != device
        self.computing = torch.cuda.current_stream(device) if self.apart and device.type == "cuda" else None
        self.inward, self.outward = (torch.cuda.Stream(device) if self.computing else None for _ in range(2))
        self.puts: list[Future[None]] = []

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The time in which rows come and go; at its end all are where they belong."""
        if not self.apart:
            yield
            return
        with ThreadPoolExecutor(1) as self.bringing, ThreadPoolExecutor(1) as self.taking:
            yield
            for put in self.puts:
                put.result()
            self.puts.clear()

    def ahead(self, items: Iterable[Item], fetch: Callable[[Item], Fetched]) -> Iterator[Fetched]:
        """`fetch` of each item, one item ahead of its use, in a stream of its own."""
        if not self.apart:
            yield from map(fetch, items)
            return

        def beside(item: Item) -> Fetched:
            with torch.cuda.stream(self.inward) if self.inward else nullcontext():
                return fetch(item)

        coming: Future[Fetched] | None = None
        for item in items:
            ready = [self._arrived(coming)] if coming else []  # before the next one is on its way
            coming = self.bringing.submit(beside, item)
            yield from ready
        if coming:
            yield self._arrived(coming)

    def _arrived(self, coming: "Future[Fetched]") -> Fetched:
        fetched = coming.result()
        if self.computing and self.inward:
            self.computing.wait_stream(self.inward)
            for leaf in tree_leaves(fetched):
                if torch.is_tensor(leaf) and leaf.is_cuda:
                    leaf.record_stream(self.computing)
        return fetched

    def rows(self, source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """source (L, ...) at index (n, l) -> (n, l, ...) on the device."""
        if not self.apart:
            return source.index_select(0, index.flatten()).unflatten(0, index.shape)  # thrice as fast as source[index]
        shape = (*index.shape, *source.shape[1:])
        gathered = torch.empty(shape, dtype=source.dtype, pin_memory=self.computing is not None)
        torch.index_select(source, 0, index.flatten(), out=gathered.view(-1, *source.shape[1:]))
        return gathered.to(self.device, non_blocking=True)

    def put(self, index: torch.Tensor, *written: tuple[torch.Tensor, torch.Tensor]) -> None:
        """target (L, ...) at index (n, l) = made (n, l, ...) for each (target, made) of a chunk, at the latest when
        `begun` ends."""
        if not self.apart:
            for target, made in written:
                target[index] = made.type_as(target)
            return
        if self.puts:  # one chunk's at a time, so that memory stays bounded
            self.puts.pop().result()
        here, there = [], None
        if self.computing and self.outward:
            self.outward.wait_stream(self.computing)
            with torch.cuda.stream(self.outward):
                for target, made in written:
                    here.append(torch.empty(made.shape, dtype=target.dtype, pin_memory=True))
                    here[-1].copy_(made, non_blocking=True)
                    made.record_stream(self.outward)
                there = torch.cuda.Event()
                there.record(self.outward)
        else:
            here = [made.to(self.home, target.dtype) for target, made in written]

        def scatter() -> None:
            if there:
                there.synchronize()
            for (target, _), made in zip(written, here, strict=True):
                target.index_copy_(0, index.flatten(), made.flatten(0, 1))

        self.puts.append(self.taking.submit(scatter))
