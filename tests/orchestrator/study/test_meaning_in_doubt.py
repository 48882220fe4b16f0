"""Code that is found by a way that no name shows: whatever changes a result changes the identity.

Each case is a program of a trial in two versions that compute two results.
"""

from __future__ import annotations

import pytest

from orchestrator.study.code_package import installed
from orchestrator.study.meaning.reach import Meaning
from tests.orchestrator.study.test_meaning import ARMS

CONTRACT = {name: text for name, text in installed().items() if name.startswith("contract/")}
PROGRAM = b"from model.build import build\ndef main(run): return build(run.model)\n"
CASES = {
    "an import that may fail": (
        "try:\n    from model.a import f\nexcept ImportError:\n    from model.b import f\n"
        "def build(c): return f()",
        "try:\n    from model.b import f\nexcept ImportError:\n    from model.a import f\n"
        "def build(c): return f()",
    ),
    "an import of a function": (
        "def build(c):\n    from model.a import f\n    return f()",
        "def build(c):\n    from model.b import f\n    return f()",
    ),
    "the last of two imports": (
        "from model.a import f\nfrom model.b import f\ndef build(c): return f()",
        "from model.b import f\nfrom model.a import f\ndef build(c): return f()",
    ),
    "a walrus in a question": (
        "from contract import model as m\ndef build(c):\n"
        "    if isinstance(x := c.mask.loss, m.SoftmaxMask): return 0\n    return x",
        "from contract import model as m\ndef build(c):\n"
        "    if isinstance(x := c.mask.head, m.SoftmaxMask): return 0\n    return x",
    ),
    "a name put together": (
        "def sigmoid_loss(): return 1\n"
        'def build(c): return globals()[f"{c.mask.loss.kind}_loss"]()',
        "def sigmoid_loss(): return 2\n"
        'def build(c): return globals()[f"{c.mask.loss.kind}_loss"]()',
    ),
    "a table of subclasses": (
        "class Base:\n    def __init_subclass__(cls): TABLE[cls.__name__] = cls\n"
        "TABLE = {}\nclass Sigmoid(Base): value = 1\n"
        "def build(c): return TABLE[c.mask.loss.kind.title()].value",
        "class Base:\n    def __init_subclass__(cls): TABLE[cls.__name__] = cls\n"
        "TABLE = {}\nclass Sigmoid(Base): value = 2\n"
        "def build(c): return TABLE[c.mask.loss.kind.title()].value",
    ),
    "a decorator of a method": (
        "T = {}\ndef put(f): return T.setdefault(1, f)\nclass H:\n    @staticmethod\n    @put\n"
        "    def f(): return 1\ndef build(c): return T[1]()",
        "T = {}\ndef put(f): return T.setdefault(1, f)\nclass H:\n    @staticmethod\n    @put\n"
        "    def f(): return 2\ndef build(c): return T[1]()",
    ),
    "a default that does something": (
        "T = {}\ndef spare(x=T.setdefault(1, 1)): ...\ndef build(c): return T[1]",
        "T = {}\ndef spare(x=T.setdefault(1, 2)): ...\ndef build(c): return T[1]",
    ),
    "an order": (
        "A = 1\nB = A\nA = 2\ndef build(c): return B",
        "A = 1\nA = 2\nB = A\ndef build(c): return B",
    ),
    "a key that is missing": (
        "def build(c): return {None: {1: 2}}",
        "def build(c): return {**{1: 2}}",
    ),
    "another module by its text": (
        "from importlib import import_module\n"
        'def build(c): return import_module(f"model.{c.mask.loss.kind}").f()',
        None,
    ),
    "a module as a value": ("from model import sigmoid\ndef build(c): return get(sigmoid)", None),
    "a file by its path": ('def build(c): return open("model/sigmoid.py").read()', None),
    "all records as a value": (
        "from contract import model as m\ndef build(c):\n"
        '    match getattr(m, "Softmax" + "Mask")():\n        case m.SoftmaxMask(): return 1',
        "from contract import model as m\ndef build(c):\n"
        '    match getattr(m, "Softmax" + "Mask")():\n        case m.SoftmaxMask(): return 2',
    ),
    "a record by the class of another": (
        "from contract import model as m\ndef build(c):\n"
        '    match type(c.mask)(loss={"kind": "softmax"}).loss:\n'
        "        case m.SoftmaxMask(): return 1",
        "from contract import model as m\ndef build(c):\n"
        '    match type(c.mask)(loss={"kind": "softmax"}).loss:\n'
        "        case m.SoftmaxMask(): return 2",
    ),
    "a parameter with the name of a module": (
        "from contract import model as m\ndef build(c, m=None):\n"
        "    match c:\n        case m.SoftmaxMask(): return 1",
        "from contract import model as m\ndef build(c, m=None):\n"
        "    match c:\n        case m.SoftmaxMask(): return 2",
    ),
    "dropped code that makes a name local": (
        "from contract import model as m\nN = 5\ndef build(c):\n"
        "    if isinstance(c.mask.loss, m.SoftmaxMask): OTHER = 1\n    return N",
        "from contract import model as m\nN = 5\ndef build(c):\n"
        "    if isinstance(c.mask.loss, m.SoftmaxMask): N = 1\n    return N",
    ),
    "a record that is read from elsewhere": (
        "from contract import model as m\ndef build(c):\n"
        "    match m.ModelConfig.model_validate(OTHER).mask.loss:\n"
        "        case m.SoftmaxMask(): return 1",
        "from contract import model as m\ndef build(c):\n"
        "    match m.ModelConfig.model_validate(OTHER).mask.loss:\n"
        "        case m.SoftmaxMask(): return 2",
    ),
}


@pytest.mark.parametrize(("before", "after"), CASES.values(), ids=CASES)
def test_whatever_changes_a_result_counts(before: str, after: str | None) -> None:
    """after: None where `model/sigmoid.py` changes instead."""
    found = set()
    for build, value in ((before, 1), (after or before, 1 if after else 2)):
        tree = {
            "workers/ray_entry.py": PROGRAM,
            "model/build.py": build.encode(),
            "model/a.py": b"def f(): return 'a'",
            "model/b.py": b"def f(): return 'b'",
            "model/sigmoid.py": f"def f(): return {value}".encode(),
        }
        found.add(Meaning(CONTRACT | tree).of(ARMS["sigmoid"]).sha256)
    assert len(found) == 2


def test_a_record_that_is_held_counts_but_for_its_values() -> None:
    place, anchor = "contract/model.py", "    class_agnostic: bool = False\n"
    text = CONTRACT[place].decode()
    assert text.count(anchor) == 1
    parts = [
        "",
        "    _scale: float = 2.0\n",
        "    SCALE: Final = 2.0\n",
        "    def model_post_init(self, context): print(self)\n",
        "    spare: float = Field(1.0, exclude=True)\n",
    ]
    trees = [
        CONTRACT
        | {
            "workers/ray_entry.py": b"def main(run): return run",
            place: text.replace(anchor, anchor + part).encode(),
        }
        for part in parts
    ]
    assert len({Meaning(tree).of(ARMS["sigmoid"]).sha256 for tree in trees}) == len(parts)
    assert len({Meaning(tree).of(ARMS["softmax"]).sha256 for tree in trees}) == 1
