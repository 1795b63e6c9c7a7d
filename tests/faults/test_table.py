"""The written table is what the tests say, and leaves out no row."""

from table import PAGE, TABLES, read_faults, render


def test_the_page_is_what_the_script_writes() -> None:
    assert PAGE.read_text() == render(read_faults()), "run python tests/faults/write_table.py"


def test_every_row_of_the_first_three_tables_has_a_test() -> None:
    rows = {one.row for one in read_faults()}
    for letter, (_, num_rows) in TABLES.items():
        assert {f"{letter}{i + 1}" for i in range(num_rows)} <= rows
