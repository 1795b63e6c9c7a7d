"""Write docs/faults.md from the tests: `python tests/faults/write_table.py`."""

from table import PAGE, read_faults, render

if __name__ == "__main__":
    PAGE.write_text(render(read_faults()))
