"""Scalar functions of the kernels, from sums and products where an instruction is only near."""

import triton
import triton.language as tl


@triton.jit
def rint(x):
    """float32 rounded to an integer, ties to even, for |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def tanh(x):
    """By exp where that loses nothing, and by a series near zero."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    s = x * x
    near = x * (
        1.0 + s * (-0.3333333333 + s * (0.1333333333 + s * (-0.0539682540 + s * 0.0218694885)))
    )
    return tl.where(x != x, x, tl.where(tl.abs(x) < 0.25, near, far))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation of that name of float32."""
    if ACT == "silu":
        return x * sigmoid(x)
    elif ACT == "relu":
        return tl.where(x < 0, 0.0, x)
    elif ACT == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), which is x where exp(x) is all there is."""
    return tl.where(x > 20.0, x, log1p(tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def log1p(y):
    """log(1 + y), also of a y that 1 + y loses."""
    u = 1.0 + y
    return tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def power(x, y):
    """x to the power y, of a negative x where y is whole."""
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y)
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    size = tl.where(y == 0.0, 1.0, tl.where(y == 1.0, tl.abs(x), size))
    size = tl.where(y == 2.0, x * x, size)
    signed = tl.where((x < 0) & odd, -size, size)
    return tl.where((x < 0) & (whole == 0), float("nan"), signed)


@triton.jit
def turned_sine(x, quarters):
    """sin(x + quarters * pi / 2) in float64, for |x| < 2**26.

    The angle less a multiple of pi / 2, which is held in three parts whose products with that
    multiple are exact, then Taylor's series.
    """
    shifted = x * 0.6366197723675814 + 6755399441055744.0
    n = shifted - 6755399441055744.0
    quarter = n.to(tl.int64) + quarters
    r = ((x - n * 1.570796325802803) - n * 9.920935739593517e-10) - n * 5.721188726109832e-18
    s = r * r
    odd = s * -7.6471637318198165e-13 + 1.6059043836821613e-10
    odd = odd * s - 2.5052108385441720e-08
    odd = odd * s + 2.7557319223985893e-06
    odd = odd * s - 1.9841269841269841e-04
    odd = odd * s + 8.3333333333333332e-03
    odd = odd * s - 1.6666666666666666e-01
    sine = odd * s * r + r
    even = s * 4.7794773323873853e-14 - 1.1470745597729725e-11
    even = even * s + 2.0876756987868099e-09
    even = even * s - 2.7557319223985888e-07
    even = even * s + 2.4801587301587302e-05
    even = even * s - 1.3888888888888889e-03
    even = even * s + 4.1666666666666664e-02
    cosine = even * s * s + (1.0 - 0.5 * s)
    value = tl.where((quarter & 1) != 0, cosine, sine)
    return tl.where((quarter & 2) != 0, -value, value)


@triton.jit
def rounded(x, KIND: tl.constexpr):
    """float32 rounded to a type by its name, and back; "" and fp32 leave it as it is."""
    if KIND == "bf16":
        return x.to(tl.bfloat16).to(tl.float32)
    elif KIND == "fp16":
        return x.to(tl.float16).to(tl.float32)
    else:
        return x
