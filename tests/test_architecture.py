"""The shape of the house: which way imports go, where families are named, who touches which library, how long things are."""

import ast
import inspect
from pathlib import Path

import pytest

import sculpt

ROOT = Path(sculpt.__file__).parent
FILES = {".".join(("sculpt", *path.relative_to(ROOT).with_suffix("").parts)): path for path in sorted(ROOT.rglob("*.py"))}
FAMILIES = ("diffusion", "gflownet", "molecules", "tokens")
BORDERS = {
    "diffusers": ("sculpt.diffusion.diffusers.", "sculpt.hub", "sculpt.apps.demos."),
    "gfn": ("sculpt.gflownet.", "sculpt.molecules.trees"),
    "transformers": ("sculpt.hub", "sculpt.tokens.transformers"),
    "rdkit": ("sculpt.molecules.",),
    "ipywidgets": ("sculpt.apps.explorer.",),
}


def tree_of(module):
    """Its syntax, without what only type checkers read."""
    tree = ast.parse(FILES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return tree


def imported(module):
    """Full names of what a module imports, anywhere in it."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


def edges():
    # A module's own package is no dependency, and the operators of model.py reach up to the compositions that they make.
    graph = {module: {name for name in imported(module) if name in FILES and name != module} for module in FILES}
    graph["sculpt.model"] -= {"sculpt.composition"}
    return graph


def test_the_graph_of_imports_has_no_cycle():
    graph, done = edges(), set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_nobody_outside_of_its_folder_names_a_family():
    excepted = ("sculpt.hub", "sculpt.apps.", "sculpt.molecules.", "sculpt.contents", "sculpt.__init__")
    for module in FILES:
        if module.startswith(excepted):
            continue
        for name in imported(module):
            for family in FAMILIES:
                inside = module.startswith(f"sculpt.{family}.")
                assert inside or not name.startswith(f"sculpt.{family}"), f"{module} imports {name}"
        others = [family for family in FAMILIES if not module.startswith(f"sculpt.{family}.")]
        named = [node.value for node in ast.walk(tree_of(module)) if isinstance(node, ast.Constant) and node.value in others]
        assert not named, f"{module} names {named}"


@pytest.mark.parametrize("library", BORDERS)
def test_other_libraries_are_touched_at_their_borders_only(library):
    for module in FILES:
        if any(name.split(".")[0] == library for name in imported(module)):
            assert module.startswith(BORDERS[library]), f"{module} imports {library}"


def test_nobody_below_the_applications_imports_them():
    for module in FILES:
        if not module.startswith(("sculpt.apps", "sculpt.__main__")):
            assert not [name for name in imported(module) if name.startswith("sculpt.apps")], module


def functions():
    for module in FILES:
        for node in ast.walk(ast.parse(FILES[module].read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield module, node


def test_modules_functions_and_signatures_are_short():
    for module, path in FILES.items():
        assert len(path.read_text().splitlines()) <= 350, module
    for module, node in functions():
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if body:
            assert node.end_lineno - body[0].lineno < 40, f"{module}.{node.name}"
        if not node.name.startswith("_"):
            names = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
            assert len(names) - (names[:1] in (["self"], ["cls"])) <= 10, f"{module}.{node.name}"


def test_one_loop_samples_populations():
    """Whoever steps a chain is the driver: nobody else calls ``step`` and ``start`` of one in a loop."""
    loops = []
    for module, function in functions():
        for loop in (node for node in ast.walk(function) if isinstance(node, ast.While | ast.For)):
            calls = {
                call.func.attr for call in ast.walk(loop) if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
            }
            if "step" in calls and "reweight" in calls or {"start", "done"} <= calls:
                loops.append(f"{module}.{function.name}")
        if any(isinstance(n, ast.Attribute) and n.attr == "reweight" for n in ast.walk(function)):
            assert f"{module}.{function.name}" in ("sculpt.chain.run",), f"{module}.{function.name} weighs a population"
    assert len(loops) <= 1


def test_every_name_of_the_table_of_contents_is_there():
    assert (ROOT / "py.typed").is_file()
    for name in sculpt._CONTENTS:
        assert getattr(sculpt, name) is not None
    with pytest.raises(AttributeError, match="sculpt has no 'reject'; its public names are load, Diffusion"):
        _ = sculpt.reject


def test_public_functions_are_annotated_and_their_docstrings_name_every_parameter():
    for name in sculpt._CONTENTS:
        thing = getattr(sculpt, name)
        if inspect.ismodule(thing):
            continue
        parents = inspect.getmro(thing) if isinstance(thing, type) else [thing]
        said = " ".join(parent.__doc__ or "" for parent in parents)
        function = inspect.unwrap(thing.__init__ if isinstance(thing, type) else thing)
        for parameter in list(inspect.signature(function).parameters.values()):
            if parameter.name in ("self", "args", "kwargs"):
                continue
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter.name} has no type"
            assert parameter.name in said, f"{name} does not say what {parameter.name} is"
