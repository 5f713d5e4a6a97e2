"""A law from its formula: ``R0 - A/(N_RS + g1*N_LLM)**a - B/N_RS**b``.

The text is read as Python's grammar for arithmetic and built into a sympy expression node by node: nothing of it is ever run.
Which parameters enter linearly is found from the expression; only the others are searched.
"""

import ast
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import sympy as sp

from fit import jets
from fit.errors import FitError
from fit.jets import Jet
from fit.laws import EXPONENT_BOUNDS, Law, Logs, Nonlinear, Shape, Term, Thetas

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "log": sp.log,
    "log2": lambda x: sp.log(x) / sp.log(2),
    "exp": sp.exp,
    "sqrt": sp.sqrt,
    "min": sp.Min,
}
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}
_LONGEST = 500
SIZES = ("N", "D", "C")
"""Names are sizes that are one of these or begin with one and an underscore (N_RS, D_train); all others are parameters."""


def parse(text: str) -> Law:
    """The law of a formula, ``L = ...`` or ``R = ...``; of a right side alone the response is R where it has an R0, else L.

    FitError names what can't be read, or a formula that is no sum of linear parameters times shapes.
    """
    left, equals, right = text.partition("=")
    response, body = (left.strip(), right) if equals else ("", text)
    if equals and not response.isidentifier():
        raise FitError(f"law {text!r}: {response!r} is not the name of a metric, such as L or R")
    expression = sp.expand(_expression(body, text), power_base=False, power_exp=False)
    names = sorted(str(s) for s in expression.free_symbols)
    sizes = tuple(name for name in names if _is_size(name))
    if not sizes:
        raise FitError(f"law {text!r}: no size in it; sizes are named N, D or C, or begin so: N_RS")
    if not response:
        response = "R" if "R0" in names else "L"
    terms, thetas = _split(expression, [name for name in names if not _is_size(name)], text)
    return Law(text, text if equals else f"{response} = {text.strip()}", response, sizes, terms, thetas)


def _is_size(name: str) -> bool:
    return name.split("_", 1)[0] in SIZES


def _expression(body: str, text: str) -> Any:
    if len(body) > _LONGEST:
        raise FitError(f"law {text[:40]!r}...: {len(body)} characters; a formula has {_LONGEST} at most")
    try:
        tree = ast.parse(body.strip().replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FitError(f"law {text!r}: cannot be read ({getattr(error, 'msg', error)})") from None
    return _build(tree, text)


def _build(node: ast.AST, text: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and math.isfinite(node.value):
        return sp.Rational(str(node.value))
    if isinstance(node, ast.Name):
        return sp.Symbol(node.id, positive=True)  # sizes are, and of parameters only those in powers matter
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = _build(node.operand, text)
        return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        one, other = _build(node.left, text), _build(node.right, text)
        if isinstance(node.op, ast.Pow) and other.is_number:
            _check_power(one, other, text)
        if isinstance(node.op, ast.Div) and other == 0:
            raise FitError(f"law {text!r}: divides by zero")
        return _OPERATORS[type(node.op)](one, other)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords:
        if node.func.id != "min" and len(node.args) != 1:
            raise FitError(f"law {text!r}: {node.func.id} takes one argument")
        return _FUNCTIONS[node.func.id](*(_build(arg, text) for arg in node.args))
    what = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
    raise FitError(f"law {text!r}: {what!r} has no place in a formula; numbers, names, + - * / **, {', '.join(_FUNCTIONS)}")


def _check_power(base: Any, exponent: Any, text: str) -> None:
    """Powers of numbers are worked out on the spot, so that towers of them would take for ever."""
    if abs(exponent) > 20:
        raise FitError(f"law {text!r}: a power of {exponent} is more than a law needs")
    if base.is_number and abs(float(base)) > 1e12:
        raise FitError(f"law {text!r}: {base} to a power is more than a law needs")
    if base == 0 and exponent < 0:
        raise FitError(f"law {text!r}: divides by zero")


def _split(expression: Any, params: list[str], text: str) -> tuple[tuple[Term, ...], tuple[Nonlinear, ...]]:
    """Terms and nonlinear parameters. A parameter is linear where every part of the sum that has it is it times a rest without
    any linear parameter; of two multiplied with each other, the first by name is."""
    parts = list(sp.Add.make_args(expression))
    linear: list[str] = []
    for name in sorted(params, key=lambda n: (not n[0].isupper(), n)):  # A*b: by the field's custom coefficients are capitals
        symbol = sp.Symbol(name, positive=True)
        holders = [part for part in parts if part.has(symbol)]
        rests = [part / symbol for part in holders]
        alone = not any(part.has(sp.Symbol(other, positive=True)) for part in holders for other in linear)
        if alone and not any(rest.has(symbol) for rest in rests):
            linear.append(name)
    terms, used = [], []
    for name in linear:
        symbol = sp.Symbol(name, positive=True)
        holders = [part for part in parts if part.has(symbol)]
        used += holders
        terms.append(_term(name, sp.Add(*(part / symbol for part in holders)), [p for p in params if p not in linear]))
    if rest := [part for part in parts if part not in used]:
        raise FitError(f"law {text!r}: {sp.Add(*rest)} has no coefficient; give every term one, such as A*...")
    thetas = tuple(_nonlinear(name, expression) for name in params if name not in linear)
    return tuple(terms), thetas


def _term(name: str, shape: Any, params: list[str]) -> Term:
    sign = -1 if shape.could_extract_minus_sign() else 1
    shape = sign * shape
    thetas = tuple(p for p in params if shape.has(sp.Symbol(p, positive=True)))
    if shape == 1:
        return Term(name, sign=sign)
    # In a product of powers, all positive, an exponent and its coefficient move together: such terms are centred by logarithms.
    if thetas and not shape.has(sp.log, sp.Min) and not isinstance(shape, sp.Add):
        return Term(name, log_shape=_walk(sp.expand_log(sp.log(shape), force=True)), sign=sign, lower=0.0, thetas=thetas)
    return Term(name, _walk(shape), sign=sign, thetas=thetas)


def _nonlinear(name: str, expression: Any) -> Nonlinear:
    """What kind of parameter it is, from where it stands: in an exponent, times a size within a sum, or elsewhere."""
    symbol = sp.Symbol(name, positive=True)
    powers = [p for p in expression.atoms(sp.Pow) if p.exp.has(symbol)]
    if powers:
        base = next((str(s) for p in powers for s in sorted(p.base.free_symbols, key=str) if _is_size(str(s))), "")
        return Nonlinear(name, "exponent", *EXPONENT_BOUNDS, size=base)
    for total in expression.atoms(sp.Add):
        with_it = [part for part in total.args if part.has(symbol)]
        others = [str(part) for part in total.args if part.is_Symbol and _is_size(str(part))]
        ratio = with_it[0] / symbol if len(with_it) == 1 else None
        if others and ratio is not None and ratio.is_Symbol and _is_size(str(ratio)):
            return Nonlinear(name, "coupling", 0.0, np.inf, str(ratio), others[0])
    return Nonlinear(name, "free", -np.inf, np.inf)


def _walk(expression: Any) -> Shape:
    """The expression as a function of logarithms of sizes and of parameters."""
    if expression.is_Symbol:
        name = str(expression)
        if _is_size(name):
            return lambda logs, _: jets.constant(np.exp(logs[name]))
        return lambda _, p: p[name]
    if expression.is_number:
        value = float(expression)
        return lambda logs, _: jets.constant(np.full_like(next(iter(logs.values())), value))
    if isinstance(expression, sp.log) and expression.args[0].is_Symbol and _is_size(str(expression.args[0])):
        size = str(expression.args[0])
        return lambda logs, _: jets.constant(logs[size])
    inner = [_walk(arg) for arg in expression.args]
    if isinstance(expression, sp.Add):
        return _folded(inner, lambda a, b: a + b)
    if isinstance(expression, sp.Mul):
        return _folded(inner, lambda a, b: a * b)
    if isinstance(expression, sp.Min):
        return _folded(inner, jets.minimum)
    if isinstance(expression, sp.Pow):
        return lambda logs, p: jets.power(inner[0](logs, p), inner[1](logs, p))
    function = {sp.log: jets.log, sp.exp: jets.exp}[type(expression)]
    return lambda logs, p: function(inner[0](logs, p))


def _folded(parts: Iterable[Shape], operator: Callable[[Jet, Jet], Jet]) -> Shape:
    first, *rest = parts

    def shape(logs: Logs, p: Thetas) -> Jet:
        out = first(logs, p)
        for part in rest:
            out = operator(out, part(logs, p))
        return out

    return shape
