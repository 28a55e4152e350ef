"""Sources of classes: what a forward does with the modules under it; nothing is run.

A path is attribute names from ``self`` on, with ``ANY`` for an index. All methods that the forward
comes to are read; names that stand for modules are followed through plain assignments and loops.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass, field

from torch import nn

ANY = "*"
Path = tuple[str, ...]

# What is asked of a weight without computing with it.
METADATA = frozenset(
    {"data_ptr", "device", "dim", "dtype", "element_size", "get_device", "grad", "is_contiguous"}
    | {"is_cpu", "is_cuda", "is_floating_point", "is_leaf", "is_meta", "is_quantized", "itemsize"}
    | {"layout", "nbytes", "ndim", "nelement", "new_empty", "new_full", "new_ones", "new_tensor"}
    | {"new_zeros", "numel", "quant_state", "requires_grad", "requires_grad_", "shape", "size"}
    | {"storage_offset", "stride", "untyped_storage"}
)
VIEWS = frozenset({"data", "T", "mT"})
# Functions that look at an argument, or take its kind from it.
LOOKS = frozenset(
    {"bool", "empty_like", "full_like", "getattr", "hasattr", "id", "is_floating_point"}
    | {"is_tensor", "isinstance", "len", "numel", "ones_like", "print", "rand_like"}
    | {"randn_like", "repr", "str", "to", "type", "type_as", "zeros_like"}
)
_BINDS = (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.For, ast.AsyncFor, ast.comprehension)
_PARTS = frozenset({"children", "modules", "named_children", "named_modules", "_modules", "values"})
_SAME = frozenset({"enumerate", "iter", "list", "reversed", "sorted", "tuple", "zip"})


@dataclass
class Uses:
    """Uses of modules, by path: weights read, in which method; modules called, or handed on.

    changed: weights that are written in place.
    """

    read: dict[Path, str] = field(default_factory=dict)
    changed: dict[Path, str] = field(default_factory=dict)
    called: set[Path] = field(default_factory=set)
    handed: set[Path] = field(default_factory=set)


@functools.cache
def read_uses(kind: type) -> Uses | None:
    """Reads what a class's forward does with modules under it; None where there is no source."""
    uses, todo, done = Uses(), [("forward", 0)], set()
    while todo:
        name, start = todo.pop()
        definition = _find_definition(kind, name, start)
        if definition is None or definition[:2] in done:
            continue
        done.add(definition[:2])
        tree = _parse(definition[2])
        if tree is None:
            return None
        reader = _Reader(tree, name, uses)
        todo += [(method, 0) for method in sorted(reader.methods)]
        todo += [(method, definition[1] + 1) for method in sorted(reader.inherited)]
    return uses


def _find_definition(kind: type, name: str, start: int) -> tuple[str, int, object] | None:
    """Finds the function ``name`` in a class, from that place of its bases on, and its place."""
    for place, base in enumerate(kind.__mro__[start:], start):
        value = vars(base).get(name)
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        is_function = callable(value) and inspect.isfunction(getattr(value, "__wrapped__", value))
        if is_function or (value is not None and name == "forward"):
            return None if base in (nn.Module, object) else (name, place, value)
    return None


def _parse(function: object) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    try:
        source = inspect.getsource(inspect.unwrap(function))  # pyright: ignore[reportArgumentType]
        tree = ast.parse(textwrap.dedent(source)).body[0]
    except (OSError, TypeError, SyntaxError, ValueError, IndexError):
        return None
    return tree if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)) else None


class _Reader:
    """A reader of one method, for ``uses``. methods, inherited: what it comes to beside."""

    def __init__(
        self, tree: ast.FunctionDef | ast.AsyncFunctionDef, method: str, uses: Uses
    ) -> None:
        self.method, self.uses = method, uses
        self.methods: set[str] = set()
        self.inherited: set[str] = set()
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        self.names: dict[str, set[Path]] = {arguments[0].arg: {()}} if arguments else {}
        nodes = list(ast.walk(tree))
        self.above = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
        # Twice: a name may be given to another before it is given itself, in a loop.
        for node in nodes * 2:
            self._bind(node)
        for node in nodes:
            self._use(node)

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind_names(target, node.value, self._find_paths)
        elif isinstance(node, (ast.NamedExpr, ast.AnnAssign)) and node.value is not None:
            self._bind_names(node.target, node.value, self._find_paths)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            self._bind_loop(node.target, node.iter)

    def _bind_names(self, target: ast.expr, value: ast.expr, paths: object) -> None:
        if isinstance(target, ast.Name):
            self.names.setdefault(target.id, set()).update(paths(value))  # pyright: ignore
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts):  # noqa: B905
                self._bind_names(one, other, paths)

    def _bind_loop(self, target: ast.expr, source: ast.expr) -> None:
        """Gives the names of a loop what they come to stand for."""
        function = _get_called_name(source)
        arguments = source.args if isinstance(source, ast.Call) else []
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        if function == "zip":
            for part, one in zip(parts, arguments):  # noqa: B905
                self._bind_loop(part, one)
        elif function == "enumerate" and arguments:
            self._bind_loop(parts[-1], arguments[0])
        else:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    paths = {(*path, ANY) for path in self._find_paths(source)}
                    self.names.setdefault(name.id, set()).update(paths)

    def _find_paths(self, node: ast.AST) -> set[Path]:
        """Finds the modules or tensors that an expression stands for."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, set())
        if isinstance(node, ast.Attribute):
            inner = self._find_paths(node.value)
            weights = {path for path in inner if path[-1:] == ("weight",)}
            views = weights if node.attr in VIEWS else set()
            return views | {(*path, node.attr) for path in inner - weights}
        if isinstance(node, ast.Subscript):
            inner = self._find_paths(node.value)
            if isinstance(node.slice, ast.Slice):
                return inner
            return {(*path, ANY) for path in inner if path[-1:] != ("weight",)}
        if isinstance(node, ast.IfExp):
            return self._find_paths(node.body) | self._find_paths(node.orelse)
        if isinstance(node, ast.Call):
            function, first = _get_called_name(node), node.args[0] if node.args else None
            if function == "getattr" and first is not None and len(node.args) > 1:
                attribute = node.args[1]
                name = attribute.value if isinstance(attribute, ast.Constant) else ANY
                return {(*path, str(name)) for path in self._find_paths(first)}
            if function in _SAME and first is not None:
                return self._find_paths(first)
            if function in _PARTS and isinstance(node.func, ast.Attribute):
                return self._find_paths(node.func.value)
        return set()

    def _use(self, node: ast.AST) -> None:
        if isinstance(node, ast.Attribute) and _get_called_name(node.value) == "super":
            self.inherited.add(node.attr)
        above = self.above.get(node)
        continued = isinstance(above, (ast.Attribute, ast.Subscript)) and above.value is node
        for path in self._find_paths(node):
            if path[-1:] == ("weight",):
                if len(path) > 1 and self._is_computed_with(node):
                    is_written = isinstance(above, ast.Attribute) and above.attr.endswith("_")
                    uses = self.uses.changed if is_written else self.uses.read
                    uses.setdefault(path[:-1], self.method)
            elif not continued:
                self._add_module(node, path)
        if isinstance(node, ast.Attribute) and node.attr in _PARTS:
            self.uses.handed |= {(*path, ANY) for path in self._find_paths(node.value)}

    def _add_module(self, node: ast.AST, path: Path) -> None:
        if len(path) == 1:
            self.methods.add(path[0])
        above = self.above.get(node)
        owner = path[:-1] if path[-1:] in (("forward",), ("__call__",)) else path
        if isinstance(above, ast.Call) and above.func is node:
            self.uses.called.add(owner)
        elif (
            not isinstance(above, _BINDS)
            and not isinstance(getattr(node, "ctx", None), ast.Store)
            and _get_called_name(above) not in _SAME
            and not self._is_looked_at(node)
        ):
            # Of itself too: a function that has the module may call what is in it.
            self.uses.handed.add(owner)

    def _is_computed_with(self, node: ast.AST) -> bool:
        """Whether a weight's numbers are wanted there, and not only its kind."""
        above = self.above.get(node)
        if isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
            return False
        if isinstance(above, ast.Attribute):
            is_stored = not isinstance(above.ctx, ast.Load)
            return not is_stored and above.attr not in METADATA | VIEWS
        if isinstance(above, ast.Assign) and any(isinstance(t, ast.Name) for t in above.targets):
            return False  # what is done with the name counts
        return not self._is_looked_at(node)

    def _is_looked_at(self, node: ast.AST) -> bool:
        above = self.above.get(node)
        if isinstance(above, ast.Compare):
            return all(isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)) for op in above.ops)
        if isinstance(above, ast.Call):
            return above.func is not node and _get_called_name(above) in LOOKS
        return isinstance(above, (ast.If, ast.UnaryOp, ast.Assert, ast.Expr, ast.FormattedValue))


def _get_called_name(node: ast.AST | None) -> str | None:
    """Returns the last name of what is called, where something is."""
    if not isinstance(node, ast.Call):
        return None
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
