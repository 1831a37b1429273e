"""What was found in data as lines: short on the terminal, whole in the report."""

from convmae.findings import Finding, report, told

FOUND = {
    "train": [Finding("left out 2 broken annotations", ["a (no box)", "b (no mask)"]), Finding("all of 3 are grey")],
    "val": [],
}


def test_each_finding_is_a_line_that_names_its_data():
    assert list(told(FOUND)) == ["train: left out 2 broken annotations", "train: all of 3 are grey"]
    assert list(told({"val": []})) == []


def test_the_report_has_every_item():
    assert report(FOUND) == (
        "train: left out 2 broken annotations\n    a (no box)\n    b (no mask)\ntrain: all of 3 are grey\n"
    )
    assert report({}) == ""
