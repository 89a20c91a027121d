"""`student-train report`: one page about a run, or about several in a row.  It needs no torch and no network.

It goes one way: `read` (what lies in a run's folder) and `evals` → `series` (thinned to what a screen shows) and
`checks` (what calls for attention) → `charts`, `diagrams`, `samples`, `tables` (parts of the page) → `page`.
"""
