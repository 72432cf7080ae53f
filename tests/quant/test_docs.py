"""The catalog pages name every entry, and the numbers in them are true."""

import re
from pathlib import Path

import pytest

from quant.activations import ACTIVATIONS
from quant.catalog import QUANTIZERS
from quant.costs import bits_per_weight
from quant.formats import FORMATS
from quant.plan import Plan, PlanLayer, Totals
from quant.schemes import grammar, parse_scheme

DOCS = Path(__file__).parents[2] / "docs"
ROW = re.compile(r"^\| `([^`]+)` \| (\d+) x (\d+) \| (\d+) \| ([\d.]+) \|$", re.MULTILINE)


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "catalog"), [("formats.md", FORMATS), ("quantizers.md", QUANTIZERS)])
def test_every_entry_has_a_section(name, catalog):
    headings = re.findall(r"^## (\S+)$", page(name), re.MULTILINE)
    assert sorted(headings) == sorted(catalog)


def test_the_grammar_is_the_documented_one():
    assert all(line in page("formats.md") for line in grammar().splitlines())


def test_every_activation_format_has_a_row():
    section = page("formats.md").partition("## Activation formats")[2].partition("\n## ")[0]
    assert [name for name in ACTIVATIONS if f"`{name}`" not in section] == []


def test_the_table_of_sizes_is_right():
    rows = ROW.findall(page("formats.md"))
    assert {parse_scheme(text).weight.family for text, *_ in rows} == set(FORMATS)
    for text, height, width, stored, bits in rows:
        matrix = int(height), int(width)
        found = parse_scheme(text).storage(matrix).bytes
        assert (found, f"{bits_per_weight(found, matrix[0] * matrix[1]):.3f}") == (int(stored), bits), text


def test_every_field_of_a_plan_is_explained():
    text = page("plan.md")
    fields = [*Plan.__dataclass_fields__, *PlanLayer.__dataclass_fields__, *Totals.__dataclass_fields__]
    assert [name for name in fields if f"`{name}`" not in text] == []
