"""Launches of the spectral-norm kernels: tables of pointers, lists of tiles, grids. No checks, no choice.

A table holds addresses, so it belongs to the very storages it was made for: every launch compares addresses, shapes and
strides with those of the table, and makes another where they differ.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sagan_kernels.ops import configs
from sagan_kernels.ops.launching import launch
from sagan_kernels.ops.spectral_norm_layout import Item, Layout, Rule

_KEPT = 8  # tables kept: networks take turns between training and evaluation, and buffers of gradients between two
_BY_COLUMNS, _ROWS_ALIGNED, _ALIGNED, _CAPPED = 1, 2, 4, 8  # as in kernels.spectral_norm


class Plans:
    """The tables of the last launches. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Any, _Plan] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Plans, ()

    def launch(
        self, items: Sequence[Item], *, iterate: bool, store: bool
    ) -> tuple["LaunchedState", list[Tensor]]:
        """W/σ of weights of one device, dtype, dtype of result and number of iterations, in three launches."""
        key = (iterate, items[0].dtype, *(_identity(item) for item in items))
        plan = _recall(self._plans, key)
        if plan is None:
            plan = _remember(self._plans, key, _Plan(items, iterate))
        return plan.launch(store)


class LaunchedState:
    """What the backward of one launch needs."""

    def __init__(self, plan: "_Plan", y: Tensor, z: Tensor, sigma: Tensor, out: Tensor) -> None:
        self.plan, self.y, self.z, self.sigma, self.out = plan, y, z, sigma, out
        self.rules = plan.rules
        self.layouts = plan.layouts
        self.us = list(y.split([lies.R for lies in plan.layouts]))
        self.vs = list(z.split([lies.C for lies in plan.layouts]))

    def gradients(
        self, grads: Sequence[Tensor | None], weights: Sequence[Tensor], outs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The weights' gradients in two launches."""
        return self.plan.gradients(grads, weights, self)

    def split(self) -> list["_LayerState"]:
        """One state for each weight, whose gradient takes PyTorch's operators."""
        return [
            _LayerState([rule], [u], [v], [lies], sigma)
            for rule, u, v, lies, sigma in zip(
                self.rules, self.us, self.vs, self.layouts, self.sigma.unbind(), strict=True
            )
        ]


class _LayerState:
    def __init__(
        self, rules: list[Rule], us: list[Tensor], vs: list[Tensor], layouts: list[Layout], sigma: Tensor
    ) -> None:
        self.rules, self.us, self.vs, self.layouts, self.sigma = rules, us, vs, layouts, sigma

    def gradients(
        self, grads: Sequence[Tensor | None], weights: Sequence[Tensor], outs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """DW = (G - <G, W/σ> u vᵀ)/σ of one weight, in the order of its memory."""
        (grad,), (weight,), (out,), (lies,) = grads, weights, outs, self.layouts
        if grad is None:
            return [None]
        sums = self.us[0].dtype
        flat = (_like(weight, grad).as_strided((lies.A, lies.R, lies.K), _strides(lies))).to(sums)
        divides = (self.sigma >= 1) if self.rules[0].cap else (self.sigma != 0)
        divisor = torch.where(divides, self.sigma, 1)
        dot = (flat * out.as_strided(flat.shape, _strides(lies))).sum().where(divides, 0)
        outer = self.us[0][None, :, None] * self.vs[0].view(lies.A, 1, lies.K)
        result = torch.empty_like(weight)
        torch.div(flat - dot * outer, divisor, out=result.as_strided(flat.shape, _strides(lies)))
        return [result]

    def split(self) -> list["_LayerState"]:
        return [self]


class _Plan:
    """Tables for one list of weights."""

    def __init__(self, items: Sequence[Item], iterate: bool) -> None:
        weights, us, vs, self.rules, dtypes, self.layouts = (
            list(column) for column in zip(*items, strict=True)
        )
        self.dtype, self.iterate = dtypes[0], iterate
        self.device, self.element = weights[0].device, weights[0].dtype
        if _capturing(self.device):
            raise RuntimeError(
                "spectral_normalize: tables of the weights must be there before a CUDA graph is captured, got none for "
                "these; run the model once first, forward and backward"
            )
        self.sums = torch.float64 if self.element == torch.float64 else torch.float32
        self.shapes = [(w.shape, w.stride()) for w in weights]
        self.tiling = configs.SPECTRAL_NORM
        self.u_total = sum(lies.R for lies in self.layouts)
        self.v_total = sum(lies.C for lies in self.layouts)
        self.out_at, self.out_total = _offsets([w.numel() for w in weights], 16)
        self._grad_tables: OrderedDict[Any, Tensor] = OrderedDict()

        u_at, _ = _offsets([lies.R for lies in self.layouts], 1)
        v_at, _ = _offsets([lies.C for lies in self.layouts], 1)
        vector = 16 // weights[0].element_size()
        rows = []
        for i, (w, rule, lies) in enumerate(zip(weights, self.rules, self.layouts, strict=True)):
            aligned = w.data_ptr() % 16 == 0
            flags = _BY_COLUMNS * (rule.order == "vu") | _ALIGNED * aligned | _CAPPED * rule.cap
            flags |= _ROWS_ALIGNED * (aligned and lies.A == 1 and lies.K % vector == 0)
            addresses = (w.data_ptr(), us[i].data_ptr(), vs[i].data_ptr())
            places = (u_at[i], v_at[i], self.out_at[i])
            rows.append([*addresses, lies.A, lies.R, lies.K, *places, lies.inner, w.numel(), flags])
        self.layers = self._upload(rows, torch.int64)

        by_rows, by_columns = self._product_tiles()
        self.first_row_tile = self._upload(_firsts(by_rows), torch.int32)
        self.first_column_tile = self._upload(_firsts(by_columns), torch.int32)
        self.row_tiles, self.column_tiles = (sum(map(len, tiles)) for tiles in (by_rows, by_columns))
        # in the first launch of an iteration every layer has its tiles of one kind, in the second of the other
        columns_first = [rule.order == "vu" for rule in self.rules]
        if not iterate:
            columns_first = [not tiles for tiles in by_rows]
        self.products = [
            self._upload(self._longest_first(by_rows, by_columns, kinds), torch.int32)
            for kinds in (columns_first, [not first for first in columns_first])
        ]

        block = self.tiling.block
        elements = [[(i, b) for b in range(-(-w.numel() // block))] for i, w in enumerate(weights)]
        self.element_tiles = self._upload([tile for tiles in elements for tile in tiles], torch.int32)
        self.first_element_tile = self._upload(_firsts(elements), torch.int32)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # other streams may use the tables

    def launch(self, store: bool) -> tuple[LaunchedState, list[Tensor]]:
        from sagan_kernels.kernels.spectral_norm import normalize_kernel, product_kernel

        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, device=self.device)

        t = self.tiling
        y, z, sigma = (empty(n, self.sums) for n in (self.u_total, self.v_total, len(self.layouts)))
        y_partial, z_partial = (empty(n, torch.float64) for n in (self.row_tiles, self.column_tiles))
        out = empty(self.out_total, self.dtype)
        firsts = (self.first_row_tile, self.first_column_tile)
        vectors = (y, z, y_partial, z_partial)
        element = _triton_name(self.element)
        for n in range(2 * self.rules[0].n_power_iterations if self.iterate else 1):
            tiles = self.products[n % 2]
            _launch(
                product_kernel, len(tiles), (self.layers, tiles, *firsts, *vectors),
                STORED=n == 0, DOT=not self.iterate, ELEMENT=element,
                VECTOR=16 // self.element.itemsize, ROWS=t.rows, ROW_SPAN=t.row_span, COLUMNS=t.columns,
                COLUMN_SPAN=t.column_span, BLOCK_T=t.block_t, num_warps=t.warps,
            )  # fmt: skip
        _launch(
            normalize_kernel, len(self.element_tiles),
            (self.layers, self.element_tiles, *firsts, *vectors, sigma, out),
            ITERATED=self.iterate, STORE=store, ELEMENT=element, BLOCK=t.block, BLOCK_T=t.block_t, num_warps=t.warps,
        )  # fmt: skip
        return LaunchedState(self, y, z, sigma, out), self._parts(out)

    def gradients(
        self, grads: Sequence[Tensor | None], weights: Sequence[Tensor], state: LaunchedState
    ) -> list[Tensor | None]:
        from sagan_kernels.kernels.spectral_norm import gradient_dot_kernel, weight_gradient_kernel

        given = [
            None if grad is None else _like(weight, grad.to(self.dtype))
            for grad, weight in zip(grads, weights, strict=True)
        ]
        table = self._grad_table([0 if grad is None else grad.data_ptr() for grad in given])
        partial = torch.empty(len(self.element_tiles), dtype=self.sums, device=self.device)
        result = torch.empty(self.out_total, dtype=self.element, device=self.device)
        programs, t = len(self.element_tiles), self.tiling
        grad_type = _triton_name(self.dtype)
        _launch(
            gradient_dot_kernel, programs, (self.layers, self.element_tiles, table, state.out, partial),
            GRAD=grad_type, BLOCK=t.block, num_warps=t.warps,
        )  # fmt: skip
        _launch(
            weight_gradient_kernel, programs,
            (
                self.layers, self.element_tiles, self.first_element_tile, table,
                state.y, state.z, state.sigma, partial, result,
            ),
            GRAD=grad_type, BLOCK=t.block, BLOCK_T=t.block_t, num_warps=t.warps,
        )  # fmt: skip
        parts = self._parts(result)
        return [None if grad is None else part for grad, part in zip(given, parts, strict=True)]

    def _product_tiles(self) -> tuple[list[Any], list[Any]]:
        """For each layer its tiles by rows and by columns: (layer, start, slot, kind)."""
        by_rows: list[list[tuple[int, int, int, int]]] = []
        by_columns: list[list[tuple[int, int, int, int]]] = []
        for tiles, kind, step in ((by_rows, 0, self.tiling.rows), (by_columns, 1, self.tiling.columns)):
            slot = 0
            for i, lies in enumerate(self.layouts):
                # without iterations one product is enough: the one that reads the weight along its memory
                wanted = self.iterate or (lies.K == 1 and lies.A > 1) == (kind == 1)
                starts = range(0, (lies.C if kind else lies.R) if wanted else 0, step)
                tiles.append([(i, start, slot + n, kind) for n, start in enumerate(starts)])
                slot += len(starts)
        return by_rows, by_columns

    def _longest_first(self, by_rows: list[Any], by_columns: list[Any], columns: list[bool]) -> list[Any]:
        """The tiles of each layer, those with most work before the others so that no long one starts last."""

        def work(i: int) -> int:
            return (
                self.tiling.columns * self.layouts[i].R
                if columns[i]
                else self.tiling.rows * self.layouts[i].C
            )

        order = sorted(range(len(columns)), key=work, reverse=True)
        return [tile for i in order for tile in (by_columns if columns[i] else by_rows)[i]]

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """Every layer's part of `flat`, as tensors of their own: views would share one version counter."""
        return [
            flat.new_empty(0).set_(flat.untyped_storage(), at, shape, stride)
            for at, (shape, stride) in zip(self.out_at, self.shapes, strict=True)
        ]

    def _grad_table(self, addresses: list[int]) -> Tensor:
        if _capturing(self.device):
            # a graph may not copy from the host, so each number is part of a launch, which replays as it was recorded
            table = torch.empty(len(addresses), dtype=torch.int64, device=self.device)
            for i, address in enumerate(addresses):
                table[i].fill_(address)
            return table
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        key = (*addresses, stream)
        table = _recall(self._grad_tables, key)
        if table is None:
            table = _remember(self._grad_tables, key, self._upload(addresses, torch.int64))
        return table

    def _upload(self, numbers: list[Any], dtype: torch.dtype) -> Tensor:
        table = torch.tensor(numbers, dtype=dtype)
        if self.device.type == "cuda":
            table = table.pin_memory().to(self.device, non_blocking=True)
        return table


def _launch(kernel: Any, programs: int, tensors: tuple[Tensor, ...], **named: Any) -> None:
    launch(kernel, tensors, (programs, *named.values()), lambda: (programs, (), named))


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _identity(item: Item) -> Any:
    """What a table was made for."""
    weight, u, v, rule, *_ = item
    return weight.dtype, weight.data_ptr(), u.data_ptr(), v.data_ptr(), weight.shape, weight.stride(), rule


def _like(weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient with the weight's strides."""
    if grad.stride() == weight.stride():
        return grad
    return torch.empty_like(weight, dtype=grad.dtype).copy_(grad)


def _strides(lies: Layout) -> tuple[int, int, int]:
    return lies.R * lies.K, lies.K, 1


def _offsets(counts: list[int], multiple: int) -> tuple[list[int], int]:
    """Where each part begins, and where the last one ends, in parts of a multiple."""
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + -(-count // multiple) * multiple)
    return offsets[:-1], offsets[-1]


def _firsts(tiles: list[Any]) -> list[int]:
    """How many tiles come before those of each layer, and the number of all."""
    firsts, _ = _offsets([len(of_layer) for of_layer in tiles], 1)
    return [*firsts, sum(map(len, tiles))]


def _triton_name(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def _recall(kept: OrderedDict[Any, Any], key: Any) -> Any:
    if key in kept:
        kept.move_to_end(key)
    return kept.get(key)


def _remember(kept: OrderedDict[Any, Any], key: Any, value: Any) -> Any:
    kept[key] = value
    if len(kept) > _KEPT:
        kept.popitem(last=False)
    return value
