"""Matrix products, laid out as each backend makes them fast.

Factors have the type that matrices multiply in, and sums are float32's. On an accelerator what
lies between products has that type too. On a CPU that stays float32: all but products takes longer
there in a narrower one. And of the products in bfloat16 only those are fast that give their sums as
they are, and whose left factor's rows lie along what is summed (jaxlib 0.10; on a CPU with AVX-512
BF16 such a product takes .54 of float32's time, and any other 1.1).
"""

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pujax.models.tiles import on_cpu

PLAIN, ALONG_ROWS, OVER_ROWS = (((((i,), (j,)), ((), ()))) for i, j in ((1, 0), (1, 1), (0, 0)))
"""What products sum over: a row and a column, two rows, or two columns."""

COLUMNS = 256  # that are transposed at once, at most


def times(
    x: Float[Array, "*N I"], kernels: tuple[Float[Array, "I _"], ...], dtype: Any
) -> tuple[Float[Array, "*N _"], ...]:
    """x @ kernel of each kernel, multiplied in `dtype`, in the type of `x`.

    The rows are in one dimension: the gradient of a kernel sums over them, and over several XLA
    would first transpose the wider factor, at a tenth of a layer's time on a CPU.
    """
    rows = x.reshape(-1, x.shape[-1])
    products: tuple[Array, ...]
    if x.dtype == dtype:
        products = tuple(rows @ kernel.astype(dtype) for kernel in kernels)
    else:
        products = _narrow(rows, kernels, jnp.dtype(dtype))
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in products)


def rounded(x: Float[Array, "*N"], dtype: Any) -> Float[Array, "*N"]:
    """`x` in float32, with the values that it has in `dtype`.

    So a product of few rows has the same factors as one of many. On a CPU it is slower in bfloat16
    than in float32: 16 responses of 64 tokens took 4.4 s, and 3.8.
    """
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), kind.nexp, kind.nmant)


def streamed(x: Float[Array, "*N I"], rows: Float[Array, "O I"], out: Any) -> Array:
    """x @ rowsᵀ [*N, O] for few x; on a CPU with the kernel as the product's left operand.

    That is the one that XLA's products on a CPU read where it lies; a right operand they pack
    anew each time. The barriers keep XLA from turning the product round.
    """
    if not on_cpu():
        return jnp.einsum("...i,oi->...o", x, rows, preferred_element_type=out)
    flat = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    y = jax.lax.optimization_barrier(jax.lax.dot(rows, flat, preferred_element_type=out))
    return y.T.reshape(*x.shape[:-1], rows.shape[0])


def summed_over_rows(x: Float[Array, "*N I"], y: Float[Array, "*N O"]) -> Float[Array, "I O"]:
    """xᵀ @ y in float32, of factors of one type."""
    x, y = (each.reshape(-1, each.shape[-1]) for each in (x, y))
    return _over_rows(x)(y)


def _over_rows(x: Float[Array, "N I"]) -> Callable[[Array], Array]:
    """What gives xᵀ @ y in float32, for several y of the type of `x`.

    Of few columns a CPU has the same sum of float32 factors, at a cost that is nothing either way:
    a transpose of them XLA would fold into a product that its runtime doesn't know.
    """
    if not on_cpu() or x.dtype == jnp.float32:
        return lambda y: _summed(x, y, OVER_ROWS)
    if x.shape[1] <= COLUMNS:
        return lambda y: _summed(x.astype(jnp.float32), y.astype(jnp.float32), OVER_ROWS)
    columns = transposed(x)
    return lambda y: _summed(columns, y)


def transposed(x: Float[Array, "N I"]) -> Float[Array, "I N"]:
    """The transpose as it lies in memory, made of some columns at a time.

    Of all at once XLA would make `x` anew on the way, column by column, at four times the cost.
    """
    rows, width = x.shape
    size = max(size for size in range(1, min(width, COLUMNS) + 1) if width % size == 0)

    def columns(start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1).T

    return jax.lax.map(columns, jnp.arange(0, width, size)).reshape(width, rows)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow(x: Float[Array, "N I"], kernels: tuple[Array, ...], dtype: Any) -> tuple[Array, ...]:
    return _narrow_forward(x, kernels, dtype)[0]


def _narrow_forward(x: Array, kernels: tuple[Array, ...], dtype: Any):
    x = x.astype(dtype)
    return tuple(_summed(x, kernel.astype(dtype)) for kernel in kernels), (x, kernels)


def _narrow_backward(dtype: Any, saved: tuple[Any, ...], cotangents: tuple[Array, ...]):
    x, kernels = saved
    d_products = [jax.lax.optimization_barrier(d.astype(dtype)) for d in cotangents]
    both = list(zip(d_products, kernels, strict=True))
    parts = [_summed(d, kernel.astype(dtype), ALONG_ROWS) for d, kernel in both]
    over_rows = _over_rows(x.astype(dtype))
    return reduce(add, parts), tuple(over_rows(d).astype(kernel.dtype) for d, kernel in both)


_narrow.defvjp(_narrow_forward, _narrow_backward)


def _summed(x: Array, y: Array, dimensions: Any = PLAIN) -> Array:
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)
