"""What holds for the whole tree, and is cheap to check."""

import ast
import dataclasses
import re
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import p2pcache
from p2pcache.config import Config
from p2pcache.metrics import Metrics

PACKAGE = Path(p2pcache.__file__).parent
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}

# Prometheus' base units, then the things that are counted one by one.
UNITS = {"bytes", "seconds", "info", "ratio"}
COUNTED = {
    "blames", "blobs", "claims", "failures", "fallbacks", "manifests", "peers", "pieces", "reads",
    "regions", "requests", "tags",
}  # fmt: skip
NEVER_A_LABEL = {"digest", "peer", "repository", "tag", "path", "name", "node", "client"}


def test_no_file_is_so_long_that_it_hides_two_things():
    lines = {str(path.relative_to(PACKAGE)): text.count("\n") for path, text in SOURCES.items()}
    assert not {name: count for name, count in lines.items() if count > 500}


def test_every_module_says_what_it_is_for():
    # The first statement of a module that has one; parsing them all takes half a second.
    assert not [path for path, text in SOURCES.items() if not text.startswith('"""')]


def test_every_setting_has_a_default_and_says_what_it_means():
    tree = ast.parse(SOURCES[PACKAGE / "config.py"])
    (body,) = (n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    documented = [
        field.target.id
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    ]
    assert documented == [field.name for field in dataclasses.fields(Config)]
    Config()  # every field has a default


def metric_families():
    # The library tells beside each counter when it was made: those names are not ours.
    families = text_string_to_metric_families(Metrics().render().decode())
    return [family for family in families if not family.name.endswith("_created")]


@pytest.mark.parametrize("family", metric_families(), ids=lambda family: family.name)
def test_a_metric_is_called_by_what_it_counts_and_its_unit(family):
    # The parser has taken the counters' "_total" off, and the writer puts it on.
    assert re.fullmatch(r"p2pcache(?:_[a-z]+){2,}", family.name)
    assert family.name.rpartition("_")[2] in UNITS | COUNTED
    assert family.documentation.endswith(".")


def test_labels_are_bounded():
    tree = ast.parse(SOURCES[PACKAGE / "metrics.py"])
    labels = {
        label.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for argument in call.args
        if isinstance(argument, ast.List)
        for label in argument.elts
        if isinstance(label, ast.Constant)
    }
    assert labels
    assert not labels & NEVER_A_LABEL
