"""One solver, one file; `search.catalog.SOLVERS` lists them."""
