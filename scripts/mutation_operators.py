"""The faults that ``mutate.py`` plants: mutmut's operators, and a few that aim at arithmetic."""

from __future__ import annotations

import ast
import builtins
import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """One fault: the file (relative to the root), the lines of the statement it sits in, and the new source."""

    path: str
    line: int
    lines: range
    operator: str
    code: str = field(repr=False)
    diff: str

    @property
    def id(self) -> str:
        return hashlib.sha256(f"{self.path}\n{self.code}".encode()).hexdigest()[:16]


def own_operators(modules: set[str]) -> list[tuple[Any, Callable[[Any], Iterator[Any]]]]:
    """Faults of numerical code that mutmut does not plant: swapped and dropped operands, dropped calls and
    statements, conditions that always or never hold. modules: names whose attributes are functions, not methods.
    """
    import libcst as cst

    asymmetric = (cst.Subtract, cst.Divide, cst.FloorDivide, cst.Modulo, cst.Power, cst.MatrixMultiply)

    def swap_operands(node: cst.BinaryOperation) -> Iterator[cst.CSTNode]:
        if isinstance(node.operator, asymmetric):
            yield node.with_changes(left=parenthesised(node.right), right=parenthesised(node.left))

    def drop_operand(node: cst.BinaryOperation | cst.BooleanOperation) -> Iterator[cst.CSTNode]:
        yield parenthesised(node.left)
        yield parenthesised(node.right)

    def swap_arguments(node: cst.Call) -> Iterator[cst.CSTNode]:
        for i, (a, b) in enumerate(zip(node.args, node.args[1:], strict=False)):
            if a.keyword is b.keyword is None and not a.star and not b.star:
                swapped = [a.with_changes(value=b.value), b.with_changes(value=a.value)]
                yield node.with_changes(args=[*node.args[:i], *swapped, *node.args[i + 2 :]])

    def drop_call(node: cst.Call) -> Iterator[cst.CSTNode]:
        """x.f(...) -> x and f(x, ...) -> x."""
        if isinstance(node.func, cst.Attribute):
            receiver = node.func.value
            if not (isinstance(receiver, cst.Name) and receiver.value in modules | {"self"}):
                yield receiver
                return
        elif not isinstance(node.func, cst.Name) or hasattr(builtins, node.func.value):
            return
        if node.args and node.args[0].keyword is None and not node.args[0].star:
            yield parenthesised(node.args[0].value)

    def force_condition(node: cst.If | cst.While) -> Iterator[cst.CSTNode]:
        yield node.with_changes(test=cst.Name("False"))
        if isinstance(node, cst.If):
            yield node.with_changes(test=cst.Name("True"))

    def drop_statement(node: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
        only = node.body[0]
        if isinstance(only, cst.AugAssign) or (
            isinstance(only, cst.Expr) and isinstance(only.value, cst.Call)
        ):
            yield node.with_changes(body=[cst.Pass()])

    return [
        (cst.BinaryOperation, swap_operands),
        ((cst.BinaryOperation, cst.BooleanOperation), drop_operand),
        (cst.Call, swap_arguments),
        (cst.Call, drop_call),
        ((cst.If, cst.While), force_condition),
        (cst.SimpleStatementLine, drop_statement),
    ]


def parenthesised(node: Any) -> Any:
    import libcst as cst

    return node if node.lpar else node.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])


def is_skipped(node: Any) -> bool:
    """What no test of behaviour can see: imports, annotations, docstrings, ``__all__``, type aliases, and the body
    of ``if TYPE_CHECKING``."""
    import libcst as cst

    if isinstance(node, (cst.Annotation, cst.Import, cst.ImportFrom)):
        return True
    if isinstance(node, cst.If):
        return isinstance(node.test, cst.Name) and node.test.value == "TYPE_CHECKING"
    if isinstance(node, cst.Expr):
        return isinstance(node.value, (cst.SimpleString, cst.ConcatenatedString))
    if isinstance(node, cst.Assign) and isinstance(target := node.targets[0].target, cst.Name):
        union = isinstance(node.value, cst.BinaryOperation) and isinstance(node.value.operator, cst.BitOr)
        alias = union or isinstance(node.value, cst.Subscript)
        return target.value == "__all__" or (
            alias and bool(re.fullmatch(r"[A-Z][A-Za-z]*[a-z]", target.value))
        )
    return False


def imported_names(tree: ast.Module) -> set[str]:
    """Names of imported modules, as far as an import says so: ``import a.b as c``, ``from . import d``."""
    return {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.module)
        for alias in node.names
    }


def sites(
    node: Any, positions: Any, lines: range, in_raise: bool = False
) -> Iterator[tuple[Any, range, bool]]:
    """Each node that may be mutated, with the lines of its statement and whether it words an error."""
    import libcst as cst

    if is_skipped(node):
        return
    position = positions.get(node)
    if isinstance(node, cst.SimpleStatementLine):
        lines = range(position.start.line, position.end.line + 1)
    elif isinstance(node, cst.BaseCompoundStatement):
        first = [positions[d].start.line for d in getattr(node, "decorators", ())]
        lines = range(min([position.start.line, *first]), positions[node.body].start.line + 1)
    in_raise = in_raise or isinstance(node, cst.Raise)
    yield node, lines, in_raise
    for child in node.children:
        yield from sites(child, positions, lines, in_raise)


def mutants_of(path: str, source: str) -> list[Mutant]:
    """All mutants of a file in the order of its text, without repetitions and such as do not compile."""
    try:
        import libcst as cst
        from libcst.metadata import MetadataWrapper, PositionProvider
        from mutmut.mutation.mutators import mutation_operators
    except ModuleNotFoundError as error:
        raise SystemExit(f"mutation testing needs {error.name}: pip install 'mutmut>=3.8'") from error
    wrapper = MetadataWrapper(cst.parse_module(source))
    module, positions = wrapper.module, wrapper.resolve(PositionProvider)
    parts = [module.code_for_node(statement) for statement in module.body]
    header = source[: source.index(parts[0])]
    if not source.startswith(header + "".join(parts)):
        raise ValueError(f"{path} cannot be cut into statements")
    footer = source[len(header) + sum(map(len, parts)) :]
    operators = [*mutation_operators, *own_operators(imported_names(ast.parse(source)))]
    source_lines = source.splitlines()
    found: list[Mutant] = []
    for i, statement in enumerate(module.body):
        seen = {ast.dump(ast.parse(parts[i]))}
        before, after = header + "".join(parts[:i]), "".join(parts[i + 1 :]) + footer
        for node, lines, in_raise in sites(statement, positions, range(0)):
            for new, name in variants(node, operators, in_raise):
                code = module.code_for_node(
                    statement.deep_replace(node, new) if node is not statement else new
                )
                if (tree := compiled(code)) is None or tree in seen:
                    continue
                seen.add(tree)
                whole = before + code + after
                diff, line = difference(source_lines, whole.splitlines(), lines.start)
                if "# pragma: no mutate" not in source_lines[line - 1]:
                    found.append(Mutant(path, line, lines, name, whole, diff))
    return found


def variants(node: Any, operators: Iterable[tuple[Any, Any]], in_raise: bool) -> Iterator[tuple[Any, str]]:
    """Mutated nodes and their operators' names. Of mutmut's three mutants of a string one is taken, of the wording
    of an error none; an argument is removed where others remain, and None only where it is the only one."""
    import libcst as cst

    for kind, operator in operators:
        if isinstance(node, kind):
            mutated = iter(operator(node))
            if isinstance(node, cst.BaseString):
                mutated = iter([]) if in_raise else islice(mutated, 1)
            elif operator.__name__ == "operator_arg_removal" and len(node.args) > 1:
                mutated = iter(list(mutated)[-len(node.args) :])
            for new in mutated:
                yield new, operator.__name__.removeprefix("operator_")


def compiled(code: str) -> str | None:
    """The syntax tree of a statement, None where it does not compile."""
    try:
        tree = ast.parse(code)
        compile(tree, "<mutant>", "exec")
    except (SyntaxError, ValueError):
        return None
    return ast.dump(tree)


def difference(old: list[str], new: list[str], line: int) -> tuple[str, int]:
    """(changed lines with - and +, the first of them in the old text)."""
    shown = list(difflib.unified_diff(old, new, n=0, lineterm=""))[2:]
    first = re.match(r"@@ -(\d+)", shown[0]) if shown else None
    return "\n".join(text for text in shown if not text.startswith("@@")), int(first[1]) if first else line
