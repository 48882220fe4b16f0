"""Top-level statements as pieces: what each means, what it names, and what no run can reach in it.

What goes: comments, docstrings, the `case` of a record that does not live, the branch of an
`isinstance` that asks for one, and the defaults of a record's fields, which count by their values.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from orchestrator.study.meaning.inert import (
    has_plain_decorators,
    is_inert,
    is_plain_test,
    is_plain_value,
)
from orchestrator.study.meaning.modules import Module, Place, Sources, bound_in
from orchestrator.study.meaning.records import Records

# Fields of a node that say where it stands, or how it was spelt.
_NO_MEANING = frozenset({"ctx", "type_comment", "kind", "type_ignores"})
# Their answer depends on a class alone; they make none of its objects.
_QUESTIONS = frozenset({"isinstance", "issubclass"})
_WORD = re.compile(r"[A-Za-z_]\w*")
_RUN: Place = ("contract.recipe", "RunConfig")


@dataclass
class Piece:
    """text: the same for two statements that mean the same; empty if nothing of it can run.

    names: every word in it, also of its texts. makes: records that it may make. values: modules
    that it hands on as a value, so that any name in them may be meant. asked: records that decided
    what was left out, and whether each of them lived.
    """

    text: str = ""
    names: set[str] = field(default_factory=set)
    makes: set[Place] = field(default_factory=set)
    values: set[str] = field(default_factory=set)
    asked: dict[Place, bool] = field(default_factory=dict)


class Pieces:
    """Makes each piece once for all runs that it is the same for.

    known: whether a statement is one that was looked at (see `known`). Such a one makes of a run's
    record no other than the trial's own.
    """

    def __init__(
        self, sources: Sources, records: Records, known: Callable[[Module, ast.stmt], bool]
    ) -> None:
        self.sources, self.records, self.known = sources, records, known
        self._made: dict[ast.stmt, list[Piece]] = {}

    def of(
        self, module: Module, statement: ast.stmt, alive: frozenset[Place], made: frozenset[Place]
    ) -> Piece:
        """alive: the records that may exist. made: of these, the ones that code itself may make."""
        known = self._made.setdefault(statement, [])
        for piece in known:
            if all((place in alive) == lives for place, lives in piece.asked.items()):
                return piece
        piece = Piece()
        spelling = _Spelling(self, module, statement, alive, piece)
        place = (module.name, getattr(statement, "name", ""))
        if isinstance(statement, ast.ClassDef) and place in self.records.bases:
            piece.text = spelling.record(statement, place, place in made)
            return piece  # it is another one when it is made
        piece.text = spelling.statements([statement]) + spelling.scope()
        known.append(piece)
        return piece

    def named_records(self, place: Place) -> frozenset[Place]:
        """The record at this place, or all that a value with a name is made of."""
        found, todo, gone = set[Place](), [place], set[Place]()
        while todo:
            one = todo.pop()
            if one in gone:
                continue
            gone.add(one)
            if one in self.records.bases:
                inner = f"{one[1]}."  # classes in a class
                found |= {r for r in self.records.bases if r == one or r[1].startswith(inner)}
            else:
                todo += self._members(one)
        return frozenset(found)

    def _members(self, place: Place) -> Iterator[Place]:
        module = self.sources.module(place[0]) if place[0] in self.sources else None
        for statement in module.definitions.get(place[1], ()) if module is not None else ():
            assert module is not None
            if isinstance(statement, ast.Assign | ast.AnnAssign) and is_inert(module, statement):
                for inner in ast.walk(statement.value) if statement.value else ():
                    path = path_of(inner) if isinstance(inner, ast.Name | ast.Attribute) else None
                    for dotted in module.dotted(path) if path else ():
                        yield from self.sources.places(dotted)


class _Spelling:
    """Writes nodes in one way, whichever way they were written, and notes what they name.

    `ast.dump` would do, were it the same in every version of Python.
    """

    def __init__(
        self,
        pieces: Pieces,
        module: Module,
        statement: ast.stmt,
        alive: frozenset[Place],
        piece: Piece,
    ) -> None:
        self._pieces, self._module, self._statement = pieces, module, statement
        self._alive, self._piece = alive, piece
        self._types = False  # in an annotation or a question, which makes no object
        self._functions = 0  # around the node
        self._annotation = False  # that pydantic may read
        self._fields_of_a_run = False  # in a record whose values are the run's
        self._dropped: list[ast.AST] = []

    def record(self, statement: ast.ClassDef, place: Place, made: bool) -> str:
        """A record of runs: nothing of a dead one; of one that no code makes, no defaults."""
        if self._is_dead(place) and is_inert(self._module, statement):
            return ""
        if made:
            return self.statements([statement])
        written = self._pieces.records.written.get(place, frozenset())
        body = [
            _without_default(part) if _is_field(self._module, part, written) else part
            for part in statement.body
        ]
        for part in statement.body:  # what a default names stays named
            self._piece.names |= _words(part)
        self._fields_of_a_run = True
        shell = ast.ClassDef(
            statement.name, statement.bases, statement.keywords, body, statement.decorator_list
        )
        return self._node(shell)

    def scope(self) -> str:
        """What dropped code does to the function around it: names of its own, or a generator."""
        if not self._dropped:
            return ""
        lost = Counter(name for node in self._dropped for name in bound_in(node))
        every = Counter(bound_in(self._statement))
        names = sorted(name for name, count in lost.items() if every[name] <= count)
        kinds = {
            type(inner).__name__
            for node in self._dropped
            for inner in ast.walk(node)
            if isinstance(inner, ast.Yield | ast.YieldFrom | ast.Await | ast.Global | ast.Nonlocal)
        }
        return f"scope({names},{sorted(kinds)})" if names or kinds else ""

    def statements(self, parts: Iterable[ast.stmt]) -> str:
        return ";".join(self._node(part) for part in self._that_count(parts))

    def _that_count(self, parts: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
        for part in parts:
            match part:
                case ast.Expr(value=ast.Constant(value=str())) | ast.Pass():
                    continue  # a docstring, or nothing
                case ast.If(test=test) if self._is_no(test):
                    self._dropped += [test, *part.body]
                    yield from self._that_count(part.orelse)
                case _:
                    yield part

    # --- nodes ------------------------------------------------------------------------------

    def _any(self, value: object) -> str:
        match value:
            case ast.AST():
                return self._node(value)
            case list() if value and isinstance(value[0], ast.stmt):
                return f"[{self.statements(value)}]"
            case list():
                return f"[{','.join(self._any(item) for item in value)}]"
            case None:
                return "-"  # a key of `{**x}` is missing, and `{None: x}` has one
            case _:
                self._piece.names |= set(_WORD.findall(value)) if isinstance(value, str) else set()
                return f"{type(value).__name__}:{value!r}"

    def _node(self, node: ast.AST) -> str:
        match node:
            case ast.Name() | ast.Attribute():
                return self._reference(node)
            case ast.IfExp() if self._is_no(node.test):
                self._dropped += [node.test, node.body]
                return self._node(node.orelse)
            case ast.Match():
                cases = [case for case in node.cases if not self._is_never(case.pattern)]
                self._dropped += [case for case in node.cases if case not in cases]
                return f"Match({self._node(node.subject)},{self._any(cases)})"
            case ast.match_case(pattern=ast.MatchOr(patterns=ways)):
                kept = [way for way in ways if not self._is_never(way)]
                pattern = kept[0] if len(kept) == 1 else ast.MatchOr(kept)
                return self._fields(ast.match_case(pattern, node.guard, node.body))
            case ast.MatchClass():
                return self._fields(node, types=("cls",))
            case ast.Call(func=ast.Name(id=question), args=[what, classes]) if (
                question in _QUESTIONS and _is_classes(classes)
            ):
                return f"Call({question},{self._node(what)},{self._of_types(classes)})"
            case ast.Constant(value=str(text)) if self._annotation:
                self._quoted(text)
                return self._fields(node)
            case ast.ClassDef():
                return self._class(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                # a decorator may read the annotations, and make what they name
                return self._function(node, read=not has_plain_decorators(self._module, node))
            case ast.Lambda():
                return self._function(node, read=False)
            case ast.arg() if not self._annotation:
                return self._fields(node, types=("annotation",))
            case ast.AnnAssign() if self._functions:
                return self._fields(node, types=("annotation",))
            case ast.AnnAssign() if node is not self._statement:
                before, self._annotation = self._annotation, not self._fields_of_a_run
                text = self._fields(node, types=("annotation",) if self._fields_of_a_run else ())
                self._annotation = before
                return text
            case ast.AnnAssign() | ast.Assign() if node is self._statement:
                # a union of records has a name; whoever uses it as a value may make them
                types = ("annotation", "value") if is_inert(self._module, node) else ()
                return self._fields(node, types=types)
            case ast.BinOp(op=ast.BitOr()) if self._types:
                return self._union(node)
            case _:
                return self._fields(node)

    def _fields(self, node: ast.AST, *, types: tuple[str, ...] = ()) -> str:
        parts = []
        for name in sorted(node._fields):
            value = getattr(node, name, None)
            if name not in _NO_MEANING and value is not None and value != []:
                text = self._of_types(value) if name in types else self._any(value)
                parts.append(f"{name}={text}")
        return f"{type(node).__name__}({','.join(parts)})"

    def _function(self, node: ast.AST, read: bool) -> str:
        functions, annotation = self._functions, self._annotation
        self._functions, self._annotation = functions + 1, read
        text = self._fields(node, types=() if read else ("returns",))
        self._functions, self._annotation = functions, annotation
        return text

    def _class(self, node: ast.ClassDef) -> str:
        """A dataclass makes nothing of its annotations; pydantic makes what they name."""
        functions = self._functions
        plain = any(
            path_of(one.func if isinstance(one, ast.Call) else one) == ["dataclass"]
            and self._module.imports.get("dataclass") == {"dataclasses.dataclass"}
            for one in node.decorator_list
        )
        self._functions = int(plain)  # so that its annotations are read as a function's
        text = self._fields(node)
        self._functions = functions
        return text

    def _quoted(self, annotation: str) -> None:
        """An annotation in quotes names what it would name without them."""
        with suppress(SyntaxError, ValueError):  # it is a text and no annotation
            self._node(ast.parse(annotation, mode="eval").body)

    def _of_types(self, value: object) -> str:
        before, self._types = self._types, True
        text = self._any(value)
        self._types = before
        return text

    def _union(self, node: ast.BinOp) -> str:
        """`A | B` without the records that do not live."""
        kept = [part for part in alternatives(node) if not self._is_dead(self._place_of(part))]
        return f"Union({','.join(map(self._node, kept))})"

    # --- references -------------------------------------------------------------------------

    def _reference(self, node: ast.expr) -> str:
        path = path_of(node)
        if path is None:  # an attribute of something that is no name
            assert isinstance(node, ast.Attribute)
            self._piece.names.add(node.attr)
            return f"{self._node(node.value)}.{node.attr}"
        self._piece.names |= set(path)
        for dotted in self._module.dotted(path):
            for place in self._pieces.sources.places(dotted):
                if not place[1]:
                    self._piece.values.add(place[0])
                given = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                if not (self._types or given or self._reads_the_run(place)):
                    self._piece.makes |= self._pieces.named_records(place)
        return ".".join(path)

    def _reads_the_run(self, place: Place) -> bool:
        """Whether only the trial's own run, or one that equals it, is read here."""
        return place == _RUN and self._pieces.known(self._module, self._statement)

    def _place_of(self, node: ast.expr) -> Place | None:
        """The one place that a name leads to; None if it may be another one too."""
        path = path_of(node)
        if path is None or path[0] in self._module.rebound:
            return None
        dotted = self._module.dotted(path)
        return self._pieces.sources.the_place(dotted[0]) if len(dotted) == 1 else None

    # --- what no value of the run reaches ---------------------------------------------------

    def _is_dead(self, place: Place | None) -> bool:
        """Whether no object of this record may exist."""
        if place is None or place not in self._pieces.records.bases:
            return False
        lives = place in self._alive
        self._piece.asked[place] = lives
        return not lives

    def _is_no(self, test: ast.expr) -> bool:
        """Whether the test asks for a dead record, and does nothing but ask."""
        match test:
            case ast.Call(func=ast.Name(id="isinstance"), args=[what, classes], keywords=[]):
                asked = classes.elts if isinstance(classes, ast.Tuple) else alternatives(classes)
                return (
                    path_of(what) is not None
                    and bool(asked)
                    and all(self._is_dead(self._place_of(one)) for one in asked)
                )
            case ast.BoolOp(op=ast.And(), values=[first, *rest]):
                # what stands behind a "no" is not evaluated; what stands before it must be plain
                return self._is_no(first) or (
                    is_plain_test(self._module, first) and self._is_no_all(rest)
                )
            case _:
                return False

    def _is_no_all(self, values: list[ast.expr]) -> bool:
        both = ast.BoolOp(ast.And(), values)
        return self._is_no(both if len(values) > 1 else values[0])

    def _is_never(self, pattern: ast.pattern) -> bool:
        match pattern:
            case ast.MatchClass(cls=cls):
                return self._is_dead(self._place_of(cls))
            case ast.MatchOr(patterns=patterns):
                return all(self._is_never(part) for part in patterns)
            case ast.MatchAs(pattern=ast.pattern() as inner):
                return self._is_never(inner)
            case _:
                return False


def _is_field(module: Module, part: ast.stmt, written: frozenset[str]) -> bool:
    """Whether its value is in the JSON of a run, and making the class does nothing else with it."""
    match part:
        case ast.AnnAssign(target=ast.Name(id=name), value=value):
            return name in written and (
                value is None or is_plain_value(module, value, records=True)
            )
        case _:
            return False


def _without_default(part: ast.stmt) -> ast.stmt:
    """A field with its name, its annotation and what else its `Field` says."""
    assert isinstance(part, ast.AnnAssign)
    value: ast.expr | None = None
    if isinstance(part.value, ast.Call) and path_of(part.value.func) == ["Field"]:
        rest = [k for k in part.value.keywords if k.arg not in ("default", "default_factory")]
        value = ast.Call(part.value.func, [], rest)
    return ast.AnnAssign(part.target, part.annotation, value, part.simple)


def _is_classes(node: ast.expr) -> bool:
    """Whether a question asks for classes by their names alone."""
    match node:
        case ast.Tuple(elts=parts):
            return all(map(_is_classes, parts))
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return _is_classes(left) and _is_classes(right)
        case _:
            return path_of(node) is not None


def _words(node: ast.AST) -> set[str]:
    """Every identifier in a node, also in its texts."""
    words = set[str]()
    for inner in ast.walk(node):
        for name in inner._fields:
            value = getattr(inner, name, None)
            words |= set(_WORD.findall(value)) if isinstance(value, str) else set()
    return words


def alternatives(node: ast.expr) -> list[ast.expr]:
    """`A | B` as its parts."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*alternatives(node.left), *alternatives(node.right)]
    return [node]


def path_of(node: ast.AST) -> list[str] | None:
    """`a.b.c` as its names; None for an attribute of anything but a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else None
