"""The benchmark of scheduling policies: suites of scenarios, their runs, an upper bound, and the report."""
