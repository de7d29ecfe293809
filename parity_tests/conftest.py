"""Prints, after a run, the largest error in each row of the table of tolerances."""

from parity_tests.support import LARGEST


def pytest_terminal_summary(terminalreporter) -> None:
    if LARGEST:
        terminalreporter.section("largest differences between JAX and Torch")
        for row, (error, name) in sorted(LARGEST.items()):
            terminalreporter.write_line(f"{row:<40} {error:.1e}  {name}")
