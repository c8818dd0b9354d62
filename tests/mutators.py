"""Ways to spoil a folder of JSON and safetensors files, chosen by a random generator; hashes in JSON follow where that is wanted."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

RAW = "\x00RAW"
"""Marks a string that is written without its quotes."""
TWICE = "\x00TWICE"
"""Marks a name that is written without the mark, so that it is there twice."""

NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    10,
    64,
    10**3,
    10**5,
    10**6,
    10**9,
    2**31,
    2**31 - 1,
    2**40,
    2**63 - 1,
    2**63,
    10**30,
    -(10**9),
    0.5,
)
FLOATS = (1.5, -0.0, 1e-300, 1e38, 1e300, 1.7976931348623157e308, 3.0000000000000004, -1e-9)
TOKENS = ("NaN", "Infinity", "-Infinity", "1e400", "1.0", "-0", "1E2", "9" * 400, "9" * 5000, "[" * 900 + "]" * 900)
BROKEN = ("[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "0x10", "01", "'a'", "undefined", "", "1 2")
CLASSES = (
    "sculpt.cli.__main__.x", "sculpt.apps.cli.__main__.x", "sculpt.__main__:x", "os.system", "os:system", "builtins.eval",
    "builtins:exec", "gfn.gym:Box", "gfn.gym:ConditionalHyperGrid", "gfn.gym:GraphBuilding", "gfn.gym:__all__", "gfn.gym:",
    "gfn.gym.hypergrid:HyperGrid", "gfn.gym:HyperGrid", "gfn.gym:BitSequence", "gfn.gym:SetAddition", "gfn.gym:DiscreteEBM",
    "gfn.gym:PerfectBinaryTree", "gfn.gym:NonAutoregressiveBitSequence", "sculpt.x:FragmentTrees", "sculpt.x:GridNetwork",
    "sculpt.x.VectorNetwork", "sculpt.x.ImageNetwork", "sculpt.x.UNetEncoder", "sculpt.x.FragmentNetwork", "canary:Canary",
    "sculpt.x.FragmentFeatures", "sculpt.x.Samples", "GridNetwork", "torch.nn.Linear", "torch:load", "subprocess.Popen",
)  # fmt: skip
TEXTS = ("", " ", "x", "é", "名前", "\ud800", "\x00", "a\nb", "p & q", "p ⊗ q", "(a", "a | b", "-a", "../x", "/etc/passwd", "None",
         "cpu", "true", "1", "𝔘" * 50, "a" * 300, "b" * 70_000, "%s{0}", "{x!r}", "\u202eabc", "0" * 64, "__class__", "x\x1b[31m")  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    [1, 2, 3],
    ["a"],
    {"__class__": "x"},
    [[["C", [0]]]],
)

Place = tuple[Any, Any]
"""A container, and the key or index in it."""


def mutate(folder: Path, outside: Path, rng: random.Random) -> list[str]:
    """Spoil a folder in one to three ways, and say in which ones.

    Args:
        folder: spoiled.
        outside: a folder that links may lead to; nobody may change it.
        rng: chooses.
    """
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _files(folder)}
    done = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        files = _files(folder)
        if not files:
            break
        path = rng.choice(_weighed(files))
        how = rng.random()
        if how < 0.85 and path.suffix == ".json":
            done.append(_change_json_file(path, rng))
        elif how < 0.85 and path.suffix == ".safetensors":
            done.append(_change_tensors_file(path, rng))
        elif how < 0.96:
            done.append(_change_file(path, outside, rng))
        else:
            done.append(_change_folder(folder, outside, rng))
    if rng.random() < 0.85:
        _follow(folder, before)
    else:
        done.append("(hashes as they were)")
    return done


def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in found if path.stat().st_size < 2**27]


def _weighed(files: list[Path]) -> list[Path]:
    return [path for path in files for _ in range(3 if path.suffix == ".json" else 1)]


def _follow(folder: Path, before: dict[str, str]) -> None:
    """Let JSON files name the hashes that the files have now."""
    now = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _files(folder)}
    for path in _files(folder):
        if path.suffix == ".json":
            content = path.read_bytes()
            for name, old in before.items():
                content = content.replace(old.encode(), now.get(name, old).encode())
            _write(path, content)


def _write(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


# JSON


def _change_json_file(path: Path, rng: random.Random) -> str:
    try:
        text, said = change_json(path.read_text(), rng)
    except (ValueError, RecursionError):
        return f"{path.name}: no JSON any more"
    _write(path, text.encode("utf-8", "surrogatepass"))
    return f"{path.name}: {said}"


def change_json(text: str, rng: random.Random) -> tuple[str, str]:
    """A JSON text with one entry changed, and how."""
    found = json.loads(text)
    if rng.random() < 0.03 or not isinstance(found, (dict, list)) or not found:
        return rng.choice((*BROKEN, "[]", "null", "3", '"x"', text + "}", text[1:], "\ufeff" + text, text * 2)), "as a whole"
    parent, key = _place(found, rng)
    edit = rng.choice(
        (_another, _another, _number, _number, _number, _text, _text, _delete, _rename, _add, _swap, _twice, _size, _nest)
    )
    said = f"{edit.__name__[1:]} at {key!s:.40}"
    edit(found, parent, key, rng)
    out = json.dumps(found).replace(json.dumps(TWICE)[1:-1], "")
    return re.sub(r'"\\u0000RAW(.*?)"', lambda match: json.loads(f'"{match[1]}"'), out), said


def _place(found: Any, rng: random.Random) -> Place:
    """Somewhere in there: a step further down with each toss of a coin, so that long lists do not get all the attention."""
    while True:
        key = rng.choice(list(found)) if isinstance(found, dict) else rng.randrange(len(found))
        below = found[key]
        if not isinstance(below, (dict, list)) or not below or rng.random() < 0.25:
            return found, key
        found = below


def _another(root, parent, key, rng):
    raw = RAW + rng.choice((*TOKENS, *BROKEN[2:])) if rng.random() < 0.3 else None
    parent[key] = raw or json.loads(
        json.dumps(rng.choice((*OTHERS, rng.choice(NUMBERS), rng.choice(TEXTS), rng.choice(FLOATS))))
    )


def _number(root, parent, key, rng):
    """A number becomes another one; what is none is looked for among its neighbours."""
    places = _leaves(parent, (int, float)) or _leaves(root, (int, float))
    if not places:
        return _another(root, parent, key, rng)
    parent, key = rng.choice(places)
    value = parent[key] if abs(parent[key]) < 1e300 else 1
    near = (value + 1, value - 1, value * 2, -value, value * 1000, value + 0.5, float(value), bool(value), str(value))
    parent[key] = rng.choice(
        (rng.choice(NUMBERS), rng.choice(NUMBERS), rng.choice(FLOATS), RAW + rng.choice(TOKENS), rng.choice(near))
    )


def _text(root, parent, key, rng):
    places = _leaves(parent, str) or _leaves(root, str)
    if not places:
        return _another(root, parent, key, rng)
    parent, key = rng.choice(places)
    other_parent, other_key = rng.choice(places)
    value = parent[key]
    half = value[: rng.randrange(len(value) + 1)]
    parent[key] = rng.choice(
        (rng.choice(TEXTS), rng.choice(CLASSES), half, value + "x", value.upper(), other_parent[other_key])
    )


def _delete(root, parent, key, rng):
    del parent[key]


def _rename(root, parent, key, rng):
    if isinstance(parent, dict):
        value = parent.pop(key)
        parent[rng.choice((key + "x", key.upper(), rng.choice(TEXTS), *parent))] = value
    else:
        rng.shuffle(parent)


def _add(root, parent, key, rng):
    value = rng.choice((None, 1, "x", [], {}, 10**9))
    if isinstance(parent, dict):
        names = (
            "x",
            "",
            "self",
            "device",
            "kind",
            "backward",
            "policy",
            "debug",
            "dtype",
            "reward",
            "__class__",
            "config",
            rng.choice(TEXTS),
        )
        parent[rng.choice(names)] = value
    else:
        parent.insert(rng.randrange(len(parent) + 1), rng.choice((value, parent[key])))


def _swap(root, parent, key, rng):
    other, name = _place(root, rng)
    parent[key], other[name] = json.loads(json.dumps(other[name])), json.loads(json.dumps(parent[key]))


def _twice(root, parent, key, rng):
    if isinstance(parent, dict):
        parent[key + TWICE] = rng.choice((parent[key], None, 5))
    else:
        parent.append(parent[key])


def _size(root, parent, key, rng):
    places = [place for place in _leaves(root, list) if place[0][place[1]]] or [(parent, key)]
    parent, key = rng.choice(places)
    value = parent[key] if isinstance(parent[key], list) else [parent[key]]
    times = rng.choice((0, 2, 3, 100, 5000 // (len(value) + 1) + 1, 200_000 // (len(json.dumps(value)) + 1)))
    parent[key] = rng.choice((value * times, value[: len(value) // 2], value[:-1], sorted(value, key=str), [value] * 3))


def _nest(root, parent, key, rng):
    value = parent[key]
    for _ in range(rng.choice((1, 1, 2, 50, 400))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    parent[key] = value


def _leaves(found: Any, kind: type | tuple[type, ...]) -> list[Place]:
    """Where something of a kind is, at most so many of each list."""
    out = []
    for key in list(found) if isinstance(found, dict) else range(min(len(found), 20)):
        if isinstance(found[key], kind) and not isinstance(found[key], bool):
            out.append((found, key))
        if isinstance(found[key], (dict, list)):
            out += _leaves(found[key], kind)
    return out


# Tensors


def _change_tensors_file(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    try:
        length = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        names = [name for name in header if name != "__metadata__"]
        edit: Callable[..., bytes] = rng.choice((_lie, _lie, _rebuild, _rebuild, _rebuild, _tell, _length))
        new = edit(header, names, data, rng)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError, RecursionError):
        return f"{path.name}: no tensors any more"
    _write(path, new)
    return f"{path.name}: {edit.__name__[1:]}"


def _packed(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _lie(header, names, data, rng):
    """The header says something else than the bytes do."""
    text, _ = change_json(json.dumps({name: header[name] for name in rng.sample(names, min(3, len(names)))}), rng)
    if rng.random() < 0.3:
        return _packed(change_json(json.dumps(header), rng)[0].encode("utf-8", "surrogatepass"), data)
    return _packed(header | json.loads(text), data)


def _rebuild(header, names, data, rng):
    """Other tensors, and a header that fits them."""
    tensors = {
        name: [header[name]["dtype"], header[name]["shape"], data[slice(*header[name]["data_offsets"])]] for name in names
    }
    name = rng.choice(names)
    dtype, shape, content = tensors[name]
    value = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x00\x00\x80\xff", b"\x00" * 4))
    at = rng.randrange(len(content) // 4 or 1) * 4
    changed = {
        "drop": lambda: tensors.pop(name),
        "add": lambda: tensors.update({rng.choice((name + "x", "x", "policy.x", "backward.x", "")): [dtype, shape, content]}),
        "rename": lambda: tensors.update({name + "_": tensors.pop(name)}),
        "flat": lambda: tensors.update({name: [dtype, [len(content) // 4], content]}),
        "turn": lambda: tensors.update({name: [dtype, shape[::-1], content]}),
        "column": lambda: tensors.update({name: [dtype, [*shape, 1], content]}),
        "kind": lambda: tensors.update({name: [rng.choice(("I32", "U32", "F32", "I64", "C64", "F8_E8M0")), shape, content]}),
        "half": lambda: tensors.update({name: [rng.choice(("F16", "BF16", "I16", "U16")), shape, content[: len(content) // 2]]}),
        "bytes": lambda: tensors.update({name: [rng.choice(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2")), shape, content[: len(content) // 4]]}),
        "nothing": lambda: tensors.update({name: [dtype, [0, 10**12], b""]}),
        "one": lambda: tensors.update({name: [dtype, shape, content[:at] + value + content[at + 4 :]]}),
        "all": lambda: tensors.update({name: [dtype, shape, value * (len(content) // 4)]}),
        "row": lambda: tensors.update({name: [dtype, [shape[0] - 1, *shape[1:]], content[len(content) // shape[0] :]]}),
    }  # fmt: skip
    changed[rng.choice(list(changed))]()
    new, end = ({"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}), 0
    for name, (dtype, shape, content) in tensors.items():
        new[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(content)]}
        end += len(content)
    return _packed(new, b"".join(content for _, _, content in tensors.values()))


def _tell(header, names, data, rng):
    """Other metadata; where one is JSON, something in it."""
    told = header.get("__metadata__") or {}
    texts = [name for name, value in told.items() if value[:1] in "{["]
    if texts and rng.random() < 0.85:
        name = rng.choice(texts)
        told = told | {name: change_json(told[name], rng)[0]}
    else:
        told = rng.choice(({"x": "y"}, {"format": "tf"}, {"x": 1}, 3, None, [], dict.fromkeys(told, 5), {"x": "y" * 10**6}, {}))
    return _packed(header | {"__metadata__": told}, data)


def _length(header, names, data, rng):
    """Another length of the header."""
    content = _packed(header, data)
    true = int.from_bytes(content[:8], "little")
    length = rng.choice((0, 1, true - 1, true + 1, true + len(data), 2**24, 2**31, 2**40, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + content[8:]


# Files and folders


class Canary:
    """Whoever unpickles one runs a command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _change_file(path: Path, outside: Path, rng: random.Random) -> str:
    content, others = path.read_bytes(), [other for other in _files(path.parent) if other != path]
    flipped = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 10))):
        at = rng.randrange(min(len(flipped), rng.choice((64, 2000, 10**9)))) if flipped else 0
        flipped[at : at + 1] = bytes([(flipped[at] if flipped else 0) ^ 1 << rng.randrange(8)])
    ways: dict[str, Callable[[], Any]] = {
        "truncated": lambda: _write(path, content[: rng.choice((rng.randrange(len(content) + 1), len(content) - 1, 7, 8, 9))]),
        "flipped": lambda: _write(path, bytes(flipped)),
        "empty": lambda: _write(path, b""),
        "longer": lambda: _write(path, content + rng.choice((b"\x00" * 8, b"x" * 1000, content))),
        "sparse": lambda: os.truncate(path, rng.choice((2**25, 2**33, 2**40))),
        "noise": lambda: _write(path, rng.randbytes(rng.choice((8, 100, 5000)))),
        "utf-16": lambda: _write(path, content.decode("latin-1").encode("utf-16")),
        "pickle": lambda: _write(path, pickle.dumps(Canary(outside.parent / "CANARY"))),
        "removed": path.unlink,
        "folder": lambda: (path.unlink(), path.mkdir()),
        "fifo": lambda: (path.unlink(), os.mkfifo(path)),
        "other": lambda: _write(path, rng.choice(others).read_bytes()) if others else path.unlink(),
        "link": lambda: (path.unlink(), path.symlink_to(rng.choice(
            ("/etc/passwd", "/dev/zero", "/dev/full", "nowhere", path.name, "/proc/self/mem", "/proc/self/environ", "..", outside / "file")))),
    }  # fmt: skip
    way = rng.choice(("flipped", "truncated", *ways))
    ways[way]()
    return f"{path.name}: {way}"


def _change_folder(folder: Path, outside: Path, rng: random.Random) -> str:
    saved, file = folder / ".saved", rng.choice(_files(folder))
    if saved.exists() or saved.is_symlink():
        return "saved already"

    def spoiled():
        saved.mkdir()
        shutil.copy(file, saved / file.name)
        return _change_file(saved / file.name, outside, rng)

    def put(name, content):
        if not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_bytes(content) if isinstance(content, bytes) else (folder / name).symlink_to(content)

    ways: dict[str, Callable[[], Any]] = {
        "empty .saved": saved.mkdir,
        "spoiled .saved": spoiled,
        "whole .saved": lambda: (saved.mkdir(), [shutil.copy(path, saved / path.name) for path in _files(folder)]),
        "folder in .saved": lambda: (saved / file.name / "x").mkdir(parents=True),
        "linked .saved": lambda: saved.symlink_to(outside),
        "link in .saved": lambda: (saved.mkdir(), (saved / file.name).symlink_to(outside / "file")),
        "file .saved": lambda: saved.write_text("x"),
        "fifo .saved": lambda: os.mkfifo(saved),
        "debris": lambda: put(".config.json.host.1.0123456789ab.part", b"x"),
        "linked debris": lambda: put(".x.host.1.0123456789ab.part", outside),
        "code": lambda: [put(name, b"raise SystemExit('run')") for name in ("config.py", "sculpt.py", "torch.py")],
        "pickles": lambda: [put(name, pickle.dumps(Canary(outside.parent / "CANARY"))) for name in ("model.bin", "model.pt")],
    }  # fmt: skip
    way = rng.choice(list(ways))
    ways[way]()
    return way
