"""What a statement means: its text without comments and docstrings, and whatever it refers to.

What no value of a run can reach is left out of it: a `case` of another record, and the branch of an
`if isinstance(...)` of one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from orchestrator.study.meaning.modules import Module, Names, Place, Sources

# Fields of a node that say where it stands, or how it was spelt.
_NO_MEANING = frozenset({"ctx", "type_comment", "kind", "type_ignores"})
# Their answer depends on a class alone; they make none of its objects.
_QUESTIONS = frozenset({"isinstance", "issubclass"})
_NAME_ANYTHING = frozenset({"eval", "exec", "__import__", "globals"})
# Pydantic runs them when it reads or writes a record: a run in the ledger was read already, and
# what came out of it is in its values.
_READING = frozenset(
    {"field_validator", "model_validator", "validator", "field_serializer", "model_serializer"}
)


@dataclass
class View:
    """text: the same for two statements that mean the same.

    refers: the places it names. mentions: words by which it may read a field or a method of an
    object; `a*` and `*a` stand for names that it puts together. loads: modules that it imports when
    it runs. makes: records of a run that it makes itself. words: all texts in it. hands_on: whether
    it may give all fields of a record to a call. names_anything: whether a text may name code in
    it. asked: records that decided what counts, and whether each of them lived.
    """

    text: str = ""
    refers: set[Place] = field(default_factory=set)
    mentions: set[str] = field(default_factory=set)
    loads: set[str] = field(default_factory=set)
    makes: set[Place] = field(default_factory=set)
    words: set[str] = field(default_factory=set)
    hands_on: bool = False
    names_anything: bool = False
    asked: dict[Place, bool] = field(default_factory=dict)


class Words:
    """Which names reached code may read an object by. mentions: as in `View`."""

    def __init__(self, mentions: Iterable[str]) -> None:
        self.all = frozenset(mentions)
        self._begins = tuple(word[:-1] for word in self.all if word.endswith("*"))
        self._ends = tuple(word[1:] for word in self.all if word.startswith("*"))

    def __contains__(self, name: str) -> bool:
        return name in self.all or name.startswith(self._begins) or name.endswith(self._ends)


@dataclass(frozen=True)
class Records:
    """The records of a run. bases: of each record, the records that it derives from, and itself.

    whole: the run's own record. read: the places that read the trial's own run, or one that must be
    equal to it, so that they make no other record than the run holds.
    """

    bases: Mapping[Place, frozenset[Place]]
    whole: Place
    read: frozenset[Place]


class Views:
    """Views of statements, each made once for all runs that it means the same to."""

    def __init__(self, sources: Sources, records: Records) -> None:
        self._sources, self._records = sources, records
        self._made: dict[tuple[ast.stmt, frozenset[str] | None], list[View]] = {}
        self._places: dict[str, frozenset[Place]] = {}

    def of(
        self,
        module: Module,
        statement: ast.stmt,
        alive: frozenset[Place],
        mentioned: Words | None = None,
    ) -> View:
        """The statement of that module, where these records live (`Records.bases` included).

        mentioned: of a record that only the run's values make, its methods of these names. Its
        fields count by their values, wherever the run is written down.
        """
        parts = [statement]
        kept: frozenset[str] | None = None
        if mentioned is not None:
            assert isinstance(statement, ast.ClassDef)
            parts = [part for part in statement.body if _is_behaviour(part, mentioned)]
            kept = frozenset(ast.unparse(part) for part in parts)
        made = self._made.setdefault((statement, kept), [])
        for view in made:
            if all((place in alive) == lives for place, lives in view.asked.items()):
                return view
        view, imports = View(), Names()
        if statement in module.importing:
            module.imports_of(statement, imports, view.loads)
        spelling = _Spelling(_Scope(self, module, statement, imports, alive), view)
        view.text = spelling.statements(parts)
        made.append(view)
        return view

    def places(self, dotted: str) -> frozenset[Place]:
        if dotted not in self._places:
            self._places[dotted] = self._sources.resolve(dotted)
        return self._places[dotted]

    def is_record(self, place: Place) -> bool:
        return place in self._records.bases

    def reads_the_run(self, place: Place, by: Place) -> bool:
        return place == self._records.whole and by in self._records.read


@dataclass(frozen=True)
class _Scope:
    """Where names of a statement come from. imports: those of the statement itself."""

    views: Views
    module: Module
    statement: ast.stmt
    imports: Names
    alive: frozenset[Place]

    def dotted(self, path: list[str]) -> list[str]:
        """What the first name of a path may stand for, with the rest of the path.

        Empty for a local name or a built-in one.
        """
        name = path[0]
        roots = {*self.imports.get(name, ()), *self.module.imports.get(name, ())}
        if name in self.module.definitions:
            roots.add(f"{self.module.name}.{name}")
        return sorted(".".join([root, *path[1:]]) for root in roots)

    @property
    def place(self) -> Place:
        return self.module.name, getattr(self.statement, "name", "")


def _is_behaviour(part: ast.stmt, mentioned: Words) -> bool:
    match part:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            if any(_last_name(decorator) in _READING for decorator in part.decorator_list):
                return False
            return name in mentioned or (name.startswith("__") and name.endswith("__"))
        case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
            return "ClassVar" in ast.unparse(annotation) and name in mentioned
        case ast.Assign(targets=[ast.Name(id="model_config")]):
            return False
        case ast.Expr(value=ast.Constant()) | ast.Pass():
            return False
        case _:
            return True


def _last_name(node: ast.expr) -> str:
    """`b` of `a.b`, `b(...)` and `b[...]`."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=inner) | ast.Subscript(value=inner):
            return _last_name(inner)
        case _:
            return ""


class _Spelling:
    """Writes nodes in one way, whichever way they were written, and notes what they refer to.

    `ast.dump` would do, were it the same in every version of Python.
    """

    def __init__(self, scope: _Scope, seen: View) -> None:
        self._scope, self._views, self._seen = scope, scope.views, seen
        self._asking = False  # in the second argument of isinstance, or in a pattern
        self._depth = 0  # of functions
        self._plain = False  # in a dataclass, which makes nothing of its annotations

    def statements(self, parts: Iterable[ast.stmt]) -> str:
        return ";".join(text for part in self._that_count(parts) if (text := self._node(part)))

    def _that_count(self, parts: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
        for part in parts:
            match part:
                case ast.Expr(value=ast.Constant(value=str())) | ast.Pass():
                    continue  # a docstring, or nothing
                case ast.If(test=test) if self._is_no(test):
                    yield from self._that_count(part.orelse)
                case _:
                    yield part

    # --- nodes ------------------------------------------------------------------------------

    def _any(self, value: object) -> str:
        if isinstance(value, ast.AST):
            return self._node(value)
        if isinstance(value, list):
            if value and isinstance(value[0], ast.stmt):
                return f"[{self.statements(value)}]"
            return f"[{','.join(self._any(item) for item in value)}]"
        return f"{type(value).__name__}:{value!r}"

    def _node(self, node: ast.AST) -> str:
        match node:
            case ast.Import() | ast.ImportFrom():
                return ""  # what it gives stands where it is used
            case ast.Name() | ast.Attribute():
                return self._reference(node)
            case ast.Constant():
                self._note_text(node.value)
                return f"{type(node.value).__name__}:{node.value!r}"
            case ast.IfExp() if self._is_no(node.test):
                return self._node(node.orelse)
            case ast.Match():
                cases = [case for case in node.cases if not self._is_never(case.pattern)]
                return f"Match({self._node(node.subject)},{self._any(cases)})"
            case ast.MatchOr():
                kept = [part for part in node.patterns if not self._is_never(part)]
                return self._any(kept) if len(kept) > 1 else self._node(kept[0])
            case ast.MatchClass():
                self._seen.mentions |= set(node.kwd_attrs)
                return self._fields(node, asked=("cls",))
            case ast.Call(func=ast.Name(id=question)) if question in _QUESTIONS:
                return f"Call({question},{self._asked(node.args)})"
            case ast.JoinedStr():
                return self._put_together(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                self._depth += 1
                text = self._fields(node, quiet=("returns",))
                self._depth -= 1
                return text
            case ast.ClassDef():
                before, self._plain = self._plain, _is_dataclass(node)
                text = self._fields(node)
                self._plain = before
                return text
            case ast.arg():
                return self._fields(node, quiet=("annotation",))
            case ast.AnnAssign() if self._depth or self._plain:
                return self._fields(node, quiet=("annotation",))
            case ast.keyword():
                self._seen.mentions.add(node.arg or "")
                self._seen.hands_on |= node.arg is None and self._is_a_whole_record(node.value)
                return self._fields(node)
            case _:
                return self._fields(node)

    def _fields(
        self, node: ast.AST, *, asked: tuple[str, ...] = (), quiet: tuple[str, ...] = ()
    ) -> str:
        """asked: fields with the classes of a question. quiet: ones that refer to nothing."""
        parts = []
        for name in sorted(node._fields):
            value = getattr(node, name, None)
            if name in _NO_MEANING or value is None or value == []:
                continue
            if name in quiet:
                text = _Spelling(self._scope, View())._any(value)
            elif name in asked:
                text = self._asked(value)
            else:
                text = self._any(value)
            parts.append(f"{name}={text}")
        return f"{type(node).__name__}({','.join(parts)})"

    def _asked(self, value: object) -> str:
        before, self._asking = self._asking, True
        text = self._any(value)
        self._asking = before
        return text

    def _note_text(self, value: object) -> None:
        if isinstance(value, str):
            self._seen.words.add(value)
            self._seen.mentions |= {part for part in value.split(".") if part.isidentifier()}

    def _put_together(self, node: ast.JoinedStr) -> str:
        """An f-string may be half of a name that `getattr` asks for."""
        for part in node.values:
            if isinstance(part, ast.Constant) and isinstance(text := part.value, str):
                self._seen.mentions |= {f"{text}*", f"*{text}"} if text.isidentifier() else set()
        return self._fields(node)

    # --- references -------------------------------------------------------------------------

    def _reference(self, node: ast.expr) -> str:
        path = _path_of(node)
        if path is None:  # an attribute of something that is no name
            assert isinstance(node, ast.Attribute)
            self._seen.mentions.add(node.attr)
            return f"{self._node(node.value)}.{node.attr}"
        self._seen.mentions |= set(path)
        named_by_text = path[0] in _NAME_ANYTHING or path[-1] == "import_module"
        self._seen.names_anything |= named_by_text
        dotted = self._scope.dotted(path)
        if not dotted:
            return ".".join(path)
        places = sorted({place for way in dotted for place in self._views.places(way)})
        for place in places:
            self._note(place)
        return f"<{dotted}={places}>"

    def _note(self, place: Place) -> None:
        is_record = self._views.is_record(place)
        if is_record and (self._asking or self._views.reads_the_run(place, self._scope.place)):
            return
        self._seen.refers.add(place)
        if is_record:
            self._seen.makes.add(place)

    def _is_a_whole_record(self, node: ast.expr) -> bool:
        """Whether `**node` may be every field of a run's record, each without its name."""
        for inner in ast.walk(node):
            match inner:
                case ast.Call(func=ast.Name(id="vars"), args=[ast.Name(id="self")]):
                    continue
                case ast.Call(func=ast.Name(id="vars" | "dict")):
                    return True
                case ast.Attribute(attr="model_dump" | "sparse" | "__dict__" | "model_fields"):
                    place = self._place_of(inner.value)
                    if place is None or self._views.is_record(place):
                        return True
        return False

    def _place_of(self, node: ast.expr) -> Place | None:
        """The one place that a name leads to; None if it may be another one too."""
        path = _path_of(node)
        dotted = self._scope.dotted(path) if path else []
        places = self._views.places(dotted[0]) if len(dotted) == 1 else frozenset()
        return next(iter(places)) if len(places) == 1 else None

    # --- what no value of the run reaches ---------------------------------------------------

    def _is_no(self, test: ast.expr) -> bool:
        """Whether the test asks for a record that the run has not, perhaps among other things."""
        match test:
            case ast.Call(func=ast.Name(id="isinstance"), args=[_, classes]):
                asked = classes.elts if isinstance(classes, ast.Tuple) else _alternatives(classes)
                return all(self._never(self._place_of(one)) for one in asked)
            case ast.BoolOp(op=ast.And(), values=values):
                return any(self._is_no(value) for value in values)
            case _:
                return False

    def _never(self, place: Place | None) -> bool:
        """Whether no object in the run is of this class."""
        if place is None or not self._views.is_record(place):
            return False
        lives = place in self._scope.alive
        self._seen.asked[place] = lives
        return not lives

    def _is_never(self, pattern: ast.AST) -> bool:
        match pattern:
            case ast.match_case():
                return self._is_never(pattern.pattern)
            case ast.MatchClass(cls=cls):
                return self._never(self._place_of(cls))
            case ast.MatchOr(patterns=patterns):
                return all(self._is_never(part) for part in patterns)
            case ast.MatchAs(pattern=ast.pattern() as inner):
                return self._is_never(inner)
            case _:
                return False


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(_last_name(decorator) == "dataclass" for decorator in node.decorator_list)


def _alternatives(node: ast.expr) -> list[ast.expr]:
    """`A | B` as its parts."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_alternatives(node.left), *_alternatives(node.right)]
    return [node]


def _path_of(node: ast.expr) -> list[str] | None:
    """`a.b.c` as its names; None for an attribute of anything but a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else None
